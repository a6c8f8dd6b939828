import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.parameters import random_parameters
from zoo import mixers
from zoo.backbones import generate
from zoo.compilation import compile_for
from zoo.data.recall import IGNORED
from zoo.papers import based
from zoo.papers.based import Based, BasedConfig, BasedMQAR, MQARConfig
from zoo.train.recall import recall_metrics
from zoo.weights import names

SMALL = BasedConfig(
    vocab_size=29, dim=16, num_layers=4, num_heads=2, feature_dim=4, window_size=4, mlp_dim=10, linear_layers=(1,),
    window_layers=(2,),
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, 29)


@pytest.fixture(scope="module")
def small():
    model = Based(SMALL)
    return model, random_parameters(model, TOKENS)


def kinds(config):
    return [
        (type(m).__name__, getattr(m, "window", None)) for m in map(config.decoder.make_mixer, range(config.num_layers))
    ]


def test_layers_are_where_the_published_lists_put_them():
    layout = kinds(BasedConfig())
    assert [i for i, (name, _) in enumerate(layout) if name == "TaylorAttention"] == [1, 6, 11, 16, 21]
    assert [i for i, (_, window) in enumerate(layout) if window is not None] == [2, 7, 12, 17, 22]
    assert layout[2] == ("SoftmaxAttention", 129)  # 128 previous keys and the token's own
    assert layout[0] == layout[26] == ("GatedConvolution", None)
    large = kinds(zoo.create("based_1b").config)
    assert [i for i, (name, _) in enumerate(large) if name == "TaylorAttention"] == [1, 6, 11, 16, 21, 27, 33]
    attention = zoo.create("attn_360m").config
    assert set(kinds(attention)) == {("SoftmaxAttention", None)} and attention.decoder.rotary.features == 32


def test_only_window_layers_turn():
    mixer = BasedConfig().decoder.make_mixer(2)
    assert mixer.rotary.frequencies(64).shape == (32,)
    assert not hasattr(BasedConfig().decoder.make_mixer(1), "rotary")


def test_sizes_are_rounded_up():
    assert SMALL.padded_vocab_size == 32 and SMALL.decoder.mlp_features == 256
    assert BasedConfig().padded_vocab_size == 50264 and BasedConfig().decoder.mlp_features == 2048
    assert zoo.create("attn_360m").config.decoder.mlp_features == 2816


def test_token_by_token_and_in_pieces_equal_the_whole(small):
    model, variables = small
    apply = jax.jit(model.apply)
    whole, _ = apply(variables, TOKENS)
    assert whole.shape == (2, 12, 32)
    state, pieces = model.init_state(2, 12), []
    for start, stop in ((0, 7), *((t, t + 1) for t in range(7, 12))):
        logits, state = apply(variables, TOKENS[:, start:stop], state)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=2e-4)


def likeliest(apply, variables, prompt, length):
    """Greedy tokens by whole forward passes, of one padded length, so that one program serves."""
    new = []
    for t in range(prompt.shape[1], prompt.shape[1] + length):
        logits, _ = apply(variables, jnp.pad(prompt, ((0, 0), (0, 12 - t))))
        new.append(jnp.argmax(logits[:, t - 1], axis=-1))
        prompt = jnp.concatenate([prompt, new[-1][:, None]], axis=1)
    return jnp.stack(new, axis=1)


def test_generation_is_what_the_whole_forward_pass_says(small):
    """Prompts of three and of five tokens, padded together."""
    model, variables = small
    valid = jnp.array([[False, True, False, True, True], [True] * 5])
    new = generate(model, variables, TOKENS[:, :5], 4, valid=valid).tokens
    apply = jax.jit(model.apply)
    short = jnp.stack([TOKENS[0, jnp.array([1, 3, 4])]] * 2)
    np.testing.assert_array_equal(new[0], likeliest(apply, variables, short, 4)[0])
    np.testing.assert_array_equal(new[1], likeliest(apply, variables, TOKENS[:, :5], 4)[1])


def test_the_residual_stream_is_float32_in_bfloat16():
    model = Based(SMALL, dtype=jnp.bfloat16)
    seen = {}

    def watch(call, args, kwargs, context):
        if context.module.name in ("layer_1", "mixer") and context.method_name == "__call__":
            seen[context.module.name] = args[0].dtype
        return call(*args, **kwargs)

    def forward():
        with nn.intercept_methods(watch):
            return model.init_with_output(jax.random.key(0), TOKENS)[0][0]

    assert jax.eval_shape(forward).dtype == jnp.float32
    assert seen == {"layer_1": jnp.float32, "mixer": jnp.bfloat16}


@pytest.mark.slow
def test_the_program_for_an_accelerator_holds_its_kernels():
    config = dataclasses.replace(BasedConfig(num_layers=3, linear_layers=(1,), window_layers=(2,)), vocab_size=256)
    model = Based(config, dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 512), jnp.int32)))
    for linear, softmax in (
        ("linear_attention_tpu_forward", "attention_forward"),
        ("linear_attention_gpu", "attention"),
    ):
        target = "tpu-v5e" if "tpu" in linear else "h100"
        kernels = compile_for(
            target, lambda variables, tokens: model.apply(variables, tokens)[0], variables, tokens
        ).kernels
        for name in (linear, softmax):
            assert any(kernel.startswith(name) for kernel in kernels), (target, list(kernels))


def test_a_window_layer_sees_half_its_size_back():
    config = dataclasses.replace(SMALL, num_layers=1, linear_layers=(), window_layers=(0,))
    model = Based(config)
    variables = random_parameters(model, TOKENS)
    apply = jax.jit(model.apply)
    before, after = apply(variables, TOKENS)[0], apply(variables, TOKENS.at[:, 4].add(1))[0]
    changed = np.flatnonzero(np.abs(np.asarray(before - after)).max(axis=(0, 2)) > 1e-6)
    np.testing.assert_array_equal(changed, [4, 5, 6])


def test_states_do_not_grow_but_attentions_does():
    model, attention = Based(SMALL), Based(dataclasses.replace(SMALL, linear_layers=(), other_layers="attention"))
    assert mixers.state_bytes(model, 1000) == mixers.state_bytes(model, 100)
    assert mixers.state_bytes(attention, 1000) > 9 * mixers.state_bytes(attention, 100)


def test_published_names_go_in_and_out(small):
    for model, variables, rules in (
        (*small, based.weight_rules(SMALL)),
        (
            recall := BasedMQAR(
                MQARConfig(
                    d_model=8, mixers=("BaseConv", "Based", "SlidingAttn"), n_layers=3, max_position_embeddings=9
                )
            ),
            random_parameters(recall, TOKENS[:, :9]),
            based.mqar_weight_rules(recall.config),
        ),
    ):
        published = names.to_published(variables, rules)
        assert any(name.endswith("Wqkv.weight") for name in published)
        back = names.convert(published, rules, variables)
        jax.tree.map(np.testing.assert_array_equal, back, dict(variables))
        if isinstance(model, Based):
            of_hub = {f"model.{name}": array for name, array in published.items()}
            of_hub["val_metrics.num-tokens.count"] = np.zeros(())
            names.convert(of_hub | {"model.lm_head.weight": np.zeros((32, 16))}, rules, variables)
        with pytest.raises(names.NameMapError, match="surprise"):
            names.convert(published | {"surprise": np.zeros(1)}, rules, variables)


def test_losses_and_their_gradients(small):
    model, variables = small
    loss = based.next_token_loss(model)
    value, (_, metrics) = loss(variables["params"], {}, {"tokens": TOKENS}, {}, True)
    np.testing.assert_allclose(metrics["perplexity"], jnp.exp(value))
    logits = jnp.log(jnp.array([[[0.7, 0.2, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]]]))
    metrics = recall_metrics(logits, jnp.array([[0, IGNORED, 2]]))
    np.testing.assert_allclose(metrics["loss"], -np.log(0.7 * 0.1) / 2, rtol=1e-6)
    assert metrics["accuracy"] == 0.5


@pytest.mark.parametrize("published", ["Based", "SlidingAttn", "MHA"])
def test_the_recall_model_decodes_as_it_trains(published):
    model = BasedMQAR(MQARConfig(vocab_size=32, d_model=8, mixers=("BaseConv", published), feature_dim=4, block_size=3))
    variables = random_parameters(model, TOKENS)
    whole, _ = jax.jit(model.apply)(variables, TOKENS)
    state, step, pieces = model.init_state(2, 12), jax.jit(model.apply), []
    for t in range(12):
        logits, state = step(variables, TOKENS[:, t : t + 1], state)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-4)


def test_the_identity_passes_its_norm_on():
    model = BasedMQAR(MQARConfig(vocab_size=29, d_model=8, n_layers=1, mixers=("BaseConv",)))
    variables = random_parameters(model, TOKENS)
    p = variables["params"]

    def layer_norm(x, w):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w["scale"] + w["bias"]

    x = np.asarray(p["embed"]["embedding"])[np.asarray(TOKENS)]
    mixer = mixers.create("base_convolution", features=8)
    x = x + mixer.apply({"params": p["layer_0_mixer"]}, layer_norm(x, p["layer_0_norm1"]))[0]
    x = x + layer_norm(x, p["layer_0_norm2"])
    expected = layer_norm(x, p["norm"]) @ p["embed"]["embedding"].T
    np.testing.assert_allclose(model.apply(variables, TOKENS)[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"window_size": 5}, "window_size must be even and at least 2, got 5"),
        ({"linear_layers": (1, 2)}, r"must be disjoint indices below 4, got \(1, 2\) and \(2,\)"),
        ({"linear_layers": (4,)}, "disjoint indices below 4"),
        ({"other_layers": "conv"}, "unknown kind of other_layers 'conv'"),
        ({"num_heads": 3}, "must be a multiple of heads|rotary features must be even"),
    ],
)
def test_wrong_configs_say_so(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    "error, change, message",
    [
        (ValueError, {"mixers": ("Base",)}, "unknown mixer 'Base'; did you mean 'Based'"),
        (ValueError, {"d_model": 0}, "d_model must be at least 1, got 0"),
        (TypeError, {"mixers": ("based",), "mixer_options": {"window": 3}}, "'based' has no option 'window'"),
    ],
)
def test_wrong_recall_configs_say_so(error, change, message):
    with pytest.raises(error, match=message):
        MQARConfig(**change)


def test_wrong_tokens_say_so():
    model = BasedMQAR(MQARConfig(max_position_embeddings=4))
    with pytest.raises(ValueError, match="12 tokens are more than the 4 positions"):
        jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    with pytest.raises(TypeError, match="tokens must be integers"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 3)))

"""The decoder language model: the published families in small, its state, padding, sizes and errors."""

import dataclasses
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parameters import random_parameters
from zoo.backbones import DecoderConfig, DecoderLM
from zoo.layers.rotary import LinearScaling, Rotary

LENGTH = 10
_SMALL = {"vocab_size": 31, "features": 24, "layers": 2, "heads": 4, "mlp_features": 40, "max_length": 16}
FAMILIES = {
    "gpt2": DecoderConfig.preset("gpt2", **_SMALL),
    "llama": DecoderConfig.preset(
        "smollm2_135m", **_SMALL | {"key_heads": 2, "rotary": Rotary(scaling=LinearScaling(4.0))}
    ),
    "mistral": DecoderConfig.preset("mistral_7b", **_SMALL | {"key_heads": 2, "head_dim": 8, "window": 4}),
    "qwen2": DecoderConfig.preset("qwen2_0_5b", **_SMALL),
    "gemma": DecoderConfig.preset(
        "llama3_8b",
        **_SMALL
        | {
            "key_heads": 2, "mlp": "geglu_tanh", "embedding_scale": 24**0.5, "logit_softcap": 3.0,
            "window": (3, None), "mixer_options": {"softcap": 5.0, "qk_norm": "rms"},
        },
    ),
    "post_norm": DecoderConfig(
        **_SMALL, norm_position="post", positions="none", mlp="relu", mixer=("softmax", "softmax")
    ),
}  # fmt: skip
every_family = pytest.mark.parametrize("family", FAMILIES)


def tokens(seed: int = 0, batch: int = 2, length: int = LENGTH) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 31)


@cache
def parameters(family: str):
    return random_parameters(DecoderLM(FAMILIES[family]), tokens())


@cache
def compiled(family: str):
    return jax.jit(DecoderLM(FAMILIES[family]).apply)


def parallel(family: str, ids: jax.Array) -> jax.Array:
    return compiled(family)(parameters(family), ids)[0]


def assert_close(actual, expected, tolerance=5e-5):
    scale = float(jnp.std(expected))
    np.testing.assert_allclose(np.asarray(actual) / scale, np.asarray(expected) / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2_medium", 354_823_168),
        ("gpt2_large", 774_030_080),
        ("gpt2_xl", 1_557_611_200),
        ("llama2_7b", 6_738_415_616),
        ("llama2_13b", 13_015_864_320),
        ("llama3_8b", 8_030_261_248),
        ("mistral_7b", 7_241_732_096),
        ("qwen2_0_5b", 494_032_768),
        ("smollm2_135m", 134_515_008),
        ("smollm2_360m", 361_821_120),
        ("smollm2_1_7b", 1_711_376_384),
    ],
)
def test_published_sizes(preset, count):
    model = DecoderLM(DecoderConfig.preset(preset))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count


def test_every_preset_has_its_size_tested():
    tested = {mark.args[1][i][0] for mark in test_published_sizes.pytestmark for i in range(len(mark.args[1]))}
    assert tested == set(DecoderConfig.PRESETS)


def test_names_of_parameters():
    names = {
        jax.tree_util.keystr(path[1:], simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(parameters("gpt2"))
    }
    block = {f"norm{n}/{part}" for n in (1, 2) for part in ("scale", "bias")}
    block |= {f"mixer/{name}/{part}" for name in ("query", "key", "value", "out") for part in ("kernel", "bias")}
    block |= {f"mlp/{name}/{part}" for name in ("up", "down") for part in ("kernel", "bias")}
    expected = {f"layer_{layer}/{name}" for layer in range(2) for name in block}
    assert names == expected | {"embed/embedding", "positions/embedding", "norm/scale", "norm/bias"}
    assert "head" in parameters("mistral")["params"] and "head" not in parameters("llama")["params"]


@every_family
def test_logits_are_float32(family):
    logits = parallel(family, tokens())
    assert (logits.shape, logits.dtype) == ((2, LENGTH, 31), jnp.float32)
    assert bool(jnp.isfinite(logits).all())


@every_family
def test_prefill_and_token_by_token_equal_parallel(family):
    ids = tokens()
    state = DecoderLM(FAMILIES[family]).init_state(2, LENGTH + 2)
    logits, state = compiled(family)(parameters(family), ids[:, :6], state)
    outputs = [logits]
    for t in range(6, LENGTH):
        logits, state = compiled(family)(parameters(family), ids[:, t : t + 1], state)
        outputs.append(logits)
    assert_close(jnp.concatenate(outputs, axis=1), parallel(family, ids))
    np.testing.assert_array_equal(state.length, LENGTH)


@every_family
def test_a_token_changes_no_earlier_logits(family):
    ids = tokens()
    before, after = parallel(family, ids), parallel(family, ids.at[:, 5].add(1) % 31)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert float(jnp.abs(before[:, 5:] - after[:, 5:]).min(axis=-1).max()) > 0


@every_family
def test_left_padding_changes_nothing_in_prefill_or_decoding(family):
    ids = tokens()
    valid = jnp.arange(LENGTH)[None] >= jnp.array([[3], [0]])
    padded = jnp.stack([jnp.concatenate([jnp.full(3, 7), ids[0, : LENGTH - 3]]), ids[1]])
    logits, state = compiled(family)(
        parameters(family), padded, DecoderLM(FAMILIES[family]).init_state(2, LENGTH + 2), valid=valid
    )
    assert bool(jnp.isfinite(logits).all())
    without_state, _ = compiled(family)(parameters(family), padded, valid=valid)
    expected = parallel(family, ids)
    for y in (logits, without_state):
        assert_close(y[0, 3:], expected[0, : LENGTH - 3])
        assert_close(y[1], expected[1])
    logits, _ = compiled(family)(parameters(family), ids[:, -3:-2], state)
    assert_close(logits[0, 0], expected[0, LENGTH - 3])


@every_family
def test_gradients_are_finite_and_reach_every_parameter(family):
    model = DecoderLM(dataclasses.replace(FAMILIES[family], remat=True))

    def loss(variables):
        logits, _ = model.apply(variables, tokens())
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens()[:, 1:, None], -1).mean()

    for path, gradient in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(parameters(family))):
        name = jax.tree_util.keystr(path)
        assert bool(jnp.isfinite(gradient).all()), name
        without_rotation = FAMILIES[family].positions != "rotary"  # then a bias of keys cancels in the softmax
        if not (without_rotation and name.endswith("['key']['bias']")):
            assert float(jnp.abs(gradient).max()) > 1e-7, name


def test_recomputing_blocks_changes_nothing():
    config = FAMILIES["llama"]
    recomputed = jax.jit(DecoderLM(dataclasses.replace(config, remat=True)).apply)(parameters("llama"), tokens())[0]
    assert_close(recomputed, parallel("llama", tokens()), 1e-6)


def test_tied_logits_are_products_with_the_embedding():
    model = DecoderLM(FAMILIES["llama"])
    hidden, _ = model.apply(parameters("llama"), tokens(), method="hidden")
    assert_close(hidden @ parameters("llama")["params"]["embed"]["embedding"].T, parallel("llama", tokens()))


def test_logits_of_the_last_token_alone():
    """What generation needs of a prompt: the head's product for one token."""
    model = DecoderLM(FAMILIES["mistral"])
    hidden, _ = model.apply(parameters("mistral"), tokens(), method="hidden")
    last = model.apply(parameters("mistral"), hidden[:, -1], method="logits")
    assert_close(last, parallel("mistral", tokens())[:, -1])


def test_logits_stay_below_their_softcap():
    assert float(jnp.abs(parallel("gemma", tokens())).max()) <= 3.0


def test_windows_repeat_layer_after_layer():
    config = DecoderConfig.preset("mistral_7b", **_SMALL | {"layers": 5, "key_heads": 2, "window": (4, None)})
    state = DecoderLM(config).init_state(1, 16)
    assert [layer.key.shape[1] for layer in state.layers] == [4, 16, 4, 16, 4]


def test_bfloat16_is_near_float32():
    model = DecoderLM(FAMILIES["llama"], dtype=jnp.bfloat16)
    expected = parallel("llama", tokens())
    logits, state = jax.jit(model.apply)(parameters("llama"), tokens(), model.init_state(2, LENGTH))
    assert logits.dtype == jnp.float32 and state.layers[0].key.dtype == jnp.bfloat16
    assert float(jnp.sqrt(jnp.mean((logits - expected) ** 2))) < 2e-2 * float(jnp.std(expected))


def test_initial_predictions_are_nearly_uniform():
    logits, _ = jax.jit(DecoderLM(FAMILIES["gpt2"]).init_with_output)(jax.random.key(0), tokens())[0]
    nats = -jax.nn.log_softmax(logits).mean()
    assert float(nats) == pytest.approx(np.log(31), abs=0.05)


def test_branches_into_the_residual_stream_start_smaller():
    config = DecoderConfig.preset("gpt2", **_SMALL | {"layers": 8})
    for initializer, expected in ((config.kernel_init, 0.02), (config.out_init, 0.02 / 4)):
        assert float(initializer(jax.random.key(0), (100, 100)).std()) == pytest.approx(expected, rel=0.05)
    mixer = config.make_mixer(0)
    assert float(mixer.out_init(jax.random.key(0), (100, 100)).std()) == pytest.approx(0.02 / 4, rel=0.05)


def test_dropout_draws_from_its_key():
    model = DecoderLM(dataclasses.replace(FAMILIES["gpt2"], dropout=0.3))

    def apply(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return jax.jit(model.apply, static_argnames="deterministic")(
            parameters("gpt2"), tokens(), deterministic=False, rngs=rngs
        )[0]

    np.testing.assert_array_equal(apply(0), apply(0))
    assert float(jnp.abs(apply(0) - apply(1)).max()) > 1e-3


def test_interception_reads_the_residual_stream():
    seen = {}

    def read(next_function, args, kwargs, context):
        y = next_function(*args, **kwargs)
        if context.method_name == "__call__":
            seen["/".join(context.module.path)] = args[0] if args else None, y
        return y

    with nn.intercept_methods(read):
        logits, _ = DecoderLM(FAMILIES["llama"]).apply(parameters("llama"), tokens())
    before, (after, _) = seen["layer_1"]
    middle, _ = seen["layer_1/norm2"]
    assert_close(before + seen["layer_1/mixer"][1][0], middle)
    assert_close(middle + seen["layer_1/mlp"][1], after)
    assert_close(seen["norm"][1] @ parameters("llama")["params"]["embed"]["embedding"].T, logits)


def test_configs_are_hashable_and_compare_by_value():
    assert len({DecoderConfig.preset("gpt2", mixer_options={"qk_norm": "rms"}) for _ in range(2)}) == 1


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "unknown mixer 'softmx'; did you mean 'softmax'", {"mixer": "softmx"}),
        (TypeError, "'softmax' has no option 'heds'", {"mixer_options": {"heds": 3}}),
        (ValueError, r"features \(24\) must be a multiple of heads \(5\)", {"heads": 5}),
        (ValueError, "layers must be positive, got 0", {"layers": 0}),
        (ValueError, "learned positions need max_length", {"positions": "learned", "max_length": None}),
        (ValueError, "vocab_size must be positive, got 0", {"vocab_size": 0}),
        (ValueError, r"dropout must be in \[0, 1\), got 1.0", {"dropout": 1.0}),
        (ValueError, "unknown MLP 'swiglo'; did you mean 'swiglu'", {"mlp": "swiglo"}),
        (ValueError, "unknown choice of norm 'rsm'; did you mean 'rms'", {"norm": "rsm"}),
        (ValueError, "unknown choice of positions 'alibi'; known: learned, none, rotary", {"positions": "alibi"}),
        (ValueError, "unknown choice of norm_position 'middle'; known: post, pre", {"norm_position": "middle"}),
        (ValueError, "window as a tuple needs 1 to layers = 2 entries, got 3", {"window": (1, 2, 3)}),
        (ValueError, "logit_softcap must be positive, got 0.0", {"logit_softcap": 0.0}),
    ],
)
def test_wrong_configs_are_refused(error, message, changes):
    with pytest.raises(error, match=message):
        DecoderConfig(**_SMALL | changes)


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="unknown preset of DecoderConfig 'gpt2_xxl'; did you mean 'gpt2_xl'"):
        DecoderConfig.preset("gpt2_xxl")


@pytest.mark.parametrize(
    ("error", "message", "ids", "arguments"),
    [
        (ValueError, r"tokens must be \(batch, time\).*\(4,\)", jnp.zeros(4, jnp.int32), {}),
        (ValueError, "not empty", jnp.zeros((2, 0), jnp.int32), {}),
        (TypeError, "tokens must be integers, got float32", jnp.zeros((2, 4)), {}),
        (ValueError, "17 tokens are more than max_length 16", jnp.zeros((2, 17), jnp.int32), {}),
        (ValueError, r"tokens must be in 0 .. 30, got 0 .. 31", jnp.array([[0, 31]]), {}),
        (ValueError, r"tokens must be in 0 .. 30, got -1 .. 2", jnp.array([[-1, 2]]), {}),
        (ValueError, "valid must be bool", jnp.zeros((2, 4), jnp.int32), {"valid": jnp.ones((2, 4), jnp.int32)}),
        (TypeError, "state must be a DecoderState of 2 layers", jnp.zeros((2, 4), jnp.int32), {"state": 3}),
        (
            ValueError,
            "batch of 2, the state one of 3",
            jnp.zeros((2, 4), jnp.int32),
            {"state": DecoderLM(FAMILIES["gpt2"]).init_state(3, 8)},
        ),
    ],
)
def test_wrong_input_is_refused(error, message, ids, arguments):
    with pytest.raises(error, match=message):
        DecoderLM(FAMILIES["gpt2"]).apply(parameters("gpt2"), ids, **arguments)


def test_growing_past_max_length_is_refused():
    model = DecoderLM(FAMILIES["mistral"])  # its ring cache would go on
    with pytest.raises(ValueError, match="17 tokens is longer than max_length 16"):
        model.init_state(2, 17)
    _, state = compiled("mistral")(parameters("mistral"), tokens(), model.init_state(2, 16))
    with pytest.raises(ValueError, match="20 tokens, past included, are more than max_length 16"):
        model.apply(parameters("mistral"), tokens(), state)

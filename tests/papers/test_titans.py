import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels.neural_memory import initial_state, neural_memory, read_memory
from tests.parameters import random_parameters
from zoo import mixers
from zoo.backbones import generate
from zoo.compilation import compile_model
from zoo.papers import titans
from zoo.papers.titans import CommunityMemoryConfig, CommunityNeuralMemory, Titans, TitansConfig
from zoo.weights import names

SMALL = TitansConfig(
    kind="mac", vocab_size=29, dim=16, num_layers=2, num_heads=2, memory_heads=1, mlp_dim=8, memory_depth=1,
    chunk_size=2, window=4, segment_len=4, num_persistent_tokens=2,
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(0), (2, 11), 0, 29)


def small(**changes):
    model = Titans(dataclasses.replace(SMALL, **changes))
    return model, random_parameters(model, TOKENS)


def test_a_language_model_streams_what_it_reads_at_once():
    """Across borders of segments and chunks, and to a last segment that is not full."""
    model, variables = small()
    apply = jax.jit(model.apply)
    whole, _ = apply(variables, TOKENS)
    state, pieces = model.init_state(2, 11), []
    for t in range(11):
        logits, state = apply(variables, TOKENS[:, t : t + 1], state)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-3 * float(whole.std()))


@pytest.mark.slow
def test_as_printed_memory_as_context_leaks_and_the_default_does_not():
    changed = TOKENS.at[:, 2].add(1)
    for causal in (True, False):
        model, variables = small(causal=causal)
        apply = jax.jit(lambda variables, tokens, model=model: model.apply(variables, tokens)[0])
        before, after = apply(variables, TOKENS), apply(variables, changed)
        assert bool((before[:, :2] == after[:, :2]).all()) == causal
    with pytest.raises(ValueError, match="causal=False has no state"):
        model.apply(variables, TOKENS, model.init_state(2, 11))


def test_generation_and_a_state_that_does_not_grow():
    model, variables = small(kind="mal", num_layers=1)
    new = generate(model, variables, TOKENS[:, :5], 3).tokens
    apply, whole = jax.jit(model.apply), TOKENS[:, :5]
    for t in range(5, 8):  # of one length, so that one program serves
        logits, _ = apply(variables, jnp.pad(whole, ((0, 0), (0, 8 - t))))
        whole = jnp.concatenate([whole, logits[:, t - 1 : t].argmax(-1)], axis=1)
    np.testing.assert_array_equal(new, whole[:, 5:])
    assert mixers.state_bytes(model, 1000) == mixers.state_bytes(model, 100)


def test_ablations_take_their_parameters_away():
    def parts(**changes):
        model = Titans(dataclasses.replace(SMALL, kind="lmm", num_layers=1, **changes))
        shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
        return set(shapes["params"]["decoder"]["layer_0"]["mixer"])

    everything = parts()
    assert everything - parts(momentum=False) == {"eta"}
    assert everything - parts(decay=False) == {"alpha"}
    assert parts(gate_granularity="channel") - everything == {"alpha_down", "eta_down", "theta_down"}
    assert everything - parts(conv_size=0) == {"query_convolution", "key_convolution", "value_convolution"}


@pytest.mark.parametrize("kind", ["lmm", "mac"])
def test_names_go_in_and_out(kind):
    model, variables = small(kind=kind, memory_depth=2)
    rules = titans.model.weight_rules(model.config)
    published = names.to_published(variables, rules)
    assert published["layers.1.mixer.memory.memory_weights.0"].shape == (1, 64, 16)
    assert ("layers.0.mixer.persistent" in published) == (kind == "mac")
    back = names.convert(published, rules, variables)
    jax.tree.map(np.testing.assert_array_equal, back, dict(variables))


def test_masks_are_what_the_paper_draws():
    mask = titans.attention_mask(SMALL, 4)
    lower = np.tri(4, dtype=bool)
    np.testing.assert_array_equal(mask, np.concatenate([np.ones((4, 2), bool), lower, lower], axis=1))
    averaged = titans.attention_mask(dataclasses.replace(SMALL, num_memory_tokens=2), 4)[:, 2:4]
    np.testing.assert_array_equal(averaged, [[0, 0], [0, 0], [1, 0], [1, 0]])
    printed = titans.attention_mask(dataclasses.replace(SMALL, causal=False), 3)[:, 2:6]
    np.testing.assert_array_equal(printed, [[1, 1, 1, 0]] * 3)
    window = titans.attention_mask(dataclasses.replace(SMALL, kind="mag", window=2), 3)
    np.testing.assert_array_equal(window, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 1, 1]])
    with pytest.raises(ValueError, match="no attention"):
        titans.attention_mask(dataclasses.replace(SMALL, kind="lmm"), 3)


@pytest.mark.slow
def test_a_trace_follows_the_memory():
    model, variables = small(kind="lmm", num_layers=1)
    (inputs,) = titans.memory_inputs(model, variables, TOKENS)
    assert inputs.alpha.shape == (2, 11, 1, 1) and float(inputs.theta.max()) <= 0.1
    trace = titans.trace_memory(inputs, 2)
    out, _ = neural_memory(*inputs[:6], inputs.memory, norm=inputs.norm, chunk_size=2)
    np.testing.assert_allclose(trace.after, out, rtol=1e-4, atol=1e-5)
    # Of a matrix: |2 (W k - v) k^T| = 2 |W k - v| |k|, and the first chunk reads the first weights.
    np.testing.assert_allclose(trace.surprise[..., 0], 2 * jnp.sqrt(trace.loss), rtol=1e-3)
    first = initial_state(inputs.memory, 2).weights
    np.testing.assert_allclose(trace.before[:, :2], read_memory(inputs.query, first)[:, :2], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="got mac"):
        titans.memory_inputs(*small(), TOKENS)


def test_loss_reaches_the_first_weights_through_the_inner_training():
    model, variables = small(kind="lmm", num_layers=1)
    loss = zoo.registry.model("titans_lmm_170m").loss(model)
    value, gradient = jax.jit(jax.value_and_grad(lambda params: loss(params, {}, {"tokens": TOKENS}, {}, True)[0]))(
        variables["params"]
    )
    mixer = gradient["decoder"]["layer_0"]["mixer"]
    assert np.isfinite(value)
    for part in ("memory", "theta", "eta", "alpha"):
        assert all(float(jnp.abs(leaf).max()) > 1e-6 for leaf in jax.tree.leaves(mixer[part])), part


def test_the_communitys_memory_answers_with_complete_chunks():
    config = CommunityMemoryConfig(dim=8, chunk_size=3)
    model = CommunityNeuralMemory(config)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8))
    variables = random_parameters(model, x)
    apply = jax.jit(model.apply)
    before, after = apply(variables, x)[0], apply(variables, x.at[:, 2].add(1.0))[0]
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert (before[:, 2:] != after[:, 2:]).any(axis=-1).all()  # weights of token 2's chunk answer token 2
    before, after = apply(variables, x)[0], apply(variables, x.at[:, 7].add(1.0))[0]
    np.testing.assert_array_equal(before[:, :7], after[:, :7])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "macc"}, "unknown kind 'macc'; did you mean 'mac'"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"kind": "lmm", "causal": False}, "a form of kind 'mac' only, got 'lmm'"),
        ({"num_memory_tokens": 3}, r"num_memory_tokens must divide segment_len \(4\), got 3"),
        ({"memory_heads": 3}, r"features \(16\) must be a multiple of heads \(3\)"),
        ({"memory_depth": 0}, "memory_depth must be at least 1, got 0"),
        ({"memory_lr_max": 0.0}, "rate_max must be positive"),
        ({"gate_granularity": "row"}, "gate_granularity must be one of"),
        ({"kind": "lmm", "gate_rank": 0}, "gate_rank must be at least 1, got 0"),
        ({"num_persistent_tokens": -1}, "must not be negative, got -1"),
    ],
)
def test_wrong_configs_say_so(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 1, "dim_head": 4}, "one head has the width of a token, 384, got dim_head 4"),
        ({"batch_size": 65}, r"a multiple of chunk_size \(64\), got 65"),
        ({"chunk_size": 1, "attn_pool_chunks": True}, "needs a chunk_size of more than 1"),
    ],
)
def test_wrong_community_configs_say_so(change, message):
    with pytest.raises(ValueError, match=message):
        CommunityMemoryConfig(**change)


@pytest.mark.slow
@pytest.mark.parametrize("id", ["titans_lmm_760m", "titans_mag_760m", "titans_mac_1_3b"])
def test_published_sizes_train_on_a_slice(id):
    """A step of 4096 tokens a device, on 16 of v5p."""
    report = compile_model(id, "tpu-v5p", (16,), training=True, batch_size=16, dtype=jnp.bfloat16, remat=True)
    assert report.parameters == zoo.registry.model(id).variant.parameters
    assert report.fits
    assert any(name.startswith("neural_memory_tpu") for name in report.kernels)

"""Layers as dynamical systems: each equals its system, token by token and as one matrix."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels.linear_attention import linear_attention
from kernels.selective_scan import selective_scan
from tests.parameters import random_parameters
from zoo import mixers
from zoo.mixers.dynamical import forget_gate
from zoo.papers import dsf
from zoo.weights import to_published

X = jax.random.normal(jax.random.key(0), (2, 7, 8))
LAYERS = {
    "lin_attention": ("linear_attention", {"heads": 2, "feature_dim": 3, "qkv_bias": True}),
    "identity_map": ("linear_attention", {"heads": 2, "feature_map": "identity", "normalize": False}),
    "norm_attention": ("normalized_attention", {"heads": 2, "query_dim": 3, "qkv_bias": True}),
    "s6": ("plain_s6", {"state_size": 3}),
    "ssd": ("plain_s6", {"state_size": 3, "scalar": True}),
    "qlstm": ("qlstm", {}),
    "qlstm_rev": ("qlstm", {"reversed": True}),
}


def make(kind):
    name, options = LAYERS[kind]
    mixer = mixers.create(name, features=8, **options)
    return mixer, random_parameters(mixer, X)


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_is_its_system_and_the_system_its_matrix(kind):
    mixer, variables = make(kind)
    found = jax.jit(lambda variables, x: dsf.to_dsf(mixer, variables, x))(variables, X)
    outputs = found.outputs.swapaxes(1, 2).reshape(2, 7, -1)
    expected = dsf.core_outputs(mixer, variables, X)
    if kind.startswith("qlstm"):
        outputs = outputs * jax.nn.gelu(X @ variables["params"]["gate"]["kernel"], approximate=False)
    np.testing.assert_allclose(outputs, expected, atol=1e-5 * float(jnp.std(expected)) + 1e-5)
    kernel = dsf.ltv_kernel(found.system)
    flat = jnp.einsum("bhyx,bhx->bhy", kernel, found.inputs.reshape(*found.inputs.shape[:2], -1))
    np.testing.assert_allclose(flat.reshape(found.outputs.shape), found.outputs, atol=2e-5)


@pytest.mark.parametrize("kind", ["norm_attention", "ssd"])
def test_effective_attention_applied_to_inputs_gives_outputs(kind):
    mixer, variables = make(kind)
    found = dsf.to_dsf(mixer, variables, X)
    weights = dsf.effective_attention(mixer, variables, X)
    np.testing.assert_array_equal(weights, jnp.tril(weights))
    if kind == "norm_attention":
        applied = jnp.einsum("bhij,bhjv->bhiv", weights, found.inputs)
    else:
        applied = jnp.einsum("bxij,bhjx->bhix", weights, found.inputs)
    np.testing.assert_allclose(applied, found.outputs, atol=2e-5)


def test_softmax_attention_has_a_matrix_and_no_system():
    mixer = mixers.create("softmax", features=8, heads=2, query_dim=3)
    variables = random_parameters(mixer, X)
    weights = dsf.effective_attention(mixer, variables, X)
    value = (X @ variables["params"]["value"]["kernel"]).reshape(2, 7, 2, 4)
    out = jnp.einsum("bhij,bjhv->bihv", weights, value).reshape(2, 7, 8)
    np.testing.assert_allclose(out, dsf.core_outputs(mixer, variables, X), atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="no state of finite size"):
        dsf.to_dsf(mixer, variables, X)


def test_a_small_system_is_part_of_a_larger_one():
    rngs = jax.random.split(jax.random.key(0), 5)
    system = dsf.System(
        jax.nn.sigmoid(jax.random.normal(rngs[0], (6, 4))), jax.random.normal(rngs[1], (6, 4, 3)),
        jax.random.normal(rngs[2], (6, 2, 4)), jax.random.normal(rngs[3], (6, 2, 3)),
    )  # fmt: skip
    inputs = jax.random.normal(rngs[4], (6, 3))
    larger = dsf.System(
        jnp.pad(system.transition, ((0, 0), (0, 5)), constant_values=0.9),
        jnp.pad(system.enter, ((0, 0), (0, 5), (0, 0))),
        jnp.pad(system.leave, ((0, 0), (0, 0), (0, 5)), constant_values=7.0),
        system.skip,
    )
    np.testing.assert_allclose(dsf.ltv_kernel(system), dsf.ltv_kernel(larger), atol=1e-6)
    outputs, states = dsf.ltv_system(system, inputs)
    np.testing.assert_allclose(outputs.reshape(-1), dsf.ltv_kernel(system) @ inputs.reshape(-1), atol=1e-5)
    h = jnp.zeros(4)
    for i in range(6):
        h = system.transition[i] * h + system.enter[i] @ inputs[i]
        np.testing.assert_allclose(states[i], h, atol=1e-5)
        np.testing.assert_allclose(outputs[i], system.leave[i] @ h + system.skip[i] @ inputs[i], atol=1e-5)


def test_forgetting_of_s6_is_a_reversed_sigmoid():
    z, a = jnp.linspace(-30, 30, 41), 1.7
    np.testing.assert_allclose(jnp.exp(-a * jax.nn.softplus(z)), jax.nn.sigmoid(-z) ** a, rtol=1e-4)
    np.testing.assert_allclose(forget_gate(z, jnp.array([a])), jax.nn.sigmoid(-z) ** a, rtol=1e-4)
    np.testing.assert_array_equal(forget_gate(z, jnp.array([-2.0])), 1)  # relu of alpha: nothing is forgotten
    np.testing.assert_allclose(forget_gate(z), jax.nn.sigmoid(z))


def test_divisors_of_attention_are_ratios_of_transition():
    """(eta_(i-1) / eta_i) h + k v / eta, read with q, is sum_j (q . k_j) v_j over eta_i."""
    rngs = jax.random.split(jax.random.key(1), 4)
    query, key = (jax.random.normal(rng, (9, 3)) for rng in rngs[:2])
    value, eta = jax.random.normal(rngs[2], (9, 5)), jnp.exp(jax.random.normal(rngs[3], (9,)))
    outputs, _ = dsf.ltv_system(dsf.separable_attention(query, key, eta, 5), value)
    np.testing.assert_allclose(outputs, jnp.tril(query @ key.T) / eta[:, None] @ value, atol=2e-5)


def test_ssd_is_linear_attention_that_decays_and_scales_its_values():
    rngs = jax.random.split(jax.random.key(2), 4)
    x, step = jax.random.normal(rngs[0], (1, 20, 6)), jax.nn.softplus(jax.random.normal(rngs[1], (1, 20)))
    b, c = (jax.random.normal(rng, (1, 20, 4)) for rng in rngs[2:])
    steps = jnp.broadcast_to(step[..., None], x.shape)
    scanned, _ = selective_scan(x[:, :, None], steps[:, :, None], -jnp.ones((1, 6, 4)), b[:, :, None], c[:, :, None])
    attended, _ = linear_attention(
        c[:, :, None], b[:, :, None], (steps * x)[:, :, None], decay=-step[..., None], scale=1.0
    )
    np.testing.assert_allclose(scanned, attended, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- networks

SMALL = {"d_model": 16, "d_qk": 8, "vocab_size": 32}


@pytest.mark.parametrize("kind", get_args(dsf.Kind))
def test_published_names_come_and_go(kind):
    model = zoo.create(f"dsf_{kind}", **SMALL)
    variables = random_parameters(model, jnp.zeros((1, 4), jnp.int32))
    published = to_published(variables, dsf.weight_rules(model.config))
    names = {name.split("layers.1.")[1]: array.shape for name, array in published.items() if "layers.1." in name}
    shapes = {
        "sm_attention": {"sequence_mixer.Wqk.weight": (16, 16), "sequence_mixer.Wv.weight": (16, 16)},
        "lin_attention": {"sequence_mixer.Wqk.bias": (16,), "sequence_mixer.out_proj.bias": (16,)},
        "norm_attention": {"sequence_mixer.Wn.weight": (1, 16), "state_mixer.fc1.weight": (64, 16)},
        "s6": {"mixer.A_log": (16, 8), "mixer.x_proj.weight": (17, 16), "mixer.dt_proj.weight": (16, 1)},
        "ssd": {"mixer.A_log": (1,), "mixer.x_proj.weight": (17, 16), "mixer.dt_proj.bias": (16,)},
        "qlstm": {"sequence_mixer.gates.weight": (96, 32), "sequence_mixer.conv.weight": (32, 1, 4)},
        "qlstm_rev": {"sequence_mixer.alpha": (1,), "sequence_mixer.output.weight": (16, 32)},
    }[kind]
    assert shapes.items() <= names.items()
    assert ("norm2.weight" in names) == (kind not in ("s6", "ssd"))
    assert ("backbone.embeddings.position_embeddings.weight" in published) == (kind not in ("s6", "ssd"))
    more = dict(published)
    for index in range(2):  # what nothing uses
        if kind == "ssd":
            more[f"backbone.layers.{index}.mixer.Id"] = np.ones((16, 8), np.float32)
            more[f"backbone.layers.{index}.mixer.dt_proj.weight"] = np.ones((16, 1), np.float32)
        if kind == "qlstm":
            more[f"backbone.layers.{index}.sequence_mixer.alpha"] = np.ones(1, np.float32)
    loaded = zoo.load_weights(f"dsf_{kind}", more, **SMALL)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


@pytest.mark.slow
def test_initialisation_overwrites_what_layers_bring():
    def initial(kind):
        model = zoo.create(f"dsf_{kind}", d_model=64, d_qk=32, vocab_size=64)
        return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]["decoder"]["layer_0"]

    def spread(leaf):
        return float(jnp.std(leaf.unbox()))

    s6, qlstm, attention = initial("s6")["mixer"], initial("qlstm_rev")["mixer"], initial("norm_attention")
    np.testing.assert_array_equal(s6["step_bias"].unbox(), 0)
    np.testing.assert_allclose(jnp.exp(s6["log_rate"].unbox()[5]), np.arange(1, 33), rtol=1e-5)
    for leaf, deviation in (
        (s6["out"]["kernel"], 0.01), (s6["parameters"]["kernel"], 0.02), (qlstm["out"]["kernel"], 0.02),
        (qlstm["forget"]["kernel"], 0.02), (attention["mixer"]["out"]["kernel"], 0.01),
        (attention["mlp"]["up"]["kernel"], 0.02), (attention["mlp"]["down"]["kernel"], 0.01),
    ):  # fmt: skip
        assert abs(spread(leaf) / deviation - 1) < 0.1
    assert qlstm["alpha"].unbox() == 1


def test_states_are_as_large_as_their_kind_says():
    sizes = {kind: dsf.state_size(dsf.published_config(kind), 50) for kind in get_args(dsf.Kind)}
    attention = 2 * (64 * 32 + 32)  # of two layers: keys times values, and the sum of keys
    assert sizes == {
        "sm_attention": 2 * 50 * (32 + 64), "lin_attention": attention, "norm_attention": attention,
        "s6": 2 * 64 * 32, "ssd": 2 * 64 * 32, "qlstm": 2 * 4 * 128, "qlstm_rev": 2 * 4 * 128,
    }  # fmt: skip


def test_dropout_is_of_embeddings_and_of_softmax_only():
    decoder = dsf.published_config("sm_attention").decoder
    assert (decoder.dropout, decoder.embedding_dropout, decoder.make_mixer(0, parent=None).dropout) == (0.0, 0.1, 0.1)
    model = zoo.create("dsf_lin_attention", **SMALL)
    variables, tokens = random_parameters(model, jnp.zeros((1, 4), jnp.int32)), jnp.arange(4)[None]
    plain = model.apply(variables, tokens)[0]
    dropped = model.apply(variables, tokens, deterministic=False, rngs={"dropout": jax.random.key(0)})[0]
    assert float(jnp.abs(plain - dropped).max()) > 1e-3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dsf.DsfConfig("s7"), "unknown kind 's7'; known: lin_attention"),
        (lambda: dsf.DsfConfig(state_mixer="mlp"), "unknown state mixer 'mlp'; did you mean 'mlp4'"),
        (lambda: dsf.DsfConfig(num_heads=3), r"multiples of num_heads \(3\)"),
        (lambda: dsf.DsfConfig(max_position_embeddings=-1), "must not be negative, got -1"),
        (lambda: dataclasses.replace(dsf.DsfConfig(), d_qk=0), "d_qk must be at least 1, got 0"),
        (lambda: dsf.to_dsf(mixers.create("gla", features=8, heads=2), {"params": {}}, X), "GatedLinearAttention"),
        (
            lambda: dsf.ltv_system(
                dsf.System(*map(jnp.zeros, ((5, 4), (5, 4, 3), (4, 2, 4), (5, 2, 3)))), jnp.zeros((5, 3))
            ),
            r"leave must have time = 5 on axis -3, got \(4, 2, 4\)",
        ),
        (
            lambda: dataclasses.replace(dsf.DsfConfig().decoder, norm_position="post"),
            "mlp = 'identity' needs norm_position = 'pre'",
        ),
        (lambda: dsf.DsfConfig(embedding_dropout=1.0), r"embedding_dropout must be None or in \[0, 1\), got 1.0"),
        (lambda: mixers.create("qlstm", features=5, expand=1.5), r"whole number .*got 5 \* 1.5"),
        (lambda: mixers.create("plain_s6", features=8, state_size=0), "state_size must be at least 1, got 0"),
        (lambda: mixers.create("softmax", features=8, heads=2, query_dim=0), "query_dim must be None or positive"),
    ],
)  # fmt: skip
def test_wrong_calls_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()

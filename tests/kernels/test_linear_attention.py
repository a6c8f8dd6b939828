"""Linear attention: every implementation against the definition, and the definition against its mathematics."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import attention
from kernels.linear_attention import LinearAttentionState, feature_size, linear_attention, taylor_features
from kernels.recurrent import gpu
from tests.kernels.recurrent_cases import assert_close, assert_equals_reference, normal


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, arrays apart."""

    time: int = 37
    heads: int = 2
    key_heads: int = 2
    width: int = 8
    value_width: int = 24
    decay: str = "none"  # or "scalar", "channel"
    strength: float = 1.0  # decays are log-normal, with this spread
    feature_map: str = "identity"
    normalize: bool = False
    dtype: str = "float32"
    chunk_size: int | None = None

    def __call__(self, arrays, implementation):
        state = LinearAttentionState(*arrays["state"])
        inputs = {name: x for name, x in arrays.items() if name != "state"}
        return linear_attention(
            **inputs, state=state, feature_map=self.feature_map, normalize=self.normalize, scale=0.3,
            chunk_size=self.chunk_size, implementation=implementation,
        )  # fmt: skip

    def arrays(self, seed=0):
        rng = np.random.default_rng(seed)
        batch, time = 1, self.time
        arrays = {
            "query": normal(rng, batch, time, self.heads, self.width),
            "key": normal(rng, batch, time, self.key_heads, self.width),
            "value": normal(rng, batch, time, self.key_heads, self.value_width),
        }
        if self.decay != "none":
            channels = (self.width,) if self.decay == "channel" else ()
            arrays["decay"] = -jnp.exp(self.strength * normal(rng, batch, time, self.heads, *channels))
        past = [normal(rng, batch, 5, self.heads, n) for n in (self.width, self.width, self.value_width)]
        _, state = linear_attention(*past, feature_map=self.feature_map, implementation="reference")
        return arrays | {"state": tuple(state)}


VARIANTS = [
    {},
    {"decay": "scalar"},
    {"decay": "channel"},
    {"decay": "scalar", "strength": 4.0},
    {"decay": "channel", "strength": 4.0},
    {"feature_map": "elu", "normalize": True},
    {"feature_map": "relu", "normalize": True, "decay": "channel", "width": 16},
    {"feature_map": "taylor", "normalize": True},
    {"feature_map": "taylor", "decay": "scalar", "key_heads": 1},
]


@settings(max_examples=5)
@given(
    st.sampled_from(VARIANTS), st.sampled_from([1, 7, 65, 130]), st.sampled_from(["float32", "bfloat16"]),
    st.integers(0, 9),
)  # fmt: skip
def test_chunked_equals_recurrent(variant, time, dtype, seed):
    case = Case(**variant, time=time, dtype=dtype)
    assert_equals_reference(case, case.arrays(seed), "chunked", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_chunked_equals_recurrent_in_every_variant(variant, dtype):
    case = Case(**variant, time=130, dtype=dtype)
    assert_equals_reference(case, case.arrays(), "chunked", dtype)


KERNEL_VARIANTS = [
    {"decay": "channel", "strength": 4.0, "dtype": "bfloat16"},
    {"feature_map": "elu", "normalize": True, "width": 12, "decay": "scalar", "key_heads": 1},
    {"feature_map": "taylor", "normalize": True, "decay": "scalar"},
    {"feature_map": "taylor", "normalize": True, "time": 1, "dtype": "bfloat16"},
]


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@pytest.mark.parametrize("variant", KERNEL_VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_kernel_equals_recurrent(variant, implementation):
    case = Case(**variant, chunk_size=16)
    assert_equals_reference(case, case.arrays(), implementation, case.dtype)


def test_blocks_of_the_value_that_take_turns_give_the_same_gradients(monkeypatch):
    monkeypatch.setattr(gpu, "_PROGRAMS", 2)
    monkeypatch.setattr(gpu, "_STATE_SIZE", {"forward": 256, "backward": 256})
    case = Case(time=20, value_width=40, feature_map="elu", normalize=True, decay="scalar", chunk_size=16)
    assert_equals_reference(case, case.arrays(), "gpu")


@pytest.mark.parametrize("variant", [VARIANTS[2], VARIANTS[7]], ids=["channel", "taylor"])
def test_a_state_passed_on_continues_the_sequence(variant):
    case = Case(**variant, time=67)
    arrays = case.arrays()
    out, state = case(arrays, None)
    past, outs = arrays["state"], []
    for start, stop in ((0, 1), (1, 34), (34, 66), (66, 67)):
        part = {name: x[:, start:stop] for name, x in arrays.items() if name != "state"}
        part_out, past = case(part | {"state": past}, None)
        outs.append(part_out)
    assert_close(jnp.concatenate(outs, 1), out, 1e-5, "float32", "out")
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5, "float32", "state"), tuple(past), tuple(state))


@pytest.mark.parametrize("variant", [VARIANTS[4], VARIANTS[7]], ids=["channel", "taylor"])
def test_a_token_changes_nothing_before_it(variant):
    case = Case(**variant, time=70)
    arrays = case.arrays()
    changed = {name: x.at[:, 40].add(1.0) for name, x in arrays.items() if name in ("query", "key", "value")}
    out, other = case(arrays, "chunked")[0], case(arrays | changed, "chunked")[0]
    np.testing.assert_array_equal(out[:, :40], other[:, :40])
    assert (out[:, 40] != other[:, 40]).any()


def test_taylor_map_is_attention_with_the_series_of_the_exponential():
    rng = np.random.default_rng(0)
    query, key, value = normal(rng, 1, 20, 2, 8), normal(rng, 1, 20, 2, 8), normal(rng, 1, 20, 2, 5)
    products = jnp.einsum("bthd,bshd->bhts", query, key, precision="highest") / jnp.sqrt(8.0)
    weights = jnp.tril(1 + products + products**2 / 2)
    expected = jnp.einsum("bhts,bshe->bthe", weights / (weights.sum(-1, keepdims=True) + 1e-6), value)
    out, _ = linear_attention(query, key, value, feature_map="taylor", normalize=True)
    assert_close(out, expected, 1e-5, "float32", "out")


@pytest.mark.parametrize("packed", [True, False])
def test_taylor_features_multiply_to_the_series(packed):
    rng = np.random.default_rng(0)
    x, y = normal(rng, 9, 5), normal(rng, 9, 5)
    products = (x * y).sum(-1)
    features = [taylor_features(z, packed=packed) for z in (x, y)]
    np.testing.assert_allclose((features[0] * features[1]).sum(-1), 1 + products + products**2 / 2, rtol=1e-5)
    assert features[0].shape[-1] == (feature_size("taylor", 5) if packed else 1 + 5 + 25)


def test_taylor_map_is_softmax_attention_where_products_are_small():
    rng = np.random.default_rng(0)
    query, key, value = (normal(rng, 1, 50, 2, 8) for _ in range(3))
    out, _ = linear_attention(0.1 * query, 0.1 * key, value, feature_map="taylor", normalize=True)
    np.testing.assert_allclose(out, attention(0.1 * query, 0.1 * key, value, causal=True), atol=1e-4)


def test_a_constant_decay_is_retention():
    rng = np.random.default_rng(0)
    query, key, value = (normal(rng, 1, 70, 2, 8) for _ in range(3))
    gamma = 1 - 2.0 ** (-5 - jnp.arange(2))
    distance = jnp.arange(70)[:, None] - jnp.arange(70)
    decay = jnp.where(distance >= 0, gamma[:, None, None] ** distance, 0)
    expected = jnp.einsum("bthd,bshd,hts,bshe->bthe", query, key, decay, value, precision="highest")
    out, _ = linear_attention(query, key, value, decay=jnp.broadcast_to(jnp.log(gamma), (1, 70, 2)), scale=1.0)
    assert_close(out, expected, 1e-5, "float32", "out")


@pytest.mark.parametrize("channels", [(), (8,)], ids=["scalar", "channel"])
def test_a_reset_forgets_everything(channels):
    rng = np.random.default_rng(0)
    query, key, value = (normal(rng, 1, 70, 2, 8) for _ in range(3))
    decay = -jnp.abs(normal(rng, 1, 70, 2, *channels)).at[:, 40].set(jnp.inf)

    def run(start):
        inputs = (x[:, start:] for x in (query, key, value))
        return linear_attention(*inputs, decay=decay[:, start:], implementation="chunked")[0]

    np.testing.assert_allclose(run(0)[:, 40:], run(40), atol=1e-5)
    gradients = jax.grad(lambda q, d: linear_attention(q, key, value, decay=d)[0].sum(), (0, 1))(query, decay)
    assert all(jnp.isfinite(x).all() for x in gradients)


def test_unit_keys_recall_their_values():
    rng = np.random.default_rng(0)
    key, value = jnp.eye(8)[None, :, None], normal(rng, 1, 8, 1, 5)
    _, state = linear_attention(key, key, value, scale=1.0)
    np.testing.assert_allclose(state.memory[0, 0], value[0, :, 0], atol=1e-6)
    recalled, _ = linear_attention(key, jnp.zeros_like(key), value, state=state, scale=1.0)
    np.testing.assert_allclose(recalled, value, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": jnp.zeros((1, 4, 2))}, ValueError, r"query must be .*, got shape \(1, 4, 2\)"),
        ({"key": jnp.zeros((1, 4, 3, 8)), "value": jnp.zeros((1, 4, 3, 8))}, ValueError, "multiple of key/value heads"),
        ({"value": jnp.zeros((1, 5, 2, 8))}, ValueError, "key and value must agree"),
        ({"key": jnp.zeros((1, 4, 2, 8), jnp.bfloat16)}, TypeError, "must share a dtype"),
        ({"decay": jnp.zeros((1, 4))}, ValueError, r"shape \(1, 4, 2\) or \(1, 4, 2, 8\), got \(1, 4\)"),
        ({"decay": jnp.zeros((1, 4, 2, 8)), "feature_map": "taylor"}, ValueError, r"decay must have shape \(1, 4, 2\)"),
        ({"decay": jnp.zeros((1, 4, 2), jnp.int32)}, TypeError, "decay must be floating point, got int32"),
        ({"feature_map": "cosine"}, ValueError, "feature_map must be one of .* got 'cosine'"),
        ({"chunk_size": 48}, ValueError, "chunk_size must be a power of 2 and at least 16, got 48"),
        ({"scale": -1.0}, ValueError, "scale must be positive, got -1.0"),
        ({"epsilon": -1.0}, ValueError, "epsilon must not be negative"),
        ({"implementation": "cuda"}, ValueError, "implementation must be None or one of"),
        (
            {"state": LinearAttentionState(jnp.zeros((1, 2, 8, 7)), jnp.zeros((1, 2, 8)))},
            ValueError, r"state.memory must have shape \(1, 2, 8, 8\), got \(1, 2, 8, 7\)",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changes, error, message):
    arrays = {name: jnp.zeros((1, 4, 2, 8)) for name in ("query", "key", "value")}
    with pytest.raises(error, match=message):
        linear_attention(**(arrays | changes))

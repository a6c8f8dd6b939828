"""The delta rule: every implementation against the definition, and the definition against its mathematics."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.delta_rule import delta_rule
from kernels.recurrent import gpu
from kernels.recurrent.tile import FLOAT32, unit_triangular_inverse
from tests.kernels.recurrent_cases import assert_close, assert_equals_reference, normal, unit


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, arrays apart."""

    time: int = 37
    heads: int = 2
    key_heads: int = 2
    width: int = 8
    value_width: int = 24
    gated: bool = True
    strength: float = 1.0  # decays are log-normal, with this spread
    dtype: str = "float32"
    chunk_size: int | None = None

    def __call__(self, arrays, implementation):
        return delta_rule(**arrays, chunk_size=self.chunk_size, implementation=implementation)

    def arrays(self, seed=0):
        rng = np.random.default_rng(seed)
        batch, time = 1, self.time
        arrays = {
            "query": normal(rng, batch, time, self.heads, self.width),
            "key": unit(normal(rng, batch, time, self.key_heads, self.width)),
            "value": normal(rng, batch, time, self.key_heads, self.value_width),
            "beta": jax.nn.sigmoid(normal(rng, batch, time, self.heads)),
            "state": normal(rng, batch, self.heads, self.width, self.value_width),
        }
        if self.gated:
            arrays["decay"] = -jnp.exp(self.strength * normal(rng, batch, time, self.heads))
        return arrays


@settings(max_examples=4)
@given(
    st.sampled_from([{"gated": False}, {}, {"strength": 4.0, "key_heads": 1}]), st.sampled_from([1, 7, 65, 130]),
    st.sampled_from(["float32", "bfloat16"]), st.integers(0, 9),
)  # fmt: skip
def test_chunked_equals_recurrent(variant, time, dtype, seed):
    case = Case(**variant, time=time, dtype=dtype)
    assert_equals_reference(case, case.arrays(seed), "chunked", dtype)


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({"gated": False, "key_heads": 1}, id="plain"),
        pytest.param({"strength": 4.0, "dtype": "bfloat16"}, id="gated-bfloat16"),
        pytest.param({"time": 1}, id="token", marks=pytest.mark.slow),
    ],
)
def test_kernel_equals_recurrent(variant, implementation):
    case = Case(**variant, chunk_size=16)
    assert_equals_reference(case, case.arrays(), implementation, case.dtype)


@pytest.mark.slow
def test_blocks_of_the_value_that_take_turns_give_the_same_gradients(monkeypatch):
    monkeypatch.setattr(gpu, "_PROGRAMS", 2)
    monkeypatch.setattr(gpu, "_STATE_SIZE", {"forward": 256, "backward": 256})
    case = Case(time=20, value_width=40, chunk_size=16)
    assert_equals_reference(case, case.arrays(), "gpu")


def test_a_state_passed_on_continues_the_sequence():
    case = Case(time=67)
    arrays = case.arrays()
    out, state = case(arrays, None)
    past, outs = arrays["state"], []
    for start, stop in ((0, 1), (1, 34), (34, 66), (66, 67)):
        part = {name: x[:, start:stop] for name, x in arrays.items() if name != "state"}
        part_out, past = case(part | {"state": past}, None)
        outs.append(part_out)
    assert_close(jnp.concatenate(outs, 1), out, 1e-5, "float32", "out")
    assert_close(past, state, 1e-5, "float32", "state")


def test_a_token_changes_nothing_before_it():
    case = Case(time=70)
    arrays = case.arrays()
    changed = {name: x.at[:, 40].add(0.1) for name, x in arrays.items() if name in ("query", "key", "value")}
    out, other = case(arrays, "chunked")[0], case(arrays | changed, "chunked")[0]
    np.testing.assert_array_equal(out[:, :40], other[:, :40])
    assert (out[:, 40] != other[:, 40]).any()


def test_the_last_value_of_a_key_is_recalled():
    rng = np.random.default_rng(0)
    key = jnp.tile(jnp.eye(8), (3, 1))[None, :, None]
    value = normal(rng, 1, 24, 1, 5)
    _, state = delta_rule(key, key, value, jnp.ones((1, 24, 1)))
    np.testing.assert_allclose(state[0, 0], value[0, 16:, 0], atol=1e-6)


def test_equal_keys_stay_exact():
    # A power series of the triangular matrix would have terms of 10^18 here.
    rng = np.random.default_rng(0)
    key = jnp.broadcast_to(unit(normal(rng, 8)), (1, 130, 1, 8))
    value = normal(rng, 1, 130, 1, 5)
    out, _ = delta_rule(key, key, value, jnp.ones((1, 130, 1)), scale=1.0, implementation="chunked")
    np.testing.assert_allclose(out, value, atol=1e-5)


def test_unit_triangular_inverse_and_its_gradient():
    rng = np.random.default_rng(0)
    lower, weights = jnp.tril(normal(rng, 32, 32), -1) / 4, normal(rng, 32, 32)

    def of(inverse):
        return jax.value_and_grad(lambda lower: jnp.sum(weights * jnp.tril(inverse(lower))))(lower)

    value, gradient = of(lambda lower: unit_triangular_inverse(jnp.tril(lower, -1), FLOAT32))
    expected_value, expected = of(lambda lower: jnp.linalg.inv(jnp.eye(32) + jnp.tril(lower, -1)))
    np.testing.assert_allclose(value, expected_value, rtol=1e-4)
    assert_close(gradient, expected, 1e-4, "float32", "gradient")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"beta": jnp.zeros((1, 4, 2, 1))}, ValueError, r"beta must have shape \(1, 4, 2\), got \(1, 4, 2, 1\)"),
        ({"beta": jnp.zeros((1, 4, 2), jnp.int32)}, TypeError, "beta must be floating point, got int32"),
        ({"decay": jnp.zeros((1, 4, 2, 8))}, ValueError, r"decay must have shape \(1, 4, 2\)"),
        ({"state": jnp.zeros((1, 2, 8, 7))}, ValueError, r"state must have shape \(1, 2, 8, 8\)"),
        ({"scale": 0.0}, ValueError, "scale must be positive"),
        ({"chunk_size": 8}, ValueError, "chunk_size must be a power of 2 and at least 16, got 8"),
        ({"key": jnp.zeros((1, 4, 2, 7))}, ValueError, "query and key must agree"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    arrays = {name: jnp.zeros((1, 4, 2, 8)) for name in ("query", "key", "value")} | {"beta": jnp.zeros((1, 4, 2))}
    with pytest.raises(error, match=message):
        delta_rule(**(arrays | changes))

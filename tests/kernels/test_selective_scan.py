"""The selective scan: every implementation against the definition, and the definition against its mathematics."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.linear_attention import linear_attention
from kernels.selective_scan import gpu, selective_scan, tpu
from tests.kernels.attention_cases import TOLERANCES
from tests.kernels.recurrent_cases import assert_close, normal, outputs_and_gradients


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, arrays apart."""

    time: int = 37
    groups: int = 2
    channels: int = 10
    size: int = 3
    gated: bool = True
    softplus: bool = True
    reverse: bool = False
    dtype: str = "float32"
    chunk_size: int | None = None

    def __call__(self, arrays, implementation):
        return selective_scan(
            **arrays, softplus=self.softplus, reverse=self.reverse, chunk_size=self.chunk_size,
            implementation=implementation,
        )  # fmt: skip

    def arrays(self, seed=0):
        rng = np.random.default_rng(seed)
        rows, narrow = (2, self.time, self.groups, self.channels), (2, self.time, self.groups, self.size)
        delta = normal(rng, *rows)
        arrays = {
            "x": normal(rng, *rows), "delta": delta if self.softplus else jnp.abs(delta), "b": normal(rng, *narrow),
            "c": normal(rng, *narrow), "a": -jnp.exp(normal(rng, *rows[2:], self.size)),
            "skip": normal(rng, *rows[2:]), "state": normal(rng, 2, *rows[2:], self.size),
        }  # fmt: skip
        if self.softplus:
            arrays["delta_bias"] = normal(rng, *rows[2:])
        if self.gated:
            arrays["gate"] = normal(rng, *rows)
        return arrays


def assert_equals_reference(case, implementation):
    """As of the other recurrent cores: outputs and gradients of all arrays."""
    arrays = case.arrays()
    arrays |= {name: arrays[name].astype(case.dtype) for name in ("x", "b", "c", "gate") if name in arrays}
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    actual = outputs_and_gradients(case, arrays, implementation, case.dtype)
    expected = outputs_and_gradients(case, exact, "reference", case.dtype)
    assert actual[0][0].dtype == case.dtype
    for got, wanted, tolerance in zip(actual, expected, TOLERANCES[case.dtype], strict=True):
        for (path, array), other in zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(got), strict=True):
            assert_close(other, array, tolerance, case.dtype, jax.tree_util.keystr(path))
    for name, array in arrays.items():
        assert actual[1][name].dtype == array.dtype


VARIANTS = [
    {},
    {"reverse": True, "groups": 1},
    {"gated": False, "softplus": False},
    {"gated": False, "size": 1, "reverse": True},
]


@settings(max_examples=5)
@given(st.sampled_from(VARIANTS), st.sampled_from([1, 7, 65, 130]), st.sampled_from(["float32", "bfloat16"]))
def test_chunked_equals_recurrent(variant, time, dtype):
    assert_equals_reference(Case(**variant, time=time, dtype=dtype), "chunked")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_chunked_equals_recurrent_in_every_variant(variant, dtype):
    assert_equals_reference(Case(**variant, time=130, dtype=dtype), "chunked")


def kernel_cases(quick):
    cases = [variant | {"dtype": dtype} for variant in VARIANTS for dtype in ("float32", "bfloat16")]
    named = [("-".join(map(str, v.values())), v) for v in cases]
    return [pytest.param(v, id=name, marks=[] if v in quick else [pytest.mark.slow]) for name, v in named]


@pytest.mark.parametrize("variant", kernel_cases([VARIANTS[1] | {"dtype": "bfloat16"}]))
def test_tpu_kernel_equals_recurrent(variant):
    assert_equals_reference(Case(**variant, chunk_size=16), "tpu")


@pytest.mark.slow
def test_tpu_kernel_equals_recurrent_on_tiles_of_channels(monkeypatch):
    monkeypatch.setattr(tpu, "_TILES", (128,))
    assert_equals_reference(Case(channels=200, chunk_size=16), "tpu")


@pytest.mark.parametrize("variant", kernel_cases([VARIANTS[1] | {"dtype": "bfloat16"}]))
def test_gpu_kernel_equals_recurrent(variant, monkeypatch):
    monkeypatch.setattr(gpu, "_CHUNK_SIZE", 2)  # interpreted, an unrolled chunk is slow
    monkeypatch.setattr(gpu, "_STATE_SIZE", 32)  # blocks of 8 or 32 channels
    assert_equals_reference(Case(**variant, time=7), "gpu")


@pytest.mark.parametrize("reverse", [False, True])
def test_a_state_passed_on_continues_the_sequence(reverse):
    case = Case(time=67, reverse=reverse)
    arrays = case.arrays()
    of_time = ("x", "delta", "b", "c", "gate")
    out, state = case(arrays, None)
    past, outs = arrays["state"], {}
    pieces = [(0, 1), (1, 34), (34, 66), (66, 67)]
    for start, stop in reversed(pieces) if reverse else pieces:
        part = {name: x[:, start:stop] if name in of_time else x for name, x in arrays.items()}
        outs[start], past = case(part | {"state": past}, None)
    assert_close(jnp.concatenate([outs[start] for start in sorted(outs)], 1), out, 1e-5, "float32", "out")
    assert_close(past, state, 1e-5, "float32", "state")


def test_from_the_last_token_is_the_flipped_scan():
    case = Case()
    arrays = case.arrays()
    flipped = {name: jnp.flip(x, 1) if name in ("x", "delta", "b", "c", "gate") else x for name, x in arrays.items()}
    expected, expected_state = case(flipped, None)
    out, state = dataclasses.replace(case, reverse=True)(arrays, None)
    assert_close(out, jnp.flip(expected, 1), 1e-5, "float32", "out")
    assert_close(state, expected_state, 1e-5, "float32", "state")


def test_one_rate_a_head_is_linear_attention_with_a_scalar_decay():
    """Mamba-2's SSD: key b, query c, value delta x, decay delta a."""
    rng = np.random.default_rng(0)
    batch, time, heads, width, size = 2, 70, 3, 8, 5
    x, step = normal(rng, batch, time, heads, width), jax.nn.softplus(normal(rng, batch, time, heads))
    b, c = normal(rng, batch, time, heads, size), normal(rng, batch, time, heads, size)
    rate = jnp.exp(normal(rng, heads))
    first = normal(rng, batch, heads, width, size)
    delta = jnp.broadcast_to(step[..., None], x.shape)
    a = jnp.broadcast_to(-rate[:, None, None], (heads, width, size))
    out, state = selective_scan(x, delta, a, b, c, state=first)
    _, past = linear_attention(c, b, x, decay=-rate * step)  # for its type
    past = past._replace(memory=first.swapaxes(2, 3), key_sum=jnp.zeros_like(past.key_sum))
    expected, after = linear_attention(c, b, step[..., None] * x, decay=-rate * step, scale=1.0, state=past)
    assert_close(out, expected, 1e-5, "float32", "out")
    assert_close(state, after.memory.swapaxes(2, 3), 1e-5, "float32", "state")


def test_a_step_of_zero_leaves_the_state_alone():
    case = Case(softplus=False)
    arrays = case.arrays()
    _, state = case(arrays | {"delta": jnp.zeros_like(arrays["delta"])}, None)
    np.testing.assert_array_equal(state, arrays["state"])


def test_a_token_changes_nothing_before_it():
    case = Case(time=70)
    arrays = case.arrays()
    changed = {name: arrays[name].at[:, 40].add(1.0) for name in ("x", "delta", "b", "c", "gate")}
    out, other = case(arrays, None)[0], case(arrays | changed, None)[0]
    np.testing.assert_array_equal(out[:, :40], other[:, :40])
    assert (out[:, 40] != other[:, 40]).any()


def test_no_array_holds_the_states_of_all_tokens():
    """At the length of a volume: 65,536 tokens, forward and gradient."""
    time, channels, size = 65536, 8, 16
    rows, narrow = jnp.zeros((1, time, 1, channels)), jnp.zeros((1, time, 1, size))
    a = -jnp.ones((1, channels, size))
    derive = jax.jit(jax.grad(lambda x: selective_scan(x, x, a, narrow, narrow, softplus=True)[0].sum()))
    temporaries = derive.lower(rows).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < time * channels * size * 4


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"x": jnp.zeros((2, 37, 10))}, ValueError, "x must be"),
        ({"a": jnp.zeros((2, 9, 3))}, ValueError, r"a must be \(groups, channels, N\) = \(2, 10, N >= 1\)"),
        ({"delta": jnp.zeros((2, 37, 2, 1))}, ValueError, "delta must have shape"),
        ({"b": jnp.zeros((2, 37, 2, 4))}, ValueError, "b must have shape"),
        ({"c": jnp.zeros((2, 37, 2, 3), jnp.bfloat16)}, TypeError, "c must have x's dtype, float32, got bfloat16"),
        ({"gate": jnp.zeros((2, 37, 2, 10), jnp.int32)}, TypeError, "gate must be floating point"),
        ({"skip": jnp.zeros((10,))}, ValueError, "skip must have shape"),
        ({"state": jnp.zeros((2, 2, 3, 10))}, ValueError, "state must have shape"),
    ],
)
def test_wrong_input_is_refused(changes, error, message):
    case = Case()
    with pytest.raises(error, match=message):
        case(case.arrays() | changes, None)


@pytest.mark.parametrize("options, message", [({"chunk_size": 24}, "power of 2"), ({"implementation": "cpu"}, "cpu")])
def test_wrong_options_are_refused(options, message):
    arrays = Case().arrays()
    with pytest.raises(ValueError, match=message):
        selective_scan(**arrays, **options)

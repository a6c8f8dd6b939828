"""The neural memory: every implementation against the definition, and the definition against its mathematics."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.delta_rule import delta_rule
from kernels.neural_memory import MemoryState, initial_state, neural_memory
from kernels.neural_memory.chunked import remains
from tests.kernels.recurrent_cases import assert_close, assert_equals_reference, normal, outputs_and_gradients, unit


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, arrays apart."""

    time: int = 37
    heads: int = 2
    width: int = 8
    hidden: tuple[int, ...] = (12,)
    momentum: bool = True
    norm: bool = True
    chunk_size: int = 16
    tokens: tuple[int, ...] | None = None  # since a border; None starts at one
    lengths: tuple[int, ...] | None = None
    dtype: str = "float32"
    channels: bool = False  # gates of output channels

    @property
    def layers(self):
        return len(self.hidden) + 1

    def __call__(self, arrays, implementation):
        arrays = dict(arrays)
        lengths = None if self.lengths is None else jnp.asarray(self.lengths)
        groups = [
            tuple(arrays.pop(f"{name}_{i}") for i in range(self.layers) if f"{name}_{i}" in arrays)
            for name in ("weights", "momentum", "border")
        ]
        memory = groups[0] if self.tokens is None else MemoryState(*groups, jnp.asarray(self.tokens, jnp.int32))
        norm = (arrays.pop("scale"), arrays.pop("bias")) if self.norm else None
        arrays.setdefault("eta", None)
        if self.channels:
            ends = np.cumsum([*self.hidden, self.width])[:-1]
            gates = {name: arrays[name] for name in ("alpha", "eta", "theta") if arrays[name] is not None}
            arrays |= {name: tuple(jnp.split(gate, ends, axis=3)) for name, gate in gates.items()}
        out, state = neural_memory(
            **arrays, memory=memory, norm=norm, chunk_size=self.chunk_size, lengths=lengths,
            implementation=implementation,
        )  # fmt: skip
        return out, state

    def arrays(self, seed=0):
        rng = np.random.default_rng(seed)
        batch, time = 1 if self.tokens is None else len(self.tokens), self.time
        gates = (batch, time, self.heads, sum(self.hidden) + self.width if self.channels else self.layers)
        arrays = {name: normal(rng, batch, time, self.heads, self.width) for name in ("query", "key", "value")}
        arrays |= {"query": unit(arrays["query"]), "key": unit(arrays["key"])}
        arrays |= {
            "alpha": jax.nn.sigmoid(normal(rng, *gates) - 4),
            "theta": 0.02 * jax.nn.sigmoid(normal(rng, *gates)),
        }
        if self.momentum:
            arrays["eta"] = jax.nn.sigmoid(normal(rng, *gates))
        if self.norm:
            arrays |= {"scale": 1 + 0.1 * normal(rng, self.heads, self.width)}
            arrays |= {"bias": 0.1 * normal(rng, self.heads, self.width)}
        widths = (self.width, *self.hidden, self.width)
        leading = (self.heads,) if self.tokens is None else (batch, self.heads)
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            arrays[f"weights_{layer}"] = normal(rng, *leading, fan_out, fan_in) / fan_in**0.5
            if self.tokens is not None:
                arrays[f"border_{layer}"] = normal(rng, *leading, fan_out, fan_in) / fan_in**0.5
                if self.momentum:
                    arrays[f"momentum_{layer}"] = 0.1 * normal(rng, *leading, fan_out, fan_in)
        return arrays


# Steps of 0.01 and little forgetting, near what models start from: the inner training then amplifies rounding little.
# At ten times the step a change of the keys by one unit in the last place moves the definition's own outputs by 6e-5.
VARIANTS = {
    "mlp": {},
    "token": {"time": 1},
    "matrix": {"hidden": (), "norm": False, "momentum": False, "chunk_size": 1, "time": 9},
    "deep": {"hidden": (12, 10, 6), "time": 20, "chunk_size": 4},
    "six": {"time": 20, "chunk_size": 6},
    "channels": {"channels": True, "tokens": (0, 5), "lengths": (20, 13), "time": 20, "chunk_size": 8},
    "channels-matrix": {"channels": True, "hidden": (), "norm": False, "momentum": False, "time": 9, "chunk_size": 4},
    "no-momentum": {"momentum": False, "time": 16},
    "continued": {"tokens": (0, 5, 15), "time": 34},
    "decoding": {"tokens": (0, 5, 15), "time": 1},
    "ragged": {"tokens": (3, 7), "lengths": (21, 4), "time": 21, "chunk_size": 8, "norm": False},
}


QUICK = ("token", "matrix", "channels-matrix")


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS]
)
def test_chunked_equals_recurrent(variant):
    case = Case(**VARIANTS[variant])
    assert_equals_reference(case, case.arrays(), "chunked")


@pytest.mark.slow
def test_chunked_equals_recurrent_in_bfloat16():
    case = Case(dtype="bfloat16")
    assert_equals_reference(case, case.arrays(), "chunked", "bfloat16")


def in_float64(arrays):
    return {name: jnp.asarray(x, jnp.float64) for name, x in arrays.items()}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mlp", "deep", "continued", "channels"])
def test_chunked_equals_recurrent_in_float64(variant):
    """Values and gradients, to what float64 resolves: the forms are one function, whatever float32 makes of them."""
    case = Case(**VARIANTS[variant])
    with jax.enable_x64(True):
        arrays = in_float64(case.arrays())
        got, expected = (outputs_and_gradients(case, arrays, name, "float64") for name in ("chunked", "reference"))
    for (path, right), left in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        assert left.dtype == right.dtype and left.dtype in (jnp.float64, jnp.int32)
        assert_close(left, right, 1e-11, "float64", jax.tree_util.keystr(path))


def test_long_sequences_amplify_rounding_and_not_errors():
    """At Titans' first gates and 512 tokens, a change of keys in float32's last place changes outputs by 1e-3 and more.

    So do float32's own roundings, in either form; in float64 the forms are equal.
    """
    case = Case(time=512, heads=1, width=32, hidden=(128,))
    with jax.enable_x64(True):
        arrays = in_float64(case.arrays())
        call = jax.jit(lambda arrays, name: case(arrays, name)[0], static_argnums=1)
        right = call(arrays, "reference")
        moved = call(arrays | {"key": arrays["key"] * (1 + 2.0**-24 * jnp.sign(arrays["value"]))}, "reference")
        assert_close(call(arrays, "chunked"), right, 1e-8, "float64", "out")
        assert float(jnp.abs(moved - right).max()) > 1e-3 * float(right.std())


@pytest.mark.parametrize(
    ("implementation", "variant"),
    [
        pytest.param("tpu", {"time": 23, "dtype": "bfloat16"}, id="tpu-bfloat16"),
        pytest.param("gpu", {"time": 23}, id="gpu", marks=pytest.mark.slow),
        pytest.param("tpu", {"time": 23}, id="tpu", marks=pytest.mark.slow),
        pytest.param("gpu", {"time": 23, "dtype": "bfloat16"}, id="gpu-bfloat16", marks=pytest.mark.slow),
        *(
            pytest.param(name, variant, id=f"{name}-{label}", marks=pytest.mark.slow)
            for name in ("tpu", "gpu")
            for label, variant in {
                "continued": {"tokens": (0, 5), "time": 20, "width": 6},
                "deep": {"hidden": (12, 10), "time": 1, "momentum": False},
            }.items()
        ),
    ],
)
def test_kernel_equals_recurrent(implementation, variant):
    case = Case(**variant)
    assert_equals_reference(case, case.arrays(), implementation, case.dtype)


@pytest.mark.parametrize("implementation", ["chunked", pytest.param("reference", marks=pytest.mark.slow)])
def test_a_state_passed_on_continues_the_sequence(implementation):
    case = Case(time=30, chunk_size=8)
    arrays = case.arrays()
    out, state = case(arrays, implementation)
    of_time = ("query", "key", "value", "alpha", "eta", "theta")
    memory = initial_state((arrays["weights_0"], arrays["weights_1"]), 1)
    outs = []
    for start, stop in ((0, 1), (1, 12), (12, 13), (13, 30)):
        part, memory = neural_memory(
            **{name: arrays[name][:, start:stop] for name in of_time}, memory=memory,
            norm=(arrays["scale"], arrays["bias"]), chunk_size=8, implementation=implementation,
        )  # fmt: skip
        outs.append(part)
    assert_close(jnp.concatenate(outs, 1), out, 1e-5, "float32", "out")
    for got, expected in zip(jax.tree.leaves(memory), jax.tree.leaves(state), strict=True):
        assert_close(got, expected, 1e-5, "float32", "state")


def test_equal_gates_of_all_channels_are_the_gates_of_a_layer():
    case = Case(time=20, heads=1, chunk_size=8)
    arrays = case.arrays()
    widths = (*case.hidden, case.width)
    repeated = {
        name: jnp.concatenate([jnp.repeat(arrays[name][..., i : i + 1], n, 3) for i, n in enumerate(widths)], axis=3)
        for name in ("alpha", "eta", "theta")
    }
    expected = case(arrays, "chunked")
    got = dataclasses.replace(case, channels=True)(arrays | repeated, None)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(left, right, 1e-5, "float32", "out or state")


def test_a_token_changes_nothing_before_it():
    case = Case(time=40)
    arrays = case.arrays()
    names = ("query", "key", "value", "alpha", "eta", "theta")
    changed = {name: arrays[name].at[:, 20].multiply(0.9) for name in names}
    out, other = case(arrays, "chunked")[0], case(arrays | changed, "chunked")[0]
    np.testing.assert_array_equal(out[:, :20], other[:, :20])
    assert (out[:, 20] != other[:, 20]).any()


@pytest.mark.parametrize("implementation", ["reference", pytest.param("chunked", marks=pytest.mark.slow)])
def test_online_matrix_without_momentum_is_the_gated_delta_rule(implementation):
    case = Case(**VARIANTS["matrix"])
    arrays = case.arrays()
    arrays["alpha"] = arrays["alpha"].at[:, 3].set(0.0)
    out, state = case(arrays, implementation)
    # The memory decays after its gradient is taken, the delta rule's before: a step larger by what decay took.
    keep, beta = 1 - arrays["alpha"][..., 0], 2 * arrays["theta"][..., 0]
    expected, memory = delta_rule(
        arrays["query"], arrays["key"], arrays["value"] * keep[..., None], beta / keep, decay=jnp.log(keep), scale=1.0,
        state=arrays["weights_0"][None].swapaxes(2, 3), implementation="reference",
    )  # fmt: skip
    assert_close(out, expected, 1e-5, "float32", "out")
    assert_close(state.weights[0], memory.swapaxes(2, 3), 1e-5, "float32", "state")


@pytest.mark.parametrize("length", [8, 7, 5])
def test_remains_and_its_gradient_where_a_factor_is_zero(length):
    factor = jnp.asarray([0.5, 0.9, 0.0, 0.7, 1.0, 0.3, 0.0, 0.8])[:length]
    weights = normal(np.random.default_rng(0), length, length)

    def by_loops(factor):
        i, j, t = jnp.meshgrid(*[jnp.arange(length)] * 3, indexing="ij")
        return jnp.where(j <= i, jnp.prod(jnp.where((j < t) & (t <= i), factor, 1.0), axis=2, keepdims=True), 0.0)[
            :, :, 0
        ]

    between, since, until = remains(factor[None])
    np.testing.assert_allclose(between, by_loops(factor), atol=1e-7)
    np.testing.assert_allclose(since[:, 0], jnp.cumprod(factor), atol=1e-7)
    np.testing.assert_allclose(until[0], by_loops(factor)[-1], atol=1e-7)
    gradient = jax.grad(lambda x: jnp.sum(weights * remains(x[None])[0]))(factor)
    expected = jax.grad(lambda x: jnp.sum(weights * by_loops(x)))(factor)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"value": jnp.zeros((1, 4, 2, 7))}, ValueError, "query, key and value must have one shape"),
        ({"alpha": jnp.zeros((1, 4, 2))}, ValueError, r"alpha must have shape \(1, 4, 2, 1\), got \(1, 4, 2\)"),
        ({"theta": jnp.zeros((1, 4, 2, 1), jnp.int32)}, TypeError, "theta must be floating point, got int32"),
        ({"memory": ()}, ValueError, "at least one layer"),
        ({"memory": (jnp.zeros((2, 8, 7)),)}, ValueError, r"weights of layer 0 must have shape \(2, 8, 8\)"),
        ({"memory": initial_state((jnp.zeros((2, 8, 8)),), 1)}, ValueError, "momentum if and only if"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be an integer and at least 1, got 0"),
        ({"chunk_size": 8, "implementation": "tpu"}, ValueError, "a power of 2 and at least 16, got 8"),
        ({"theta": (jnp.zeros((1, 4, 2, 8)),)}, TypeError, "alpha, theta must all be arrays, or all be tuples"),
        (
            {"alpha": (jnp.zeros((1, 4, 2, 8)),) * 2, "theta": (jnp.zeros((1, 4, 2, 8)),)},
            ValueError,
            "alpha must have an array for each of 1 layers, got 2",
        ),
        (
            {"alpha": (jnp.zeros((1, 4, 2, 7)),), "theta": (jnp.zeros((1, 4, 2, 8)),)},
            ValueError,
            r"alpha of layer 0 must have shape \(1, 4, 2, 8\), got \(1, 4, 2, 7\)",
        ),
        (
            {
                "alpha": (jnp.zeros((1, 4, 2, 8)),),
                "theta": (jnp.zeros((1, 4, 2, 8)),),
                "chunk_size": 16,
                "implementation": "gpu",
            },
            ValueError,
            r"gates of channels have no Pallas kernel \('gpu'\)",
        ),
        ({"norm": (jnp.zeros(8), jnp.zeros((2, 8)))}, ValueError, r"norm scale must have shape \(2, 8\)"),
        ({"lengths": jnp.zeros((1, 4))}, ValueError, "lengths must be integers"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    arrays = {name: jnp.zeros((1, 4, 2, 8)) for name in ("query", "key", "value")}
    arrays |= {"alpha": jnp.zeros((1, 4, 2, 1)), "eta": None, "theta": jnp.zeros((1, 4, 2, 1))}
    with pytest.raises(error, match=message):
        neural_memory(**(arrays | {"memory": (jnp.zeros((2, 8, 8)),)} | changes))

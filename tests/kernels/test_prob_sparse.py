"""ProbSparse attention: the reference against the published computation, every implementation against the reference."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import attention
from kernels.prob_sparse import (
    active_queries,
    attention_map,
    chunked,
    gpu,
    prob_sparse_attention,
    reference,
    sample_keys,
    sample_size,
    tpu,
)
from tests.kernels.attention_cases import TOLERANCES, assert_close
from zoo.compilation import compile_for


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int = 2
    queries: int = 37
    keys: int = 37
    heads: int = 3
    width: int = 16
    value_width: int = 16
    samples: int = 9
    active: int = 7
    causal: bool = False
    shared: bool = False  # one sample for all queries
    dtype: str = "float32"

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        shapes = (
            (self.batch, self.queries, self.heads, self.width),
            (self.batch, self.keys, self.heads, self.width),
            (self.batch, self.keys, self.heads, self.value_width),
        )
        query, key, value = (rng.standard_normal(shape).astype(jnp.dtype(self.dtype)) for shape in shapes)
        return query, key, value

    @functools.cached_property
    def table(self) -> np.ndarray:
        shape = (self.samples,) if self.shared else (self.queries, self.samples)
        return np.random.default_rng(1).integers(0, self.keys, shape, np.int32)


@st.composite
def cases(draw) -> Case:
    causal = draw(st.booleans())
    queries, keys = draw(st.sampled_from(((37, 37),) if causal else ((37, 53), (130, 300))))
    heads, width, value_width = draw(st.sampled_from(((3, 16, 24), (2, 64, 64))))
    samples = draw(st.sampled_from((1, 9)))
    return Case(
        queries=queries,
        keys=keys,
        heads=heads,
        width=width,
        value_width=value_width,
        samples=samples,
        active=min(queries, 7),
        causal=causal,
        shared=draw(st.booleans()),
        dtype=draw(st.sampled_from(("float32", "bfloat16"))),
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def run(case: Case, arrays, implementation):
    return prob_sparse_attention(
        *arrays, case.table, queries=case.active, causal=case.causal, implementation=implementation
    )


def published(case: Case, query, key, value):
    """The published computation, step by step: (out, M, top). Gathered keys are of size (B, H, L_Q, U, E)."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    table = jnp.broadcast_to(case.table, (case.queries, case.samples))
    sampled = jnp.einsum("bhle,bhlue->bhlu", query, key[:, :, table])
    measure = sampled.max(-1) - sampled.sum(-1) / case.keys
    top = jax.lax.top_k(jax.lax.stop_gradient(measure), case.active)[1]
    rows = jnp.take_along_axis(query, top[..., None], axis=2)
    logits = jnp.einsum("bhue,bhme->bhum", rows, key) / math.sqrt(case.width)
    if case.causal:
        logits = jnp.where(jnp.arange(case.keys) > top[..., None], -jnp.inf, logits)
        context = jnp.cumsum(value, axis=2)
    else:
        context = jnp.repeat(value.mean(2, keepdims=True), case.queries, axis=2)
    item, head = jnp.arange(case.batch)[:, None, None], jnp.arange(case.heads)[:, None]
    out = context.at[item, head, top].set(jax.nn.softmax(logits) @ value)
    return out.swapaxes(1, 2), measure, top


def gradients(function, case: Case, arrays):
    """Gradients of the output's product with fixed cotangents."""
    weights = np.random.default_rng(2).standard_normal((case.batch, case.queries, case.heads, case.value_width))
    weights = jnp.asarray(weights, case.dtype).astype(jnp.float32)
    return jax.jit(jax.grad(lambda arrays: jnp.sum(function(arrays) * weights)))(arrays)


def assert_equals_reference(case: Case, implementation: str):
    exact = tuple(x.astype(np.float32) for x in case.arrays)
    result, expected = run(case, case.arrays, implementation), run(case, exact, "reference")
    value_tolerance, gradient_tolerance = TOLERANCES[case.dtype]
    assert result.out.dtype == case.dtype and result.measure.dtype == jnp.float32
    assert_close(result.measure, expected.measure, 1e-5, "measure")
    np.testing.assert_array_equal(np.sort(result.top), np.sort(expected.top))
    assert_close(result.out, expected.out, value_tolerance, "out")
    assert_close(jnp.sort(result.logsumexp), jnp.sort(expected.logsumexp), value_tolerance, "logsumexp")
    actual = gradients(lambda arrays: run(case, arrays, implementation).out, case, case.arrays)
    wanted = gradients(lambda arrays: run(case, arrays, "reference").out, case, exact)
    for name, got, want in zip(("query", "key", "value"), actual, wanted, strict=True):
        assert got.dtype == case.dtype
        assert_close(got, want, gradient_tolerance, f"gradient of {name}")


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("shared", (False, True))
def test_reference_is_the_published_computation(causal, shared):
    case = Case(causal=causal, shared=shared, value_width=24)
    result = run(case, case.arrays, "reference")
    out, measure, top = published(case, *case.arrays)
    assert_close(result.measure, measure, 1e-5, "measure")
    np.testing.assert_array_equal(result.top, top)
    assert_close(result.out, out, 1e-5, "out")
    actual = gradients(lambda arrays: run(case, arrays, "reference").out, case, case.arrays)
    wanted = gradients(lambda arrays: published(case, *arrays)[0], case, case.arrays)
    for got, want in zip(actual, wanted, strict=True):
        assert_close(got, want, 1e-4, "gradient")


@given(cases())
@settings(max_examples=5)
def test_chunked_equals_reference(case):
    assert_equals_reference(case, "chunked")


@pytest.mark.parametrize("implementation", ("tpu", "gpu"))
@pytest.mark.parametrize(
    "case",
    (
        Case(batch=1, queries=37, keys=53, heads=2, value_width=24, dtype="bfloat16"),
        Case(batch=1, queries=70, keys=70, heads=2, causal=True),
    ),
    ids=("bfloat16", "causal"),
)
def test_kernels_equal_reference(implementation, case):
    assert_equals_reference(case, implementation)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize(
    "case",
    (
        Case(queries=130, keys=1100, heads=2, width=64),  # several key blocks, two heads in a register
        Case(queries=20, keys=601, heads=1, width=128, samples=1),
        Case(batch=1, queries=9, keys=4500, heads=2, width=64, samples=2),  # a head's keys exceed a CPU's cache
        Case(queries=7, keys=3, heads=3, width=48, samples=70),  # more samples than keys, and than one unrolled body
    ),
    ids=("long", "one_sample", "far", "short"),
)
@pytest.mark.parametrize(
    "measure",
    (
        chunked.measure,
        functools.partial(tpu._by_counts, interpret=True),
        functools.partial(tpu._by_rows, interpret=True),
    ),
    ids=("chunked", "by_counts", "by_rows"),
)
def test_each_way_to_measure_equals_reference(measure, case, dtype):
    query, key, _ = dataclasses.replace(case, dtype=dtype).arrays
    expected = reference.measure(query.astype(jnp.float32), key.astype(jnp.float32), case.table)
    assert_close(jax.jit(measure)(query, key, case.table), expected, 1e-5, "measure")


def test_one_sample_for_all_is_a_table_of_equal_rows():
    case = Case(shared=True)
    repeated = jnp.broadcast_to(case.table, (case.queries, case.samples))
    results = [
        prob_sparse_attention(*case.arrays, table, queries=case.active, implementation="chunked")
        for table in (case.table, repeated)
    ]
    assert_close(results[0].measure, results[1].measure, 1e-5, "measure")
    assert_close(results[0].out, results[1].out, 1e-5, "out")


@pytest.mark.parametrize("causal", (False, True))
def test_all_queries_active_is_attention(causal):
    case = Case(active=37, causal=causal)
    expected = attention(*case.arrays, causal=causal, implementation="reference")
    assert_close(run(case, case.arrays, "chunked").out, expected, 1e-5, "out")


def test_lazy_queries_get_the_mean_of_the_values():
    case = Case(queries=21, keys=37)
    result = run(case, case.arrays, "chunked")
    lazy = np.ones((case.batch, case.heads, case.queries), bool)
    np.put_along_axis(lazy, np.asarray(result.top), False, axis=2)
    mean = np.broadcast_to(case.arrays[2].mean(1)[:, :, None], (*lazy.shape, case.value_width))
    np.testing.assert_allclose(result.out.swapaxes(1, 2)[lazy], mean[lazy], atol=1e-6)


def test_future_values_do_not_reach_the_past():
    case = Case(causal=True)
    query, key, value = case.arrays
    other = run(case, (query, key, np.concatenate([value[:, :20], value[:, 20:] + 1], axis=1)), "chunked").out
    np.testing.assert_array_equal(other[:, :20], run(case, case.arrays, "chunked").out[:, :20])


def test_permuting_keys_changes_nothing():
    case = Case(keys=53)
    query, key, value = case.arrays
    order = np.random.default_rng(3).permutation(case.keys)
    permuted = prob_sparse_attention(
        query, key[:, order], value[:, order], jnp.argsort(order)[case.table], queries=case.active
    )
    result = run(case, case.arrays, None)
    np.testing.assert_array_equal(permuted.top, result.top)
    assert_close(permuted.out, result.out, 1e-5, "out")


def test_the_measure_has_no_gradient():
    case = Case()
    gradient = jax.grad(lambda arrays: run(case, arrays, None).measure.sum())(case.arrays)
    assert all(not x.any() for x in gradient)


@pytest.mark.parametrize("causal", (False, True))
def test_attention_map_makes_the_active_rows(causal):
    case = Case(causal=causal)
    query, key, value = case.arrays
    result = run(case, case.arrays, "chunked")
    weights = attention_map(query, key, result.top, causal=causal)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    rows = jnp.einsum("bhlm,bmhe->bhle", weights, value)
    pick = functools.partial(jnp.take_along_axis, indices=result.top[..., None], axis=2)
    assert_close(pick(rows), pick(result.out.swapaxes(1, 2)), 1e-5, "active rows")
    lazy = weights.at[jnp.arange(2)[:, None, None], jnp.arange(3)[:, None], result.top].set(1 / case.keys)
    np.testing.assert_allclose(lazy, 1 / case.keys)


def test_dropout_keeps_the_mean():
    case = Case(active=37)
    call = jax.jit(lambda rng: prob_sparse_attention(
        *case.arrays, case.table, queries=case.active, dropout_rate=0.3, dropout_rng=rng, implementation="chunked"
    ).out)  # fmt: skip
    draws = jnp.stack([call(rng) for rng in jax.random.split(jax.random.key(0), 200)])
    np.testing.assert_allclose(draws.mean(0), run(case, case.arrays, "chunked").out, atol=0.25)
    assert draws.std(0).min() > 0


@pytest.mark.parametrize(
    "factor, length, size", ((5, 96, 25), (3, 72, 15), (5, 720, 35), (3, 48, 12), (5, 8, 8), (5, 1, 1))
)
def test_sizes_are_the_published_ones(factor, length, size):
    assert sample_size(factor, length) == active_queries(factor, length) == size


def test_sampled_keys_are_uniform():
    table = sample_keys(jax.random.key(0), 4000, 7, 5)
    assert table.shape == (4000, 5) and table.dtype == jnp.int32
    np.testing.assert_allclose(np.bincount(table.reshape(-1), minlength=7) / table.size, 1 / 7, atol=0.01)


def _operations(jaxpr) -> int:
    """Elements that a program computes, a matrix product's inner ones included, loops unrolled."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [value for value in equation.params.values() if hasattr(value, "jaxpr") or hasattr(value, "eqns")]
        if inner:
            times = equation.params.get("length", 1)
            if equation.primitive.name == "pallas_call":
                times = math.prod(equation.params["grid_mapping"].grid)
            total += times * sum(_operations(getattr(value, "jaxpr", value)) for value in inner)
            continue
        total += sum(math.prod(getattr(out.aval, "shape", ())) for out in equation.outvars)
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            width = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * width * math.prod(equation.outvars[0].aval.shape)
    return total


def _long(length: int):
    size = sample_size(5, length)
    array = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
    table = jax.ShapeDtypeStruct((length, size), jnp.int32)

    def loss(query, key, value, table):
        return prob_sparse_attention(query, key, value, table, queries=size, implementation="chunked").out.sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2)), (array, array, array, table)


def _measure_only(measure, length: int):
    query, key, _, table = _long(length)[1]
    return measure, (query, key, table)


@pytest.mark.parametrize(
    "program",
    (
        _long,
        functools.partial(_measure_only, functools.partial(gpu.measure, interpret=False)),
        functools.partial(_measure_only, functools.partial(tpu._by_rows, interpret=False)),
    ),
    ids=("chunked", "gpu_measure", "tpu_measure_by_rows"),
)
def test_operations_grow_as_length_times_its_logarithm(program):
    def operations(length):
        function, arrays = program(length)
        return _operations(jax.make_jaxpr(function)(*arrays).jaxpr)

    lengths = (1024, 4096, 16384, 65536)
    rates = [operations(length) / (length * sample_size(5, length)) for length in lengths]
    assert max(rates) < 1.3 * min(rates), rates


def test_memory_is_linear():
    def memory(length):
        function, arrays = _long(length)
        return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    sizes = [memory(length) for length in (1024, 4096, 16384, 65536)]
    assert all(after < 4.4 * before for before, after in itertools.pairwise(sizes[1:])), sizes
    assert sizes[-1] < 65536 * 2 * 64 * 4 * 16  # sixteen arrays of the size of the keys; all scores would be 512


SLOW = pytest.mark.slow
COMPILED = [
    pytest.param(720, "float32", False),
    *(
        pytest.param(length, dtype, causal, marks=SLOW)
        for length in (720, 336, 96, 48)
        for dtype in ("float32", "bfloat16")
        for causal in (False, True)
        if (length, dtype, causal) != (720, "float32", False)
    ),
]


@pytest.mark.parametrize("target", ("tpu-v5e", "tpu-v6e", "h100"))
@pytest.mark.parametrize("length, dtype, causal", COMPILED)
def test_compiles_forward_and_backward(target, length, dtype, causal):
    size = sample_size(5, length)
    array = jax.ShapeDtypeStruct((32, length, 8, 64), dtype)
    table = jax.ShapeDtypeStruct((length, size), jnp.int32)

    def loss(query, key, value, table):
        return prob_sparse_attention(query, key, value, table, queries=size, causal=causal).out.sum()

    compiled = compile_for(target, jax.value_and_grad(loss, argnums=(0, 1, 2)), array, array, array, table)
    assert compiled.kernels["prob_sparse_measure"] == 1
    # Neither the gathered keys (B, H, L, U, E) nor all scores (B, H, L, L), but some arrays of the inputs' size.
    temporary = compiled.executable.memory_analysis().temp_size_in_bytes
    assert temporary < 14 * 32 * max(length, 128) * 8 * 64 * 4  # the kernels pad short sequences


@pytest.mark.parametrize(
    "target, length", (("tpu-v5e", 4096), pytest.param("tpu-v5e", 65536, marks=SLOW), ("tpu-v6e", 65536))
)
def test_long_sequences_compile_for_tpu(target, length):
    array = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32)
    table = jax.ShapeDtypeStruct((length, sample_size(5, length)), jnp.int32)
    compiled = compile_for(target, functools.partial(tpu.measure, interpret=False), array, array, table)
    assert compiled.kernels["prob_sparse_measure"] == 1


GOOD = Case()


@pytest.mark.parametrize(
    "change, error, message",
    (
        ({"query": GOOD.arrays[0][0]}, ValueError, r"query must be \(batch, time, .*\), got shape \(37, 3, 16\)"),
        ({"key": GOOD.arrays[1].astype(int)}, TypeError, "key must be floating point, got int64"),
        ({"value": GOOD.arrays[2].astype("bfloat16")}, TypeError, "must share a dtype, got float32, float32, bfloat16"),
        ({"key": GOOD.arrays[1][:, :, :2]}, ValueError, r"key must be .* = \(2, keys, 3, 16\), got \(2, 37, 2, 16\)"),
        ({"value": GOOD.arrays[2][:, :5]}, ValueError, r"same batch, length and heads, got .* \(2, 5, 3, 16\)"),
        ({"query": GOOD.arrays[0][:, :0]}, ValueError, "query has an empty axis"),
        ({"query": GOOD.arrays[0][:, :9], "causal": True}, ValueError, "as many queries as keys, got 9 and 37"),
        ({"sample_indices": GOOD.table.astype(float)}, TypeError, "sample_indices must be integers, got float64"),
        ({"sample_indices": GOOD.table[:9]}, ValueError, r"a row for each of the 37 queries, got \(9, 9\)"),
        ({"sample_indices": GOOD.table[None]}, ValueError, r"\(L_Q, U\) or \(U,\), got shape \(1, 37, 9\)"),
        ({"sample_indices": GOOD.table[:, :0]}, ValueError, r"got shape \(37, 0\)"),
        ({"sample_indices": GOOD.table + 1}, ValueError, r"in \[0, 37\), got 1 .. 37"),
        ({"queries": 38}, ValueError, r"queries must be in 1 .. 37 \(the number of queries\), got 38"),
        ({"queries": 0}, ValueError, "got 0"),
        ({"scale": -1.0}, ValueError, "scale must be positive, got -1.0"),
        ({"dropout_rate": 0.1}, ValueError, "dropout needs dropout_rng"),
        ({"implementation": "cuda"}, ValueError, "implementation must be None or one of"),
    ),
)  # fmt: skip
def test_bad_input_is_refused(change, error, message):
    query, key, value = GOOD.arrays
    arguments = {"query": query, "key": key, "value": value, "sample_indices": GOOD.table, "queries": 7} | change
    arrays = [arguments.pop(name) for name in ("query", "key", "value", "sample_indices")]
    with pytest.raises(error, match=message):
        prob_sparse_attention(*arrays, **arguments)


@pytest.mark.parametrize("factor, length", ((0, 96), (5, 0)))
def test_sizes_of_nothing_are_refused(factor, length):
    with pytest.raises(ValueError, match="must be at least 1"):
        sample_size(factor, length)


def test_a_known_table_may_be_closed_over_by_a_trace():
    query = jnp.ones((1, 8, 2, 4))
    table = jnp.zeros((8, 3), jnp.int32)
    outside = table + 8
    out = jax.jit(lambda x: prob_sparse_attention(x, x, x, table, queries=3).out)(query)
    assert out.shape == query.shape
    with pytest.raises(ValueError, match=r"sample_indices must be in \[0, 8\), got 8 .. 8"):
        jax.jit(lambda x: prob_sparse_attention(x, x, x, outside, queries=3).out)(query)

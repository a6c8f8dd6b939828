"""Readouts of the attention map: every implementation against the map, and the map's own mathematics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import attention
from kernels.attention.operands import Operands, Options
from kernels.attention_readout import (
    attention_entries,
    attention_received,
    attention_top_k,
    calibrated_attention,
)
from kernels.attention_readout.reference import attention_map
from tests.kernels.attention_cases import Case, assert_close
from tests.kernels.readout_cases import assert_equals_reference

EVERYTHING = Case(
    causal=True, positions=True, segments=True, prefix=True, lengths=True, sinks=True, logit_softcap=1.5,
    bias=(True, True, True, True),
)  # fmt: skip
CASES = {
    "plain": Case(queries=37, keys=53, heads=2),
    "everything": EVERYTHING,
    "bfloat16": Case(batch=1, queries=150, keys=150, heads=2, key_heads=1, causal=True, dtype="bfloat16"),
    "window": Case(batch=1, queries=90, keys=90, causal=True, window=9, bias=(False, True, False, True)),
}


def inputs(queries=21, keys=33, heads=4, key_heads=2, width=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((2, queries, heads, width), (2, keys, key_heads, width), (2, keys, key_heads, 12))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def whole_map(query, key, **options):
    value = jnp.zeros((*key.shape[:3], 1))
    return attention_map(Operands(query, key, value), Options(query.shape[3] ** -0.5, **options))


@pytest.mark.parametrize("name", CASES)
def test_chunked_equals_the_map(name):
    assert_equals_reference(CASES[name], "chunked")


@pytest.mark.parametrize("queries, keys", [(600, 600), (1, 70)])
def test_blocks_of_queries_make_no_difference(queries, keys):
    causal = queries == keys
    assert_equals_reference(
        Case(batch=1, queries=queries, keys=keys, heads=2, key_heads=1, causal=causal), "chunked", k=5
    )


# The interpreter is slow: of each platform the case with all options, and one of several tiles.
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@pytest.mark.parametrize("name", [pytest.param("everything", marks=pytest.mark.slow), "bfloat16"])
def test_kernels_equal_the_map(implementation, name):
    assert_equals_reference(CASES[name], implementation)


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_the_best_keys_come_sorted_from_several_tiles(implementation):
    query, key, _ = inputs(queries=5, keys=700, heads=2, key_heads=1)
    weights, indices = attention_top_k(query, key, 7, implementation=implementation)
    expected, expected_indices = jax.lax.top_k(whole_map(query, key), 7)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["chunked", "gpu", "tpu"])
def test_of_equal_weights_the_earlier_key_comes_first(implementation):
    query, key = jnp.ones((1, 3, 1, 8)), jnp.ones((1, 40, 1, 8))
    weights, indices = attention_top_k(query, key, 4, implementation=implementation)
    np.testing.assert_array_equal(indices[0, 0], [[0, 1, 2, 3]] * 3)
    np.testing.assert_allclose(weights, 1 / 40, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_keys_that_are_not_there_have_index_minus_one(implementation):
    query, key, _ = inputs(queries=5, keys=5)
    weights, indices = attention_top_k(query, key, 3, causal=True, implementation=implementation)
    assert (indices[:, :, 0, 1:] == -1).all() and not weights[:, :, 0, 1:].any()
    assert (indices[:, :, 0, 0] == 0).all() and (indices[:, :, 2:] >= 0).all()


def test_column_sums_are_what_all_queries_send():
    query, key, _ = inputs()
    total = attention_received(query, key)
    assert total.shape == (2, 33, 4, 1)
    np.testing.assert_allclose(total.sum(1), 21, rtol=1e-5)
    halves = jnp.stack([jnp.arange(21) < 10, jnp.arange(21) >= 10], 1).astype(jnp.float32)[None, :, None]
    np.testing.assert_allclose(attention_received(query, key, halves).sum(-1), total[..., 0], rtol=1e-5)


def test_a_phrase_mean_is_the_mean_of_its_rows():
    query, key, _ = inputs()
    phrase = jnp.zeros((1, 21, 1, 1)).at[0, 4:9].set(1 / 5)
    rows = attention_entries(query, key, rows=jnp.arange(4, 9)[None])
    assert_close(attention_received(query, key, phrase)[..., 0].swapaxes(1, 2), rows.mean(2), 1e-5, "phrase")


def test_a_given_logsumexp_changes_neither_values_nor_gradients():
    query, key, value = inputs(queries=33)
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal((2, 33, 4, 1)), jnp.float32)

    def loss(query, key, given):
        logsumexp = None
        if given:
            logsumexp = attention(query, key, value, causal=True, return_logsumexp=True)[1]
        best = attention_top_k(query, key, 2, causal=True, logsumexp=logsumexp)[0]
        received = attention_received(query, key, causal=True, logsumexp=logsumexp)
        rows = attention_entries(query, key, rows=jnp.array([[3, 20]]), causal=True, logsumexp=logsumexp)
        return jnp.sum(received * d_out) + jnp.sum(best**2) + jnp.sum(jnp.sin(5 * rows))

    both = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    own, given = (both(query, key, given) for given in (False, True))
    np.testing.assert_allclose(own[0], given[0], rtol=1e-5)
    for one, other in zip(own[1], given[1], strict=True):
        assert_close(one, other, 1e-4, "gradient")


@pytest.mark.parametrize("rows, columns", [([[3, 0, 20], [1, 1, 7]], [[5, 2]]), (None, [[8], [0]]), ([[20]], None)])
def test_entries_are_the_maps(rows, columns):
    query, key, _ = inputs()
    rng = np.random.default_rng(2)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, 33))), jnp.int32)
    bias = jnp.asarray(rng.standard_normal((1, 4, 21, 33)), jnp.float32)
    options = dict(
        causal=True, window=(12, 3), logit_softcap=2.0, bias=bias,
        query_segment_ids=segments[:, :21], key_segment_ids=segments[:1], key_lengths=jnp.array([30, 9]),
    )  # fmt: skip
    rows, columns = (None if x is None else jnp.asarray(x) for x in (rows, columns))

    def loss(query, key, implementation):
        out = attention_entries(query, key, rows=rows, columns=columns, **options, implementation=implementation)
        return jnp.sum(jnp.sin(3 * out)), out

    grad = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
    (gradients, out), (expected_gradients, expected) = (grad(query, key, name) for name in (None, "reference"))
    assert_close(out, expected, 1e-5, "entries")
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert_close(one, other, 1e-4, "gradient")


def calibrated_map(weights, scaled, factor):
    """The published rule on a map (B, H, T, S)."""
    on = jnp.where(scaled[:, :, None], weights, 0)
    rest = weights - on
    freed = (1 - factor) * on.sum(-1, keepdims=True)
    only = rest.sum(-1, keepdims=True) == 0
    shared = factor * on + rest + freed * rest / jnp.where(only, 1, rest.sum(-1, keepdims=True))
    return jnp.where(only, weights, shared)


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0])
def test_calibration_is_the_published_edit_of_the_map(factor):
    query, key, value = inputs(queries=33)
    scaled = jax.random.bernoulli(jax.random.key(0), 0.2, (2, 4, 33)).at[0, 1].set(False).at[1, 2, 0].set(True)

    def expected(query, key, value):
        edited = calibrated_map(whole_map(query, key, causal=True), scaled, factor)
        return jnp.einsum("bhts,bshe->bthe", edited, jnp.repeat(value, 2, axis=2))

    def actual(query, key, value):
        return calibrated_attention(query, key, value, scaled, factor=factor, causal=True)

    def loss(query, key, value, function):
        out = function(query, key, value)
        return jnp.sum(jnp.sin(out)), out

    grad = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
    (gradients, out), (wanted, wanted_out) = (grad(query, key, value, f) for f in (actual, expected))
    assert_close(out, wanted_out, 1e-5, "out")
    for one, other in zip(gradients, wanted, strict=True):
        assert_close(one, other, 1e-4, "gradient")


def test_calibration_bears_a_weight_of_almost_one():
    # One key has all the mass but 1e-9 of it: 1 - a would cancel in float32.
    query, key, value = jnp.ones((1, 1, 1, 1)), jnp.array([20.0, 0, 0]).reshape(1, 3, 1, 1), jnp.eye(3)[None, :, None]
    out = calibrated_attention(query, key, value, jnp.array([[[True, False, False]]]), factor=0.4, scale=1.0)
    np.testing.assert_allclose(out[0, 0, 0], [0.4, 0.3, 0.3], rtol=1e-5)


QUERY, KEY, VALUE = inputs()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: attention_received(QUERY, KEY, jnp.ones((2, 20, 1, 1))), ValueError, "weights must be .*got shape"),
        (lambda: attention_received(QUERY, KEY, jnp.ones((2, 21, 1, 1), int)), TypeError, "floating point, got int"),
        (lambda: attention_received(QUERY, KEY, logsumexp=jnp.ones((2, 21, 4))), ValueError, r"= \(2, 4, 21\), got"),
        (lambda: attention_received(QUERY, KEY, mask=KEY), TypeError, r"unknown arguments \['mask'\]"),
        (lambda: attention_received(QUERY, KEY[:1]), ValueError, "batch sizes differ"),
        (lambda: attention_top_k(QUERY, KEY, 34), ValueError, r"k must be in 1 .. 33 \(the number of keys\), got 34"),
        (lambda: attention_top_k(QUERY, KEY, 1, implementation="cuda"), ValueError, "implementation must be"),
        (lambda: attention_entries(QUERY, KEY, rows=jnp.arange(3)), ValueError, r"rows must be \(2 or 1, number\)"),
        (lambda: attention_entries(QUERY, KEY, columns=jnp.ones((1, 2))), TypeError, "columns must be integers"),
        (
            lambda: calibrated_attention(QUERY, KEY, VALUE, jnp.ones((2, 3, 33), bool)), ValueError,
            r"scaled_keys must be \(2 or 1, 4 or 1, 33\), got shape \(2, 3, 33\)",
        ),
        (lambda: calibrated_attention(QUERY, KEY, VALUE, jnp.ones((2, 4, 33))), TypeError, "must be bool"),
        (
            lambda: calibrated_attention(QUERY, KEY, VALUE, jnp.ones((1, 1, 33), bool), factor=2.0), ValueError,
            r"factor must be in \[0, 1\], got 2.0",
        ),
        (
            lambda: calibrated_attention(QUERY, KEY, VALUE, jnp.ones((1, 1, 33), bool), sinks=jnp.ones(4)), ValueError,
            "takes no sinks",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()

"""Attention over looked-up keys: every form is the definition, and memory does not grow with T squared."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import sparse_topl
from tests.kernels.attention_cases import TOLERANCES
from tests.kernels.recurrent_cases import assert_close


def _operands(time: int, heads: int = 4, key_heads: int = 2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(time), 4)
    query = 3 * jax.random.normal(keys[0], (2, time, heads, 16), dtype)
    key, value = (jax.random.normal(k, (2, time, key_heads, 16), dtype) for k in keys[1:3])
    return query, key, value, jax.random.normal(keys[3], (4, 4, 4))


def _codes(query, key, codebook):
    return sparse_topl.encode(query, codebook), sparse_topl.encode(key, codebook)


def _assert_close(attend, operands, implementation):
    """Values and gradients of `attend(query, key, value, implementation)` are the definition's, in float32."""
    dtype = operands[0].dtype
    cotangent = jax.random.normal(jax.random.key(1), operands[0].shape, dtype).astype(jnp.float32)

    def result(name, dtype):
        def loss(*operands):
            out = attend(*operands, name)
            return jnp.sum(out.astype(jnp.float32) * cotangent), out

        gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*(x.astype(dtype) for x in operands))
        return out, *gradients

    names, tolerances = ("out", "query", "key", "value"), TOLERANCES[dtype.name]
    pairs = zip(names, result(implementation, dtype), result("reference", jnp.float32), strict=True)
    for name, got, expected in pairs:
        assert_close(got, expected, tolerances[name != "out"], dtype.name, name)


@pytest.mark.parametrize(("time", "mode"), [(1, "exact"), (37, "exact"), (96, "prototype")])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lists_block_by_block_are_the_definition(time, mode, dtype):
    query, key, value, codebook = _operands(time, dtype=dtype)
    codes = _codes(query, key, codebook)
    keep = 12 if mode == "prototype" else max(1, time // 8)
    indices = sparse_topl.lookup(*codes, keep=keep, mode=mode)
    definition = sparse_topl.lookup(*codes, keep=keep, mode=mode, implementation="reference")
    np.testing.assert_array_equal(indices, definition)

    def attend(query, key, value, implementation):
        return sparse_topl.listed_attention(query, key, value, indices, clamp=2.0, implementation=implementation)

    _assert_close(attend, (query, key, value), implementation="chunked")


@pytest.mark.parametrize("implementation", ["chunked", "tpu", "gpu"])
@pytest.mark.parametrize(
    ("time", "past", "keep", "dtype"),
    [(37, 0, 5, jnp.float32), (70, 81, 20, jnp.float32), (150, 0, 150, jnp.float32), (150, 150, 24, jnp.bfloat16)],
)
def test_thresholds_select_what_lists_hold(time, past, keep, dtype, implementation):
    query, key, value, codebook = _operands(time + past, dtype=dtype)
    codes = _codes(query, key, codebook)

    def attend(query, key, value, implementation):
        return sparse_topl.sparse_attention(
            query, key, value, codes[0][:, past:], codes[1], keep=keep, codewords=4, clamp=2.0,
            implementation=implementation,
        )  # fmt: skip

    _assert_close(attend, (query[:, past:], key, value), implementation)


@pytest.mark.parametrize("implementation", ["chunked", "tpu", "gpu"])
@given(seed=st.integers(0, 2**32 - 1), keep=st.integers(1, 45), codewords=st.sampled_from([2, 5, 16]))
@settings(max_examples=6)
def test_selections_with_many_ties(implementation, seed, keep, codewords):
    """All values one-hot: the output says which keys were selected, exactly."""
    rng = np.random.default_rng(seed)
    codes = jnp.asarray(rng.integers(0, codewords, (2, 45, 1, 3)))
    zeros, value = jnp.zeros((1, 45, 1, 8)), jnp.eye(45)[None, :, None]
    out = sparse_topl.sparse_attention(
        zeros, zeros, value, codes[:1], codes[1:], keep=keep, codewords=codewords, implementation=implementation
    )
    found = np.asarray(sparse_topl.lookup(codes[:1], codes[1:], keep=keep, implementation="reference"))[0, :, 0]
    for selected, row in zip(found, np.asarray(out)[0, :, 0], strict=True):
        assert set(np.flatnonzero(row)) == set(selected[selected >= 0])


def test_selection_is_causal_and_ties_go_to_the_earliest():
    codes = jnp.zeros((1, 5, 1, 4), jnp.int32)
    found = sparse_topl.lookup(codes, codes, keep=2)
    np.testing.assert_array_equal(found[0, :, 0], [[0, -1], [0, 1], [0, 1], [0, 1], [0, 1]])


def test_one_new_query_finds_what_it_found_in_the_sequence():
    query, key, _, codebook = _operands(40)
    codes = sparse_topl.encode(query, codebook), sparse_topl.encode(key, codebook)
    whole = sparse_topl.lookup(*codes, keep=5)
    np.testing.assert_array_equal(whole[:, -1:], sparse_topl.lookup(codes[0][:, -1:], codes[1], keep=5))


def _listed(query, key, value, *codes):
    return sparse_topl.listed_attention(query, key, value, sparse_topl.lookup(*codes, keep=16))


@pytest.mark.parametrize("attend", [partial(sparse_topl.sparse_attention, keep=16, codewords=4), _listed])
def test_no_square_of_scores_is_kept(attend):
    def step(query, key, value, codebook):
        def loss(*operands):
            return attend(*operands, *_codes(query, key, codebook)).sum()

        return jax.grad(loss, (0, 1, 2))(query, key, value)

    def temporary(time):
        head = jax.ShapeDtypeStruct((1, time, 1, 16), jnp.float32)
        compiled = jax.jit(step).lower(head, head, head, jax.ShapeDtypeStruct((4, 4, 4), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # With `keep` fixed every part is at most linear in T.
    assert temporary(4096) <= 2.2 * temporary(2048)
    assert temporary(4096) < 4096 * 4096


def test_bad_input_is_named():
    codes = jnp.zeros((1, 8, 2, 4), jnp.int32)
    with pytest.raises(ValueError, match="keep must be from 1"):
        sparse_topl.lookup(codes, codes, keep=9)
    with pytest.raises(ValueError, match="multiple of 4"):
        sparse_topl.lookup(codes, codes, keep=4, mode="prototype")
    heads = jnp.zeros((1, 8, 2, 16))
    with pytest.raises(ValueError, match="codewords must be"):
        sparse_topl.sparse_attention(heads, heads, heads, codes, codes, keep=2, codewords=500)
    with pytest.raises(ValueError, match="are not those of"):
        sparse_topl.sparse_attention(heads, heads, heads, codes[:, :4], codes, keep=2, codewords=4)
    with pytest.raises(ValueError, match="codebook must be"):
        sparse_topl.encode(jnp.zeros((2, 6)), jnp.zeros((4, 4, 4)))

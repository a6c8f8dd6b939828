"""Attention over looked-up keys: the chunked form is the definition, and memory does not grow with T squared."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import sparse_topl
from tests.kernels.attention_cases import TOLERANCES
from tests.kernels.recurrent_cases import assert_close


def _operands(time: int, heads: int = 4, key_heads: int = 2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(time), 4)
    query = 3 * jax.random.normal(keys[0], (2, time, heads, 16), dtype)
    key, value = (jax.random.normal(k, (2, time, key_heads, 16), dtype) for k in keys[1:3])
    return query, key, value, jax.random.normal(keys[3], (4, 4, 4))


@pytest.mark.parametrize(("time", "mode"), [(1, "exact"), (37, "exact"), (96, "exact"), (96, "prototype")])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_chunked_is_the_definition(time, mode, dtype):
    query, key, value, codebook = _operands(time, dtype=dtype)
    codes = sparse_topl.encode(query, codebook), sparse_topl.encode(key, codebook)
    keep = 12 if mode == "prototype" else max(1, time // 8)
    indices = sparse_topl.lookup(*codes, keep=keep, mode=mode)
    definition = sparse_topl.lookup(*codes, keep=keep, mode=mode, implementation="reference")
    np.testing.assert_array_equal(indices, definition)

    cotangent = jax.random.normal(jax.random.key(1), query.shape, dtype).astype(jnp.float32)

    def result(name, dtype):
        def loss(*operands):
            out = sparse_topl.sparse_attention(*operands, indices, clamp=2.0, implementation=name)
            return jnp.sum(out.astype(jnp.float32) * cotangent), out

        operands = [x.astype(dtype) for x in (query, key, value)]
        gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*operands)
        return out, *gradients

    # The definition in float32, of the same numbers.
    names, tolerances = ("out", "query", "key", "value"), TOLERANCES[jnp.dtype(dtype).name]
    for name, got, expected in zip(names, result("chunked", dtype), result("reference", jnp.float32), strict=True):
        assert_close(got, expected, tolerances[name != "out"], jnp.dtype(dtype).name, name)


def test_selection_is_causal_and_ties_go_to_the_earliest():
    codes = jnp.zeros((1, 5, 1, 4), jnp.int32)
    found = sparse_topl.lookup(codes, codes, keep=2)
    np.testing.assert_array_equal(found[0, :, 0], [[0, -1], [0, 1], [0, 1], [0, 1], [0, 1]])


def test_one_new_query_finds_what_it_found_in_the_sequence():
    query, key, _, codebook = _operands(40)
    codes = sparse_topl.encode(query, codebook), sparse_topl.encode(key, codebook)
    whole = sparse_topl.lookup(*codes, keep=5)
    np.testing.assert_array_equal(whole[:, -1:], sparse_topl.lookup(codes[0][:, -1:], codes[1], keep=5))


def test_no_square_of_scores_is_kept():
    def step(query, key, value, codebook):
        indices = sparse_topl.lookup(sparse_topl.encode(query, codebook), sparse_topl.encode(key, codebook), keep=16)
        return jax.grad(lambda *x: sparse_topl.sparse_attention(*x, indices).sum(), (0, 1, 2))(query, key, value)

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
    with pytest.raises(ValueError, match="codebook must be"):
        sparse_topl.encode(jnp.zeros((2, 6)), jnp.zeros((4, 4, 4)))

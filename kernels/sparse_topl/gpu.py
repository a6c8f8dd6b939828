"""NVIDIA GPU kernels in Pallas-Triton: a query's threshold, then attention over blocks of keys masked by it.

A program owns a block of queries (or, for the gradients of keys and values, of keys) of a head and passes over the
others. Four codes are packed into a word, and a word's equal bytes are counted at once: registers hold few words.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.attention.gpu import dot, index_range, load_matrix, load_vector, program, store_matrix, store_vector
from kernels.common import round_up
from kernels.sparse_topl import chunked
from kernels.sparse_topl.selection import Options, level, threshold

ROWS = KEYS = 64
_ROWS_OF_KEYS_GRADIENT = 32  # a program holds two sums of its keys there: with 64 rows, ptxas spills
_CODES_PER_WORD = 4
_WIDEST = 128  # heads beyond are computed by XLA: their tiles would spill


class _Sizes(NamedTuple):
    batch: int
    time: int
    keys: int
    heads: int
    key_heads: int
    subspaces: int
    options: Options
    rows: int = ROWS  # of a tile

    @property
    def row_blocks(self) -> int:
        return pl.cdiv(self.time, self.rows)

    @property
    def key_blocks(self) -> int:
        return pl.cdiv(self.keys, KEYS)

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    def end_of_keys(self, row_block: Any) -> Any:
        """The first block of keys that these queries do not see."""
        last = (row_block + 1) * self.rows - 1 + self.keys - self.time
        return jnp.minimum(jax.lax.div(last, KEYS) + 1, self.key_blocks)


class _Inputs(NamedTuple):
    query: Any
    key: Any
    value: Any
    query_codes: Any  # int32 (B, H, M / 4, T)
    key_codes: Any  # int32 (B, G, M / 4, S)


class _Residuals(NamedTuple):
    thresholds: Any  # (B, H, T), as are the next two
    sums: Any
    delta: Any
    d_out: Any


def _sizes(query: jax.Array, key: jax.Array, key_codes: jax.Array, options: Options) -> _Sizes:
    return _Sizes(query.shape[0], query.shape[1], key.shape[1], query.shape[2], key.shape[2], key_codes.shape[-1],
                  options)  # fmt: skip


def _inputs(*operands: jax.Array) -> _Inputs:
    query, key, value, query_codes, key_codes = operands
    dtype = query.dtype if query.dtype in (jnp.bfloat16, jnp.float16, jnp.float32) else jnp.float32
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    # Bytes that fill up the last word equal no other.
    return _Inputs(query, key, value, _packed(query_codes, 0xFE), _packed(key_codes, 0xFF))


def _packed(codes: jax.Array, filler: int) -> jax.Array:
    """Codes (B, T, H, M) as words (B, H, M / 4, T)."""
    subspaces = codes.shape[-1]
    padding = round_up(subspaces, _CODES_PER_WORD) - subspaces
    codes = jnp.pad(codes.astype(jnp.uint8), ((0, 0),) * 3 + ((0, padding),), constant_values=filler)
    words = jax.lax.bitcast_convert_type(codes.reshape(*codes.shape[:3], -1, _CODES_PER_WORD), jnp.int32)
    return words.transpose(0, 2, 3, 1)


def _equal_bytes(words: jax.Array) -> jax.Array:
    """The number of zero bytes, from the exclusive or of two words."""
    low = jnp.int32(0x7F7F7F7F)
    zero = ~(((words & low) + low) | words | low)  # the highest bit of each byte that is zero
    ones = jax.lax.shift_right_logical(zero, jnp.full_like(zero, 7))
    return jax.lax.shift_right_logical(ones * jnp.int32(0x01010101), jnp.full_like(zero, 24))


def _scores(refs: _Inputs, sizes: _Sizes, batch: Any, head: Any, first_row: Any, first_key: Any) -> jax.Array:
    """Codes in common, int32 (rows, keys)."""
    key_head = jax.lax.div(head, sizes.group)
    total = jnp.zeros((sizes.rows, KEYS), jnp.int32)
    for word in range(refs.query_codes.shape[2]):
        query = load_vector(refs.query_codes, (batch, head, jnp.int32(word)), first_row, sizes.rows)
        key = load_vector(refs.key_codes, (batch, key_head, jnp.int32(word)), first_key, KEYS)
        total += _equal_bytes(query[:, None] ^ key[None])
    return total


def _places(sizes: _Sizes, first_row: Any, first_key: Any) -> tuple[jax.Array, jax.Array]:
    """Positions of queries (rows, 1) and of keys (1, keys)."""
    return index_range(first_row + (sizes.keys - sizes.time), sizes.rows)[:, None], index_range(first_key, KEYS)[None]


def _thresholds_kernel(refs: _Inputs, out_ref: Any, *, sizes: _Sizes) -> None:
    batch, head, row_block = program(sizes.batch, sizes.heads, sizes.row_blocks)
    first_row, keep = row_block * sizes.rows, sizes.options.keep

    def scores_of(block: Any) -> tuple[jax.Array, jax.Array]:
        position, index = _places(sizes, first_row, block * KEYS)
        scores = _scores(refs, sizes, batch, head, first_row, block * KEYS)
        return jnp.where(index <= position, scores, -1), jnp.broadcast_to(index, scores.shape)

    def count(block: Any, counts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        scores, _ = scores_of(block)
        return tuple(total + (scores >= m + 1).astype(jnp.int32).sum(axis=1) for m, total in enumerate(counts))

    end = sizes.end_of_keys(row_block)
    counts = jax.lax.fori_loop(0, end, count, (jnp.zeros((sizes.rows,), jnp.int32),) * sizes.subspaces)
    tau, ties = level(list(counts), keep)
    up_to = (index_range(0, KEYS)[:, None] <= index_range(0, KEYS)[None]).astype(jnp.bfloat16)

    def last_tie(block: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        seen, cut = carry
        scores, index = scores_of(block)
        tie = scores == tau[:, None]
        number = seen[:, None] + dot(tie.astype(jnp.bfloat16), up_to).astype(jnp.int32)
        taken = jnp.where(tie & (number <= ties[:, None]), index, -1)
        return seen + tie.astype(jnp.int32).sum(axis=1), jnp.maximum(cut, taken.max(axis=1))

    start = jnp.zeros((sizes.rows,), jnp.int32), jnp.full((sizes.rows,), -1, jnp.int32)
    _, cut = jax.lax.fori_loop(0, end, last_tie, start)
    position = index_range(first_row + (sizes.keys - sizes.time), sizes.rows)
    store_vector(out_ref, (batch, head), first_row, jnp.where(position < keep, 0, threshold(tau, cut, sizes.keys)))


def _tile(
    refs: _Inputs, sizes: _Sizes, batch: Any, head: Any, first_row: Any, first_key: Any, query: jax.Array,
    key: jax.Array, thresholds: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Weights before their division by the sum, and where logits are within the clamp; (rows, keys)."""
    options = sizes.options
    position, index = _places(sizes, first_row, first_key)
    scores = _scores(refs, sizes, batch, head, first_row, first_key)
    selected = (scores * sizes.keys + (sizes.keys - 1 - index) >= thresholds[:, None]) & (index <= position)
    logits = options.scale * dot(query, key, (1, 1))
    weights = jnp.exp(jnp.minimum(jnp.maximum(logits, -options.clamp), options.clamp))
    return jnp.where(selected, weights, 0.0), jnp.abs(logits) < options.clamp


def _forward_kernel(refs: _Inputs, thresholds_ref: Any, out_ref: Any, sums_ref: Any, *, sizes: _Sizes) -> None:
    batch, head, row_block = program(sizes.batch, sizes.heads, sizes.row_blocks)
    first_row, key_head = row_block * sizes.rows, jax.lax.div(head, sizes.group)
    query = load_matrix(refs.query, batch, first_row, sizes.rows, head)
    thresholds = load_vector(thresholds_ref, (batch, head), first_row, sizes.rows)

    def body(block: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, sums = carry
        key = load_matrix(refs.key, batch, block * KEYS, KEYS, key_head)
        value = load_matrix(refs.value, batch, block * KEYS, KEYS, key_head)
        weights, _ = _tile(refs, sizes, batch, head, first_row, block * KEYS, query, key, thresholds)
        return out + dot(weights.astype(value.dtype), value), sums + weights.sum(axis=1)

    width = max(pl.next_power_of_2(refs.value.shape[-1]), 16)
    start = jnp.zeros((sizes.rows, width), jnp.float32), jnp.zeros((sizes.rows,), jnp.float32)
    out, sums = jax.lax.fori_loop(0, sizes.end_of_keys(row_block), body, start)
    sums = jnp.maximum(sums, 1e-9)
    store_matrix(out_ref, (batch,), first_row, head, out / sums[:, None])
    store_vector(sums_ref, (batch, head), first_row, sums)


def _gradients(
    refs: _Inputs, residuals: _Residuals, sizes: _Sizes, batch: Any, head: Any, first_row: Any, first_key: Any,
    key: jax.Array, value: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Weights, gradient of query . key, both (rows, keys); queries and cotangents (rows, width)."""
    query = load_matrix(refs.query, batch, first_row, sizes.rows, head)
    d_out = load_matrix(residuals.d_out, batch, first_row, sizes.rows, head)
    thresholds, sums, delta = (load_vector(ref, (batch, head), first_row, sizes.rows) for ref in residuals[:3])
    weights, inside = _tile(refs, sizes, batch, head, first_row, first_key, query, key, thresholds)
    weights = weights / jnp.maximum(sums, 1e-9)[:, None]
    d_logits = weights * (dot(d_out, value, (1, 1)) - delta[:, None]) * sizes.options.scale
    return weights, jnp.where(inside, d_logits, 0.0), query, d_out


def _d_query_kernel(refs: _Inputs, residuals: _Residuals, d_query_ref: Any, *, sizes: _Sizes) -> None:
    batch, head, row_block = program(sizes.batch, sizes.heads, sizes.row_blocks)
    first_row, key_head = row_block * sizes.rows, jax.lax.div(head, sizes.group)

    def body(block: Any, total: jax.Array) -> jax.Array:
        key = load_matrix(refs.key, batch, block * KEYS, KEYS, key_head)
        value = load_matrix(refs.value, batch, block * KEYS, KEYS, key_head)
        _, d_logits, _, _ = _gradients(refs, residuals, sizes, batch, head, first_row, block * KEYS, key, value)
        return total + dot(d_logits.astype(key.dtype), key)

    width = max(pl.next_power_of_2(refs.query.shape[-1]), 16)
    total = jax.lax.fori_loop(0, sizes.end_of_keys(row_block), body, jnp.zeros((sizes.rows, width), jnp.float32))
    store_matrix(d_query_ref, (batch,), first_row, head, total)


def _d_key_value_kernel(
    refs: _Inputs, residuals: _Residuals, d_key_ref: Any, d_value_ref: Any, *, sizes: _Sizes
) -> None:
    batch, key_head, key_block = program(sizes.batch, sizes.key_heads, sizes.key_blocks)
    first_key = key_block * KEYS
    key = load_matrix(refs.key, batch, first_key, KEYS, key_head)
    value = load_matrix(refs.value, batch, first_key, KEYS, key_head)
    first = jax.lax.div(jnp.maximum(first_key - (sizes.keys - sizes.time), 0), sizes.rows)

    def of_head(member: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        head = key_head * sizes.group + member

        def body(block: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            d_key, d_value = carry
            weights, d_logits, query, d_out = _gradients(
                refs, residuals, sizes, batch, head, block * sizes.rows, first_key, key, value
            )
            d_value += dot(weights.astype(d_out.dtype), d_out, (0, 0))
            return d_key + dot(d_logits.astype(query.dtype), query, (0, 0)), d_value

        return jax.lax.fori_loop(first, sizes.row_blocks, body, carry)

    zeros = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    d_key, d_value = jax.lax.fori_loop(0, sizes.group, of_head, zeros)
    store_matrix(d_key_ref, (batch,), first_key, key_head, d_key)
    store_matrix(d_value_ref, (batch,), first_key, key_head, d_value)


def _call(name: str, kernel: Any, programs: int, out_shape: Any, interpret: bool) -> Any:
    return pl.pallas_call(
        kernel, grid=(programs,), out_shape=out_shape, interpret=interpret, name=name,
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
    )  # fmt: skip


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, query_codes: jax.Array, key_codes: jax.Array,
    *, options: Options, interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """See `chunked.forward`."""
    if max(query.shape[-1], value.shape[-1]) > _WIDEST:
        return chunked.forward(query, key, value, query_codes, key_codes, options=options)
    sizes = _sizes(query, key, key_codes, options)
    inputs = _inputs(query, key, value, query_codes, key_codes)
    programs = sizes.batch * sizes.heads * sizes.row_blocks
    shape = (sizes.batch, sizes.heads, sizes.time)
    thresholds = _call(
        "sparse_topl_gpu_thresholds", partial(_thresholds_kernel, sizes=sizes), programs,
        jax.ShapeDtypeStruct(shape, jnp.int32), interpret,
    )(inputs)  # fmt: skip
    out_shape = jax.ShapeDtypeStruct((*query.shape[:3], value.shape[-1]), jnp.float32)
    out, sums = _call(
        "sparse_topl_gpu_forward", partial(_forward_kernel, sizes=sizes), programs,
        (out_shape, jax.ShapeDtypeStruct(shape, jnp.float32)), interpret,
    )(inputs, thresholds)  # fmt: skip
    return out, thresholds.swapaxes(1, 2), sums.swapaxes(1, 2)


def backward(
    query: jax.Array, key: jax.Array, value: jax.Array, query_codes: jax.Array, key_codes: jax.Array,
    thresholds: jax.Array, sums: jax.Array, delta: jax.Array, d_out: jax.Array, *, options: Options, interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """See `chunked.backward`."""
    if max(query.shape[-1], value.shape[-1]) > _WIDEST:
        residuals = thresholds, sums, delta, d_out
        return chunked.backward(query, key, value, query_codes, key_codes, *residuals, options=options)
    sizes = _sizes(query, key, key_codes, options)
    inputs = _inputs(query, key, value, query_codes, key_codes)
    thresholds, sums, delta = (x.swapaxes(1, 2) for x in (thresholds, sums, delta))
    rows_of = _Residuals(thresholds, sums, delta, d_out.astype(inputs.query.dtype))

    def float32(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, jnp.float32)

    d_query = _call(
        "sparse_topl_gpu_d_query", partial(_d_query_kernel, sizes=sizes),
        sizes.batch * sizes.heads * sizes.row_blocks, float32(query), interpret,
    )(inputs, rows_of)  # fmt: skip
    sizes = sizes._replace(rows=_ROWS_OF_KEYS_GRADIENT)
    d_key, d_value = _call(
        "sparse_topl_gpu_d_key_value", partial(_d_key_value_kernel, sizes=sizes),
        sizes.batch * sizes.key_heads * sizes.key_blocks, (float32(key), float32(value)), interpret,
    )(inputs, rows_of)  # fmt: skip
    return d_query, d_key, d_value

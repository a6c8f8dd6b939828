"""The query sparsity measure on a TPU, which multiplies matrices fast and gathers slowly: two kernels, by length.

`_by_counts`, for the usual lengths, computes all scores, tile by tile in VMEM. Let C_lm count how often key m was drawn
for query l; then M_l is the maximum of S_lm over C_lm > 0 minus sum_m C_lm S_lm / L_K, for S = query key^T. C is shared
by batch and heads: a block of it is made once in VMEM from the table of samples and stays while all heads pass by.
Operations L_Q L_K E on the matrix unit, memory O(L).

`_by_rows`, where that square exceeds the cost of reading keys one at a time, holds a head's keys in VMEM and loads the
sampled rows. Operations L_Q U E = O(L log L), memory O(L).

Keys beyond `RESIDENT_BYTES` (65,536 for 128 lanes) go to the XLA form, also O(L log L), whose gather is slow here.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.common import NEGATIVE_INFINITY, round_up
from kernels.prob_sparse import chunked

LANES = 128
SUBLANES = 8
KEY_BLOCK = 1024
KEY_TILE = 256  # keys that one matrix product scores
COUNT_TILE = 32  # keys whose draws are counted in registers
QUERY_BLOCK = 512
COUNT_BYTES = 16 * 2**20  # of VMEM for C
ROW_QUERY_BLOCK = 128
ROW_UNROLL = 64  # samples whose loads one loop body overlaps
RESIDENT_BYTES = 32 * 2**20  # of VMEM for the keys of `_by_rows`
# Bundles the compiler schedules for a row load, over those for a score by matrix product (v5e; v6e is near).
ROW_COST = {jnp.dtype(jnp.float32): 76, jnp.dtype(jnp.bfloat16): 308}


def measure(query: jax.Array, key: jax.Array, sample_indices: jax.Array, *, interpret: bool) -> jax.Array:
    """See `reference.measure`."""
    heads, width = query.shape[2:]
    keys, samples = key.shape[1], sample_indices.shape[1]
    if query.dtype not in ROW_COST:
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    if keys <= ROW_COST[query.dtype] * samples:
        return _by_counts(query, key, sample_indices, interpret)
    if keys * round_up(_lane_group(heads, width), LANES) * 4 <= RESIDENT_BYTES:
        return _by_rows(query, key, sample_indices, interpret)
    return chunked.measure(query, key, sample_indices)


def _lane_group(heads: int, width: int) -> int:
    """Lanes of (B, L, H E) that one program reads: whole heads, whole vector registers if that can be."""
    lanes = math.lcm(width, LANES)
    return lanes if heads * width % lanes == 0 else heads * width


def _merge_heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1)


def _counts_kernel(table_ref, query_ref, key_ref, out_ref, count_ref, largest_ref, total_ref, *, width, keys, tile):
    item, group, key_block = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    block_k, lanes = key_ref.shape
    samples, block_q = table_ref.shape
    first_key = key_block * block_k

    @pl.when((item == 0) & (group == 0))
    def _count():
        def count_tile(t, _):
            start = pl.multiple_of(first_key + t * COUNT_TILE, COUNT_TILE)
            key_index = start + lax.broadcasted_iota(jnp.int32, (COUNT_TILE, block_q), 0)

            def sample(j, count):
                return count + (table_ref[pl.ds(j, 1), :] == key_index).astype(jnp.float32)

            nothing = jnp.zeros((COUNT_TILE, block_q), jnp.float32)
            count_ref[pl.ds(start, COUNT_TILE), :] = lax.fori_loop(0, samples, sample, nothing)
            return 0

        lax.fori_loop(0, block_k // COUNT_TILE, count_tile, 0)

    @pl.when(key_block == 0)
    def _start():
        largest_ref[...] = jnp.full_like(largest_ref, NEGATIVE_INFINITY)
        total_ref[...] = jnp.zeros_like(total_ref)

    query = query_ref[...]
    lane = lax.broadcasted_iota(jnp.int32, (block_q, lanes), 1)
    precision = lax.Precision.HIGHEST if query.dtype == jnp.float32 else lax.Precision.DEFAULT
    for head in range(lanes // width):
        # The other heads' lanes are zero: the product over all lanes is this head's, and no lane is moved.
        own = jnp.where((lane >= head * width) & (lane < (head + 1) * width), query, 0)

        def score_tile(t, carry, own=own):
            largest, total = carry
            start = pl.multiple_of(t * tile, tile)
            scores = lax.dot_general(
                key_ref[pl.ds(start, tile), :], own, (((1,), (1,)), ((), ())),
                precision=precision, preferred_element_type=jnp.float32,
            )  # fmt: skip
            count = count_ref[pl.ds(pl.multiple_of(first_key + start, tile), tile), :]
            # Keys past the end were never drawn; whatever was read there must not turn 0 S into NaN.
            drawn = count > 0
            maxima = jnp.where(drawn, scores, NEGATIVE_INFINITY).reshape(-1, SUBLANES, block_q)
            sums = jnp.where(drawn, count * scores, 0.0).reshape(-1, SUBLANES, block_q)
            return jnp.maximum(largest, maxima.max(0)), total + sums.sum(0)

        largest, total = lax.fori_loop(0, block_k // tile, score_tile, (largest_ref[head], total_ref[head]))
        largest_ref[head] = largest
        total_ref[head] = total

    @pl.when(key_block == pl.num_programs(3) - 1)
    def _finish():
        out_ref[...] = largest_ref[...].max(1) - total_ref[...].sum(1) / keys


def _by_counts(query: jax.Array, key: jax.Array, sample_indices: jax.Array, interpret: bool) -> jax.Array:
    batch, queries, heads, width = query.shape
    keys, samples = key.shape[1], sample_indices.shape[1]
    lanes = _lane_group(heads, width)
    groups, group_heads = heads * width // lanes, lanes // width
    tile = min(KEY_TILE, round_up(keys, LANES))
    block_k = min(KEY_BLOCK, round_up(keys, tile))
    padded_keys = round_up(keys, block_k)
    # Blocks of equal size, so that the last one is not mostly empty.
    largest_block = min(QUERY_BLOCK, max(LANES, COUNT_BYTES // 4 // padded_keys // LANES * LANES))
    block_q = round_up(pl.cdiv(queries, pl.cdiv(queries, largest_block)), LANES)
    query_blocks = pl.cdiv(queries, block_q)
    out = pl.pallas_call(
        lambda *refs: _counts_kernel(*refs, width=width, keys=keys, tile=tile),
        out_shape=jax.ShapeDtypeStruct((batch, groups, group_heads, queries), jnp.float32),
        grid=(query_blocks, batch, groups, padded_keys // block_k),
        in_specs=[
            pl.BlockSpec((samples, block_q), lambda i, b, g, m: (0, i)),
            pl.BlockSpec((None, block_q, lanes), lambda i, b, g, m: (b, i, g)),
            pl.BlockSpec((None, block_k, lanes), lambda i, b, g, m: (b, m, g)),
        ],
        out_specs=pl.BlockSpec((None, None, group_heads, block_q), lambda i, b, g, m: (b, g, 0, i)),
        scratch_shapes=[
            pltpu.VMEM((padded_keys, block_q), jnp.float32),
            pltpu.VMEM((group_heads, SUBLANES, block_q), jnp.float32),
            pltpu.VMEM((group_heads, SUBLANES, block_q), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=3 * COUNT_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * heads * queries * keys * lanes,
            transcendentals=0,
            bytes_accessed=query.nbytes
            + query_blocks * key.nbytes
            + sample_indices.nbytes
            + batch * heads * queries * 4,
        ),
        interpret=interpret,
        name="prob_sparse_measure",
    )(sample_indices.T, _merge_heads(query), _merge_heads(key))
    return out.reshape(batch, heads, queries)


def _rows_kernel(table_ref, query_ref, key_ref, out_ref, product_ref, *, width, keys):
    block_q, lanes = query_ref.shape
    samples = table_ref.shape[1]
    lane = lax.broadcasted_iota(jnp.int32, (lanes, LANES), 0)
    head = lax.broadcasted_iota(jnp.int32, (lanes, LANES), 1)
    # Summing each head's lanes is a product with ones, head h's sum in lane h.
    own_lanes = ((lane >= head * width) & (lane < (head + 1) * width)).astype(jnp.bfloat16)

    def eight_queries(r, _):
        start = pl.multiple_of(r * SUBLANES, SUBLANES)
        query = query_ref[pl.ds(start, SUBLANES), :].astype(jnp.float32)

        def sample(j, _):
            rows = [key_ref[pl.ds(table_ref[start + i, j], 1), :] for i in range(SUBLANES)]
            product_ref[j] = query * jnp.concatenate(rows, axis=0)
            return 0

        lax.fori_loop(0, samples, sample, 0, unroll=min(samples, ROW_UNROLL))
        rest = product_ref[...].reshape(samples * SUBLANES, lanes)
        scores = jnp.zeros((samples * SUBLANES, LANES), jnp.float32)
        for _ in range(3):  # three bfloat16 hold a float32, and ones are exact: half the passes of full precision
            part = rest.astype(jnp.bfloat16)
            rest = rest - part.astype(jnp.float32)
            scores = scores + jnp.dot(part, own_lanes, preferred_element_type=jnp.float32)
        scores = scores.reshape(samples, SUBLANES, LANES)
        measured = scores.max(0) - scores.sum(0) / keys
        out_ref[pl.ds(start, SUBLANES), :] = measured[:, : lanes // width]
        return 0

    lax.fori_loop(0, block_q // SUBLANES, eight_queries, 0)


def _by_rows(query: jax.Array, key: jax.Array, sample_indices: jax.Array, interpret: bool) -> jax.Array:
    batch, queries, heads, width = query.shape
    keys, samples = key.shape[1], sample_indices.shape[1]
    lanes = _lane_group(heads, width)
    groups, group_heads = heads * width // lanes, lanes // width
    blocks = pl.cdiv(queries, ROW_QUERY_BLOCK)
    # The rows past the end are read as indices: they must be valid ones.
    table = jnp.pad(sample_indices, ((0, blocks * ROW_QUERY_BLOCK - queries), (0, 0)))
    # Rows are addressed one by one, and bfloat16 comes two rows to a register's row: hence float32.
    resident = _merge_heads(key).astype(jnp.float32)
    out = pl.pallas_call(
        lambda *refs: _rows_kernel(*refs, width=width, keys=keys),
        out_shape=jax.ShapeDtypeStruct((batch, groups, queries, group_heads), jnp.float32),
        grid=(batch, groups, blocks),
        in_specs=[
            pl.BlockSpec((ROW_QUERY_BLOCK, samples), lambda b, g, i: (i, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((None, ROW_QUERY_BLOCK, lanes), lambda b, g, i: (b, i, g)),
            pl.BlockSpec((None, keys, lanes), lambda b, g, i: (b, 0, g), pipeline_mode=pl.Buffered(1)),
        ],
        out_specs=pl.BlockSpec((None, None, ROW_QUERY_BLOCK, group_heads), lambda b, g, i: (b, g, i, 0)),
        scratch_shapes=[pltpu.VMEM((samples, SUBLANES, lanes), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=RESIDENT_BYTES + 16 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * queries * samples * heads * width,
            transcendentals=0,
            bytes_accessed=query.nbytes + resident.nbytes + batch * groups * table.nbytes + batch * heads * queries * 4,
        ),
        interpret=interpret,
        name="prob_sparse_measure",
    )(table, _merge_heads(query), resident)
    return out.swapaxes(2, 3).reshape(batch, heads, queries)

"""The query sparsity measure as a TPU kernel: all scores, tile by tile in VMEM, weighted by how often each was drawn.

A TPU gathers slowly and multiplies matrices fast. Let C_lm count how often key m was drawn for query l. Then M_l is
the maximum of S_lm over C_lm > 0 minus sum_m C_lm S_lm / L_K, for S = query key^T. C is shared by batch and heads: a
block of it is made once in VMEM from the table of samples and stays there while all heads pass by. Main memory sees
queries, keys, the table and M, nothing else.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.common import NEGATIVE_INFINITY, round_up

LANES = 128
SUBLANES = 8
TILE = 128  # keys whose scores are in registers at a time
KEY_BLOCK = 1024
QUERY_BLOCK = 512
COUNT_BYTES = 16 * 2**20  # of VMEM for C


def _lane_group(heads: int, width: int) -> int:
    """Lanes of (B, L, H E) that one program reads: whole heads, whole vector registers if that can be."""
    lanes = math.lcm(width, LANES)
    return lanes if heads * width % lanes == 0 else heads * width


def _kernel(table_ref, query_ref, key_ref, out_ref, count_ref, largest_ref, total_ref, *, width, keys):
    item, group, key_block = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    block_k, lanes = key_ref.shape
    samples, block_q = table_ref.shape
    first_key = key_block * block_k

    @pl.when((item == 0) & (group == 0))
    def _count():
        def tile(t, _):
            start = pl.multiple_of(first_key + t * TILE, TILE)
            key_index = start + lax.broadcasted_iota(jnp.int32, (TILE, block_q), 0)

            def sample(j, count):
                return count + (table_ref[pl.ds(j, 1), :] == key_index).astype(jnp.float32)

            count_ref[pl.ds(start, TILE), :] = lax.fori_loop(
                0, samples, sample, jnp.zeros((TILE, block_q), jnp.float32)
            )
            return 0

        lax.fori_loop(0, block_k // TILE, tile, 0)

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

        def tile(t, carry, own=own):
            largest, total = carry
            start = pl.multiple_of(t * TILE, TILE)
            scores = lax.dot_general(
                key_ref[pl.ds(start, TILE), :], own, (((1,), (1,)), ((), ())),
                precision=precision, preferred_element_type=jnp.float32,
            )  # fmt: skip
            count = count_ref[pl.ds(pl.multiple_of(first_key + start, TILE), TILE), :]
            # Keys past the end were never drawn; whatever was read there must not turn 0 S into NaN.
            drawn = count > 0
            maxima = jnp.where(drawn, scores, NEGATIVE_INFINITY).reshape(-1, SUBLANES, block_q)
            sums = jnp.where(drawn, count * scores, 0.0).reshape(-1, SUBLANES, block_q)
            return jnp.maximum(largest, maxima.max(0)), total + sums.sum(0)

        largest, total = lax.fori_loop(0, block_k // TILE, tile, (largest_ref[head], total_ref[head]))
        largest_ref[head] = largest
        total_ref[head] = total

    @pl.when(key_block == pl.num_programs(3) - 1)
    def _finish():
        out_ref[...] = largest_ref[...].max(1) - total_ref[...].sum(1) / keys


def measure(query: jax.Array, key: jax.Array, sample_indices: jax.Array, *, interpret: bool) -> jax.Array:
    """See `reference.measure`."""
    batch, queries, heads, width = query.shape
    keys, samples = key.shape[1], sample_indices.shape[1]
    lanes = _lane_group(heads, width)
    groups, group_heads = heads * width // lanes, lanes // width
    block_k = min(KEY_BLOCK, round_up(keys, TILE))
    padded_keys = round_up(keys, block_k)
    block_q = min(QUERY_BLOCK, round_up(queries, LANES), max(LANES, COUNT_BYTES // 4 // padded_keys // LANES * LANES))
    out = pl.pallas_call(
        lambda *refs: _kernel(*refs, width=width, keys=keys),
        out_shape=jax.ShapeDtypeStruct((batch, groups, group_heads, queries), jnp.float32),
        grid=(pl.cdiv(queries, block_q), batch, groups, padded_keys // block_k),
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
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=4 * COUNT_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * heads * queries * keys * lanes,
            transcendentals=0,
            bytes_accessed=query.nbytes + pl.cdiv(queries, block_q) * key.nbytes + samples * queries * 4
            + batch * heads * queries * 4,
        ),
        interpret=interpret,
        name="prob_sparse_measure",
    )(
        sample_indices.T,
        query.reshape(batch, queries, heads * width),
        key.reshape(batch, keys, heads * width),
    )  # fmt: skip
    return out.reshape(batch, heads, queries)

"""The query sparsity measure as a Triton kernel: sampled keys are read by index and never written.

One program computes a block of queries of one head. It reads the sampled keys one sample at a time, a row a query,
so registers hold O(block * E) and main memory sees the queries and keys once (a head's keys, L_K E, are re-read from
the caches). Operations are L_Q U E: O(L log L).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.common import NEGATIVE_INFINITY

QUERY_BLOCK = 64


def _kernel(query_ref, key_ref, table_ref, out_ref):
    queries, width = query_ref.shape
    keys, samples = key_ref.shape[0], table_ref.shape[0]
    # Triton's arrays have power-of-two sizes. Rows past the end repeat the last query, and write its value again;
    # columns past the end meet a query of zeros.
    rows = jnp.minimum(pl.program_id(2) * QUERY_BLOCK + jnp.arange(QUERY_BLOCK), queries - 1)
    column = jnp.arange(pl.next_power_of_2(width))[None]
    columns = jnp.minimum(column, width - 1)
    query = plgpu.load(query_ref.at[rows[:, None], columns]).astype(jnp.float32)
    query = jnp.where(column < width, query, 0.0)

    def body(j, carry):
        largest, total = carry
        sampled = plgpu.load(key_ref.at[plgpu.load(table_ref.at[j, rows])[:, None], columns])
        score = jnp.sum(query * sampled.astype(jnp.float32), axis=1)
        return jnp.maximum(largest, score), total + score

    initial = (jnp.full((QUERY_BLOCK,), NEGATIVE_INFINITY, jnp.float32), jnp.zeros((QUERY_BLOCK,), jnp.float32))
    largest, total = jax.lax.fori_loop(0, samples, body, initial)
    plgpu.store(out_ref.at[rows], largest - total / keys)


def measure(query: jax.Array, key: jax.Array, sample_indices: jax.Array, *, interpret: bool) -> jax.Array:
    """See `reference.measure`."""
    batch, queries, heads, width = query.shape
    keys, samples = key.shape[1], sample_indices.shape[1]
    operations = 2 * batch * heads * queries * samples * width
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        grid=(batch, heads, pl.cdiv(queries, QUERY_BLOCK)),
        in_specs=[
            pl.BlockSpec((None, queries, None, width), lambda b, h, i: (b, 0, h, 0)),
            pl.BlockSpec((None, keys, None, width), lambda b, h, i: (b, 0, h, 0)),
            pl.BlockSpec((samples, queries), lambda b, h, i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, queries), lambda b, h, i: (b, h, 0)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=operations,
            transcendentals=0,
            bytes_accessed=query.nbytes + key.nbytes + sample_indices.nbytes + batch * heads * queries * 4,
        ),
        interpret=interpret,
        name="prob_sparse_measure",
    )(query, key, sample_indices.T)

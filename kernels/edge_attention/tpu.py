"""Edge-modulated attention for TPUs: eight rows of a graph's edges pass through VMEM once, and leave as new edges.

A row's edges are a matrix of the vertices: two products on the matrix unit, all else on the vector unit. Sums over a
row see the vertices there are, whatever their number: a block spans them all, and Mosaic masks the last sublanes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.common import round_up
from kernels.edge_attention import chunked

ROWS = 8
_MOST_BYTES = 8 << 20  # of a block of edges, in and out


def edge_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    edges: jax.Array,
    edge_kernel: jax.Array,
    edge_bias: jax.Array,
    out_kernel: jax.Array | None,
    out_bias: jax.Array | None,
    *,
    scale: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """See `reference.edge_attention`."""
    batch, vertices, channels = query.shape
    block_bytes = 4 * ROWS * round_up(vertices, 8) * round_up(channels, 128) * edges.dtype.itemsize
    if block_bytes > _MOST_BYTES:
        return chunked.edge_attention(
            query, key, value, edges, edge_kernel, edge_bias, out_kernel, out_bias, scale=scale
        )
    rows = pl.BlockSpec((None, ROWS, channels), lambda b, i: (b, i, 0))
    whole = pl.BlockSpec((None, vertices, channels), lambda b, i: (b, 0, 0))
    tile = pl.BlockSpec((None, ROWS, vertices, channels), lambda b, i: (b, i, 0, 0))
    matrix = pl.BlockSpec((channels, channels), lambda b, i: (0, 0))
    vector = pl.BlockSpec((1, channels), lambda b, i: (0, 0))
    operands = [query, key, value, edges, edge_kernel, edge_bias[None]]
    in_specs = [rows, whole, whole, tile, matrix, vector]
    out_shape = [jax.ShapeDtypeStruct(value.shape, value.dtype)]
    out_specs = [rows]
    if out_kernel is not None and out_bias is not None:
        operands += [out_kernel, out_bias[None]]
        in_specs += [matrix, vector]
        out_shape.append(jax.ShapeDtypeStruct(edges.shape, edges.dtype))
        out_specs.append(tile)
    products = len(out_shape)
    found = pl.pallas_call(
        partial(_kernel, scale=scale, inputs=len(operands)),
        out_shape=out_shape,
        grid=(batch, pl.cdiv(vertices, ROWS)),
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * edges.size * channels,
            transcendentals=edges.size,
            bytes_accessed=products * edges.nbytes + 4 * query.nbytes,
        ),
        interpret=interpret,
        name="edge_attention",
    )(*operands)
    return found[0], found[1] if products == 2 else None


def _kernel(*refs: Any, scale: float, inputs: int) -> None:
    query, key, value, edges, edge_kernel, edge_bias, *out = refs[:inputs]
    nodes, *changed = refs[inputs:]

    def product(x: jax.Array, kernel: Any, bias: Any) -> jax.Array:
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        summed = jnp.dot(x, kernel[...], precision=precision, preferred_element_type=jnp.float32)
        return summed + bias[...].astype(jnp.float32)

    keys, values = key[...].astype(jnp.float32) * scale, value[...].astype(jnp.float32)
    for row in range(ROWS):  # rows past the end are computed of whatever is there, and not written
        e = product(edges[row], edge_kernel, edge_bias)
        scores = query[row : row + 1].astype(jnp.float32) * keys * (e + 1) * e
        weights = jnp.exp(scores - scores.max(axis=0, keepdims=True))
        mixed = jnp.sum(weights * values, axis=0, keepdims=True) / jnp.sum(weights, axis=0, keepdims=True)
        nodes[row : row + 1] = mixed.astype(nodes.dtype)
        if out:
            changed[0][row] = product(scores.astype(edges.dtype), *out).astype(edges.dtype)

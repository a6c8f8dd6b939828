"""Edge-modulated attention for NVIDIA GPUs in Pallas-Triton: a program has one row of one graph's edges.

Channels pass by in blocks: each block's part of E is made of all channels of the edges, and each block's scores add
their part to the new edges, so that registers hold the row twice. Triton's arrays have power-of-two sizes: the vertices
beyond the last have scores of -infinity in the softmax's sum, exactly nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.attention.gpu import dot, index_range, program
from kernels.common import NEGATIVE_INFINITY
from kernels.edge_attention import chunked

_CHANNELS = 32  # of a block
_MOST = 64 * 128  # numbers of a row of edges that registers hold


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
    supported = query.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    if not supported or pl.next_power_of_2(vertices) * pl.next_power_of_2(channels) > _MOST:
        return chunked.edge_attention(
            query, key, value, edges, edge_kernel, edge_bias, out_kernel, out_bias, scale=scale
        )
    operands = [query, key, value, edges, edge_kernel, edge_bias]
    out_shape = [jax.ShapeDtypeStruct(value.shape, value.dtype)]
    if out_kernel is not None and out_bias is not None:
        operands += [out_kernel, out_bias]
        out_shape.append(jax.ShapeDtypeStruct(edges.shape, edges.dtype))
    found = pl.pallas_call(
        partial(_kernel, scale=scale, inputs=len(operands)),
        out_shape=out_shape,
        grid=(batch * vertices,),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="edge_attention_gpu",
    )(*operands)
    return found[0], found[1] if len(found) == 2 else None


def _kernel(*refs: Any, scale: float, inputs: int) -> None:
    query, key, value, edges, edge_kernel, edge_bias, *out = refs[:inputs]
    nodes, *changed = refs[inputs:]
    batch, vertices, channels = query.shape
    graph, row = program(batch, vertices)
    size, width = (max(pl.next_power_of_2(n), 16) for n in (vertices, channels))
    block = min(_CHANNELS, width)
    every = index_range(0, width)
    there = index_range(0, size)[:, None] < vertices

    def matrix(ref: Any, place: tuple[Any, ...], first: Any, columns: int) -> jax.Array:
        """(size, columns) of a vertex's row or of the vertices, zero beyond the edges."""
        inside = there & (index_range(first, columns) < channels)[None]
        return plgpu.load(ref.at[(*place, pl.ds(0, size), pl.ds(first, columns))], mask=inside, other=0.0)

    def vector(ref: Any, place: tuple[Any, ...], first: Any, columns: int) -> jax.Array:
        inside = index_range(first, columns) < channels
        return plgpu.load(ref.at[(*place, pl.ds(first, columns))], mask=inside, other=0.0).astype(jnp.float32)

    y = matrix(edges, (graph, row), 0, width)

    def body(step: jax.Array, total: jax.Array) -> jax.Array:
        first = step * block
        some = (index_range(first, block) < channels)[None]
        kernel = plgpu.load(
            edge_kernel.at[pl.ds(0, width), pl.ds(first, block)], mask=(every < channels)[:, None] & some, other=0.0
        )
        e = dot(y, kernel) + vector(edge_bias, (), first, block)[None]
        keys = matrix(key, (graph,), first, block).astype(jnp.float32) * scale
        scores = vector(query, (graph, row), first, block)[None] * keys * (e + 1) * e
        masked = jnp.where(there, scores, NEGATIVE_INFINITY)
        weights = jnp.exp(masked - masked.max(axis=0)[None])
        values = matrix(value, (graph,), first, block).astype(jnp.float32)
        mixed = jnp.sum(weights * values, axis=0) / jnp.sum(weights, axis=0)
        inside = index_range(first, block) < channels
        plgpu.store(nodes.at[graph, row, pl.ds(first, block)], mixed.astype(nodes.dtype), mask=inside)
        if not out:
            return total
        kernel = plgpu.load(
            out[0].at[pl.ds(first, block), pl.ds(0, width)],
            mask=(index_range(first, block) < channels)[:, None] & (every < channels)[None], other=0.0,
        )  # fmt: skip
        return total + dot(scores.astype(y.dtype), kernel)

    total = jax.lax.fori_loop(0, width // block, body, jnp.zeros((size, width), jnp.float32))
    if out:
        total = (total + vector(out[1], (), 0, width)[None]).astype(edges.dtype)
        inside = there & (every < channels)[None]
        plgpu.store(changed[0].at[graph, row, pl.ds(0, size), pl.ds(0, width)], total, mask=inside)

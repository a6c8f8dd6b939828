"""The definition of attention whose scores, one a channel, are modulated by the features of edges."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
) -> tuple[jax.Array, jax.Array | None]:
    """(nodes, edges) of `kernels.edge_attention.edge_attention`."""

    def matmul(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.matmul(x, kernel, preferred_element_type=jnp.float32) + bias.astype(jnp.float32)

    wide = [x.astype(jnp.float32) for x in (query, key, value)]
    e = matmul(edges, edge_kernel, edge_bias)
    scores = scale * wide[0][:, :, None] * wide[1][:, None] * (e + 1) * e
    nodes = jnp.sum(jax.nn.softmax(scores, axis=2) * wide[2][:, None], axis=2).astype(value.dtype)
    if out_kernel is None or out_bias is None:
        return nodes, None
    return nodes, matmul(scores.astype(edges.dtype), out_kernel, out_bias).astype(edges.dtype)

"""Edge-modulated attention graph by graph: no array of scores is larger than one graph's.

A graph's scores are computed again for its gradient, and again for the gradient of that (a gradient penalty's), so that
what is kept beside the operands does not grow with the batch.
"""

from __future__ import annotations

from functools import partial

import jax

from kernels.edge_attention import reference

AT_ONCE = 1 << 19  # numbers of edges below which nothing is gained by a loop


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
    """See `reference.edge_attention`."""

    if edges.size <= AT_ONCE:
        return reference.edge_attention(
            query, key, value, edges, edge_kernel, edge_bias, out_kernel, out_bias, scale=scale
        )

    @partial(jax.checkpoint, prevent_cse=False)  # a scan needs no barrier
    def graph(operands: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array | None]:
        query, key, value, edges = (x[None] for x in operands)
        nodes, changed = reference.edge_attention(
            query, key, value, edges, edge_kernel, edge_bias, out_kernel, out_bias, scale=scale
        )
        return nodes[0], None if changed is None else changed[0]

    return jax.lax.map(graph, (query, key, value, edges))

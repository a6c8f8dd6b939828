"""Attention whose scores, one a channel and not summed, are modulated by edges (Unlu et al. 2023, "DrugGEN").

    E = y W_e + b_e
    s_ijc = scale q_ic k_jc (E_ijc + 1) E_ijc
    nodes_ic = sum_j softmax_j(s_ijc) v_jc
    edges_ij = s_ij W_o + b_o

The two products with the edges are part of the core: they are its cost (4 N^2 C^2 operations a graph), and with them
inside neither E, nor s, nor the softmax is ever written; y is read once and the new edges are written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.common import Implementation, by_platform, check_implementation
from kernels.edge_attention import chunked, gpu, reference, tpu

_IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    "reference": reference.edge_attention,
    "chunked": chunked.edge_attention,
    "tpu": tpu.edge_attention,
    "gpu": gpu.edge_attention,
}


def edge_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    edges: jax.Array,
    edge_kernel: jax.Array,
    edge_bias: jax.Array,
    out_kernel: jax.Array | None = None,
    out_bias: jax.Array | None = None,
    *,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention with a softmax a channel over all vertices, modulated by edges; see above.

    It may be differentiated (in reverse) as often as one likes: a gradient penalty needs it twice. The gradient is
    XLA's, graph by graph, on every platform.

    Args:
      query, key, value: (batch, vertices, channels), float.
      edges: y, (batch, vertices, vertices, channels); entry (i, j) modulates what i takes from j.
      edge_kernel, edge_bias: W_e (channels, channels) and b_e (channels,).
      out_kernel, out_bias: W_o and b_o likewise; None where new edges are not wanted.
      scale: of the scores; None is channels ** -0.5.
      implementation: "reference", "chunked", "tpu", "gpu", or None for the platform compiled for.

    Returns:
      Nodes (batch, vertices, channels), and new edges like `edges` or None, in the operands' dtype; sums are float32.

    Raises:
      ValueError, TypeError: a shape or a dtype is wrong.
    """
    check_implementation(implementation)
    _check(query, key, value, edges, edge_kernel, edge_bias, out_kernel, out_bias)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    return _jitted(
        (query, key, value, edges, edge_kernel, edge_bias, out_kernel, out_bias), float(scale), implementation
    )


def _check(
    query: Any, key: Any, value: Any, edges: Any, edge_kernel: Any, edge_bias: Any, out_kernel: Any, out_bias: Any
) -> None:
    if query.ndim != 3 or 0 in query.shape:
        raise ValueError(f"query must be (batch, vertices, channels), none of them 0, got {query.shape}")
    batch, vertices, channels = query.shape
    if (out_kernel is None) != (out_bias is None):
        raise ValueError("out_kernel and out_bias are given together")
    expected = {
        "key": (key, query.shape),
        "value": (value, query.shape),
        "edges": (edges, (batch, vertices, vertices, channels)),
        "edge_kernel": (edge_kernel, (channels, channels)),
        "edge_bias": (edge_bias, (channels,)),
        "out_kernel": (out_kernel, (channels, channels)),
        "out_bias": (out_bias, (channels,)),
    }
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise TypeError(f"query must be floating point, got {query.dtype}")
    for name, (array, shape) in expected.items():
        if array is None:
            continue
        if array.shape != shape:
            raise ValueError(f"{name} must be of shape {shape}, got {array.shape}")
        if array.dtype != query.dtype:
            raise TypeError(f"{name} must be {query.dtype} like query, got {array.dtype}")


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _edge_attention(operands: tuple, scale: float, implementation: Implementation | None) -> tuple:
    edges_wanted = operands[6] is not None
    axes = ("b..", "b..", "b..", "b...", "..", ".", *(("..", ".") if edges_wanted else (None, None)))
    return by_platform(
        {name: partial(function, scale=scale) for name, function in _IMPLEMENTATIONS.items()},
        implementation, *operands, axes=axes, out_axes=("b..", "b..." if edges_wanted else None),
    )  # fmt: skip


def _forward(operands, scale, implementation):
    # The function itself, so that a second differentiation finds this rule, and not a Pallas kernel.
    return _edge_attention(operands, scale, implementation), operands


def _backward(scale, implementation, operands, cotangents):
    function = reference if implementation == "reference" else chunked
    return (jax.vjp(lambda operands: function.edge_attention(*operands, scale=scale), operands)[1](cotangents)[0],)


_edge_attention.defvjp(_forward, _backward)
# Called outside a program too, every layer of the same shapes finds one compiled.
_jitted = jax.jit(_edge_attention, static_argnums=(1, 2))

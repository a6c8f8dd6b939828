"""Sparse graphs of pixels: who is linked to whom, and the largest difference to one's neighbours.

B batch, H x W pixels of a map, C channels, K the hop.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Implementation = Literal["loop", "min"]


def check_map(x: jax.Array, hop: int) -> None:
    """Raises ValueError unless x is (B, H, W, C) and the hop at least 1."""
    if x.ndim != 4:
        raise ValueError(f"a map must be (batch, height, width, channels), got {x.shape}")
    if hop < 1:
        raise ValueError(f"hop must be at least 1, got {hop}")


def svga_aggregate(x: jax.Array, hop: int, implementation: Implementation = "min") -> jax.Array:
    """The largest difference of each pixel to itself and to every hop-th pixel of its column and of its row.

        m = max(0, max_{i = K, 2K, .. < H} x - roll(x, i, H), max_{i = K, 2K, .. < W} x - roll(x, i, W))

    The graph of "sparse vision graph attention" (arXiv 2307.00395, algorithm 1): roll(x, i)[h] = x[(h - i) mod H].

    Rounding is monotone, so max(x - r) = x - min(r) to the last bit: "min" takes each residue class' minimum where K
    divides the side, else the minimum of a circular window by doubling, in O(log(H / K)) passes; "loop" is the
    definition, in H / K + W / K passes. Gradients go to the pixel and, negative, to its least neighbour; where several
    are equal they share it (in "loop" by halves, step by step).

    Args:
      x: (B, H, W, C).
      hop: K; a hop that is not below a side leaves that side without neighbours.
      implementation: see above.

    Returns:
      Like x, not negative.

    Raises:
      ValueError: the map or the hop is wrong.
    """
    check_map(x, hop)
    if implementation == "loop":
        most = jnp.zeros_like(x)
        for axis in (1, 2):
            for shift in range(hop, x.shape[axis], hop):
                most = jnp.maximum(most, x - jnp.roll(x, shift, axis))
        return most
    return x - jnp.minimum(_least(x, hop, 1), _least(x, hop, 2))


def _least(x: jax.Array, hop: int, axis: int) -> jax.Array:
    """The minimum over a pixel and the pixels hop, 2 hop, ... before it, circularly, less than the side away."""
    side = x.shape[axis]
    if side % hop == 0:
        classes = x.reshape(*x.shape[:axis], side // hop, hop, *x.shape[axis + 1 :])
        return jnp.broadcast_to(classes.min(axis, keepdims=True), classes.shape).reshape(x.shape)
    window, least, span = -(-side // hop), x, 1
    while span < window:
        step = min(span, window - span)  # the last windows overlap, which a minimum does not mind
        least = jnp.minimum(least, jnp.roll(least, step * hop, axis))
        span += step
    return least


def knn_aggregate(x: jax.Array, neighbours: int) -> jax.Array:
    """The largest difference to the k nearest pixels of the map by their features (Han et al. 2022, ViG).

    Distances are Euclidean between features of unit length, as in ViG; a pixel is its own nearest neighbour.

    Args:
      x: (B, H, W, C).
      neighbours: k, the pixel itself included.

    Returns:
      Like x: max over the neighbours j of x_j - x_i, which is not negative.
    """
    check_map(x, 1)
    batch, height, width, channels = x.shape
    if not 1 <= neighbours <= height * width:
        raise ValueError(f"neighbours must be in 1 .. {height * width} pixels, got {neighbours}")
    nodes = x.reshape(batch, height * width, channels)
    unit = nodes / jnp.maximum(jnp.linalg.norm(nodes, axis=-1, keepdims=True), 1e-12)
    _, nearest = jax.lax.top_k(jax.lax.stop_gradient(unit @ unit.swapaxes(1, 2)), neighbours)
    around = jax.vmap(lambda nodes, index: nodes[index])(nodes, nearest)
    return (around - nodes[:, :, None]).max(axis=2).reshape(x.shape)


def neighbours_of(row: int, column: int, height: int, width: int, hop: int) -> np.ndarray:
    """Which pixels of a map a pixel is compared with, itself included: bool (height, width), for drawing the graph."""
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"({row}, {column}) is no pixel of {height} x {width}")
    linked = np.zeros((height, width), bool)
    linked[(row - np.arange(0, height, hop)) % height, column] = True
    linked[row, (column - np.arange(0, width, hop)) % width] = True
    return linked


def where_most_differs(x: jax.Array, hop: int) -> jax.Array:
    """Rows and columns from each pixel to the neighbour that its maximum came from: int32 (B, H, W, C, 2).

    (0, 0) is the pixel itself; (-K, 0) the one K rows above, counted without wrapping around.
    """
    check_map(x, hop)
    shifts = [(0, 0)] + [(i, 0) for i in range(hop, x.shape[1], hop)] + [(0, j) for j in range(hop, x.shape[2], hop)]
    differences = jnp.stack([x - jnp.roll(x, shift, (1, 2)) for shift in shifts])
    return -jnp.asarray(shifts, jnp.int32)[jnp.argmax(differences, axis=0)]

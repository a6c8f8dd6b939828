"""Maps at other sizes: bilinear and bicubic samples, and means over coarse grids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def resize(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Bilinear, pixels as areas (align_corners False)."""
    return jax.image.resize(x, (x.shape[0], rows, columns, x.shape[3]), "linear", antialias=False)


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """(B, Y, X, C) to (B, size, size, C): means from floor(i Y / size) to ceil((i + 1) Y / size), as PyTorch."""

    def means(length: int) -> np.ndarray:
        i = np.arange(size)[:, None]
        inside = (np.arange(length) >= i * length // size) & (np.arange(length) < -(-(i + 1) * length // size))
        return (inside / inside.sum(1, keepdims=True)).astype(np.float32)

    rows, columns = means(x.shape[1]), means(x.shape[2])
    return jnp.einsum("iy,jx,byxc->bijc", rows, columns, x, precision="highest").astype(x.dtype)


def resize_bicubic(x: jax.Array, size: int, axis: int) -> jax.Array:
    """Cubic convolution along one axis (Keys 1981 with a = -0.75), as PyTorch's bicubic resize without antialiasing.

    Args:
      x: any array.
      size: the axis' new length; samples lie in the middle of their cells (align_corners False), edges are repeated.
      axis: which.
    """
    old = x.shape[axis]
    if size == old:
        return x
    places = (np.arange(size) + 0.5) * old / size - 0.5
    first = np.floor(places).astype(int)
    fraction, a = places - first, -0.75
    total = jnp.zeros((), x.dtype)
    for tap in (-1, 0, 1, 2):
        d = np.abs(fraction - tap)
        weight = np.where(d <= 1, ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a)
        shape = [size if i == axis % x.ndim else 1 for i in range(x.ndim)]
        part = jnp.take(x, np.clip(first + tap, 0, old - 1), axis=axis)
        total += part * jnp.asarray(weight.reshape(shape), x.dtype)
    return total

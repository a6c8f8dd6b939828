"""Maps at other sizes: bilinear samples, and means over coarse grids."""

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

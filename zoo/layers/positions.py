"""Absolute position embeddings: sinusoids in one and two dimensions, and learned tables at other resolutions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def sinusoids(length: int, features: int) -> np.ndarray:
    """float32 (length, features): sin(t w_i) at 2i and cos(t w_i) at 2i + 1, w_i = 10000^(-2i / features).

    Vaswani et al. 2017, section 3.5.

    Raises:
      ValueError: `features` is odd.
    """
    if features % 2:
        raise ValueError(f"sinusoids need an even number of features, got {features}")
    angles = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(0, features, 2) / features)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, features).astype(np.float32)


def half_sinusoids(length: int, features: int, first: jax.Array | int = 0) -> jax.Array:
    """float32 (length, features): all sines, then all cosines, of p w_i, w_i = 10000^(-2i / features), p >= `first`.

    Raises:
      ValueError: `features` is odd.
    """
    if features % 2:
        raise ValueError(f"sinusoids need an even number of features, got {features}")
    frequencies = 10_000.0 ** (-np.arange(0, features, 2) / features)
    angles = (first + jnp.arange(length))[:, None] * frequencies.astype(np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def fairseq_sinusoids(positions: jax.Array, features: int) -> jax.Array:
    """float32 (..., features): half sines and half cosines of (t + 2) w_i, w_i = 10000^(-i / (features / 2 - 1)).

    Positions of fairseq's language models and of XGLM, which count from 2 because 1 is the padding's.

    Raises:
      ValueError: `features` is odd or less than 4.
    """
    if features % 2 or features < 4:
        raise ValueError(f"these sinusoids need an even number of features, at least 4, got {features}")
    half = features // 2
    frequencies = np.exp(-np.arange(half) * (np.log(10_000.0) / (half - 1))).astype(np.float32)
    angles = (positions[..., None].astype(jnp.float32) + 2) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def sinusoid_grid(height: int, width: int, features: int) -> np.ndarray:
    """float32 (height * width, features): sin x, cos x, sin y, cos y, a quarter each, row by row.

    The fixed embedding of patches in MoCo v3 (Chen et al. 2021) and MAE (He et al. 2022); frequencies as in
    `sinusoids(_, features / 2)`.

    Raises:
      ValueError: `features` is not a multiple of 4.
    """
    if features % 4:
        raise ValueError(f"two-dimensional sinusoids need a multiple of 4 features, got {features}")
    frequencies = 10_000.0 ** (-np.arange(0, features // 2, 2) / (features // 2))
    rows, columns = np.divmod(np.arange(height * width)[:, None], width)
    parts = [function(axis * frequencies) for axis in (columns, rows) for function in (np.sin, np.cos)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def resize_grid(table: jax.Array, grid: tuple[int, int], new_grid: tuple[int, int]) -> jax.Array:
    """A learned embedding of patches at another resolution, by antialiased cubic interpolation.

    Args:
      table: (1, rows * columns, features), row by row.
      grid: its (rows, columns).
      new_grid: (rows, columns) wanted.

    Returns:
      (1, new rows * new columns, features); the table itself where nothing changes.
    """
    if grid == new_grid:
        return table
    features = table.shape[-1]
    resized = jax.image.resize(table.reshape(1, *grid, features), (1, *new_grid, features), "cubic")
    return resized.reshape(1, new_grid[0] * new_grid[1], features).astype(table.dtype)

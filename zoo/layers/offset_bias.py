"""A learned bias of attention that depends on how far apart two pixels are, as in LeViT (Graham et al. 2021)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.partitioning import partitioned


class OffsetBias(nn.Module):
    """One number a head and distance (|dy|, |dx|) on a grid of pixels.

    Parameter: `table`, (rows * columns, heads), zero at first; row |dy| * columns + |dx|. Applied with `matrix` in its
    place, (heads, N, N) as `gather_bias` makes it, nothing is gathered.

    Fields:
      heads: of the attention.
      grid: (rows, columns) for which the table is made.
    """

    heads: int
    grid: tuple[int, int]
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """The table."""
        if self.has_variable("params", "matrix"):
            return
        init = partitioned(nn.initializers.zeros_init(), None, "heads")
        self.table = self.param("table", init, (self.grid[0] * self.grid[1], self.heads), self.param_dtype)

    def __call__(self, grid: tuple[int, int]) -> jax.Array:
        """The bias (heads, N, N) of the N pixels of a grid, row by row.

        On another grid than the table's, the image is taken to be the same one seen more finely or coarsely: distances
        are scaled by the ratio of the two, and the table is interpolated linearly between them.
        """
        if self.has_variable("params", "matrix"):
            if grid != self.grid:
                raise ValueError(
                    f"biases were gathered for a map of {self.grid}, got {grid}: use the original variables"
                )
            return self.get_variable("params", "matrix")
        table = self.table
        if grid != self.grid:
            table = table.reshape(*self.grid, self.heads)
            for axis, (new, old) in enumerate(zip(grid, self.grid, strict=True)):
                table = jnp.moveaxis(jnp.tensordot(_between(new, old), table, (1, axis)), 0, axis)
            table = table.reshape(-1, self.heads)
        return gather_bias(table, grid)


def gather_bias(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The bias (heads, N, N) of the N pixels of a grid, from a table (rows * columns, heads) that is made for it."""
    return jnp.moveaxis(table[offset_index(grid)], -1, 0)


def offset_index(grid: tuple[int, int]) -> np.ndarray:
    """int32 (N, N): the row of a table of distances that belongs to each pair of the grid's N pixels."""
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    dy, dx = (np.abs(np.subtract.outer(axis, axis)) for axis in (rows, columns))
    return (dy * grid[1] + dx).astype(np.int32)


def _between(new: int, old: int) -> np.ndarray:
    """float32 (new, old): weights that interpolate a function of distances 0 .. old - 1 at new places."""
    places = np.minimum(np.arange(new) * old / new, old - 1)
    return np.maximum(1 - np.abs(np.subtract.outer(places, np.arange(old))), 0).astype(np.float32)

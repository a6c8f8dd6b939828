"""XLA's form: tiles of rows of one group, each times one weight. There are never more than R / tile + groups tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

TILE = 64


class _Tiles(NamedTuple):
    groups: jax.Array  # int32 (tiles,), the group of each
    rows: jax.Array  # int32 (tiles, tile), the row in each place; R where there is none
    places: jax.Array  # int32 (R,), the place of each row among all tiles'


def _make_tiles(sizes: jax.Array, rows: int, tile: int) -> _Tiles:
    groups = sizes.shape[0]
    tiles_of = (sizes + tile - 1) // tile
    last_tile, last_row = jnp.cumsum(tiles_of), jnp.cumsum(sizes)
    number = jnp.arange(rows // tile + groups)
    group = jnp.minimum(jnp.searchsorted(last_tile, number, side="right"), groups - 1)
    first = (last_row - sizes)[group] + (number - (last_tile - tiles_of)[group]) * tile
    row = first[:, None] + jnp.arange(tile)
    inside = (row < last_row[group][:, None]) & (number < last_tile[-1])[:, None]
    group_of_row = jnp.searchsorted(last_row, jnp.arange(rows), side="right")
    within = jnp.arange(rows) - (last_row - sizes)[group_of_row]
    places = (last_tile - tiles_of)[group_of_row] * tile + within
    return _Tiles(group, jnp.where(inside, row, rows), places)


def _gather(rows: jax.Array, tiles: _Tiles) -> jax.Array:
    """(tiles, tile, D), zeros where there is no row."""
    return rows.at[tiles.rows].get(mode="fill", fill_value=0)


def product(rows: jax.Array, weight: jax.Array, sizes: jax.Array, *, tile: int = TILE) -> jax.Array:
    """See `reference.product`."""
    tiles = _make_tiles(sizes, rows.shape[0], tile)

    def one(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
        group, part = operands
        out = jnp.dot(part, weight[group], precision="highest", preferred_element_type=jnp.float32)
        return out.astype(rows.dtype)

    out = jax.lax.map(one, (tiles.groups, _gather(rows, tiles)))
    return out.reshape(-1, weight.shape[2])[tiles.places]


def weight_gradient(rows: jax.Array, cotangent: jax.Array, sizes: jax.Array, *, tile: int = TILE) -> jax.Array:
    """See `reference.weight_gradient`."""
    tiles = _make_tiles(sizes, rows.shape[0], tile)

    def add(total: jax.Array, operands: Any) -> tuple[jax.Array, None]:
        group, part, d_part = operands
        d_weight = jnp.dot(part.T, d_part, precision="highest", preferred_element_type=jnp.float32)
        return total.at[group].add(d_weight), None

    zeros = jnp.zeros((sizes.shape[0], rows.shape[1], cotangent.shape[1]), jnp.float32)
    operands = tiles.groups, _gather(rows, tiles), _gather(cotangent.astype(rows.dtype), tiles)
    return jax.lax.scan(add, zeros, operands)[0]

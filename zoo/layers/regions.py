"""Regions of maps and masks: cut out to a fixed size (RoIAlign), and put back.

Regions are boxes (x0, y0, x1, y1) in pixels of the image. Bilinear samples and their averages are linear in each of the
two directions, so that all here is a product of one matrix a side: out = rows image columns^T.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_FINEST = 56  # the square root of the area in pixels below twice which a region is read from the finest map


def roi_align(maps: Sequence[jax.Array], regions: jax.Array, size: int) -> jax.Array:
    """Averages of bilinear samples in size x size bins of each region, read from the map that suits its area.

    RoIAlign (He et al. 2017) with pixel centres at halves ("aligned") and ceil(side / size) samples a bin and side, as
    many as a map's pixels; the map is the one of stride 4 * 2^floor(log2(sqrt(area) / 56)), the finest or coarsest
    beyond.

    Args:
      maps: (H, W, C) at strides 4, 8, ...
      regions: (R, 4).
      size: bins a side.

    Returns:
      (R, size, size, C).
    """
    area = (regions[:, 2] - regions[:, 0]) * (regions[:, 3] - regions[:, 1])
    level = jnp.clip(jnp.floor(jnp.log2(jnp.sqrt(area) / _FINEST + 1e-6)), 0, len(maps) - 1)
    parts = []
    for index, x in enumerate(maps):
        here = (level == index)[:, None, None]
        rows, columns = _sides(regions / (4 << index), size, x.shape[0], x.shape[1])
        rows, columns = (jnp.where(here, side, 0).astype(x.dtype) for side in (rows, columns))
        parts.append(jnp.einsum("rih,hwc,rjw->rijc", rows, x, columns))
    return sum(parts[1:], parts[0])


def crop_masks(masks: jax.Array, index: jax.Array, regions: jax.Array, size: int) -> jax.Array:
    """What a mask says of regions: RoIAlign of the mask itself, and whether it is at least one half.

    Args:
      masks: (G, height, width), bool or numbers from 0 to 1, of the image's size.
      index: int (R,), the mask of each region.
      regions: (R, 4).
      size: bins a side.

    Returns:
      float32 (R, size, size), 0 and 1.
    """

    def crop(arguments: tuple[jax.Array, jax.Array]) -> jax.Array:
        index, region = arguments
        rows, columns = _sides(region[None], size, *masks.shape[1:])
        return rows[0] @ masks[index].astype(jnp.float32) @ columns[0].T

    # A few at a time: the masks of all regions at once are as large as so many images.
    cut = jax.lax.map(crop, (index, regions), batch_size=8)
    return (cut >= 0.5).astype(jnp.float32)


def paste_masks(masks: jax.Array, boxes: jax.Array, height: int, width: int) -> jax.Array:
    """The inverse of cutting out: masks of boxes, bilinearly resized to them, on empty images.

    Args:
      masks: (R, size, size), numbers from 0 to 1.
      boxes: (R, 4).
      height, width: of the image.

    Returns:
      bool (R, height, width), of at least one half.
    """
    size = masks.shape[1]

    def side(start: jax.Array, end: jax.Array, length: int) -> jax.Array:
        middle = jnp.arange(length) + 0.5
        place = (middle - start[:, None]) / jnp.maximum(end - start, 1e-6)[:, None] * size - 0.5
        return jnp.maximum(1 - jnp.abs(place[..., None] - jnp.arange(size)), 0)

    rows, columns = side(boxes[:, 1], boxes[:, 3], height), side(boxes[:, 0], boxes[:, 2], width)
    return jnp.einsum("rhi,rij,rwj->rhw", rows, masks.astype(jnp.float32), columns) >= 0.5


def _sides(regions: jax.Array, size: int, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """The matrices of rows (R, size, height) and columns (R, size, width), for regions in the map's pixels."""
    corners = regions - 0.5
    return _samples(corners[:, 1], corners[:, 3], size, height), _samples(corners[:, 0], corners[:, 2], size, width)


def _samples(start: jax.Array, end: jax.Array, size: int, side: int) -> jax.Array:
    """How much each pixel of a side counts in each of `size` bins between start and end, (R,) each: (R, size, side)."""
    most = -(-(side + 1) // size)  # of a region as long as the map
    extent = (end - start) / size
    count = jnp.clip(jnp.ceil(extent), 1, most)
    step = jnp.arange(most)
    inside = (step + 0.5) / count[:, None]  # (R, most), in bins
    place = start[:, None, None] + (jnp.arange(size)[:, None] + inside[:, None]) * extent[:, None, None]
    valid = (step < count[:, None])[:, None] & (place >= -1) & (place <= side)
    place = jnp.clip(place, 0, side - 1)
    weight = jnp.maximum(1 - jnp.abs(place[..., None] - jnp.arange(side)), 0)
    return jnp.where(valid[..., None], weight, 0).sum(axis=2) / count[:, None, None]

"""Pictures of several labels each, whose places are known: canvases of digits, windows of blood smears, mosaics."""

from __future__ import annotations

import dataclasses

import numpy as np

from zoo.data.bccd import CLASSES, LabelledBoxes
from zoo.data.images import LabelledImages

# Handwritten digits that are on a canvas together more often than chance has it.
PAIRS = ((3, 8), (1, 7))


@dataclasses.dataclass(frozen=True)
class MultilabelImages:
    """Random access to {"image": uint8 (H, W, 3), "label": float32 (M,)}.

    Attributes:
      places: where each label is, on a grid of cells over the picture.
    """

    images: np.ndarray  # uint8 (N, H, W, 3)
    labels: np.ndarray  # float32 (N, M), 1 or 0
    places: np.ndarray  # bool (N, M, rows, columns)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}


def digit_canvases(
    source: LabelledImages, count: int, seed: int, cell: int = 16, noise: float = 0.1
) -> MultilabelImages:
    """One to four different digits in the cells of a 3 x 3 grid, with noise.

    With probability one half a digit of `PAIRS` brings its partner along.

    Args:
      source: digits of at most `cell` pixels' height and width.
      count: canvases.
      seed: of all that is drawn.
      cell: side of a cell in pixels.
      noise: its standard deviation, of the brightest pixel.
    """
    side = source.images.shape[1]
    if side > cell:
        raise ValueError(f"digits must not be larger than a cell of {cell} pixels, got {side}")
    partner = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
    rng = np.random.default_rng(seed)
    images = np.zeros((count, 3 * cell, 3 * cell, 3), np.uint8)
    labels, places = np.zeros((count, 10), np.float32), np.zeros((count, 10, 3, 3), bool)
    of_class = [np.flatnonzero(source.labels == name) for name in range(10)]
    for index in range(count):
        names: list[int] = []
        number = rng.integers(1, 5)
        for name in rng.permutation(10):
            if len(names) < number and name not in names:
                names.append(int(name))
                other = partner.get(int(name))
                if other is not None and len(names) < number and other not in names and rng.random() < 0.5:
                    names.append(other)
        for name, place in zip(names, rng.permutation(9), strict=False):
            row, column = divmod(int(place), 3)
            top, left = np.array([row, column]) * cell + rng.integers(0, cell - side + 1, 2)
            images[index, top : top + side, left : left + side] = source.images[rng.choice(of_class[name])]
            labels[index, name], places[index, name, row, column] = 1, True
        gray = images[index, :, :, :1] + 255 * noise * rng.standard_normal((3 * cell, 3 * cell, 1))
        images[index] = np.clip(gray, 0, 255).astype(np.uint8)
    return MultilabelImages(images, labels, places)


def cell_windows(data: LabelledBoxes, count: int, seed: int, size: int = 96, grid: int = 12) -> MultilabelImages:
    """Windows of blood smears, labelled by which of red cell, white cell and platelet have their middle inside.

    Args:
      data: of `zoo.data.bccd.bccd`.
      count: windows.
      seed: of where they are.
      size: height and width in pixels.
      grid: cells a side; a label's places are those in its boxes.
    """
    height, width = data.images.shape[1:3]
    if size > min(height, width) or size % grid:
        raise ValueError(f"size must be at most {min(height, width)} and a multiple of grid {grid}, got {size}")
    rng = np.random.default_rng(seed)
    images = np.zeros((count, size, size, 3), np.uint8)
    labels, places = np.zeros((count, len(CLASSES)), np.float32), np.zeros((count, len(CLASSES), grid, grid), bool)
    middles = (np.arange(grid) + 0.5) * size / grid
    for index in range(count):
        owner = rng.integers(len(data))
        top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
        images[index] = data.images[owner, top : top + size, left : left + size]
        for box, label in zip(data.boxes[owner], data.labels[owner], strict=True):
            x0, y0, x1, y1 = box - np.array([left, top, left, top])
            if label >= 0 and 0 <= (x0 + x1) / 2 < size and 0 <= (y0 + y1) / 2 < size:
                labels[index, label] = 1
                rows, columns = (middles >= y0) & (middles <= y1), (middles >= x0) & (middles <= x1)
                places[index, label] |= rows[:, None] & columns
    return MultilabelImages(images, labels, places)


def mosaics(source: LabelledImages, classes: int, count: int, seed: int) -> MultilabelImages:
    """Four pictures side by side, two and two; the labels are their classes.

    Args:
      source: pictures of one size.
      classes: how many there are.
      count: mosaics.
      seed: of what is drawn.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(source), (count, 2, 2))
    tiles = source.images[chosen]
    images = tiles.swapaxes(2, 3).reshape(count, 2 * tiles.shape[3], 2 * tiles.shape[4], 3)
    places = source.labels[chosen][:, None] == np.arange(classes)[:, None, None]
    return MultilabelImages(images, places.any(axis=(2, 3)).astype(np.float32), places)


def points_at(heat: np.ndarray, data: MultilabelImages) -> np.ndarray:
    """The pointing game (Zhang et al. 2018): whether the hottest patch of a label that is there is one of its places.

    Args:
      heat: (N, rows, columns, M).
      data: of the same N pictures.

    Returns:
      bool (labels that are there,), picture by picture.
    """
    count, rows, columns, labels = heat.shape
    if (count, labels) != data.labels.shape:
        raise ValueError(f"heat must be of {data.labels.shape} pictures and labels, got {(count, labels)}")
    hottest = heat.reshape(count, rows * columns, labels).argmax(axis=1)
    row, column = np.divmod(hottest, columns)
    grid = data.places.shape[2:]
    i, j = ((at + 0.5) / size * cells for at, size, cells in ((row, rows, grid[0]), (column, columns, grid[1])))
    index = np.arange(count)[:, None], np.arange(labels)[None]
    return data.places[*index, i.astype(int), j.astype(int)][data.labels > 0]

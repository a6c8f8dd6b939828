"""Boxes for detectors: anchors, overlaps, assignment, sampling, coding, losses, non-maximum suppression.

Boxes are (x0, y0, x1, y1) in pixels; width x1 - x0. What of a batch is padding has label -1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST_SCALE = abs(math.log(16 / 1000))  # of a decoded width or height over its anchor's, as a logarithm
NEGATIVE, IGNORED = -1, -2


def cell_anchors(width: np.ndarray, height: np.ndarray, centre: float) -> np.ndarray:
    """Boxes of these sizes around (centre, centre): (K, 4)."""
    return np.stack([centre - width / 2, centre - height / 2, centre + width / 2, centre + height / 2], axis=1)


def retina_anchors(
    stride: int, ratios: Sequence[float] = (0.5, 1.0, 2.0), octaves: int = 3, scale: float = 4.0
) -> np.ndarray:
    """A cell's anchors of RetinaNet (Lin et al. 2017), (9, 4): sizes scale * stride * 2^(i / octaves), ratio by ratio.

    Args:
      stride: pixels from cell to cell; anchors lie around a cell's corner.
      ratios: height over width.
      octaves: sizes between two powers of two.
      scale: the smallest size over the stride.
    """
    size = scale * stride * 2 ** (np.arange(octaves) / octaves)
    root = np.sqrt(np.asarray(ratios, float))[:, None]
    return cell_anchors((size / root).ravel(), (size * root).ravel(), 0.0)


def ssd_anchors(stride: int, smallest: float, largest: float, ratios: Sequence[float] = (2.0, 3.0)) -> np.ndarray:
    """A cell's anchors of SSD (Liu et al. 2016), (2 + 2 ratios, 4), around the cell's middle.

    Of size `smallest`, of sqrt(smallest * largest), and of the smallest with height over width 1 / r and r.
    """
    root = np.sqrt(np.concatenate([[1.0], *([1 / r, r] for r in ratios)]))
    width, height = smallest / root, smallest * root
    middle = math.sqrt(smallest * largest)
    return cell_anchors(np.insert(width, 1, middle), np.insert(height, 1, middle), stride / 2)


def grid_anchors(cell: np.ndarray, rows: int, columns: int, stride: int) -> np.ndarray:
    """The anchors of all cells, float32 (rows * columns * K, 4), in the order (row, column, anchor)."""
    y, x = np.meshgrid(np.arange(rows) * stride, np.arange(columns) * stride, indexing="ij")
    shift = np.stack([x, y, x, y], axis=-1)
    return (shift[:, :, None] + cell).reshape(-1, 4).astype(np.float32)


def overlaps(boxes: jax.Array, others: jax.Array) -> jax.Array:
    """Intersection over union, (M, 4) and (N, 4) to (M, N)."""
    corner = jnp.maximum(boxes[:, None, :2], others[None, :, :2])
    extent = jnp.maximum(jnp.minimum(boxes[:, None, 2:], others[None, :, 2:]) - corner, 0)
    areas = [(x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (boxes, others)]
    intersection = extent[..., 0] * extent[..., 1]
    return intersection / jnp.maximum(areas[0][:, None] + areas[1][None] - intersection, 1e-6)


def assign(
    anchors: jax.Array,
    boxes: jax.Array,
    labels: jax.Array,
    positive: float,
    negative: float,
    every_best: bool,
    least: float = 0.0,
) -> jax.Array:
    """Which box each anchor is for: int32 (N,), NEGATIVE for none, IGNORED for anchors that count for nothing.

    An anchor is for the box it overlaps most, by at least `positive`; and for a box of which it is (one of) the best
    anchors, if they overlap by at least `least`, a later box before an earlier one. It is for none below `negative`.

    Args:
      anchors: (N, 4).
      boxes: (G, 4).
      labels: (G,), below 0 for padding.
      positive, negative: overlaps.
      every_best: all of a box's best anchors, if there are several, or only the first.
      least: overlap; infinity where being the best is no reason.
    """
    real = labels >= 0
    shared = jnp.where(real[:, None], overlaps(boxes, anchors), -1.0)
    most = shared.max(axis=0)
    chosen = jnp.where(most >= positive, shared.argmax(axis=0), jnp.where(most < negative, NEGATIVE, IGNORED))
    if every_best:
        best = shared == shared.max(axis=1, keepdims=True)
    else:
        best = jnp.arange(anchors.shape[0]) == shared.argmax(axis=1)[:, None]
    best &= real[:, None] & (shared.max(axis=1, keepdims=True) >= least)
    own = jnp.where(best, jnp.arange(boxes.shape[0])[:, None], -1).max(axis=0)
    return jnp.where(own >= 0, own, chosen).astype(jnp.int32)


def sample(rng: jax.Array, chosen: jax.Array, most: int, positives: int) -> tuple[jax.Array, jax.Array]:
    """Draws what is trained on: some anchors that are for a box, then others that are for none, as many as are left.

    Args:
      rng: a key.
      chosen: int (N,), of `assign`.
      most: how many there may be altogether; no more than N are returned.
      positives: how many of them may be for a box.

    Returns:
      Places int32 (most,), those for a box first, and whether there is such an anchor, bool (most,).
    """
    most, positives = min(most, len(chosen)), min(positives, len(chosen))
    order = jax.random.uniform(rng, chosen.shape)
    first, first_place = jax.lax.top_k(jnp.where(chosen >= 0, order, -1), positives)
    rest, rest_place = jax.lax.top_k(jnp.where(chosen == NEGATIVE, order, -1), most)
    room = most - (first >= 0).sum()
    kept = jnp.concatenate([first >= 0, (rest >= 0) & (jnp.arange(most) < room)])
    front = jnp.argsort(~kept, stable=True)[:most]
    return jnp.concatenate([first_place, rest_place])[front], kept[front]


@dataclasses.dataclass(frozen=True)
class BoxCoder:
    """Boxes as differences to anchors: of the centre over the anchor's size, and logarithms of ratios of sizes.

    Attributes:
      deviations: by which the four numbers are divided.
    """

    deviations: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def encode(self, anchors: jax.Array, boxes: jax.Array) -> jax.Array:
        """(..., 4) each, of boxes that are not empty, to (..., 4)."""
        centre, size = _centre(anchors)
        box_centre, box_size = _centre(boxes)
        numbers = jnp.concatenate([(box_centre - centre) / size, jnp.log(box_size / size)], axis=-1)
        return numbers / jnp.asarray(self.deviations)

    def decode(self, anchors: jax.Array, deltas: jax.Array, height: int, width: int) -> jax.Array:
        """The inverse, cut at the edges of an image of height x width."""
        deltas = deltas * jnp.asarray(self.deviations)
        centre, size = _centre(anchors)
        centre = centre + deltas[..., :2] * size
        half = size * jnp.exp(jnp.clip(deltas[..., 2:], -_LARGEST_SCALE, _LARGEST_SCALE)) / 2
        boxes = jnp.concatenate([centre - half, centre + half], axis=-1)
        return jnp.clip(boxes, 0, jnp.asarray([width, height, width, height], boxes.dtype))

    def targets(self, anchors: jax.Array, boxes: jax.Array, chosen: jax.Array) -> jax.Array:
        """What deltas (N, 4) of anchors (N, 4) should be, of boxes (G, 4) chosen (N,); 0 where there is none."""
        positive, any_box = (chosen >= 0)[:, None], jnp.asarray([0.0, 0.0, 1.0, 1.0])
        own = jnp.where(positive, boxes[jnp.maximum(chosen, 0)], any_box)
        return self.encode(jnp.where(positive, anchors, any_box), own)


def _centre(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def focal_loss(logits: jax.Array, targets: jax.Array, alpha: float = 0.25, gamma: float = 2.0) -> jax.Array:
    """Sigmoid focal loss (Lin et al. 2017), element by element: -alpha_t (1 - p_t)^gamma log p_t.

    Args:
      logits: float.
      targets: 0 or 1, of the same shape.
      alpha: weight of the ones; the zeros' is 1 - alpha.
      gamma: how much easy ones count less.
    """
    probability = jax.nn.sigmoid(logits)
    missed = (1 - probability) * targets + probability * (1 - targets)
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * missed**gamma * binary_cross_entropy(logits, targets)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-t log sigmoid(x) - (1 - t) log(1 - sigmoid(x)), element by element."""
    return jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def smooth_l1(error: jax.Array, beta: float = 1.0) -> jax.Array:
    """error^2 / (2 beta) below beta, |error| - beta / 2 from there on; for a beta of 0 it is L1."""
    size = jnp.abs(error)
    if beta == 0:
        return size
    return jnp.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)


def batched_nms(
    boxes: jax.Array, scores: jax.Array, classes: jax.Array, threshold: float, most: int
) -> tuple[jax.Array, jax.Array]:
    """Greedy non-maximum suppression, within each class.

    Args:
      boxes: (N, 4).
      scores: (N,), -inf for what does not count.
      classes: int (N,).
      threshold: overlap above which the box of lower score goes.
      most: how many boxes may stay.

    Returns:
      Indices int32 (most,), highest score first, and whether there is such a box, bool (most,).
    """

    def step(scores: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        best = jnp.argmax(scores)
        suppressed = (overlaps(boxes[best][None], boxes)[0] > threshold) & (classes == classes[best])
        remaining = jnp.where(suppressed | (jnp.arange(len(scores)) == best), -jnp.inf, scores)
        return remaining, (best.astype(jnp.int32), scores[best] > -jnp.inf)

    _, kept = jax.lax.scan(step, scores, None, length=most)
    return kept


def example_targets(height: int, width: int, num_classes: int, batch_size: int) -> dict[str, np.ndarray]:
    """Random `boxes` (B, 3, 4) float32 and `labels` (B, 3) int32, the last of them padding."""
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 0.5, (batch_size, 3, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.5, corner.shape)], -1) * [width, height, width, height]
    labels = rng.integers(0, num_classes, (batch_size, 3)).astype(np.int32)
    labels[:, -1] = -1
    return {"boxes": boxes.astype(np.float32), "labels": labels}


def average_precision(
    found: Sequence[tuple[np.ndarray, np.ndarray]], truth: Sequence[np.ndarray], threshold: float = 0.5
) -> float:
    """Area under precision over recall of one class, each precision the best at its recall or a larger one.

    Args:
      found: boxes (M, 4) and scores (M,) of each image.
      truth: boxes (G, 4) of each image. Each can be found once, by the best box that overlaps it enough.
      threshold: least overlap.
    """
    total = sum(len(boxes) for boxes in truth)
    if total == 0:
        return math.nan
    order = sorted(
        ((float(score), image, place) for image, (_, scores) in enumerate(found) for place, score in enumerate(scores)),
        reverse=True,
    )
    taken = [np.zeros(len(boxes), bool) for boxes in truth]
    shared = [
        np.asarray(overlaps(jnp.asarray(boxes), jnp.asarray(real))) if len(boxes) and len(real) else None
        for (boxes, _), real in zip(found, truth, strict=True)
    ]
    hits = np.zeros(len(order))
    for rank, (_, image, place) in enumerate(order):
        table = shared[image]
        if table is None:
            continue
        best = int(np.argmax(table[place]))
        if table[place, best] >= threshold and not taken[image][best]:
            taken[image][best] = hits[rank] = True
    recall = np.cumsum(hits) / total
    precision = np.cumsum(hits) / np.arange(1, len(order) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))

"""Regions of two-stage detectors: how they are proposed, drawn for training, and refined, and what the losses are.

All are functions of a batch and of static shapes. Names of sizes as of the package.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers import boxes as box
from zoo.layers.regions import crop_masks


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of heads.

    Attributes:
      overlap: with a box, from which on a region is of its class.
      deviations: by which its deltas are divided.
      weight: of its losses.
    """

    overlap: float
    deviations: tuple[float, float, float, float]
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Design:
    """What Mask R-CNN and its cascade differ in, and how many of everything are trained on.

    Attributes:
      stages: of heads, one after the other.
      by_class: each class has deltas of its own.
      best_regions: a region that is a box's best is for it, though it overlaps another box more.
      border_anchors: anchors that leave the image are trained too.
      anchor_beta, region_beta: errors of deltas below count by their squares; 0: none do.
      proposals: how many there are in training.
      sampled_anchors, sampled_regions: how many a loss is of, an image; at most half of the anchors and a quarter of
        the regions are for a box.
    """

    stages: tuple[Stage, ...]
    by_class: bool
    best_regions: bool
    border_anchors: bool
    anchor_beta: float
    region_beta: float
    proposals: int
    sampled_anchors: int = 256
    sampled_regions: int = 512

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages must not be empty")
        for name in ("proposals", "sampled_anchors", "sampled_regions"):
            if getattr(self, name) < 4:
                raise ValueError(f"{name} must be at least 4, got {getattr(self, name)}")


MASK_RCNN = Design(
    (Stage(0.5, (0.1, 0.1, 0.2, 0.2)),),
    by_class=True, best_regions=True, border_anchors=True, anchor_beta=0.0, region_beta=0.0, proposals=1000,
)  # fmt: skip
CASCADE_MASK_RCNN = Design(
    (
        Stage(0.5, (0.1, 0.1, 0.2, 0.2)),
        Stage(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
        Stage(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
    ),
    by_class=False, best_regions=False, border_anchors=False, anchor_beta=1 / 9, region_beta=1.0, proposals=2000,
)  # fmt: skip


class Proposals(NamedTuple):
    """What the region proposal network says of all anchors, level by level, each in the order (row, column, anchor)."""

    scores: jax.Array  # (B, N) logits
    deltas: jax.Array  # (B, N, 4)
    anchors: jax.Array  # (N, 4)


class Regions(NamedTuple):
    """What a stage's heads say of regions."""

    scores: jax.Array  # (B, R, K + 1) logits, the background last
    deltas: jax.Array  # (B, R, 4 K), class by class, or (B, R, 4) for all classes alike
    masks: jax.Array  # (B, R, 28, 28, K) logits
    boxes: jax.Array  # (B, R, 4), the regions


class Sampled(NamedTuple):
    """Regions that a stage is trained on, those for a box first."""

    boxes: jax.Array  # (B, R, 4)
    chosen: jax.Array  # int32 (B, R): which box each is for, NEGATIVE for the background, IGNORED for padding
    given: jax.Array  # bool (B, R): a box itself


def of_class(x: jax.Array, classes: jax.Array) -> jax.Array:
    """(B, R, ..., K) and classes (B, R) to (B, R, ...)."""
    index = classes.reshape(*classes.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=-1)[..., 0]


def labels_of(chosen: jax.Array, labels: jax.Array, otherwise: jax.Array | int) -> jax.Array:
    """The class of each region's box, of labels (B, G), or another where it has none: int (B, R)."""
    return jnp.where(chosen >= 0, jnp.take_along_axis(labels, jnp.maximum(chosen, 0), axis=1), otherwise)


def deltas_of(deltas: jax.Array, classes: jax.Array) -> jax.Array:
    """Deltas (B, R, 4 K) or (B, R, 4) to those of one class, float32 (B, R, 4)."""
    each = deltas.reshape(*deltas.shape[:2], -1, 4).astype(jnp.float32)
    if each.shape[2] == 1:
        return each[:, :, 0]
    return of_class(each.swapaxes(2, 3), classes)


def refine(stage: Stage, regions: jax.Array, deltas: jax.Array, classes: jax.Array, size: Sequence[int]) -> jax.Array:
    """What a stage makes of regions (B, R, 4) of some classes (B, R), cut at the edges of an image: (B, R, 4)."""
    return box.BoxCoder(stage.deviations).decode(regions, deltas_of(deltas, classes), *size)


def best_proposals(
    proposals: Proposals, sizes: Sequence[int], size: Sequence[int], a_level: int, most: int
) -> tuple[jax.Array, jax.Array]:
    """The best regions that do not overlap by more than 0.7 within their level; no gradient passes.

    Args:
      proposals: of a batch.
      sizes: how many anchors each level has.
      size: the images' height and width.
      a_level: how many of a level are looked at.
      most: how many regions there may be.

    Returns:
      Regions (B, most, 4), best first, and which of them there are, bool (B, most); fewer than `most` if there are not
      so many anchors.
    """
    edges = [0, *np.cumsum(sizes)]

    def of_image(scores: jax.Array, deltas: jax.Array) -> tuple[jax.Array, jax.Array]:
        parts = []
        for level, (start, end) in enumerate(itertools.pairwise(edges)):
            best, place = jax.lax.top_k(scores[start:end], min(a_level, end - start))
            place += start
            regions = box.BoxCoder().decode(proposals.anchors[place], deltas[place], *size)
            # Regions beside the image have nothing of it.
            best = jnp.where((regions[:, 2:] > regions[:, :2]).all(axis=1), best, -jnp.inf)
            parts.append((regions, best, jnp.full(len(best), level)))
        regions, best, levels = (jnp.concatenate(x) for x in zip(*parts, strict=True))
        kept, valid = box.batched_nms(regions, best, levels, 0.7, min(most, len(best)))
        return regions[kept], valid

    scores, deltas = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (proposals.scores, proposals.deltas))
    return jax.vmap(of_image)(scores, deltas)


def proposal_losses(
    design: Design, rng: jax.Array, proposals: Proposals, boxes: jax.Array, labels: jax.Array, size: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """Binary cross-entropy of scores and (smooth) L1 of deltas: sums over sampled anchors, over their number.

    An anchor is for a box it overlaps by 0.7, or, from 0.3 on, as the box's best; for none below 0.3.

    Args:
      design: see there.
      rng: the key that anchors are drawn with.
      proposals: of a batch.
      boxes, labels: (B, G, 4) and int (B, G), below 0 for padding.
      size: the images' height and width.
    """
    anchors, coder = proposals.anchors, box.BoxCoder()
    used = jnp.ones(len(anchors), bool)
    if not design.border_anchors:
        used = (anchors[:, :2] >= 0).all(axis=1) & (anchors[:, 2:] < jnp.asarray([size[1], size[0]])).all(axis=1)
    matched = jnp.where(used[:, None], anchors, 0.0)  # what is not used has no area and overlaps nothing

    def of_image(
        rng: jax.Array, scores: jax.Array, deltas: jax.Array, boxes: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, ...]:
        chosen = box.assign(matched, boxes, labels, 0.7, 0.3, every_best=True, least=0.3)
        chosen = jnp.where(used, chosen, box.IGNORED)
        place, kept = box.sample(rng, chosen, design.sampled_anchors, design.sampled_anchors // 2)
        chosen = jnp.where(kept, chosen[place], box.IGNORED)
        positive = chosen >= 0
        class_loss = box.binary_cross_entropy(scores[place], positive.astype(jnp.float32))
        error = deltas[place] - coder.targets(anchors[place], boxes, chosen)
        box_loss = box.smooth_l1(error, design.anchor_beta).sum(axis=-1)
        number = jnp.maximum(positive.sum(), 1) + jnp.maximum((chosen == box.NEGATIVE).sum(), 1)
        return jnp.where(kept, class_loss, 0).sum(), jnp.where(positive, box_loss, 0).sum(), number

    scores, deltas = (x.astype(jnp.float32) for x in (proposals.scores, proposals.deltas))
    keys = jax.random.split(rng, len(scores))
    class_loss, box_loss, number = jax.vmap(of_image)(keys, scores, deltas, boxes, labels)
    return class_loss.sum() / number.sum(), box_loss.sum() / number.sum()


def sample_regions(
    design: Design,
    stage: Stage,
    rng: jax.Array,
    regions: jax.Array,
    valid: jax.Array,
    boxes: jax.Array,
    labels: jax.Array,
) -> Sampled:
    """Draws the regions that a stage is trained on, from regions and the boxes themselves.

    Args:
      design, stage: see there.
      rng: a key.
      regions, valid: (B, R, 4), and which of them there are, bool (B, R).
      boxes, labels: (B, G, 4) and int (B, G), below 0 for padding.
    """
    least = stage.overlap if design.best_regions else math.inf

    def of_image(
        rng: jax.Array, regions: jax.Array, valid: jax.Array, boxes: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, ...]:
        matched = jnp.where(valid[:, None], regions, 0.0)  # what is not there has no area and overlaps nothing
        chosen = box.assign(matched, boxes, labels, stage.overlap, stage.overlap, every_best=True, least=least)
        chosen = jnp.where(valid, chosen, box.IGNORED)
        # The boxes come last: a region's number, and with it its chance, does not depend on the padding.
        own = jnp.where(labels >= 0, jnp.arange(len(labels)), box.IGNORED)
        candidates, chosen = jnp.concatenate([matched, boxes]), jnp.concatenate([chosen, own])
        place, kept = box.sample(rng, chosen, design.sampled_regions, design.sampled_regions // 4)
        return candidates[place], jnp.where(kept, chosen[place], box.IGNORED), place >= len(regions)

    return Sampled(*jax.vmap(of_image)(jax.random.split(rng, len(regions)), regions, valid, boxes, labels))


def region_losses(
    design: Design,
    stage: Stage,
    sampled: Sampled,
    scores: jax.Array,
    deltas: jax.Array,
    boxes: jax.Array,
    labels: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy, and (smooth) L1 of the deltas of those for a box: sums over sampled regions, over their number.

    Args:
      design, stage: see there.
      sampled: of a batch.
      scores, deltas: as of `Regions`.
      boxes, labels: (B, G, 4) and int (B, G), below 0 for padding.
    """
    positive, kept = sampled.chosen >= 0, sampled.chosen != box.IGNORED
    background = scores.shape[-1] - 1
    own = labels_of(sampled.chosen, labels, background)
    entropy = -of_class(jax.nn.log_softmax(scores.astype(jnp.float32)), own)
    targets = jax.vmap(box.BoxCoder(stage.deviations).targets)(sampled.boxes, boxes, sampled.chosen)
    error = box.smooth_l1(deltas_of(deltas, jnp.where(positive, own, 0)) - targets, design.region_beta).sum(axis=-1)
    number = jnp.maximum(kept.sum(), 1)
    return jnp.where(kept, entropy, 0).sum() / number, jnp.where(positive, error, 0).sum() / number


def region_mask_loss(sampled: Sampled, logits: jax.Array, labels: jax.Array, masks: jax.Array) -> jax.Array:
    """Binary cross-entropy of the true class's mask: the mean over the pixels of all regions for a box.

    Args:
      sampled: of a batch.
      logits: (B, R, side, side, K).
      labels, masks: int (B, G), below 0 for padding, and (B, G, height, width) of the images' size.
    """
    positive = sampled.chosen >= 0
    own = of_class(logits, labels_of(sampled.chosen, labels, 0)).astype(jnp.float32)
    targets = jax.vmap(partial(crop_masks, size=logits.shape[2]))(masks, jnp.maximum(sampled.chosen, 0), sampled.boxes)
    entropy = box.binary_cross_entropy(own, targets).mean(axis=(2, 3))
    return jnp.where(positive, entropy, 0).sum() / jnp.maximum(positive.sum(), 1)

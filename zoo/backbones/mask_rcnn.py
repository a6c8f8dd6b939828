"""Mask R-CNN (He et al. 2017) with a feature pyramid, and its cascade (Cai & Vasconcelos 2018), as in MMDetection.

On any backbone of four maps. Regions are proposed (`Proposals`), then judged by one stage of heads, or by several, each
of which refines the regions for the next. B batch, N anchors, R regions, S stages, K classes without the background, G
boxes an image; boxes are (x0, y0, x1, y1) in pixels. All shapes are static: what is not there is padding, labelled -1.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers import boxes as box
from zoo.layers.convolution import Conv
from zoo.layers.feature_pyramid import FeaturePyramid
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.regions import crop_masks, roi_align
from zoo.weights.names import Rule, Transform, layer, under

STRIDES = (4, 8, 16, 32, 64)
_ANCHORS = 3
_MASK = 28  # pixels of a mask's side


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


class Losses(NamedTuple):
    """Weighted losses: what is descended is the sum of all."""

    anchor_class: jax.Array  # ()
    anchor_box: jax.Array  # ()
    region_class: jax.Array  # (S,)
    region_box: jax.Array  # (S,)
    mask: jax.Array  # (S,), 0 where no masks are given


class Found(NamedTuple):
    """Detected things of a batch, highest score first."""

    boxes: jax.Array  # (B, M, 4)
    scores: jax.Array  # (B, M)
    classes: jax.Array  # int32 (B, M)
    valid: jax.Array  # bool (B, M)
    masks: jax.Array  # (B, M, 28, 28) probabilities; `zoo.layers.regions.paste_masks` puts them on an image


class RegionHeads(nn.Module):
    """One stage. Children: `box_fc_{i}`, `box_score`, `box_delta`, `mask_{i}`, `mask_upsample`, `mask_out`.

    Fields:
      num_classes: K.
      channels: of the maps and the mask head.
      by_class: as of `Design`.
    """

    num_classes: int
    channels: int
    by_class: bool
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """See the class."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        zeros, kaiming = nn.initializers.zeros_init(), nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        convolution: Any = partial(Conv, bias_init=zeros, kernel_init=kaiming, **options)
        linear: Any = partial(dense, use_bias=True, **options)
        xavier = nn.initializers.xavier_uniform()
        self.box_fc = [linear(1024, (None, "mlp"), kernel_init=xavier) for _ in range(2)]
        self.box_score = linear(self.num_classes + 1, ("mlp", None), kernel_init=nn.initializers.normal(0.01))
        deltas = 4 * (self.num_classes if self.by_class else 1)
        self.box_delta = linear(deltas, ("mlp", None), kernel_init=nn.initializers.normal(0.001))
        self.mask = [convolution(self.channels, 3) for _ in range(4)]
        self.mask_upsample = nn.ConvTranspose(
            self.channels, (2, 2), (2, 2), padding="VALID", **options,
            kernel_init=partitioned(kaiming, None, None, None, "embed"), bias_init=partitioned(zeros, "embed"),
        )  # fmt: skip
        self.mask_out = convolution(self.num_classes, axes=("embed", None))

    def boxes(self, maps: Sequence[jax.Array], regions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores and deltas, as of `Regions`, of regions (B, R, 4)."""
        x = jax.vmap(partial(roi_align, size=7))(list(maps[:4]), regions)
        x = x.reshape(*regions.shape[:2], math.prod(x.shape[2:]))
        for part in self.box_fc:
            x = nn.relu(part(x))
        return self.box_score(x), self.box_delta(x)

    def masks(self, maps: Sequence[jax.Array], regions: jax.Array) -> jax.Array:
        """Logits (B, R, 28, 28, K) of regions (B, R, 4)."""
        x = jax.vmap(partial(roi_align, size=_MASK // 2))(list(maps[:4]), regions)
        x = x.reshape(-1, *x.shape[2:])
        for part in self.mask:
            x = nn.relu(part(x))
        x = self.mask_out(nn.relu(self.mask_upsample(x)))
        return x.reshape(*regions.shape[:2], *x.shape[1:])


class MaskRCNN(nn.Module):
    """Boxes, classes and masks of things.

    Children: `backbone`, `neck`, `rpn_conv`, `rpn_score`, `rpn_delta`, `heads_{s}` (`RegionHeads`) a stage.

    Fields:
      backbone: (images, train) to maps at strides 4, 8, 16 and 32.
      num_classes: K.
      channels: of the pyramid and the heads.
      design: `MASK_RCNN` or `CASCADE_MASK_RCNN`.
    """

    backbone: nn.Module
    num_classes: int = 80
    channels: int = 256
    design: Design = MASK_RCNN
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """See the class."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.neck = FeaturePyramid(self.channels, 4, **options)
        normal, zeros = nn.initializers.normal(0.01), nn.initializers.zeros_init()
        convolution: Any = partial(Conv, kernel_init=normal, bias_init=zeros, **options)
        self.rpn_conv = convolution(self.channels, 3)
        self.rpn_score = convolution(_ANCHORS, axes=("embed", None))
        self.rpn_delta = convolution(4 * _ANCHORS, axes=("embed", None))
        self.heads = [
            RegionHeads(self.num_classes, self.channels, self.design.by_class, **options) for _ in self.design.stages
        ]

    def __call__(self, images: jax.Array, regions: jax.Array, train: bool = False) -> tuple[Proposals | Regions, ...]:
        """What is proposed, and what each stage says of given regions, or of what the one before made of them.

        Args:
          images: float (B, height, width, channels), standardised.
          regions: (B, R, 4) in pixels.
          train: of the backbone.

        Returns:
          `Proposals`, then `Regions` a stage.
        """
        if regions.ndim != 3 or regions.shape[0] != images.shape[0] or regions.shape[2] != 4:
            raise ValueError(f"regions must be (batch, regions, 4) for images {images.shape}, got {regions.shape}")
        maps = self.pyramid(images, train)
        stages = []
        for heads, (scores, deltas, boxes) in zip(
            self.heads, self._judge(maps, regions, images.shape[1:3]), strict=True
        ):
            stages.append(Regions(scores, deltas, heads.masks(maps, boxes), boxes))
        return self.propose(maps), *stages

    def losses(
        self,
        images: jax.Array,
        boxes: jax.Array,
        labels: jax.Array,
        masks: jax.Array | None,
        rng: jax.Array,
        train: bool = True,
    ) -> Losses:
        """The losses of both networks on the regions that the first proposes.

        As MMDetection: 256 anchors an image, binary cross-entropy and L1 of the deltas, a sampled anchor of the batch;
        proposals and the boxes themselves, of which 512 an image: cross-entropy, and L1 of the deltas of those for a
        box, a sampled region of the batch; binary cross-entropy of the true class's mask. Regions get no gradient.

        Args:
          images: float (B, height, width, channels), standardised.
          boxes: float (B, G, 4) in pixels, G at least 1; how much padding there is changes nothing.
          labels: int (B, G), below 0 for padding.
          masks: (B, G, height, width), bool or numbers from 0 to 1; None where there are none: masks are not trained.
          rng: the key that anchors and regions are drawn with.
          train: of the backbone.

        Raises:
          ValueError: the shapes do not fit each other.
        """
        count = boxes.shape[1] if boxes.ndim == 3 else 0
        if boxes.shape != (len(images), max(count, 1), 4) or labels.shape != boxes.shape[:2]:
            raise ValueError(
                f"boxes must be (batch, boxes, 4) and labels (batch, boxes), at least one an image, for images "
                f"{images.shape}, got {boxes.shape} and {labels.shape}"
            )
        if masks is not None and masks.shape != (*labels.shape, *images.shape[1:3]):
            raise ValueError(
                f"masks must be (batch, boxes, height, width) for images {images.shape} and labels {labels.shape}, "
                f"got {masks.shape}"
            )
        size, keys = images.shape[1:3], jax.random.split(rng, 1 + len(self.heads))
        maps = self.pyramid(images, train)
        proposals = self.propose(maps)
        anchor_losses = proposal_losses(self.design, keys[0], proposals, boxes, labels, size)
        regions, valid = best_proposals(proposals, _sizes(maps), size, 2000, self.design.proposals)
        stages = []
        for index, (heads, stage) in enumerate(zip(self.heads, self.design.stages, strict=True)):
            sampled = sample_regions(self.design, stage, keys[1 + index], regions, valid, boxes, labels)
            scores, deltas = heads.boxes(maps, sampled.boxes)
            class_loss, box_loss = region_losses(self.design, stage, sampled, scores, deltas, boxes, labels)
            mask_loss = jnp.zeros(())
            if masks is not None:
                first = jax.tree.map(lambda x: x[:, : self.design.sampled_regions // 4], sampled)
                mask_loss = region_mask_loss(first, heads.masks(maps, first.boxes), labels, masks)
            stages.append([stage.weight * x for x in (class_loss, box_loss, mask_loss)])
            regions = refine(stage, sampled.boxes, deltas, _classes(scores, sampled.chosen, labels), size)
            regions, valid = jax.lax.stop_gradient(regions), (sampled.chosen != box.IGNORED) & ~sampled.given
        return Losses(*anchor_losses, *(jnp.stack(x) for x in zip(*stages, strict=True)))

    def detect(self, images: jax.Array) -> Found:
        """At most 100 things an image: of 1000 proposals those with a class above 0.05, suppressed at 0.5.

        Of a cascade, scores (as logits) and masks (as probabilities) are the stages' means.

        Args:
          images: float (B, height, width, channels), standardised.
        """
        maps, size = self.pyramid(images), images.shape[1:3]
        regions, valid = best_proposals(self.propose(maps), _sizes(maps), size, 1000, 1000)
        stages = self._judge(maps, regions, size)
        scores = jnp.mean(jnp.stack([scores.astype(jnp.float32) for scores, _, _ in stages]), axis=0)
        probabilities = jnp.where(valid[..., None], jax.nn.softmax(scores)[..., :-1], 0)
        _, deltas, regions = stages[-1]
        deltas = deltas.reshape(*deltas.shape[:2], -1, 4).astype(jnp.float32)
        coder = box.BoxCoder(self.design.stages[-1].deviations)
        boxes = jnp.broadcast_to(coder.decode(regions[:, :, None], deltas, *size), (*probabilities.shape, 4))

        def of_image(boxes: jax.Array, probabilities: jax.Array) -> tuple[jax.Array, ...]:
            flat = jnp.where(probabilities > 0.05, probabilities, -jnp.inf).reshape(-1)
            classes = jnp.tile(jnp.arange(self.num_classes, dtype=jnp.int32), len(boxes))
            boxes = boxes.reshape(-1, 4)
            kept, valid = box.batched_nms(boxes, flat, classes, 0.5, 100)
            return boxes[kept], jnp.where(valid, flat[kept], 0), classes[kept], valid

        boxes, best, classes, valid = jax.vmap(of_image)(boxes, probabilities)
        masks = [jax.nn.sigmoid(_of_class(x.masks(maps, boxes), classes).astype(jnp.float32)) for x in self.heads]
        return Found(boxes, best, classes, valid, sum(masks[1:], masks[0]) / len(masks))

    def pyramid(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """Five maps of `channels` at strides 4 to 64; the last is every other pixel of the one before."""
        maps = self.neck(self.backbone(images, train))
        return [*maps, maps[-1][:, ::2, ::2]]

    def propose(self, maps: Sequence[jax.Array]) -> Proposals:
        """The region proposal network, on all maps of the pyramid."""
        scores, deltas, anchors = [], [], []
        for x, stride in zip(maps, STRIDES, strict=True):
            y = nn.relu(self.rpn_conv(x))
            scores.append(self.rpn_score(y).reshape(y.shape[0], -1))
            deltas.append(self.rpn_delta(y).reshape(y.shape[0], -1, 4))
            cell = box.retina_anchors(stride, octaves=1, scale=8.0)
            anchors.append(jnp.asarray(box.grid_anchors(cell, x.shape[1], x.shape[2], stride)))
        return Proposals(jnp.concatenate(scores, 1), jnp.concatenate(deltas, 1), jnp.concatenate(anchors))

    def _judge(
        self, maps: Sequence[jax.Array], regions: jax.Array, size: Sequence[int]
    ) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
        """Scores, deltas and regions of each stage; a stage's regions are what the one before made of its own."""
        judged = []
        for heads, stage in zip(self.heads, self.design.stages, strict=True):
            scores, deltas = heads.boxes(maps, regions)
            judged.append((scores, deltas, regions))
            regions = refine(stage, regions, deltas, jnp.argmax(scores[..., :-1], axis=-1), size)
        return judged


def _sizes(maps: Sequence[jax.Array]) -> list[int]:
    """How many anchors each level has."""
    return [_ANCHORS * x.shape[1] * x.shape[2] for x in maps]


def _of_class(x: jax.Array, classes: jax.Array) -> jax.Array:
    """(B, R, ..., K) and classes (B, R) to (B, R, ...)."""
    index = classes.reshape(*classes.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=-1)[..., 0]


def _classes(scores: jax.Array, chosen: jax.Array, labels: jax.Array) -> jax.Array:
    """The class of each region's box, or the likeliest where it has none: int (B, R)."""
    own = jnp.take_along_axis(labels, jnp.maximum(chosen, 0), axis=1)
    return jnp.where(chosen >= 0, own, jnp.argmax(scores[..., :-1], axis=-1))


def _deltas_of(deltas: jax.Array, classes: jax.Array) -> jax.Array:
    """Deltas (B, R, 4 K) or (B, R, 4) to those of one class, float32 (B, R, 4)."""
    each = deltas.reshape(*deltas.shape[:2], -1, 4).astype(jnp.float32)
    if each.shape[2] == 1:
        return each[:, :, 0]
    return _of_class(each.swapaxes(2, 3), classes)


def refine(stage: Stage, regions: jax.Array, deltas: jax.Array, classes: jax.Array, size: Sequence[int]) -> jax.Array:
    """What a stage makes of regions (B, R, 4) of some classes (B, R), cut at the edges of an image: (B, R, 4)."""
    return box.BoxCoder(stage.deviations).decode(regions, _deltas_of(deltas, classes), *size)


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

    scores, deltas = (x.astype(jnp.float32) for x in (proposals.scores, proposals.deltas))
    return jax.lax.stop_gradient(jax.vmap(of_image)(scores, deltas))


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
    own = _classes(scores, sampled.chosen, labels)
    entropy = -_of_class(jax.nn.log_softmax(scores.astype(jnp.float32)), jnp.where(positive, own, scores.shape[-1] - 1))
    targets = jax.vmap(box.BoxCoder(stage.deviations).targets)(sampled.boxes, boxes, sampled.chosen)
    error = box.smooth_l1(_deltas_of(deltas, own) - targets, design.region_beta).sum(axis=-1)
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
    own = _of_class(logits, _classes(jnp.zeros((*positive.shape, 2)), sampled.chosen, labels)).astype(jnp.float32)
    targets = jax.vmap(partial(crop_masks, size=logits.shape[2]))(masks, jnp.maximum(sampled.chosen, 0), sampled.boxes)
    entropy = box.binary_cross_entropy(own, targets).mean(axis=(2, 3))
    return jnp.where(positive, entropy, 0).sum() / jnp.maximum(positive.sum(), 1)


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """A Mask R-CNN on the backbone of a paper.

    Attributes:
      backbone: its config.
      num_classes: without the background.
      design: `MASK_RCNN` or `CASCADE_MASK_RCNN`.
      image_size: height and width in pixels of example inputs; any other will do.
    """

    backbone: Any
    num_classes: int = 80
    design: Design = MASK_RCNN
    image_size: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")


@dataclasses.dataclass(frozen=True)
class FrozenConfig(DetectorConfig):
    """And one that its paper trains with a part of the backbone frozen.

    Attributes:
      pretrained: whether that part is; not so where a backbone starts from nothing.
    """

    pretrained: bool = True


class Detector(nn.Module):
    """A `MaskRCNN`, which is the child `detector`, as its config says. A paper's own says what its backbone is."""

    config: Any
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def backbone(self, **options: Any) -> nn.Module:
        """The backbone of `MaskRCNN`."""
        raise NotImplementedError

    def setup(self) -> None:
        """See the class."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.detector = MaskRCNN(self.backbone(**options), config.num_classes, design=config.design, **options)

    def __call__(self, images: jax.Array, regions: jax.Array, train: bool = False) -> tuple[Proposals | Regions, ...]:
        """float (B, height, width, channels), standardised, and regions (B, R, 4) in pixels, to all stages' words."""
        return self.detector(images, regions, train)

    def losses(self, *arguments: Any, **options: Any) -> Losses:
        """As of `MaskRCNN`."""
        return self.detector.losses(*arguments, **options)

    def detect(self, images: jax.Array) -> Found:
        """As of `MaskRCNN`."""
        return self.detector.detect(images)


def loss(model: Detector | MaskRCNN) -> Callable:
    """The loss of `zoo.train`, all of `Losses` summed.

    The batch holds `images`, `boxes` (B, G, 4) in pixels, `labels` int (B, G), below 0 for padding, and, where there
    are any, `masks` (B, G, height, width). Metrics: the sums over the stages, by the names of `Losses` and "_loss".
    """

    def loss_function(params, model_state, batch, rngs, train):
        losses, model_state = model.apply(
            {"params": params, **model_state}, batch["images"], batch["boxes"], batch["labels"], batch.get("masks"),
            jax.random.fold_in(rngs["dropout"], 1), train, rngs=rngs, mutable=list(model_state), method="losses",
        )  # fmt: skip
        parts = {f"{name}_loss": part.sum() for name, part in losses._asdict().items()}
        return sum(parts.values()), (model_state, parts)

    return loss_function


_PIXELS = 7 * 7  # that a region is read at, channels first in the published linear layer


def _region_forward(array: np.ndarray) -> np.ndarray:
    out, inputs = array.shape
    return array.reshape(out, inputs // _PIXELS, _PIXELS).transpose(2, 1, 0).reshape(inputs, out)


def _region_inverse(array: np.ndarray) -> np.ndarray:
    inputs, out = array.shape
    return array.reshape(_PIXELS, inputs // _PIXELS, out).transpose(2, 1, 0).reshape(out, inputs)


_BOX_HEAD = [
    Rule(r"shared_fcs\.0\.weight", "params/box_fc_0/kernel", Transform(_region_forward, _region_inverse, 2)),
    Rule(r"shared_fcs\.0\.bias", "params/box_fc_0/bias"),
    *layer("linear", r"shared_fcs\.1", "box_fc_1"),
    *layer("linear", "fc_cls", "box_score"),
    *layer("linear", "fc_reg", "box_delta"),
]
_MASK_HEAD = [
    *layer("conv2d", r"convs\.(\d+)\.conv", "mask_{0}"),
    *layer("conv_transpose2d", "upsample", "mask_upsample"),
    *layer("pointwise2d", "conv_logits", "mask_out"),
]


def weight_rules(config: DetectorConfig, backbone: Sequence[Rule]) -> list[Rule]:
    """MMDetection's names of a `Detector` whose backbone has the names that are given."""
    path = "detector"
    # Only of a cascade are the stages numbered.
    number, heads = (r"\.(\d+)", "heads_{0}") if len(config.design.stages) > 1 else ("", "heads_0")
    return [
        *under("backbone", path + "/backbone", backbone),
        *layer("pointwise2d", r"neck\.lateral_convs\.(\d+)\.conv", path + "/neck/lateral_{0}"),
        *layer("conv2d", r"neck\.fpn_convs\.(\d+)\.conv", path + "/neck/output_{0}"),
        *layer("conv2d", r"rpn_head\.rpn_conv", path + "/rpn_conv"),
        *layer("pointwise2d", r"rpn_head\.rpn_cls", path + "/rpn_score"),
        *layer("pointwise2d", r"rpn_head\.rpn_reg", path + "/rpn_delta"),
        *under(r"roi_head\.bbox_head" + number, f"{path}/{heads}", _BOX_HEAD),
        *under(r"roi_head\.mask_head" + number, f"{path}/{heads}", _MASK_HEAD),
    ]


def example_inputs(config: DetectorConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`images` of normal values, and two `regions` an image."""
    height, width = config.image_size
    regions = np.array([[0, 0, width / 2, height / 2], [width / 4, height / 4, width, height]], np.float32)
    rng = np.random.default_rng(0)
    shape = (batch_size, height, width, config.backbone.channels)
    return {
        "images": rng.standard_normal(shape, dtype=np.float32),
        "regions": np.repeat(regions[None], batch_size, axis=0),
    }


def example_targets(config: DetectorConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`boxes` (B, 3, 4) float32, `labels` (B, 3) int32, the last padding, and as `masks` (B, 3, ...) bool the boxes."""
    height, width = config.image_size
    targets = box.example_targets(height, width, config.num_classes, batch_size)
    x0, y0, x1, y1 = np.moveaxis(targets["boxes"], -1, 0)[..., None, None]
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
    return targets | {"masks": (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)}

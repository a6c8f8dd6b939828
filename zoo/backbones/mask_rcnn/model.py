"""The network: pyramid, region proposal network, and stages of heads; what it loses and what it finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.backbones.mask_rcnn.regions import (
    MASK_RCNN,
    Design,
    Proposals,
    Regions,
    best_proposals,
    labels_of,
    of_class,
    proposal_losses,
    refine,
    region_losses,
    region_mask_loss,
    sample_regions,
)
from zoo.layers import boxes as box
from zoo.layers.convolution import Conv
from zoo.layers.feature_pyramid import FeaturePyramid
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.regions import roi_align

STRIDES = (4, 8, 16, 32, 64)
_ANCHORS = 3
_MASK = 28  # pixels of a mask's side


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
            classes = labels_of(sampled.chosen, labels, jnp.argmax(scores[..., :-1], axis=-1))
            regions = refine(stage, sampled.boxes, jax.lax.stop_gradient(deltas), classes, size)
            valid = (sampled.chosen != box.IGNORED) & ~sampled.given  # boxes themselves come anew
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
        masks = [jax.nn.sigmoid(of_class(x.masks(maps, boxes), classes).astype(jnp.float32)) for x in self.heads]
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

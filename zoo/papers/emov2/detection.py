"""RetinaNet (Lin et al. 2017), SSDLite (Sandler et al. 2018) and Mask R-CNN on an EMO, as MMDetection has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.backbones.mask_rcnn import Detector, FrozenConfig
from zoo.layers import boxes as box
from zoo.layers.conv_norm import ConvNorm
from zoo.layers.convolution import Conv
from zoo.layers.feature_pyramid import FeaturePyramid
from zoo.papers.emov2.model import EMOv2Config, EMOv2Features


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """A detector.

    Attributes:
      backbone: its window is 10 in all published detectors.
      num_classes: without the background.
      channels: of RetinaNet's pyramid and head.
      pretrained: in training the backbone's batch norms keep their statistics, and RetinaNet's stem and stage 1 get no
        gradient, as published; not so where a backbone starts from nothing.
      image_size: height and width in pixels of example inputs; RetinaNet takes any, SSDLite's anchors are made for 320.
    """

    backbone: EMOv2Config
    num_classes: int = 80
    channels: int = 256
    pretrained: bool = True
    image_size: tuple[int, int] = (320, 320)

    def __post_init__(self) -> None:
        if self.num_classes < 1 or self.channels < 1:
            raise ValueError(f"num_classes and channels must be positive, got {self.num_classes}, {self.channels}")


def _features(config: DetectorConfig | FrozenConfig, **options: Any) -> EMOv2Features:
    frozen = (True, 1) if config.pretrained else (False, None)
    return EMOv2Features(config.backbone, *frozen, **options)


class Detections(NamedTuple):
    """What a detector says of its anchors, level by level, N anchors in the order (row, column, anchor)."""

    logits: list[jax.Array]  # (B, N, classes), of SSDLite with the background as the last
    deltas: list[jax.Array]  # (B, N, 4), for the detector's `BoxCoder`
    anchors: list[jax.Array]  # (N, 4)


class Boxes(NamedTuple):
    """Detected boxes of a batch, highest score first."""

    boxes: jax.Array  # (B, M, 4)
    scores: jax.Array  # (B, M)
    classes: jax.Array  # int32 (B, M)
    valid: jax.Array  # bool (B, M)


class RetinaNet(nn.Module):
    """Boxes and classes at five scales, strides 8 to 128.

    Children: `backbone`, `neck`, `class_{i}`, `box_{i}`, `class_out`, `box_out`.
    """

    config: DetectorConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    coder = box.BoxCoder()
    strides = (8, 16, 32, 64, 128)
    convolutions = 4

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Detections:
        """float (B, height, width, channels), standardised, to what it says of 9 anchors a cell."""
        config = self.config
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        backbone = _features(config, **options, name="backbone")
        maps = FeaturePyramid(config.channels, 5, **options, name="neck")(backbone(images, train)[1:])
        normal = nn.initializers.normal(0.01)
        convolution: Any = partial(
            Conv, kernel_size=3, kernel_init=normal, bias_init=nn.initializers.zeros_init(), **options
        )
        towers = {
            kind: [convolution(config.channels, name=f"{kind}_{i}") for i in range(self.convolutions)]
            for kind in ("class", "box")
        }
        # At first every class has probability 0.01.
        prior = nn.initializers.constant(-np.log((1 - 0.01) / 0.01))
        heads = {
            "class": convolution(9 * config.num_classes, bias_init=prior, axes=("embed", None), name="class_out"),
            "box": convolution(9 * 4, axes=("embed", None), name="box_out"),
        }
        found: dict[str, list[jax.Array]] = {"class": [], "box": []}
        anchors = []
        for x, stride in zip(maps, self.strides, strict=True):
            for kind, results in found.items():
                y = x
                for layer in towers[kind]:
                    y = nn.relu(layer(y))
                results.append(heads[kind](y).reshape(y.shape[0], 9 * y.shape[1] * y.shape[2], -1))
            anchors.append(jnp.asarray(box.grid_anchors(box.retina_anchors(stride), x.shape[1], x.shape[2], stride)))
        return Detections(found["class"], found["box"], anchors)

    def losses(self, found: Detections, boxes: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Focal loss of the classes and L1 of the deltas, each (levels,): sums over the batch a positive anchor.

        Args:
          found: of a batch.
          boxes: (B, G, 4) in pixels.
          labels: int (B, G), below 0 for padding.
        """
        sizes = [len(level) for level in found.anchors]
        anchors = jnp.concatenate(found.anchors)

        def of_image(
            logits: jax.Array, deltas: jax.Array, boxes: jax.Array, labels: jax.Array
        ) -> tuple[jax.Array, ...]:
            chosen = box.assign(anchors, boxes, labels, 0.5, 0.4, every_best=True)
            positive, index = chosen >= 0, jnp.maximum(chosen, 0)
            classes = jax.nn.one_hot(jnp.where(positive, labels[index], -1), self.config.num_classes)
            class_loss = jnp.where(chosen == box.IGNORED, 0, box.focal_loss(logits, classes).sum(-1))
            error = jnp.abs(deltas - self.coder.targets(anchors, boxes, chosen))
            return class_loss, jnp.where(positive, error.sum(-1), 0), jnp.maximum(positive.sum(), 1)

        logits, deltas = (jnp.concatenate(x, axis=1).astype(jnp.float32) for x in (found.logits, found.deltas))
        class_loss, box_loss, positives = jax.vmap(of_image)(logits, deltas, boxes, labels)
        edges = np.cumsum(sizes)[:-1]
        sums = [
            jnp.stack([part.sum() for part in jnp.split(x, edges, axis=1)]) / positives.sum()
            for x in (class_loss, box_loss)
        ]
        return sums[0], sums[1]

    def detect(self, found: Detections, height: int, width: int) -> Boxes:
        """At most 100 boxes an image of height x width: above 0.05, the best 1000 a level, suppressed at 0.5."""
        probabilities = [jax.nn.sigmoid(x.astype(jnp.float32)) for x in found.logits]
        return _detect(self.coder, found, probabilities, (height, width), 0.05, 0.5, 1000, 100)


SSD_STRIDES = (16, 32, 64, 107, 160, 320)
SSD_SIZES = (48, 100, 150, 202, 253, 304, 320)  # smallest anchor of each level, and the last one's largest


class SSDLite(nn.Module):
    """Boxes and classes at six scales, for images of 320 pixels (larger ones keep the anchors, as published).

    Children: `backbone`, `extra_{i}_{reduce, depthwise, pointwise}`, `{class, box}_{i}_{depthwise, out}`.
    """

    config: DetectorConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    coder = box.BoxCoder((0.1, 0.1, 0.2, 0.2))
    extras = (512, 256, 256, 128)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Detections:
        """float (B, height, width, channels), standardised, to what it says of 6 anchors a cell."""
        config = self.config
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        backbone = EMOv2Features(config.backbone, frozen_norms=config.pretrained, **options, name="backbone")
        maps = backbone(images, train)[2:]
        layer: Any = partial(ConvNorm, use_bias=False, epsilon=1e-3, momentum=0.03, **options)
        for i, width in enumerate(self.extras):
            x = nn.relu6(layer(width // 2, axes=("embed", "mlp"), name=f"extra_{i}_reduce")(maps[-1], train))
            depthwise = layer(
                width // 2, 3, 2, groups=width // 2, axes=(None, "mlp"), name=f"extra_{i}_depthwise"
            )  # fmt: skip
            x = nn.relu6(depthwise(x, train))
            maps.append(nn.relu6(layer(width, axes=("mlp", "embed"), name=f"extra_{i}_pointwise")(x, train)))
        found: dict[str, list[jax.Array]] = {"class": [], "box": []}
        anchors = []
        for i, x in enumerate(maps):
            for kind, numbers in (("class", config.num_classes + 1), ("box", 4)):
                width = x.shape[-1]
                y = nn.relu6(layer(width, 3, groups=width, name=f"{kind}_{i}_depthwise")(x, train))
                init = nn.initializers.normal(0.001)
                out = Conv(
                    6 * numbers, kernel_init=init, bias_init=nn.initializers.zeros_init(), axes=("embed", None),
                    **options, name=f"{kind}_{i}_out",
                )  # fmt: skip
                found[kind].append(out(y).reshape(x.shape[0], -1, numbers))
            cell = box.ssd_anchors(SSD_STRIDES[i], SSD_SIZES[i], SSD_SIZES[i + 1])
            anchors.append(jnp.asarray(box.grid_anchors(cell, x.shape[1], x.shape[2], SSD_STRIDES[i])))
        return Detections(found["class"], found["box"], anchors)

    def losses(self, found: Detections, boxes: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy and smooth L1, each (B,), a positive anchor of the batch.

        Of the negative anchors the three times as many count whose loss is largest. Arguments as of RetinaNet's.
        """
        anchors = jnp.concatenate(found.anchors)
        background = self.config.num_classes

        def of_image(
            logits: jax.Array, deltas: jax.Array, boxes: jax.Array, labels: jax.Array
        ) -> tuple[jax.Array, ...]:
            chosen = box.assign(anchors, boxes, labels, 0.5, 0.5, every_best=False)
            positive, index = chosen >= 0, jnp.maximum(chosen, 0)
            classes = jnp.where(positive, labels[index], background)
            entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), classes[:, None], axis=1)[:, 0]
            hardest = jnp.sort(jnp.where(positive, 0, entropy), descending=True)
            negatives = jnp.where(jnp.arange(len(hardest)) < 3 * positive.sum(), hardest, 0).sum()
            error = box.smooth_l1(deltas - self.coder.targets(anchors, boxes, chosen))
            box_loss = jnp.where(positive, error.sum(-1), 0).sum()
            return jnp.where(positive, entropy, 0).sum() + negatives, box_loss, jnp.maximum(positive.sum(), 1)

        logits, deltas = (jnp.concatenate(x, axis=1).astype(jnp.float32) for x in (found.logits, found.deltas))
        class_loss, box_loss, positives = jax.vmap(of_image)(logits, deltas, boxes, labels)
        return class_loss / positives.sum(), box_loss / positives.sum()

    def detect(self, found: Detections, height: int, width: int) -> Boxes:
        """At most 200 boxes an image of height x width: above 0.02, the best 1000 a level, suppressed at 0.45."""
        probabilities = [jax.nn.softmax(x.astype(jnp.float32))[..., :-1] for x in found.logits]
        return _detect(self.coder, found, probabilities, (height, width), 0.02, 0.45, 1000, 200)


class EMOv2MaskRCNN(Detector):
    """`zoo.backbones.mask_rcnn.MaskRCNN` on `EMOv2Features`; if pretrained, the latter is frozen as RetinaNet's."""

    config: FrozenConfig

    @nn.nowrap
    def backbone(self, **options: Any) -> nn.Module:
        """See the class."""
        return _features(self.config, **options)


def _detect(
    coder: box.BoxCoder,
    found: Detections,
    probabilities: Sequence[jax.Array],
    size: tuple[int, int],
    least: float,
    threshold: float,
    a_level: int,
    most: int,
) -> Boxes:
    def of_image(probabilities: Sequence[jax.Array], deltas: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        parts = []
        for scores, level, anchors in zip(probabilities, deltas, found.anchors, strict=True):
            flat = jnp.where(scores > least, scores, -jnp.inf).reshape(-1)
            best, where = jax.lax.top_k(flat, min(a_level, len(flat)))
            place, classes = jnp.divmod(where, scores.shape[1])
            decoded = coder.decode(anchors[place], level[place].astype(jnp.float32), *size)
            parts.append((decoded, best, classes.astype(jnp.int32)))
        boxes, scores, classes = (jnp.concatenate(x) for x in zip(*parts, strict=True))
        kept, valid = box.batched_nms(boxes, scores, classes, threshold, most)
        return boxes[kept], jnp.where(valid, scores[kept], 0), classes[kept], valid

    return Boxes(*jax.vmap(of_image)(list(probabilities), list(found.deltas)))


def example_inputs(config: DetectorConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`images` of normal values."""
    rng = np.random.default_rng(0)
    shape = (batch_size, *config.image_size, config.backbone.channels)
    return {"images": rng.standard_normal(shape, dtype=np.float32)}


def example_targets(config: DetectorConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`boxes` (B, 3, 4) float32 and `labels` (B, 3) int32, the last of them padding."""
    return box.example_targets(*config.image_size, config.num_classes, batch_size)


def loss(model: RetinaNet | SSDLite) -> Callable:
    """The loss of `zoo.train`: classes and boxes, summed over levels or images.

    The batch holds `images`, `boxes` (B, G, 4) in pixels and `labels` int (B, G), below 0 for padding. Metrics:
    "class_loss", "box_loss".
    """

    def loss_function(params, model_state, batch, rngs, train):
        variables = {"params": params, **model_state}
        found, model_state = model.apply(variables, batch["images"], train=train, rngs=rngs, mutable=list(model_state))
        class_loss, box_loss = (part.sum() for part in model.losses(found, batch["boxes"], batch["labels"]))
        return class_loss + box_loss, (model_state, {"class_loss": class_loss, "box_loss": box_loss})

    return loss_function

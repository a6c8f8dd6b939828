"""Mask R-CNN (He et al. 2017) with a feature pyramid, as MMDetection builds it, on any backbone of four maps.

B batch, R regions, K classes without the background; boxes are (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from zoo.weights.names import Rule, Transform, layer

STRIDES = (4, 8, 16, 32, 64)
_ANCHORS = 3
_FINEST = 56  # the square root of the area in pixels below twice which a region is read from the finest map


class Proposals(NamedTuple):
    """What the region proposal network says of all anchors, level by level, each in the order (row, column, anchor)."""

    scores: jax.Array  # (B, N) logits
    deltas: jax.Array  # (B, N, 4)
    anchors: jax.Array  # (N, 4)


class Regions(NamedTuple):
    """What the heads say of regions."""

    scores: jax.Array  # (B, R, K + 1) logits, the background last
    deltas: jax.Array  # (B, R, 4 K), class by class
    masks: jax.Array  # (B, R, 28, 28, K) logits


def roi_align(maps: Sequence[jax.Array], regions: jax.Array, size: int) -> jax.Array:
    """Averages of bilinear samples in size x size bins of each region, read from the map that suits its area.

    RoIAlign (He et al. 2017) with pixel centres at halves ("aligned") and ceil(side / size) samples a bin and side, as
    many as a map's pixels; the map is the one of stride 4 * 2^floor(log2(sqrt(area) / 56)), the finest or coarsest
    beyond. Bilinear samples and their averages are a product of one matrix a side, whatever the number of samples:
    region = rows map columns^T.

    Args:
      maps: (H, W, C) at strides 4, 8, ...
      regions: (R, 4) in pixels of the image.
      size: bins a side.

    Returns:
      (R, size, size, C).
    """
    area = (regions[:, 2] - regions[:, 0]) * (regions[:, 3] - regions[:, 1])
    level = jnp.clip(jnp.floor(jnp.log2(jnp.sqrt(area) / _FINEST + 1e-6)), 0, len(maps) - 1)
    parts = []
    for index, x in enumerate(maps):
        here = (level == index)[:, None, None]
        corners = regions / STRIDES[index] - 0.5
        rows = jnp.where(here, _samples(corners[:, 1], corners[:, 3], size, x.shape[0]), 0).astype(x.dtype)
        columns = jnp.where(here, _samples(corners[:, 0], corners[:, 2], size, x.shape[1]), 0).astype(x.dtype)
        parts.append(jnp.einsum("rih,hwc,rjw->rijc", rows, x, columns))
    return sum(parts[1:], parts[0])


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


class MaskRCNN(nn.Module):
    """Boxes, classes and masks of things.

    Children: `backbone`, `neck`, `rpn_conv`, `rpn_score`, `rpn_delta`, `box_fc_{i}`, `box_score`, `box_delta`,
    `mask_{i}`, `mask_upsample`, `mask_out`.

    Fields:
      backbone: (images, train) to maps at strides 4, 8, 16 and 32.
      num_classes: K.
      channels: of the pyramid and the heads.
    """

    backbone: nn.Module
    num_classes: int = 80
    channels: int = 256
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """See the class."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        zeros = nn.initializers.zeros_init()
        convolution: Any = partial(Conv, bias_init=zeros, **options)
        kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.neck = FeaturePyramid(self.channels, 4, **options)
        first = partial(convolution, kernel_init=nn.initializers.normal(0.01))
        self.rpn_conv = first(self.channels, 3)
        self.rpn_score = first(_ANCHORS, axes=("embed", None))
        self.rpn_delta = first(4 * _ANCHORS, axes=("embed", None))
        linear: Any = partial(dense, dtype=self.dtype, param_dtype=self.param_dtype, use_bias=True)
        xavier = nn.initializers.xavier_uniform()
        self.box_fc = [linear(1024, (None, "mlp"), kernel_init=xavier) for _ in range(2)]
        self.box_score = linear(self.num_classes + 1, ("mlp", None), kernel_init=nn.initializers.normal(0.01))
        self.box_delta = linear(4 * self.num_classes, ("mlp", None), kernel_init=nn.initializers.normal(0.001))
        self.mask = [convolution(self.channels, 3, kernel_init=kaiming) for _ in range(4)]
        self.mask_upsample = nn.ConvTranspose(
            self.channels, (2, 2), (2, 2), padding="VALID", **options,
            kernel_init=partitioned(kaiming, None, None, None, "embed"), bias_init=partitioned(zeros, "embed"),
        )  # fmt: skip
        self.mask_out = convolution(self.num_classes, kernel_init=kaiming, axes=("embed", None))

    def __call__(self, images: jax.Array, regions: jax.Array, train: bool = False) -> tuple[Proposals, Regions]:
        """What is proposed, and what the heads say of given regions.

        Args:
          images: float (B, height, width, channels), standardised.
          regions: (B, R, 4) in pixels.
          train: of the backbone.
        """
        if regions.ndim != 3 or regions.shape[0] != images.shape[0] or regions.shape[2] != 4:
            raise ValueError(f"regions must be (batch, regions, 4) for images {images.shape}, got {regions.shape}")
        maps = self.pyramid(images, train)
        return self.propose(maps), self.judge(maps, regions)

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

    def judge(self, maps: Sequence[jax.Array], regions: jax.Array) -> Regions:
        """Box and mask heads of regions (B, R, 4)."""
        scores, deltas = self.judge_boxes(maps, regions)
        return Regions(scores, deltas, self.judge_masks(maps, regions))

    def judge_boxes(self, maps: Sequence[jax.Array], regions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores (B, R, K + 1) and deltas (B, R, 4 K)."""
        x = jax.vmap(partial(roi_align, size=7))(list(maps[:4]), regions)
        x = x.reshape(*regions.shape[:2], math.prod(x.shape[2:]))
        for part in self.box_fc:
            x = nn.relu(part(x))
        return self.box_score(x), self.box_delta(x)

    def judge_masks(self, maps: Sequence[jax.Array], regions: jax.Array) -> jax.Array:
        """Logits (B, R, 28, 28, K)."""
        x = jax.vmap(partial(roi_align, size=14))(list(maps[:4]), regions)
        x = x.reshape(-1, *x.shape[2:])
        for part in self.mask:
            x = nn.relu(part(x))
        x = self.mask_out(nn.relu(self.mask_upsample(x)))
        return x.reshape(*regions.shape[:2], *x.shape[1:])


_PIXELS = 7 * 7  # that a region is read at, channels first in the published linear layer


def _region_forward(array: np.ndarray) -> np.ndarray:
    out, inputs = array.shape
    return array.reshape(out, inputs // _PIXELS, _PIXELS).transpose(2, 1, 0).reshape(inputs, out)


def _region_inverse(array: np.ndarray) -> np.ndarray:
    inputs, out = array.shape
    return array.reshape(_PIXELS, inputs // _PIXELS, out).transpose(2, 1, 0).reshape(out, inputs)


def weight_rules(path: str) -> list[Rule]:
    """MMDetection's names of all of a Mask R-CNN at a path but its backbone."""
    return [
        *layer("pointwise2d", r"neck\.lateral_convs\.(\d+)\.conv", path + "/neck/lateral_{0}"),
        *layer("conv2d", r"neck\.fpn_convs\.(\d+)\.conv", path + "/neck/output_{0}"),
        *layer("conv2d", r"rpn_head\.rpn_conv", path + "/rpn_conv"),
        *layer("pointwise2d", r"rpn_head\.rpn_cls", path + "/rpn_score"),
        *layer("pointwise2d", r"rpn_head\.rpn_reg", path + "/rpn_delta"),
        Rule(
            r"roi_head\.bbox_head\.shared_fcs\.0\.weight", f"params/{path}/box_fc_0/kernel",
            Transform(_region_forward, _region_inverse, 2),
        ),
        Rule(r"roi_head\.bbox_head\.shared_fcs\.0\.bias", f"params/{path}/box_fc_0/bias"),
        *layer("linear", r"roi_head\.bbox_head\.shared_fcs\.1", path + "/box_fc_1"),
        *layer("linear", r"roi_head\.bbox_head\.fc_cls", path + "/box_score"),
        *layer("linear", r"roi_head\.bbox_head\.fc_reg", path + "/box_delta"),
        *layer("conv2d", r"roi_head\.mask_head\.convs\.(\d+)\.conv", path + "/mask_{0}"),
        *layer("conv_transpose2d", r"roi_head\.mask_head\.upsample", path + "/mask_upsample"),
        *layer("pointwise2d", r"roi_head\.mask_head\.conv_logits", path + "/mask_out"),
    ]  # fmt: skip


def example_inputs(config: Any, batch_size: int) -> dict[str, np.ndarray]:
    """`images` of normal values, and two `regions` an image, for a config with `image_size` and a `backbone`."""
    height, width = config.image_size
    regions = np.array([[0, 0, width / 2, height / 2], [width / 4, height / 4, width, height]], np.float32)
    rng = np.random.default_rng(0)
    shape = (batch_size, height, width, config.backbone.channels)
    return {
        "images": rng.standard_normal(shape, dtype=np.float32),
        "regions": np.repeat(regions[None], batch_size, axis=0),
    }

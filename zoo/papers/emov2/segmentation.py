"""Semantic segmentation on an EMO, as MMSegmentation builds it: SegFormer's head, Semantic FPN, DeepLabv3, PSPNet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.conv_norm import ConvNorm
from zoo.layers.convolution import Conv
from zoo.layers.feature_pyramid import FeaturePyramid
from zoo.papers.emov2.model import EMOv2Config, EMOv2Features

Head = Literal["segformer", "semantic_fpn", "deeplabv3", "pspnet"]
IGNORED = 255  # the label of pixels that do not count


@dataclasses.dataclass(frozen=True)
class SegmenterConfig:
    """A network for semantic segmentation.

    Attributes:
      backbone: its window is 10 in all published ones.
      head: see the modules of that name.
      num_classes: logits.
      channels: of the head.
      dropout: of whole channels, before the classifier.
      image_size: height and width in pixels of example inputs; any others do.
    """

    backbone: EMOv2Config
    head: Head
    num_classes: int = 150
    channels: int = 256
    dropout: float = 0.1
    image_size: tuple[int, int] = (512, 512)

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {tuple(HEADS)}, got {self.head!r}")
        if self.num_classes < 1 or self.channels < 1:
            raise ValueError(f"num_classes and channels must be positive, got {self.num_classes}, {self.channels}")


class Segmentation(NamedTuple):
    """Logits of the head and, in training or where asked for, of the auxiliary head on c3."""

    logits: jax.Array  # (B, rows, columns, classes)
    auxiliary: jax.Array | None


def resize(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Bilinear, pixels as areas (align_corners False)."""
    return jax.image.resize(x, (x.shape[0], rows, columns, x.shape[3]), "linear", antialias=False)


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """(B, Y, X, C) to (B, size, size, C): means from floor(i Y / size) to ceil((i + 1) Y / size), as PyTorch."""

    def means(length: int) -> np.ndarray:
        i = np.arange(size)[:, None]
        inside = (np.arange(length) >= i * length // size) & (np.arange(length) < -(-(i + 1) * length // size))
        return (inside / inside.sum(1, keepdims=True)).astype(np.float32)

    rows, columns = means(x.shape[1]), means(x.shape[2])
    return jnp.einsum("iy,jx,byxc->bijc", rows, columns, x, precision="highest").astype(x.dtype)


class _Classifier(nn.Module):
    """What all heads end on: dropout of channels and a 1 x 1 convolution."""

    config: SegmenterConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dropout(self.config.dropout, broadcast_dims=(1, 2))(x, deterministic=not train)
        return Conv(
            self.config.num_classes, kernel_init=nn.initializers.normal(0.01),
            bias_init=nn.initializers.zeros_init(), axes=("embed", None), dtype=self.dtype,
            param_dtype=self.param_dtype, name="out",
        )(x)  # fmt: skip


class _Head(nn.Module):
    config: SegmenterConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def layer(self, x: jax.Array, train: bool, size: int, name: str, dilation: int = 1) -> jax.Array:
        """A convolution to the head's channels, batch norm, ReLU."""
        convolution = ConvNorm(
            self.config.channels, size, use_bias=False, dilation=dilation, dtype=self.dtype,
            param_dtype=self.param_dtype, name=name,
        )  # fmt: skip
        return nn.relu(convolution(x, train))

    def classify(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits."""
        return _Classifier(self.config, self.dtype, self.param_dtype, name="classifier")(x, train)


class SegFormerHead(_Head):
    """Xie et al. 2021: all four maps to one width and to c1's size, side by side, mixed by a 1 x 1 convolution."""

    @nn.compact
    def __call__(self, maps: list[jax.Array], train: bool = False) -> jax.Array:
        """[c1, c2, c3, c4] to logits of c1's size."""
        size = maps[0].shape[1:3]
        parts = [resize(self.layer(x, train, 1, f"level_{i}"), *size) for i, x in enumerate(maps)]
        return self.classify(self.layer(jnp.concatenate(parts, axis=-1), train, 1, "fusion"), train)


class SemanticFPN(_Head):
    """Kirillov et al. 2019: a feature pyramid of 256 channels, each level brought to c1's size step by step, added."""

    pyramid_channels: int = 256

    @nn.compact
    def __call__(self, maps: list[jax.Array], train: bool = False) -> jax.Array:
        """[c1, c2, c3, c4] to logits of c1's size."""
        neck = FeaturePyramid(self.pyramid_channels, 4, self.dtype, self.param_dtype, name="neck")
        total: Any = 0
        for i, x in enumerate(neck(maps)):
            for step in range(max(i, 1)):
                x = self.layer(x, train, 3, f"level_{i}_{step}")
                if i:
                    x = resize(x, 2 * x.shape[1], 2 * x.shape[2])
            total = total + (resize(x, *maps[0].shape[1:3]) if x.shape[1:3] != maps[0].shape[1:3] else x)
        return self.classify(total, train)


class ASPPHead(_Head):
    """DeepLabv3 (Chen et al. 2017): c4 through convolutions of several dilations and a mean, side by side."""

    dilations: tuple[int, ...] = (1, 12, 24, 36)

    @nn.compact
    def __call__(self, maps: list[jax.Array], train: bool = False) -> jax.Array:
        """[..., c4] to logits of c4's size."""
        x = maps[-1]
        pooled = self.layer(x.mean(axis=(1, 2), keepdims=True), train, 1, "pooled")
        parts = [jnp.broadcast_to(pooled, (*x.shape[:3], pooled.shape[-1]))]
        for i, dilation in enumerate(self.dilations):
            parts.append(self.layer(x, train, 1 if dilation == 1 else 3, f"dilated_{i}", dilation))
        return self.classify(self.layer(jnp.concatenate(parts, axis=-1), train, 3, "bottleneck"), train)


class PSPHead(_Head):
    """PSPNet (Zhao et al. 2017): c4 beside its means over 1, 2 x 2, 3 x 3 and 6 x 6 areas."""

    scales: tuple[int, ...] = (1, 2, 3, 6)

    @nn.compact
    def __call__(self, maps: list[jax.Array], train: bool = False) -> jax.Array:
        """[..., c4] to logits of c4's size."""
        x = maps[-1]
        parts = [x]
        for i, scale in enumerate(self.scales):
            parts.append(resize(self.layer(adaptive_average_pool(x, scale), train, 1, f"scale_{i}"), *x.shape[1:3]))
        return self.classify(self.layer(jnp.concatenate(parts, axis=-1), train, 3, "bottleneck"), train)


class FCNHead(_Head):
    """Long et al. 2015, of one convolution: the auxiliary head, on c3."""

    @nn.compact
    def __call__(self, maps: list[jax.Array], train: bool = False) -> jax.Array:
        """[..., c3, c4] to logits of c3's size."""
        return self.classify(self.layer(maps[-2], train, 3, "convolution"), train)


HEADS: dict[str, type[_Head]] = {
    "segformer": SegFormerHead, "semantic_fpn": SemanticFPN, "deeplabv3": ASPPHead, "pspnet": PSPHead,
}  # fmt: skip
WITH_AUXILIARY = ("deeplabv3", "pspnet")


class Segmenter(nn.Module):
    """Backbone and head. Children: `backbone`, `head`, and for DeepLabv3 and PSPNet `auxiliary`."""

    config: SegmenterConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Segmentation:
        """float (B, height, width, channels), standardised, to logits of the head's size, before the last resizing."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        maps = EMOv2Features(config.backbone, **options, name="backbone")(images, train)
        logits = HEADS[config.head](config, **options, name="head")(maps, train)
        auxiliary = None
        if config.head in WITH_AUXILIARY:
            auxiliary = FCNHead(dataclasses.replace(config, channels=256), **options, name="auxiliary")(maps, train)
        return Segmentation(logits, auxiliary)


def example_inputs(config: SegmenterConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`images` of normal values."""
    rng = np.random.default_rng(0)
    shape = (batch_size, *config.image_size, config.backbone.channels)
    return {"images": rng.standard_normal(shape, dtype=np.float32)}


def example_targets(config: SegmenterConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`labels`, (B, height, width) int32."""
    rng = np.random.default_rng(1)
    return {"labels": rng.integers(0, config.num_classes, (batch_size, *config.image_size)).astype(np.int32)}


def segmentation_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of logits resized to the labels, summed over pixels that count and divided by the number of all.

    Args:
      logits: (B, rows, columns, C).
      labels: int (B, height, width), IGNORED (255) for pixels that do not count.
    """
    logits = resize(logits.astype(jnp.float32), *labels.shape[1:])
    counts = labels != IGNORED
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(counts, labels, 0)[..., None], axis=-1)
    return -jnp.where(counts, chosen[..., 0], 0).mean()


def loss(model: Segmenter, auxiliary: float = 0.4) -> Callable:
    """The loss of `zoo.train`: `segmentation_loss`, and `auxiliary` times that of the auxiliary head.

    The batch holds `images` and `labels`, int (B, height, width). Metrics: "accuracy" of the pixels that count.
    """

    def loss_function(params, model_state, batch, rngs, train):
        variables = {"params": params, **model_state}
        found, model_state = model.apply(variables, batch["images"], train=train, rngs=rngs, mutable=list(model_state))
        labels = batch["labels"]
        value = segmentation_loss(found.logits, labels)
        if found.auxiliary is not None:
            value += auxiliary * segmentation_loss(found.auxiliary, labels)
        counts = labels != IGNORED
        right = jnp.argmax(resize(found.logits, *labels.shape[1:]), axis=-1) == labels
        return value, (model_state, {"accuracy": jnp.sum(right & counts) / jnp.maximum(counts.sum(), 1)})

    return loss_function

"""Heads of semantic segmentation as MMSegmentation has them: SegFormer's, Semantic FPN, DeepLabv3, PSPNet, UPerNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.conv_norm import ConvNorm
from zoo.layers.convolution import Conv
from zoo.layers.feature_pyramid import FeaturePyramid
from zoo.layers.resizing import adaptive_average_pool, resize
from zoo.weights.names import Rule, layer

IGNORED = 255  # the label of pixels that do not count


class Segmentation(NamedTuple):
    """Logits of the head and, in training or where asked for, of the auxiliary head on c3."""

    logits: jax.Array  # (B, rows, columns, classes)
    auxiliary: jax.Array | None


class HeadConfig(Protocol):
    """What a head reads of its network's config."""

    @property
    def num_classes(self) -> int:
        """Logits."""

    @property
    def channels(self) -> int:
        """Of the head."""

    @property
    def dropout(self) -> float:
        """Of whole channels, before the classifier."""


class _Classifier(nn.Module):
    """What all heads end on: dropout of channels and a 1 x 1 convolution."""

    config: HeadConfig
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
    config: HeadConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def layer(self, x: jax.Array, train: bool, size: int, name: str, dilation: int = 1) -> jax.Array:
        """A convolution to the head's channels, batch norm, ReLU."""
        convolution = ConvNorm(
            self.config.channels, size, use_bias=False, dilation=dilation, dtype=self.dtype,
            param_dtype=self.param_dtype, name=name,
        )  # fmt: skip
        return nn.relu(convolution(x, train))

    def pooled(self, x: jax.Array, train: bool, scales: tuple[int, ...]) -> jax.Array:
        """A map beside its means over coarse grids, mixed."""
        parts = [x]
        for i, scale in enumerate(scales):
            parts.append(resize(self.layer(adaptive_average_pool(x, scale), train, 1, f"scale_{i}"), *x.shape[1:3]))
        return self.layer(jnp.concatenate(parts, axis=-1), train, 3, "bottleneck")

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
        return self.classify(self.pooled(maps[-1], train, self.scales), train)


class UPerHead(_Head):
    """UPerNet (Xiao et al. 2018): PSPNet's means of c4, handed down a feature pyramid, all levels side by side."""

    scales: tuple[int, ...] = (1, 2, 3, 6)

    @nn.compact
    def __call__(self, maps: list[jax.Array], train: bool = False) -> jax.Array:
        """[c1, c2, c3, c4] to logits of c1's size."""
        levels = [self.layer(x, train, 1, f"lateral_{i}") for i, x in enumerate(maps[:-1])]
        levels.append(self.pooled(maps[-1], train, self.scales))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] += resize(levels[i], *levels[i - 1].shape[1:3])
        parts = [self.layer(x, train, 3, f"level_{i}") for i, x in enumerate(levels[:-1])] + [levels[-1]]
        parts = [resize(x, *maps[0].shape[1:3]) for x in parts]
        return self.classify(self.layer(jnp.concatenate(parts, axis=-1), train, 3, "fusion"), train)


class FCNHead(_Head):
    """Long et al. 2015, of one convolution: the auxiliary head, on c3."""

    @nn.compact
    def __call__(self, maps: list[jax.Array], train: bool = False) -> jax.Array:
        """[..., c3, c4] to logits of c3's size."""
        return self.classify(self.layer(maps[-2], train, 3, "convolution"), train)


def example_inputs(config: Any, batch_size: int) -> dict[str, np.ndarray]:
    """`images` of normal values, for a config with `image_size` and a `backbone`."""
    rng = np.random.default_rng(0)
    shape = (batch_size, *config.image_size, config.backbone.channels)
    return {"images": rng.standard_normal(shape, dtype=np.float32)}


def example_targets(config: Any, batch_size: int) -> dict[str, np.ndarray]:
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


def loss(model: nn.Module, auxiliary: float = 0.4) -> Callable:
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


def _conv_norm(kind: str, published: str, path: str) -> list[Rule]:
    return [
        *layer(kind, rf"{published}\.conv", f"{path}/conv"),
        *layer("batch_norm", rf"{published}\.bn", f"{path}/norm"),
    ]


def upernet_rules(path: str) -> list[Rule]:
    """MMSegmentation's names of a `UPerHead` at a path."""
    return [
        *_conv_norm("pointwise2d", r"decode_head\.psp_modules\.(\d+)\.1", path + "/scale_{0}"),
        *_conv_norm("conv2d", r"decode_head\.bottleneck", path + "/bottleneck"),
        *_conv_norm("pointwise2d", r"decode_head\.lateral_convs\.(\d+)", path + "/lateral_{0}"),
        *_conv_norm("conv2d", r"decode_head\.fpn_convs\.(\d+)", path + "/level_{0}"),
        *_conv_norm("conv2d", r"decode_head\.fpn_bottleneck", path + "/fusion"),
        *layer("pointwise2d", r"decode_head\.conv_seg", path + "/classifier/out"),
    ]


def auxiliary_rules(path: str) -> list[Rule]:
    """MMSegmentation's names of an `FCNHead` at a path."""
    return [
        *_conv_norm("conv2d", r"auxiliary_head\.convs\.0", path + "/convolution"),
        *layer("pointwise2d", r"auxiliary_head\.conv_seg", path + "/classifier/out"),
    ]

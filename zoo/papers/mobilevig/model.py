"""MobileViG: inverted residuals on large maps, sparse graphs of pixels on the last, small one.

B batch, H x W pixels of a map, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.backbones.mask_rcnn import Detector, FrozenConfig
from zoo.layers.conv_norm import ConvNorm
from zoo.layers.convolution import Conv
from zoo.layers.drop_path import DropPath
from zoo.layers.mlp import PLAIN
from zoo.papers.mobilevig.graph import knn_aggregate, svga_aggregate

_gelu = PLAIN["gelu"]
_KAIMING = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_INIT: dict[str, Any] = {"kernel_init": _KAIMING, "bias_init": nn.initializers.zeros_init()}


@dataclasses.dataclass(frozen=True)
class MobileViGConfig:
    """A MobileViG.

    Attributes:
      depths, widths: inverted residuals and channels of the three local stages.
      global_depth, global_width: blocks of graph and feed-forward network, and their channels.
      embedding: channels of the pooled vector before the heads.
      hop: K, every how many pixels of a row and a column a pixel has a neighbour.
      mlp_ratio: hidden channels over C, of inverted residuals and feed-forward networks.
      num_classes: logits.
      distillation: whether there is a second head, taught by a teacher.
      drop_path_rate: of the last block; the first one's is 0, and between them it rises linearly.
      layer_scale: its initial value, in inverted residuals.
      channels: of the images.
      image_size: height and width in pixels of the published recipe; any other will do.
    """

    depths: tuple[int, int, int] = (2, 2, 6)
    widths: tuple[int, int, int] = (42, 84, 168)
    global_depth: int = 2
    global_width: int = 256
    embedding: int = 512
    hop: int = 2
    mlp_ratio: int = 4
    num_classes: int = 1000
    distillation: bool = True
    drop_path_rate: float = 0.1
    layer_scale: float = 1e-5
    channels: int = 3
    image_size: tuple[int, int] = (224, 224)

    def __post_init__(self) -> None:
        for name in ("depths", "widths"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} must have one number a local stage, three, got {getattr(self, name)}")
        if min(self.depths) < 0 or min(self.widths) < 1 or self.widths[0] % 2:
            raise ValueError(
                f"depths must not be negative, widths positive and the first even, got {self.depths}, {self.widths}"
            )
        if self.global_depth < 0:
            raise ValueError(f"global_depth must not be negative, got {self.global_depth}")
        for name in ("global_width", "embedding", "hop", "mlp_ratio", "num_classes", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size must be a height and a width in pixels, got {self.image_size}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}")


class _Block(nn.Module):
    """What blocks have in common. With `frozen` batch norms are those of evaluation, in training too."""

    drop_path: float = 0.0
    frozen: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def layer(self, x: jax.Array, train: bool, width: int, name: str, **options: Any) -> jax.Array:
        """A `ConvNorm` as all of this network are."""
        module = ConvNorm(width, dtype=self.dtype, param_dtype=self.param_dtype, **_INIT, **options, name=name)
        return module(x, train and not self.frozen)

    @nn.nowrap
    def drop(self, x: jax.Array, train: bool) -> jax.Array:
        """Stochastic depth of the branch."""
        return DropPath(self.drop_path)(x, deterministic=not train)


class InvertedResidual(_Block):
    """x + scale * project(gelu(depthwise(gelu(expand(x))))), a batch norm behind each convolution."""

    ratio: int = 4
    layer_scale: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(B, H, W, C) to the same shape."""
        width = x.shape[-1]
        hidden = self.ratio * width
        y = _gelu(self.layer(x, train, hidden, "expand", axes=("embed", "mlp")))
        y = _gelu(self.layer(y, train, hidden, "depthwise", kernel_size=3, groups=hidden, axes=(None, "mlp")))
        y = self.layer(y, train, width, "project", layer_scale=self.layer_scale, axes=("mlp", "embed"))
        return x + self.drop(y, train)


class Grapher(_Block):
    """x + leave(gelu(graph([y, m]))) with y = enter(x) and m = `aggregate`(y), the largest difference to neighbours."""

    hop: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(B, H, W, C) to the same shape."""
        width = x.shape[-1]
        y = self.layer(x, train, width, "enter", axes=("embed", "mlp"))
        y = jnp.concatenate([y, self.aggregate(y)], axis=-1)
        y = _gelu(self.layer(y, train, 2 * width, "graph", axes=(None, "mlp")))
        return x + self.drop(self.layer(y, train, width, "leave", axes=("mlp", "embed")), train)

    @nn.nowrap
    def aggregate(self, y: jax.Array) -> jax.Array:
        """(B, H, W, C) to the same shape."""
        return svga_aggregate(y, self.hop)


class KNNGrapher(Grapher):
    """The baseline: a graph of nearest neighbours, found anew for every image (at most as many as there are pixels)."""

    neighbours: int = 9

    @nn.nowrap
    def aggregate(self, y: jax.Array) -> jax.Array:
        """(B, H, W, C) to the same shape."""
        return knn_aggregate(y, min(self.neighbours, y.shape[1] * y.shape[2]))


class FeedForward(_Block):
    """x + project(gelu(expand(x)))."""

    ratio: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(B, H, W, C) to the same shape."""
        y = _gelu(self.layer(x, train, self.ratio * x.shape[-1], "expand", axes=("embed", "mlp")))
        return x + self.drop(self.layer(y, train, x.shape[-1], "project", axes=("mlp", "embed")), train)


class MobileViGFeatures(nn.Module):
    """The body: stem, three stages of inverted residuals, one of graphs; the backbone of dense prediction.

    Children: `stem_{i}`, `local_{i}` (inverted residuals and, between stages, downsamplings, numbered through as the
    published ones are), `graph_{i}`, `ffn_{i}`.

    Fields:
      frozen: batch norms are those of evaluation in training too, as when fine-tuning a detector.
      grapher: the module of `graph_{i}`.
    """

    config: MobileViGConfig
    frozen: bool = False
    grapher: Callable[..., nn.Module] = Grapher
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """float (B, height, width, channels) of any size to maps [c1, c2, c3, c4] at strides 4, 8, 16 and 32.

        Raises:
          ValueError, TypeError: the images' shape or dtype is wrong.
        """
        config = self.config
        _check_images(images, config.channels)
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        block: dict[str, Any] = {"frozen": self.frozen, **options}
        half: Any = partial(ConvNorm, kernel_size=3, stride=2, **_INIT, **options)
        learn = train and not self.frozen
        rates = iter(np.linspace(0, config.drop_path_rate, max(sum(config.depths) + config.global_depth, 1)).tolist())
        x = _gelu(half(config.widths[0] // 2, name="stem_0")(images, learn))
        x = _gelu(half(config.widths[0], axes=("embed", "mlp"), name="stem_1")(x, learn))
        maps, index = [], 0
        for depth, width in zip(config.depths, (*config.widths[1:], config.global_width), strict=True):
            for _ in range(depth):
                x = InvertedResidual(
                    next(rates), ratio=config.mlp_ratio, layer_scale=config.layer_scale, **block, name=f"local_{index}"
                )(x, train)  # fmt: skip
                index += 1
            maps.append(x)
            x = half(width, axes=("embed", "mlp"), name=f"local_{index}")(x, learn)
            index += 1
        for index in range(config.global_depth):
            rate = next(rates)
            x = self.grapher(rate, hop=config.hop, **block, name=f"graph_{index}")(x, train)
            x = FeedForward(rate, ratio=config.mlp_ratio, **block, name=f"ffn_{index}")(x, train)
        return [*maps, x]


class MobileViG(nn.Module):
    """The classifier.

    `apply(fold(variables), images)` (`zoo.layers.conv_norm.fold`) is the same function without batch norms.

    Children: `body` (`MobileViGFeatures`), `embed`, `head` and, with distillation, `dist_head`.
    """

    config: MobileViGConfig
    grapher: Callable[..., nn.Module] = Grapher
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """See the class."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.body = MobileViGFeatures(config, grapher=self.grapher, **options)
        self.embed = ConvNorm(config.embedding, axes=("embed", "mlp"), **_INIT, **options)
        head = partial(Conv, config.num_classes, axes=("mlp", None), **_INIT, **options)
        self.head = head()
        if config.distillation:
            self.dist_head = head()

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits.

        Args:
          images: float (B, height, width, channels), of any size, standardised as the weights expect.
          train: use the batch's statistics ("batch_stats" must be mutable) and drop paths (rng "dropout").

        Returns:
          (B, num_classes): in evaluation the mean of both heads, in training a pair, head and dist_head; without
          distillation the only head's.

        Raises:
          ValueError, TypeError: the images' shape or dtype is wrong.
        """
        return self.classify(self.body(images, train)[-1], train)

    def classify(self, x: jax.Array, train: bool = False) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits, as of the whole network, of its last map (B, H, W, C)."""
        x = _gelu(self.embed(x.mean(axis=(1, 2)), train))
        if not self.config.distillation:
            return self.head(x)
        logits = self.head(x), self.dist_head(x)
        return logits if train else (logits[0] + logits[1]) / 2

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """The last maps of the four stages, (B, H, W, C) at strides 4, 8, 16 and 32."""
        return self.body(images, train)


class MobileViGMaskRCNN(Detector):
    """`zoo.backbones.mask_rcnn.MaskRCNN` on `MobileViGFeatures`, whose norms keep their statistics if pretrained."""

    config: FrozenConfig

    @nn.nowrap
    def backbone(self, **options: Any) -> nn.Module:
        """See the class."""
        return MobileViGFeatures(self.config.backbone, self.config.pretrained, **options)


def _check_images(images: jax.Array, channels: int) -> None:
    if images.ndim != 4 or images.shape[-1] != channels or 0 in images.shape:
        raise ValueError(f"images must be (batch, height, width, {channels}), got {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images must be floating point and normalised, got {images.dtype}")


def example_inputs(config: MobileViGConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`images` of normal values."""
    rng = np.random.default_rng(0)
    return {"images": rng.standard_normal((batch_size, *config.image_size, config.channels), dtype=np.float32)}

"""EfficientFormer: blocks on maps, then blocks on tokens; for classification, and as a backbone of dense prediction.

B batch, H x W pixels of a map, N = H W tokens, C channels.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels import attention
from zoo.backbones.mask_rcnn import Detector, DetectorConfig
from zoo.layers.conv_norm import ConvNorm, LayerScale
from zoo.layers.convolution import average_pool
from zoo.layers.drop_path import DropPath
from zoo.layers.mlp import PLAIN
from zoo.layers.norms import norm
from zoo.layers.offset_bias import OffsetBias
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.resizing import resize_bicubic

_LINEAR_INIT = nn.initializers.truncated_normal(0.02)
_ZEROS = nn.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class EfficientFormerConfig:
    """An EfficientFormer.

    Attributes:
      depths, widths: blocks and channels of the four stages.
      vit_num: how many of the last blocks of stage 4 are on tokens (MB3D); those before are on maps (MB4D).
      stage3_vit_num: the same of stage 3, which the published networks leave at 0 and the search may not.
      num_classes: logits.
      distillation: whether there is a second head, taught by a teacher.
      image_size: height and width in pixels that the table of attention biases is made for; others interpolate it.
      channels: of the images.
      heads, key_dim, value_dim: of the attention; widths are of one head, whatever C is.
      mlp_ratio: hidden channels over C.
      layer_scale: its initial value.
      drop_path_rate: of the last block; the first one's is 0, and between them it rises linearly.
    """

    depths: tuple[int, int, int, int] = (3, 2, 6, 4)
    widths: tuple[int, int, int, int] = (48, 96, 224, 448)
    vit_num: int = 1
    stage3_vit_num: int = 0
    num_classes: int = 1000
    distillation: bool = True
    image_size: tuple[int, int] = (224, 224)
    channels: int = 3
    heads: int = 8
    key_dim: int = 32
    value_dim: int = 128
    mlp_ratio: int = 4
    layer_scale: float = 1e-5
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("depths", "widths"):
            if len(getattr(self, name)) != 4:
                raise ValueError(f"{name} must have one number a stage, four, got {getattr(self, name)}")
        if min(self.depths) < 0 or min(self.widths) < 1 or self.widths[0] % 2:
            raise ValueError(
                f"depths must not be negative, widths positive and the first even, got {self.depths}, {self.widths}"
            )
        for name, stage in (("vit_num", 3), ("stage3_vit_num", 2)):
            if not 0 <= getattr(self, name) <= self.depths[stage]:
                raise ValueError(f"{name} must be in 0 .. {self.depths[stage]}, got {getattr(self, name)}")
        for name in ("num_classes", "channels", "heads", "key_dim", "value_dim", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size must be a height and a width in pixels, got {self.image_size}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}")

    def token_blocks(self, stage: int) -> int:
        """How many of a stage's last blocks are on tokens."""
        return (0, 0, self.stage3_vit_num, self.vit_num)[stage]

    def grid(self, stage: int) -> tuple[int, int]:
        """Rows and columns of a stage's map at `image_size`: four, eight, 16 or 32 pixels to a cell, rounded up."""
        rows, columns = (-(-size // (4 << stage)) for size in self.image_size)
        return rows, columns


@dataclasses.dataclass(frozen=True)
class DenseConfig(EfficientFormerConfig):
    """The backbone of detection and segmentation: no heads, and a bias table for a grid of its own."""

    image_size: tuple[int, int] = (800, 800)  # 25 x 25 cells


class Meta4D(nn.Module):
    """A block on maps (MB4D): pooling mixes pixels, two 1x1 convolutions mix channels.

    x = x + s1 (pool(x) - x);  x = x + s2 mlp(x): no norm before either, each convolution has a batch norm behind it.
    """

    config: EfficientFormerConfig
    drop_path: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(B, H, W, C) to the same shape."""
        config, width = self.config, x.shape[-1]
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        convolution = {"kernel_init": _LINEAR_INIT, "bias_init": _ZEROS, **options}
        drop = DropPath(self.drop_path)
        mixed = LayerScale(config.layer_scale, **options, name="pool_scale")(average_pool(x) - x)
        x = x + drop(mixed, deterministic=not train)
        y = ConvNorm(config.mlp_ratio * width, axes=("embed", "mlp"), **convolution, name="expand")(x, train)
        y = ConvNorm(
            width, layer_scale=config.layer_scale, axes=("mlp", "embed"), **convolution, name="project"
        )(PLAIN["gelu"](y), train)  # fmt: skip
        return x + drop(y, deterministic=not train)


class Attention(nn.Module):
    """Attention whose values are four times as wide as its keys, with a bias by distance.

    One projection gives, head by head, a query, a key and a value. Child `bias` is the table for `grid`; with `dense`
    it is resized as the published backbone does: not by distance, but the whole (N, N) matrix like an image.
    """

    config: EfficientFormerConfig
    grid: tuple[int, int]
    dense: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """(B, N, C) tokens of a `grid`, row by row, to the heads' outputs side by side (B, N, heads value_dim)."""
        config, (batch, tokens, _) = self.config, x.shape
        key_dim, value_dim = config.key_dim, config.value_dim
        qkv = dense(
            config.heads * (2 * key_dim + value_dim), ("embed", "heads"), kernel_init=_LINEAR_INIT, dtype=self.dtype,
            param_dtype=self.param_dtype, name="qkv",
        )(x)  # fmt: skip
        qkv = qkv.reshape(batch, tokens, config.heads, -1)
        query, key, value = jnp.split(qkv, (key_dim, 2 * key_dim), axis=-1)
        table = OffsetBias(config.heads, self.grid, self.param_dtype, name="bias")
        if self.dense:
            bias = resize_bicubic(resize_bicubic(table(self.grid), tokens, 1), tokens, 2)
        else:
            bias = table(grid)
        out: Any = attention(query, key, value, bias=bias[None])
        return out.reshape(batch, tokens, -1)


class Meta3D(nn.Module):
    """A block on tokens (MB3D), a Transformer's with layer scales.

    x = x + s1 attention(norm(x));  x = x + s2 mlp(norm(x)).
    """

    config: EfficientFormerConfig
    grid: tuple[int, int]
    dense: bool = False
    drop_path: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int], train: bool) -> jax.Array:
        """(B, N, C) tokens of a `grid` to the same shape."""
        config, width = self.config, x.shape[-1]
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        linear: Any = partial(ConvNorm, kernel_init=_LINEAR_INIT, bias_init=_ZEROS, norm=False, **options)
        normalise = partial(norm, "layer", epsilon=1e-5, **options)
        drop = DropPath(self.drop_path)
        y = Attention(config, self.grid, self.dense, **options, name="attention")(normalise(name="norm1")(x), grid)
        y = linear(width, layer_scale=config.layer_scale, axes=("heads", "embed"), name="out")(y, train)
        x = x + drop(y, deterministic=not train)
        y = linear(config.mlp_ratio * width, axes=("embed", "mlp"), name="expand")(normalise(name="norm2")(x), train)
        y = PLAIN["gelu"](y)
        y = linear(width, layer_scale=config.layer_scale, axes=("mlp", "embed"), name="project")(y, train)
        return x + drop(y, deterministic=not train)


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with batch norm and ReLU: an image to a map of a quarter of its size."""

    width: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """(B, H, W, channels) to (B, ceil(H / 4), ceil(W / 4), width)."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.relu(ConvNorm(self.width // 2, 3, stride=2, **options, name="conv_0")(images, train))
        return nn.relu(ConvNorm(self.width, 3, stride=2, axes=("embed", "mlp"), **options, name="conv_1")(x, train))


class Trunk(nn.Module):
    """Stem and four stages. A map becomes tokens once, before the first block that needs them.

    Children: `stem`, `stage_{s}_block_{i}`, `down_{s}` between stages s and s + 1.
    """

    config: EfficientFormerConfig
    dense: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> list[jax.Array]:
        """(B, H, W, channels) to the four stages' maps, or tokens (B, N, C) where a stage ends on them."""
        config = self.config
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        last = max(sum(config.depths) - 1, 1)
        x = Stem(config.widths[0], **options, name="stem")(images, train)
        outputs, count = [], 0
        for stage, depth in enumerate(config.depths):
            if stage:
                x = ConvNorm(
                    config.widths[stage], 3, stride=2, axes=("embed", "mlp"), **options, name=f"down_{stage - 1}"
                )(x, train)  # fmt: skip
            grid = (x.shape[1], x.shape[2])
            for index in range(depth):
                rate, name = config.drop_path_rate * count / last, f"stage_{stage}_block_{index}"
                if index < depth - config.token_blocks(stage):
                    x = Meta4D(config, rate, **options, name=name)(x, train)
                else:
                    x = x.reshape(x.shape[0], grid[0] * grid[1], x.shape[-1])
                    x = Meta3D(config, config.grid(stage), self.dense, rate, **options, name=name)(x, grid, train)
                count += 1
            outputs.append(x)
            if stage < 3 or self.dense:
                x = outputs[-1] = x.reshape(x.shape[0], *grid, x.shape[-1])
        return outputs


def check_images(images: jax.Array, channels: int) -> None:
    """Raises ValueError or TypeError unless images are float (batch, height, width, channels), not empty."""
    if images.ndim != 4 or images.shape[-1] != channels or 0 in images.shape:
        raise ValueError(f"images must be (batch, height, width, {channels}), got {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images must be floating point and normalised, got {images.dtype}")


class EfficientFormer(nn.Module):
    """The classifier.

    `apply(fold(variables), images)` (`zoo.layers.conv_norm.fold`) is the same function without batch norms.

    Children: those of `Trunk` under `trunk`, `norm`, `head` and, with distillation, `dist_head`.
    """

    config: EfficientFormerConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """See the class."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.trunk = Trunk(self.config, **options)
        self.norm = norm("layer", epsilon=1e-5, **options)
        head = partial(dense, self.config.num_classes, ("embed", None), kernel_init=_LINEAR_INIT, **options)
        self.head = head()
        if self.config.distillation:
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
        x = self.features(images, train)[-1]
        x = self.norm(x.reshape(x.shape[0], -1, x.shape[-1])).mean(axis=1)
        if not self.config.distillation:
            return self.head(x)
        logits = self.head(x), self.dist_head(x)
        return logits if train else (logits[0] + logits[1]) / 2

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """The four stages' outputs, maps (B, H, W, C) at strides 4, 8 and 16, and what stage 4 ends on: tokens."""
        check_images(images, self.config.channels)
        return self.trunk(images, train)


class EfficientFormerDense(nn.Module):
    """The backbone of dense prediction: four maps, each through a norm of all its values (GroupNorm of one group)."""

    config: DenseConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """float (B, height, width, channels) of any size to maps [c1, c2, c3, c4] at strides 4, 8, 16 and 32.

        Raises:
          ValueError, TypeError: the images' shape or dtype is wrong.
        """
        check_images(images, self.config.channels)
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        maps = Trunk(self.config, dense=True, **options, name="trunk")(images, train)
        return [
            nn.GroupNorm(
                1, epsilon=1e-5, use_fast_variance=False, **options, name=f"norm_{stage}",
                scale_init=partitioned(nn.initializers.ones_init(), "embed"),
                bias_init=partitioned(_ZEROS, "embed"),
            )(x)
            for stage, x in enumerate(maps)
        ]  # fmt: skip


class EfficientFormerMaskRCNN(Detector):
    """`zoo.backbones.mask_rcnn.MaskRCNN` on `EfficientFormerDense`, all of which is trained, batch norms too."""

    config: DetectorConfig

    @nn.nowrap
    def backbone(self, **options: Any) -> nn.Module:
        """See the class."""
        return EfficientFormerDense(self.config.backbone, **options)


def example_inputs(config: EfficientFormerConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`images` of normal values; of 64 pixels' height and width for the dense backbone, which takes any."""
    size = (64, 64) if isinstance(config, DenseConfig) else config.image_size
    rng = np.random.default_rng(0)
    return {"images": rng.standard_normal((batch_size, *size, config.channels), dtype=np.float32)}

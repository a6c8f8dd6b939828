"""EfficientNet (Tan and Le 2019), B0 to B7, as a feature pyramid.

B batch, H x W pixels of a map, C channels. Convolutions are padded as TensorFlow does ("same"): to ceil(size / stride),
the smaller half above and to the left, whatever the size.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.layers.conv_norm import ConvNorm
from zoo.layers.convolution import Conv
from zoo.weights.names import Rule, layer, under

# repeats, kernel, stride, expansion, channels in and out, of B0.
_STAGES = (
    (1, 3, 1, 1, 32, 16), (2, 3, 2, 6, 16, 24), (2, 5, 2, 6, 24, 40), (3, 3, 2, 6, 40, 80), (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192), (1, 3, 1, 6, 192, 320),
)  # fmt: skip
# Factors of width and depth.
FACTORS = {
    "b0": (1.0, 1.0), "b1": (1.0, 1.1), "b2": (1.1, 1.2), "b3": (1.2, 1.4), "b4": (1.4, 1.8), "b5": (1.6, 2.2),
    "b6": (1.8, 2.6), "b7": (2.0, 3.1),
}  # fmt: skip
EPSILON = 1e-3  # of the batch norms
_INIT: dict[str, Any] = {"kernel_init": nn.initializers.variance_scaling(2.0, "fan_out", "normal")}


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """An EfficientNet.

    Attributes:
      width, depth: factors of B0's channels and repeats, see `FACTORS`.
      channels: of the images.
    """

    width: float = 1.0
    depth: float = 1.0
    channels: int = 3

    def __post_init__(self) -> None:
        if self.width <= 0 or self.depth <= 0:
            raise ValueError(f"width and depth must be positive factors, got {self.width} and {self.depth}")
        if self.channels < 1:
            raise ValueError(f"channels must be at least 1, got {self.channels}")

    def round_width(self, channels: int) -> int:
        """B0's channels times the factor, to the next multiple of 8 that is not more than a tenth below."""
        wanted = channels * self.width
        rounded = max(8, int(wanted + 4) // 8 * 8)
        return rounded if rounded >= 0.9 * wanted else rounded + 8

    @property
    def blocks(self) -> tuple[tuple[int, int, int, int], ...]:
        """Kernel, stride, expansion and channels out of all blocks."""
        found = []
        for repeats, kernel, stride, expansion, _, out in _STAGES:
            for index in range(math.ceil(repeats * self.depth)):
                found.append((kernel, stride if index == 0 else 1, expansion, self.round_width(out)))
        return tuple(found)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the five maps."""
        return tuple(self.round_width(_STAGES[stage][-1]) for stage in (0, 1, 2, 4, 6))


def pad_same(x: jax.Array, kernel: int, stride: int) -> jax.Array:
    """Zeros around (B, H, W, C), so that a convolution without padding gives ceil(H / stride) rows, and columns."""
    missing = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)))


class MBConv(nn.Module):
    """An inverted residual with squeeze and excitation. Children `expand`, `depthwise`, `reduce`, `excite`, `project`.

    Fields:
      kernel, stride, expansion, width: as of `EfficientNetConfig.blocks`.
    """

    kernel: int
    stride: int
    expansion: int
    width: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), width)."""
        channels = x.shape[-1]
        hidden = self.expansion * channels
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype, **_INIT}
        layer: Any = partial(ConvNorm, use_bias=False, epsilon=EPSILON, momentum=0.01, **options)
        y = x
        if self.expansion > 1:
            y = nn.silu(layer(hidden, axes=("embed", "mlp"), name="expand")(y, train))
        y = pad_same(y, self.kernel, self.stride)
        y = nn.silu(
            layer(
                hidden, kernel_size=self.kernel, stride=self.stride, groups=hidden, padding=0, axes=(None, "mlp"),
                name="depthwise",
            )(y, train)
        )  # fmt: skip
        zeros = nn.initializers.zeros_init()
        squeezed = y.mean(axis=(1, 2), keepdims=True)
        squeezed = nn.silu(
            Conv(max(1, channels // 4), axes=("mlp", None), bias_init=zeros, **options, name="reduce")(squeezed)
        )
        y = y * nn.sigmoid(Conv(hidden, axes=(None, "mlp"), bias_init=zeros, **options, name="excite")(squeezed))
        y = layer(self.width, axes=("mlp", "embed"), name="project")(y, train)
        return x + y if self.stride == 1 and channels == self.width else y


class EfficientNet(nn.Module):
    """The body without its last convolution and classifier. Children: `stem`, `block_{i}`."""

    config: EfficientNetConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """float (B, height, width, channels) of any size to five maps at strides 2, 4, 8, 16 and 32.

        They are what goes into each block of stride 2, and the last block's output. Drop connections, which training on
        ImageNet uses, are left out.
        """
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = ConvNorm(
            config.round_width(32), 3, stride=2, padding=0, use_bias=False, epsilon=EPSILON, momentum=0.01, **options,
            **_INIT, name="stem",
        )(pad_same(images, 3, 2), train)  # fmt: skip
        x, maps = nn.silu(x), []
        for index, (kernel, stride, expansion, width) in enumerate(config.blocks):
            if stride == 2:
                maps.append(x)
            x = MBConv(kernel, stride, expansion, width, **options, name=f"block_{index}")(x, train)
        return [*maps, x]


def weight_rules() -> list[Rule]:
    """The names of the package `efficientnet_pytorch`."""
    block = []
    for number, convolution, name, kind in (
        (0, "_expand_conv", "expand", "pointwise2d"), (1, "_depthwise_conv", "depthwise", "conv2d"),
        (2, "_project_conv", "project", "pointwise2d"),
    ):  # fmt: skip
        block += layer(kind, convolution, f"{name}/conv") + layer("batch_norm", f"_bn{number}", f"{name}/norm")
    block += layer("pointwise2d", "_se_reduce", "reduce") + layer("pointwise2d", "_se_expand", "excite")
    return [
        *layer("conv2d", "_conv_stem", "stem/conv"),
        *layer("batch_norm", "_bn0", "stem/norm"),
        *under(r"_blocks\.(\d+)", "block_{0}", block),
    ]

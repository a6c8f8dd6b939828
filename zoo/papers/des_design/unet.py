"""The diffusion models: a U-Net over sequences that attends to a condition's numbers.

B sequences, L positions, C channels; K numbers of a condition, E features of each. Channels are last here.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import attention
from zoo.layers.convolution import torch_bias_init, torch_kernel_init
from zoo.layers.mlp import MLP
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.positions import half_sinusoids

_gelu = partial(nn.gelu, approximate=False)
_TRANSFORMER_GROUPS = 32
# Keys and values (B, K, heads, features) of each layer of a stack, None where there is no stack.
Context = tuple[tuple[jax.Array, jax.Array], ...] | None


@dataclasses.dataclass(frozen=True)
class QMDiffusionConfig:
    """A conditional diffusion model of sequences.

    Attributes:
      length: L.
      features: C of the sequences.
      channels: of the U-Net's first level.
      patch: positions that become one, on entry.
      multipliers: of `channels`, by level.
      factors: of shortening, between levels.
      blocks: residual blocks on each level but the first.
      attentions: layers of the transformers on the same levels; the last is the middle's too.
      pre_transformer: layers of self-attention that each level begins with.
      heads, head_features, mlp_ratio: of all transformers.
      groups: of the residual blocks' norms.
      conditions: the most numbers of a condition, K.
      condition_features, position_features: widths of a number's embedding and of its place's.
      add_positions: whether the two are added, and not concatenated.
      sigma_data: of the data; see `zoo.diffusion.EDM`.
      drop_condition: share of training examples that see the null condition. Published is 0, which leaves it untrained.
    """

    length: int = 32
    features: int = 22
    channels: int = 128
    patch: int = 1
    multipliers: tuple[int, ...] = (1, 2, 4)
    factors: tuple[int, ...] = (4, 4)
    blocks: tuple[int, ...] = (3, 3)
    attentions: tuple[int, ...] = (4, 4)
    pre_transformer: int = 2
    heads: int = 8
    head_features: int = 64
    mlp_ratio: int = 2
    groups: int = 8
    conditions: int = 12
    condition_features: int = 64
    position_features: int = 64
    add_positions: bool = False
    sigma_data: float = 0.1
    drop_condition: float = 0.0

    def __post_init__(self) -> None:
        for name in ("length", "features", "channels", "patch", "heads", "head_features", "mlp_ratio", "groups",
                     "conditions", "condition_features"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        levels = len(self.multipliers) - 1
        if levels < 1 or not len(self.factors) == len(self.blocks) == levels or len(self.attentions) < levels:
            raise ValueError(
                f"{len(self.multipliers)} multipliers need one fewer factors, blocks and attentions, got "
                f"{self.factors}, {self.blocks}, {self.attentions}"
            )
        if min(*self.multipliers, *self.factors, *self.blocks) < 1 or min(*self.attentions, self.pre_transformer) < 0:
            raise ValueError(
                "multipliers, factors and blocks must be at least 1, attentions and pre_transformer not negative"
            )
        short = self.patch * math.prod(self.factors)
        if self.length % short:
            raise ValueError(f"length must be a multiple of patch and factors, {short}, got {self.length}")
        if self.channels % 2 or self.channels * self.multipliers[0] % self.patch:
            raise ValueError(f"channels must be even and a multiple of the patch {self.patch}, got {self.channels}")
        attended = [self.channels * m for m in self.multipliers[1:]]
        if any(width % self.groups for width in attended):
            raise ValueError(f"widths {attended} must be multiples of groups, {self.groups}")
        if (any(self.attentions) or self.pre_transformer) and any(width % _TRANSFORMER_GROUPS for width in attended):
            raise ValueError(f"widths {attended} with attention must be multiples of {_TRANSFORMER_GROUPS}")
        if self.position_features % 2 or self.position_features < 2:
            raise ValueError(f"position_features must be even and positive, got {self.position_features}")
        if self.add_positions and self.position_features != self.condition_features:
            raise ValueError("added positions are as wide as the condition's features")
        if not 0 <= self.drop_condition < 1:
            raise ValueError(f"drop_condition must be in [0, 1), got {self.drop_condition}")

    @property
    def context_features(self) -> int:
        """E."""
        return self.condition_features + (0 if self.add_positions else self.position_features)


def example_inputs(config: QMDiffusionConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Random sequences, levels and conditions."""
    random = np.random.default_rng(0)
    return {
        "x": random.standard_normal((batch_size, config.length, config.features), dtype=np.float32),
        "time": random.standard_normal(batch_size, dtype=np.float32),
        "condition": random.uniform(-1, 1, (batch_size, config.conditions)).astype(np.float32),
    }


class _Part(nn.Module):
    """What all modules here share."""

    config: QMDiffusionConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @property
    def options(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @nn.nowrap
    def part(self, kind: Any, **fields: Any) -> Any:
        """A part of the same config and dtypes."""
        return kind(self.config, **self.options, **fields)

    @nn.nowrap
    def linear(self, fan_in: int, width: int, axes: tuple[Any, Any] = ("embed", "mlp"), bias: bool = True) -> nn.Dense:
        """A linear layer with PyTorch's initial values."""
        return dense(
            width, axes, use_bias=bias, kernel_init=torch_kernel_init, bias_init=torch_bias_init(fan_in), **self.options
        )

    @nn.nowrap
    def convolution(self, fan_in: int, width: int, size: int, stride: int = 1) -> nn.Conv:
        """Padded so that the length is divided by the stride."""
        return nn.Conv(
            width, (size,), stride, padding=[(size // 2, size // 2)],
            kernel_init=partitioned(torch_kernel_init, None, None, "embed"),
            bias_init=partitioned(torch_bias_init(size * fan_in), "embed"), **self.options,
        )  # fmt: skip

    @nn.nowrap
    def group_norm(self, groups: int, epsilon: float) -> nn.GroupNorm:
        return nn.GroupNorm(
            groups, epsilon=epsilon, use_fast_variance=False, **self.options,
            scale_init=partitioned(nn.initializers.ones_init(), "embed"),
            bias_init=partitioned(nn.initializers.zeros_init(), "embed"),
        )  # fmt: skip

    @nn.nowrap
    def layer_norm(self) -> Any:
        return norm("layer", epsilon=1e-5, **self.options)


class ResidualBlock(_Part):
    """norm, SiLU, convolution; norm, scale and shift by the level's mapping, SiLU, convolution; and the input.

    Fields:
      inputs, width: channels that come and go.
      groups: of both norms.
    """

    inputs: int = 0
    width: int = 0
    groups: int = 1

    def setup(self) -> None:
        """Its parts."""
        self.norm_1 = self.group_norm(self.groups, 1e-5)
        self.conv_1 = self.convolution(self.inputs, self.width, 3)
        self.modulation = self.linear(4 * self.config.channels, 2 * self.width)
        self.norm_2 = self.group_norm(self.groups, 1e-5)
        self.conv_2 = self.convolution(self.width, self.width, 3)
        if self.inputs != self.width:
            self.skip = self.linear(self.inputs, self.width, ("mlp", "embed"))

    def __call__(self, x: jax.Array, mapping: jax.Array) -> jax.Array:
        """(B, L, inputs) and (B, 4 channels) to (B, L, width)."""
        y = self.conv_1(nn.silu(self.norm_1(x)))
        scale, shift = jnp.split(self.modulation(nn.silu(mapping))[:, None], 2, axis=-1)
        y = self.conv_2(nn.silu(self.norm_2(y) * (scale + 1) + shift))
        return y + (self.skip(x) if self.inputs != self.width else x)


class Attention(_Part):
    """Attention to a context, or to the input itself; the two are normalised apart, even where they are the same.

    Fields:
      width: of the input.
      context_width: of the context.
    """

    width: int = 0
    context_width: int = 0

    def setup(self) -> None:
        """Its parts."""
        config = self.config
        inner = config.heads * config.head_features
        self.norm, self.norm_context = self.layer_norm(), self.layer_norm()
        self.query = self.linear(self.width, inner, ("embed", "heads"), bias=False)
        self.key = self.linear(self.context_width, inner, (None, "heads"), bias=False)
        self.value = self.linear(self.context_width, inner, (None, "heads"), bias=False)
        self.out = self.linear(inner, self.width, ("heads", "embed"))

    @nn.nowrap
    def split(self, x: jax.Array) -> jax.Array:
        """(B, T, heads * head_features) to (B, T, heads, head_features)."""
        return x.reshape(*x.shape[:2], self.config.heads, self.config.head_features)

    def keys(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, K, context_width) to keys and values (B, K, heads, head_features)."""
        context = self.norm_context(context)
        return self.split(self.key(context)), self.split(self.value(context))

    def __call__(self, x: jax.Array, keys: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        """(B, L, width) to the same; without keys, to itself."""
        key, value = self.keys(x) if keys is None else keys
        found: Any = attention(self.split(self.query(self.norm(x))), key, value)
        return self.out(found.reshape(*x.shape[:2], -1))


class Layer(_Part):
    """Self-attention, cross-attention if any, and an MLP that no norm precedes.

    Fields:
      width: of the input.
      cross: whether there is cross-attention.
    """

    width: int = 0
    cross: bool = False

    def setup(self) -> None:
        """Its parts."""
        self.attention = self.part(Attention, width=self.width, context_width=self.width)
        if self.cross:
            self.cross_attention = self.part(Attention, width=self.width, context_width=self.config.context_features)
        self.mlp = MLP(
            self.config.mlp_ratio * self.width, kernel_init=torch_kernel_init, out_init=torch_kernel_init,
            **self.options,
        )  # fmt: skip

    def keys(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the cross-attention."""
        return self.cross_attention.keys(context)

    def __call__(self, x: jax.Array, keys: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        """(B, L, width) to the same."""
        x = self.attention(x) + x
        if keys is not None:
            x = self.cross_attention(x, keys) + x
        return self.mlp(x) + x


class Stack(_Part):
    """norm, linear map, layers, linear map; nothing goes around it.

    Fields:
      width: of the input.
      depth: layers.
      cross: whether they attend to the condition.
    """

    width: int = 0
    depth: int = 0
    cross: bool = False

    def setup(self) -> None:
        """Its parts."""
        self.norm = self.group_norm(_TRANSFORMER_GROUPS, 1e-6)
        self.project_in = self.linear(self.width, self.width)
        self.layers = [self.part(Layer, width=self.width, cross=self.cross) for _ in range(self.depth)]
        self.project_out = self.linear(self.width, self.width, ("mlp", "embed"))

    def context(self, embedding: jax.Array) -> Context:
        """(B, K, E) to keys and values of the layers."""
        return tuple(layer.keys(embedding) for layer in self.layers)

    def __call__(self, x: jax.Array, context: Context = None) -> jax.Array:
        """(B, L, width) to the same."""
        x = self.project_in(self.norm(x))
        for index, layer in enumerate(self.layers):
            x = layer(x, None if context is None else context[index])
        return self.project_out(x)


class Level(_Part):
    """What one level does on the way down, on the way up (`up`), or at the bottom; subclasses order it.

    Fields:
      level: 0 for the first that is shorter than the input.
    """

    level: int = 0

    @property
    def width(self) -> int:
        """Channels on the level."""
        return self.config.channels * self.config.multipliers[self.level + 1]

    @property
    def outer_width(self) -> int:
        """Channels on the longer level above."""
        return self.config.channels * self.config.multipliers[self.level]

    @nn.nowrap
    def stacks(self) -> tuple[Stack | None, Stack | None]:
        """The transformer that the level begins with, and the one that attends to the condition."""
        config = self.config
        depth = config.attentions[self.level]
        return (
            self.part(Stack, width=self.width, depth=config.pre_transformer) if config.pre_transformer else None,
            self.part(Stack, width=self.width, depth=depth, cross=True) if depth else None,
        )

    @nn.nowrap
    def residual(self, inputs: int) -> ResidualBlock:
        """A residual block of the level."""
        return self.part(ResidualBlock, inputs=inputs, width=self.width, groups=self.config.groups)

    def context(self, embedding: jax.Array) -> Context:
        """Of the level's transformer, None where there is none."""
        return None if self.transformer is None else self.transformer.context(embedding)


class Down(Level):
    """Shorter; transformer without condition; residual blocks; transformer with it. All but the first are kept."""

    def setup(self) -> None:
        """Its parts."""
        config = self.config
        factor = config.factors[self.level]
        self.shorten = self.convolution(self.outer_width, self.width, 2 * factor + 1, factor)
        self.pre_transformer, self.transformer = self.stacks()
        self.blocks = [self.residual(self.width) for _ in range(config.blocks[self.level])]

    def __call__(self, x: jax.Array, mapping: jax.Array, context: Context) -> tuple[jax.Array, list[jax.Array]]:
        """(B, L, outer width) to (B, L / factor, width), and what the way up takes of it, in order."""
        x = self.shorten(x)
        kept = []
        if self.pre_transformer is not None:
            # The published code keeps this too, and never takes it.
            x = self.pre_transformer(x)
        for block in self.blocks:
            x = block(x, mapping)
            kept.append(x)
        if self.transformer is not None:
            x = self.transformer(x, context)
            kept.append(x)
        return x, kept


class Up(Level):
    """Residual blocks, each with what was kept, the last first; the two transformers; longer."""

    def setup(self) -> None:
        """Its parts."""
        config = self.config
        factor = config.factors[self.level]
        count = config.blocks[self.level] + (1 if config.attentions[self.level] else 0)
        self.blocks = [self.residual(2 * self.width) for _ in range(count)]
        self.pre_transformer, self.transformer = self.stacks()
        self.lengthen: Any
        if factor == 1:
            self.lengthen = self.convolution(self.width, self.outer_width, 3)
        else:
            # PyTorch's padding p = factor // 2 + factor % 2 and output padding factor % 2, of a dilated input.
            cut = 2 * factor - 1 - (factor // 2 + factor % 2)
            self.lengthen = nn.ConvTranspose(
                self.outer_width, (2 * factor,), (factor,), padding=[(cut, cut + factor % 2)],
                kernel_init=partitioned(torch_kernel_init, None, None, "embed"),
                bias_init=partitioned(torch_bias_init(2 * factor * self.outer_width), "embed"), **self.options,
            )  # fmt: skip

    def __call__(self, x: jax.Array, mapping: jax.Array, kept: list[jax.Array], context: Context) -> jax.Array:
        """(B, L / factor, width) to (B, L, outer width)."""
        for block, skip in zip(self.blocks, reversed(kept), strict=True):
            x = block(jnp.concatenate([x, skip * 2**-0.5], axis=-1), mapping)
        if self.pre_transformer is not None:
            x = self.pre_transformer(x)
        if self.transformer is not None:
            x = self.transformer(x, context)
        return self.lengthen(x)


class Middle(Level):
    """Residual block, transformer, residual block, on the last level."""

    def setup(self) -> None:
        """Its parts."""
        self.before, self.after = self.residual(self.width), self.residual(self.width)
        depth = self.config.attentions[-1]
        self.transformer = self.part(Stack, width=self.width, depth=depth, cross=True) if depth else None

    def __call__(self, x: jax.Array, mapping: jax.Array, context: Context) -> jax.Array:
        """(B, L, width) to the same."""
        x = self.before(x, mapping)
        if self.transformer is not None:
            x = self.transformer(x, context)
        return self.after(x, mapping)


class UNet1d(_Part):
    """The U-Net, of a noisy sequence, its level of noise, and keys and values of a condition."""

    def setup(self) -> None:
        """Its parts."""
        config = self.config
        outer, mapped = config.channels * config.multipliers[0], 4 * config.channels
        self.frequencies = self.param(
            "frequencies", partitioned(nn.initializers.normal(1.0), None), (config.channels // 2,), self.param_dtype
        )
        self.time_in = self.linear(config.channels + 1, mapped)
        self.map_1, self.map_2 = self.linear(mapped, mapped), self.linear(mapped, mapped)
        self.patch_in = self.part(ResidualBlock, inputs=config.features, width=outer // config.patch)
        levels = range(len(config.factors))
        self.down = [self.part(Down, level=level) for level in levels]
        self.middle = self.part(Middle, level=levels[-1])
        self.up = [self.part(Up, level=level) for level in levels]
        self.patch_out = self.part(ResidualBlock, inputs=outer // config.patch, width=config.features)

    def context(self, embedding: jax.Array) -> tuple[Context, ...]:
        """(B, K, E) to keys and values, the same at every level of noise: down, middle, up, from the longest on."""
        return tuple(part.context(embedding) for part in (*self.down, self.middle, *self.up))

    def mapping(self, time: jax.Array) -> jax.Array:
        """(B,) to (B, 4 channels): the number, sines and cosines of learned frequencies of it, and three layers."""
        angles = 2 * math.pi * time[:, None] * self.frequencies
        y = jnp.concatenate([time[:, None], jnp.sin(angles), jnp.cos(angles)], axis=-1)
        for layer in (self.time_in, self.map_1, self.map_2):
            y = _gelu(layer(y))
        return y

    def __call__(self, x: jax.Array, time: jax.Array, context: tuple[Context, ...]) -> jax.Array:
        """(B, L, features) and (B,), ln(sigma) / 4, to (B, L, features)."""
        config = self.config
        mapping = self.mapping(time)
        x = _fold(self.patch_in(x, mapping), config.patch)
        entry, kept = x, []
        for index, down in enumerate(self.down):
            x, own = down(x, mapping, context[index])
            kept.append(own)
        x = self.middle(x, mapping, context[len(kept)])
        for index in reversed(range(len(kept))):
            x = self.up[index](x, mapping, kept[index], context[len(kept) + 1 + index])
        return self.patch_out(_unfold(x + entry, config.patch), mapping)


def _fold(x: jax.Array, patch: int) -> jax.Array:
    """(B, L, C) to (B, L / patch, C patch), positions of a patch side by side within each channel."""
    batch, length, width = x.shape
    return x.reshape(batch, length // patch, patch, width).swapaxes(2, 3).reshape(batch, length // patch, -1)


def _unfold(x: jax.Array, patch: int) -> jax.Array:
    """The inverse of `_fold`."""
    batch, length, width = x.shape
    return x.reshape(batch, length, width // patch, patch).swapaxes(2, 3).reshape(batch, length * patch, -1)


class QMDiffusion(_Part):
    """The U-Net with the embedding of its condition, and the null condition, a learned table."""

    def setup(self) -> None:
        """Its parts."""
        config = self.config
        self.embed = self.linear(1, config.condition_features, (None, None))
        self.unet = self.part(UNet1d)
        self.null = self.param(
            "null", partitioned(nn.initializers.normal(1.0), None, None),
            (config.conditions, config.context_features), self.param_dtype,
        )  # fmt: skip

    def embedding(self, condition: jax.Array) -> jax.Array:
        """Numbers (B, K) to (B, K, E). Raises ValueError for another shape."""
        config = self.config
        if condition.ndim != 2 or not 0 < condition.shape[1] <= config.conditions:
            raise ValueError(f"condition must be (batch, 1 to {config.conditions}), got {condition.shape}")
        x = _gelu(self.embed(condition[..., None]))
        place = half_sinusoids(condition.shape[1], config.position_features).astype(x.dtype)
        if config.add_positions:
            return x + place
        return jnp.concatenate([x, jnp.broadcast_to(place, (*x.shape[:2], place.shape[-1]))], axis=-1)

    def context(self, condition: jax.Array, dropped: jax.Array | None = None, guided: bool = False) -> Any:
        """What the U-Net attends to: keys and values, the same at every level of noise.

        Args:
          condition: (B, K).
          dropped: bool (B,), which examples see the null condition instead.
          guided: whether as many rows with the null condition follow, for guidance by one pass of twice the batch.
        """
        x = self.embedding(condition)
        null = self.null[None, : condition.shape[1]].astype(x.dtype)
        if dropped is not None:
            x = jnp.where(dropped[:, None, None], null, x)
        found = self.unet.context(x)
        if not guided:
            return found
        return jax.tree.map(
            lambda own, null: jnp.concatenate([own, jnp.broadcast_to(null, own.shape)]), found, self.unet.context(null)
        )

    def evaluate(self, x: jax.Array, time: jax.Array, context: Any) -> jax.Array:
        """The U-Net's output for what `context` gave."""
        return self.unet(x, time, context)

    def __call__(self, x: jax.Array, time: jax.Array, condition: jax.Array) -> jax.Array:
        """The U-Net's raw output.

        Args:
          x: (B, L, features), scaled by c_in.
          time: (B,), ln(sigma) / 4.
          condition: (B, K).

        Raises:
          ValueError: a shape is wrong.
        """
        config = self.config
        if x.ndim != 3 or x.shape[1:] != (config.length, config.features):
            raise ValueError(f"x must be (batch, {config.length}, {config.features}), got {x.shape}")
        if time.shape != x.shape[:1] or condition.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"{len(x)} sequences need as many times and conditions, got {time.shape}, {condition.shape}"
            )
        return self.evaluate(x, time, self.context(condition))

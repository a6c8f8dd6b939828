"""FcaFormer: tokens of earlier blocks stay as keys and values of later ones; ConvNeXt blocks on the larger maps.

B batch, H x W pixels of a map, N = H W tokens, C channels, S cross tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels import attention
from zoo.layers import conv_norm
from zoo.layers.conv_norm import ConvNorm
from zoo.layers.convolution import Conv
from zoo.layers.drop_path import DropPath
from zoo.layers.mlp import PLAIN
from zoo.layers.norms import norm
from zoo.layers.offset_bias import OffsetBias, gather_bias
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.patches import PatchEmbedding
from zoo.layers.positions import resize_grid

_gelu = PLAIN["gelu"]
_NORMAL = nn.initializers.truncated_normal(0.02)
_ZEROS = nn.initializers.zeros_init()
_INIT: dict[str, Any] = {"kernel_init": _NORMAL, "bias_init": _ZEROS}
_STRIDE = 4  # of the convolution that merges a map into cross tokens


@dataclasses.dataclass(frozen=True)
class FcaFormerConfig:
    """A hybrid FcaFormer: two stages of ConvNeXt blocks and two of forward cross attention.

    Attributes:
      depths, widths: blocks and channels of the four stages.
      heads: of the attention in the last two.
      cross_depth: of how many earlier blocks of the stage a block sees the cross tokens; 0: none, None: of all.
      enhance: whether a depthwise 3x3 convolution follows the attention.
      factors_after_norm: cross tokens are scaled behind their norm and not, as in the published code, before it.
      num_classes: logits.
      image_size: height and width in pixels that the tables of biases are made for; others interpolate them.
      stem_stride: 4, or 2 for small images.
      mlp_ratio: hidden channels over C.
      layer_scale: its initial value.
      drop_path_rate: of the last block; the first one's is 0, and between them it rises linearly.
      channels: of the images.
    """

    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    widths: tuple[int, int, int, int] = (64, 128, 192, 320)
    heads: tuple[int, int] = (6, 10)
    cross_depth: int | None = 12
    enhance: bool = True
    factors_after_norm: bool = False
    num_classes: int = 1000
    image_size: tuple[int, int] = (224, 224)
    stem_stride: int = 4
    mlp_ratio: int = 4
    layer_scale: float = 1e-6
    drop_path_rate: float = 0.0
    channels: int = 3

    def __post_init__(self) -> None:
        for name in ("depths", "widths"):
            if len(getattr(self, name)) != 4:
                raise ValueError(f"{name} must have one number a stage, four, got {getattr(self, name)}")
        if len(self.heads) != 2 or min(self.heads) < 1:
            raise ValueError(f"heads must be two positive numbers, of the last two stages, got {self.heads}")
        if min(self.depths) < 0 or min(self.widths) < 1 or self.widths[0] % 2:
            raise ValueError(
                f"depths must not be negative, widths positive and the first even, got {self.depths}, {self.widths}"
            )
        for width, heads in zip(self.widths[2:], self.heads, strict=True):
            if width % heads:
                raise ValueError(f"heads must divide their stage's width, got {heads} heads and {width} channels")
        if self.stem_stride not in (2, 4):
            raise ValueError(f"stem_stride must be 2 or 4, got {self.stem_stride}")
        _check_common(self)

    def grid(self, stage: int) -> tuple[int, int]:
        """Rows and columns of a stage's map at `image_size`."""
        rows, columns = (-(-size // (self.stem_stride << stage)) for size in self.image_size)
        return rows, columns


@dataclasses.dataclass(frozen=True)
class PlainConfig:
    """A plain FcaFormer (L0): DeiT's patches and positions, and forward cross attention in every block.

    Attributes:
      depth, width, heads: of the blocks.
      patch: side of a patch in pixels.
      The others are as of `FcaFormerConfig`.
    """

    depth: int = 12
    width: int = 192
    heads: int = 3
    patch: int = 16
    cross_depth: int | None = 12
    enhance: bool = True
    factors_after_norm: bool = False
    num_classes: int = 1000
    image_size: tuple[int, int] = (224, 224)
    mlp_ratio: int = 4
    layer_scale: float = 1e-6
    drop_path_rate: float = 0.0
    channels: int = 3

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width, got {self.heads} heads and {self.width} channels")
        _check_common(self)
        if any(size % self.patch for size in self.image_size):
            raise ValueError(f"image_size must be a multiple of the patch, {self.patch}, got {self.image_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch


def _check_common(config: Any) -> None:
    for name in ("num_classes", "mlp_ratio", "channels"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.cross_depth is not None and config.cross_depth < 0:
        raise ValueError(f"cross_depth must be None or not negative, got {config.cross_depth}")
    if len(config.image_size) != 2 or min(config.image_size) < 1:
        raise ValueError(f"image_size must be a height and a width in pixels, got {config.image_size}")
    if not 0 <= config.drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must be in [0, 1), got {config.drop_path_rate}")


def two_source_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, cross_key: jax.Array, cross_value: jax.Array,
    bias: jax.Array, cross_bias: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """One softmax over own and cross tokens, whose keys are never put side by side.

    With both sources' sums of exponentials Z and Z', the cross tokens' share of a query's weights is Z' / (Z + Z'), and
    the output is the mean of the sources' own attentions with these shares.

    Args:
      query, key, value: (B, N, heads, dim).
      cross_key, cross_value: (B, S, heads, dim).
      bias: (heads, N, N), added to the scaled logits of own tokens.
      cross_bias: (heads, S), of cross tokens.

    Returns:
      (B, N, heads, dim), and the cross tokens' shares, float32 (B, heads, N).
    """
    own, own_total = attention(query, key, value, bias=bias[None], return_logsumexp=True)
    cross, cross_total = attention(
        query, cross_key, cross_value, bias=cross_bias[None, :, None], return_logsumexp=True
    )  # fmt: skip
    share = nn.sigmoid(cross_total - own_total)
    weight = jnp.moveaxis(share, 1, 2)[..., None].astype(own.dtype)
    return own + weight * (cross - own), share


class ConvNeXtBlock(nn.Module):
    """x + scale * project(gelu(expand(norm(depthwise(x))))) (Liu et al. 2022)."""

    mlp_ratio: int = 4
    layer_scale: float = 1e-6
    drop_path: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(B, H, W, C) to the same shape."""
        width, options = x.shape[-1], {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = Conv(width, 7, groups=width, **_INIT, **options, name="depthwise")(x)
        y = norm("layer", epsilon=1e-6, **options, name="norm")(y)
        y = _gelu(Conv(self.mlp_ratio * width, axes=("embed", "mlp"), **_INIT, **options, name="expand")(y))
        y = ConvNorm(
            width, norm=False, layer_scale=self.layer_scale, axes=("mlp", "embed"), **_INIT, **options, name="project"
        )(y, train)  # fmt: skip
        return x + DropPath(self.drop_path)(y, deterministic=not train)


class FcaBlock(nn.Module):
    """A Transformer's block that also sees the cross tokens of earlier blocks, and leaves cross tokens behind.

        x = x + s1 attention(norm(x), cross tokens);  cross tokens out = depthwise 7x7, stride 4, of x;
        x = batch_norm(depthwise 3x3(x)), in x's place;  x = x + s2 mlp(norm(norm(x)))

    Cross tokens are multiplied by a learned factor each and normalised, in this order: a positive factor cancels (but
    for the norm's epsilon), a negative one turns the token round.

    Fields:
      grid: (rows, columns) that the biases are made for.
      sources: how many earlier blocks the cross tokens come from.
      emit: whether cross tokens are left behind; a stage's last block leaves none.
      The others are as of `FcaFormerConfig`.
    """

    heads: int
    grid: tuple[int, int]
    sources: int = 0
    emit: bool = True
    enhance: bool = True
    factors_after_norm: bool = False
    mlp_ratio: int = 4
    layer_scale: float = 1e-6
    drop_path: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, cross: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """A map and what earlier blocks left behind to the next map and what this one leaves behind.

        Args:
          x: (B, H, W, C).
          cross: (B, sources * ceil(H / 4) * ceil(W / 4), C), the oldest first; None if there are no sources.
          train: use the batch's statistics and drop paths.

        Returns:
          (B, H, W, C), and (B, ceil(H / 4) * ceil(W / 4), C) or None.
        """
        batch, rows, columns, width = x.shape
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normalise = partial(norm, "layer", epsilon=1e-5, **options)
        drop = DropPath(self.drop_path)
        y = self._attend(x, cross).reshape(batch, rows, columns, width)
        out = ConvNorm(
            width, norm=False, layer_scale=self.layer_scale, axes=("heads", "embed"), **_INIT, **options, name="out"
        )  # fmt: skip
        x = x + drop(out(y, train), deterministic=not train)
        left = None
        if self.emit:
            merge = Conv(width, 7, _STRIDE, groups=width, use_bias=False, kernel_init=_NORMAL, **options, name="merge")
            left = merge(x).reshape(batch, -1, width)
        if self.enhance:
            x = ConvNorm(
                width, 3, groups=width, use_bias=False, kernel_init=_NORMAL, **options, name="enhance"
            )(x, train)  # fmt: skip
        y = normalise(name="mlp_norm")(normalise(name="norm2")(x))
        y = _gelu(Conv(self.mlp_ratio * width, axes=("embed", "mlp"), **_INIT, **options, name="expand")(y))
        y = ConvNorm(
            width, norm=False, layer_scale=self.layer_scale, axes=("mlp", "embed"), **_INIT, **options, name="project"
        )(y, train)  # fmt: skip
        return x + drop(y, deterministic=not train), left

    def _attend(self, x: jax.Array, cross: jax.Array | None) -> jax.Array:
        """The heads' outputs, (B, N, C). Queries come from own tokens only, keys and values by the same map of both."""
        batch, rows, columns, width = x.shape
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        linear: Any = partial(dense, **_INIT, **options)
        to_query = linear(width, ("embed", "heads"), name="query")
        to_key_value = linear(2 * width, ("embed", "heads"), name="key_value")

        def split(tokens: jax.Array) -> list[jax.Array]:
            return [part.reshape(batch, -1, self.heads, width // self.heads) for part in jnp.split(tokens, 2, axis=-1)]

        x = norm("layer", epsilon=1e-5, **options, name="norm1")(x.reshape(batch, -1, width))
        query = to_query(x).reshape(batch, -1, self.heads, width // self.heads)
        key, value = split(to_key_value(x))
        bias = OffsetBias(self.heads, self.grid, self.param_dtype, name="bias")((rows, columns))
        if not self.sources:
            out: Any = attention(query, key, value, bias=bias[None])
            return out.reshape(batch, -1, width)
        here = _merged((rows, columns))
        if cross is None or cross.shape[1] != self.sources * here[0] * here[1]:
            raise ValueError(
                f"expected {self.sources * here[0] * here[1]} cross tokens of {self.sources} blocks on a map of "
                f"{rows} x {columns}, got {None if cross is None else cross.shape[1]}"
            )
        length = self.sources * int(np.prod(_merged(self.grid)))
        factors = self.param("factors", partitioned(nn.initializers.ones_init(), None), (length,), self.param_dtype)
        cross_bias = self.param(
            "cross_bias", partitioned(_ZEROS, "heads", None), (self.heads, length), self.param_dtype
        )  # fmt: skip
        scale = self._resize(factors[None], here)[0][:, None].astype(cross.dtype)
        cross_norm = norm("layer", epsilon=1e-5, **options, name="cross_norm")
        cross = cross_norm(cross) * scale if self.factors_after_norm else cross_norm(cross * scale)
        cross_key, cross_value = split(to_key_value(cross))
        out, share = two_source_attention(
            query, key, value, cross_key, cross_value, bias, self._resize(cross_bias, here)
        )  # fmt: skip
        self.sow("intermediates", "cross_share", share)
        return out.reshape(batch, -1, width)

    def _resize(self, table: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """(rows, sources * cells) made for `self.grid`'s cross tokens, on another grid of them, block by block."""
        made_for = _merged(self.grid)
        if grid == made_for:
            return table
        maps = table.reshape(table.shape[0], self.sources, *made_for)
        return jax.image.resize(maps, (*maps.shape[:2], *grid), "linear", antialias=False).reshape(table.shape[0], -1)


def _merged(grid: tuple[int, int]) -> tuple[int, int]:
    return -(-grid[0] // _STRIDE), -(-grid[1] // _STRIDE)


class FcaStage(nn.Module):
    """Blocks of forward cross attention on maps of one size. Children: `block_{i}`.

    Fields:
      depth, heads: of the stage.
      grid: that the biases are made for; with a window, the window's.
      config: an `FcaFormerConfig` or `PlainConfig`.
      rates: drop path's, one a block; None for none.
      window: side of the windows that attend and convolve alone. A map that is no whole number of windows is padded
        with zeros (which are tokens), above and to the left for even blocks, below and to the right for odd ones, so
        that windows shift; cross tokens stay with the window of their number.
    """

    depth: int
    heads: int
    grid: tuple[int, int]
    config: Any
    rates: tuple[float, ...] | None = None
    window: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(B, H, W, C) to the same shape."""
        config = self.config
        cap = self.depth if config.cross_depth is None else config.cross_depth
        left: list[jax.Array] = []
        for index in range(self.depth):
            sources = min(index, cap)
            block = FcaBlock(
                self.heads, self.grid, sources, cap > 0 and index < self.depth - 1, config.enhance,
                config.factors_after_norm, config.mlp_ratio, config.layer_scale,
                self.rates[index] if self.rates else 0.0, self.dtype, self.param_dtype, name=f"block_{index}",
            )  # fmt: skip
            cross = jnp.concatenate(left[index - sources :], axis=1) if sources else None
            if self.window is None:
                x, tokens = block(x, cross, train)
            else:
                windows, (top, side) = _partition(x, self.window, first=index % 2 == 0)
                windows, tokens = block(windows, cross, train)
                x = _join(windows, x.shape, top, side)
            if tokens is not None:
                left.append(tokens)
        return x


def _partition(x: jax.Array, window: int, first: bool) -> tuple[jax.Array, tuple[int, int]]:
    """(B, H, W, C) padded before it (`first`) or behind, as windows (B n, window, window, C); padding put before."""
    missing = [-size % window for size in x.shape[1:3]]
    x = jnp.pad(x, ((0, 0), *((m, 0) if first else (0, m) for m in missing), (0, 0)))
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    x = x.swapaxes(2, 3).reshape(-1, window, window, channels)
    return x, ((missing[0], missing[1]) if first else (0, 0))


def _join(windows: jax.Array, shape: tuple[int, ...], top: int, left: int) -> jax.Array:
    """Windows back as a map of a shape, without what was padded."""
    batch, height, width, channels = shape
    side = windows.shape[1]
    rows, columns = -(-height // side), -(-width // side)
    x = windows.reshape(batch, rows, columns, side, side, channels).swapaxes(2, 3)
    x = x.reshape(batch, rows * side, columns * side, channels)
    return x[:, top : top + height, left : left + width]


class PatchMerging(nn.Module):
    """Half the size and another width: 1x1, depthwise 3x3 of stride 2, 1x1, each with batch norm, GELU between."""

    width: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), width)."""
        layer: Any = partial(
            ConvNorm, self.width, use_bias=False, kernel_init=_NORMAL, dtype=self.dtype, param_dtype=self.param_dtype
        )  # fmt: skip
        x = _gelu(layer(axes=("embed", "mlp"), name="conv_0")(x, train))
        x = _gelu(layer(kernel_size=3, stride=2, groups=self.width, axes=(None, "mlp"), name="conv_1")(x, train))
        return layer(axes=("mlp", "embed"), name="conv_2")(x, train)


class Trunk(nn.Module):
    """Stem and four stages. Children: `stem_{i}`, `stage_{s}_block_{i}` for s = 0, 1, `stage_{s}` for 2, 3, `down_{s}`.

    `windows` are those of the last two stages in dense prediction.
    """

    config: FcaFormerConfig
    windows: tuple[int, int] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """float (B, height, width, channels) to the four stages' maps."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        check_images(images, config.channels)
        half: Any = partial(ConvNorm, kernel_size=3, use_bias=False, kernel_init=_NORMAL, **options)
        x = _gelu(half(config.widths[0] // 2, stride=2, name="stem_0")(images, train))
        x = half(config.widths[0], stride=config.stem_stride // 2, axes=("embed", "mlp"), name="stem_1")(x, train)
        rates = np.linspace(0, config.drop_path_rate, max(sum(config.depths), 1)).tolist()
        maps = []
        for stage, depth in enumerate(config.depths):
            mine, rates = tuple(rates[:depth]), rates[depth:]
            if stage < 2:
                for index, rate in enumerate(mine):
                    x = ConvNeXtBlock(
                        config.mlp_ratio, config.layer_scale, rate, **options, name=f"stage_{stage}_block_{index}"
                    )(x, train)  # fmt: skip
            else:
                window = self.windows[stage - 2] if self.windows else None
                grid = (window, window) if window else config.grid(stage)
                x = FcaStage(
                    depth, config.heads[stage - 2], grid, config, mine, window, **options, name=f"stage_{stage}"
                )(x, train)  # fmt: skip
            maps.append(x)
            if stage < 3:
                x = PatchMerging(config.widths[stage + 1], **options, name=f"down_{stage}")(x, train)
        return maps


def check_images(images: jax.Array, channels: int) -> None:
    """Raises ValueError or TypeError unless images are float (batch, height, width, channels), not empty."""
    if images.ndim != 4 or images.shape[-1] != channels or 0 in images.shape:
        raise ValueError(f"images must be (batch, height, width, {channels}), got {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images must be floating point and normalised, got {images.dtype}")


class _Head(nn.Module):
    """The logits of a map's mean."""

    num_classes: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) to (B, num_classes)."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = norm("layer", epsilon=1e-5, **options, name="norm")(x.mean(axis=(1, 2)))
        return dense(self.num_classes, ("embed", None), **_INIT, **options, name="linear")(x)


class FcaFormer(nn.Module):
    """The classifier. Children: those of `Trunk` under `trunk`, `head`.

    `apply(fold(variables, config), images)` is the same function without batch norms, layer scales and gathered biases.
    """

    config: FcaFormerConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """See the class."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.trunk = Trunk(self.config, **options)
        self.head = _Head(self.config.num_classes, **options)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits.

        Args:
          images: float (B, height, width, channels), of any size, standardised as the weights expect.
          train: use the batch's statistics ("batch_stats" must be mutable) and drop paths (rng "dropout").

        Returns:
          (B, num_classes).

        Raises:
          ValueError, TypeError: the images' shape or dtype is wrong.
        """
        return self.head(self.features(images, train)[-1])

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """The four stages' maps, (B, H, W, C) at strides 4, 8, 16 and 32."""
        return self.trunk(images, train)


class PlainFcaFormer(nn.Module):
    """The plain classifier (L0). Children: `patch_embed`, the parameter `positions`, `stage`, `head`.

    A reconstruction: the paper describes DeiT-Ti with both of its parts, the code holds no such network. Here it has no
    class token, so that blocks work on a map; the logits are of the mean, as in the hybrids.
    """

    config: PlainConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """As of `FcaFormer`; the images' sides are multiples of the patch."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        check_images(images, config.channels)
        x = PatchEmbedding(
            config.width, (config.patch, config.patch), kernel_init=_NORMAL, **options, name="patch_embed"
        )(images)  # fmt: skip
        shape = (1, config.grid[0] * config.grid[1], config.width)
        positions = self.param("positions", partitioned(_NORMAL, None, None, "embed"), shape, self.param_dtype)
        positions = resize_grid(positions, config.grid, (x.shape[1], x.shape[2]))
        x = x + positions.reshape(1, *x.shape[1:]).astype(x.dtype)
        rates = tuple(np.linspace(0, config.drop_path_rate, config.depth).tolist())
        x = FcaStage(config.depth, config.heads, config.grid, config, rates, **options, name="stage")(x, train)
        return _Head(config.num_classes, **options, name="head")(x)


def fold(variables: Mapping[str, Any], config: FcaFormerConfig | PlainConfig) -> dict[str, Any]:
    """Variables of the same network, for inference: batch norms and layer scales folded, tables of biases gathered.

    Args:
      variables: of an `FcaFormer` or a `PlainFcaFormer`.
      config: the network's. Gathered biases fit maps of its `image_size` only.

    Returns:
      Variables for `apply` with train=False (`zoo.layers.conv_norm.fold`).
    """
    folded = conv_norm.fold(variables)

    def gather(params: Any, grid: tuple[int, int]) -> Any:
        return {
            name: {"matrix": gather_bias(child["table"], grid)} if name == "bias" and isinstance(child, Mapping)
            else gather(child, grid) if isinstance(child, Mapping) else child
            for name, child in params.items()
        }  # fmt: skip

    params = folded["params"]
    if isinstance(config, PlainConfig):
        return {**folded, "params": {**params, "stage": gather(params["stage"], config.grid)}}
    stages = {f"stage_{s}": gather(params["trunk"][f"stage_{s}"], config.grid(s)) for s in (2, 3) if config.depths[s]}
    return {**folded, "params": {**params, "trunk": {**params["trunk"], **stages}}}


def cross_shares(model: nn.Module, variables: Mapping[str, Any], images: jax.Array) -> dict[str, jax.Array]:
    """Which part of the attention goes to cross tokens: float32 (B, heads, N) by the block's path."""
    _, state = model.apply(variables, images, mutable=["intermediates"])
    flat = jax.tree_util.tree_leaves_with_path(state["intermediates"])
    return {"/".join(str(key.key) for key in path[:-2]): leaf for path, leaf in flat}


def factors(variables: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The learned factors of cross tokens, (S,) by the block's path."""
    flat = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(dict(variables["params"])))
    return {"/".join(key.key for key in path[:-1]): leaf for path, leaf in flat if path[-1].key == "factors"}


def example_inputs(config: FcaFormerConfig | PlainConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`images` of normal values."""
    rng = np.random.default_rng(0)
    return {"images": rng.standard_normal((batch_size, *config.image_size, config.channels), dtype=np.float32)}


def example_targets(config: FcaFormerConfig | PlainConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`labels`, (B,) int32."""
    return {"labels": np.random.default_rng(1).integers(0, config.num_classes, batch_size).astype(np.int32)}

"""Solvers that are told the equation's parameters: the block of guided channels, a Fourier operator and a U-Net.

B batch, nx [x ny] cells, C channels of the field, P parameters of the equation, W channels inside the block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.batch_norm import BatchNorm
from zoo.layers.convolution import convolve, torch_bias_init, torch_kernel_init
from zoo.layers.mlp import PLAIN
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.spectral import SpectralConv

Core = Literal["fno", "unet"]
Conditioning = Literal["cape", "concatenate", "none"]
_gelu = PLAIN["gelu"]
_POOL = 4  # cells that are averaged before the spectral path
_PADDING = 2  # cells of zeros behind the field in the Fourier operator
_LEVELS = 4  # of the U-Net
_HEAD = 128  # hidden channels of the Fourier operator's head
GATES = ("spectral", "pointwise", "depthwise")


@dataclasses.dataclass(frozen=True)
class CAPEConfig:
    """A solver.

    Attributes:
      core: the network that makes the step.
      conditioning: how it learns of the equation's parameters: by the block, as constant channels, or not at all.
      grid: cells along each direction; the block's norm is tied to them.
      channels: C.
      parameters: P.
      width: channels of the Fourier operator, or of the U-Net's first level.
      modes: that the Fourier operator keeps along each direction.
      widening: W.
      kernel_size: of the block's convolutions.
      block_modes: that the block's spectral path keeps along each direction, of the field averaged over 4 cells.
      embeddings: intermediate fields; all published networks have one.
    """

    core: Core = "fno"
    conditioning: Conditioning = "cape"
    grid: tuple[int, ...] = (128,)
    channels: int = 1
    parameters: int = 1
    width: int = 20
    modes: tuple[int, ...] = (12,)
    widening: int = 64
    kernel_size: int = 5
    block_modes: tuple[int, ...] = (16,)
    embeddings: int = 1

    def __post_init__(self) -> None:
        for field, names in (("core", Core), ("conditioning", Conditioning)):
            if getattr(self, field) not in get_args(names):
                raise ValueError(f"{field} must be one of {get_args(names)}, got {getattr(self, field)!r}")
        if len(self.grid) not in (1, 2):
            raise ValueError(f"grid must have one or two directions, got {self.grid}")
        for field in ("modes", "block_modes"):
            modes = getattr(self, field)
            if len(modes) != len(self.grid) or min(modes) < 1:
                raise ValueError(f"{field} must be one positive number for each of {self.grid}, got {modes}")
        for field in ("channels", "parameters", "width", "widening", "embeddings"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.widening % 2:
            raise ValueError(f"widening must be even, got {self.widening}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        multiple = max(_POOL if self.conditioning == "cape" else 1, 2**_LEVELS if self.core == "unet" else 1)
        if any(size < 1 or size % multiple for size in self.grid):
            raise ValueError(f"the grid's sides must be multiples of {multiple}, got {self.grid}")

    @property
    def dims(self) -> int:
        """1 on a line, 2 on a plane."""
        return len(self.grid)

    @property
    def fields(self) -> int:
        """Channels that the core gives: the field's, and with the block those of the intermediate fields."""
        return self.channels * (1 + self.embeddings * (self.conditioning == "cape"))


def cell_centres(grid: Sequence[int]) -> np.ndarray:
    """(i + 1/2) / n along each direction, float32 (1, *grid, directions)."""
    sides = [(np.arange(size, dtype=np.float32) + np.float32(0.5)) / size for size in grid]
    return np.stack(np.meshgrid(*sides, indexing="ij"), -1)[None]


def _shifted(x: jax.Array, size: int) -> list[jax.Array]:
    """The field seen through each place of a kernel, zeros outside, in the order of the kernel's places."""
    grid, half = x.shape[1:-1], size // 2
    padded = jnp.pad(x, ((0, 0), *((half, half),) * len(grid), (0, 0)))
    pieces = []
    for place in np.ndindex(*(size,) * len(grid)):
        window = tuple(slice(start, start + side) for start, side in zip(place, grid, strict=True))
        pieces.append(padded[(slice(None), *window)])
    return pieces


class _Conv(nn.Module):
    """A convolution of a line or a plane that keeps its size. On a line it is one product of gathered neighbours."""

    features: int
    kernel_size: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axes: tuple[str | None, str | None] = (None, "embed")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = self.kernel_size
        places = (size,) * (x.ndim - 2) if size > 1 else ()
        shape = (*places, x.shape[-1], self.features)
        names = (None,) * len(places) + self.axes
        kernel = self.param("kernel", partitioned(torch_kernel_init, *names), shape, self.param_dtype)
        bias = None
        if self.use_bias:
            init = torch_bias_init(math.prod(shape[:-1]))
            bias = self.param("bias", partitioned(init, self.axes[1]), (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if size == 1:
            y = x @ kernel
        elif x.ndim == 3:
            y = jnp.concatenate(_shifted(x, size), -1) @ kernel.reshape(-1, self.features)
        else:
            y = convolve(x, kernel, padding=size // 2)
        return y if bias is None else y + bias


class CAPEBlock(nn.Module):
    """The intermediate field: three kinds of stencils whose channels are weighed by the equation's parameters.

    Without a softmax or any other bound on the weights. On a line the result is added to the field, on a plane the
    field is multiplied by one more than it.
    """

    config: CAPEConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """The layers, which both parts of a call use."""
        config = self.config
        own: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        half, wide, size = config.widening // 2, config.widening, config.kernel_size
        dense_own: dict[str, Any] = {**own, "kernel_init": torch_kernel_init}
        self.gate_hidden = [
            dense(half, (None, "mlp"), bias_init=torch_bias_init(config.parameters), **dense_own) for _ in GATES
        ]
        self.gate_out = [dense(wide, ("mlp", "embed"), bias_init=torch_bias_init(half), **dense_own) for _ in GATES]
        self.enter = _Conv(half, size, use_bias=False, **own)
        self.spectral = SpectralConv(wide, config.block_modes, **own)
        self.pointwise = _Conv(wide, 1, **own)
        self.residual = _Conv(wide, 1, **own)
        self.leave = _Conv(config.channels * config.embeddings, 1, axes=("embed", None), **own)
        places = (size,) * config.dims
        # A group's input is one channel, so a kernel's place counts one towards the fan in.
        self.depthwise = self.param(
            "depthwise", partitioned(torch_bias_init(size**config.dims), *(None,) * config.dims, "embed"),
            (*places, wide), self.param_dtype,
        )  # fmt: skip
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        self.scale = self.param("scale", partitioned(ones, *(None,) * config.dims), config.grid, self.param_dtype)
        self.bias = self.param("bias", partitioned(zeros, *(None,) * config.dims), config.grid, self.param_dtype)

    def gates(self, parameters: jax.Array) -> jax.Array:
        """Weights of the channels of each path, in the order of `GATES`: (B, P) to (B, 3, W).

        They depend on the equation alone: one call serves all steps of a roll-out. On a plane the parameters, which
        must be positive there, come in as p / (1 + p).

        Raises ValueError where the shape is another.
        """
        if parameters.ndim != 2 or parameters.shape[1] != self.config.parameters:
            raise ValueError(f"parameters must be (batch, {self.config.parameters}), got {parameters.shape}")
        p = parameters if self.config.dims == 1 else parameters / (1 + parameters)
        return jnp.stack(
            [out(_gelu(hidden(p))) for hidden, out in zip(self.gate_hidden, self.gate_out, strict=True)], axis=1
        )

    def embed(self, u: jax.Array, gates: jax.Array) -> jax.Array:
        """The intermediate field: (B, *grid, C) and (B, 3, W) to (B, *grid, C embeddings)."""
        config = self.config
        check_field(u, config)
        (u,) = nn.dtypes.promote_dtype(u, dtype=self.dtype)
        batch, ones = u.shape[0], (1,) * config.dims
        spectral_gate, pointwise_gate, depthwise_gate = (
            gates[:, index].reshape(batch, *ones, config.widening) for index in range(3)
        )
        y = _gelu(self.enter(u))
        pooled = self.spectral(_average(y)) * spectral_gate
        for axis in range(config.dims):
            pooled = jnp.repeat(pooled, _POOL, axis=1 + axis)
        kernel = self.depthwise.astype(y.dtype).reshape(-1, config.widening)
        twice = jnp.repeat(y, 2, axis=-1)  # output channel c reads input channel c // 2
        stencil = sum(piece * weight for piece, weight in zip(_shifted(twice, config.kernel_size), kernel, strict=True))
        z = pooled + self.pointwise(y) * pointwise_gate + stencil * depthwise_gate + self.residual(y)
        r = self.leave(_gelu(z))
        # A layer norm over the cells, of each sample and channel, with a scale and a bias for each cell.
        over = tuple(range(1, 1 + config.dims))
        wide = r.astype(jnp.promote_types(r.dtype, jnp.float32))
        centred = wide - wide.mean(over, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(over, keepdims=True) + 1e-5)
        normal = (normal * self.scale[..., None] + self.bias[..., None]).astype(r.dtype)
        repeated = jnp.concatenate([u] * config.embeddings, axis=-1)
        return repeated + normal if config.dims == 1 else repeated * (1 + normal)

    def __call__(self, u: jax.Array, parameters: jax.Array) -> jax.Array:
        """(B, *grid, C) and (B, P) to the intermediate field (B, *grid, C embeddings)."""
        return self.embed(u, self.gates(parameters))


def _average(y: jax.Array) -> jax.Array:
    """Means over blocks of `_POOL` cells along each direction."""
    for axis in range(1, y.ndim - 1):
        shape = (*y.shape[:axis], y.shape[axis] // _POOL, _POOL, *y.shape[axis + 1 :])
        y = y.reshape(shape).mean(axis + 1)
    return y


def check_field(u: jax.Array, config: CAPEConfig) -> None:
    """Raises ValueError unless u is (B, *grid, C), TypeError unless it is floating point."""
    if u.ndim != config.dims + 2 or u.shape[1:] != (*config.grid, config.channels):
        shape = ", ".join(map(str, ("batch", *config.grid, config.channels)))
        raise ValueError(f"u must be ({shape}), got {u.shape}")
    if not jnp.issubdtype(u.dtype, jnp.floating):
        raise TypeError(f"u must be floating point, got {u.dtype}")


class FNO(nn.Module):
    """A Fourier neural operator (Li et al. 2021): four spectral layers beside pointwise ones, then a small head.

    Two cells of zeros are put behind the field along each direction. The last layer has no activation.
    """

    config: CAPEConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(B, *grid, any channels) to (B, *grid, fields)."""
        config = self.config
        own: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = _Conv(config.width, 1, **own, name="enter")(x)
        x = jnp.pad(x, ((0, 0), *((0, _PADDING),) * config.dims, (0, 0)))
        for layer in range(4):
            spectral = SpectralConv(config.width, config.modes, ("embed", None), **own, name=f"spectral_{layer}")(x)
            x = spectral + _Conv(config.width, 1, axes=("embed", None), **own, name=f"pointwise_{layer}")(x)
            x = _gelu(x) if layer < 3 else x
        x = x[(slice(None), *(slice(size) for size in config.grid))]
        x = _gelu(_Conv(_HEAD, 1, axes=("embed", "mlp"), **own, name="hidden")(x))
        return _Conv(config.fields, 1, axes=("mlp", None), **own, name="leave")(x)


class _Double(nn.Module):
    """Twice a convolution of size 3 without bias, a batch norm and a hyperbolic tangent."""

    features: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        own: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for index in (1, 2):
            x = _Conv(self.features, 3, use_bias=False, **own, name=f"conv{index}")(x)
            x = jnp.tanh(BatchNorm(**own, name=f"norm{index}")(x, train))
        return x


class _Up(nn.Module):
    """A transposed convolution of size and stride 2: each cell becomes two along each direction."""

    features: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, *grid, channels = x.shape
        dims = len(grid)
        # PyTorch counts the fan in by the kernel's second axis, which is the output's here.
        fan_in = self.features * 2**dims
        shape = (*(2,) * dims, channels, self.features)
        names = (None,) * dims + ("embed", None)
        kernel = self.param("kernel", partitioned(torch_bias_init(fan_in), *names), shape, self.param_dtype)
        bias = self.param("bias", partitioned(torch_bias_init(fan_in), None), (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        x = jnp.einsum("bnc,aco->bnao" if dims == 1 else "bnmc,adco->bnamdo", x, kernel)
        return x.reshape(batch, *(2 * size for size in grid), self.features) + bias


class UNet(nn.Module):
    """Four levels down by max-pooling and up by transposed convolutions; channels double from level to level."""

    config: CAPEConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(B, *grid, any channels) to (B, *grid, fields)."""
        width = self.config.width
        own: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        skips = []
        for level in range(_LEVELS):
            x = _Double(width << level, **own, name=f"down_{level + 1}")(x, train)
            skips.append(x)
            for axis in range(1, x.ndim - 1):
                x = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :]).max(axis + 1)
        x = _Double(width << _LEVELS, **own, name="bottleneck")(x, train)
        for level in reversed(range(_LEVELS)):
            x = _Up(width << level, **own, name=f"widen_{level + 1}")(x)
            x = jnp.concatenate([x, skips[level]], axis=-1)
            x = _Double(width << level, **own, name=f"up_{level + 1}")(x, train)
        return _Conv(self.config.fields, 1, axes=("embed", None), **own, name="leave")(x)


class CAPEModel(nn.Module):
    """One time step of a field. With the block the core sees the field and the intermediate one, without it the field.

    A call is `condition`, which depends on the equation alone, and `step`.
    """

    config: CAPEConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """The core, and the block where there is one."""
        own: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.core = (FNO if self.config.core == "fno" else UNet)(self.config, **own)
        if self.config.conditioning == "cape":
            self.block = CAPEBlock(self.config, **own)
            self.mix = _Conv(self.config.channels, 1, axes=(None, None), **own)

    def condition(self, parameters: jax.Array) -> jax.Array:
        """What the steps need to know of the equation's parameters (B, P): the block's gates, or themselves."""
        if self.config.conditioning == "cape":
            return self.block.gates(parameters)
        return parameters

    def step(
        self, u: jax.Array, condition: jax.Array, grid: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """The next field and the intermediate one, (B, *grid, C) and (B, *grid, C embeddings), None without the block.

        Args:
          u: (B, *grid, C).
          condition: from `condition`.
          grid: coordinates of the cells, (B or 1, *grid, directions); None is the unit box' cell centres. The Fourier
            operator reads them, the U-Net does not.
          train: batch norms are those of training; "batch_stats" must be mutable then.
        """
        config = self.config
        check_field(u, config)
        (u,) = nn.dtypes.promote_dtype(u, dtype=self.dtype)
        inputs, intermediate = [u], None
        if config.conditioning == "cape":
            intermediate = self.block.embed(u, condition)
            inputs.append(intermediate)
        elif config.conditioning == "concatenate":
            constant = condition.reshape(u.shape[0], *(1,) * config.dims, config.parameters)
            inputs.append(jnp.broadcast_to(constant, (u.shape[0], *config.grid, config.parameters)).astype(u.dtype))
        if config.core == "fno":
            places = jnp.asarray(cell_centres(config.grid) if grid is None else grid, u.dtype)
            inputs.append(jnp.broadcast_to(places, (u.shape[0], *config.grid, config.dims)))
        y = self.core(jnp.concatenate(inputs, axis=-1), train)
        return (self.mix(y) if config.conditioning == "cape" else y), intermediate

    def __call__(
        self, u: jax.Array, parameters: jax.Array, grid: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """`step`, of the equation's parameters (B, P)."""
        if parameters.shape != (u.shape[0], self.config.parameters):
            raise ValueError(f"parameters must be ({u.shape[0]}, {self.config.parameters}), got {parameters.shape}")
        return self.step(u, self.condition(parameters), grid, train)


def example_inputs(config: CAPEConfig, batch_size: int) -> dict[str, np.ndarray]:
    """A random field and positive parameters."""
    rng = np.random.default_rng(0)
    return {
        "u": rng.standard_normal((batch_size, *config.grid, config.channels), np.float32),
        "parameters": rng.uniform(0.1, 2, (batch_size, config.parameters)).astype(np.float32),
    }

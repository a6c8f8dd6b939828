"""Convolutions of images that are fast on a CPU and stay convolutions on a TPU and a GPU.

XLA's convolution for CPUs is slow where there is little to multiply: depthwise (on 56 x 56 x 192, 3 x 3, some twenty
times slower than nine shifted products), and over the few channels of an image. There, a program compiled for a CPU
holds another form of the same sum. The choice is made at lowering, by the platform compiled for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.partitioning import partitioned

_FEW_CHANNELS = 8  # of the input, below which patches and one matrix product beat XLA's convolution on a CPU

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for convolutions and linear layers.
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default bias: uniform in +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda rng, shape, dtype=jnp.float32: jax.random.uniform(rng, shape, dtype, -bound, bound)


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int = 0, dilation: int = 1) -> jax.Array:
    """Cross-correlation of images, as every framework's convolution.

    Args:
      x: (batch, height, width, channels).
      kernel: (kernel height, kernel width, channels / groups, features); the groups follow from the two shapes.
      stride: in both directions.
      padding: zeros on each of the four sides.
      dilation: distance of the kernel's places from one another.

    Returns:
      (batch, (height + 2 padding - dilation (kernel height - 1) - 1) // stride + 1, likewise the width, features), in
      x's dtype.

    Raises:
      ValueError: the shapes do not fit each other, or the padded image is smaller than the kernel.
    """
    if x.ndim != 4 or kernel.ndim != 4:
        raise ValueError(
            f"expected (batch, height, width, channels) and a kernel of 4 axes, got {x.shape}, {kernel.shape}"
        )
    channels, features = x.shape[-1], kernel.shape[-1]
    groups, rest = divmod(channels, kernel.shape[2])
    if rest or features % max(groups, 1):
        raise ValueError(f"a kernel of shape {kernel.shape} does not fit {channels} channels")
    if min(x.shape[1:3]) + 2 * padding <= dilation * (max(kernel.shape[:2]) - 1):
        raise ValueError(
            f"an image of {x.shape[1:3]} with padding {padding} is smaller than a kernel of {kernel.shape[:2]}"
            + (f" with dilation {dilation}" if dilation > 1 else "")
        )
    if dilation > 1:
        return _xla(x, kernel, stride, padding, dilation)
    if groups == channels == features > 1:
        return _depthwise(x, kernel, stride, padding)
    if groups == 1 and kernel.shape[:2] == (1, 1) and padding == 0:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    if groups == 1 and channels < _FEW_CHANNELS:
        return _over_few_channels(x, kernel, stride, padding)
    return _xla(x, kernel, stride, padding)


def _xla(x: jax.Array, kernel: jax.Array, stride: int, padding: int, dilation: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1] // kernel.shape[2],
    )  # fmt: skip


def _shifted(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Depthwise: the sum over the kernel's places of the image shifted there times a number a channel."""
    rows, columns = _out_size(x, kernel, stride, padding)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, kernel = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0))).astype(wide), kernel.astype(wide)
    total = jnp.zeros((), wide)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            part = x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]
            total += part * kernel[i, j, 0]
    return total


def _patches(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """One matrix product of all patches. A patch's row is put together from runs of `stride` neighbouring pixels."""
    batch, height, width, channels = x.shape
    kernel_rows, kernel_columns = kernel.shape[:2]
    rows, columns = _out_size(x, kernel, stride, padding)
    runs = -(-kernel_columns // stride)
    length = stride * (columns + runs - 1)
    right = max(length - width - padding, padding)
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, right), (0, 0)))[:, :, :length]
    x = x.reshape(batch, height + 2 * padding, columns + runs - 1, stride * channels)
    pieces = []
    for i in range(kernel_rows):
        row = x[:, i : i + stride * (rows - 1) + 1 : stride]
        for run in range(runs):
            pixels = min(stride, kernel_columns - run * stride)
            pieces.append(row[:, :, run : run + columns, : pixels * channels])
    return jnp.concatenate(pieces, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _out_size(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> tuple[int, int]:
    rows, columns = (
        (size + 2 * padding - taps) // stride + 1 for size, taps in zip(x.shape[1:3], kernel.shape[:2], strict=True)
    )
    return rows, columns


def _by_platform(on_cpu: Callable[..., Any], gradient_on_cpu: Callable[..., Any]) -> Callable[..., jax.Array]:
    """A convolution of form `on_cpu` on a CPU, and of XLA's own elsewhere; the gradient is that of `gradient_on_cpu`.

    With a rule for the gradient the operands alone are kept for the backward pass, on every platform.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(2, 3))
    def function(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
        def form(convolution: Callable[..., Any]) -> Callable[..., jax.Array]:
            return lambda x, kernel: convolution(x, kernel, stride, padding).astype(x.dtype)

        return jax.lax.platform_dependent(x, kernel, cpu=form(on_cpu), default=form(_xla))

    def forward(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> tuple[jax.Array, Any]:
        return function(x, kernel, stride, padding), (x, kernel)

    def backward(stride: int, padding: int, operands: Any, d_out: jax.Array) -> Any:
        def form(convolution: Callable[..., Any]) -> Callable[..., Any]:
            def gradients(x: jax.Array, kernel: jax.Array, d_out: jax.Array) -> Any:
                out, transpose = jax.vjp(lambda x, kernel: convolution(x, kernel, stride, padding), x, kernel)
                return transpose(d_out.astype(out.dtype))

            return gradients

        return jax.lax.platform_dependent(*operands, d_out, cpu=form(gradient_on_cpu), default=form(_xla))

    function.defvjp(forward, backward)
    return function


_depthwise = _by_platform(_shifted, _shifted)
_over_few_channels = _by_platform(_patches, _xla)


def average_pool(x: jax.Array, size: int = 3) -> jax.Array:
    """Means over windows of `size` x `size` pixels around each pixel, of those inside the image.

    Args:
      x: (batch, height, width, channels).
      size: odd.

    Returns:
      Like x: PyTorch's average pooling with stride 1, padding size // 2 and count_include_pad False.
    """
    if size % 2 == 0:
        raise ValueError(f"a window has a middle: size must be odd, got {size}")
    height, width = x.shape[1:3]
    side = size // 2

    def shifted(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (side, side), (side, side), (0, 0)))
        parts = [x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
        return sum(parts[1:], parts[0])

    def windowed(x: jax.Array) -> jax.Array:
        window, strides, padding = (1, size, size, 1), (1, 1, 1, 1), ((0, 0), (side, side), (side, side), (0, 0))
        return jax.lax.reduce_window(x, np.zeros((), x.dtype), jax.lax.add, window, strides, padding)

    total = jax.lax.platform_dependent(x, cpu=shifted, default=windowed)
    count = [[min(i, side) + min(n - 1 - i, side) + 1 for i in range(n)] for n in (height, width)]
    return total * (1 / np.multiply.outer(*count))[:, :, None].astype(x.dtype)


class Conv(nn.Module):
    """A convolution (`convolve`); of size 1, a linear map of the last axis, of tokens too.

    The parameter `kernel` is (input, features) for size 1, else (size, size, input / groups, features).

    Fields:
      features: channels of the output.
      kernel_size, stride, groups, dilation: as usual; one number for both directions.
      padding: None is dilation * (kernel_size // 2).
      kernel_init, bias_init: by default those of PyTorch.
      axes: logical names of the input's and the output's channels.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    padding: int | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = torch_kernel_init
    bias_init: nn.initializers.Initializer | None = None
    axes: tuple[str | None, str | None] = (None, "embed")
    dilation: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) to (batch, rows, columns, features); of size 1, also (..., channels)."""
        channels, size = x.shape[-1], self.kernel_size
        if channels % self.groups or self.features % self.groups:
            raise ValueError(f"{self.groups} groups do not divide {channels} channels and {self.features} features")
        pointwise = size == 1 and self.groups == 1
        inside = self.axes[0] if self.groups == 1 else None
        shape: tuple[int, ...] = (channels // self.groups, self.features)
        names: tuple[str | None, ...] = (inside, self.axes[1])
        if not pointwise:
            shape, names = (size, size, *shape), (None, None, *names)
        kernel = self.param("kernel", partitioned(self.kernel_init, *names), shape, self.param_dtype)
        bias = None
        if self.use_bias:
            init = self.bias_init or torch_bias_init(math.prod(shape[:-1]))
            bias = self.param("bias", partitioned(init, self.axes[1]), (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if pointwise:
            y = (x if self.stride == 1 else x[:, :: self.stride, :: self.stride]) @ kernel
        else:
            padding = self.dilation * (size // 2) if self.padding is None else self.padding
            y = convolve(x, kernel, stride=self.stride, padding=padding, dilation=self.dilation)
        return y if bias is None else y + bias

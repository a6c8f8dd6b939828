"""The short causal convolution of recurrent layers, with its past."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.layers.partitioning import partitioned

# Uniform in +-1 / sqrt(kernel_size), PyTorch's for a depthwise convolution.
_KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class ShortConvolution(nn.Module):
    """y_t = activation(sum_j w_j x_(t - kernel_size + 1 + j) + b), each feature by itself.

    Fields:
      features: of input and output.
      kernel_size: tokens that an output sees, itself the last.
      use_bias: whether there is b.
      activation: of the output, or None.
      axis: logical name of the features' axis.
    """

    features: int
    kernel_size: int = 4
    use_bias: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = nn.silu
    axis: str | None = "heads"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, past: jax.Array | None = None, count: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Convolves the tokens.

        Args:
          x: (batch, time, features).
          past: (batch, kernel_size - 1, features), the tokens before; None is zeros, the empty past.
          count: int32 (batch,), how many of the tokens exist, the first ones; None is all.

        Returns:
          y like x, and the past of the next call.
        """
        shape = (self.kernel_size, self.features)
        kernel = self.param("kernel", partitioned(_KERNEL_INIT, None, self.axis), shape, self.param_dtype)
        bias = None
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros_init(), self.axis)
            bias = self.param("bias", zeros, (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        time, before = x.shape[1], self.kernel_size - 1
        if past is None:
            past = jnp.zeros((x.shape[0], before, self.features), x.dtype)
        seen = jnp.concatenate([past.astype(x.dtype), x], axis=1)
        # Few taps: their products fuse into one pass over x, which no convolution is as fast as on a CPU.
        y = sum(seen[:, tap : tap + time] * kernel[tap] for tap in range(self.kernel_size))
        if bias is not None:
            y = y + bias
        if count is None:
            last = seen[:, time:]
        else:
            last = jnp.take_along_axis(seen, (count[:, None] + jnp.arange(before))[..., None], axis=1)
        return (y if self.activation is None else self.activation(y)), last.astype(past.dtype)

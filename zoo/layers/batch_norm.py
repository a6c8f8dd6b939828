"""Batch normalisation as PyTorch computes it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.layers.partitioning import partitioned


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis' channels (Ioffe and Szegedy 2015).

    In training, mean and (biased) variance are those of the batch, and the running ones move a `momentum` of the way to
    them, the variance to its unbiased estimate, n / (n - 1) times as large: as in PyTorch, so that running statistics
    learned there and here agree. On a mesh the batch is the whole one. Statistics are float32.

    Parameters `scale` and `bias`; collection "batch_stats": `mean` and `var`.

    Fields:
      epsilon: added to the variance.
      momentum: weight of the batch in the running statistics.
      axis: logical name of the channels.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(..., channels) to the same shape; with `train`, "batch_stats" must be mutable.

        Raises ValueError in training on a single value a channel, whose variance is not defined.
        """
        shape = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", partitioned(nn.initializers.ones_init(), self.axis), shape, self.param_dtype)
        bias = self.param("bias", partitioned(nn.initializers.zeros_init(), self.axis), shape, self.param_dtype)
        dtype = nn.dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        mean, var = running_mean.value, running_var.value
        if train:
            count = x.size // x.shape[-1]
            if count < 2:
                raise ValueError(f"training needs more than one value a channel, got x of shape {x.shape}")
            axes = tuple(range(x.ndim - 1))
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            mean = wide.mean(axes)
            var = jnp.square(wide - mean).mean(axes)
            if not self.is_initializing():
                keep = 1 - self.momentum
                running_mean.value = keep * running_mean.value + self.momentum * mean
                running_var.value = keep * running_var.value + self.momentum * var * (count / (count - 1))
        gain = scale * jax.lax.rsqrt(var + self.epsilon)
        return ((x - mean) * gain + bias).astype(dtype)

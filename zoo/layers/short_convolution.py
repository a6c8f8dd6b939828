"""Causal depthwise convolution over a few tokens, as recurrent mixers put before their queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.layers.partitioning import partitioned


class ShortConvolution(nn.Module):
    """y_t = activation(b + sum_{i < width} w_i x_{t - width + 1 + i}), channel by channel, in Mamba's convention.

    The last weight is the current token's. Padding is skipped wherever it stands: the past of a token are the valid
    tokens before it. Shifted products, which fuse on every platform; a convolution of a few taps is slow on CPUs.

    Fields:
      features: channels.
      width: tokens seen, the current one included.
      activation: of the sum, or None.
      use_bias: whether b exists.
      axis: logical name of the channels.
      kernel_init: of w (width, features); the default is PyTorch's for a depthwise convolution.
    """

    features: int
    width: int = 4
    activation: Callable[[jax.Array], jax.Array] | None = nn.silu
    use_bias: bool = False
    axis: str | None = "heads"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.variance_scaling(
        1 / 3, "fan_in", "uniform", in_axis=0, out_axis=(), batch_axis=1
    )

    @nn.compact
    def __call__(
        self, x: jax.Array, state: jax.Array | None = None, *, valid: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Convolves the tokens.

        Args:
          x: float (batch, time, features).
          state: the past, from `init_state` or an earlier call; None is the empty past.
          valid: bool (batch, time), False for padding, whose outputs mean nothing; None is all True.

        Returns:
          y like x, and the last width - 1 valid inputs (batch, width - 1, features).

        Raises:
          ValueError: x or the state has another shape.
        """
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(f"x must be (batch, time, features = {self.features}), got {x.shape}")
        batch, time, _ = x.shape
        past = self.width - 1
        if state is None:
            state = self.init_state(batch)
        if state.shape != (batch, past, self.features):
            raise ValueError(f"state must be (batch, width - 1, features) = {(batch, past, self.features)}")
        kernel = self.param(
            "kernel", partitioned(self.kernel_init, None, self.axis), (self.width, self.features), self.param_dtype
        )
        dtype = self.dtype or jnp.promote_types(x.dtype, kernel.dtype)
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        seen = jnp.concatenate([state.astype(dtype), x], axis=1)
        if valid is None:
            taps = [seen[:, index : index + time] for index in range(self.width)]
            last = seen[:, time:]
        else:
            # `order[b, p]` is where the p-th entry that is no padding stands; entries 0 .. past - 1 are the state.
            position = jnp.cumsum(valid, axis=1) + past - 1
            slots = jnp.where(valid, position, past + time)  # out of range: dropped
            rows = jnp.arange(batch)[:, None]
            order = jnp.broadcast_to(jnp.arange(past + time), (batch, past + time))
            order = order.at[rows, slots].set(jnp.arange(past, past + time), mode="drop")

            def entries(positions: jax.Array) -> jax.Array:
                return seen[rows, order[rows, positions]]

            position = jnp.maximum(position, past)  # padding before the first token reads anything
            taps = [entries(position - past + index) for index in range(self.width)]
            last = entries(jnp.sum(valid, axis=1, keepdims=True) + jnp.arange(past))
        y = sum(tap * weight for tap, weight in zip(taps, kernel, strict=True))
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros_init(), self.axis)
            y = y + self.param("bias", zeros, (self.features,), self.param_dtype).astype(dtype)
        return (y if self.activation is None else self.activation(y)), last.astype(state.dtype)

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """The empty past: zeros (batch, width - 1, features), in the computation's dtype."""
        dtype = self.param_dtype if self.dtype is None else self.dtype
        return jnp.zeros((batch_size, self.width - 1, self.features), dtype)

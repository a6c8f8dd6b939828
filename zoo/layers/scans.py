"""Recurrences along time whose step is a multiplication and an addition for each channel."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def leaky_sum(x: jax.Array, decay: jax.Array | float, initial: jax.Array | None = None) -> jax.Array:
    """y_t = decay_t * y_{t-1} + x_t, computed in log2(time) parallel steps.

    Args:
      x: float (batch, time, ...).
      decay: float, broadcastable to x.
      initial: y before the first step, (batch, ...); None is zero.

    Returns:
      Like x.
    """
    decay = jnp.broadcast_to(jnp.asarray(decay, x.dtype), x.shape)
    if initial is not None:
        x = x.at[:, 0].add(decay[:, 0] * initial)

    def then(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(then, (decay, x), axis=1)[1]

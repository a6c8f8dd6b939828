"""Stochastic depth."""

from __future__ import annotations

import flax.linen as nn
import jax


class DropPath(nn.Module):
    """Drops the whole branch of an example with probability `rate` and scales it by 1 / (1 - rate) otherwise.

    Huang et al. 2016, a decision per example. Draws from the rng collection "dropout".
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """(batch, ...) to the same shape."""
        return nn.Dropout(self.rate, broadcast_dims=tuple(range(1, x.ndim)))(x, deterministic=deterministic)

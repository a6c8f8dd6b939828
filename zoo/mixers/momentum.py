"""Softmax attention with an exponential moving sum of past values beside it (Dai et al. 2022, "MoAttn")."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.layers.partitioning import partitioned
from zoo.layers.scans import leaky_sum
from zoo.mixers import cache
from zoo.mixers.base import register
from zoo.mixers.softmax import SoftmaxAttention


class MomentumState(NamedTuple):
    """The past of a batch of sequences."""

    cache: cache.KeyValueCache
    sum: jax.Array  # float32 (batch, key_heads, head_dim): sum over the past of momentum^(t - i) v_i, t the last token


@register("momentum")
class MomentumAttention(SoftmaxAttention):
    """A head's output plus sum_{i<t} momentum^(t - i) v_i: gradient descent with momentum, read as attention.

    The sum leaves the current token out and is not normalised; it reaches over all of the past, also beyond a window.

    Fields beside those of `SoftmaxAttention`:
      momentum: in (0, 1); where `learned`, its first value.
      learned: one momentum for each key head is a parameter, through a sigmoid.
    """

    momentum: float = 0.5
    learned: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.momentum < 1:
            raise ValueError(f"momentum must be in (0, 1), got {self.momentum}")
        if not self.causal:
            raise ValueError("momentum attention sums over the past: it has no form for causal=False")

    def setup(self):
        """The projections, and the momentum if it is learned."""
        super().setup()
        if self.learned:
            init = partitioned(nn.initializers.constant(jnp.log(self.momentum / (1 - self.momentum))), None)
            self.momentum_logit = self.param("momentum_logit", init, (self.key_head_count,), jnp.float32)

    def __call__(self, x, state=None, *, valid=None, deterministic=True):
        """See `Mixer`."""
        past = None if state is None else state.cache
        y, next_cache = super().__call__(x, past, valid=valid, deterministic=deterministic)
        value = self.split_values(x)
        wide = value.astype(jnp.float32)
        keep = nn.sigmoid(self.momentum_logit)[:, None] if self.learned else jnp.float32(self.momentum)
        if valid is not None:
            there = valid[..., None, None]
            wide, keep = jnp.where(there, wide, 0), jnp.where(there, keep, 1)
        sums = leaky_sum(wide, keep, None if state is None else state.sum)
        before = jnp.repeat(sums - wide, self.heads // self.key_head_count, axis=2).reshape(*x.shape[:2], -1)
        # The projection out is linear but for its bias, which the attention's part has already.
        more = self.out(before.astype(value.dtype)) - self.out(jnp.zeros((1, 1, before.shape[-1]), value.dtype))
        y = y + (more if valid is None else jnp.where(valid[..., None], more, 0))
        return y, None if state is None else MomentumState(next_cache, sums[:, -1])

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        past = super().init_state(batch_size, length)
        return MomentumState(past, jnp.zeros((batch_size, self.key_head_count, self.width_of_head), jnp.float32))

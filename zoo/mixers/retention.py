"""Multi-scale retention (Sun et al. 2023, "RetNet")."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.linear_attention import LinearAttentionState, linear_attention
from zoo.layers.norms import GatedRMSNorm
from zoo.layers.rotary import Rotary, rotate
from zoo.mixers.base import register, token_positions
from zoo.mixers.recurrent import RecurrentMixer, empty_memory, exists, seen_tokens, zero_where_missing


@dataclasses.dataclass(frozen=True)
class RetentionRotary(Rotary):
    """Frequencies theta^(-i / (n - 1)) of n neighbouring pairs, as in the published code."""

    interleaved: bool = True

    def frequencies(self, head_dim: int) -> np.ndarray:
        """float32 (head_dim / 2,), radians a position. Raises ValueError for an odd width."""
        if head_dim % 2:
            raise ValueError(f"the width of a head's keys must be even, got {head_dim}")
        return (float(self.theta) ** -np.linspace(0, 1, head_dim // 2)).astype(np.float32)


class RetentionState(NamedTuple):
    """The past of a retention."""

    memory: LinearAttentionState
    length: jax.Array  # int32 (batch,), tokens seen


@register("retnet")
class MultiScaleRetention(RecurrentMixer):
    """out(rms_norm(sum_s gamma^(t-s) (q_t e^(i t theta)) . (k_s e^(i s theta)) v_s) silu(gate)), gamma = 1 - 2^(-5-h).

    Rotation and decay together are xPos. The norm is each head's own (group norm without a mean and without
    parameters); it takes off again what the published code divides the scores by, and so that is left away.

    Fields beside those of `Mixer`:
      heads: their number; head h = 0, 1, ... has the decay gamma above.
      expand_value: width of values, as a multiple of features.
      theta: base of the rotation's frequencies.
      norm_epsilon: of the norm.
    """

    heads: int = 8
    expand_value: float = 2.0
    theta: float = 10_000.0
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        RetentionRotary(self.theta).frequencies(self._widths[0])

    @property
    def _widths(self) -> tuple[int, int]:
        """Of a head's keys and values."""
        return (
            self.head_width("features", self.features),
            self.head_width("features * expand_value", self.features * self.expand_value),
        )

    @nn.compact
    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        width, value_width = self._widths
        query = self.split_heads(self.project(self.heads * width, "query")(x))
        key = self.split_heads(self.project(self.heads * width, "key")(x))
        value = self.split_heads(self.project(self.heads * value_width, "value")(x))
        gate = self.split_heads(self.project(self.heads * value_width, "gate")(x))
        there = exists(x, count)
        positions = token_positions(x.shape[:2], there, None if state is None else state.length)
        query, key = (rotate(array, positions, RetentionRotary(self.theta)) for array in (query, key))
        log_decay = np.log1p(-(2.0 ** (-5 - np.arange(self.heads)))).astype(np.float32)
        decay = zero_where_missing(jnp.broadcast_to(log_decay, query.shape[:3]), count)
        out, memory = linear_attention(
            query, zero_where_missing(key, count), value, decay=decay, state=None if state is None else state.memory
        )
        y = GatedRMSNorm(self.norm_epsilon, use_scale=False, dtype=value.dtype, name="norm")(out, gate)
        y = self.project_out()(y.reshape(*x.shape[:2], -1))
        return y, None if state is None else RetentionState(memory, seen_tokens(state.length, x, count))

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        return RetentionState(empty_memory(batch_size, self.heads, *self._widths), jnp.zeros(batch_size, jnp.int32))

"""The state-space layer of Mamba-2 (Dao and Gu 2024, "SSD")."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.linear_attention import LinearAttentionState, linear_attention
from zoo.layers.norms import GatedRMSNorm
from zoo.layers.partitioning import partitioned
from zoo.mixers.base import register
from zoo.mixers.recurrent import (
    RecurrentMixer,
    empty_memory,
    log_uniform_rate_init,
    time_step_bias_init,
    zero_where_missing,
)


class StateSpaceState(NamedTuple):
    """The past of Mamba-2's layer."""

    memory: LinearAttentionState
    convolution: jax.Array  # (batch, kernel_size - 1, channels)


@register("ssd")
class StateSpaceDuality(RecurrentMixer):
    """S_t = exp(-a dt_t) S_(t-1) + dt_t B_t x_t^T; y_t = S_t^T C_t + D x_t; out(rms_norm(y silu(z))).

    z, x, B, C and dt are one projection of the input; x, B and C pass a short convolution and silu; dt is a softplus.
    Every head has its own rate a and skip D; B and C are shared by the heads of a group.

    Fields beside those of `Mixer`:
      heads: their number; a head's width is expand * features / heads (the published models': 64).
      expand: width of x and z, as a multiple of features.
      state_size: width of B and C.
      groups: of heads, each with its own B and C; a divisor of heads.
      kernel_size: of the convolution.
      norm_epsilon: of the norm, of all heads together.
    """

    heads: int = 8
    expand: float = 2.0
    state_size: int = 128
    groups: int = 1
    kernel_size: int = 4
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        self.head_width("features * expand", self.features * self.expand)
        if self.groups < 1 or self.heads % self.groups:
            raise ValueError(f"heads ({self.heads}) must be a multiple of groups ({self.groups})")

    @property
    def _inner(self) -> int:
        return int(self.features * self.expand)

    @property
    def _channels(self) -> int:
        """What is convolved: x, B and C."""
        return self._inner + 2 * self.groups * self.state_size

    @nn.compact
    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        batch, time = x.shape[:2]
        z = self.project(self._inner, "gate")(x)
        raw_step = self.project(self.heads, "step")(x)
        convolve = self.convolution(self._channels, "convolution", kernel_size=self.kernel_size, use_bias=True)
        channels, convolution = convolve(
            self.project(self._channels, "channels")(x), None if state is None else state.convolution, count
        )
        inner, key, query = jnp.split(channels, [self._inner, self._inner + self.groups * self.state_size], axis=-1)
        inner = self.split_heads(inner)
        # A state's key is its value's head's own: groups are repeated.
        key, query = (
            jnp.repeat(array.reshape(batch, time, self.groups, -1), self.heads // self.groups, axis=2)
            for array in (key, query)
        )

        def of_heads(name, init):
            return self.param(name, partitioned(init, None), (self.heads,), jnp.float32)

        step = jax.nn.softplus(raw_step.astype(jnp.float32) + of_heads("step_bias", time_step_bias_init()))
        step = zero_where_missing(step, count)
        rate = jnp.exp(of_heads("log_rate", log_uniform_rate_init(1.0, 16.0)))
        skip = of_heads("skip", nn.initializers.ones_init())
        value = (inner * step[..., None]).astype(inner.dtype)
        out, memory = linear_attention(
            query, key, value, decay=-rate * step, scale=1.0, state=None if state is None else state.memory
        )
        out = (out + skip[:, None] * inner).astype(z.dtype).reshape(batch, time, -1)
        norm = GatedRMSNorm(
            self.norm_epsilon, gate_first=True, axis="heads", dtype=z.dtype, param_dtype=self.param_dtype, name="norm"
        )
        y = self.project_out()(norm(out, z))
        return y, None if state is None else StateSpaceState(memory, convolution)

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        return StateSpaceState(
            empty_memory(batch_size, self.heads, self.state_size, self._inner // self.heads),
            self.empty_convolution(batch_size, self.kernel_size, self._channels),
        )

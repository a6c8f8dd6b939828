"""Layers that Sieber et al. (2024, "Understanding the differences in Foundation Models") compare as dynamical systems.

Softmax and linear attention among them are `softmax` and `linear_attention`. None of these has positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.linear_attention import linear_attention
from kernels.selective_scan import selective_scan
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.scans import leaky_sum
from zoo.mixers.base import register
from zoo.mixers.heads import ProjectedHeads
from zoo.mixers.recurrent import (
    RecurrentMixer,
    check_batch_size,
    empty_memory,
    exists,
    time_step_bias_init,
    zero_where_missing,
)
from zoo.mixers.selective_scan import log_count_init


@register("normalized_attention")
class NormalizedAttention(RecurrentMixer, ProjectedHeads):
    """o_i = sum_{j<=i} (q_i . k_j) v_j / exp(w . x_i + b): linear attention whose divisor is learned, and free.

    Neither a feature map nor a scale; one w and b for each head, the submodule `normalizer`.

    Fields: those of `ProjectedHeads`.
    """

    def setup(self):
        """The projections, and the one of the divisor's logarithm."""
        super().setup()
        self.normalizer = dense(
            self.heads, ("embed", None), kernel_init=self.kernel_init, dtype=self.dtype, param_dtype=self.param_dtype
        )

    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        query, key = self.unrotated(x)
        value = zero_where_missing(self.split_values(x), count)
        out, memory = linear_attention(query, zero_where_missing(key, count), value, scale=1.0, state=state)
        divided = out.astype(jnp.float32) * jnp.exp(-self.normalizer(x).astype(jnp.float32))[..., None]
        y = self.out(divided.astype(value.dtype).reshape(*x.shape[:2], -1))
        return y, None if state is None else memory

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        return empty_memory(batch_size, self.heads, self.width_of_query, self.width_of_head)


@register("plain_s6")
class PlainSelectiveScan(RecurrentMixer):
    """h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t; y_t = C_t . h_t + D x_t; out(y): Mamba's scan of the input itself.

    No projection in, convolution or gate. dt (through a softplus), B and C are projections of x.

    Fields beside those of `Mixer`:
      state_size: numbers of a channel's state, and width of B and C.
      scalar: as in Mamba-2 all channels have one rate -A, and one dt but for their biases; dt's projection has rank 1.
        Otherwise each number of a state has its own rate, each channel its own dt, by rank features / 16, rounded up.
      step_bias_init: of dt's bias.
    """

    state_size: int = 16
    scalar: bool = False
    step_bias_init: Callable = time_step_bias_init()

    def __post_init__(self):
        super().__post_init__()
        if self.state_size < 1:
            raise ValueError(f"state_size must be at least 1, got {self.state_size}")

    def setup(self):
        """The projections and the system's numbers."""
        options = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        channels, size = self.features, self.state_size
        rank = 1 if self.scalar else math.ceil(channels / 16)
        self.parameters = dense(rank + 2 * size, ("embed", None), kernel_init=self.kernel_init, **options)
        if not self.scalar:
            self.step = dense(channels, (None, "heads"), kernel_init=self.kernel_init, **options)
        rates = (1,) if self.scalar else (channels, size)
        axes = (None,) if self.scalar else ("heads", None)
        self.log_rate = self.param("log_rate", partitioned(log_count_init, *axes), rates, jnp.float32)
        for_channels = ((channels,), jnp.float32)
        self.step_bias = self.param("step_bias", partitioned(self.step_bias_init, "heads"), *for_channels)
        self.skip = self.param("skip", partitioned(nn.initializers.ones_init(), "heads"), *for_channels)
        self.out = dense(self.features, ("heads", "embed"), kernel_init=self.out_init, **options)

    def system(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """dt before its bias and softplus (batch, time, features), A (features, n), B and C (batch, time, n)."""
        narrow, size = self.parameters(x), self.state_size
        step, b, c = jnp.split(narrow, [narrow.shape[-1] - 2 * size, narrow.shape[-1] - size], axis=-1)
        step = jnp.broadcast_to(step, x.shape) if self.scalar else self.step(step)
        return step, jnp.broadcast_to(-jnp.exp(self.log_rate), (self.features, size)), b, c

    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        step, rate, b, c = self.system(x)
        x = x.astype(b.dtype)
        softplus = count is None
        if not softplus:  # a step of 0 leaves the state alone, which no softplus is
            step = zero_where_missing(jax.nn.softplus(step.astype(jnp.float32) + self.step_bias), count)
        out, memory = selective_scan(
            x[:, :, None], step[:, :, None], rate[None], b[:, :, None], c[:, :, None], skip=self.skip[None],
            delta_bias=self.step_bias[None] if softplus else None, softplus=softplus,
            state=None if state is None else state[:, None],
        )  # fmt: skip
        return self.out(out[:, :, 0]), None if state is None else memory[:, 0]

    @nn.nowrap
    def init_state(self, batch_size, length):
        """float32 (batch, features, state_size)."""
        check_batch_size(batch_size)
        return jnp.zeros((batch_size, self.features, self.state_size), jnp.float32)


class QuasiLSTMState(NamedTuple):
    """The past of a quasi-LSTM."""

    memory: jax.Array  # float32 (batch, hidden)
    convolution: jax.Array  # (batch, kernel_size - 1, hidden)


@register("qlstm")
class QuasiLSTM(RecurrentMixer):
    """h_t = a_t h_(t-1) + sigmoid(i_t) u_t; out(gelu(z_t) sigmoid(o_t) h_t): gates that do not see the state.

    z and u are projections of the input; u passes a short convolution; f, i and o are projections of u.
    a = sigmoid(f), or where `reversed` sigmoid(-f)^relu(alpha), which is how S6 forgets: exp(-alpha softplus(f)).

    Fields beside those of `Mixer`:
      expand: width of the state, as a multiple of features.
      kernel_size: of the convolution.
      reversed: see there; alpha is learned, from 1.
    """

    expand: float = 2.0
    kernel_size: int = 4
    reversed: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.features * self.expand < 1 or self.features * self.expand % 1 or self.kernel_size < 1:
            raise ValueError(
                f"features * expand must be a whole number and kernel_size at least 1, got {self.features} * "
                f"{self.expand} and {self.kernel_size}"
            )

    @property
    def hidden(self) -> int:
        """Numbers of the state."""
        return int(self.features * self.expand)

    @nn.compact
    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        gate = self.project(self.hidden, "gate")(x)
        inner, convolution = self.convolution(
            self.hidden, "convolution", kernel_size=self.kernel_size, use_bias=True, activation=None
        )(self.project(self.hidden, "value")(x), None if state is None else state.convolution, count)  # fmt: skip
        forget, enter, leave = (
            dense(
                self.hidden, (None, "heads"), kernel_init=self.kernel_init, dtype=self.dtype,
                param_dtype=self.param_dtype, name=name,
            )(inner)
            for name in ("forget", "enter", "leave")
        )  # fmt: skip
        alpha = None
        if self.reversed:
            alpha = self.param("alpha", partitioned(nn.initializers.ones_init(), None), (1,), jnp.float32)
        keep = forget_gate(forget, alpha)
        there = exists(x, count)
        if there is not None:
            keep = jnp.where(there[..., None], keep, 1)
        entering = zero_where_missing(nn.sigmoid(enter.astype(jnp.float32)) * inner.astype(jnp.float32), count)
        memory = leaky_sum(entering, keep, None if state is None else state.memory)
        out = nn.gelu(gate, approximate=False) * (nn.sigmoid(leave.astype(jnp.float32)) * memory).astype(gate.dtype)
        return self.project_out()(out), None if state is None else QuasiLSTMState(memory[:, -1], convolution)

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        check_batch_size(batch_size)
        memory = jnp.zeros((batch_size, self.hidden), jnp.float32)
        return QuasiLSTMState(memory, self.empty_convolution(batch_size, self.kernel_size, self.hidden))


def forget_gate(logits: jax.Array, alpha: jax.Array | None = None) -> jax.Array:
    """float32: sigmoid(f), or with alpha the reversed sigmoid(-f)^relu(alpha) = exp(-relu(alpha) softplus(f))."""
    logits = logits.astype(jnp.float32)
    return nn.sigmoid(logits) if alpha is None else jnp.exp(-nn.relu(alpha) * nn.softplus(logits))

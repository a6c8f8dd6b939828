"""The selective state-space layer of Mamba (Gu and Dao 2023, "S6")."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.selective_scan import selective_scan
from zoo.layers.partitioning import dense, partitioned
from zoo.mixers.base import register
from zoo.mixers.recurrent import RecurrentMixer, check_batch_size, time_step_bias_init, zero_where_missing


class SelectiveScanState(NamedTuple):
    """The past of Mamba's layer."""

    memory: jax.Array  # float32 (batch, channels, state_size)
    convolution: jax.Array  # (batch, kernel_size - 1, channels)


def log_count_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """log(1), log(2), ... along the last axis: the rates of S4D-Real (Gu et al. 2022)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


def step_kernel_init(rank: int) -> Callable:
    """Uniform in +-rank ** -0.5 (Gu and Dao 2023)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -(rank**-0.5), rank**-0.5)


@register("s6")
class SelectiveScan(RecurrentMixer):
    """h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t; y_t = C_t . h_t + D x_t; out(y silu(z)).

    x and z are projections of the input; x passes a short convolution and silu; dt (through a softplus), B and C are
    projections of x. Every channel has its own rates -A and skip D; all share B and C.

    Fields beside those of `Mixer`:
      expand: width of x and z, as a multiple of features.
      state_size: numbers of a channel's state, and width of B and C.
      step_rank: rank of dt's projection; None is features / 16, rounded up.
      kernel_size: of the convolution.
    """

    expand: float = 2.0
    state_size: int = 16
    step_rank: int | None = None
    kernel_size: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.features * self.expand < 1 or self.features * self.expand % 1:
            raise ValueError(f"features * expand must be a whole number, got {self.features} * {self.expand}")
        if self.state_size < 1 or self.kernel_size < 1 or (self.step_rank is not None and self.step_rank < 1):
            raise ValueError(
                f"state_size, kernel_size and step_rank must be at least 1, got {self.state_size}, {self.kernel_size} "
                f"and {self.step_rank}"
            )

    @property
    def _inner(self) -> int:
        return int(self.features * self.expand)

    @nn.compact
    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        rank = self.step_rank or math.ceil(self.features / 16)
        z = self.project(self._inner, "gate")(x)
        inner, convolution = self.convolution(
            self._inner, "convolution", kernel_size=self.kernel_size, use_bias=True
        )(self.project(self._inner, "value")(x), None if state is None else state.convolution, count)  # fmt: skip
        options = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        narrow = dense(
            rank + 2 * self.state_size, ("heads", None), kernel_init=self.kernel_init, name="parameters", **options
        )(inner)
        step, b, c = jnp.split(narrow, [rank, rank + self.state_size], axis=-1)
        step = dense(self._inner, (None, "heads"), kernel_init=step_kernel_init(rank), name="step", **options)(step)

        def of_channels(name: str, init: Callable, *sizes: int) -> jax.Array:
            axes = ("heads", *(None for _ in sizes))
            return self.param(name, partitioned(init, *axes), (self._inner, *sizes), jnp.float32)

        bias = of_channels("step_bias", time_step_bias_init())
        rate = jnp.exp(of_channels("log_rate", log_count_init, self.state_size))
        skip = of_channels("skip", nn.initializers.ones_init())
        softplus = count is None
        if not softplus:  # a step of 0 leaves the state alone, which no softplus is
            step = zero_where_missing(jax.nn.softplus(step.astype(jnp.float32) + bias), count)
        out, memory = selective_scan(
            inner[:, :, None], step[:, :, None], -rate[None], b[:, :, None], c[:, :, None], skip=skip[None],
            gate=z.astype(inner.dtype)[:, :, None], delta_bias=bias[None] if softplus else None, softplus=softplus,
            state=None if state is None else state.memory[:, None],
        )  # fmt: skip
        y = self.project_out()(out[:, :, 0])
        return y, None if state is None else SelectiveScanState(memory[:, 0], convolution)

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        check_batch_size(batch_size)
        return SelectiveScanState(
            jnp.zeros((batch_size, self._inner, self.state_size), jnp.float32),
            self.empty_convolution(batch_size, self.kernel_size, self._inner),
        )

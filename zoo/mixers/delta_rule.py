"""DeltaNet (Schlag et al. 2021; Yang et al. 2024) and Gated DeltaNet (Yang et al. 2025)."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.delta_rule import delta_rule
from zoo.layers.norms import GatedRMSNorm, norm
from zoo.layers.partitioning import partitioned
from zoo.mixers.base import register
from zoo.mixers.recurrent import (
    RecurrentMixer,
    check_batch_size,
    log_uniform_rate_init,
    time_step_bias_init,
    unit_length,
    zero_where_missing,
)


class DeltaState(NamedTuple):
    """The past of a delta rule."""

    memory: jax.Array  # (batch, heads, key width, value width) float32
    query: jax.Array  # the convolutions' pasts: (batch, kernel_size - 1, all heads' width)
    key: jax.Array
    value: jax.Array


@register("deltanet")
class DeltaNet(RecurrentMixer):
    """S_t = (1 - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T; y = out(rms_norm(S_t^T q_t / sqrt(width))).

    Queries, keys and values pass a short convolution and silu; queries and keys are normalised to length 1; beta is a
    sigmoid.

    Fields beside those of `Mixer`:
      heads: their number.
      expand_key, expand_value: widths of keys and values of all heads, as multiples of features.
      kernel_size: of the convolutions.
      norm_epsilon: of each head's norm.
    """

    heads: int = 4
    expand_key: float = 1.0
    expand_value: float = 1.0
    kernel_size: int = 4
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        self.expanded_widths()  # raises where heads do not divide them

    @nn.compact
    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        width, value_width = self.expanded_widths()
        pasts, arrays = {}, {}
        for name, features in (("query", width), ("key", width), ("value", value_width)):
            projected = self.project(self.heads * features, name)(x)
            convolve = self.convolution(self.heads * features, f"{name}_convolution", kernel_size=self.kernel_size)
            array, pasts[name] = convolve(projected, None if state is None else getattr(state, name), count)
            arrays[name] = self.split_heads(array)
        query, key, value = unit_length(arrays["query"]), unit_length(arrays["key"]), arrays["value"]
        beta = jax.nn.sigmoid(self.project(self.heads, "beta")(x).astype(jnp.float32))
        out, memory = delta_rule(
            query, key, value, zero_where_missing(beta, count), decay=self._decay(x, count),
            state=None if state is None else state.memory,
        )  # fmt: skip
        y = self._normalized(x, out)
        y = self.project_out()(y.reshape(*x.shape[:2], -1))
        return y, None if state is None else DeltaState(memory, **pasts)

    def _decay(self, x: jax.Array, count: jax.Array | None) -> jax.Array | None:
        """Log decay (batch, time, heads) of the state, or None."""
        return None

    def _normalized(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """What the projection out takes: (batch, time, heads, value width)."""
        options = {"dtype": out.dtype, "param_dtype": self.param_dtype, "name": "norm"}
        return norm("rms", epsilon=self.norm_epsilon, axis=None, **options)(out)

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        check_batch_size(batch_size)
        width, value_width = self.expanded_widths()
        query, key = (self.empty_convolution(batch_size, self.kernel_size, self.heads * width) for _ in range(2))
        return DeltaState(
            jnp.zeros((batch_size, self.heads, width, value_width), jnp.float32),
            query,
            key,
            self.empty_convolution(batch_size, self.kernel_size, self.heads * value_width),
        )


@register("gated_deltanet")
class GatedDeltaNet(DeltaNet):
    """DeltaNet whose state decays by exp(-a softplus(w x_t + b)) before each token, and whose output is gated by silu.

    Fields: those of `DeltaNet`. The published widths keep the parameters at 6 features^2.
    """

    expand_key: float = 0.75
    expand_value: float = 1.5

    def _decay(self, x, count):
        def of_heads(name, init):
            return self.param(name, partitioned(init, None), (self.heads,), jnp.float32)

        step = self.project(self.heads, "step")(x).astype(jnp.float32) + of_heads("step_bias", time_step_bias_init())
        rate = jnp.exp(of_heads("log_rate", log_uniform_rate_init(0.0, 16.0)))
        return zero_where_missing(-rate * jax.nn.softplus(step), count)

    def _normalized(self, x, out):
        gate = self.split_heads(self.project(self.heads * self.expanded_widths()[1], "gate")(x))
        return GatedRMSNorm(self.norm_epsilon, dtype=out.dtype, param_dtype=self.param_dtype, name="norm")(out, gate)

"""Gated linear attention (Yang et al. 2024, "GLA")."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.linear_attention import linear_attention
from zoo.layers.norms import GatedRMSNorm
from zoo.layers.partitioning import dense
from zoo.mixers.base import register
from zoo.mixers.recurrent import RecurrentMixer, empty_memory, zero_where_missing


@register("gla")
class GatedLinearAttention(RecurrentMixer):
    """S_t = diag(alpha_t) S_(t-1) + k_t v_t^T; y = out(rms_norm(S_t^T q_t) silu(gate)).

    alpha_t = sigmoid(W_2 W_1 x_t + b)^(1 / gate_normalizer), a number for each channel of a key.

    Fields beside those of `Mixer`:
      heads: their number.
      expand_key, expand_value: widths of keys and values of all heads, as multiples of features.
      gate_rank: rows of W_1.
      gate_normalizer: see there; a larger one forgets less.
      norm_epsilon: of each head's norm.
    """

    heads: int = 4
    expand_key: float = 0.5
    expand_value: float = 1.0
    gate_rank: int = 16
    gate_normalizer: float = 16.0
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        self.expanded_widths()  # raises where heads do not divide them

    @nn.compact
    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        width, value_width = self.expanded_widths()
        query = self.split_heads(self.project(self.heads * width, "query")(x))
        key = self.split_heads(self.project(self.heads * width, "key")(x))
        value = self.split_heads(self.project(self.heads * value_width, "value")(x))
        gate = self.split_heads(self.project(self.heads * value_width, "gate")(x))
        low_rank = self.project(self.gate_rank, "forget_down", None)(x)
        forget = dense(
            self.heads * width, (None, "heads"), kernel_init=self.kernel_init, dtype=self.dtype,
            param_dtype=self.param_dtype, name="forget_up",
        )(low_rank)  # fmt: skip
        decay = jax.nn.log_sigmoid(self.split_heads(forget).astype(jnp.float32)) / self.gate_normalizer
        out, memory = linear_attention(
            query, zero_where_missing(key, count), value, decay=zero_where_missing(decay, count), state=state
        )
        norm = GatedRMSNorm(self.norm_epsilon, dtype=value.dtype, param_dtype=self.param_dtype, name="norm")
        y = self.project_out()(norm(out, gate).reshape(*x.shape[:2], -1))
        return y, None if state is None else memory

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        return empty_memory(batch_size, self.heads, *self.expanded_widths())

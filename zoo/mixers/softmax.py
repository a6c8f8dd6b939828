"""Multi-head softmax attention (Vaswani et al. 2017) and its published variations."""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import attention
from kernels.attention_readout import attention_entries
from zoo.layers.partitioning import partitioned
from zoo.mixers import cache
from zoo.mixers.base import register, token_positions
from zoo.mixers.heads import ProjectedHeads


@register("softmax")
class SoftmaxAttention(ProjectedHeads):
    """Softmax attention of several heads between linear projections.

    Its state is a `zoo.mixers.cache.KeyValueCache`: `length` slots, or `window` if that is less. A cache without a
    window must not be overfilled: ValueError where that is known before compilation, wrong outputs within `jit`.

    For probes (`flax.linen.intercept_methods`): the submodules `query`, `key`, `value` give the projections, the method
    `attend` takes queries and keys as they are compared and gives the heads' outputs, `out` takes these.

    Fields beside those of `ProjectedHeads`:
      window: a token sees those at a distance below it: causally itself and the window - 1 before. None is all.
      dropout: probability of dropping an attention weight.
      softcap: c caps logits to c tanh(logits / c).
      sinks: a learned logit per head that joins the softmax's denominator only.
      scale: factor of the logits; None is head_dim^-0.5.
    """

    window: int | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be None or positive, got {self.window}")

    def setup(self):
        """The projections; parameters are independent of every length."""
        super().setup()
        if self.sinks:
            self.sink_logits = self.param(
                "sinks", partitioned(nn.initializers.zeros_init(), None), (self.heads,), jnp.float32
            )

    def __call__(self, x, state=None, *, valid=None, deterministic=True, query_key=None):
        """See `Mixer`.

        Args:
          query_key: queries and keys of these tokens from elsewhere, as `query_key` gives them; None is from x.
        """
        self.check(x, state, valid)
        shape = x.shape[:2]
        positions = token_positions(shape, valid, None if state is None else state.length)
        query, key = self.query_key(x, positions) if query_key is None else query_key
        dtype = query.dtype
        value = self.split_values(x)
        state, key, value, mask = self.remember(state, key, value, positions, valid)
        query = query.astype(key.dtype)
        heads = self.attend(query, key, value, mask, deterministic=deterministic)
        y = self.out(heads.reshape(*shape, -1).astype(dtype))
        return (y if valid is None else jnp.where(valid[..., None], y, 0)), state

    @nn.nowrap
    def remember(
        self,
        state: cache.KeyValueCache | None,
        key: jax.Array,
        value: jax.Array,
        positions: jax.Array,
        valid: jax.Array | None,
    ) -> tuple[cache.KeyValueCache | None, jax.Array, jax.Array, dict[str, Any]]:
        """The next state, and keys and values of past and new tokens with the mask of `attend`."""
        if state is not None:
            return cache.append(state, key, value, positions, self.window)
        if valid is None:
            return None, key, value, {}
        segments = valid.astype(jnp.int32)
        mask = {
            "query_positions": positions,
            "key_positions": positions,
            "query_segment_ids": segments,
            "key_segment_ids": segments,
        }
        return None, key, value, mask

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: dict[str, Any], *, deterministic: bool
    ) -> jax.Array:
        """Queries (batch, time, heads, head_dim) over keys and values to the heads' outputs, like the queries.

        `mask` holds the arguments of `kernels.attention.attention` that say which keys a query sees.
        """
        dropout = 0.0 if deterministic else self.dropout
        rng = self.make_rng("dropout") if dropout > 0 else None
        out = attention(query, key, value, dropout_rate=dropout, dropout_rng=rng, **self.logits(mask))
        return cast(jax.Array, out)

    def logits(self, mask: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `kernels.attention.attention` that make the map of queries and keys, `mask` among them."""
        window = None
        if self.window is not None:
            window = (self.window - 1, 0 if self.causal else self.window - 1)
        return {
            "causal": self.causal,
            "window": window,
            "scale": self.scale,
            "logit_softcap": self.softcap,
            "sinks": self.sink_logits if self.sinks else None,
            **mask,
        }

    def weights(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """The map: float32 (batch, heads, time, time) of queries and keys as they are compared, without padding."""
        return attention_entries(query, key, **self.logits({}))

    @nn.nowrap
    def init_state(self, batch_size: int, length: int) -> cache.KeyValueCache:
        """See `Mixer`."""
        widths = (self.width_of_query, self.width_of_head)
        return cache.empty(batch_size, length, self.window, self.key_head_count, *widths, self.state_dtype)

"""Multi-head softmax attention (Vaswani et al. 2017) and its published variations."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import attention
from zoo.layers.norms import NormKind, norm
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.rotary import Rotary, rotate
from zoo.mixers import cache
from zoo.mixers.base import Mixer, register, token_positions


@register("softmax")
class SoftmaxAttention(Mixer):
    """Softmax attention of several heads between linear projections.

    Its state is a `zoo.mixers.cache.KeyValueCache`: `length` slots, or `window` if that is less. A cache without a
    window must not be overfilled: ValueError where that is known before compilation, wrong outputs within `jit`.

    For probes (`flax.linen.intercept_methods`): the submodules `query`, `key`, `value` give the projections, the method
    `attend` takes queries and keys as they are compared and gives the heads' outputs, `out` takes these.

    Fields beside those of `Mixer`:
      heads: query heads.
      key_heads: key and value heads, a divisor of `heads`, each shared by consecutive query heads (grouped-query
        attention, Ainslie et al. 2023); None is `heads`.
      head_dim: width of a head; None is features / heads.
      window: a token sees those at a distance below it: causally itself and the window - 1 before. None is all.
      rotary: rotary position embedding of queries and keys, or None.
      qk_norm: norm of each head's query and key before the rotation (Dehghani et al. 2023), "layer" or "rms".
      qk_norm_epsilon: that norm's.
      qkv_bias, out_bias: whether the projections have biases.
      dropout: probability of dropping an attention weight.
      softcap: c caps logits to c tanh(logits / c).
      sinks: a learned logit per head that joins the softmax's denominator only.
      scale: factor of the logits; None is head_dim^-0.5.
    """

    heads: int = 8
    key_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    rotary: Rotary | None = None
    qk_norm: NormKind | None = None
    qk_norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    dropout: float = 0.0
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.heads < 1 or (self.head_dim is None and self.features % self.heads):
            raise ValueError(f"features ({self.features}) must be a multiple of heads ({self.heads}), or give head_dim")
        if self.key_heads is not None and (self.key_heads < 1 or self.heads % self.key_heads):
            raise ValueError(f"heads ({self.heads}) must be a multiple of key_heads ({self.key_heads})")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be None or positive, got {self.window}")
        if self.rotary is not None:
            self.rotary.frequencies(self._head_dim)

    @property
    def _head_dim(self) -> int:
        return self.features // self.heads if self.head_dim is None else self.head_dim

    @property
    def _key_heads(self) -> int:
        return self.heads if self.key_heads is None else self.key_heads

    def setup(self):
        """The projections; parameters are independent of every length."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        project = partial(dense, use_bias=self.qkv_bias, kernel_init=self.kernel_init, **options)
        self.query = project(self.heads * self._head_dim, ("embed", "heads"))
        self.key = project(self._key_heads * self._head_dim, ("embed", "kv_heads"))
        self.value = project(self._key_heads * self._head_dim, ("embed", "kv_heads"))
        self.out = dense(
            self.features, ("heads", "embed"), use_bias=self.out_bias, kernel_init=self.out_init, **options
        )
        if self.qk_norm is not None:
            self.query_norm = norm(self.qk_norm, epsilon=self.qk_norm_epsilon, axis=None, **options)
            self.key_norm = norm(self.qk_norm, epsilon=self.qk_norm_epsilon, axis=None, **options)
        if self.sinks:
            self.sink_logits = self.param(
                "sinks", partitioned(nn.initializers.zeros_init(), None), (self.heads,), jnp.float32
            )

    def __call__(self, x, state=None, *, valid=None, deterministic=True):
        """See `Mixer`."""
        self.check(x, state, valid)
        shape = x.shape[:2]
        positions = token_positions(shape, valid, None if state is None else state.length)
        query, key, value = self.project(x, positions)
        dtype = query.dtype
        state, key, value, mask = self.remember(state, key, value, positions, valid)
        query = query.astype(key.dtype)
        heads = self.attend(query, key, value, mask, deterministic=deterministic)
        y = self.out(heads.reshape(*shape, -1).astype(dtype))
        return (y if valid is None else jnp.where(valid[..., None], y, 0)), state

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (batch, time, their heads, head_dim) of tokens at positions (batch or 1, time)."""
        shape = x.shape[:2]
        query = self.query(x).reshape(*shape, self.heads, -1)
        key = self.key(x).reshape(*shape, self._key_heads, -1)
        value = self.value(x).reshape(*shape, self._key_heads, -1)
        if self.qk_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary is not None:
            query, key = rotate(query, positions, self.rotary), rotate(key, positions, self.rotary)
        return query, key, value

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

    @nn.nowrap
    def init_state(self, batch_size: int, length: int) -> cache.KeyValueCache:
        """See `Mixer`."""
        return cache.empty(batch_size, length, self.window, self._key_heads, self._head_dim, self.state_dtype)

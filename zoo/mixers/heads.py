"""Queries, keys and values of several heads, which many attentions have in common."""

from __future__ import annotations

from functools import partial

import jax

from zoo.layers.norms import NormKind, norm
from zoo.layers.partitioning import dense
from zoo.layers.rotary import Rotary, rotate
from zoo.mixers.base import Mixer


class ProjectedHeads(Mixer):
    """A mixer of heads between linear projections `query`, `key`, `value` and `out`.

    Fields beside those of `Mixer`:
      heads: query heads.
      key_heads: key and value heads, a divisor of `heads`, each shared by consecutive query heads (grouped-query
        attention, Ainslie et al. 2023); None is `heads`.
      head_dim: width of a head; None is features / heads.
      query_dim: width of a head's queries and keys; None is head_dim.
      rotary: rotary position embedding of queries and keys, or None.
      qk_norm: norm of each head's query and key before the rotation (Dehghani et al. 2023), "layer" or "rms".
      qk_norm_epsilon: that norm's.
      qkv_bias, out_bias: whether the projections have biases.
    """

    heads: int = 8
    key_heads: int | None = None
    head_dim: int | None = None
    query_dim: int | None = None
    rotary: Rotary | None = None
    qk_norm: NormKind | None = None
    qk_norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.heads < 1 or (self.head_dim is None and self.features % self.heads):
            raise ValueError(f"features ({self.features}) must be a multiple of heads ({self.heads}), or give head_dim")
        if self.key_heads is not None and (self.key_heads < 1 or self.heads % self.key_heads):
            raise ValueError(f"heads ({self.heads}) must be a multiple of key_heads ({self.key_heads})")
        if self.query_dim is not None and self.query_dim < 1:
            raise ValueError(f"query_dim must be None or positive, got {self.query_dim}")
        if self.rotary is not None:
            self.rotary.frequencies(self.width_of_query)

    @property
    def width_of_head(self) -> int:
        """Features of a head."""
        return self.features // self.heads if self.head_dim is None else self.head_dim

    @property
    def width_of_query(self) -> int:
        """Features of a head's queries and keys."""
        return self.width_of_head if self.query_dim is None else self.query_dim

    @property
    def key_head_count(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.key_heads is None else self.key_heads

    def setup(self):
        """The projections; parameters are independent of every length."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        project = partial(dense, use_bias=self.qkv_bias, kernel_init=self.kernel_init, **options)
        self.query = project(self.heads * self.width_of_query, ("embed", "heads"))
        self.key = project(self.key_head_count * self.width_of_query, ("embed", "kv_heads"))
        self.value = project(self.key_head_count * self.width_of_head, ("embed", "kv_heads"))
        self.out = dense(
            self.features, ("heads", "embed"), use_bias=self.out_bias, kernel_init=self.out_init, **options
        )
        if self.qk_norm is not None:
            self.query_norm = norm(self.qk_norm, epsilon=self.qk_norm_epsilon, axis=None, **options)
            self.key_norm = norm(self.qk_norm, epsilon=self.qk_norm_epsilon, axis=None, **options)

    def query_key(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries (batch, time, heads, width) and keys (batch, time, key heads, width), as they are compared.

        Args:
          x: (batch, time, features).
          positions: int32 (batch or 1, time), of the rotation.
        """
        query, key = self.unrotated(x)
        if self.rotary is None:
            return query, key
        return rotate(query, positions, self.rotary), rotate(key, positions, self.rotary)

    def unrotated(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys without their positions, shaped as those of `query_key`."""
        query = self.query(x).reshape(*x.shape[:2], self.heads, -1)
        key = self.key(x).reshape(*x.shape[:2], self.key_head_count, -1)
        return (query, key) if self.qk_norm is None else (self.query_norm(query), self.key_norm(key))

    def split_values(self, x: jax.Array) -> jax.Array:
        """Values of x (batch, time, features): (batch, time, key heads, width)."""
        return self.value(x).reshape(*x.shape[:2], self.key_head_count, -1)

    def query_key_value(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of x; see `query_key`."""
        return *self.query_key(x, positions), self.split_values(x)

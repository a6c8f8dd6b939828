"""Softmax attention over the keys that product quantisation finds (Gui et al. 2023, "SPT", arXiv 2312.10365)."""

from __future__ import annotations

from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import sparse_topl
from kernels.attention import attention
from zoo.layers.partitioning import partitioned
from zoo.mixers import cache
from zoo.mixers.base import register, token_positions
from zoo.mixers.heads import ProjectedHeads

_NEVER = 2**30  # the position of a key that no query sees


@register("sparse_topl")
class SparseTopLAttention(ProjectedHeads):
    """Each query attends to the L earlier keys whose codes agree most with its own, by logits cut to +-`clamp`.

    Queries and keys, rotated, are cut into parts of `codeword_dim` features, and each part is replaced by the number
    of the nearest (in L1) of `codewords` words of one codebook, shared by all heads and by queries and keys. The
    codebook learns from the collection "losses", entry "quantisation" (the quantisation losses of queries and of keys,
    summed), not from the output: `y, sown = mixer.apply(variables, x, mutable=["losses"])`.

    Its state is a `zoo.mixers.cache.KeyValueCache` in which codes lie beside the values.

    Fields beside those of `ProjectedHeads` (queries are as wide as values here):
      keep: L, the keys of a query. None is an eighth (`coefficient`) of the keys there are: of the sequence in parallel
        form, of the slots with a state, which therefore give the same only where they are as many.
      coefficient: of `keep` = None.
      sparse: False attends to all keys, and only trains the codebook (the published stage "mha_v1").
      codewords, codeword_dim: of the codebook.
      mode: "exact", or "prototype" for what the published CUDA kernel finds (parallel form without padding only).
      score: "match" counts equal codes; "inner_product", not published, adds up the inner products of the codewords
        and never leaves out position 0 and the query's own.
      clamp: bound of the logits.
    """

    keep: int | None = None
    coefficient: int = 8
    sparse: bool = True
    codewords: int = 16
    codeword_dim: int = 8
    mode: Literal["exact", "prototype"] = "exact"
    score: Literal["match", "inner_product"] = "match"
    clamp: float = 10.0

    def __post_init__(self):
        super().__post_init__()
        if not self.causal:
            raise ValueError("sparse_topl looks up earlier keys only: it has no form with causal=False")
        if self.query_dim not in (None, self.width_of_head):
            raise ValueError(f"query_dim must be head_dim ({self.width_of_head}), got {self.query_dim}")
        if self.codeword_dim < 1 or self.width_of_head % self.codeword_dim:
            raise ValueError(f"a head's {self.width_of_head} features must be a multiple of codeword_dim "
                             f"({self.codeword_dim})")  # fmt: skip
        if self.coefficient < 1 or (self.keep is not None and self.keep < 1):
            raise ValueError(f"keep and coefficient must be positive, got {self.keep} and {self.coefficient}")
        if self.mode not in ("exact", "prototype") or self.score not in ("match", "inner_product"):
            raise ValueError(f"mode must be 'exact' or 'prototype' and score 'match' or 'inner_product', got "
                             f"{self.mode!r} and {self.score!r}")  # fmt: skip

    @property
    def _subspaces(self) -> int:
        return self.width_of_head // self.codeword_dim

    def setup(self):
        """The projections and the codebook."""
        super().setup()
        self.codebook = self.param(
            "codebook", partitioned(nn.initializers.normal(1.0), None, None, None),
            (self._subspaces, self.codewords, self.codeword_dim), jnp.float32,
        )  # fmt: skip

    def __call__(self, x, state=None, *, valid=None, deterministic=True):
        """See `Mixer`."""
        self.check(x, state, valid)
        shape = x.shape[:2]
        positions = token_positions(shape, valid, None if state is None else state.length)
        query, key, value = self.query_key_value(x, positions)
        dtype = query.dtype
        if self.is_mutable_collection("losses") and not self.is_initializing():
            losses = [sparse_topl.quantisation_loss(z, self.codebook)[1] for z in (query, key)]
            self.sow("losses", "quantisation", losses[0] + losses[1])
        codebook = jax.lax.stop_gradient(self.codebook)
        query_codes, key_codes = (sparse_topl.encode(z, codebook) for z in (query, key))

        query_positions = jnp.broadcast_to(positions, shape)
        if state is not None:
            beside = jnp.concatenate([value, key_codes.astype(value.dtype)], axis=-1)
            state, key, beside, mask = cache.append(state, key, beside, positions, None)
            value, key_codes = jnp.split(beside, [self.width_of_head], axis=-1)
            key_codes = key_codes.astype(jnp.int32)
            # A slot's number is its token's position, and what is free lies beyond every query.
            key_positions = jnp.broadcast_to(jnp.arange(key.shape[1], dtype=jnp.int32), key.shape[:2])
            query = query.astype(key.dtype)
        elif valid is not None:
            key_positions = jnp.where(valid, query_positions, _NEVER)
            segments = valid.astype(jnp.int32)
            mask = {
                "query_positions": positions, "key_positions": positions,
                "query_segment_ids": segments, "key_segment_ids": segments,
            }  # fmt: skip
        else:
            key_positions, mask = query_positions, {}

        heads = self.attend(query, key, value, query_codes, key_codes, query_positions, key_positions, mask)
        y = self.out(heads.reshape(*shape, -1).astype(dtype))
        return (y if valid is None else jnp.where(valid[..., None], y, 0)), state

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        query_codes: jax.Array,
        key_codes: jax.Array,
        query_positions: jax.Array,
        key_positions: jax.Array,
        mask: dict[str, Any],
    ) -> jax.Array:
        """Queries (batch, time, heads, head_dim) over keys and values to the heads' outputs, like the queries.

        Codes are (batch, time, heads or key heads, subspaces), positions (batch, time), a key that is not there beyond
        every query's. `mask` says the same to `kernels.attention.attention`; it is empty in the plain parallel form.
        """
        if not self.sparse:
            return cast(jax.Array, attention(query, key, value, causal=True, **mask))
        keep = self.kept(key.shape[1])
        if not mask and self.mode == "exact" and self.score == "match":
            return sparse_topl.sparse_attention(
                query, key, value, query_codes, key_codes, keep=keep, codewords=self.codewords, clamp=self.clamp
            )
        codebook = jax.lax.stop_gradient(self.codebook) if self.score == "inner_product" else None
        indices = sparse_topl.lookup(
            query_codes, key_codes, keep=keep, mode=self.mode, codebook=codebook,
            query_positions=query_positions, key_positions=key_positions,
        )  # fmt: skip
        return sparse_topl.listed_attention(query, key, value, indices, clamp=self.clamp)

    @nn.nowrap
    def kept(self, keys: int) -> int:
        """How many of so many keys a query attends to."""
        return min(self.keep or max(1, keys // self.coefficient), keys)

    @nn.nowrap
    def init_state(self, batch_size: int, length: int) -> cache.KeyValueCache:
        """See `Mixer`."""
        widths = (self.width_of_query, self.width_of_head)
        made = cache.empty(batch_size, length, None, self.key_head_count, *widths, self.state_dtype)
        codes: Any = jnp.zeros((*made.value.shape[:3], self._subspaces), made.value.dtype)
        return made._replace(value=jnp.concatenate([made.value, codes], axis=-1))

"""Linear attention, one chunk at a time, exact for any length of chunk: what XLA, Mosaic and Triton all run.

Within a chunk tokens attend as in attention without its softmax; what came before reaches them through the state
(Katharopoulos et al. 2020; with decays: Sun et al. 2023, "RetNet"; Yang et al. 2024, "GLA"; Dao and Gu 2024, "SSD").
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kernels.linear_attention.features import Options, pointwise, taylor_tile
from kernels.recurrent import tile
from kernels.recurrent.tile import Arithmetic, product


@dataclasses.dataclass(frozen=True)
class Chunk:
    """`kernels.recurrent.Chunk` of linear attention: state (S^T (E, F), z (1, F))."""

    options: Options
    width: int  # D; where a kernel needs a power of 2, matrices are wider, filled up with zeros
    name: str = "linear_attention"
    value_states: tuple[bool, ...] = (True, False)

    def __call__(
        self,
        state: tuple[jax.Array, ...],
        inputs: dict[str, jax.Array],
        tokens: jax.Array | None,
        arithmetic: Arithmetic,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """One chunk.

        Args:
          state: before it.
          inputs: query and key (time, D), value (time, E), and where there is one the log decay: "decay" (1, time) or
            "channel_decay" (time, D).
          tokens: how many exist, None for all.
          arithmetic: of matrix products.

        Returns:
          The state after it and out (time, E).
        """
        options, (memory, key_sum) = self.options, state
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        decay, channel_decay = (tile.bounded(inputs.get(name)) for name in ("decay", "channel_decay"))
        row, column = tile.places(query.shape[0], query.shape[0])
        scale = options.scale
        query, key = pointwise(query, options.feature_map), pointwise(key, options.feature_map)
        if options.feature_map == "elu" and query.shape[1] > self.width:  # 1 is the feature of a zero
            channel = jax.lax.broadcasted_iota(jnp.int32, query.shape, 1)
            query = jnp.where(channel < self.width, query, 0.0)
        if channel_decay is not None:
            weights = tile.decayed_products(query, key, channel_decay, arithmetic)
        else:
            weights = product(query, key, (1, 1), arithmetic)
            if options.feature_map == "taylor":
                weights = 1 + scale * weights * (1 + (0.5 * scale) * weights)
                query, key = (taylor_tile(x, scale, self.width, memory.shape[1], arithmetic) for x in (query, key))
                scale = 1.0
            if decay is not None:
                weights *= tile.decay_between(decay, arithmetic)
            weights = jnp.where(row >= column, weights, 0.0)
        if tokens is not None:  # likewise
            token = jax.lax.broadcasted_iota(jnp.int32, key.shape, 0)
            key = jnp.where(token < tokens, key, 0.0)

        carry = None
        if channel_decay is not None:
            query *= jnp.exp(tile.select((row >= column).astype(jnp.float32), channel_decay, 1, arithmetic))
            key *= jnp.exp(tile.select((row < column).astype(jnp.float32), channel_decay, 1, arithmetic))
            carry = jnp.exp(jnp.sum(channel_decay, axis=0, keepdims=True))
        elif decay is not None:
            query *= tile.decay_since_start(decay)
            key *= tile.decay_until_end(decay)
            carry = jnp.exp(jnp.sum(decay, axis=1, keepdims=True))

        out = product(weights, value, (1, 0), arithmetic) + product(query, memory, (1, 1), arithmetic)
        if options.normalize:
            denominator = jnp.sum(weights, axis=1, keepdims=True) + jnp.sum(query * key_sum, axis=1, keepdims=True)
            out = tile.quotient(out, denominator + options.epsilon / scale)
        else:
            out *= scale
        if carry is not None:
            memory, key_sum = memory * carry, key_sum * carry
        memory += product(value, key, (0, 0), arithmetic)
        return (memory, key_sum + jnp.sum(key, axis=0, keepdims=True)), out

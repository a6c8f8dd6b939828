"""The gated delta rule, one chunk at a time, exact for any length of chunk: what XLA, Mosaic and Triton all run.

The WY form (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"; with decay:
Yang et al. 2025, "Gated Delta Networks"): what each token of a chunk writes solves one unit triangular system.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kernels.recurrent import tile
from kernels.recurrent.tile import Arithmetic, product


@dataclasses.dataclass(frozen=True)
class Chunk:
    """`kernels.recurrent.Chunk` of the delta rule: state (S^T (E, D),)."""

    scale: float
    name: str = "delta_rule"
    value_states: tuple[bool, ...] = (True,)

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
          inputs: query and key (time, D), value (time, E), beta (1, time) and, where there is one, log decay (1, time).
          tokens: how many exist, None for all.
          arithmetic: of matrix products; the triangular system is solved to 16 bits at least.

        Returns:
          The state after it and out (time, E).
        """
        (memory,) = state
        query, key, value, decay = inputs["query"], inputs["key"], inputs["value"], tile.bounded(inputs.get("decay"))
        row, column = tile.places(query.shape[0], query.shape[0])
        beta = tile.as_column(inputs["beta"])
        overlap, weights = product(key, key, (1, 1), arithmetic), product(query, key, (1, 1), arithmetic)
        recalling = writing = key
        if decay is not None:
            between, since_start = tile.decay_between(decay, arithmetic), tile.decay_since_start(decay)
            overlap, weights = overlap * between, weights * between
            recalling, query = key * since_start, query * since_start
            writing = key * tile.decay_until_end(decay)
        inverse = tile.unit_triangular_inverse(jnp.where(row > column, beta * overlap, 0.0), arithmetic)
        # Of each token, its value less what the memory recalls, and less what the tokens before it in the chunk write.
        surprise = beta * (value - product(recalling, memory, (1, 1), arithmetic))
        written = product(inverse, surprise, (1, 0), arithmetic)
        out = product(query, memory, (1, 1), arithmetic)
        out += product(jnp.where(row >= column, weights, 0.0), written, (1, 0), arithmetic)
        if decay is not None:
            memory = memory * jnp.exp(jnp.sum(decay, axis=1, keepdims=True))
        return (memory + product(written, writing, (0, 0), arithmetic),), self.scale * out

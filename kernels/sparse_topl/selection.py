"""What a query selects, as one number: the kernels mask with it and need no list of keys.

Key j, with `score` codes in common with the query, has the order score * S + S - 1 - j: larger for more codes in common
and, among equals, for earlier keys. A query's keys are those of order at least its threshold, none later than itself.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Options(NamedTuple):
    """What is known before compilation. Hashable."""

    keep: int
    codewords: int
    scale: float
    clamp: float


def threshold(tau: jax.Array, cut: jax.Array, keys: int) -> jax.Array:
    """The order of the last key taken: of score `tau`, at position `cut`."""
    return tau * keys + (keys - 1) - cut


def level(at_least: list[jax.Array], keep: int) -> tuple[jax.Array, jax.Array]:
    """The score of the last key taken, and how many keys of this score are.

    Args:
      at_least: for scores 1, 2, ..., M the number of keys that a query sees of at least that score.
      keep: how many it takes.
    """
    tau, above = jnp.zeros_like(at_least[0]), jnp.zeros_like(at_least[0])
    for count in at_least:
        enough = count >= keep
        tau += jnp.where(enough, 1, 0)
        above = jnp.where(enough, above, jnp.maximum(above, count))
    return tau, keep - above

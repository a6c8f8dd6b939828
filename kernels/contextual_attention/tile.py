"""One block of tokens, as both Pallas kernels compute it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.common import NEGATIVE_INFINITY


class State(NamedTuple):
    """Of the softmax online."""

    most: jax.Array  # (1, heads)
    total: jax.Array  # (1, heads)
    pooled: jax.Array  # (width, heads)


def start(width: int, heads: int) -> State:
    """Before the first token."""
    row = jnp.zeros((1, heads), jnp.float32)
    return State(row + NEGATIVE_INFINITY, row, jnp.zeros((width, heads), jnp.float32))


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axis,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def advance(
    state: State, tokens: jax.Array, weight: jax.Array, context: jax.Array, score: jax.Array, valid: jax.Array
) -> tuple[State, jax.Array]:
    """The state after a block of tokens (time, width), and their logits (time, heads).

    The arguments are those of `operands.flat`; valid is float (time, 1), 1 or 0.
    """
    hidden = jnp.tanh(_dot(tokens, weight, 1) + context.astype(jnp.float32))
    inside = valid > 0
    logits = jnp.where(inside, _dot(hidden, score.astype(jnp.float32), 1), NEGATIVE_INFINITY)
    most = jnp.maximum(state.most, jnp.max(logits, axis=0, keepdims=True))
    part = jnp.where(inside, jnp.exp(logits - most), 0.0)
    keep = jnp.exp(state.most - most)
    pooled = state.pooled * keep + _dot(tokens.astype(jnp.float32), part, 0)
    return State(most, state.total * keep + jnp.sum(part, axis=0, keepdims=True), pooled), logits

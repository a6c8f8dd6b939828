"""The arrays of contextual attention, and the checks at its door."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Operands(NamedTuple):
    """See `contextual_attention`; the temperature is in the score."""

    tokens: Any
    weight: Any
    context: Any
    score: Any
    valid: Any


AXES = Operands("b..", "h..", "b.h.", "h.", "b.")
OUT_AXES = ("bh.", "b.h")  # pooled, logits


def check(operands: Operands) -> None:
    """Raises ValueError or TypeError unless the arrays fit each other."""
    tokens, weight, context, score, valid = operands
    for name, array, axes in (
        ("tokens", tokens, "batch, time, width"), ("weight", weight, "heads, width, hidden"),
        ("context", context, "batch, 1 or time, heads, hidden"), ("score", score, "heads, hidden"),
    ):  # fmt: skip
        if array.ndim != axes.count(",") + 1 or 0 in array.shape:
            raise ValueError(f"{name} must be ({axes}), not empty, got shape {array.shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {array.dtype}")
    batch, time, width = tokens.shape
    heads, hidden = score.shape
    if weight.shape != (heads, width, hidden):
        raise ValueError(f"weight must be {(heads, width, hidden)}, got {weight.shape}")
    if context.shape not in ((batch, 1, heads, hidden), (batch, time, heads, hidden)):
        raise ValueError(f"context must be {(batch, f'1 or {time}', heads, hidden)}, got {context.shape}")
    if valid.shape != (batch, time) or valid.dtype != jnp.bool_:
        raise ValueError(f"valid must be bool {(batch, time)}, got {valid.dtype} {valid.shape}")


def flat(operands: Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All heads at once: weight (width, heads hidden), context (batch, ., heads hidden), score (heads hidden, heads).

    The score is block-diagonal, so that two matrix products make every head's logits.
    """
    heads, hidden = operands.score.shape
    weight = operands.weight.transpose(1, 0, 2).reshape(-1, heads * hidden)
    context = operands.context.reshape(*operands.context.shape[:2], heads * hidden)
    score = jnp.eye(heads, dtype=operands.score.dtype)[:, None] * operands.score[:, :, None]
    return weight, context, score.reshape(heads * hidden, heads)

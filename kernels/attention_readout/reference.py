"""The readouts as their definitions, on the whole map."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.attention.operands import Operands, Options
from kernels.attention.reference import softmax


def attention_map(operands: Operands, options: Options) -> jax.Array:
    """A, float32 (B, H, T, S)."""
    key = jnp.repeat(operands.key, operands.query.shape[2] // operands.key.shape[2], axis=2)
    query, key = (x.astype(jnp.float32) for x in (operands.query, key))
    logits = options.scale * jnp.einsum("bthd,bshd->bhts", query, key, precision="highest")
    return softmax(logits, operands, options)[0]


def received(operands: Operands, weights: jax.Array, options: Options) -> jax.Array:
    """A^T W, float32 (B, S, H, R), for weights (B, T, H, R)."""
    return jnp.einsum(
        "bhts,bthr->bshr", attention_map(operands, options), weights.astype(jnp.float32), precision="highest"
    )


def top_k(operands: Operands, k: int, options: Options) -> tuple[jax.Array, jax.Array]:
    """The k largest entries of each row and their columns, -1 where the entry is 0: (B, H, T, k) each."""
    weights, indices = jax.lax.top_k(attention_map(operands, options), k)
    return weights, jnp.where(weights > 0, indices, -1)


def entries(operands: Operands, rows: jax.Array | None, columns: jax.Array | None, options: Options) -> jax.Array:
    """A[rows][:, columns]."""
    chosen = attention_map(operands, options)
    if rows is not None:
        chosen = jnp.take_along_axis(chosen, rows[:, None, :, None], axis=2)
    if columns is not None:
        chosen = jnp.take_along_axis(chosen, columns[:, None, None], axis=3)
    return chosen

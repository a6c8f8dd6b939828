"""Softmax attention as its definition: the whole matrix of logits, one einsum on either side of a softmax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention.operands import Operands, Options, visible
from kernels.common import NEGATIVE_INFINITY, hash_uniform


def forward(operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """What every other implementation must equal, and what JAX differentiates for them to equal its gradients.

    Args:
      operands: B batch, T queries, S keys, H heads, G key heads, D and E widths.
      options: static options.

    Returns:
      (B, T, H, E) in the query's dtype and the log-sum-exp, float32 (B, H, T).
    """
    batch, queries, heads, width = operands.query.shape
    keys, key_heads = operands.key.shape[1:3]
    query, key, value = (x.astype(jnp.float32) for x in operands[:3])
    query = query.reshape(batch, queries, key_heads, heads // key_heads, width)
    logits = options.scale * jnp.einsum("btgrd,bsgd->bgrts", query, key, precision="highest")
    probabilities, logsumexp = softmax(logits.reshape(batch, heads, queries, keys), operands, options)
    probabilities = probabilities.reshape(batch, key_heads, heads // key_heads, queries, keys)
    out = jnp.einsum("bgrts,bsge->btgre", probabilities, value, precision="highest")
    return out.reshape(batch, queries, heads, -1).astype(operands.query.dtype), logsumexp


def softmax(logits: jax.Array, operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """From scaled products of queries and keys, float32 (B, H, T, S), to the weights of the values and log-sum-exps.

    Returns:
      Weights like `logits`, dropout included, and float32 (B, H, T).
    """
    queries, keys = logits.shape[2:]
    if options.logit_softcap is not None:
        logits = options.logit_softcap * jnp.tanh(logits / options.logit_softcap)
    if operands.bias is not None:
        logits += operands.bias.astype(jnp.float32)
    mask = _mask(operands, options)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)

    # Written out, because the row of a softmax may be empty: then the maximum is finite and every weight zero.
    sinks = None if operands.sinks is None else operands.sinks.astype(jnp.float32)[:, None, None]
    maximum = jnp.max(logits, axis=-1, keepdims=True, initial=NEGATIVE_INFINITY)
    if sinks is not None:
        maximum = jnp.maximum(maximum, sinks)
    maximum = jax.lax.stop_gradient(maximum)
    weights = jnp.exp(logits - maximum)
    denominator = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        denominator += jnp.exp(sinks - maximum)
    empty = denominator == 0
    denominator = jnp.where(empty, 1, denominator)
    logsumexp = jnp.where(empty, -jnp.inf, maximum + jnp.log(denominator))

    probabilities = weights / denominator
    if options.dropout_rate > 0 and operands.dropout_seed is not None and operands.dropout_heads is not None:
        row, column = jnp.ogrid[:queries, :keys]
        uniform = hash_uniform(operands.dropout_seed, operands.dropout_heads[:, :, None, None], row, column)
        kept = uniform >= options.dropout_rate
        probabilities = jnp.where(kept, probabilities / (1 - options.dropout_rate), 0)
    return probabilities, logsumexp.squeeze(-1)


def _mask(operands: Operands, options: Options) -> jax.Array | None:
    """(B or 1, 1, T, S), or None if every key is visible to every query."""
    queries, keys = operands.query.shape[1], operands.key.shape[1]

    def rows(x: jax.Array | None) -> Any:
        return None if x is None else x[:, None, :, None]

    def columns(x: jax.Array | None) -> Any:
        return None if x is None else x[:, None, None, :]

    def scalars(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else x[:, None, None, None]

    query_index, key_index = jnp.arange(queries)[None], jnp.arange(keys)[None]
    return visible(
        options,
        rows(query_index if operands.query_positions is None else operands.query_positions),
        columns(key_index if operands.key_positions is None else operands.key_positions),
        rows(operands.query_segment_ids),
        columns(operands.key_segment_ids),
        scalars(operands.prefix_lengths),
        columns(key_index),
        scalars(operands.key_lengths),
    )

"""Logits of chosen queries and keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention.operands import Operands, Options, visible


def entry_logits(operands: Operands, columns: jax.Array | None, options: Options) -> jax.Array:
    """Logits (B, H, T, C) of the keys `columns` (B or 1, C), all if None: capped, biased, -inf where masked."""
    batch, queries, heads, width = operands.query.shape
    key_heads = operands.key.shape[2]
    key, key_positions, segments = operands.key, operands.key_positions, operands.key_segment_ids
    index = jnp.arange(key.shape[1], dtype=jnp.int32)[None] if columns is None else columns
    bias = operands.bias
    if columns is not None:
        key = jnp.take_along_axis(key, jnp.broadcast_to(columns, (batch, columns.shape[1]))[..., None, None], axis=1)
        key_positions, segments = (_take(array, columns) for array in (key_positions, segments))
        if bias is not None and bias.shape[3] > 1:
            bias = jnp.broadcast_to(bias, (max(bias.shape[0], columns.shape[0]), *bias.shape[1:]))
            bias = jnp.take_along_axis(bias, columns[:, None, None], axis=3)
    query = operands.query.reshape(batch, queries, key_heads, heads // key_heads, width)
    logits = jnp.einsum("btgrd,bcgd->bgrtc", query, key, precision="highest", preferred_element_type=jnp.float32)
    logits = options.scale * logits.reshape(batch, heads, queries, -1)
    if options.logit_softcap is not None:
        logits = options.logit_softcap * jnp.tanh(logits / options.logit_softcap)
    if bias is not None:
        logits += bias.astype(jnp.float32)

    def rows(x: jax.Array | None) -> Any:
        return None if x is None else x[:, None, :, None]

    def every(x: jax.Array | None) -> Any:
        return None if x is None else x[:, None, None]

    def scalars(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else x[:, None, None, None]

    positions = operands.query_positions
    mask = visible(
        options,
        rows(jnp.arange(queries, dtype=jnp.int32)[None] if positions is None else positions),
        every(index if key_positions is None else key_positions),
        rows(operands.query_segment_ids),
        every(segments),
        scalars(operands.prefix_lengths),
        every(index),
        scalars(operands.key_lengths),
    )
    return logits if mask is None else jnp.where(mask, logits, -jnp.inf)


def _take(array: jax.Array | None, columns: jax.Array) -> jax.Array | None:
    if array is None:
        return None
    count = max(array.shape[0], columns.shape[0])
    array = jnp.broadcast_to(array, (count, *array.shape[1:]))
    return jnp.take_along_axis(array, jnp.broadcast_to(columns, (count, columns.shape[1])), axis=1)

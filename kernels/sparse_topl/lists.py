"""Lists of keys, and attention over them by gathering, block by block of queries: no T x T array exists."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.common import round_up
from kernels.sparse_topl import reference

LOOKUP_ROWS = 64
ATTENTION_ROWS = 16


def _blocks(array: jax.Array, rows: int, fill: int = 0) -> jax.Array:
    """(B, T, ...) -> (T / rows, B, rows, ...), padded at the end."""
    batch, time = array.shape[:2]
    padding = [(0, 0), (0, round_up(time, rows) - time)] + [(0, 0)] * (array.ndim - 2)
    array = jnp.pad(array, padding, constant_values=fill)
    return array.reshape(batch, -1, rows, *array.shape[2:]).swapaxes(0, 1)


def _joined(blocks: jax.Array, time: int) -> jax.Array:
    joined = blocks.swapaxes(0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :time]


def lookup(query_codes: jax.Array, key_codes: jax.Array, *, keep: int, prototype: bool) -> jax.Array:
    """See `reference.lookup`."""
    time, keys, subspaces = query_codes.shape[1], key_codes.shape[1], query_codes.shape[-1]
    rows = min(LOOKUP_ROWS, time)

    def block(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
        codes, positions = operands
        # Subspace by subspace, so that no comparison of all of them is kept.
        ratio = codes.shape[2] // key_codes.shape[2]
        scores = jnp.zeros((*codes.shape[:3], keys), jnp.int32)
        for m in range(subspaces):
            other = jnp.repeat(key_codes[..., m], ratio, axis=2).swapaxes(1, 2)
            scores += codes[..., m][..., None] == other[:, None]
        if prototype:
            return reference.select_prototype(scores, positions, keep, subspaces)
        return reference.select(scores, positions, keep)

    positions = (jnp.arange(round_up(time, rows), dtype=jnp.int32) + keys - time).reshape(-1, rows)
    return _joined(jax.lax.map(block, (_blocks(query_codes, rows), positions)), time)


def _gathered(x: jax.Array, indices: jax.Array) -> jax.Array:
    """(B, S, G, D) at (B, C, H, L), H a multiple of G -> (B, C, H, L, D)."""
    heads = jnp.arange(indices.shape[2]) // (indices.shape[2] // x.shape[2])
    return x[jnp.arange(x.shape[0])[:, None, None, None], indices, heads[:, None]].astype(jnp.float32)


def _block(
    query: jax.Array, key: jax.Array, value: jax.Array, indices: jax.Array, *, scale: float, clamp: float
) -> jax.Array:
    used = indices >= 0
    found = jnp.maximum(indices, 0).astype(jnp.int32)
    keys, values = _gathered(key, found), _gathered(value, found)
    scores = scale * jnp.einsum("bthd,bthld->bthl", query.astype(jnp.float32), keys, precision="highest")
    weights = jnp.where(used, jnp.exp(jnp.clip(scores, -clamp, clamp)), 0.0)
    weights /= jnp.maximum(1e-9, weights.sum(-1, keepdims=True))
    return jnp.einsum("bthl,bthle->bthe", weights, values, precision="highest")


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, indices: jax.Array, *, scale: float, clamp: float
) -> jax.Array:
    """See `reference.attention`."""
    time, rows = query.shape[1], min(ATTENTION_ROWS, query.shape[1])
    block: Callable[..., jax.Array] = partial(_block, scale=scale, clamp=clamp)
    operands = (_blocks(query, rows), _blocks(indices, rows, -1))
    out = jax.lax.map(lambda part: block(part[0], key, value, part[1]).astype(query.dtype), operands)
    return _joined(out, time)


def attention_gradient(
    query: jax.Array, key: jax.Array, value: jax.Array, indices: jax.Array, cotangent: jax.Array,
    *, scale: float, clamp: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of query, key and value: each block's weights are computed again."""
    time, rows = query.shape[1], min(ATTENTION_ROWS, query.shape[1])
    key32, value32 = key.astype(jnp.float32), value.astype(jnp.float32)

    def step(carry: Any, part: Any) -> Any:
        query, indices, cotangent = part
        block = partial(_block, indices=indices, scale=scale, clamp=clamp)
        _, pullback = jax.vjp(block, query.astype(jnp.float32), key32, value32)
        d_query, d_key, d_value = pullback(cotangent.astype(jnp.float32))
        return (carry[0] + d_key, carry[1] + d_value), d_query

    parts = (_blocks(query, rows), _blocks(indices, rows, -1), _blocks(cotangent, rows))
    zeros = (jnp.zeros_like(key32), jnp.zeros_like(value32))
    (d_key, d_value), d_query = jax.lax.scan(step, zeros, parts)
    return _joined(d_query, time).astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype)

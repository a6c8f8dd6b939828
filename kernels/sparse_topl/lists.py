"""Lists of keys, and attention over them by gathering, block by block of queries: no T x T array exists."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.sparse_topl import reference
from kernels.sparse_topl.chunked import blocks, joined

LOOKUP_ROWS = 64
ATTENTION_ROWS = 16


def lookup(
    query_codes: jax.Array,
    key_codes: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    codebook: jax.Array | None,
    *,
    keep: int,
    prototype: bool,
) -> jax.Array:
    """See `reference.lookup`."""
    time = query_codes.shape[1]
    rows = min(LOOKUP_ROWS, time)

    def block(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
        codes, positions = operands
        return reference.lookup(codes, key_codes, positions, key_positions, codebook, keep=keep, prototype=prototype)

    return joined(jax.lax.map(block, (blocks(query_codes, rows), blocks(query_positions, rows))), time)


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
    operands = (blocks(query, rows), blocks(indices, rows, -1))
    out = jax.lax.map(lambda part: block(part[0], key, value, part[1]).astype(query.dtype), operands)
    return joined(out, time)


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

    parts = (blocks(query, rows), blocks(indices, rows, -1), blocks(cotangent, rows))
    zeros = (jnp.zeros_like(key32), jnp.zeros_like(value32))
    (d_key, d_value), d_query = jax.lax.scan(step, zeros, parts)
    return joined(d_query, time).astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype)

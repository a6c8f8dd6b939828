"""XLA's form: blocks of queries against all keys, masked by each query's threshold. Memory is linear in time."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.common import round_up
from kernels.sparse_topl.selection import Options, level, threshold

ROWS = 64


def blocks(array: jax.Array, rows: int, fill: int = 0) -> jax.Array:
    """(B, T, ...) -> (T / rows, B, rows, ...), padded with `fill` at the end."""
    batch, time = array.shape[:2]
    padding = [(0, 0), (0, round_up(time, rows) - time)] + [(0, 0)] * (array.ndim - 2)
    array = jnp.pad(array, padding, constant_values=fill)
    return array.reshape(batch, -1, rows, *array.shape[2:]).swapaxes(0, 1)


def joined(parts: jax.Array, time: int) -> jax.Array:
    """The way back from `blocks`, without the padding."""
    whole = parts.swapaxes(0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])[:, :time]


def _grouped(array: jax.Array, key_heads: int) -> jax.Array:
    """(..., H, X) -> (..., G, H / G, X)."""
    return array.reshape(*array.shape[:-2], key_heads, -1, array.shape[-1])


def _matches(query_codes: jax.Array, key_codes: jax.Array) -> jax.Array:
    """(B, R, G, N, M), (B, S, G, M) -> int32 (B, G, N, R, S); subspace by subspace, so that no comparison is kept."""
    total: Any = 0
    for m in range(key_codes.shape[-1]):
        query = query_codes[..., m].transpose(0, 2, 3, 1)[..., None]
        total += (query == key_codes[..., m].swapaxes(1, 2)[:, :, None, None]).astype(jnp.int32)
    return total


def _thresholds(scores: jax.Array, positions: jax.Array, subspaces: int, keep: int) -> jax.Array:
    """int32 (..., R) for scores (..., R, S) of queries at `positions` (R,)."""
    keys = scores.shape[-1]
    index = jnp.arange(keys, dtype=jnp.int32)
    visible = index <= positions[:, None]
    counts = [jnp.sum(visible & (scores >= m), axis=-1, dtype=jnp.int32) for m in range(1, subspaces + 1)]
    tau, ties = level(counts, keep)
    tie = visible & (scores == tau[..., None])
    among = tie & (jnp.cumsum(tie, axis=-1, dtype=jnp.int32) <= ties[..., None])
    cut = jnp.max(jnp.where(among, index, -1), axis=-1)
    return jnp.where(positions + 1 <= keep, 0, threshold(tau, cut, keys))


def _weights(
    query: jax.Array, key: jax.Array, scores: jax.Array, thresholds: jax.Array, positions: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """exp of the clamped logits of the selected keys, 0 for others, and the logits' derivative; (B, G, N, R, S)."""
    keys = scores.shape[-1]
    index = jnp.arange(keys, dtype=jnp.int32)
    selected = (scores * keys + (keys - 1 - index) >= thresholds[..., None]) & (index <= positions[:, None])
    logits = options.scale * jnp.einsum("brgnd,bsgd->bgnrs", query, key, precision="highest")
    inside = jnp.abs(logits) < options.clamp
    weights = jnp.where(selected, jnp.exp(jnp.clip(logits, -options.clamp, options.clamp)), 0.0)
    return weights, inside


def _positions(time: int, keys: int, rows: int) -> jax.Array:
    """int32 (blocks, rows): the queries are the last of the keys' positions."""
    return (jnp.arange(round_up(time, rows), dtype=jnp.int32) + keys - time).reshape(-1, rows)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_codes: jax.Array,
    key_codes: jax.Array,
    *,
    options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Outputs float32 (B, T, H, E), thresholds int32 (B, T, H), sums of weights float32 (B, T, H)."""
    time, heads = query.shape[1:3]
    keys = key.shape[1]
    rows, group = min(ROWS, time), partial(_grouped, key_heads=key.shape[2])
    key, value = key.astype(jnp.float32), value.astype(jnp.float32)

    def block(operands: Any) -> Any:
        query, codes, positions = operands
        scores = _matches(group(codes), key_codes)
        thresholds = _thresholds(scores, positions, key_codes.shape[-1], options.keep)
        weights, _ = _weights(group(query.astype(jnp.float32)), key, scores, thresholds, positions, options)
        sums = jnp.maximum(1e-9, weights.sum(-1))
        out = jnp.einsum("bgnrs,bsge->brgne", weights / sums[..., None], value, precision="highest")
        flat = [x.transpose(0, 3, 1, 2).reshape(x.shape[0], rows, heads) for x in (thresholds, sums)]
        return out.reshape(*query.shape[:3], -1), *flat

    operands = blocks(query, rows), blocks(query_codes, rows), _positions(time, keys, rows)
    return tuple(joined(x, time) for x in jax.lax.map(block, operands))  # type: ignore[return-value]


def backward(
    query: jax.Array, key: jax.Array, value: jax.Array, query_codes: jax.Array, key_codes: jax.Array,
    thresholds: jax.Array, sums: jax.Array, delta: jax.Array, d_out: jax.Array, *, options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Float32 gradients of query, key and value; `delta` is the sum of d_out times the output, (B, T, H)."""
    time, keys, key_heads = query.shape[1], key.shape[1], key.shape[2]
    rows, group = min(ROWS, time), partial(_grouped, key_heads=key_heads)
    key, value = key.astype(jnp.float32), value.astype(jnp.float32)

    def upright(x: jax.Array) -> jax.Array:  # (B, R, H) -> (B, G, N, R)
        return x.reshape(*x.shape[:2], key_heads, -1).transpose(0, 2, 3, 1)

    def block(carry: Any, operands: Any) -> Any:
        query, codes, thresholds, sums, delta, d_out, positions = operands
        query, d_out = group(query.astype(jnp.float32)), group(d_out.astype(jnp.float32))
        scores = _matches(group(codes), key_codes)
        weights, inside = _weights(query, key, scores, upright(thresholds), positions, options)
        weights /= jnp.maximum(1e-9, upright(sums))[..., None]  # rows of padding have no sum
        d_weights = jnp.einsum("brgne,bsge->bgnrs", d_out, value, precision="highest")
        d_logits = weights * (d_weights - upright(delta)[..., None]) * inside * options.scale
        d_query = jnp.einsum("bgnrs,bsgd->brgnd", d_logits, key, precision="highest")
        d_key = carry[0] + jnp.einsum("bgnrs,brgnd->bsgd", d_logits, query, precision="highest")
        d_value = carry[1] + jnp.einsum("bgnrs,brgne->bsge", weights, d_out, precision="highest")
        return (d_key, d_value), d_query.reshape(*d_query.shape[:2], -1, d_query.shape[-1])

    operands = [blocks(x, rows) for x in (query, query_codes, thresholds, sums, delta, d_out)]
    zeros = (jnp.zeros_like(key), jnp.zeros_like(value))
    (d_key, d_value), d_query = jax.lax.scan(block, zeros, (*operands, _positions(time, keys, rows)))
    return joined(d_query, time), d_key, d_value

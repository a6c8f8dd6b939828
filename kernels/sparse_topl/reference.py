"""The definitions of looking keys up by their codes, and of attention over the keys found: all scores of a head."""

from __future__ import annotations

import jax
import jax.numpy as jnp

PROTOTYPE_WORKERS = 4
PROTOTYPE_LEVELS = 4


def matches(query_codes: jax.Array, key_codes: jax.Array) -> jax.Array:
    """Number of subspaces with equal codes, (B, T, H, M) and (B, S, G, M) -> int32 (B, T, H, S)."""
    keys = jnp.repeat(key_codes, query_codes.shape[2] // key_codes.shape[2], axis=2)
    return jnp.sum(query_codes[:, :, :, None] == keys.swapaxes(1, 2)[:, None], axis=-1, dtype=jnp.int32)


def select(scores: jax.Array, positions: jax.Array, keep: int) -> jax.Array:
    """The `keep` keys j <= position of largest score, ties to the earliest, -1 where fewer exist.

    Args:
      scores: int32 (B, T, H, S), at least 0.
      positions: int32 (T,), of the queries among the keys.
    """
    keys = scores.shape[-1]
    index = jnp.arange(keys, dtype=jnp.int32)
    # One integer orders by score, then by position; no two keys share one.
    order = jnp.where(index <= positions[:, None, None], scores * keys + keys - 1 - index, -1)
    largest, found = jax.lax.top_k(order, keep)
    return jnp.where(largest < 0, -1, found)


def select_prototype(scores: jax.Array, positions: jax.Array, keep: int, subspaces: int) -> jax.Array:
    """What the published CUDA kernel selects; arguments as of `select`. Unused slots are key 0, not -1."""
    levels = jnp.minimum(PROTOTYPE_LEVELS - 1, scores // (subspaces // PROTOTYPE_LEVELS))
    dealt = []
    for worker in range(PROTOTYPE_WORKERS):
        # Its n-th key is at worker + 4 n: at or before the position are those with n <= (position - worker) // 4.
        last = (positions - worker) // PROTOTYPE_WORKERS
        found = select(levels[..., worker::PROTOTYPE_WORKERS], last, keep // PROTOTYPE_WORKERS)
        dealt.append(jnp.where(found < 0, 0, found * PROTOTYPE_WORKERS + worker))
    return jnp.concatenate(dealt, axis=-1)


def lookup(query_codes: jax.Array, key_codes: jax.Array, *, keep: int, prototype: bool) -> jax.Array:
    """int32 (B, T, H, keep) for codes (B, T, H, M), (B, S, G, M); the queries are the last T of the S positions."""
    positions = jnp.arange(query_codes.shape[1], dtype=jnp.int32) + key_codes.shape[1] - query_codes.shape[1]
    scores = matches(query_codes, key_codes)
    if prototype:
        return select_prototype(scores, positions, keep, query_codes.shape[-1])
    return select(scores, positions, keep)


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, indices: jax.Array, *, scale: float, clamp: float
) -> jax.Array:
    """sum_j w_j v_j for w = n exp(clamp(scale q k)) / max(1e-9, sum), n how often a key stands among the indices."""
    ratio = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x.astype(jnp.float32), ratio, axis=2) for x in (key, value))
    count = jax.nn.one_hot(indices, key.shape[1], dtype=jnp.float32).sum(-2)  # (B, T, H, S); -1 counts nowhere
    scores = scale * jnp.einsum("bthd,bshd->bths", query.astype(jnp.float32), key, precision="highest")
    weights = count * jnp.exp(jnp.clip(scores, -clamp, clamp))
    weights /= jnp.maximum(1e-9, weights.sum(-1, keepdims=True))
    return jnp.einsum("bths,bshe->bthe", weights, value, precision="highest").astype(query.dtype)

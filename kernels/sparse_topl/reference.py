"""The definitions of looking keys up by their codes, and of attention over the keys found: all scores of a head."""

from __future__ import annotations

import jax
import jax.numpy as jnp

PROTOTYPE_WORKERS = 4
PROTOTYPE_LEVELS = 4


def matches(query_codes: jax.Array, key_codes: jax.Array) -> jax.Array:
    """Number of subspaces with equal codes, (B, T, H, M) and (B, S, G, M) -> float32 (B, T, H, S)."""
    keys = jnp.repeat(key_codes, query_codes.shape[2] // key_codes.shape[2], axis=2)
    return jnp.sum(query_codes[:, :, :, None] == keys.swapaxes(1, 2)[:, None], axis=-1, dtype=jnp.float32)


def inner_products(query_codes: jax.Array, key_codes: jax.Array, codebook: jax.Array) -> jax.Array:
    """Inner products of the codewords in place of query and key; shapes as of `matches`."""
    subspace = jnp.arange(codebook.shape[0])
    query, key = (codebook.astype(jnp.float32)[subspace, codes] for codes in (query_codes, key_codes))
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    return jnp.einsum("bthmd,bshmd->bths", query, key, precision="highest")


def select(scores: jax.Array, query_positions: jax.Array, key_positions: jax.Array, keep: int) -> jax.Array:
    """The `keep` keys of largest score that are not later than the query, ties to the first, -1 where fewer are.

    Args:
      scores: float32 (B, T, H, S).
      query_positions, key_positions: int32 (B, T) and (B, S).
    """
    visible = key_positions[:, None, None] <= query_positions[:, :, None, None]
    largest, found = jax.lax.top_k(jnp.where(visible, scores, -jnp.inf), keep)
    return jnp.where(largest == -jnp.inf, -1, found)


def select_inner_products(
    scores: jax.Array, query_positions: jax.Array, key_positions: jax.Array, keep: int
) -> jax.Array:
    """`select` that never leaves out the first key and the query's own."""
    own = key_positions[:, None, None] == query_positions[:, :, None, None]
    always = own | (key_positions == 0)[:, None, None]
    return select(jnp.where(always, jnp.inf, scores), query_positions, key_positions, keep)


def select_prototype(
    scores: jax.Array, query_positions: jax.Array, key_positions: jax.Array, keep: int, subspaces: int
) -> jax.Array:
    """What the published CUDA kernel selects; arguments as of `select`. Unused slots are key 0, not -1."""
    levels = jnp.minimum(PROTOTYPE_LEVELS - 1, scores // (subspaces // PROTOTYPE_LEVELS))
    dealt = []
    for worker in range(PROTOTYPE_WORKERS):
        mine = slice(worker, None, PROTOTYPE_WORKERS)
        found = select(levels[..., mine], query_positions, key_positions[:, mine], keep // PROTOTYPE_WORKERS)
        dealt.append(jnp.where(found < 0, 0, found * PROTOTYPE_WORKERS + worker))
    return jnp.concatenate(dealt, axis=-1)


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
    """int32 (B, T, H, keep) for codes (B, T, H, M), (B, S, G, M) and positions (B, T), (B, S)."""
    positions = query_positions, key_positions
    if codebook is not None:
        return select_inner_products(inner_products(query_codes, key_codes, codebook), *positions, keep)
    scores = matches(query_codes, key_codes)
    if prototype:
        return select_prototype(scores, *positions, keep, query_codes.shape[-1])
    return select(scores, *positions, keep)


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

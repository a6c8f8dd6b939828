"""The past of a softmax mixer: keys and values of the tokens seen so far.

Only valid tokens are stored, token p of a sequence in slot p, so padding costs no slot and a cache has no holes. With
a sliding window the slots are a ring of the window's size: token p lies in slot p modulo the window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_UNSEEN = np.int32(2**30)  # a key's position that no causal query reaches


class KeyValueCache(NamedTuple):
    """Keys and values by slot; the slots from `length` on are free."""

    key: jax.Array  # (batch, slots, key_heads, key_dim), rotated already
    value: jax.Array  # (batch, slots, key_heads, value_dim)
    length: jax.Array  # int32 (batch,), valid tokens seen so far, also those that a ring has forgotten


def empty(
    batch_size: int, length: int, window: int | None, heads: int, key_dim: int, value_dim: int, dtype: Any
) -> KeyValueCache:
    """A cache for `length` tokens, or a ring if the window is shorter.

    Raises:
      ValueError: a size is not positive.
    """
    if batch_size < 1 or length < 1:
        raise ValueError(f"a state needs a positive batch size and length, got {batch_size} and {length}")
    slots = length if window is None else min(window, length)
    shape = (batch_size, slots, heads)
    key, value = (jnp.zeros((*shape, width), dtype) for width in (key_dim, value_dim))
    return KeyValueCache(key, value, jnp.zeros(batch_size, jnp.int32))


def append(
    cache: KeyValueCache, key: jax.Array, value: jax.Array, positions: jax.Array, window: int | None
) -> tuple[KeyValueCache, jax.Array, jax.Array, dict[str, Any]]:
    """Stores new tokens, and says what their queries have to attend to, and how.

    Args:
      cache: the past.
      key, value: (batch, time, key_heads, key_dim or value_dim).
      positions: int32 (batch, time) from `token_positions`; -1 is not stored.
      window: as given to `empty`.

    Returns:
      The next cache; keys and values; and the arguments of `kernels.attention.attention` (to be called with
      `causal=True`) that hide what is free or forgotten.

    Raises:
      ValueError: more tokens than slots, as far as that is known: padding included in one call, or outside of `jit`
        valid tokens in all. Within `jit` tokens beyond the last slot are not stored, and their outputs are wrong.
    """
    slots = cache.key.shape[1]
    ring = window is not None and slots == window
    length = jnp.maximum(cache.length, positions.max(axis=1) + 1)
    key, value = key.astype(cache.key.dtype), value.astype(cache.value.dtype)

    if not ring:
        _check_room(key.shape[1], length, slots)
        cache = _store(cache, key, value, positions, length)
        return cache, cache.key, cache.value, {"query_positions": positions, "key_lengths": length}

    new_positions = jnp.where(positions < 0, _UNSEEN, positions)
    kept = (positions >= 0) & (positions >= length[:, None] - slots)
    after = _store(cache, key, value, jnp.where(kept, positions % slots, -1), length)
    if key.shape[1] == 1:
        mask = {"query_positions": positions, "key_positions": _ring_positions(length, slots)}
        return after, after.key, after.value, mask
    # Several tokens overwrite each other's window, so they attend to the past as it was, and to themselves.
    key = jnp.concatenate([cache.key, key], axis=1)
    value = jnp.concatenate([cache.value, value], axis=1)
    key_positions = jnp.concatenate([_ring_positions(cache.length, slots), new_positions], axis=1)
    return after, key, value, {"query_positions": positions, "key_positions": key_positions}


def _store(cache: KeyValueCache, key: jax.Array, value: jax.Array, slot: jax.Array, length: jax.Array) -> KeyValueCache:
    row = jnp.arange(slot.shape[0])[:, None]
    slot = jnp.where(slot < 0, cache.key.shape[1], slot)  # out of range: dropped
    return KeyValueCache(
        cache.key.at[row, slot].set(key, mode="drop"), cache.value.at[row, slot].set(value, mode="drop"), length
    )


def _ring_positions(length: jax.Array, slots: int) -> jax.Array:
    """int32 (batch, slots): the latest position below `length` that falls on each slot, or unseen if there is none."""
    last = length[:, None] - 1
    position = last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots
    return jnp.where(position < 0, _UNSEEN, position)


def _check_room(tokens: int, length: jax.Array, slots: int) -> None:
    if tokens > slots:
        raise ValueError(f"the state holds {slots} tokens, so a call takes at most as many, got {tokens}")
    if not isinstance(length, jax.core.Tracer) and int(length.max()) > slots:
        raise ValueError(f"the state holds {slots} tokens; with these there are {int(length.max())}")

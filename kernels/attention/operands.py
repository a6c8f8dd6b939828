"""The arguments of softmax attention, sorted into arrays and static options, and checked."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.common import check_heads


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known at trace time (hashable).

    `window` is (left, right): a query at position p sees keys at positions p - left .. p + right; None is unbounded.
    """

    scale: float
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    logit_softcap: float | None = None
    dropout_rate: float = 0.0


class Operands(NamedTuple):
    """The arrays (None where absent). B batch, T queries, S keys, H query heads, G key/value heads, D and E widths.

    Gradients exist for query, key, value, bias and sinks, and have the same shapes and dtypes.
    """

    query: jax.Array  # (B, T, H, D)
    key: jax.Array  # (B, S, G, D), H a multiple of G: query head h reads key head h // (H // G)
    value: jax.Array  # (B, S, G, E)
    bias: jax.Array | None = None  # (B or 1, H or 1, T or 1, S or 1), added to the scaled (and capped) logits
    sinks: jax.Array | None = None  # (H,) float32: a logit per head that only joins the softmax's denominator
    query_positions: jax.Array | None = None  # (B or 1, T) int32, default arange(T)
    key_positions: jax.Array | None = None  # (B or 1, S) int32, default arange(S)
    query_segment_ids: jax.Array | None = None  # (B or 1, T) int32
    key_segment_ids: jax.Array | None = None  # (B or 1, S) int32
    prefix_lengths: jax.Array | None = None  # (B,) int32: keys at positions below it are seen in spite of causality
    key_lengths: jax.Array | None = None  # (B,) int32: keys at *indices* from it on do not exist (a cache's free slots)
    dropout_seed: jax.Array | None = None  # () uint32
    dropout_heads: jax.Array | None = None  # (B, H) int32, with the seed: the heads' numbers, consecutive along H


_AXES = {
    "query": "b.h.", "key": "b.h.", "value": "b.h.", "bias": "bh..", "sinks": "h", "query_positions": "b.",
    "key_positions": "b.", "query_segment_ids": "b.", "key_segment_ids": "b.", "prefix_lengths": "b",
    "key_lengths": "b", "dropout_seed": "", "dropout_heads": "bh",
}  # fmt: skip
OUT_AXES: Any = ("b.h.", "bh.")  # of the output and the log-sum-exp


def axes(operands: Operands, gradients: bool = False) -> Any:
    """Operands with the letters that `kernels.common.by_platform` takes; with `gradients` for the float ones only."""
    letters: dict[str, Any] = {}
    for name, array in operands._asdict().items():
        if array is not None and (jnp.issubdtype(array.dtype, jnp.floating) or not gradients):
            # An axis of length 1 is whole on every device: all may share it.
            pairs = zip(array.shape, _AXES[name], strict=True)
            letters[name] = "".join("." if length == 1 else letter for length, letter in pairs)
    return Operands(**letters)


def number_heads(query: jax.Array) -> jax.Array:
    """`Operands.dropout_heads`: an operand, so that a mask is the same on any mesh, whoever has which heads."""
    batch, heads = query.shape[0], query.shape[2]
    return jnp.arange(batch * heads, dtype=jnp.int32).reshape(batch, heads)


def visible(
    options: Options,
    query_position: jax.Array,
    key_position: jax.Array,
    query_segment: jax.Array | None = None,
    key_segment: jax.Array | None = None,
    prefix_length: jax.Array | None = None,
    key_index: jax.Array | None = None,
    key_length: jax.Array | None = None,
) -> jax.Array | None:
    """Which (query, key) pairs attend, for coordinates that broadcast together; None where nothing is masked.

    The one definition of the mask: a whole matrix in the reference, a tile of it in the kernels.
    """
    conditions: list[Any] = []
    if options.causal:
        seen = key_position <= query_position
        conditions.append(seen if prefix_length is None else seen | (key_position < prefix_length))
    if options.window is not None:
        left, right = options.window
        if left is not None:
            conditions.append(key_position >= query_position - left)
        if right is not None:
            conditions.append(key_position <= query_position + right)
    if query_segment is not None and key_segment is not None:
        conditions.append(query_segment == key_segment)
    if key_length is not None and key_index is not None:
        conditions.append(key_index < key_length)
    mask = None
    for condition in conditions:
        mask = condition if mask is None else mask & condition
    return mask


def check(operands: Operands, options: Options) -> None:
    """Raises ValueError or TypeError, naming the argument, its shape and what was expected."""
    query, key, value = operands.query, operands.key, operands.value
    check_heads(query, key, value)
    batch, queries, heads, width = query.shape
    keys, key_heads = key.shape[1:3]
    if key.shape[0] != batch or value.shape[0] != batch:
        raise ValueError(f"batch sizes differ: query {batch}, key {key.shape[0]}, value {value.shape[0]}")
    if key.shape[3] != width:
        raise ValueError(f"query and key must have the same width, got {width} and {key.shape[3]}")
    if value.shape[1:3] != key.shape[1:3]:
        raise ValueError(f"key and value must have the same length and heads, got {key.shape} and {value.shape}")
    if heads % key_heads:
        raise ValueError(f"query heads ({heads}) must be a multiple of key/value heads ({key_heads})")
    if not options.scale > 0:
        raise ValueError(f"scale must be positive, got {options.scale}")
    if options.window is not None and any(side is not None and side < 0 for side in options.window):
        raise ValueError(f"window sides must be None or not negative, got {options.window}")
    if options.logit_softcap is not None and not options.logit_softcap > 0:
        raise ValueError(f"logit_softcap must be positive, got {options.logit_softcap}")
    if not 0.0 <= options.dropout_rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1), got {options.dropout_rate}")
    if options.dropout_rate > 0 and operands.dropout_seed is None:
        raise ValueError("dropout needs dropout_rng")
    if operands.prefix_lengths is not None and not options.causal:
        raise ValueError("prefix_lengths means something only with causal=True")
    if (operands.query_segment_ids is None) != (operands.key_segment_ids is None):
        raise ValueError("query_segment_ids and key_segment_ids are given together")
    full = (batch, heads, queries, keys)
    bias = operands.bias
    for name in ("bias", "sinks"):
        array = getattr(operands, name)
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {array.dtype}")
    if bias is not None and (bias.ndim != 4 or any(b not in (1, f) for b, f in zip(bias.shape, full, strict=True))):
        raise ValueError(f"bias must broadcast to (batch, heads, queries, keys) = {full}, got {bias.shape}")
    expected: dict[str, list[tuple[int, ...]]] = {
        "sinks": [(heads,)],
        "query_positions": [(batch, queries), (1, queries)],
        "key_positions": [(batch, keys), (1, keys)],
        "query_segment_ids": [(batch, queries), (1, queries)],
        "key_segment_ids": [(batch, keys), (1, keys)],
        "prefix_lengths": [(batch,)],
        "key_lengths": [(batch,)],
    }
    for name, shapes in expected.items():
        array = getattr(operands, name)
        if array is not None and array.shape not in shapes:
            raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {array.shape}")
        if array is not None and name != "sinks" and not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got {array.dtype}")

"""The readouts in XLA's operations, a block of queries at a time: memory is linear in the lengths."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from kernels.attention import chunked
from kernels.attention.operands import Operands, Options
from kernels.attention_readout.entries import entry_logits
from kernels.common import NEGATIVE_INFINITY


def received(operands: Operands, weights: jax.Array, logsumexp: jax.Array, *, options: Options) -> jax.Array:
    """See `reference.received`; A is exp(logits - logsumexp).

    It is attention's gradient by value, with the weights for a cotangent. XLA drops the other gradients, nobody's.
    """
    key = jnp.repeat(operands.key, weights.shape[2] // operands.key.shape[2], axis=2)
    value = jnp.zeros((*key.shape[:3], weights.shape[3]), jnp.float32)  # its dtype is the gradient's
    operands = operands._replace(key=key.astype(jnp.float32), value=value)
    gradients = chunked.backward(operands, weights, logsumexp, weights, jnp.zeros_like(logsumexp), options=options)
    return gradients.value


def top_k(operands: Operands, *, options: Options, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest logits of each query, (B, H, T, k), hugely negative where fewer are visible, and their keys."""
    batch, queries, heads, _ = operands.query.shape
    key_heads = operands.key.shape[2]
    group = heads // key_heads
    if queries == 1:  # a step of decoding: its whole row is small beside the keys, which are read where they lie
        logits, indices = jax.lax.top_k(jnp.maximum(entry_logits(operands, None, options), NEGATIVE_INFINITY), k)
        return logits, indices
    spans = chunked.spans_of(operands, options)

    def one_head(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch_index, key_head = index // key_heads, index % key_heads
        query = options.scale * chunked.head_of(operands.query, batch_index, key_head, key_heads)
        key = chunked.head_of(operands.key, batch_index, key_head, key_heads)[:, 0]

        def one_block(span: chunked.Span, _: None, block: jax.Array | int) -> tuple[None, tuple[jax.Array, jax.Array]]:
            tile = chunked.tile_of(span, index, block, operands)
            logits = chunked.tile_logits(tile.queries(query), tile.keys(key), tile, operands, options)[0]
            missing = max(k - tile.width, 0)
            best_logits, best = jax.lax.top_k(logits, k - missing)
            padding = ((0, 0), (0, missing))
            return None, (
                jnp.pad(best_logits, padding, constant_values=NEGATIVE_INFINITY),
                jnp.pad(tile.key_start + best, padding),
            )

        parts = []
        for span in spans:
            _, part = chunked.scan_blocks(partial(one_block, span), None, span.blocks)
            parts.append(tuple(x.reshape(-1, group, k) for x in part))
        logits, indices = (jnp.concatenate(x) for x in zip(*parts, strict=True))
        return logits, indices.astype(jnp.int32)

    found = jax.lax.map(one_head, jnp.arange(batch * key_heads))
    logits, indices = (
        jnp.moveaxis(x.reshape(batch, key_heads, queries, group, k), 2, 3).reshape(batch, heads, queries, k)
        for x in found
    )
    return logits, indices


def chosen_logits(operands: Operands, indices: jax.Array, *, options: Options) -> jax.Array:
    """The logits (B, H, T, k) of each query's own keys, to be differentiated: one of the k at a time, so that only
    (B, H, T, D) of gathered keys exists at once. Masks do not matter: what is chosen is visible, or has no cotangent.
    """
    batch, queries, heads, _ = operands.query.shape
    group = heads // operands.key.shape[2]
    query = operands.query.swapaxes(1, 2).astype(jnp.float32)
    item, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
    row = jnp.arange(queries)

    @jax.checkpoint
    def one(at: jax.Array) -> jax.Array:
        at = jnp.maximum(at, 0)
        key = operands.key.at[item, at, head // group].get(mode="promise_in_bounds").astype(jnp.float32)
        logits = options.scale * jnp.sum(query * key, axis=-1)
        if options.logit_softcap is not None:
            logits = options.logit_softcap * jnp.tanh(logits / options.logit_softcap)
        if operands.bias is not None:
            places = zip(operands.bias.shape, (item, head, row, at), strict=True)
            logits += operands.bias[tuple(0 if size == 1 else place for size, place in places)]
        return logits

    return jnp.moveaxis(jax.lax.map(one, jnp.moveaxis(indices, -1, 0)), 0, -1)

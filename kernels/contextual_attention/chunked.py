"""Contextual attention in XLA's operations, a block of tokens at a time, and its gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.common import NEGATIVE_INFINITY, round_up
from kernels.contextual_attention.operands import Operands

BLOCK = 128

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocks(array: jax.Array, time: int) -> jax.Array:
    """(B, T or 1, ...) as (blocks, B, size or 1, ...), padded with zeros."""
    size = min(time, BLOCK)
    if array.shape[1] == 1 < time:
        return jnp.broadcast_to(array, (-(-time // size), *array.shape))
    padded = jnp.pad(array, ((0, 0), (0, round_up(time, size) - time)) + ((0, 0),) * (array.ndim - 2))
    return jnp.moveaxis(padded.reshape(array.shape[0], -1, size, *array.shape[2:]), 1, 0)


def _whole(blocks: jax.Array, time: int) -> jax.Array:
    joined = jnp.moveaxis(blocks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :time]


def _hidden(operands: Operands) -> jax.Array:
    return jnp.tanh(_einsum("btw,hwa->btha", operands.tokens, operands.weight) + operands.context)


def forward(operands: Operands) -> tuple[jax.Array, jax.Array]:
    """See `reference.forward`: softmax online (Milakov and Gimelshein 2018)."""
    batch, time, width = operands.tokens.shape
    heads = operands.score.shape[0]

    def body(state: tuple[jax.Array, ...], block: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        most, total, pooled = state
        tokens, context, valid = block
        hidden = _hidden(Operands(tokens, operands.weight, context, None, None))
        logits = _einsum("btha,ha->bth", hidden, operands.score.astype(jnp.float32))
        logits = jnp.where(valid[:, :, None], logits, NEGATIVE_INFINITY)
        new = jnp.maximum(most, logits.max(1))
        part = jnp.where(valid[:, :, None], jnp.exp(logits - new[:, None]), 0)
        keep = jnp.exp(most - new)
        pooled = pooled * keep[:, :, None] + _einsum("bth,btw->bhw", part, tokens)
        return (new, total * keep + part.sum(1), pooled), logits

    start = (
        jnp.full((batch, heads), NEGATIVE_INFINITY, jnp.float32),
        jnp.zeros((batch, heads), jnp.float32),
        jnp.zeros((batch, heads, width), jnp.float32),
    )
    blocks = tuple(_blocks(array, time) for array in (operands.tokens, operands.context, operands.valid))
    (_, total, pooled), logits = jax.lax.scan(body, start, blocks)
    # A sum is at least 1 where any token is valid.
    return (pooled / jnp.maximum(total, 1)[:, :, None]).astype(operands.tokens.dtype), _whole(logits, time)


def backward(
    operands: Operands, pooled: jax.Array, logits: jax.Array, pooled_bar: jax.Array, logits_bar: jax.Array
) -> tuple[jax.Array, ...]:
    """Gradients by tokens, weight, context and score. The hidden layer is made again, block by block."""
    time = operands.tokens.shape[1]
    valid = operands.valid[:, :, None]
    pooled_bar = pooled_bar.astype(jnp.float32)
    weights = jnp.where(valid, jax.nn.softmax(logits, axis=1), 0)
    own = jnp.sum(pooled * pooled_bar, axis=-1)[:, None]
    along = _einsum("btw,bhw->bth", operands.tokens, pooled_bar)
    slope = jnp.where(valid, weights * (along - own) + logits_bar, 0)

    def body(sums: tuple[jax.Array, ...], block: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        tokens, context, slope, weights = block
        hidden = _hidden(Operands(tokens, operands.weight, context, None, None))
        inside = slope[..., None] * operands.score * (1 - hidden**2)
        weight_bar = sums[0] + _einsum("btw,btha->hwa", tokens, inside)
        score_bar = sums[1] + _einsum("bth,btha->ha", slope, hidden)
        tokens_bar = _einsum("btha,hwa->btw", inside, operands.weight) + _einsum("bth,bhw->btw", weights, pooled_bar)
        if operands.context.shape[1] == 1:
            return (weight_bar, score_bar, sums[2] + inside.sum(1, keepdims=True)), (tokens_bar,)
        return (weight_bar, score_bar, sums[2]), (tokens_bar, inside)

    one = operands.context.shape[1] == 1
    context_sum = jnp.zeros(operands.context.shape if one else (), jnp.float32)
    start = (jnp.zeros(operands.weight.shape, jnp.float32), jnp.zeros(operands.score.shape, jnp.float32), context_sum)
    blocks = tuple(_blocks(array, time) for array in (operands.tokens, operands.context, slope, weights))
    (weight_bar, score_bar, context_bar), by_token = jax.lax.scan(body, start, blocks)
    if not one:
        context_bar = _whole(by_token[1], time)
    gradients = (_whole(by_token[0], time), weight_bar, context_bar, score_bar)
    return tuple(bar.astype(array.dtype) for bar, array in zip(gradients, operands[:4], strict=True))

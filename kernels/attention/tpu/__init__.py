"""Softmax attention for TPUs: Pallas kernels for Mosaic."""

from __future__ import annotations


import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.operands import Operands, Options
from kernels.attention.tpu.backward import backward_call, bias_gradient_call
from kernels.attention.tpu.forward import forward_call
from kernels.attention.tpu.plan import DECODE_QUERIES, DECODE_ROWS
from kernels.common import round_up


def forward(
    operands: Operands, options: Options, *, interpret: bool | pltpu.InterpretParams
) -> tuple[jax.Array, jax.Array]:
    """Attention and its log-sum-exp.

    Args:
      operands: B batch, T queries, S keys, H heads, G key heads, D and E widths.
      options: static options.
      interpret: run the kernel's arithmetic without a TPU; parameters also simulate its memories.

    Returns:
      (B, T, H, E) in the query's dtype and float32 (B, H, T).
    """
    dtype = operands.query.dtype
    operands = _in_supported_dtype(operands)
    batch, queries, heads, _ = operands.query.shape
    plain = operands.bias is None and operands.query_segment_ids is None and options.dropout_rate == 0
    if plain and queries <= DECODE_QUERIES and queries * heads <= DECODE_ROWS:
        out, logsumexp = _decode(operands, options, interpret)
    else:
        sinks = None if operands.sinks is None else operands.sinks.astype(jnp.float32)[:, None, None]
        out, logsumexp = forward_call(operands, sinks, options, decode=False, interpret=interpret)
    return out.astype(dtype), logsumexp


def backward(
    operands: Operands,
    out: jax.Array,
    logsumexp: jax.Array,
    d_out: jax.Array,
    d_logsumexp: jax.Array,
    options: Options,
    *,
    interpret: bool | pltpu.InterpretParams,
) -> Operands:
    """Gradients of the operands, None for integers and for what is absent.

    Args:
      operands: as in `forward`.
      out, logsumexp: what `forward` gave.
      d_out, d_logsumexp: their cotangents.
      options, interpret: as in `forward`.
    """
    given = operands
    operands = _in_supported_dtype(operands)
    residuals = (out.astype(operands.query.dtype), logsumexp, d_out.astype(operands.query.dtype), d_logsumexp)
    d_query, d_key, d_value = backward_call(operands, residuals, options, interpret=interpret)
    d_bias = d_sinks = None
    if operands.bias is not None:
        d_bias = bias_gradient_call(operands, residuals, options, interpret=interpret)
    if operands.sinks is not None:  # a key whose value is zero: its logit's gradient is -probability delta
        delta = jnp.einsum("bthe,bthe->bht", out, d_out, preferred_element_type=jnp.float32) - d_logsumexp
        probability = jnp.exp(operands.sinks.astype(jnp.float32)[:, None] - logsumexp)
        d_sinks = -jnp.sum(probability * delta, axis=(0, 2)).astype(operands.sinks.dtype)
    return Operands(
        query=d_query.astype(given.query.dtype),
        key=d_key.astype(given.key.dtype),
        value=d_value.astype(given.value.dtype),
        bias=d_bias,
        sinks=d_sinks,
    )


def _in_supported_dtype(operands: Operands) -> Operands:
    if operands.query.dtype in (jnp.bfloat16, jnp.float32):
        return operands
    query, key, value = (x.astype(jnp.float32) for x in operands[:3])
    return operands._replace(query=query, key=key, value=value)


def _decode(
    operands: Operands, options: Options, interpret: bool | pltpu.InterpretParams
) -> tuple[jax.Array, jax.Array]:
    """A few queries against a cache that stays as it lies, (B, S, G, D).

    Reading the cache takes far longer than arithmetic does. So all heads' queries are rows of one block and all heads'
    keys are one long sequence, of which a row may see those of its own head: segments. That multiplies G times too
    much, and moves no byte twice.
    """
    batch, queries, heads, width = operands.query.shape
    keys, key_heads, value_width = operands.value.shape[1:]
    rows = queries * heads
    padding = round_up(rows, 16) - rows

    def per_row(values: jax.Array) -> jax.Array:
        return jnp.pad(values, ((0, 0), (0, padding)), mode="edge")

    positional = options.causal or options.window is not None
    query_positions = key_positions = query_heads = key_head = key_lengths = None
    if positional:
        query_positions, key_positions = operands.query_positions, operands.key_positions
        if query_positions is None:
            query_positions = jnp.arange(queries, dtype=jnp.int32)[None]
        if key_positions is None:
            key_positions = jnp.arange(keys, dtype=jnp.int32)[None]
        query_positions = per_row(jnp.repeat(query_positions, heads, axis=1))
        key_positions = jnp.repeat(key_positions, key_heads, axis=1)
    if key_heads > 1:
        query_heads = per_row(jnp.tile(jnp.arange(heads, dtype=jnp.int32) // (heads // key_heads), queries)[None])
        key_head = jnp.tile(jnp.arange(key_heads, dtype=jnp.int32), keys)[None]
    if operands.key_lengths is not None:
        key_lengths = operands.key_lengths * key_heads
    query = operands.query.reshape(batch, rows, 1, width)
    flat = Operands(
        query=jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0))),
        key=operands.key.reshape(batch, keys * key_heads, 1, width),
        value=operands.value.reshape(batch, keys * key_heads, 1, value_width),
        query_positions=query_positions,
        key_positions=key_positions,
        query_segment_ids=query_heads,
        key_segment_ids=key_head,
        prefix_lengths=operands.prefix_lengths,
        key_lengths=key_lengths,
    )
    sinks = None
    if operands.sinks is not None:
        sinks = per_row(jnp.tile(operands.sinks.astype(jnp.float32), queries)[None])[None]
    out, logsumexp = forward_call(flat, sinks, options, decode=True, interpret=interpret)
    return (
        out[:, :rows].reshape(batch, queries, heads, value_width),
        logsumexp[:, 0, :rows].reshape(batch, queries, heads).swapaxes(1, 2),
    )



"""Softmax attention for TPUs: Pallas kernels for Mosaic."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.operands import Operands, Options
from kernels.attention.tpu.backward import backward_call, bias_gradient_call
from kernels.attention.tpu.forward import forward_call
from kernels.attention.tpu.plan import DECODE_QUERIES, DECODE_ROWS, LANES
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
    dtype, value_width = operands.query.dtype, operands.value.shape[3]
    operands = _in_supported_dtype(operands)
    operands = operands._replace(value=_widen(operands.value))
    queries, heads, width = operands.query.shape[1:]
    group = heads // operands.key.shape[2]
    alike = operands.bias is None and options.dropout_rate == 0  # heads may share a block of rows
    rows_last = width % LANES == 0 and operands.value.shape[3] % LANES == 0  # how XLA lays out a cache by itself
    few = queries <= DECODE_QUERIES and queries * heads <= DECODE_ROWS
    if alike and rows_last and few and operands.query_segment_ids is None:
        out, logsumexp = _decode_interleaved(operands, options, interpret)
    elif alike and group > 1 and queries * group <= LANES:
        out, logsumexp = _decode_grouped(operands, options, interpret)
    else:
        sinks = None if operands.sinks is None else operands.sinks.astype(jnp.float32)[:, None, None]
        out, logsumexp = forward_call(operands, sinks, options, interpret=interpret)
    return out[..., :value_width].astype(dtype), logsumexp


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
    operands = operands._replace(value=_widen(operands.value))
    dtype = operands.query.dtype
    residuals = (_widen(out.astype(dtype)), logsumexp, _widen(d_out.astype(dtype)), d_logsumexp)
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
        value=d_value[..., : given.value.shape[3]].astype(given.value.dtype),
        bias=d_bias,
        sinks=d_sinks,
    )


def _in_supported_dtype(operands: Operands) -> Operands:
    if operands.query.dtype in (jnp.bfloat16, jnp.float32):
        return operands
    query, key, value = (x.astype(jnp.float32) for x in operands[:3])
    return operands._replace(query=query, key=key, value=value)


def _widen(values: jax.Array) -> jax.Array:
    """A second column beside a single one: a bfloat16 matrix times a vector is more than Pallas can lower."""
    return jnp.pad(values, ((0, 0),) * 3 + ((0, 1),)) if values.shape[3] == 1 else values


def _decode_grouped(
    operands: Operands, options: Options, interpret: bool | pltpu.InterpretParams
) -> tuple[jax.Array, jax.Array]:
    """A few queries: those of all heads that share keys are rows of one block."""
    batch, queries, heads, width = operands.query.shape
    key_heads, value_width = operands.value.shape[2:]
    group = heads // key_heads

    def per_row(values: jax.Array | None) -> jax.Array | None:
        return None if values is None else jnp.repeat(values, group, axis=1)

    positions = operands.query_positions
    if positions is None:
        positions = jnp.arange(queries, dtype=jnp.int32)[None]
    query = operands.query.reshape(batch, queries, key_heads, group, width).swapaxes(2, 3)
    packed = operands._replace(
        query=query.reshape(batch, queries * group, key_heads, width),
        sinks=None,
        query_positions=per_row(positions),
        query_segment_ids=per_row(operands.query_segment_ids),
    )
    sinks = None
    if operands.sinks is not None:
        sinks = jnp.tile(operands.sinks.astype(jnp.float32).reshape(key_heads, 1, group), (1, 1, queries))
    out, logsumexp = forward_call(packed, sinks, options, interpret=interpret)
    out = out.reshape(batch, queries, group, key_heads, value_width).swapaxes(2, 3)
    logsumexp = logsumexp.reshape(batch, key_heads, queries, group).swapaxes(2, 3)
    return out.reshape(batch, queries, heads, value_width), logsumexp.reshape(batch, heads, queries)


def _decode_interleaved(
    operands: Operands, options: Options, interpret: bool | pltpu.InterpretParams
) -> tuple[jax.Array, jax.Array]:
    """A few queries against a cache that stays as it lies, (B, S, G, D).

    Reading the cache takes far longer than arithmetic does. So all heads' queries are rows of one block, and all heads'
    keys one long sequence of which a row sees those of its own head. That multiplies G times too much and moves no byte
    twice.
    """
    batch, queries, heads, width = operands.query.shape
    keys, key_heads, value_width = operands.value.shape[1:]
    rows = queries * heads
    padding = round_up(rows, 16) - rows

    def per_row(values: jax.Array) -> jax.Array:
        return jnp.pad(values, ((0, 0), (0, padding)), mode="edge")

    positions, key_positions = operands.query_positions, operands.key_positions
    if positions is None:
        positions = jnp.arange(queries, dtype=jnp.int32)[None]
    if not options.causal and options.window is None:
        key_positions = None
    query = operands.query.reshape(batch, rows, 1, width)
    flat = Operands(
        query=jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0))),
        key=operands.key.reshape(batch, keys * key_heads, 1, width),
        value=operands.value.reshape(batch, keys * key_heads, 1, value_width),
        query_positions=per_row(jnp.repeat(positions, heads, axis=1)),
        key_positions=None if key_positions is None else _repeat(key_positions, key_heads),
        prefix_lengths=operands.prefix_lengths,
        key_lengths=None if operands.key_lengths is None else operands.key_lengths * key_heads,
    )
    sinks = None
    if operands.sinks is not None:
        sinks = per_row(jnp.tile(operands.sinks.astype(jnp.float32), queries)[None])[None]
    out, logsumexp = forward_call(
        flat,
        sinks,
        options,
        interleaved=key_heads,
        query_heads=per_row(jnp.tile(jnp.arange(heads, dtype=jnp.int32) // (heads // key_heads), queries)[None]),
        interpret=interpret,
    )
    return (
        out[:, :rows].reshape(batch, queries, heads, value_width),
        logsumexp[:, 0, :rows].reshape(batch, queries, heads).swapaxes(1, 2),
    )


def _repeat(values: jax.Array, times: int) -> jax.Array:
    """`jnp.repeat` along axis 1, written so that no intermediate has a short last axis, which TPUs pad to 128."""
    if LANES % times or values.shape[1] % (LANES // times):
        return jnp.repeat(values, times, axis=1)
    several = LANES // times
    spread = jnp.arange(several)[:, None] == jnp.arange(LANES)[None] // times
    return jnp.sum(jnp.where(spread, values.reshape(-1, values.shape[1] // several, several, 1), 0), axis=2).reshape(
        values.shape[0], -1
    )

"""The readouts for NVIDIA GPUs in Pallas-Triton, on the tiles of attention's kernels."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.attention import gpu as attention
from kernels.attention.gpu import LOG2E, Plan, Tile
from kernels.attention.operands import Operands, Options
from kernels.attention_readout import chunked
from kernels.common import NEGATIVE_INFINITY

_NO_KEY = 2**31 - 1
_MOST_K = 32  # candidates of a row that its registers hold
_TOP_K_PROGRAMS = 264  # two for each core of an H100; fewer programs than that split the keys


def received(
    operands: Operands, weights: jax.Array, logsumexp: jax.Array, *, options: Options, interpret: bool
) -> jax.Array:
    """See `reference.received`: a program makes all sums of a block of keys, of one head."""
    if max(operands.query.shape[3], weights.shape[3]) > attention.WIDEST:
        return chunked.received(operands, weights, logsumexp, options=options)
    batch, keys = operands.key.shape[:2]
    heads, sums = weights.shape[2:]
    operands = attention.in_supported_dtype(operands)
    value = jnp.zeros((*operands.key.shape[:3], sums), operands.query.dtype)  # never made: a plan reads its shape
    plan = attention.make_plan(operands._replace(value=value), options, "forward")
    # A row that sees nothing has weights exp2(x - inf) = 0.
    row_logsumexp = jnp.where(jnp.isneginf(logsumexp), jnp.inf, logsumexp * LOG2E)
    return pl.pallas_call(
        partial(_received_kernel, plan=plan),
        grid=(batch * heads * plan.key_blocks,),
        out_shape=jax.ShapeDtypeStruct((batch, keys, heads, sums), jnp.float32),
        compiler_params=attention.compiler_params(plan),
        interpret=interpret,
        name="attention_received_gpu",
    )(_without_value(operands), weights.astype(operands.query.dtype), row_logsumexp)


def _without_value(operands: Operands) -> Operands:
    """What the kernels read."""
    absent: Any = None
    return operands._replace(value=absent, sinks=None)


def _received_kernel(refs: Operands, weights_ref: Any, logsumexp_ref: Any, out_ref: Any, *, plan: Plan) -> None:
    rows, keys = plan.blocks.rows, plan.blocks.keys
    batch, head, key_block = attention.program(plan.batch, plan.heads, plan.key_blocks)
    at = Tile(batch, head, 0, key_block * keys)
    key = attention.load_matrix(refs.key, batch, at.first_key, keys, jax.lax.div(head, plan.group))

    def body(block: jax.Array, total: jax.Array) -> jax.Array:
        here = at._replace(first_row=block * rows)
        query = attention.load_matrix(refs.query, batch, here.first_row, rows, head)
        weights = attention.load_matrix(weights_ref, batch, here.first_row, rows, head)
        logsumexp = attention.load_vector(logsumexp_ref, (batch, head), here.first_row, rows, other=jnp.inf)
        logits, _ = attention.tile_logits(refs, plan, here, query, key)
        probabilities = jnp.exp2(logits - logsumexp[:, None])
        return total + attention.dot(probabilities.astype(weights.dtype), weights, (0, 0))

    first, last = attention.row_block_range(refs, plan, at)
    width = max(pl.next_power_of_2(plan.value_width), 16)
    total = jax.lax.fori_loop(first, last, body, jnp.zeros((keys, width), jnp.float32))
    attention.store_matrix(out_ref, (batch,), at.first_key, head, total)


def top_k(operands: Operands, *, options: Options, k: int, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """See `chunked.top_k`: a program keeps the best of a block of rows; few rows share the keys among programs."""
    if operands.query.shape[3] > attention.WIDEST or k > _MOST_K:
        return chunked.top_k(operands, options=options, k=k)
    operands = attention.in_supported_dtype(operands)
    plan = attention.make_plan(operands, options, "forward")
    rows = min(plan.blocks.rows, 32)  # their candidates stay in registers
    plan = dataclasses.replace(plan, blocks=plan.blocks._replace(rows=rows))
    splits = min(max(1, _TOP_K_PROGRAMS // (plan.batch * plan.heads * plan.row_blocks)), plan.key_blocks)
    shape = (splits, plan.batch, plan.heads, plan.rows, pl.next_power_of_2(k))
    logits, indices = pl.pallas_call(
        partial(_top_k_kernel, plan=plan, splits=splits, k=k),
        grid=(math.prod((plan.batch, plan.heads, splits, plan.row_blocks)),),
        out_shape=(jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)),
        compiler_params=attention.compiler_params(plan),
        interpret=interpret,
        name="attention_top_k_gpu",
    )(_without_value(operands))
    # The best of all parts, by logit and among equals by index.
    logits, indices = (jnp.moveaxis(x, 0, 3).reshape(*shape[1:4], -1) for x in (logits, indices))
    negated, indices = jax.lax.sort((-logits, indices), num_keys=2)
    return -negated[..., :k] / LOG2E, indices[..., :k]


def _top_k_kernel(refs: Operands, logits_ref: Any, indices_ref: Any, *, plan: Plan, splits: int, k: int) -> None:
    rows, keys, slots = plan.blocks.rows, plan.blocks.keys, logits_ref.shape[-1]
    batch, head, split, row_block = attention.program(plan.batch, plan.heads, splits, plan.row_blocks)
    at = Tile(batch, head, row_block * rows, 0)
    query = attention.load_matrix(refs.query, batch, at.first_row, rows, head)
    slot = jnp.broadcast_to(attention.index_range(0, slots)[None], (rows, slots))

    def body(block: jax.Array, best: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
        here = at._replace(first_key=block * keys)
        key = attention.load_matrix(refs.key, batch, here.first_key, keys, jax.lax.div(head, plan.group), masked)
        logits, _ = attention.tile_logits(refs, plan, here, query, key, masked)
        key_index = attention.index_range(here.first_key, keys)[None]

        def better_ones(state: tuple[jax.Array, ...]) -> jax.Array:
            logits, values, _ = state
            return jnp.max((logits.max(axis=1) > values.min(axis=1)).astype(jnp.int32)) > 0

        def insert(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            logits, values, places = state
            best, worst = logits.max(axis=1)[:, None], values.min(axis=1)[:, None]
            place = jnp.where(logits == best, key_index, _NO_KEY).min(axis=1)[:, None]
            # Of equal ones the last key goes.
            leaving = jnp.where(values == worst, places, -1).max(axis=1)[:, None]
            replaced = (values == worst) & (places == leaving) & (best > worst)
            logits = jnp.where(key_index == place, -jnp.inf, logits)
            return logits, jnp.where(replaced, best, values), jnp.where(replaced, place, places)

        return jax.lax.while_loop(better_ones, insert, (logits, *best))[1:]

    first, unmasked, last = attention.key_block_range(refs, plan, at)
    if splits > 1:
        size = pl.cdiv(plan.key_blocks, splits)
        first, last = jnp.maximum(first, split * size), jnp.minimum(last, (split + 1) * size)
        unmasked = jnp.clip(unmasked, first, jnp.maximum(first, last))
    # Places tell slots apart, also empty ones. Slots beyond k never leave.
    start = jnp.where(slot < k, NEGATIVE_INFINITY, jnp.inf), slot
    values, places = attention.over_key_blocks(body, (first, unmasked, last), start)
    values = jnp.where(slot < k, values, NEGATIVE_INFINITY)
    here = (split, batch, head, pl.ds(at.first_row, rows), pl.ds(0, slots))
    inside = jnp.broadcast_to((attention.index_range(at.first_row, rows) < plan.rows)[:, None], (rows, slots))
    plgpu.store(logits_ref.at[here], values, mask=inside)
    plgpu.store(indices_ref.at[here], places, mask=inside)

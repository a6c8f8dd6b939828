"""The readouts for TPUs: Pallas kernels for Mosaic, on the blocks and tiles of attention's."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.operands import Operands, Options
from kernels.attention.tpu.plan import EMPTY, FULL, LANES, PARTIAL, Plan, block_states, make_plan
from kernels.attention.tpu.tile import (
    LOG2_E,
    Inputs,
    Outputs,
    Refs,
    Tiles,
    bounds_of,
    bytes_of,
    call,
    column,
    column_scratch,
    concatenate,
    mask_inputs,
    maximum,
    prefetched_scalars,
    product,
    spec,
)  # fmt: skip
from kernels.attention_readout import chunked
from kernels.common import NEGATIVE_INFINITY, round_up

SUBLANES = 8
_SELECTED_ROWS = 32  # rows of candidates that stay in registers while the best are taken out
_NO_KEY = float(2**30)  # indices are float32 in the kernel, exact to 2^24: cross-lane units know no integers


def received(
    operands: Operands, weights: jax.Array, logsumexp: jax.Array, *, options: Options, interpret: bool
) -> jax.Array:
    """See `reference.received`. A chunk of keys stays in VMEM with its sums while all queries of the head pass by."""
    operands = _in_supported_dtype(operands)
    sums = weights.shape[3]
    weights = jnp.pad(weights, ((0, 0),) * 3 + ((0, round_up(sums, SUBLANES) - sums),)).astype(operands.query.dtype)
    value = jnp.zeros((*operands.key.shape[:3], weights.shape[3]), weights.dtype)  # never made: a plan reads its shape
    plan = _plan(operands._replace(value=value), options)
    states, bounds = block_states(operands, options, plan)

    def place(batch: Any, head: Any, chunk: Any, block: Any, *_: Any) -> tuple[Any, Any, Any, Any]:
        return batch, head, block, chunk

    def queries(width: int) -> pl.BlockSpec:
        return spec((None, None, width, plan.block_q), lambda b, h, c, i, *_: (b, h, 0, i))

    inputs: Inputs = {
        "query": (operands.query.transpose(0, 2, 3, 1), queries(plan.width)),
        "weights": (weights.transpose(0, 2, 3, 1), queries(plan.value_width)),
        "logsumexp": (logsumexp[:, :, None], queries(1)),
        "key": (
            operands.key.transpose(0, 2, 3, 1),
            spec((None, None, plan.width, plan.chunk), lambda b, h, c, i, *_: (b, jax.lax.div(h, plan.group), 0, c)),
        ),
        **mask_inputs(operands, plan, states, place),
    }
    outputs: Outputs = {
        "out": (
            jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.value_width, plan.keys), jnp.float32),
            spec((None, None, plan.value_width, plan.chunk), lambda b, h, c, i, *_: (b, h, 0, c)),
        )
    }
    scratch = {
        "query_rows": pltpu.VMEM((plan.block_q, plan.width), operands.query.dtype),
        "weights_clean": pltpu.VMEM((plan.value_width, plan.block_q), weights.dtype),
        "logsumexp_column": pltpu.VMEM((plan.block_q, LANES), jnp.float32),
        **column_scratch(inputs, plan),
    }
    (out,) = call(
        "attention_received",
        lambda refs: _received_kernel(refs, plan, options),
        plan,
        (plan.batch, plan.heads, plan.chunks, plan.query_blocks),
        3,
        prefetched_scalars(operands, plan, bounds),
        inputs,
        outputs,
        scratch,
        _cost(
            plan, states, inputs, outputs, plan.width + plan.value_width, {"query": plan.chunks, "weights": plan.chunks}
        ),
        interpret,
    )
    return out.transpose(0, 3, 1, 2)[..., :sums]


def _received_kernel(refs: Refs, plan: Plan, options: Options) -> None:
    batch, head, chunk, query_block = (pl.program_id(axis) for axis in range(4))
    first, end = bounds_of(refs, plan, batch, query_block, chunk)
    tiles = Tiles(refs, plan, options, batch, head, query_block)

    def start_keys(key_block: Any, _: None) -> None:
        columns = pl.ds(pl.multiple_of(key_block * plan.block_k, plan.block_k), plan.block_k)
        refs["out"][:, columns] = jnp.zeros((plan.value_width, plan.block_k), jnp.float32)

    def start(piece: Any, _: None) -> None:
        rows = pl.ds(pl.multiple_of(piece * LANES, LANES), LANES)
        refs["query_rows"][rows] = tiles.existing_queries(refs["query"][:, rows], rows).T
        refs["weights_clean"][:, rows] = tiles.existing_queries(refs["weights"][:, rows], rows)
        logsumexp = tiles.existing_queries(refs["logsumexp"][:, rows], rows)
        # A row without keys: any finite number will do, its logits are all far below.
        refs["logsumexp_column"][rows] = column(jnp.where(logsumexp == -jnp.inf, 0.0, logsumexp * LOG2_E))
        tiles.prepare(rows)

    def block(key_block: Any, masked: bool) -> None:
        at = pl.multiple_of((key_block - chunk * plan.blocks_per_chunk) * plan.block_k, plan.block_k)
        columns = pl.ds(at, plan.block_k)
        keys = refs["key"][:, columns]
        for first_row in range(0, plan.block_q, plan.rows):
            rows = slice(first_row, first_row + plan.rows)
            scores = product(refs["query_rows"][rows], keys)
            logsumexp = refs["logsumexp_column"][rows]
            probabilities = []
            for lane in range(0, plan.block_k, LANES):
                logits, _ = tiles.logits(scores[:, lane : lane + LANES], rows, key_block, lane, masked)
                probabilities.append(jnp.exp2(logits - logsumexp))
            refs["out"][:, columns] += product(refs["weights_clean"][:, rows], concatenate(probabilities, keys.dtype))

    pl.when(query_block == 0)(lambda: jax.lax.fori_loop(0, plan.blocks_per_chunk, start_keys, None))
    jax.lax.fori_loop(0, plan.block_q // LANES, start, None)
    jax.lax.fori_loop(first, end, _step(refs, plan, block), None)


def top_k(operands: Operands, *, options: Options, k: int, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """See `chunked.top_k`. The best so far stand beside each block's logits; the k best of both are taken out one by
    one, but only where a block holds a better one at all.
    """
    if k > LANES or operands.query.shape[1] == 1:  # one query: XLA reads the cache as it lies, a kernel a copy of it
        return chunked.top_k(operands, options=options, k=k)
    operands = _in_supported_dtype(operands)
    plan = _plan(operands, options)
    states, bounds = block_states(operands, options, plan)
    kept = round_up(k, SUBLANES)

    def place(batch: Any, head: Any, block: Any, chunk: Any, *_: Any) -> tuple[Any, Any, Any, Any]:
        return batch, head, block, chunk

    def queries(width: int) -> pl.BlockSpec:
        return spec((None, None, width, plan.block_q), lambda b, h, i, c, *_: (b, h, 0, i))

    inputs: Inputs = {
        "query": (operands.query.transpose(0, 2, 3, 1), queries(plan.width)),
        "key": (
            operands.key.transpose(0, 2, 3, 1),
            spec((None, None, plan.width, plan.chunk), lambda b, h, i, c, *_: (b, jax.lax.div(h, plan.group), 0, c)),
        ),
        **mask_inputs(operands, plan, states, place),
    }
    shape = jax.ShapeDtypeStruct((plan.batch, plan.heads, kept, plan.queries), jnp.float32)
    outputs: Outputs = {"values": (shape, queries(kept)), "places": (shape, queries(kept))}
    scratch = {
        "query_rows": pltpu.VMEM((plan.block_q, plan.width), operands.query.dtype),
        "candidates": pltpu.VMEM((plan.block_q, LANES + plan.block_k), jnp.float32),
        "best_places": pltpu.VMEM((plan.block_q, LANES), jnp.float32),
        **column_scratch(inputs, plan),
    }
    readings = {"key": plan.query_blocks if plan.chunks > 1 else 1}
    values, places = call(
        "attention_top_k",
        lambda refs: _top_k_kernel(refs, plan, options, k),
        plan,
        (plan.batch, plan.heads, plan.query_blocks, plan.chunks),
        3,
        prefetched_scalars(operands, plan, bounds),
        inputs,
        outputs,
        scratch,
        _cost(plan, states, inputs, outputs, plan.width, readings),
        interpret,
    )
    values, places = (x[:, :, :k].swapaxes(2, 3) for x in (values, places))
    return values / LOG2_E, places.astype(jnp.int32)


def _top_k_kernel(refs: Refs, plan: Plan, options: Options, k: int) -> None:
    batch, head, query_block, chunk = (pl.program_id(axis) for axis in range(4))
    first, end = bounds_of(refs, plan, batch, query_block, chunk)
    tiles = Tiles(refs, plan, options, batch, head, query_block)
    best = slice(0, LANES)
    size = min(_SELECTED_ROWS, plan.block_q)

    def start(piece: Any, _: None) -> None:
        rows = pl.ds(pl.multiple_of(piece * LANES, LANES), LANES)
        refs["query_rows"][rows] = refs["query"][:, rows].T
        refs["candidates"][rows, best] = jnp.full((LANES, LANES), NEGATIVE_INFINITY)
        refs["best_places"][rows] = jnp.full((LANES, LANES), _NO_KEY)
        tiles.prepare(rows)

    def select(rows: Any, first_key: Any) -> None:
        """Makes the k best of the candidates the best so far, sorted."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (size, LANES), 1)
        columns = jax.lax.broadcasted_iota(jnp.int32, (size, plan.block_k), 1)
        place = jnp.concatenate([refs["best_places"][rows], (first_key + columns).astype(jnp.float32)], axis=1)

        def take(number: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            candidates, values, places = state
            value = jnp.max(candidates, axis=1, keepdims=True)
            where = jnp.min(jnp.where(candidates == value, place, _NO_KEY), axis=1, keepdims=True)
            here = lane == number
            candidates = jnp.where(place == where, NEGATIVE_INFINITY, candidates)
            return candidates, jnp.where(here, value, values), jnp.where(here, where, places)

        empty = jnp.full((size, LANES), NEGATIVE_INFINITY), jnp.full((size, LANES), _NO_KEY)
        _, values, places = jax.lax.fori_loop(0, k, take, (refs["candidates"][rows], *empty))
        refs["candidates"][rows, best] = values
        refs["best_places"][rows] = places

    def block(key_block: Any, masked: bool) -> None:
        at = pl.multiple_of((key_block - chunk * plan.blocks_per_chunk) * plan.block_k, plan.block_k)
        keys = refs["key"][:, pl.ds(at, plan.block_k)]
        for first_row in range(0, plan.block_q, plan.rows):
            rows = slice(first_row, first_row + plan.rows)
            scores = product(refs["query_rows"][rows], keys)
            for lane in range(0, plan.block_k, LANES):
                logits, _ = tiles.logits(scores[:, lane : lane + LANES], rows, key_block, lane, masked)
                refs["candidates"][rows, LANES + lane : 2 * LANES + lane] = jnp.maximum(logits, NEGATIVE_INFINITY)

        def piece(number: Any, _: None) -> None:
            rows = pl.ds(pl.multiple_of(number * size, size), size)
            new = [refs["candidates"][rows, pl.ds(LANES + lane, LANES)] for lane in range(0, plan.block_k, LANES)]
            lane = jax.lax.broadcasted_iota(jnp.int32, (size, LANES), 1)
            so_far = refs["candidates"][rows, best]
            worst = jnp.min(jnp.where(lane < k, so_far, jnp.inf), axis=1, keepdims=True)
            better = jnp.max(maximum(new) - worst) > 0
            pl.when(better)(lambda: select(rows, key_block * plan.block_k))

        jax.lax.fori_loop(0, plan.block_q // size, piece, None)

    def finish(piece: Any, _: None) -> None:
        rows = pl.ds(pl.multiple_of(piece * LANES, LANES), LANES)
        kept = refs["values"].shape[0]
        refs["values"][:, rows] = refs["candidates"][rows, best].T[:kept]
        refs["places"][:, rows] = refs["best_places"][rows].T[:kept]

    pieces = plan.block_q // LANES
    pl.when(chunk == 0)(lambda: jax.lax.fori_loop(0, pieces, start, None))
    jax.lax.fori_loop(first, end, _step(refs, plan, block), None)
    pl.when(chunk == plan.chunks - 1)(lambda: jax.lax.fori_loop(0, pieces, finish, None))


def _step(refs: Refs, plan: Plan, block: Any) -> Any:
    """`block(key_block, masked)` as the body of a loop, without a mask where none is needed."""

    def step(key_block: Any, _: None) -> None:
        if not plan.masked:
            block(key_block, masked=False)
            return
        state = refs["states"][0, key_block]
        pl.when(state == FULL)(lambda: block(key_block, masked=False))
        pl.when(state == PARTIAL)(lambda: block(key_block, masked=True))

    return step


def _plan(operands: Operands, options: Options) -> Plan:
    return dataclasses.replace(make_plan(operands, options), heads_per_step=1)


def _in_supported_dtype(operands: Operands) -> Operands:
    if operands.query.dtype in (jnp.bfloat16, jnp.float32):
        return operands
    return operands._replace(query=operands.query.astype(jnp.float32), key=operands.key.astype(jnp.float32))


def _cost(
    plan: Plan, states: Any, inputs: Inputs, outputs: Outputs, widths: int, readings: dict[str, int]
) -> pl.CostEstimate:
    # What depends on the data is counted as if nothing were masked.
    visible = float(np.mean(states != EMPTY)) if isinstance(states, np.ndarray) else 1.0
    pairs = plan.batch * plan.heads * plan.queries * plan.keys * visible
    return pl.CostEstimate(
        flops=int(2 * pairs * widths),
        transcendentals=int(pairs),
        bytes_accessed=sum(bytes_of(array) * readings.get(name, 1) for name, (array, _) in inputs.items())
        + sum(bytes_of(shape) for shape, _ in outputs.values()),
    )

"""The forward kernel: an online softmax over blocks of keys (Milakov and Gimelshein 2018; Dao et al. 2022)."""

from __future__ import annotations

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
    Refs,
    Tiles,
    bounds_of,
    bytes_of,
    call,
    column,
    column_scratch,
    concatenate,
    lanes,
    mask_inputs,
    maximum,
    prefetched_scalars,
    product,
    row,
    spec,
    total,
)  # fmt: skip
from kernels.common import NEGATIVE_INFINITY


def forward_call(
    operands: Operands,
    sinks: jax.Array | None,
    options: Options,
    *,
    interleaved: int = 0,
    query_heads: jax.Array | None = None,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array]:
    """The kernel, on whatever `forward` makes of its operands.

    Args:
      operands: query, key and value (batch, time, heads, width), transposed here to (batch, heads, width, time): free
        where XLA lays out their producer's result so.
      sinks: float32, (heads, 1, 1 or queries).
      options: static options.
      interleaved: if positive, `heads` is 1, keys are those of so many heads, token by token, and time stays before
        width: decoding from a cache as it lies.
      query_heads: int32 (1, queries), with `interleaved` the key head that each query reads.
      interpret: as in `forward`.
    """
    decode = interleaved > 0
    plan = make_plan(operands, options, interleaved=interleaved)
    states, bounds = block_states(operands, options, plan)
    axes = (0, 2, 1, 3) if decode else (0, 2, 3, 1)
    query, key, value = (x.transpose(axes) for x in operands[:3])
    per_step = plan.heads_per_step
    batches = states.shape[0]

    def place(batch: Any, head: Any, block: Any, chunk: Any, bounds_ref: Any, _: Any) -> tuple[Any, Any, Any, Any]:
        # A chunk out of bounds repeats its neighbour: a block whose index stays is not fetched again. (`lax.div`: the
        # lowering of // asks what the device is.)
        at = 2 * ((batch if batches > 1 else 0) * plan.query_blocks + block)
        first = jax.lax.div(bounds_ref[at], plan.blocks_per_chunk)
        last = jax.lax.div(jnp.maximum(bounds_ref[at + 1] - 1, 0), plan.blocks_per_chunk)
        return batch, head, block, jnp.clip(chunk, jnp.minimum(first, last), last)

    def queries(width: int) -> pl.BlockSpec:
        if decode:
            return spec((None, per_step, plan.block_q, width), lambda b, h, i, c, *_: (b, h, i, 0))
        return spec((None, per_step, width, plan.block_q), lambda b, h, i, c, *_: (b, h, 0, i))

    def keys(width: int) -> pl.BlockSpec:
        def index(*grid: Any) -> tuple[Any, ...]:
            batch, head, _, chunk = place(*grid)
            head = jax.lax.div(head, plan.group)
            return (batch, head, chunk, 0) if decode else (batch, head, 0, chunk)

        return spec((None, per_step, plan.chunk, width) if decode else (None, per_step, width, plan.chunk), index)

    inputs = {
        "query": (query, queries(plan.width)),
        "key": (key, keys(plan.width)),
        "value": (value, keys(plan.value_width)),
        **mask_inputs(operands, plan, states, place),
    }
    if sinks is not None:
        each = sinks.shape[2] > 1
        block = (per_step, 1, plan.block_q if each else 1)
        inputs["sinks"] = (sinks, spec(block, lambda b, h, i, c, *_: (h, 0, i if each else 0)))
    if query_heads is not None:
        inputs["query_heads"] = (query_heads, spec((1, plan.block_q), lambda b, h, i, c, *_: (0, i)))
    out_shape = (plan.batch, plan.heads, plan.value_width, plan.queries)
    if decode:
        out_shape = (plan.batch, plan.heads, plan.queries, plan.value_width)
    outputs = {
        "out": (jax.ShapeDtypeStruct(out_shape, query.dtype), queries(plan.value_width)),
        "logsumexp": (
            jax.ShapeDtypeStruct((plan.batch, plan.heads, 1, plan.queries), jnp.float32),
            spec((None, per_step, 1, plan.block_q), lambda b, h, i, c, *_: (b, h, 0, i)),
        ),
    }
    scratch = {
        "rows": pltpu.VMEM((plan.block_q, plan.width), query.dtype),
        "maximum": pltpu.VMEM((plan.block_q, LANES), jnp.float32),
        "sum": pltpu.VMEM((plan.block_q, LANES), jnp.float32),
        "accumulator": pltpu.VMEM((plan.block_q, plan.value_width), jnp.float32),
        **column_scratch(inputs, plan),
    }
    out, logsumexp = call(
        "attention_decode" if decode else "attention_forward",
        lambda refs: _kernel(refs, plan, options, decode),
        plan,
        (plan.batch, plan.heads // per_step, plan.query_blocks, plan.chunks),
        2,
        prefetched_scalars(operands, plan, bounds),
        inputs,
        outputs,
        scratch,
        _cost(plan, states, inputs, outputs),
        interpret,
    )
    return out.transpose(0, 2, 1, 3) if decode else out.transpose(0, 3, 1, 2), logsumexp[:, :, 0]


def _kernel(refs: Refs, plan: Plan, options: Options, decode: bool) -> None:
    batch, head_block, query_block, chunk = (pl.program_id(axis) for axis in range(4))
    first, end = bounds_of(refs, plan, batch, query_block, chunk)
    # Work that every row needs once is a loop over pieces: short code, which the core's instruction memory holds.
    piece_size = min(LANES, plan.block_q)
    piece_count = plan.block_q // piece_size
    unroll = 2 if piece_count % 2 == 0 else 1  # two at a time hide each other's latency

    def one_head(number: Any, _: None) -> None:
        query, key, value, out, logsumexp = (
            refs[name].at[number] for name in ("query", "key", "value", "out", "logsumexp")
        )
        tiles = Tiles(refs, plan, options, batch, head_block * plan.heads_per_step + number, query_block)

        def start(piece: Any, _: None) -> None:
            rows = pl.ds(pl.multiple_of(piece * piece_size, piece_size), piece_size)
            shape = (piece_size, LANES)
            refs["rows"][rows] = query[rows] if decode else query[:, rows].T
            refs["accumulator"][rows] = jnp.zeros((piece_size, plan.value_width), jnp.float32)
            if "sinks" in refs:  # a key of weight 1, counted in lane 0, whose value is zero
                sink = refs["sinks"].at[number]
                each = sink.shape[1] > 1
                sink = column(sink[:, rows]) if each else jnp.broadcast_to(sink[...], shape)
                refs["maximum"][rows] = sink * LOG2_E
                refs["sum"][rows] = (jax.lax.broadcasted_iota(jnp.int32, shape, 1) == 0).astype(jnp.float32)
            else:
                refs["maximum"][rows] = jnp.full(shape, NEGATIVE_INFINITY)
                refs["sum"][rows] = jnp.zeros(shape, jnp.float32)
            tiles.prepare(rows)

        def block(key_block: Any, masked: bool) -> None:
            at = pl.multiple_of((key_block - chunk * plan.blocks_per_chunk) * plan.block_k, plan.block_k)
            if decode:
                keys, values = key[pl.ds(at, plan.block_k), :], value[pl.ds(at, plan.block_k), :]
            else:
                keys, values = key[:, pl.ds(at, plan.block_k)], value[:, pl.ds(at, plan.block_k)]
            if masked:
                values = tiles.existing_keys(values, key_block, 0 if decode else 1)
            for start in range(0, plan.block_q, plan.rows):
                rows = slice(start, start + plan.rows)
                scores = product(refs["rows"][rows], keys, transposed=decode)
                logits = [
                    tiles.logits(scores[:, lane : lane + LANES], rows, key_block, lane, masked)[0]
                    for lane in range(0, plan.block_k, LANES)
                ]
                before = refs["maximum"][rows]
                after = jnp.maximum(before, jnp.max(maximum(logits), axis=1, keepdims=True))
                weights = [jnp.exp2(tile - after) for tile in logits]
                shrink = jnp.exp2(before - after)
                refs["maximum"][rows] = after
                refs["sum"][rows] = refs["sum"][rows] * shrink + total(weights)
                if options.dropout_rate > 0:
                    weights = [
                        jnp.where(tiles.keep(rows, key_block, number * LANES), tile, 0)
                        for number, tile in enumerate(weights)
                    ]
                refs["accumulator"][rows] = refs["accumulator"][rows] * lanes(shrink, plan.value_width) + product(
                    concatenate(weights, values.dtype), values, transposed=not decode
                )

        def step(key_block: Any, _: None) -> None:
            if not plan.masked:
                block(key_block, masked=False)
                return
            state = refs["states"][0, key_block]
            pl.when(state == FULL)(lambda: block(key_block, masked=False))
            pl.when(state == PARTIAL)(lambda: block(key_block, masked=True))

        def finish(piece: Any, _: None) -> None:
            rows = pl.ds(pl.multiple_of(piece * piece_size, piece_size), piece_size)
            weight = jnp.broadcast_to(jnp.sum(refs["sum"][rows], axis=1, keepdims=True), (piece_size, LANES))
            highest, weight = row(refs["maximum"][rows]), row(weight)
            empty = highest <= NEGATIVE_INFINITY / 2  # weights are then relative to nothing
            normaliser = jnp.where(empty, 0.0, 1 / (weight * (1 - options.dropout_rate)))
            logsumexp[:, rows] = jnp.where(empty, -jnp.inf, (highest + jnp.log2(weight)) / LOG2_E)
            result = refs["accumulator"][rows]
            if decode:
                out[rows] = (result * lanes(column(normaliser), plan.value_width)).astype(out.dtype)
            else:
                out[:, rows] = (result.T * normaliser).astype(out.dtype)

        pl.when(chunk == 0)(lambda: jax.lax.fori_loop(0, piece_count, start, None))
        jax.lax.fori_loop(first, end, step, None)
        pl.when(chunk == plan.chunks - 1)(lambda: jax.lax.fori_loop(0, piece_count, finish, None, unroll=unroll))

    jax.lax.fori_loop(0, plan.heads_per_step, one_head, None)


def _cost(plan: Plan, states: Any, inputs: dict[str, Any], outputs: dict[str, Any]) -> pl.CostEstimate:
    # What depends on the data is counted as if nothing were masked.
    visible = float(np.mean(states != EMPTY)) if isinstance(states, np.ndarray) else 1.0
    pairs = plan.batch * plan.heads * plan.queries * plan.keys * visible
    # Keys are read again for every block of queries where one chunk of them does not stay; a bias that batch or heads
    # share, for each of them.
    readings = dict.fromkeys(inputs, 1.0)
    if plan.chunks > 1:
        readings["key"] = readings["value"] = max(1.0, plan.query_blocks * plan.group * visible)
    if "bias" in inputs:
        bias = inputs["bias"][0]
        readings["bias"] = plan.batch * plan.heads / (bias.shape[0] * bias.shape[1])
    return pl.CostEstimate(
        flops=int(2 * pairs * (plan.width + plan.value_width)),
        transcendentals=int(pairs),
        bytes_accessed=int(
            sum(bytes_of(array) * readings[name] for name, (array, _) in inputs.items())
            + sum(bytes_of(shape) for shape, _ in outputs.values())
        ),
    )

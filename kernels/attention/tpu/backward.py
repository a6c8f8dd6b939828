"""The backward kernels: one for query, key and value, and one for the bias.

With probabilities P = exp(logits - logsumexp), dropped and rescaled to P', and delta = rowsum(out * d_out) -
d_logsumexp (Dao et al. 2022, appendix B):

    dV = P'^T dO,  dS = P * (dropout(dO V^T) - delta),  dQ = scale dS K,  dK = scale dS^T Q,  dbias = sum(dS).

Every product takes its operands as they lie (time last) but for the queries' of a block, which are turned once.
"""

from __future__ import annotations

import dataclasses
import functools
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
    Refs,
    Tiles,
    bounds_of,
    bytes_of,
    call,
    column,
    column_scratch,
    concatenate,
    mask_inputs,
    prefetched_scalars,
    product,
    sees_one_block,
    spec,
    total,
)  # fmt: skip

Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # out, logsumexp, d_out, d_logsumexp


def backward_call(
    operands: Operands, residuals: Residuals, options: Options, *, interpret: bool | pltpu.InterpretParams
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, in their shapes and dtype.

    A chunk of keys stays in VMEM with its gradients while all queries of all heads of its group pass by, so that every
    array moves once. With several chunks, each writes its own share of the queries' gradient.
    """
    plan = make_plan(operands, options, backward=True)
    states, bounds = block_states(operands, options, plan)
    per_step = plan.heads_per_step

    def place(batch: Any, head: Any, chunk: Any, member: Any, block: Any, *_: Any) -> tuple[Any, Any, Any, Any]:
        return batch, head * plan.group + member, block, chunk

    def queries(width: int) -> pl.BlockSpec:
        def index(*grid: Any) -> tuple[Any, ...]:
            batch, head, block, _ = place(*grid)
            return batch, head, 0, block

        return spec((None, per_step, width, plan.block_q), index)

    def keys(width: int) -> pl.BlockSpec:
        return spec((None, per_step, width, plan.chunk), lambda b, g, c, *_: (b, g, 0, c))

    def query_gradient(*grid: Any) -> tuple[Any, ...]:
        batch, head, block, chunk = place(*grid)
        return chunk, batch, head, 0, block

    inputs = {
        **_query_inputs(operands, residuals, queries),
        "key": (operands.key.transpose(0, 2, 3, 1), keys(plan.width)),
        "value": (operands.value.transpose(0, 2, 3, 1), keys(plan.value_width)),
        **mask_inputs(operands, plan, states, place),
    }
    query, key, value = (inputs[name][0] for name in ("query", "key", "value"))
    partial_dtype = query.dtype if plan.chunks == 1 else jnp.float32
    outputs = {
        "d_query": (
            jax.ShapeDtypeStruct((plan.chunks, *query.shape), partial_dtype),
            spec((None, None, per_step, plan.width, plan.block_q), query_gradient),
        ),
        "d_key": (jax.ShapeDtypeStruct(key.shape, key.dtype), keys(plan.width)),
        "d_value": (jax.ShapeDtypeStruct(value.shape, value.dtype), keys(plan.value_width)),
    }
    scratch = {
        **_query_scratch(plan, query.dtype),
        "query_sum": pltpu.VMEM((plan.block_q, plan.width), jnp.float32),
        "key_sum": pltpu.VMEM((plan.width, plan.chunk), jnp.float32),
        "value_sum": pltpu.VMEM((plan.value_width, plan.chunk), jnp.float32),
        **column_scratch(inputs, plan),
    }
    d_query, d_key, d_value = call(
        "attention_backward",
        lambda refs: _kernel(refs, plan, options),
        plan,
        (plan.batch, plan.heads // plan.group // per_step, plan.chunks, plan.group, plan.query_blocks),
        2,
        prefetched_scalars(operands, plan, bounds),
        inputs,
        outputs,
        scratch,
        _cost(plan, states, inputs, outputs, 3 * plan.width + 2 * plan.value_width, plan.chunks),
        interpret,
    )
    d_query = d_query[0] if plan.chunks == 1 else d_query.sum(0).astype(query.dtype)
    d_query, d_key, d_value = (x.transpose(0, 3, 1, 2) for x in (d_query, d_key, d_value))
    return d_query, d_key, d_value


def _query_inputs(operands: Operands, residuals: Residuals, queries: Any) -> Inputs:
    out, logsumexp, d_out, d_logsumexp = residuals
    width, value_width = operands.query.shape[3], operands.value.shape[3]
    return {
        "query": (operands.query.transpose(0, 2, 3, 1), queries(width)),
        "out": (out.transpose(0, 2, 3, 1), queries(value_width)),
        "d_out": (d_out.transpose(0, 2, 3, 1), queries(value_width)),
        "logsumexp": (logsumexp[:, :, None], queries(1)),
        "d_logsumexp": (d_logsumexp[:, :, None], queries(1)),
    }


def _query_scratch(plan: Plan, dtype: Any) -> dict[str, Any]:
    return {
        "query_t": pltpu.VMEM((plan.width, plan.block_q), dtype),
        "d_out_t": pltpu.VMEM((plan.value_width, plan.block_q), dtype),
        "query_rows": pltpu.VMEM((plan.block_q, plan.width), dtype),
        "d_out_rows": pltpu.VMEM((plan.block_q, plan.value_width), dtype),
        "logsumexp_column": pltpu.VMEM((plan.block_q, LANES), jnp.float32),
        "d_logsumexp_column": pltpu.VMEM((plan.block_q, LANES), jnp.float32),
        "delta_column": pltpu.VMEM((plan.block_q, LANES), jnp.float32),
    }


def _take_queries(refs: Refs, number: Any, tiles: Tiles, rows: Any) -> None:
    """Cleans and turns what belongs to these queries of the block."""
    query = tiles.existing_queries(refs["query"][number, :, rows], rows)
    d_out = tiles.existing_queries(refs["d_out"][number, :, rows], rows)
    out = tiles.existing_queries(refs["out"][number, :, rows], rows)
    logsumexp = tiles.existing_queries(refs["logsumexp"][number, :, rows], rows)
    d_logsumexp = tiles.existing_queries(refs["d_logsumexp"][number, :, rows], rows)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=0, keepdims=True) - d_logsumexp
    refs["query_t"][:, rows], refs["query_rows"][rows] = query, query.T
    refs["d_out_t"][:, rows], refs["d_out_rows"][rows] = d_out, d_out.T
    refs["delta_column"][rows], refs["d_logsumexp_column"][rows] = column(delta), column(d_logsumexp)
    # A row without keys: any finite number will do, its logits are all far below.
    refs["logsumexp_column"][rows] = column(jnp.where(logsumexp == -jnp.inf, 0.0, logsumexp * LOG2_E))
    tiles.prepare(rows)


def _logit_gradients(
    refs: Refs, plan: Plan, options: Options, tiles: Tiles, rows: slice, keys: Any, values: Any, key_block: Any,
    masked: bool, alone: Any,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:  # fmt: skip
    """Tiles of P', of dS, and of the gradient of the scaled scores before the cap.

    `alone` says whether these rows see no other block; it may be traced.
    """
    scores = product(refs["query_rows"][rows], keys)
    d_weights = product(refs["d_out_rows"][rows], values)
    logsumexp, delta = refs["logsumexp_column"][rows], refs["delta_column"][rows]
    weights, dropped, d_dropped, slopes = [], [], [], []
    for lane in range(0, plan.block_k, LANES):
        logits, slope = tiles.logits(scores[:, lane : lane + LANES], rows, key_block, lane, masked)
        weight, d_weight = jnp.exp2(logits - logsumexp), d_weights[:, lane : lane + LANES]
        weights.append(weight)
        if options.dropout_rate > 0:
            keep, inverse = tiles.keep(rows, key_block, lane), 1 / (1 - options.dropout_rate)
            weight, d_weight = jnp.where(keep, weight * inverse, 0), jnp.where(keep, d_weight * inverse, 0)
        dropped.append(weight)
        d_dropped.append(d_weight)
        slopes.append(slope)
    if alone is not False:
        # An output rounded to bfloat16 gives delta an error that does not cancel in rows of few keys. These see one
        # block only, in which delta is at hand: rowsum(P dP).
        pieces = [weight * d_weight for weight, d_weight in zip(weights, d_dropped, strict=True)]
        exact = jnp.sum(total(pieces), axis=1, keepdims=True) - refs["d_logsumexp_column"][rows]
        delta = exact if alone is True else delta + alone.astype(jnp.float32) * (exact - delta)
    d_logits = [weight * (d_weight - delta) for weight, d_weight in zip(weights, d_dropped, strict=True)]
    d_scores = [d if slope is None else d * slope for d, slope in zip(d_logits, slopes, strict=True)]
    return dropped, d_logits, d_scores


def _rounded(tiles: list[jax.Array], dtype: Any, exact: bool) -> list[jax.Array]:
    """The tiles side by side in `dtype`; with `exact` also what rounding took, as a second term."""
    rounded = concatenate(tiles, dtype)
    if not exact or dtype == jnp.float32:
        return [rounded]
    return [rounded, (concatenate(tiles, jnp.float32) - rounded.astype(jnp.float32)).astype(dtype)]


def _kernel(refs: Refs, plan: Plan, options: Options) -> None:
    batch, key_head, chunk, member, query_block = (pl.program_id(axis) for axis in range(5))
    first, end = bounds_of(refs, plan, batch, query_block, chunk)
    only_block = sees_one_block(refs, plan, batch, query_block)

    def one_head(number: Any, _: None) -> None:
        head = (key_head * plan.heads_per_step + number) * plan.group + member
        tiles = Tiles(refs, plan, options, batch, head, query_block)

        def start(piece: Any, _: None) -> None:
            rows = pl.ds(pl.multiple_of(piece * LANES, LANES), LANES)
            _take_queries(refs, number, tiles, rows)
            refs["query_sum"][rows] = jnp.zeros((LANES, plan.width), jnp.float32)

        def start_keys(key_block: Any, _: None) -> None:
            columns = pl.ds(pl.multiple_of(key_block * plan.block_k, plan.block_k), plan.block_k)
            refs["key_sum"][:, columns] = jnp.zeros((plan.width, plan.block_k), jnp.float32)
            refs["value_sum"][:, columns] = jnp.zeros((plan.value_width, plan.block_k), jnp.float32)

        def block(key_block: Any, masked: bool, alone: bool) -> None:
            at = pl.multiple_of((key_block - chunk * plan.blocks_per_chunk) * plan.block_k, plan.block_k)
            columns = pl.ds(at, plan.block_k)
            keys, values = refs["key"][number, :, columns], refs["value"][number, :, columns]
            if masked:
                keys, values = tiles.existing_keys(keys, key_block, 1), tiles.existing_keys(values, key_block, 1)
            for start in range(0, plan.block_q, plan.rows):
                rows = slice(start, start + plan.rows)
                dropped, _, d_scores = _logit_gradients(
                    refs, plan, options, tiles, rows, keys, values, key_block, masked, alone
                )
                # In rows of few keys weights are large, and so would be what rounding them takes.
                exact = masked and alone
                for weights in _rounded(dropped, keys.dtype, exact):
                    refs["value_sum"][:, columns] += product(refs["d_out_t"][:, rows], weights)
                for gradient in _rounded(d_scores, keys.dtype, exact):
                    refs["key_sum"][:, columns] += product(refs["query_t"][:, rows], gradient)
                    refs["query_sum"][rows] += product(gradient, keys, transposed=True)

        def step(key_block: Any, _: None) -> None:
            single = plan.key_blocks == 1
            if not plan.masked:
                block(key_block, masked=False, alone=single)
                return
            state = refs["states"][0, key_block]
            pl.when(state == FULL)(lambda: block(key_block, masked=False, alone=single))
            if not single:
                pl.when((state == PARTIAL) & ~only_block)(lambda: block(key_block, masked=True, alone=False))
            pl.when((state == PARTIAL) & only_block)(lambda: block(key_block, masked=True, alone=True))

        def finish(piece: Any, _: None) -> None:
            rows = pl.ds(pl.multiple_of(piece * LANES, LANES), LANES)
            d_query = refs["query_sum"][rows].T * options.scale
            refs["d_query"][number, :, rows] = d_query.astype(refs["d_query"].dtype)

        def finish_keys(key_block: Any, _: None) -> None:
            columns = pl.ds(pl.multiple_of(key_block * plan.block_k, plan.block_k), plan.block_k)
            d_key, d_value = refs["key_sum"][:, columns] * options.scale, refs["value_sum"][:, columns]
            refs["d_key"][number, :, columns] = d_key.astype(refs["d_key"].dtype)
            refs["d_value"][number, :, columns] = d_value.astype(refs["d_value"].dtype)

        first_query = (member == 0) & (query_block == 0)
        last_query = (member == plan.group - 1) & (query_block == plan.query_blocks - 1)
        pieces, key_blocks = plan.block_q // LANES, plan.blocks_per_chunk
        pl.when(first_query)(lambda: jax.lax.fori_loop(0, key_blocks, start_keys, None))
        jax.lax.fori_loop(0, pieces, start, None)
        jax.lax.fori_loop(first, end, step, None)
        jax.lax.fori_loop(0, pieces, finish, None)
        pl.when(last_query)(lambda: jax.lax.fori_loop(0, key_blocks, finish_keys, None))

    jax.lax.fori_loop(0, plan.heads_per_step, one_head, None)


def bias_gradient_call(
    operands: Operands, residuals: Residuals, options: Options, *, interpret: bool | pltpu.InterpretParams
) -> jax.Array:
    """Gradient of the bias, in its shape and dtype.

    A kernel of its own, because the axes over which a bias is shared must be the innermost for their sum to stay in
    VMEM; and because nothing is computed where nobody asks for it. The logits are made again, a block at a time.
    """
    bias = operands.bias
    assert bias is not None
    plan = make_plan(operands, options, backward=True)
    plan = dataclasses.replace(plan, chunk=plan.block_k, heads_per_step=1)
    states, bounds = block_states(operands, options, plan)
    sizes = (plan.batch, plan.heads, plan.query_blocks, plan.key_blocks)
    own = tuple(size > 1 for size in bias.shape)  # axes that the bias has; over the others it is summed
    grid = (
        *(size if has else 1 for size, has in zip(sizes, own, strict=True)),
        *(1 if has else size for size, has in zip(sizes, own, strict=True)),
    )

    def place(*grid_index: Any) -> tuple[Any, ...]:
        return tuple(grid_index[axis] if own[axis] else grid_index[4 + axis] for axis in range(4))

    def queries(width: int) -> pl.BlockSpec:
        def index(*grid_index: Any) -> tuple[Any, ...]:
            batch, head, block, _ = place(*grid_index)
            return batch, head, 0, block

        return spec((None, 1, width, plan.block_q), index)

    def keys(width: int) -> pl.BlockSpec:
        def index(*grid_index: Any) -> tuple[Any, ...]:
            batch, head, _, block = place(*grid_index)
            return batch, jax.lax.div(head, plan.group), 0, block

        return spec((None, None, width, plan.block_k), index)

    inputs = {
        **_query_inputs(operands, residuals, queries),
        "key": (operands.key.transpose(0, 2, 3, 1), keys(plan.width)),
        "value": (operands.value.transpose(0, 2, 3, 1), keys(plan.value_width)),
        **mask_inputs(operands, plan, states, place),
    }
    block = (plan.block_q if own[2] else 1, plan.block_k if own[3] else 1)
    outputs = {
        "d_bias": (
            jax.ShapeDtypeStruct(bias.shape, bias.dtype),
            spec((None, None, *block), lambda *grid_index: grid_index[:4]),
        )
    }
    scratch = {
        **_query_scratch(plan, operands.query.dtype),
        "bias_sum": pltpu.VMEM(block, jnp.float32),
        **column_scratch(inputs, plan),
    }
    (d_bias,) = call(
        "attention_bias_gradient",
        lambda refs: _bias_kernel(refs, plan, options, own, grid, place),
        plan,
        grid,
        4,
        prefetched_scalars(operands, plan, bounds),
        inputs,
        outputs,
        scratch,
        _cost(plan, states, inputs, outputs, plan.width + plan.value_width, plan.key_blocks),
        interpret,
    )
    return d_bias


def _bias_kernel(
    refs: Refs, plan: Plan, options: Options, own: tuple[bool, ...], grid: tuple[int, ...], place: Any
) -> None:
    index = [pl.program_id(axis) for axis in range(8)]
    batch, head, query_block, key_block = place(*index)
    tiles = Tiles(refs, plan, options, batch, head, query_block)
    only_block = sees_one_block(refs, plan, batch, query_block)

    def add(masked: bool) -> None:
        def start(piece: Any, _: None) -> None:
            _take_queries(refs, 0, tiles, pl.ds(pl.multiple_of(piece * LANES, LANES), LANES))

        jax.lax.fori_loop(0, plan.block_q // LANES, start, None)
        keys, values = refs["key"][...], refs["value"][...]
        if masked:
            keys, values = tiles.existing_keys(keys, key_block, 1), tiles.existing_keys(values, key_block, 1)
        for first in range(0, plan.block_q, LANES):
            rows = slice(first, first + LANES)
            alone = only_block if masked or plan.key_blocks == 1 else False
            _, d_logits, _ = _logit_gradients(refs, plan, options, tiles, rows, keys, values, key_block, masked, alone)
            d_bias = concatenate(d_logits, jnp.float32)
            if not own[3]:
                d_bias = jnp.sum(d_bias, axis=1, keepdims=True)
            if own[2]:
                refs["bias_sum"][rows] += d_bias
            else:
                refs["bias_sum"][...] += jnp.sum(d_bias, axis=0, keepdims=True)

    summed = range(4, 8)
    first_term = functools.reduce(jnp.logical_and, [index[axis] == 0 for axis in summed])
    last_term = functools.reduce(jnp.logical_and, [index[axis] == grid[axis] - 1 for axis in summed])

    @pl.when(first_term)
    def _zero() -> None:
        refs["bias_sum"][...] = jnp.zeros_like(refs["bias_sum"])

    state = refs["states"][0, key_block]
    pl.when(state == FULL)(lambda: add(masked=False))
    pl.when(state == PARTIAL)(lambda: add(masked=True))

    @pl.when(last_term)
    def _write() -> None:
        refs["d_bias"][...] = refs["bias_sum"][...].astype(refs["d_bias"].dtype)


def _cost(
    plan: Plan, states: Any, inputs: dict[str, Any], outputs: dict[str, Any], widths: int, readings: int
) -> pl.CostEstimate:
    # What depends on the data is counted as if nothing were masked.
    visible = float(np.mean(states != EMPTY)) if isinstance(states, np.ndarray) else 1.0
    pairs = plan.batch * plan.heads * plan.queries * plan.keys * visible
    again = dict.fromkeys(("query", "out", "d_out"), readings)
    if "bias" in inputs:
        bias = inputs["bias"][0]
        again["bias"] = plan.batch * plan.heads // (bias.shape[0] * bias.shape[1])
    return pl.CostEstimate(
        flops=int(2 * pairs * widths),
        transcendentals=int(pairs),
        bytes_accessed=sum(bytes_of(array) * again.get(name, 1) for name, (array, _) in inputs.items())
        + sum(bytes_of(shape) for shape, _ in outputs.values()),
    )

"""Flash attention for NVIDIA GPUs in Pallas-Triton (Dao 2023, "FlashAttention-2", algorithms 1 and 2).

One program makes one tile of one output, all sums in registers, no atomics: two runs give the same bits. Keys that
causality, the window or the lengths exclude are never loaded. A short query (decoding) has the heads that share a key
head folded into its rows, and the sequence of keys split among programs, so that one token fills the GPU.

Logits are kept in base 2 (exp2 is the instruction there is): `logits` below are log2(e) times the definition's.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.attention import chunked
from kernels.attention.operands import Operands, Options, visible
from kernels.common import NEGATIVE_INFINITY, hash_uniform

Index = jax.Array | int

LOG2E = 1 / math.log(2)
_DECODE_ROWS = 64  # queries x heads a key head, up to which heads are folded into rows and keys are split
_DECODE_PROGRAMS = 264  # two for each core of an H100


class Blocks(NamedTuple):
    """Sizes of a tile of the logits, and how Triton runs it."""

    rows: int
    keys: int
    warps: int
    stages: int


# By pass, bytes of an input's element, and the wider of key and value, rounded up to a power of 2. The usual sizes of
# FlashAttention-2, cut until ptxas spills nothing on an H100. float32 runs without tensor cores, which round to TF32.
_BLOCKS: dict[tuple[str, int, int], Blocks] = {
    ("forward", 2, 64): Blocks(128, 64, warps=4, stages=3),
    ("forward", 2, 128): Blocks(128, 64, warps=8, stages=3),
    ("forward", 2, 256): Blocks(128, 64, warps=8, stages=2),
    ("forward", 2, 512): Blocks(32, 32, warps=8, stages=1),
    ("backward", 2, 64): Blocks(64, 64, warps=4, stages=2),
    ("backward", 2, 128): Blocks(64, 64, warps=8, stages=2),
    ("backward", 2, 256): Blocks(32, 64, warps=8, stages=1),
    ("backward", 2, 512): Blocks(16, 32, warps=8, stages=1),
    ("forward", 4, 64): Blocks(32, 32, warps=4, stages=1),
    ("forward", 4, 128): Blocks(32, 32, warps=4, stages=1),
    ("forward", 4, 256): Blocks(16, 16, warps=4, stages=1),
    ("forward", 4, 512): Blocks(16, 16, warps=4, stages=1),
    ("backward", 4, 64): Blocks(32, 32, warps=4, stages=1),
    ("backward", 4, 128): Blocks(32, 32, warps=8, stages=1),
    ("backward", 4, 256): Blocks(16, 16, warps=8, stages=1),
    ("backward", 4, 512): Blocks(16, 16, warps=8, stages=1),  # spills
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel knows when it is traced."""

    options: Options
    batch: int
    rows: int  # queries, times `fold`
    keys: int
    heads: int  # query heads, divided by `fold`
    key_heads: int
    fold: int  # heads that are rows: row r is query r // fold, head r % fold of its group
    width: int
    value_width: int
    blocks: Blocks

    @property
    def group(self) -> int:
        """Heads that share a key head, rows apart."""
        return self.heads // self.key_heads

    @property
    def row_blocks(self) -> int:
        """Tiles that cover the rows."""
        return pl.cdiv(self.rows, self.blocks.rows)

    @property
    def key_blocks(self) -> int:
        """Tiles that cover the keys."""
        return pl.cdiv(self.keys, self.blocks.keys)


WIDEST = max(width for _, _, width in _BLOCKS)


def make_plan(operands: Operands, options: Options, kernel: str, fold: int = 1) -> Plan:
    """Sizes of the tiles for `kernel`, "forward" or "backward"."""
    batch, rows, heads, width = operands.query.shape
    keys, key_heads, value_width = operands.value.shape[1:]
    widest = max(pl.next_power_of_2(max(width, value_width)), 64)
    blocks = _BLOCKS[kernel, operands.query.dtype.itemsize, widest]
    blocks = blocks._replace(
        rows=min(blocks.rows, max(pl.next_power_of_2(rows), 16)),
        keys=min(blocks.keys, max(pl.next_power_of_2(keys), 16)),
    )
    return Plan(options, batch, rows, keys, heads, key_heads, fold, width, value_width, blocks)


class Tile(NamedTuple):
    """Where a tile of the logits lies: scalars inside a kernel."""

    batch: Index
    head: Index
    first_row: Index
    first_key: Index


def forward(operands: Operands, *, options: Options, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Output (B, T, H, E) in the inputs' dtype and log-sum-exp (B, H, T) float32."""
    if max(operands.query.shape[3], operands.value.shape[3]) > WIDEST:  # no tile of such rows fits a core
        return chunked.forward(operands, options)
    dtype, operands = operands.query.dtype, in_supported_dtype(operands)
    _, queries, heads, _ = operands.query.shape
    group, splits = heads // operands.key.shape[2], 1
    decoding = queries * group <= _DECODE_ROWS
    rows = _fold(operands, group)._replace(sinks=None) if decoding else operands
    plan = make_plan(rows, options, "forward", fold=group if decoding else 1)
    if decoding:
        wanted = max(1, _DECODE_PROGRAMS // (plan.batch * plan.heads))
        splits = min(wanted, pl.cdiv(plan.key_blocks, 2))
        splits = pl.cdiv(plan.key_blocks, pl.cdiv(plan.key_blocks, splits))  # none is empty
    out_shape = (splits, plan.batch, plan.rows, plan.heads, plan.value_width)
    out, logsumexp = pl.pallas_call(
        partial(_forward_kernel, plan=plan, splits=splits),
        grid=(plan.batch * plan.heads * splits * plan.row_blocks,),
        out_shape=(
            jax.ShapeDtypeStruct(out_shape, jnp.float32 if decoding else operands.query.dtype),
            jax.ShapeDtypeStruct((splits, plan.batch, plan.heads, plan.rows), jnp.float32),
        ),
        compiler_params=compiler_params(plan),
        interpret=interpret,
        name="attention_gpu_forward",
    )(rows)
    if decoding:
        out, logsumexp = _combine(*_unfold(out, logsumexp, group), operands.sinks)
    else:
        out, logsumexp = out[0], logsumexp[0]
    return out.astype(dtype), logsumexp


def backward(
    operands: Operands,
    out: jax.Array,
    logsumexp: jax.Array,
    d_out: jax.Array,
    d_logsumexp: jax.Array,
    *,
    options: Options,
    interpret: bool,
) -> Operands:
    """Gradients in the shapes and dtypes of the operands; None for integers and what is absent."""
    if max(operands.query.shape[3], operands.value.shape[3]) > WIDEST:
        return chunked.backward(operands, out, logsumexp, d_out, d_logsumexp, options=options)
    dtype, operands = operands.query.dtype, in_supported_dtype(operands)
    plan = make_plan(operands, options, "backward")
    # A row that sees nothing has probabilities exp2(x - inf) = 0.
    row_logsumexp = jnp.where(jnp.isneginf(logsumexp), jnp.inf, logsumexp * LOG2E)
    delta = jnp.einsum("bthe,bthe->bht", out.astype(jnp.float32), d_out.astype(jnp.float32)) - d_logsumexp
    residuals = _Residuals(d_out.astype(operands.query.dtype), row_logsumexp, delta, d_logsumexp)
    bias = operands.bias

    def call(kernel: Any, name: str, grid: tuple[int, ...], out_shape: Any) -> Any:
        return pl.pallas_call(
            partial(kernel, plan=plan), grid=(math.prod(grid),), out_shape=out_shape,
            compiler_params=compiler_params(plan), interpret=interpret, name=f"attention_gpu_backward_{name}",
        )(operands, residuals)  # fmt: skip

    def like(array: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype)

    def vectors(length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((plan.batch, plan.heads, length), jnp.float32)

    of_rows = bias is not None and bias.shape[3] == 1
    of_keys = bias is not None and not of_rows and bias.shape[2] == 1
    d_query, exact_delta, bias_rows = call(
        _d_query_kernel, "query", (plan.batch, plan.heads, plan.row_blocks),
        (like(operands.query), vectors(plan.rows) if out.dtype != jnp.float32 else None,
         vectors(plan.rows) if of_rows else None),
    )  # fmt: skip
    if exact_delta is not None:
        residuals = residuals._replace(delta=exact_delta)
    d_key, d_value, bias_keys = call(
        _d_key_value_kernel, "key_value", (plan.batch, plan.key_heads, plan.key_blocks),
        (like(operands.key), like(operands.value), vectors(plan.keys) if of_keys else None),
    )  # fmt: skip
    d_bias = d_sinks = None
    if bias is not None:
        if of_rows:
            d_bias = bias_rows[..., None]
        elif of_keys:
            d_bias = bias_keys[:, :, None]
        else:
            d_bias = call(
                _d_bias_kernel, "bias", (*bias.shape[:2], plan.row_blocks, plan.key_blocks),
                jax.ShapeDtypeStruct(bias.shape, jnp.float32),
            )  # fmt: skip
        shared = tuple(axis for axis in range(4) if d_bias.shape[axis] != bias.shape[axis])
        d_bias = d_bias.sum(shared, keepdims=True).astype(bias.dtype)
    if operands.sinks is not None:
        # The sink's own probability, times its d logit, -delta.
        sink = operands.sinks.astype(jnp.float32)[None, :, None]
        d_sinks = -jnp.sum(jnp.exp(sink - logsumexp) * residuals.delta, axis=(0, 2)).astype(operands.sinks.dtype)
    d_query, d_key, d_value = (gradient.astype(dtype) for gradient in (d_query, d_key, d_value))
    return Operands(d_query, d_key, d_value, d_bias, d_sinks)


def in_supported_dtype(operands: Operands) -> Operands:
    """float64 and floats of 8 bits become float32."""
    if operands.query.dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        return operands
    query, key, value = (array.astype(jnp.float32) for array in operands[:3])
    return operands._replace(query=query, key=key, value=value)


def compiler_params(plan: Plan) -> plgpu.CompilerParams:
    """How Triton runs the plan's tiles."""
    return plgpu.CompilerParams(num_warps=plan.blocks.warps, num_stages=plan.blocks.stages)


# ------------------------------------------------------------------------------------------------- a tile of logits


def program(*sizes: int) -> list[jax.Array]:
    """This program's place in a grid of these sizes, the last running fastest (CUDA limits all axes but the first)."""
    index, places = pl.program_id(0), []
    for size in reversed(sizes):
        places.append(jax.lax.rem(index, size))
        index = jax.lax.div(index, size)
    return places[::-1]


def index_range(first: Index, size: int) -> jax.Array:
    """The integers first .. first + size - 1."""
    return first + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


def load_matrix(ref: Any, batch: Index, first: Index, size: int, head: Index, bounded: bool = True) -> jax.Array:
    """(size, width) of (B, time, heads, width), zero beyond its edges; the width is padded to a power of 2."""
    length, width = ref.shape[1], ref.shape[3]
    padded = max(pl.next_power_of_2(width), 16)
    mask = None
    if bounded and length % size:
        mask = jnp.broadcast_to((index_range(first, size) < length)[:, None], (size, padded))
    if padded != width:
        inside = jnp.broadcast_to((index_range(0, padded) < width)[None], (size, padded))
        mask = inside if mask is None else mask & inside
    other = None if mask is None else 0.0
    return plgpu.load(ref.at[batch, pl.ds(first, size), head, pl.ds(0, padded)], mask=mask, other=other)


def store_matrix(ref: Any, places: tuple[Index, ...], first: Index, head: Index, value: jax.Array) -> None:
    """Writes (size, padded width) to (..., time, heads, width), within its edges."""
    length, _, width = ref.shape[-3:]
    size, padded = value.shape
    mask = (index_range(first, size) < length)[:, None] & (index_range(0, padded) < width)[None]
    plgpu.store(ref.at[(*places, pl.ds(first, size), head, pl.ds(0, padded))], value.astype(ref.dtype), mask=mask)


def _shared(places: tuple[Index, ...], shape: tuple[int, ...]) -> tuple[Index, ...]:
    # Traced even where it is always 0: the interpreter knows no static index.
    return tuple(jnp.minimum(place, extent - 1) for place, extent in zip(places, shape, strict=False))


def load_vector(ref: Any, places: tuple[Index, ...], first: Index, size: int, other: float = 0) -> jax.Array:
    """(size,) along the last axis, `other` beyond its edge; an axis of size 1 is shared by all places."""
    places = _shared(places, ref.shape)
    inside = index_range(first, size) < ref.shape[-1]
    return plgpu.load(ref.at[(*places, pl.ds(first, size))], mask=inside, other=jnp.asarray(other, ref.dtype))


def store_vector(ref: Any, places: tuple[Index, ...], first: Index, value: jax.Array) -> None:
    """Writes (size,) along the last axis, within its edge."""
    inside = index_range(first, value.size) < ref.shape[-1]
    plgpu.store(ref.at[(*places, pl.ds(first, value.size))], value, mask=inside)


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    """A matrix product over an axis of either side, summed in float32."""
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def tile_logits(
    refs: Operands, plan: Plan, at: Tile, query: jax.Array, key: jax.Array, masked: bool = True
) -> tuple[jax.Array, jax.Array | float]:
    """A tile (rows, keys) of biased logits, -inf where masked, and the slope d logits / d (query . key)."""
    product = dot(query, key, (1, 1))
    cap, scale = plan.options.logit_softcap, plan.options.scale
    slope: jax.Array | float
    if cap is None:
        logits, slope = product * (scale * LOG2E), scale
    else:
        tanh = jnp.tanh(product * (scale / cap))
        logits, slope = tanh * (cap * LOG2E), scale - scale * tanh * tanh
    if refs.bias is not None:
        logits += _bias(refs.bias, plan, at).astype(jnp.float32) * LOG2E
    mask = _mask(refs, plan, at) if masked else None
    return logits if mask is None else jnp.where(mask, logits, -jnp.inf), slope


def _bias(ref: Any, plan: Plan, at: Tile) -> jax.Array:
    """The bias of a tile, of a shape that broadcasts to it."""
    rows, keys = plan.blocks.rows, plan.blocks.keys
    batch, head, row, key = _shared((at.batch, at.head, at.first_row, at.first_key), ref.shape)
    if ref.shape[2] == 1 and ref.shape[3] == 1:
        return plgpu.load(ref.at[batch, head, row, key])
    if ref.shape[2] == 1:
        return load_vector(ref, (batch, head, row), key, keys)[None]
    inside_rows = index_range(row, rows) < ref.shape[2]
    if ref.shape[3] == 1:
        return plgpu.load(ref.at[batch, head, pl.ds(row, rows), key], mask=inside_rows, other=0.0)[:, None]
    inside = inside_rows[:, None] & (index_range(key, keys) < ref.shape[3])[None]
    return plgpu.load(ref.at[batch, head, pl.ds(row, rows), pl.ds(key, keys)], mask=inside, other=0.0)


def _mask(refs: Operands, plan: Plan, at: Tile) -> jax.Array | None:
    rows, keys = plan.blocks.rows, plan.blocks.keys
    key_index = index_range(at.first_key, keys)

    def of_rows(ref: Any) -> Any:
        return None if ref is None else load_vector(ref, (at.batch,), at.first_row, rows)[:, None]

    def of_keys(ref: Any) -> Any:
        return None if ref is None else load_vector(ref, (at.batch,), at.first_key, keys)[None]

    mask = visible(
        plan.options,
        _tokens(plan, at)[:, None] if refs.query_positions is None else of_rows(refs.query_positions),
        key_index[None] if refs.key_positions is None else of_keys(refs.key_positions),
        of_rows(refs.query_segment_ids),
        of_keys(refs.key_segment_ids),
        None if refs.prefix_lengths is None else refs.prefix_lengths[at.batch],
        key_index[None],
        None if refs.key_lengths is None else refs.key_lengths[at.batch],
    )
    if plan.keys % keys:
        exists = (key_index < plan.keys)[None]
        mask = exists if mask is None else mask & exists
    return None if mask is None else jnp.broadcast_to(mask, (rows, keys))


def _tokens(plan: Plan, at: Tile) -> jax.Array:
    """(rows,) indices of the queries."""
    row = index_range(at.first_row, plan.blocks.rows)
    return row if plan.fold == 1 else jax.lax.div(row, plan.fold)


def _kept(refs: Any, plan: Plan, at: Tile) -> jax.Array:
    """The weights of a tile that dropout keeps."""
    head: Any = refs.dropout_heads[at.batch, at.head * plan.fold]
    if plan.fold > 1:
        head += jax.lax.rem(index_range(at.first_row, plan.blocks.rows), plan.fold)[:, None]
    key_index = index_range(at.first_key, plan.blocks.keys)
    uniform = hash_uniform(refs.dropout_seed[...], head, _tokens(plan, at)[:, None], key_index[None])
    return uniform >= plan.options.dropout_rate


def key_block_range(refs: Operands, plan: Plan, at: Tile) -> tuple[Index, Index, Index]:
    """Key blocks (first, unmasked, last) of a tile's rows: those in [unmasked, last) need a mask, none are beyond."""
    options, rows, keys = plan.options, plan.blocks.rows, plan.blocks.keys
    low = jax.lax.div(at.first_row, plan.fold)
    high = jax.lax.div(at.first_row + rows - 1, plan.fold)
    if refs.query_positions is not None:
        positions = load_vector(refs.query_positions, (at.batch,), at.first_row, rows)
        inside = index_range(at.first_row, rows) < plan.rows
        low = jnp.min(jnp.where(inside, positions, jnp.iinfo(jnp.int32).max))
        high = jnp.max(jnp.where(inside, positions, jnp.iinfo(jnp.int32).min))
    first: Index = 0
    unmasked: Index = plan.keys
    last: Index = plan.keys
    if refs.key_positions is None:  # else a key's index says nothing of its position
        if options.causal:
            prefix = 0 if refs.prefix_lengths is None else refs.prefix_lengths[at.batch]
            unmasked = jnp.minimum(unmasked, jnp.maximum(low + 1, prefix))
            last = jnp.minimum(last, jnp.maximum(high + 1, prefix))
        left, right = options.window or (None, None)
        if left is not None:
            first = jnp.maximum(low - left, 0)
        if right is not None:
            last = jnp.minimum(last, high + (right + 1))
    if refs.key_lengths is not None:
        unmasked = jnp.minimum(unmasked, refs.key_lengths[at.batch])
        last = jnp.minimum(last, refs.key_lengths[at.batch])
    first, last = jax.lax.div(first, keys), jax.lax.div(jnp.maximum(last, 0) + (keys - 1), keys)
    always_masked = (
        options.window is not None or refs.query_segment_ids is not None or
        (options.causal and (refs.query_positions is not None or refs.key_positions is not None))
    )  # fmt: skip
    if always_masked:
        return first, first, last
    return first, jnp.clip(jax.lax.div(jnp.maximum(unmasked, 0), keys), first, last), last


def over_key_blocks(body: Any, ranges: tuple[Index, Index, Index], carry: Any) -> Any:
    """Runs body(block, carry, masked=...) over the key blocks, without a mask where none is needed."""
    first, unmasked, last = ranges
    if unmasked is not first:
        carry = jax.lax.fori_loop(first, unmasked, partial(body, masked=False), carry)
    return jax.lax.fori_loop(unmasked, last, partial(body, masked=True), carry)


# ---------------------------------------------------------------------------------------------------------- forward


def _forward_kernel(refs: Operands, out_ref: Any, logsumexp_ref: Any, *, plan: Plan, splits: int) -> None:
    rows, keys = plan.blocks.rows, plan.blocks.keys
    batch, head, split, row_block = program(plan.batch, plan.heads, splits, plan.row_blocks)
    if plan.options.causal:
        row_block = plan.row_blocks - 1 - row_block  # the longest rows first: they would be the last to end
    at = Tile(batch, head, row_block * rows, 0)
    key_head = jax.lax.div(head, plan.group)
    query = load_matrix(refs.query, batch, at.first_row, rows, head)

    def body(block: jax.Array, carry: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
        maximum, denominator, total = carry
        here = at._replace(first_key=block * keys)
        key = load_matrix(refs.key, batch, here.first_key, keys, key_head, masked)
        logits, _ = tile_logits(refs, plan, here, query, key, masked)
        new_maximum = jnp.maximum(maximum, logits.max(axis=1))
        weights = jnp.exp2(logits - new_maximum[:, None])
        shrink = jnp.exp2(maximum - new_maximum)
        denominator = denominator * shrink + weights.sum(axis=1)
        if plan.options.dropout_rate > 0:
            weights = jnp.where(_kept(refs, plan, here), weights, 0.0)
        value = load_matrix(refs.value, batch, here.first_key, keys, key_head, masked)
        total = total * shrink[:, None] + dot(weights.astype(value.dtype), value)
        return new_maximum, denominator, total

    first, unmasked, last = key_block_range(refs, plan, at)
    if splits > 1:
        size = pl.cdiv(plan.key_blocks, splits)
        first, last = jnp.maximum(first, split * size), jnp.minimum(last, (split + 1) * size)
        unmasked = jnp.clip(unmasked, first, jnp.maximum(first, last))
    carry = (
        jnp.full((rows,), NEGATIVE_INFINITY, jnp.float32),  # finite: of a row yet empty, exp2(-inf - maximum) is 0
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, max(pl.next_power_of_2(plan.value_width), 16)), jnp.float32),
    )
    maximum, denominator, total = over_key_blocks(body, (first, unmasked, last), carry)
    if refs.sinks is not None:
        sink = refs.sinks[head].astype(jnp.float32) * LOG2E
        new_maximum = jnp.maximum(maximum, sink)
        shrink = jnp.exp2(maximum - new_maximum)
        denominator = denominator * shrink + jnp.exp2(sink - new_maximum)
        total, maximum = total * shrink[:, None], new_maximum
    empty = denominator == 0
    denominator = jnp.where(empty, 1.0, denominator)
    out = total / (denominator * (1 - plan.options.dropout_rate))[:, None]
    store_matrix(out_ref, (split, batch), at.first_row, head, out)
    logsumexp = jnp.where(empty, -jnp.inf, maximum / LOG2E + jnp.log(denominator))
    store_vector(logsumexp_ref, (split, batch, head), at.first_row, logsumexp)


def _fold(operands: Operands, fold: int) -> Operands:
    """Rows (query, head of a group) in the place of queries, key heads in the place of heads."""
    batch, queries, heads, width = operands.query.shape
    key_heads = heads // fold
    query = operands.query.reshape(batch, queries, key_heads, fold, width).swapaxes(2, 3)

    def repeat(array: jax.Array | None) -> jax.Array | None:
        return None if array is None else jnp.repeat(array, fold, axis=1)

    bias = operands.bias
    if bias is not None and bias.shape[1] > 1:
        batches, _, length, keys = bias.shape
        bias = bias.reshape(batches, key_heads, fold, length, keys).swapaxes(2, 3)
        bias = jnp.broadcast_to(bias, (batches, key_heads, queries, fold, keys))
        bias = bias.reshape(batches, key_heads, queries * fold, keys)
    elif bias is not None and bias.shape[2] > 1:
        bias = jnp.repeat(bias, fold, axis=2)
    return operands._replace(
        query=query.reshape(batch, queries * fold, key_heads, width),
        bias=bias,
        query_positions=repeat(operands.query_positions),
        query_segment_ids=repeat(operands.query_segment_ids),
    )


def _unfold(out: jax.Array, logsumexp: jax.Array, fold: int) -> tuple[jax.Array, jax.Array]:
    """(parts, B, T x fold, G, E) and (parts, B, G, T x fold) with the heads back in their place."""
    parts, batch, rows, key_heads, width = out.shape
    queries, heads = rows // fold, key_heads * fold
    out = out.reshape(parts, batch, queries, fold, key_heads, width).swapaxes(3, 4)
    logsumexp = logsumexp.reshape(parts, batch, key_heads, queries, fold).swapaxes(3, 4)
    return out.reshape(parts, batch, queries, heads, width), logsumexp.reshape(parts, batch, heads, queries)


def _combine(out: jax.Array, logsumexp: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The softmax over all keys from those over each part of them: (parts, B, T, H, E), (parts, B, H, T)."""
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None], (1, *logsumexp.shape[1:]))
        logsumexp = jnp.concatenate([logsumexp, sink])
    total = jax.nn.logsumexp(logsumexp, axis=0)
    weights = jnp.exp(logsumexp - jnp.where(jnp.isneginf(total), 0, total))[: out.shape[0]]
    return jnp.einsum("pbthe,pbht->bthe", out, weights, precision="highest"), total


# --------------------------------------------------------------------------------------------------------- backward


class _Residuals(NamedTuple):
    """What the backward kernels read beside the operands."""

    d_out: jax.Array  # (B, T, H, E)
    logsumexp: jax.Array  # (B, H, T) base 2, +inf for a row that sees nothing
    delta: jax.Array  # (B, H, T) sum of probabilities * d_probabilities = sum of out * d_out, less d_logsumexp
    d_logsumexp: jax.Array  # (B, H, T)


class _RowTile(NamedTuple):
    """The rows of a tile, loaded."""

    query: jax.Array
    d_out: jax.Array
    logsumexp: jax.Array
    delta: jax.Array


def _load_rows(refs: Operands, residuals: _Residuals, plan: Plan, at: Tile) -> _RowTile:
    rows, places = plan.blocks.rows, (at.batch, at.head)
    return _RowTile(
        load_matrix(refs.query, at.batch, at.first_row, rows, at.head),
        load_matrix(residuals.d_out, at.batch, at.first_row, rows, at.head),
        load_vector(residuals.logsumexp, places, at.first_row, rows, other=jnp.inf),
        load_vector(residuals.delta, places, at.first_row, rows),
    )


class _Gradients(NamedTuple):
    """Tiles (rows, keys)."""

    probabilities: jax.Array
    weights: jax.Array  # those that dropout keeps, not yet divided by 1 - rate: in bfloat16, 1 is exact, 1 / 0.9 not
    d_probabilities: jax.Array
    d_logits: jax.Array  # biased ones
    slope: jax.Array | float  # d logits / d (query . key)


def _gradients(
    refs: Operands, plan: Plan, at: Tile, of_rows: _RowTile, key: jax.Array, value: jax.Array, masked: bool = True
) -> _Gradients:
    logits, slope = tile_logits(refs, plan, at, of_rows.query, key, masked)
    probabilities = jnp.exp2(logits - of_rows.logsumexp[:, None])
    d_probabilities = dot(of_rows.d_out, value, (1, 1))
    weights = probabilities
    if plan.options.dropout_rate > 0:
        kept = _kept(refs, plan, at)
        weights = jnp.where(kept, weights, 0.0)
        d_probabilities = jnp.where(kept, d_probabilities * (1 / (1 - plan.options.dropout_rate)), 0.0)
    d_logits = probabilities * (d_probabilities - of_rows.delta[:, None])
    return _Gradients(probabilities, weights, d_probabilities, d_logits, slope)


def _d_query_kernel(
    refs: Operands, residuals: _Residuals, d_query_ref: Any, delta_ref: Any, d_bias_ref: Any, *, plan: Plan
) -> None:
    """Gradient of the query; with `delta_ref`, also delta to float32 precision.

    An output rounded to bfloat16 gives delta an error that does not cancel in rows of few keys. Where d logits were
    made with such a delta, what they lack is (exact delta - delta) * probabilities, which is known at the end.
    """
    rows, keys = plan.blocks.rows, plan.blocks.keys
    batch, head, row_block = program(plan.batch, plan.heads, plan.row_blocks)
    if plan.options.causal:
        row_block = plan.row_blocks - 1 - row_block
    at = Tile(batch, head, row_block * rows, 0)
    key_head = jax.lax.div(head, plan.group)
    of_rows = _load_rows(refs, residuals, plan, at)

    def body(block: jax.Array, sums: dict[str, jax.Array], masked: bool) -> dict[str, jax.Array]:
        here = at._replace(first_key=block * keys)
        key = load_matrix(refs.key, batch, here.first_key, keys, key_head, masked)
        value = load_matrix(refs.value, batch, here.first_key, keys, key_head, masked)
        tile = _gradients(refs, plan, here, of_rows, key, value, masked)
        new = {"d_query": dot((tile.d_logits * tile.slope).astype(key.dtype), key)}
        if delta_ref is not None:
            new["keys"] = dot((tile.probabilities * tile.slope).astype(key.dtype), key)
            new["delta"] = (tile.probabilities * tile.d_probabilities).sum(axis=1)
        if d_bias_ref is not None:
            new["d_bias"], new["probability"] = tile.d_logits.sum(axis=1), tile.probabilities.sum(axis=1)
        return {name: sums[name] + term for name, term in new.items()}

    sums = {"d_query": jnp.zeros(of_rows.query.shape, jnp.float32)}
    if delta_ref is not None:
        sums |= {"keys": sums["d_query"], "delta": jnp.zeros((rows,), jnp.float32)}
    if d_bias_ref is not None:
        sums |= {"d_bias": jnp.zeros((rows,), jnp.float32), "probability": jnp.zeros((rows,), jnp.float32)}
    sums = over_key_blocks(body, key_block_range(refs, plan, at), sums)
    d_query, correction = sums["d_query"], None
    if delta_ref is not None:
        delta = sums["delta"] - load_vector(residuals.d_logsumexp, (batch, head), at.first_row, rows)
        correction = delta - of_rows.delta
        d_query -= correction[:, None] * sums["keys"]
        store_vector(delta_ref, (batch, head), at.first_row, delta)
    store_matrix(d_query_ref, (batch,), at.first_row, head, d_query)
    if d_bias_ref is not None:
        d_bias = sums["d_bias"] if correction is None else sums["d_bias"] - correction * sums["probability"]
        store_vector(d_bias_ref, (batch, head), at.first_row, d_bias)


def row_block_range(refs: Operands, plan: Plan, at: Tile) -> tuple[Index, Index]:
    """Row blocks [first, last) of which some row may see some key of the tile."""
    options, rows, keys = plan.options, plan.blocks.rows, plan.blocks.keys
    first: Index = 0
    last: Index = plan.rows
    if refs.query_positions is None and refs.key_positions is None:
        if options.causal:
            first = at.first_key
            if refs.prefix_lengths is not None:
                first = jnp.where(at.first_key < refs.prefix_lengths[at.batch], 0, first)
        left, right = options.window or (None, None)
        if left is not None:
            last = jnp.minimum(last, at.first_key + (keys + left))
        if right is not None:
            first = jnp.maximum(first, at.first_key - right)
    if refs.key_lengths is not None:
        last *= (at.first_key < refs.key_lengths[at.batch]).astype(jnp.int32)
    return jax.lax.div(first, rows), jax.lax.div(last + (rows - 1), rows)


def _d_key_value_kernel(
    refs: Operands, residuals: _Residuals, d_key_ref: Any, d_value_ref: Any, d_bias_ref: Any, *, plan: Plan
) -> None:
    rows, keys = plan.blocks.rows, plan.blocks.keys
    batch, key_head, key_block = program(plan.batch, plan.key_heads, plan.key_blocks)
    at = Tile(batch, key_head, 0, key_block * keys)
    key = load_matrix(refs.key, batch, at.first_key, keys, key_head)
    value = load_matrix(refs.value, batch, at.first_key, keys, key_head)
    first, last = row_block_range(refs, plan, at)

    def of_head(member: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        head = key_head * plan.group + member

        def body(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_key, d_value, d_bias = carry
            here = at._replace(head=head, first_row=block * rows)
            of_rows = _load_rows(refs, residuals, plan, here)
            tile = _gradients(refs, plan, here, of_rows, key, value)
            d_value += dot(tile.weights.astype(key.dtype), of_rows.d_out, (0, 0))
            d_key += dot((tile.d_logits * tile.slope).astype(key.dtype), of_rows.query, (0, 0))
            if d_bias_ref is not None:
                d_bias += tile.d_logits.sum(axis=0)
            return d_key, d_value, d_bias

        *sums, d_bias = jax.lax.fori_loop(first, last, body, (*carry, jnp.zeros((keys,), jnp.float32)))
        if d_bias_ref is not None:
            store_vector(d_bias_ref, (batch, head), at.first_key, d_bias)
        return tuple(sums)

    carry = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    d_key, d_value = jax.lax.fori_loop(0, plan.group, of_head, carry)
    store_matrix(d_key_ref, (batch,), at.first_key, key_head, d_key)
    d_value *= 1 / (1 - plan.options.dropout_rate)
    store_matrix(d_value_ref, (batch,), at.first_key, key_head, d_value)


def _d_bias_kernel(refs: Operands, residuals: _Residuals, d_bias_ref: Any, *, plan: Plan) -> None:
    """A tile of the gradient of a bias that has both rows and keys, summed over the batch and heads that share it."""
    rows, keys = plan.blocks.rows, plan.blocks.keys
    batches, heads = d_bias_ref.shape[:2]
    batch, head, row_block, key_block = program(batches, heads, plan.row_blocks, plan.key_blocks)
    first_row, first_key = row_block * rows, key_block * keys

    def body(index: jax.Array, total: jax.Array) -> jax.Array:
        at = Tile(
            batch if batches > 1 else jax.lax.div(index, 1 if heads > 1 else plan.heads),
            head if heads > 1 else jax.lax.rem(index, plan.heads),
            first_row, first_key,
        )  # fmt: skip
        key_head = jax.lax.div(at.head, plan.group)
        key = load_matrix(refs.key, at.batch, first_key, keys, key_head)
        value = load_matrix(refs.value, at.batch, first_key, keys, key_head)
        return total + _gradients(refs, plan, at, _load_rows(refs, residuals, plan, at), key, value).d_logits

    shared = (1 if batches > 1 else plan.batch) * (1 if heads > 1 else plan.heads)
    total = jax.lax.fori_loop(0, shared, body, jnp.zeros((rows, keys), jnp.float32))
    inside = (index_range(first_row, rows) < plan.rows)[:, None] & (index_range(first_key, keys) < plan.keys)[None]
    plgpu.store(d_bias_ref.at[batch, head, pl.ds(first_row, rows), pl.ds(first_key, keys)], total, mask=inside)

"""What the attention kernels for TPUs share: their call, and the logits, mask and dropout of a tile of them.

Arrays lie as (batch, heads, width, time): time fills the 128 lanes of a register, so that widths of 64, 80, 96 or 192
take no more memory than they have numbers, and XLA lets projections write and read this layout without a copy.
Logits are in units of log 2: the hardware has an exponential of base 2 only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.operands import Operands, Options, visible
from kernels.attention.tpu.plan import LANES, Plan
from kernels.common import NEGATIVE_INFINITY, hash_uniform

LOG2_E = math.log2(math.e)
Inputs = dict[str, tuple[jax.Array, pl.BlockSpec]]
Outputs = dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]
Refs = dict[str, Any]
_SQUEEZED = pl.Squeezed()
_UPRIGHT = ("query_positions", "query_segment_ids", "query_heads")  # inputs that are a number a query


def bytes_of(array: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Size of an array."""
    return array.size * array.dtype.itemsize


def _bounds(refs: Refs, plan: Plan, batch: Any, query_block: Any) -> tuple[Any, Any]:
    shared = refs["bounds"].shape[0] == 2 * plan.query_blocks
    at = 2 * ((0 if shared else batch * plan.query_blocks) + query_block)
    return refs["bounds"][at], refs["bounds"][at + 1]


def bounds_of(refs: Refs, plan: Plan, batch: Any, query_block: Any, chunk: Any) -> tuple[Any, Any]:
    """First and end of the key blocks of this chunk that this block of queries sees."""
    first, end = _bounds(refs, plan, batch, query_block)
    return jnp.maximum(first, chunk * plan.blocks_per_chunk), jnp.minimum(end, (chunk + 1) * plan.blocks_per_chunk)


def sees_one_block(refs: Refs, plan: Plan, batch: Any, query_block: Any) -> Any:
    """Whether this block of queries sees a single block of keys."""
    first, end = _bounds(refs, plan, batch, query_block)
    return end - first == 1


def spec(block: tuple[int | None, ...], index: Callable[..., tuple[Any, ...]], **kwargs: Any) -> pl.BlockSpec:
    """A block specification; None squeezes an axis."""
    return pl.BlockSpec(tuple(_SQUEEZED if size is None else size for size in block), index, **kwargs)


def call(
    name: str,
    kernel: Callable[[Refs], None],
    plan: Plan,
    grid: tuple[int, ...],
    parallel: int,
    prefetched: dict[str, Any],
    inputs: Inputs,
    outputs: Outputs,
    scratch: dict[str, Any],
    cost: pl.CostEstimate,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, ...]:
    """`pl.pallas_call` of a kernel that gets its references by name; the first `parallel` grid axes are independent."""
    names = [*prefetched, *inputs, *outputs, *scratch]
    return pl.pallas_call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True))),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=grid,
            in_specs=[block for _, block in inputs.values()],
            out_specs=[block for _, block in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=["parallel" if axis < parallel else "arbitrary" for axis in range(len(grid))],
            vmem_limit_bytes=plan.vmem_bytes,
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*prefetched.values(), *(array for array, _ in inputs.values()))


def prefetched_scalars(operands: Operands, plan: Plan, bounds: Any) -> dict[str, Any]:
    """int32 vectors (flat: SMEM pads whatever has two axes) of block bounds; of prefix, length, seed, head a batch."""
    scalars = jnp.zeros((plan.batch, 4), jnp.int32)
    if operands.prefix_lengths is not None:
        scalars = scalars.at[:, 0].set(operands.prefix_lengths)
    if operands.key_lengths is not None:
        scalars = scalars.at[:, 1].set(operands.key_lengths)
    if operands.dropout_seed is not None and operands.dropout_heads is not None:
        scalars = scalars.at[:, 2].set(jax.lax.bitcast_convert_type(operands.dropout_seed, jnp.int32))
        scalars = scalars.at[:, 3].set(operands.dropout_heads[:, 0])
    return {"bounds": jnp.asarray(bounds).reshape(-1), "scalars": scalars.reshape(-1)}


def mask_inputs(operands: Operands, plan: Plan, states: Any, index: Callable[..., tuple[Any, Any, Any, Any]]) -> Inputs:
    """Inputs that say which keys a query sees, and the bias; `index` maps grid indices to (batch, head, query block,
    chunk)."""
    inputs: Inputs = {}
    batches = states.shape[0]
    inputs["states"] = (
        jnp.asarray(states),
        spec((None, None, 1, plan.key_blocks), lambda *g: (index(*g)[0] if batches > 1 else 0, index(*g)[2], 0, 0),
             memory_space=pltpu.SMEM),
    )  # fmt: skip
    for name, block, axis in (
        ("query_positions", plan.block_q, 2),
        ("query_segment_ids", plan.block_q, 2),
        ("key_positions", plan.chunk, 3),
        ("key_segment_ids", plan.chunk, 3),
    ):
        array = getattr(operands, name)
        if array is not None:

            def at(*grid: Any, shared: bool = array.shape[0] == 1, axis: int = axis) -> tuple[Any, ...]:
                return 0 if shared else index(*grid)[0], 0, index(*grid)[axis]

            inputs[name] = (array[:, None], spec((None, 1, block), at))
    if operands.bias is not None:
        shape = operands.bias.shape

        def bias_at(*grid: Any) -> tuple[Any, ...]:
            return tuple(at if size > 1 else 0 for at, size in zip(index(*grid), shape, strict=True))

        tile = (None, None, plan.block_q if shape[2] > 1 else 1, plan.chunk if shape[3] > 1 else 1)
        inputs["bias"] = (operands.bias, spec(tile, bias_at))
    return inputs


def column(row: jax.Array) -> jax.Array:
    """(1, n), to (n, 128): the row upright, the same in all lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def row(column: jax.Array) -> jax.Array:
    """(n, 128) with n <= 128, the same in all lanes, to (1, n)."""
    on_diagonal = jax.lax.broadcasted_iota(jnp.int32, column.shape, 0) == jax.lax.broadcasted_iota(
        jnp.int32, column.shape, 1
    )
    return jnp.sum(jnp.where(on_diagonal, column, 0.0), axis=0, keepdims=True)[:, : column.shape[0]]


def lanes(x: jax.Array, width: int) -> jax.Array:
    """(n, 128), the same in all lanes, to (n, width)."""
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


def product(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """a b, or a b^T, summed in float32; exact to float32 for float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


class Tiles:
    """Logits, mask and dropout of the block of queries at hand, (rows, 128) at a time.

    Coordinates are tile-local Python integers plus the traced place of the block.
    """

    def __init__(self, refs: Refs, plan: Plan, options: Options, batch: Any, head: Any, query_block: Any):
        self.refs, self.plan, self.options = refs, plan, options
        self.batch, self.head, self.first_query = batch, head, query_block * plan.block_q

    def prepare(self, rows: Any) -> None:
        """Turns positions and segments of these queries upright."""
        for name in _UPRIGHT:
            if name in self.refs:
                self.refs[f"{name}_column"][rows] = column(self.refs[name][:, rows])

    def logits(self, scores: jax.Array, rows: slice, key_block: Any, lane: int, masked: bool) -> tuple[Any, Any]:
        """Of products query . key (rows, 128): logits in units of log 2, and the soft cap's derivative (or None)."""
        slope = None
        if self.options.logit_softcap is None:
            logits = scores * (self.options.scale * LOG2_E)
        else:
            capped = jnp.tanh(scores * (self.options.scale / self.options.logit_softcap))
            logits, slope = capped * (self.options.logit_softcap * LOG2_E), 1 - capped * capped
        if "bias" in self.refs:
            bias = self.refs["bias"]
            which = slice(0, 1) if bias.shape[0] == 1 else rows
            columns = slice(0, 1) if bias.shape[1] == 1 else self._columns(key_block, lane)
            logits += bias[which, columns].astype(jnp.float32) * LOG2_E
        mask = self._mask(rows, key_block, lane) if masked else None
        return (logits if mask is None else jnp.where(mask, logits, NEGATIVE_INFINITY)), slope

    def keep(self, rows: slice, key_block: Any, lane: int) -> jax.Array:
        """Which weights dropout leaves, (rows, 128)."""
        row, column_ = self._indices(rows, key_block, lane)
        seed = self.refs["scalars"][4 * self.batch + 2].astype(jnp.uint32)
        head = self.refs["scalars"][4 * self.batch + 3] + self.head
        return hash_uniform(seed, head, row, column_) >= self.options.dropout_rate

    def existing_keys(self, keys: jax.Array, key_block: Any, axis: int) -> jax.Array:
        """Keys or values with zeros for those that do not exist, whose memory may hold anything, NaN too."""
        limit = self._key_limit()
        if limit is None:
            return keys
        index = key_block * self.plan.block_k + jax.lax.broadcasted_iota(jnp.int32, keys.shape, axis)
        return jnp.where(index < limit, keys.astype(jnp.float32), 0).astype(keys.dtype)

    def existing_queries(self, columns: jax.Array, rows: Any) -> jax.Array:
        """(n, these queries of the block) with zeros for those beyond the array."""
        if not self.plan.ragged_queries:
            return columns
        index = self.first_query + rows.start + jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1)
        return jnp.where(index < self.plan.queries, columns.astype(jnp.float32), 0).astype(columns.dtype)

    def _columns(self, key_block: Any, lane: int) -> Any:
        start = jax.lax.rem(key_block, self.plan.blocks_per_chunk) * self.plan.block_k
        return pl.ds(pl.multiple_of(start, self.plan.block_k) + lane, LANES)

    def _indices(self, rows: slice, key_block: Any, lane: int) -> tuple[jax.Array, jax.Array]:
        shape = (rows.stop - rows.start, LANES)
        row = self.first_query + rows.start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return row, key_block * self.plan.block_k + lane + jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    def _key_limit(self) -> Any:
        """Keys at indices from it on do not exist; None if all of the block do."""
        if "key_lengths" in self.plan.scalars:
            return jnp.minimum(self.refs["scalars"][4 * self.batch + 1], self.plan.keys)
        return self.plan.keys if self.plan.ragged_keys else None

    def _mask(self, rows: slice, key_block: Any, lane: int) -> jax.Array | None:
        row, key_index = self._indices(rows, key_block, lane)
        plan = self.plan

        def of_queries(name: str) -> Any:
            return self.refs[f"{name}_column"][rows] if name in self.refs else None

        def of_keys(name: str) -> Any:
            if name not in self.refs:
                return None
            return jnp.broadcast_to(self.refs[name][:, self._columns(key_block, lane)], row.shape)

        query_position, key_position = of_queries("query_positions"), of_keys("key_positions")
        token = key_index
        if plan.interleaved > 1:
            token = _divide(key_index, plan.interleaved)
        mask = visible(
            self.options,
            row if query_position is None else query_position,
            token if key_position is None else key_position,
            of_queries("query_segment_ids"),
            of_keys("key_segment_ids"),
            self.refs["scalars"][4 * self.batch] if "prefix_lengths" in plan.scalars else None,
            key_index,
            self._key_limit(),
        )
        if plan.interleaved > 1:
            own_head = of_queries("query_heads") == key_index - token * plan.interleaved
            mask = own_head if mask is None else mask & own_head
        if plan.ragged_queries:
            exists = row < plan.queries
            mask = exists if mask is None else mask & exists
        return mask


def _divide(numbers: jax.Array, divisor: int) -> jax.Array:
    # Vector units shift but do not divide.
    if divisor & (divisor - 1) == 0:
        return jax.lax.shift_right_logical(numbers, jnp.int32(divisor.bit_length() - 1))
    return jax.lax.div(numbers, jnp.int32(divisor))


def column_scratch(inputs: Inputs, plan: Plan) -> dict[str, Any]:
    """Scratch for `Tiles.prepare`."""
    return {f"{name}_column": pltpu.VMEM((plan.block_q, LANES), jnp.int32) for name in _UPRIGHT if name in inputs}


def concatenate(tiles: list[jax.Array], dtype: Any) -> jax.Array:
    """(rows, 128) tiles side by side, in the dtype of the matrix products."""
    return jnp.concatenate([tile.astype(dtype) for tile in tiles], axis=1)


def maximum(tiles: list[jax.Array]) -> jax.Array:
    """Of the tiles, (rows, 128)."""
    return functools.reduce(jnp.maximum, tiles)


def total(tiles: list[jax.Array]) -> jax.Array:
    """Of the tiles, (rows, 128)."""
    return functools.reduce(jnp.add, tiles)

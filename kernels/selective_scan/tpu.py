"""The selective scan as Pallas kernels for TPUs: channels on the lanes, a state's numbers on the sublanes.

The grid runs over (batch, group, tile of channels, chunk), the last in the order of the scan with the state in VMEM.
The backward pass computes the states within a chunk again, into VMEM, from the state before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.common import round_up
from kernels.recurrent.layout import chunk_length, pad_time
from kernels.selective_scan.operands import Operands, Options, finish, finish_backward, steps

_LANES = 128
_CHUNK_SIZE = 128
_LEAST_TOKENS = 16  # rows of a bfloat16 register
_ROWS = 8  # of a float32 register: tokens that one pass of the loop computes
_TILES = (512, 384, 256, 128)  # channels of a step of the grid
_STATE_SIZE = 8192  # numbers of a tile's state: 8 registers
_SAVED_SIZE = 1 << 20  # numbers of the states of a chunk: 4 MiB of VMEM


class _Plan(NamedTuple):
    """What a kernel knows when it is traced."""

    batch: int
    time: int
    groups: int
    channels: int  # a group's, padded
    size: int  # N
    tile: int
    length: int
    options: Options

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.time, self.length)

    @property
    def tiles(self) -> int:
        return self.channels // self.tile


def _plan(operands: Operands, options: Options) -> _Plan:
    batch, time, groups, channels = operands.x.shape
    size, channels = operands.b.shape[3], round_up(channels, _LANES)
    fitting = [tile for tile in _TILES if channels % tile == 0 and tile * size <= _STATE_SIZE]
    tile = fitting[0] if fitting else _LANES
    length = chunk_length(time, options.chunk_size or _CHUNK_SIZE, _LEAST_TOKENS)
    while length > _LEAST_TOKENS and length * tile * size > _SAVED_SIZE:
        length //= 2
    return _Plan(batch, time, groups, channels, size, tile, length, options)


class _Laid(NamedTuple):
    """Operands as their blocks are cut."""

    x: Any
    delta: Any
    b: Any
    c: Any
    gate: Any
    a: Any
    skip: Any
    delta_bias: Any
    state: Any


def _pad_channels(array: jax.Array, plan: _Plan) -> jax.Array:
    missing = plan.channels - array.shape[-1]
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array


def _lay_rows(array: jax.Array, plan: _Plan) -> jax.Array:
    """(B, T, G, E) -> (B, time, G E), padded."""
    array = pad_time(_pad_channels(array, plan), plan.length)
    return array.reshape(*array.shape[:2], -1)


def _lay_columns(array: jax.Array, plan: _Plan) -> jax.Array:
    """(B, T, G, N) -> (B, G, chunks, N, length), padded."""
    array = pad_time(array, plan.length).reshape(plan.batch, plan.chunks, plan.length, plan.groups, plan.size)
    return array.transpose(0, 3, 1, 4, 2)


def _unlay_rows(array: jax.Array, like: jax.Array, plan: _Plan) -> jax.Array:
    array = array.reshape(*array.shape[:2], plan.groups, plan.channels)
    return array[:, : plan.time, :, : like.shape[3]]


def _unlay_columns(array: jax.Array, like: jax.Array, plan: _Plan) -> jax.Array:
    """(B, G, tiles, chunks, N, length), parts of sums over channels -> (B, T, G, N)."""
    array = array.sum(2).transpose(0, 2, 4, 1, 3)
    return array.reshape(plan.batch, -1, plan.groups, plan.size)[:, : plan.time].astype(like.dtype)


def _lay(operands: Operands, plan: _Plan) -> _Laid:
    return _Laid(
        _lay_rows(operands.x, plan),
        _lay_rows(operands.delta, plan),
        _lay_columns(operands.b.astype(jnp.float32), plan),
        _lay_columns(operands.c.astype(jnp.float32), plan),
        None if operands.gate is None else _lay_rows(operands.gate, plan),
        _pad_channels(operands.a, plan),
        _pad_channels(operands.skip, plan)[:, None],
        _pad_channels(operands.delta_bias, plan)[:, None],
        _pad_channels(operands.state, plan),
    )


class _Blocks(NamedTuple):
    """Block specifications by kind of array."""

    rows: pl.BlockSpec  # (B, time, G E)
    columns: pl.BlockSpec  # (B, G, chunks, N, length)
    column_parts: pl.BlockSpec  # (B, G, tiles, chunks, N, length)
    matrix: pl.BlockSpec  # (G, N, E)
    vector: pl.BlockSpec  # (G, 1, E)
    state: pl.BlockSpec  # (B, G, N, E)
    vectors: pl.BlockSpec  # (B, G, 1, E)
    states: pl.BlockSpec  # (B, G, chunks, N, E)


def _blocks(plan: _Plan, chunk: Callable[[jax.Array], jax.Array]) -> _Blocks:
    """`chunk` says which chunk a step of the grid takes."""
    size, tile, length, tiles = plan.size, plan.tile, plan.length, plan.tiles
    return _Blocks(
        pl.BlockSpec((None, length, tile), lambda b, g, e, n: (b, chunk(n), g * tiles + e)),
        pl.BlockSpec((None, None, None, size, length), lambda b, g, e, n: (b, g, chunk(n), 0, 0)),
        pl.BlockSpec((None, None, None, None, size, length), lambda b, g, e, n: (b, g, e, chunk(n), 0, 0)),
        pl.BlockSpec((None, size, tile), lambda b, g, e, n: (g, 0, e)),
        pl.BlockSpec((None, 1, tile), lambda b, g, e, n: (g, 0, e)),
        pl.BlockSpec((None, None, size, tile), lambda b, g, e, n: (b, g, 0, e)),
        pl.BlockSpec((None, None, 1, tile), lambda b, g, e, n: (b, g, 0, e)),
        pl.BlockSpec((None, None, None, size, tile), lambda b, g, e, n: (b, g, chunk(n), 0, e)),
    )


def _operand_blocks(laid: _Laid, blocks: _Blocks) -> _Laid:
    gate = None if laid.gate is None else blocks.rows
    return _Laid(
        blocks.rows, blocks.rows, blocks.columns, blocks.columns, gate, blocks.matrix, blocks.vector, blocks.vector,
        blocks.state,
    )  # fmt: skip


def _call(kernel: Callable[..., None], arguments: Any, plan: _Plan, work: int, **options: Any) -> Any:
    steps_of_states = plan.batch * plan.groups * plan.chunks * plan.length * plan.channels * plan.size
    arrays = jax.tree.leaves((arguments, options["out_shape"]))
    return pl.pallas_call(
        kernel,
        grid=(plan.batch, plan.groups, plan.tiles, plan.chunks),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=64 << 20
        ),
        cost_estimate=pl.CostEstimate(
            flops=work * steps_of_states,
            transcendentals=steps_of_states,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        ),
        **options,
    )(*arguments)


def _column(columns: jax.Array, token: jax.Array) -> jax.Array:
    """(N, 1) of (N, length): a mask and a sum, for lanes have no index that is not known."""
    lane = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1)
    return jnp.sum(jnp.where(lane == token, columns, 0.0), axis=1, keepdims=True)


def _with_column(columns: jax.Array, token: jax.Array, column: jax.Array) -> jax.Array:
    lane = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1)
    return jnp.where(lane == token, column, columns)


def _over_tokens(length: int, reverse: bool, body: Callable[[Any, Any, int, Any], Any], carry: Any) -> Any:
    """Calls `body(rows, first, row, carry)` for every token in order: token first + row, one of `rows` at once read."""

    def some(i: jax.Array, carry: Any) -> Any:
        first = pl.multiple_of((length // _ROWS - 1 - i if reverse else i) * _ROWS, _ROWS)
        for row in reversed(range(_ROWS)) if reverse else range(_ROWS):
            carry = body(pl.ds(first, _ROWS), first, row, carry)
        return carry

    return jax.lax.fori_loop(0, length // _ROWS, some, carry)


def _exists(plan: _Plan, chunk: jax.Array) -> jax.Array | bool:
    if plan.time % plan.length == 0:
        return True
    token = jax.lax.broadcasted_iota(jnp.int32, (plan.length, plan.tile), 0)
    return token + chunk * plan.length < plan.time


def _onwards(plan: _Plan) -> Callable[[jax.Array], jax.Array]:
    return lambda n: plan.chunks - 1 - n if plan.options.reverse else n


def _backwards(plan: _Plan) -> Callable[[jax.Array], jax.Array]:
    return lambda n: n if plan.options.reverse else plan.chunks - 1 - n


def _advance(refs: _Laid, plan: _Plan, chunk: jax.Array, state: jax.Array, scratch: Any, visit: Any) -> jax.Array:
    """The state after a chunk; `visit(token, before, after, c)` sees every token. Fills the scratch."""
    step_ref, driven_ref = scratch
    rows = steps(refs.delta[...], refs.delta_bias[...], _exists(plan, chunk), plan.options.softplus)
    step_ref[...] = rows.step
    driven_ref[...] = rows.step * refs.x[...].astype(jnp.float32)
    a, b, c = refs.a[...], refs.b[...], refs.c[...]

    def body(rows: Any, first: Any, row: int, state: jax.Array) -> jax.Array:
        step, driven = (ref[rows, :][row : row + 1] for ref in (step_ref, driven_ref))
        after = jnp.exp(step * a) * state + _column(b, first + row) * driven
        visit(first + row, state, after, c)
        return after

    return _over_tokens(plan.length, plan.options.reverse, body, state)


def forward(operands: Operands, options: Options, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """As `reference.forward`."""
    plan = _plan(operands, options)
    laid, order = _lay(operands, plan), _onwards(plan)
    blocks = _blocks(plan, order)

    def kernel(refs: _Laid, out: Any, final: Any, step: Any, driven: Any, y: Any) -> None:
        n = pl.program_id(3)

        @pl.when(n == 0)
        def _() -> None:
            final[...] = refs.state[...]

        def visit(token: Any, before: jax.Array, after: jax.Array, c: jax.Array) -> None:
            y[pl.ds(token, 1), :] = jnp.sum(_column(c, token) * after, axis=0, keepdims=True)

        final[...] = _advance(refs, plan, order(n), final[...], (step, driven), visit)
        gate = None if refs.gate is None else refs.gate[...].astype(jnp.float32)
        out[...] = finish(y[...], refs.x[...].astype(jnp.float32), refs.skip[...], gate).astype(out.dtype)

    rows = pltpu.VMEM((plan.length, plan.tile), jnp.float32)
    out, final = _call(
        kernel, (laid,), plan, 6,
        in_specs=(_operand_blocks(laid, blocks),),
        out_shape=tuple(jax.ShapeDtypeStruct(like.shape, like.dtype) for like in (laid.x, laid.state)),
        out_specs=(blocks.rows, blocks.state),
        scratch_shapes=[rows, rows, rows],
        interpret=interpret,
        name="selective_scan_tpu_forward",
    )  # fmt: skip
    return _unlay_rows(out, operands.x, plan), final[..., : operands.x.shape[3]]


def _states(laid: _Laid, plan: _Plan, interpret: bool) -> jax.Array:
    """The states before each chunk, (B, G, chunks, N, E)."""
    order = _onwards(plan)
    blocks = _blocks(plan, order)

    def kernel(refs: _Laid, states: Any, carry: Any, step: Any, driven: Any) -> None:
        n = pl.program_id(3)

        @pl.when(n == 0)
        def _() -> None:
            carry[...] = refs.state[...]

        states[...] = carry[...]
        carry[...] = _advance(refs, plan, order(n), carry[...], (step, driven), lambda *token: None)

    rows = pltpu.VMEM((plan.length, plan.tile), jnp.float32)
    shape = (plan.batch, plan.groups, plan.chunks, plan.size, plan.channels)
    laid = laid._replace(gate=None)
    return _call(
        kernel, (laid,), plan, 4,
        in_specs=(_operand_blocks(laid, blocks),),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        out_specs=blocks.states,
        scratch_shapes=[pltpu.VMEM((plan.size, plan.tile), jnp.float32), rows, rows],
        interpret=interpret,
        name="selective_scan_tpu_states",
    )  # fmt: skip


def backward(
    operands: Operands, d_out: jax.Array, d_final: jax.Array, options: Options, *, interpret: bool
) -> Operands:  # fmt: skip
    """As `chunked.backward`."""
    plan = _plan(operands, options)
    laid, order = _lay(operands, plan), _backwards(plan)
    states = _states(laid, plan, interpret)
    blocks = _blocks(plan, order)

    def kernel(
        refs: _Laid, states: Any, d_out: Any, d_final: Any, d: _Laid, step: Any, driven: Any, y: Any, d_y: Any,
        d_step: Any, d_driven: Any, saved: Any,
    ) -> None:  # fmt: skip
        n = pl.program_id(3)

        @pl.when(n == 0)
        def _() -> None:
            d.state[...] = d_final[...]
            for ref in (d.a, d.skip, d.delta_bias):
                ref[...] = jnp.zeros_like(ref)

        def visit(token: Any, before: jax.Array, after: jax.Array, c: jax.Array) -> None:
            saved[token] = before
            if refs.gate is not None:
                y[pl.ds(token, 1), :] = jnp.sum(_column(c, token) * after, axis=0, keepdims=True)

        _advance(refs, plan, order(n), states[...], (step, driven), visit)
        x, skip = refs.x[...].astype(jnp.float32), refs.skip[...]
        gate = None if refs.gate is None else refs.gate[...].astype(jnp.float32)
        d_y[...], d_gate = finish_backward(d_out[...].astype(jnp.float32), y[...], x, skip, gate)
        a, b, c = refs.a[...], refs.b[...], refs.c[...]

        def body(rows: Any, first: Any, row: int, carry: Any) -> Any:
            d_state, d_a, d_b, d_c = carry
            token = first + row
            step_t, driven_t, d_y_t = (ref[rows, :][row : row + 1] for ref in (step, driven, d_y))
            b_t, before = _column(b, token), saved[token]
            decay = jnp.exp(step_t * a)
            d_state += _column(c, token) * d_y_t
            after = decay * before + b_t * driven_t
            d_c = _with_column(d_c, token, jnp.sum(after * d_y_t, axis=1, keepdims=True))
            d_b = _with_column(d_b, token, jnp.sum(d_state * driven_t, axis=1, keepdims=True))
            d_driven[pl.ds(token, 1), :] = jnp.sum(d_state * b_t, axis=0, keepdims=True)
            d_before = decay * d_state
            d_exponent = d_before * before
            d_step[pl.ds(token, 1), :] = jnp.sum(d_exponent * a, axis=0, keepdims=True)
            return d_before, d_a + d_exponent * step_t, d_b, d_c

        zeros = jnp.zeros_like(b)
        d.state[...], d.a[...], d.b[...], d.c[...] = _over_tokens(
            plan.length, not plan.options.reverse, body, (d.state[...], d.a[...], zeros, zeros)
        )
        slope = steps(refs.delta[...], refs.delta_bias[...], _exists(plan, order(n)), plan.options.softplus).slope
        d_delta = (d_step[...] + d_driven[...] * x) * slope
        d.x[...] = (d_driven[...] * step[...] + skip * d_y[...]).astype(d.x.dtype)
        d.delta[...] = d_delta.astype(d.delta.dtype)
        if d_gate is not None:
            d.gate[...] = d_gate.astype(d.gate.dtype)
        d.skip[...] += jnp.sum(d_y[...] * x, axis=0, keepdims=True)
        d.delta_bias[...] += jnp.sum(d_delta, axis=0, keepdims=True)

    def like(array: jax.Array | None, shape: tuple[int, ...] | None = None) -> Any:
        return None if array is None else jax.ShapeDtypeStruct(shape or array.shape, array.dtype)

    parts = (plan.batch, plan.groups, plan.tiles, plan.chunks, plan.size, plan.length)
    vectors = (plan.batch, plan.groups, 1, plan.channels)
    rows = pltpu.VMEM((plan.length, plan.tile), jnp.float32)
    (d,) = _call(
        kernel,
        (laid, states, _lay_rows(d_out, plan), _pad_channels(d_final, plan)),
        plan, 16,
        in_specs=(_operand_blocks(laid, blocks), blocks.states, blocks.rows, blocks.state),
        out_shape=(_Laid(
            like(laid.x), like(laid.delta), like(laid.b, parts), like(laid.c, parts), like(laid.gate),
            like(laid.state), like(laid.skip, vectors), like(laid.delta_bias, vectors), like(laid.state),
        ),),
        out_specs=(_Laid(
            blocks.rows, blocks.rows, blocks.column_parts, blocks.column_parts,
            None if laid.gate is None else blocks.rows, blocks.state, blocks.vectors, blocks.vectors, blocks.state,
        ),),
        scratch_shapes=[rows] * 6 + [pltpu.VMEM((plan.length, plan.size, plan.tile), jnp.float32)],
        interpret=interpret,
        name="selective_scan_tpu_backward",
    )  # fmt: skip
    width = operands.x.shape[3]
    return Operands(
        _unlay_rows(d.x, operands.x, plan),
        _unlay_rows(d.delta, operands.delta, plan),
        _unlay_columns(d.b, operands.b, plan),
        _unlay_columns(d.c, operands.c, plan),
        None if operands.gate is None else _unlay_rows(d.gate, operands.gate, plan),
        d.a.sum(0)[..., :width],
        d.skip.sum((0, 2))[:, :width],
        d.delta_bias.sum((0, 2))[:, :width],
        d.state[..., :width],
    )

"""The selective scan as Pallas-Triton kernels for NVIDIA GPUs: a program a group and block of channels.

The state stays in registers while the program goes through time. The backward pass computes the states of a chunk of
tokens again and keeps them in registers too, so that a chunk is short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.recurrent.layout import pad_time
from kernels.selective_scan.operands import Operands, Options, finish, finish_backward, steps

_CHUNK_SIZE = 16
_STATE_SIZE = 512  # numbers of a program's state
_LEAST_CHANNELS = 4
_WARPS = 4


class _Plan(NamedTuple):
    """What a kernel knows when it is traced."""

    batch: int
    time: int
    groups: int
    channels: int  # a group's, padded
    block: int  # of a program
    size: int  # N, padded
    options: Options

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.time, _CHUNK_SIZE)

    @property
    def blocks(self) -> int:
        return self.channels // self.block


def _plan(operands: Operands, options: Options) -> _Plan:
    batch, time, groups, channels = operands.x.shape
    size = pl.next_power_of_2(operands.b.shape[3])
    block = min(max(_STATE_SIZE // size, _LEAST_CHANNELS), max(pl.next_power_of_2(channels), _LEAST_CHANNELS))
    return _Plan(batch, time, groups, pl.cdiv(channels, block) * block, block, size, options)


def _pad(array: jax.Array, *sizes: int) -> jax.Array:
    """With zeros up to `sizes` along the last axes."""
    pads = [(0, 0)] * (array.ndim - len(sizes))
    pads += [(0, size - have) for size, have in zip(sizes, array.shape[-len(sizes) :], strict=True)]
    return jnp.pad(array, pads) if any(high for _, high in pads) else array


def _prepare(operands: Operands, plan: _Plan) -> Operands:
    def rows(array: jax.Array, size: int) -> jax.Array:
        return pad_time(_pad(array, size), _CHUNK_SIZE)

    return Operands(
        rows(operands.x, plan.channels),
        rows(operands.delta, plan.channels),
        rows(operands.b, plan.size),
        rows(operands.c, plan.size),
        None if operands.gate is None else rows(operands.gate, plan.channels),
        _pad(operands.a, plan.size, plan.channels),
        _pad(operands.skip, plan.channels),
        _pad(operands.delta_bias, plan.channels),
        _pad(operands.state, plan.size, plan.channels),
    )


class _Place(NamedTuple):
    """What a program computes."""

    batch: jax.Array
    group: jax.Array
    split: jax.Array  # which block of channels
    channels: Any


def _place(plan: _Plan) -> _Place:
    index = pl.program_id(0)
    group, split = jax.lax.div(index, plan.blocks), jax.lax.rem(index, plan.blocks)
    return _Place(
        jax.lax.div(group, plan.groups), jax.lax.rem(group, plan.groups), split,
        pl.ds(split * plan.block, plan.block),
    )  # fmt: skip


def _read(ref: Any, *index: Any) -> jax.Array:
    return plgpu.load(ref.at[index]).astype(jnp.float32)


def _write(ref: Any, value: jax.Array, *index: Any) -> None:
    plgpu.store(ref.at[index], value.astype(ref.dtype))


class _Token(NamedTuple):
    """Vectors of one token."""

    x: jax.Array
    step: jax.Array
    slope: jax.Array
    driven: jax.Array
    b: jax.Array


def _token(refs: Operands, bias: jax.Array, plan: _Plan, at: _Place, token: Any) -> _Token:
    where = (at.batch, token, at.group)
    x = _read(refs.x, *where, at.channels)
    exists = True if plan.time % _CHUNK_SIZE == 0 else token < plan.time
    rows = steps(_read(refs.delta, *where, at.channels), bias, exists, plan.options.softplus)
    return _Token(x, rows.step, rows.slope, rows.step * x, _read(refs.b, *where, slice(None)))


def _next(state: jax.Array, token: _Token, a: jax.Array) -> jax.Array:
    """State and a are (N, block)."""
    return jnp.exp(token.step[None] * a) * state + token.b[:, None] * token.driven[None]


def _call(kernel: Callable[..., None], arguments: Any, out_shape: Any, plan: _Plan, name: str, interpret: bool) -> Any:
    return pl.pallas_call(
        kernel,
        grid=(plan.batch * plan.groups * plan.blocks,),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name=name,
    )(*arguments)


def forward(operands: Operands, options: Options, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """As `reference.forward`."""
    plan = _plan(operands, options)
    prepared = _prepare(operands, plan)

    def kernel(refs: Operands, out: Any, final: Any) -> None:
        at = _place(plan)
        everything = (at.group, slice(None), at.channels)
        a = _read(refs.a, *everything)
        bias, skip = _read(refs.delta_bias, at.group, at.channels), _read(refs.skip, at.group, at.channels)

        def body(i: jax.Array, state: jax.Array) -> jax.Array:
            t = plan.time - 1 - i if plan.options.reverse else i
            token = _token(refs, bias, plan, at, t)
            where = (at.batch, t, at.group)
            state = _next(state, token, a)
            y = jnp.sum(_read(refs.c, *where, slice(None))[:, None] * state, axis=0)
            gate = None if refs.gate is None else _read(refs.gate, *where, at.channels)
            _write(out, finish(y, token.x, skip, gate), *where, at.channels)
            return state

        state = jax.lax.fori_loop(0, plan.time, body, _read(refs.state, at.batch, *everything))
        _write(final, state, at.batch, *everything)

    out, final = _call(
        kernel, (prepared,), (_like(prepared.x), _like(prepared.state)), plan, "selective_scan_gpu_forward", interpret
    )
    width, size = operands.x.shape[3], operands.b.shape[3]
    return out[:, : plan.time, :, :width], final[:, :, :size, :width]


def _like(array: jax.Array | None, *leading: int) -> Any:
    return None if array is None else jax.ShapeDtypeStruct((*leading, *array.shape), array.dtype)


def _states(prepared: Operands, plan: _Plan, interpret: bool) -> jax.Array:
    """The states before each chunk, (chunks, B, G, N, E)."""

    def kernel(refs: Operands, states: Any) -> None:
        at = _place(plan)
        everything = (at.group, slice(None), at.channels)
        a, bias = _read(refs.a, *everything), _read(refs.delta_bias, at.group, at.channels)

        def chunk(n: jax.Array, state: jax.Array) -> jax.Array:
            number = plan.chunks - 1 - n if plan.options.reverse else n
            _write(states, state, number, at.batch, *everything)

            def body(i: jax.Array, state: jax.Array) -> jax.Array:
                row = _CHUNK_SIZE - 1 - i if plan.options.reverse else i
                return _next(state, _token(refs, bias, plan, at, number * _CHUNK_SIZE + row), a)

            return jax.lax.fori_loop(0, _CHUNK_SIZE, body, state)

        jax.lax.fori_loop(0, plan.chunks, chunk, _read(refs.state, at.batch, *everything))

    shape = _like(prepared.state, plan.chunks)
    return _call(kernel, (prepared._replace(gate=None),), shape, plan, "selective_scan_gpu_states", interpret)


def backward(
    operands: Operands, d_out: jax.Array, d_final: jax.Array, options: Options, *, interpret: bool
) -> Operands:  # fmt: skip
    """As `chunked.backward`. Blocks of channels give b and c a part of the gradient each: their sum is XLA's."""
    plan = _plan(operands, options)
    prepared = _prepare(operands, plan)
    states = _states(prepared, plan, interpret)
    forwards = tuple(reversed(range(_CHUNK_SIZE))) if options.reverse else tuple(range(_CHUNK_SIZE))

    def kernel(refs: Operands, states: Any, d_out: Any, d_final: Any, d: Operands) -> None:
        at = _place(plan)
        everything = (at.group, slice(None), at.channels)
        a = _read(refs.a, *everything)
        bias, skip = _read(refs.delta_bias, at.group, at.channels), _read(refs.skip, at.group, at.channels)

        def chunk(n: jax.Array, carry: Any) -> Any:
            d_state, d_a, d_skip, d_bias = carry
            number = n if plan.options.reverse else plan.chunks - 1 - n
            state, before = _read(states, number, at.batch, *everything), {}
            for row in forwards:
                before[row] = state
                state = _next(state, _token(refs, bias, plan, at, number * _CHUNK_SIZE + row), a)
            for row in reversed(forwards):
                where = (at.batch, number * _CHUNK_SIZE + row, at.group)
                token = _token(refs, bias, plan, at, where[1])
                c = _read(refs.c, *where, slice(None))
                gate = None if refs.gate is None else _read(refs.gate, *where, at.channels)
                decay = jnp.exp(token.step[None] * a)
                after = decay * before[row] + token.b[:, None] * token.driven[None]
                y = jnp.sum(c[:, None] * after, axis=0)
                d_y, d_gate = finish_backward(_read(d_out, *where, at.channels), y, token.x, skip, gate)
                d_state += c[:, None] * d_y[None]
                _write(d.c, jnp.sum(after * d_y[None], axis=1), at.split, *where, slice(None))
                _write(d.b, jnp.sum(d_state * token.driven[None], axis=1), at.split, *where, slice(None))
                d_driven = jnp.sum(d_state * token.b[:, None], axis=0)
                d_state = decay * d_state
                d_exponent = d_state * before[row]
                d_a += d_exponent * token.step[None]
                d_delta = (jnp.sum(d_exponent * a, axis=0) + d_driven * token.x) * token.slope
                _write(d.x, d_driven * token.step + skip * d_y, *where, at.channels)
                _write(d.delta, d_delta, *where, at.channels)
                if d_gate is not None:
                    _write(d.gate, d_gate, *where, at.channels)
                d_skip, d_bias = d_skip + d_y * token.x, d_bias + d_delta
            return d_state, d_a, d_skip, d_bias

        zeros = jnp.zeros_like(skip)
        first = (_read(d_final, at.batch, *everything), jnp.zeros_like(a), zeros, zeros)
        d_state, d_a, d_skip, d_bias = jax.lax.fori_loop(0, plan.chunks, chunk, first)
        _write(d.state, d_state, at.batch, *everything)
        _write(d.a, d_a, at.batch, *everything)
        _write(d.skip, d_skip, at.batch, at.group, at.channels)
        _write(d.delta_bias, d_bias, at.batch, at.group, at.channels)

    def part(array: jax.Array) -> Any:
        return jax.ShapeDtypeStruct((plan.blocks, *array.shape), jnp.float32)

    (d,) = _call(
        kernel,
        (prepared, states, pad_time(_pad(d_out, plan.channels), _CHUNK_SIZE), _pad(d_final, plan.size, plan.channels)),
        (Operands(
            _like(prepared.x), _like(prepared.delta), part(prepared.b), part(prepared.c), _like(prepared.gate),
            _like(prepared.a, plan.batch), _like(prepared.skip, plan.batch), _like(prepared.delta_bias, plan.batch),
            _like(prepared.state),
        ),),
        plan, "selective_scan_gpu_backward", interpret,
    )  # fmt: skip
    width, size, time = operands.x.shape[3], operands.b.shape[3], plan.time
    return Operands(
        d.x[:, :time, :, :width],
        d.delta[:, :time, :, :width],
        d.b.sum(0)[:, :time, :, :size].astype(operands.b.dtype),
        d.c.sum(0)[:, :time, :, :size].astype(operands.c.dtype),
        None if d.gate is None else d.gate[:, :time, :, :width],
        d.a.sum(0)[:, :size, :width],
        d.skip.sum(0)[:, :width],
        d.delta_bias.sum(0)[:, :width],
        d.state[:, :, :size, :width],
    )

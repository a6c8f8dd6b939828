"""The loop over chunks as a Pallas kernel for TPUs: the grid runs over chunks, the state stays in VMEM."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.recurrent.layout import Chunk, Inputs, State, chunk_length, count_tokens, pad_time, sum_heads
from kernels.recurrent.tile import BFLOAT16, FLOAT32, Arithmetic

_LANES = 128
_CHUNK_SIZE = 128
_LEAST_TOKENS = 16  # rows of a bfloat16 register

_INDEX = jax.ShapeDtypeStruct((), jnp.int32)

Order = Callable[[jax.Array], Any]  # which chunk a step of the grid takes


def _arithmetic(value: jax.Array) -> Arithmetic:
    return BFLOAT16 if value.dtype == jnp.bfloat16 else FLOAT32


def _lay(array: jax.Array, length: int) -> jax.Array:
    """As its blocks are cut: heads beside each other on the lanes where they fill them, else each head apart."""
    array = pad_time(array, length)
    batch, time, heads = array.shape[:3]
    if array.ndim == 3:
        return array.transpose(0, 2, 1).reshape(batch, heads, time // length, 1, length)
    if array.shape[3] % _LANES == 0:
        return array.reshape(batch, time, -1)
    return array.transpose(0, 2, 1, 3)


def _unlay(array: jax.Array, like: jax.Array, heads: int) -> jax.Array:
    """Back to (B, T, heads, W) or (B, T, heads) for an array of `like`'s kind."""
    batch, time = like.shape[:2]
    if like.ndim == 3:
        return array.reshape(batch, heads, -1).transpose(0, 2, 1)[:, :time]
    if like.shape[3] % _LANES == 0:
        return array[:, :time].reshape(batch, time, heads, -1)
    return array.transpose(0, 2, 1, 3)[:, :time]


def _block(array: jax.Array, length: int, heads: int, order: Order) -> pl.BlockSpec:
    """The block of one head and chunk of an array that `_lay` lays out, for a kernel of `heads` heads."""
    group = heads // array.shape[2]

    def head(h: jax.Array) -> Any:
        return h if group == 1 else jax.lax.div(h, group)

    if array.ndim == 3:
        return pl.BlockSpec((None, None, None, 1, length), lambda b, h, n: (b, head(h), order(n), 0, 0))
    width = array.shape[3]
    if width % _LANES == 0:
        return pl.BlockSpec((None, length, width), lambda b, h, n: (b, order(n), head(h)))
    return pl.BlockSpec((None, None, length, width), lambda b, h, n: (b, head(h), order(n), 0))


def _onwards(n: jax.Array) -> jax.Array:
    return n


def _length(inputs: Inputs, chunk_size: int | None) -> int:
    return chunk_length(inputs["query"].shape[1], chunk_size or _CHUNK_SIZE, _LEAST_TOKENS)


def _like(state: State) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state)


def _state_block(array: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, *array.shape[-2:]), lambda b, h, n: (b, h, 0, 0))


def _states_block(array: jax.Array, order: Order) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, None, *array.shape[-2:]), lambda b, h, n: (b, h, order(n), 0, 0))


def _read(refs: Any) -> Any:
    return jax.tree.map(lambda ref: ref[...].astype(jnp.float32), refs)


def _write(refs: Any, values: Any) -> None:
    def write(ref: Any, value: jax.Array) -> None:
        ref[...] = value.astype(ref.dtype)

    jax.tree.map(write, refs, values)


def _call(
    kernel: Callable[..., None], step: Callable[..., Any], shapes: Any, arguments: Any, specs: Any, **options: Any
) -> Any:
    """A kernel over (batch, heads, chunks) each step of which computes `step`, a function of arrays of `shapes`."""
    cost = pl.estimate_cost(step, *shapes)
    steps = math.prod(options["grid"])
    arrays = jax.tree.leaves((arguments, options["out_shape"]))
    return pl.pallas_call(
        kernel,
        in_specs=specs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=cost.flops * steps,
            transcendentals=cost.transcendentals * steps,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        ),
        **options,
    )(*arguments)


def _shapes(inputs: Inputs, state: State, length: int) -> tuple[State, Inputs]:
    """Of the matrices of one chunk."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[-2:], jnp.float32), state), {
        name: jax.ShapeDtypeStruct((length, x.shape[3]) if x.ndim == 4 else (1, length), jnp.float32)
        for name, x in inputs.items()
    }


def forward(
    inputs: Inputs, state: State, *, chunk: Chunk, chunk_size: int | None, interpret: bool
) -> tuple[jax.Array, State]:
    """As `chunked.forward`."""
    value, heads = inputs["value"], inputs["query"].shape[2]
    length = _length(inputs, chunk_size)
    out = jax.ShapeDtypeStruct((*value.shape[:2], heads, value.shape[3]), value.dtype)
    laid_out, final = _advance(
        inputs, state, chunk, length, interpret,
        outputs=(jax.eval_shape(lambda x: _lay(x, length), out), _like(state)),
        specs=(_block(out, length, heads, _onwards), tuple(map(_state_block, state))),
        write=lambda refs, before, after, out: (_write(refs[0], out), _write(refs[1], after)),
        name="forward",
    )  # fmt: skip
    return _unlay(laid_out, out, heads), final


def _states(inputs: Inputs, state: State, chunk: Chunk, length: int, interpret: bool) -> State:
    """The states before each chunk, (B, H, chunks, rows, columns)."""
    chunks = pl.cdiv(inputs["query"].shape[1], length)
    return _advance(
        inputs, state, chunk, length, interpret,
        outputs=tuple(x.update(shape=(*x.shape[:2], chunks, *x.shape[2:])) for x in _like(state)),
        specs=tuple(_states_block(x, _onwards) for x in state),
        write=lambda refs, before, after, out: _write(refs, before),
        name="states",
    )  # fmt: skip


def _advance(
    inputs: Inputs, state: State, chunk: Chunk, length: int, interpret: bool, *, outputs: Any, specs: Any,
    write: Callable[..., Any], name: str,
) -> Any:  # fmt: skip
    """The loop from the first chunk to the last; `write` puts what is wanted into the references of the outputs."""
    batch, time, heads = inputs["query"].shape[:3]
    value = inputs["value"]

    def step(index: jax.Array, state: State, inputs: Inputs) -> tuple[State, jax.Array]:
        return chunk(state, inputs, count_tokens(time, length, index), _arithmetic(value))

    def kernel(inputs: Any, state: Any, *references: Any) -> None:
        outputs, carry = references[:-1], references[-1]

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            _write(carry, _read(state))

        before = _read(carry)
        after, out = step(pl.program_id(2), before, _read(inputs))
        _write(carry, after)
        write(outputs, before, after, out)

    return _call(
        kernel,
        step,
        (_INDEX, *_shapes(inputs, state, length)),
        ({name: _lay(x, length) for name, x in inputs.items()}, state),
        ({name: _block(x, length, heads, _onwards) for name, x in inputs.items()}, tuple(map(_state_block, state))),
        grid=(batch, heads, pl.cdiv(time, length)),
        out_shape=outputs,
        out_specs=specs,
        scratch_shapes=[tuple(pltpu.VMEM(x.shape[2:], jnp.float32) for x in state)],
        interpret=interpret,
        name=f"{chunk.name}_tpu_{name}",
    )


def backward(
    inputs: Inputs,
    state: State,
    d_out: jax.Array,
    d_final: State,
    *,
    chunk: Chunk,
    chunk_size: int | None,
    interpret: bool,
) -> tuple[Inputs, State]:
    """As `chunked.backward`."""
    batch, time, heads = inputs["query"].shape[:3]
    value, length = inputs["value"], _length(inputs, chunk_size)
    chunks = pl.cdiv(time, length)
    states = _states(inputs, state, chunk, length, interpret)

    def order(n: jax.Array) -> jax.Array:
        return chunks - 1 - n

    def step(index: jax.Array, state: State, inputs: Inputs, *cotangents: Any) -> tuple[State, Inputs]:
        tokens = count_tokens(time, length, index)
        _, pull = jax.vjp(lambda *x: chunk(*x, tokens, _arithmetic(value)), state, inputs)
        return pull(cotangents)

    def kernel(inputs: Any, states: Any, d_out: Any, d_final: Any, d_inputs: Any, d_state: Any, carry: Any) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            _write(carry, _read(d_final))

        d_before, d_chunk = step(order(pl.program_id(2)), _read(states), _read(inputs), _read(carry), _read(d_out))
        _write(d_inputs, d_chunk)
        _write(carry, d_before)
        _write(d_state, d_before)

    # Heads that share a key each give it a gradient of their own; the sum is XLA's.
    like = {n: jax.ShapeDtypeStruct((*x.shape[:2], heads, *x.shape[3:]), x.dtype) for n, x in inputs.items()}
    state_shapes, input_shapes = _shapes(inputs, d_final, length)
    d_laid, d_state = _call(
        kernel,
        step,
        (_INDEX, state_shapes, input_shapes, state_shapes, input_shapes["value"]),
        ({name: _lay(x, length) for name, x in inputs.items()}, states, _lay(d_out, length), d_final),
        (
            {name: _block(x, length, heads, order) for name, x in inputs.items()},
            tuple(_states_block(x, order) for x in states),
            _block(d_out, length, heads, order),
            tuple(map(_state_block, d_final)),
        ),
        grid=(batch, heads, chunks),
        out_shape=(jax.eval_shape(lambda tree: {n: _lay(x, length) for n, x in tree.items()}, like), _like(state)),
        out_specs=(
            {name: _block(x, length, heads, order) for name, x in like.items()},
            tuple(map(_state_block, d_final)),
        ),
        scratch_shapes=[tuple(pltpu.VMEM(x.shape[2:], jnp.float32) for x in d_final)],
        interpret=interpret,
        name=f"{chunk.name}_tpu_backward",
    )
    return {n: sum_heads(_unlay(d_laid[n], x, heads), x.shape[2]) for n, x in inputs.items()}, d_state

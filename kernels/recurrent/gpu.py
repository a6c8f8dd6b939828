"""The loop over chunks as a Pallas-Triton kernel for NVIDIA GPUs: a program a head and block of the value's channels.

The state stays in registers, so a program takes only as many of the value's channels as fit there; a state's rows know
nothing of each other. What does not depend on the value is computed by each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.recurrent.layout import Chunk, Inputs, State, chunk_length, count_tokens, pad_time, sum_heads
from kernels.recurrent.tile import BFLOAT16, FLOAT32, Arithmetic

_CHUNK_SIZE = 16
_LEAST = 16  # rows and columns of a product on the tensor cores
# Numbers of a program's state, by kernel: what 8 warps hold in registers beside a chunk's inputs and its products.
_STATE_SIZE = {"forward": 8192, "backward": 4096}
_WARPS = 8
_PROGRAMS = 256  # nearly two for each core of an H100
# float32 on the tensor cores: each factor in two parts, three products.
_THREE_TF32 = Arithmetic(jnp.float32, jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3)


def _padded(width: int) -> int:
    return max(pl.next_power_of_2(width), _LEAST)


def _pad_width(array: jax.Array, rows: bool = False) -> jax.Array:
    """With zeros up to a power of 2 along the last axis, and with `rows` along the one before it."""
    pads = [(0, 0)] * array.ndim
    for axis in (-2, -1) if rows else (-1,):
        pads[axis] = (0, _padded(array.shape[axis]) - array.shape[axis])
    return jnp.pad(array, pads) if any(high for _, high in pads) else array


class _Plan(NamedTuple):
    """What a kernel knows when it is traced."""

    batch: int
    time: int
    heads: int
    length: int  # of a chunk
    value_block: int
    splits: int  # blocks of the value's channels
    value_states: tuple[bool, ...]
    arithmetic: Arithmetic

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.time, self.length)


def _plan(inputs: Inputs, state: State, chunk: Chunk, chunk_size: int | None, kernel: str, interpret: bool) -> _Plan:
    batch, time, heads = inputs["query"].shape[:3]
    value = inputs["value"]
    columns = max(_padded(x.shape[-1]) for x in state)
    block = _padded(value.shape[3])
    if any(chunk.value_states):
        block = min(max(_STATE_SIZE[kernel] // columns, _LEAST), block)
    arithmetic = BFLOAT16 if value.dtype == jnp.bfloat16 else FLOAT32 if interpret else _THREE_TF32
    length = chunk_length(time, chunk_size or _CHUNK_SIZE, _LEAST)
    return _Plan(
        batch, time, heads, length, block, _padded(value.shape[3]) // block, chunk.value_states, arithmetic
    )  # fmt: skip


def fits(state: State, chunk: Chunk) -> bool:
    """Whether a program's state stays in registers. One whose rows are channels of the value is cut until it does."""
    if any(chunk.value_states):
        return True
    return sum(_padded(x.shape[-2]) * _padded(x.shape[-1]) for x in state if x.shape[-2] > 1) <= _STATE_SIZE["backward"]


class _Place(NamedTuple):
    """Which head and block of the value's channels a program computes."""

    batch: jax.Array
    head: jax.Array
    split: jax.Array


def _place(plan: _Plan) -> _Place:
    index = pl.program_id(0)
    head = jax.lax.div(index, plan.splits)
    return _Place(
        jax.lax.div(head, plan.heads), jax.lax.rem(head, plan.heads), jax.lax.rem(index, plan.splits)
    )  # fmt: skip


def _channels(plan: _Plan, at: _Place) -> Any:
    return pl.ds(at.split * plan.value_block, plan.value_block)


def _tokens(plan: _Plan, n: jax.Array) -> Any:
    return pl.ds(n * plan.length, plan.length)


def _read(ref: Any, *index: Any) -> jax.Array:
    return plgpu.load(ref.at[index]).astype(jnp.float32)


def _write(ref: Any, value: jax.Array, *index: Any) -> None:
    plgpu.store(ref.at[index], value.astype(ref.dtype))


def _read_inputs(refs: dict[str, Any], plan: _Plan, at: _Place, n: jax.Array) -> Inputs:
    inputs = {}
    for name, ref in refs.items():
        group = plan.heads // ref.shape[2]
        index = (at.batch, _tokens(plan, n), jax.lax.div(at.head, group))
        if len(ref.shape) == 3:
            inputs[name] = _read(ref, *index)[None]
        else:
            inputs[name] = _read(ref, *index, _channels(plan, at) if name == "value" else slice(None))
    return inputs


def _state_index(plan: _Plan, at: _Place, of_value: bool) -> tuple[Any, Any]:
    return (_channels(plan, at) if of_value else slice(None)), slice(None)


def _read_state(refs: Any, plan: _Plan, at: _Place, *chunk: jax.Array) -> State:
    return tuple(
        _read(ref, at.batch, at.head, *chunk, *_state_index(plan, at, of_value))
        for ref, of_value in zip(refs, plan.value_states, strict=True)
    )


def _write_state(refs: Any, state: State, plan: _Plan, at: _Place, *chunk: jax.Array) -> None:
    # Programs of one head write the same numbers where a state does not depend on the value.
    for ref, x, of_value in zip(refs, state, plan.value_states, strict=True):
        _write(ref, x, at.batch, at.head, *chunk, *_state_index(plan, at, of_value))


def _pad_states(states: State, plan: _Plan) -> State:
    # A single row that is not the value's stays one: a vector, not a factor of products.
    flags = zip(states, plan.value_states, strict=True)
    return tuple(_pad_width(x, rows=of_value or x.shape[-2] > 1) for x, of_value in flags)


def _like(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _crop(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return array if array.shape == shape else array[tuple(slice(size) for size in shape)]


def _prepare(inputs: Inputs, plan: _Plan) -> Inputs:
    inputs = {name: pad_time(x, plan.length) for name, x in inputs.items()}
    return {name: _pad_width(x) if x.ndim == 4 else x for name, x in inputs.items()}


def _call(kernel: Callable[..., None], arguments: Any, out_shape: Any, plan: _Plan, name: str, interpret: bool) -> Any:
    return pl.pallas_call(
        kernel,
        grid=(plan.batch * plan.heads * plan.splits,),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name=name,
    )(*arguments)


def forward(
    inputs: Inputs, state: State, *, chunk: Chunk, chunk_size: int | None, interpret: bool
) -> tuple[jax.Array, State]:
    """As `chunked.forward`."""
    plan, value = _plan(inputs, state, chunk, chunk_size, "forward", interpret), inputs["value"]
    shape = (plan.batch, plan.time, plan.heads, value.shape[3])
    padded = _pad_states(state, plan)

    def write(refs: Any, at: _Place, n: jax.Array, before: State, out: jax.Array) -> None:
        _write(refs[0], out, at.batch, _tokens(plan, n), at.head, _channels(plan, at))

    def end(refs: Any, at: _Place, after: State) -> None:
        _write_state(refs[1], after, plan, at)

    out, final = _advance(
        inputs, padded, chunk, plan, interpret, write, end, name="forward",
        outputs=(
            jax.ShapeDtypeStruct(
                (plan.batch, plan.chunks * plan.length, plan.heads, _padded(shape[3])), value.dtype
            ),
            _like(padded),
        ),
    )  # fmt: skip
    return _crop(out, shape), tuple(_crop(x, like.shape) for x, like in zip(final, state, strict=True))


def _states(inputs: Inputs, state: State, chunk: Chunk, plan: _Plan, interpret: bool) -> State:
    """The states before each chunk, (B, H, chunks, rows, columns), padded."""
    padded = _pad_states(state, plan)

    def write(refs: Any, at: _Place, n: jax.Array, before: State, out: jax.Array) -> None:
        _write_state(refs, before, plan, at, n)

    return _advance(
        inputs, padded, chunk, plan, interpret, write, lambda refs, at, after: None, name="states",
        outputs=tuple(x.update(shape=(*x.shape[:2], plan.chunks, *x.shape[2:])) for x in _like(padded)),
    )  # fmt: skip


def _advance(
    inputs: Inputs, state: State, chunk: Chunk, plan: _Plan, interpret: bool, write: Callable[..., None],
    end: Callable[..., None], *, outputs: Any, name: str,
) -> Any:  # fmt: skip
    """The loop from the first chunk to the last, `write` after each of them and `end` after all."""

    def kernel(inputs: Any, state: Any, *outputs: Any) -> None:
        at = _place(plan)

        def body(n: jax.Array, before: State) -> State:
            tokens = count_tokens(plan.time, plan.length, n)
            # The primal half of a derivative, for Triton knows no `custom_vjp`.
            (after, out), _ = jax.vjp(
                lambda state, inputs: chunk(state, inputs, tokens, plan.arithmetic),
                before,
                _read_inputs(inputs, plan, at, n),
            )
            write(outputs, at, n, before, out)
            return after

        end(outputs, at, jax.lax.fori_loop(0, plan.chunks, body, _read_state(state, plan, at)))

    arguments = (_prepare(inputs, plan), state)
    return _call(kernel, arguments, outputs, plan, f"{chunk.name}_gpu_{name}", interpret)


def backward(
    inputs: Inputs, state: State, d_out: jax.Array, d_final: State, *, chunk: Chunk, chunk_size: int | None,
    interpret: bool,
) -> tuple[Inputs, State]:  # fmt: skip
    """As `chunked.backward`.

    Each block of the value's channels gives the other inputs a gradient of its own. Where heads are many, blocks take
    turns, in parts that fill the GPU, so that there are few such sums and few saved states at a time.
    """
    plan = _plan(inputs, d_final, chunk, chunk_size, "backward", interpret)
    parts = plan.splits // pl.next_power_of_2(pl.cdiv(_PROGRAMS, plan.batch * plan.heads))
    if parts <= 1:
        return _backward(inputs, state, d_out, d_final, chunk, plan, interpret)
    plan = plan._replace(splits=plan.splits // parts)

    def cut(x: jax.Array, axis: int) -> jax.Array:
        missing = _padded(x.shape[axis]) - x.shape[axis]
        x = jnp.pad(x, [(0, missing if a == axis % x.ndim else 0) for a in range(x.ndim)])
        return jnp.stack(jnp.split(x, parts, axis))

    def cut_states(states: State) -> State:
        return tuple(cut(x, -2) for x, of_value in zip(states, plan.value_states, strict=True) if of_value)

    def join(x: jax.Array, axis: int, like: jax.Array) -> jax.Array:
        return _crop(jnp.concatenate(list(x), axis), like.shape)

    def merge(of_value: State, others: State) -> State:
        each = {True: iter(of_value), False: iter(others)}
        return tuple(next(each[flag]) for flag in plan.value_states)

    def pick(states: State, of_value: bool) -> State:
        return tuple(x for x, flag in zip(states, plan.value_states, strict=True) if flag == of_value)

    shared_state = pick(state, False)

    def part(sums: Any, cuts: Any) -> tuple[Any, Any]:
        # The first part takes the gradient of the states that all parts compute.
        value, state, d_out, d_final = cuts
        d_inputs, d_state = _backward(
            inputs | {"value": value}, merge(state, shared_state), d_out, merge(d_final, sums["d_final"]),
            chunk, plan, interpret,
        )  # fmt: skip
        d_value = d_inputs.pop("value")
        add = {name: sums["inputs"][name] + x.astype(jnp.float32) for name, x in d_inputs.items()}
        d_shared = tuple(a + b for a, b in zip(sums["state"], pick(d_state, False), strict=True))
        none = jax.tree.map(jnp.zeros_like, sums["d_final"])
        return {"inputs": add, "state": d_shared, "d_final": none}, (d_value, pick(d_state, True))

    sums = {
        "inputs": {name: jnp.zeros(x.shape, jnp.float32) for name, x in inputs.items() if name != "value"},
        "state": jax.tree.map(jnp.zeros_like, shared_state),
        "d_final": pick(d_final, False),
    }
    cuts = (cut(inputs["value"], 3), cut_states(state), cut(d_out, 3), cut_states(d_final))
    sums, (d_value, d_state) = jax.lax.scan(part, sums, cuts)
    gradients = {name: x.astype(inputs[name].dtype) for name, x in sums["inputs"].items()}
    gradients["value"] = join(d_value, 3, inputs["value"])
    d_of_value = tuple(join(x, 2, like) for x, like in zip(d_state, pick(state, True), strict=True))
    return gradients, merge(d_of_value, sums["state"])


def _backward(
    inputs: Inputs, state: State, d_out: jax.Array, d_final: State, chunk: Chunk, plan: _Plan, interpret: bool
) -> tuple[Inputs, State]:
    def kernel(inputs: Any, states: Any, d_out: Any, d_final: Any, d_inputs: Any, d_state: Any) -> None:
        at = _place(plan)

        def body(step: jax.Array, d_after: State) -> State:
            n = plan.chunks - 1 - step
            tokens = count_tokens(plan.time, plan.length, n)
            _, pull = jax.vjp(
                lambda state, inputs: chunk(state, inputs, tokens, plan.arithmetic),
                _read_state(states, plan, at, n),
                _read_inputs(inputs, plan, at, n),
            )
            where = (at.batch, _tokens(plan, n), at.head)
            d_before, d_chunk = pull((d_after, _read(d_out, *where, _channels(plan, at))))
            for name, ref in d_inputs.items():
                if name == "value":
                    _write(ref, d_chunk[name], *where, _channels(plan, at))
                elif d_chunk[name].shape[0] == 1 and len(ref.shape) == 4:
                    _write(ref, d_chunk[name].reshape(plan.length), at.split, *where)
                else:
                    _write(ref, d_chunk[name], at.split, *where, slice(None))
            return d_before

        # One program of a head takes the gradient of a state that all of them compute.
        d_after = tuple(
            x if of_value else jnp.where(at.split == 0, x, 0.0)
            for x, of_value in zip(_read_state(d_final, plan, at), plan.value_states, strict=True)
        )
        d_before = jax.lax.fori_loop(0, plan.chunks, body, d_after)
        for ref, x, of_value in zip(d_state, d_before, plan.value_states, strict=True):
            index = (at.batch, at.head, *_state_index(plan, at, of_value))
            _write(ref, x, *(index if of_value else (at.split, *index)))

    states = _states(inputs, state, chunk, plan, interpret)
    padded, prepared = _pad_states(d_final, plan), _prepare(inputs, plan)

    def partial_sums(shape: tuple[int, ...], of_value: bool, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape if of_value else (plan.splits, *shape), dtype)

    d_inputs, d_state = _call(
        kernel,
        (prepared, states, _pad_width(pad_time(d_out, plan.length)), padded),
        (
            {name: partial_sums((*x.shape[:2], plan.heads, *x.shape[3:]), name == "value", x.dtype)
             for name, x in prepared.items()},
            tuple(partial_sums(x.shape, v, jnp.float32) for x, v in zip(padded, plan.value_states, strict=True)),
        ),
        plan, f"{chunk.name}_gpu_backward", interpret,
    )  # fmt: skip

    def total(x: jax.Array, of_value: bool) -> jax.Array:
        return x if of_value else x[0] if plan.splits == 1 else x.astype(jnp.float32).sum(0).astype(x.dtype)

    gradients = {}
    for name, x in inputs.items():
        summed = sum_heads(total(d_inputs[name], name == "value"), x.shape[2])
        gradients[name] = _crop(summed, x.shape)
    d_states = tuple(
        _crop(total(x, of_value), like.shape)
        for x, like, of_value in zip(d_state, d_final, plan.value_states, strict=True)
    )
    return gradients, d_states

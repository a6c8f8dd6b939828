"""The loop over chunks as a Pallas kernel for TPUs: the grid runs over chunks, the state stays in VMEM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.recurrent.layout import Chunk, Inputs, State, chunk_length, count_tokens, pad_time, sum_heads
from kernels.recurrent.tile import BFLOAT16, FLOAT32, Arithmetic

_LANES = 128
_CHUNK_SIZE = 128
# Of VMEM, for each byte of a step's state: the blocks in and out, twice each, what the loop carries and products.
_VMEM_PER_STATE = 16
_VMEM_DEFAULT, _VMEM_MOST = 16 << 20, 100 << 20
_LEAST_TOKENS = 16  # rows of a bfloat16 register

_INDEX = jax.ShapeDtypeStruct((), jnp.int32)

Order = Callable[[jax.Array], Any]  # which chunk a step of the grid takes


class _Plan(NamedTuple):
    """What a kernel knows when it is traced."""

    heads: int
    per_step: int  # heads that a step of the grid computes, each for itself
    length: int  # of a chunk
    time: int
    arithmetic: Arithmetic

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.time, self.length)

    def in_block(self, heads: int) -> int:
        """Of the heads of an array, how many belong to a step."""
        return max(1, self.per_step * heads // self.heads)

    def on_lanes(self, array: jax.Array | jax.ShapeDtypeStruct) -> bool:
        """Whether a step's heads, beside each other, fill the lanes: XLA need not move such an array."""
        return self.in_block(array.shape[2]) * array.shape[3] % _LANES == 0


def _plan(inputs: Inputs, chunk: Chunk, chunk_size: int | None) -> _Plan:
    time, heads = inputs["query"].shape[1:3]
    arithmetic = BFLOAT16 if inputs["value"].dtype == jnp.bfloat16 else FLOAT32
    plan = _Plan(heads, 1, chunk_length(time, chunk_size or _CHUNK_SIZE, _LEAST_TOKENS), time, arithmetic)
    if not any(chunk.value_states):
        return plan  # a head is work enough, and libtpu fails on several of a neural memory's for v5e
    matrices = [x for x in inputs.values() if x.ndim == 4]
    for per_step in (1, 2, 4, 8):
        wider = plan._replace(per_step=per_step)
        divides = all(per_step * x.shape[2] % heads == 0 or per_step == 1 for x in matrices)
        if heads % per_step == 0 and divides and all(map(wider.on_lanes, matrices)):
            return wider
    return plan


def _lay(array: jax.Array, plan: _Plan) -> jax.Array:
    """As its blocks are cut: heads beside each other on the lanes where they fill them, else each head apart."""
    array = pad_time(array, plan.length)
    batch, time, heads = array.shape[:3]
    if array.ndim == 3:
        return array.transpose(0, 2, 1).reshape(batch, heads, plan.chunks, 1, plan.length)
    if plan.on_lanes(array):
        return array.reshape(batch, time, -1)
    return array.transpose(0, 2, 1, 3)


def _laid(array: jax.ShapeDtypeStruct, plan: _Plan) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda x: _lay(x, plan), array)


def _unlay(array: jax.Array, like: jax.ShapeDtypeStruct, plan: _Plan) -> jax.Array:
    """Back from `_lay` of an array of `like`'s shape."""
    batch, time, heads = like.shape[:3]
    if like.ndim == 3:
        return array.reshape(batch, heads, -1).transpose(0, 2, 1)[:, :time]
    if plan.on_lanes(like):
        return array[:, :time].reshape(like.shape)
    return array.transpose(0, 2, 1, 3)[:, :time]


def _block(array: Any, plan: _Plan, order: Order) -> pl.BlockSpec:
    """The block of one step of an array that `_lay` lays out."""
    here = plan.in_block(array.shape[2])
    sharing = plan.heads // plan.per_step // (array.shape[2] // here)  # steps that read the same block

    def head(h: jax.Array) -> Any:
        return h if sharing == 1 else jax.lax.div(h, sharing)

    if array.ndim == 3:
        return pl.BlockSpec((None, here, None, 1, plan.length), lambda b, h, n: (b, head(h), order(n), 0, 0))
    width = array.shape[3]
    if plan.on_lanes(array):
        return pl.BlockSpec((None, plan.length, here * width), lambda b, h, n: (b, order(n), head(h)))
    return pl.BlockSpec((None, here, plan.length, width), lambda b, h, n: (b, head(h), order(n), 0))


def _blocks(inputs: Any, plan: _Plan, order: Order) -> dict[str, pl.BlockSpec]:
    return {name: _block(x, plan, order) for name, x in inputs.items()}


def _onwards(n: jax.Array) -> jax.Array:
    return n


def _like(state: State) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state)


def _state_blocks(state: Any, plan: _Plan) -> tuple[pl.BlockSpec, ...]:
    return tuple(pl.BlockSpec((None, plan.per_step, *x.shape[-2:]), lambda b, h, n: (b, h, 0, 0)) for x in state)


def _states_blocks(states: Any, plan: _Plan, order: Order) -> tuple[pl.BlockSpec, ...]:
    return tuple(
        pl.BlockSpec((None, plan.per_step, None, *x.shape[-2:]), lambda b, h, n: (b, h, order(n), 0, 0)) for x in states
    )


def _place(ref: Any, width: int, head: int, plan: _Plan) -> Any:
    """Where in its block a head of the step lies."""
    if len(ref.shape) == 3:
        return head * ref.shape[0] // plan.per_step
    here = ref.shape[1] // width
    first = head * here // plan.per_step * width
    return slice(None), slice(first, first + width)


def _read(refs: Any, widths: Any, head: int, plan: _Plan) -> Any:
    return jax.tree.map(lambda ref, w: ref[_place(ref, w, head, plan)].astype(jnp.float32), refs, widths)


def _write(refs: Any, values: Any, head: int, plan: _Plan) -> None:
    def write(ref: Any, value: jax.Array) -> None:
        ref[_place(ref, value.shape[1], head, plan)] = value.astype(ref.dtype)

    jax.tree.map(write, refs, values)


def _widths(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.shape[-1], tree)


def _call(
    kernel: Callable[..., None], step: Callable[..., Any], shapes: Any, arguments: Any, specs: Any, plan: _Plan,
    **options: Any,
) -> Any:  # fmt: skip
    """A kernel over (batch, heads, chunks) that computes `step`, a function of arrays of `shapes`, for each of them."""
    cost = pl.estimate_cost(step, *shapes)
    batch = arguments[0]["query"].shape[0]
    steps = batch * plan.heads * plan.chunks
    arrays = jax.tree.leaves((arguments, options["out_shape"]))
    state_bytes = 4 * plan.per_step * sum(x.size for x in jax.tree.leaves(shapes[1]))
    vmem = min(_VMEM_PER_STATE * state_bytes, _VMEM_MOST)
    return pl.pallas_call(
        kernel,
        grid=(batch, plan.heads // plan.per_step, plan.chunks),
        in_specs=specs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem if vmem > _VMEM_DEFAULT else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=cost.flops * steps,
            transcendentals=cost.transcendentals * steps,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        ),
        **options,
    )(*arguments)


def _shapes(inputs: Inputs, state: State, plan: _Plan) -> tuple[Any, Any]:
    """Of the matrices of one chunk."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[-2:], jnp.float32), state), {
        name: jax.ShapeDtypeStruct((plan.length, x.shape[3]) if x.ndim == 4 else (1, plan.length), jnp.float32)
        for name, x in inputs.items()
    }


def forward(
    inputs: Inputs, state: State, *, chunk: Chunk, chunk_size: int | None, interpret: bool
) -> tuple[jax.Array, State]:
    """As `chunked.forward`."""
    plan, value = _plan(inputs, chunk, chunk_size), inputs["value"]
    out = jax.ShapeDtypeStruct((*value.shape[:2], plan.heads, value.shape[3]), value.dtype)
    laid_out, final = _advance(
        inputs, state, chunk, plan, interpret,
        outputs=(_laid(out, plan), _like(state)),
        specs=(_block(out, plan, _onwards), _state_blocks(state, plan)),
        pick=lambda before, after, out: (out, after),
        name="forward",
    )  # fmt: skip
    return _unlay(laid_out, out, plan), final


def _states(inputs: Inputs, state: State, chunk: Chunk, plan: _Plan, interpret: bool) -> State:
    """The states before each chunk, (B, H, chunks, rows, columns)."""
    return _advance(
        inputs, state, chunk, plan, interpret,
        outputs=tuple(x.update(shape=(*x.shape[:2], plan.chunks, *x.shape[2:])) for x in _like(state)),
        specs=_states_blocks(state, plan, _onwards),
        pick=lambda before, after, out: before,
        name="states",
    )  # fmt: skip


def _advance(
    inputs: Inputs, state: State, chunk: Chunk, plan: _Plan, interpret: bool, *, outputs: Any, specs: Any,
    pick: Callable[..., Any], name: str,
) -> Any:  # fmt: skip
    """The loop from the first chunk to the last; `pick` says what of a chunk goes to the outputs."""
    input_widths, state_widths = _widths(inputs), _widths(state)

    def step(index: jax.Array, state: State, inputs: Inputs) -> tuple[State, jax.Array]:
        return chunk(state, inputs, count_tokens(plan.time, plan.length, index), plan.arithmetic)

    def kernel(inputs: Any, state: Any, *references: Any) -> None:
        outputs, carry = references[:-1], references[-1]

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            for ref, first in zip(carry, state, strict=True):
                ref[...] = first[...]

        for head in range(plan.per_step):
            before = _read(carry, state_widths, head, plan)
            after, out = step(pl.program_id(2), before, _read(inputs, input_widths, head, plan))
            _write(carry, after, head, plan)
            _write(outputs, pick(before, after, out), head, plan)

    return _call(
        kernel,
        step,
        (_INDEX, *_shapes(inputs, state, plan)),
        ({name: _lay(x, plan) for name, x in inputs.items()}, state),
        (_blocks(inputs, plan, _onwards), _state_blocks(state, plan)),
        plan,
        out_shape=outputs,
        out_specs=specs,
        scratch_shapes=[tuple(pltpu.VMEM((plan.per_step, *x.shape[2:]), jnp.float32) for x in state)],
        interpret=interpret,
        name=f"{chunk.name}_tpu_{name}",
    )


def backward(
    inputs: Inputs, state: State, d_out: jax.Array, d_final: State, *, chunk: Chunk, chunk_size: int | None,
    interpret: bool,
) -> tuple[Inputs, State]:  # fmt: skip
    """As `chunked.backward`."""
    plan = _plan(inputs, chunk, chunk_size)
    states = _states(inputs, state, chunk, plan, interpret)
    input_widths, state_widths, value_width = _widths(inputs), _widths(state), d_out.shape[3]

    def order(n: jax.Array) -> jax.Array:
        return plan.chunks - 1 - n

    def step(index: jax.Array, state: State, inputs: Inputs, *cotangents: Any) -> tuple[State, Inputs]:
        tokens = count_tokens(plan.time, plan.length, index)
        _, pull = jax.vjp(lambda state, inputs: chunk(state, inputs, tokens, plan.arithmetic), state, inputs)
        return pull(cotangents)

    def kernel(inputs: Any, states: Any, d_out: Any, d_final: Any, d_inputs: Any, d_state: Any, carry: Any) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            for ref, last in zip(carry, d_final, strict=True):
                ref[...] = last[...]

        for head in range(plan.per_step):
            d_before, d_chunk = step(
                order(pl.program_id(2)),
                _read(states, state_widths, head, plan),
                _read(inputs, input_widths, head, plan),
                _read(carry, state_widths, head, plan),
                _read(d_out, value_width, head, plan),
            )
            _write(d_inputs, d_chunk, head, plan)
            _write(carry, d_before, head, plan)
            _write(d_state, d_before, head, plan)

    # Heads that share a key each give it a gradient of their own; the sum is XLA's.
    like = {n: jax.ShapeDtypeStruct((*x.shape[:2], plan.heads, *x.shape[3:]), x.dtype) for n, x in inputs.items()}
    state_shapes, input_shapes = _shapes(inputs, state, plan)
    d_laid, d_state = _call(
        kernel,
        step,
        (_INDEX, state_shapes, input_shapes, state_shapes, input_shapes["value"]),
        ({name: _lay(x, plan) for name, x in inputs.items()}, states, _lay(d_out, plan), d_final),
        (
            _blocks(inputs, plan, order),
            _states_blocks(states, plan, order),
            _block(d_out, plan, order),
            _state_blocks(d_final, plan),
        ),
        plan,
        out_shape=({name: _laid(x, plan) for name, x in like.items()}, _like(state)),
        out_specs=(_blocks(like, plan, order), _state_blocks(d_final, plan)),
        scratch_shapes=[tuple(pltpu.VMEM((plan.per_step, *x.shape[2:]), jnp.float32) for x in d_final)],
        interpret=interpret,
        name=f"{chunk.name}_tpu_backward",
    )
    return {n: sum_heads(_unlay(d_laid[n], x, plan), inputs[n].shape[2]) for n, x in like.items()}, d_state

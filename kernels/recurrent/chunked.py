"""The loop over chunks for XLA: all heads at once, in memory linear in time."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.recurrent.layout import Chunk, Inputs, State, chunk_length, count_tokens, pad_time, repeat_heads, sum_heads
from kernels.recurrent.tile import FLOAT32, FLOAT64

_CHUNK_SIZE = 64


def _cut(array: jax.Array, length: int, heads: int) -> jax.Array:
    """(B, T, G, W) -> (chunks, B, H, length, W); (B, T, H) -> (chunks, B, H, 1, length)."""
    array = repeat_heads(pad_time(array, length), heads)
    batch, time = array.shape[:2]
    array = array.reshape(batch, time // length, length, heads, -1)
    return array.transpose((1, 0, 3, 2, 4))


def _cut_inputs(inputs: Inputs, length: int, heads: int) -> Inputs:
    cut = {name: _cut(x, length, heads) for name, x in inputs.items()}
    return {name: x.swapaxes(3, 4) if inputs[name].ndim == 3 else x for name, x in cut.items()}


def _join(array: jax.Array, time: int) -> jax.Array:
    """(chunks, B, H, length, W) -> (B, T, H, W)."""
    chunks, batch, heads, length, width = array.shape
    return array.transpose((1, 0, 3, 2, 4)).reshape(batch, chunks * length, heads, width)[:, :time]


def _indices(time: int, length: int) -> jax.Array:
    return jnp.arange(-(-time // length))


def _step(chunk: Chunk, state: State, inputs: Inputs, tokens: jax.Array | None) -> tuple[State, jax.Array]:
    """All heads' chunk, in the state's float32 or float64."""
    arithmetic = FLOAT64 if state[0].dtype == jnp.float64 else FLOAT32
    inputs = {name: x.astype(arithmetic.dtype) for name, x in inputs.items()}
    return jax.vmap(jax.vmap(lambda state, inputs: chunk(state, inputs, tokens, arithmetic)))(state, inputs)


def forward(inputs: Inputs, state: State, *, chunk: Chunk, chunk_size: int | None) -> tuple[jax.Array, State]:
    """Out (B, T, H, E) in the value's dtype, and the last state."""
    time, heads = inputs["query"].shape[1:3]
    length = chunk_length(time, chunk_size or _CHUNK_SIZE, 1)

    def body(state: State, now: tuple[jax.Array, Inputs]) -> tuple[State, jax.Array]:
        index, inputs = now
        state, out = _step(chunk, state, inputs, count_tokens(time, length, index))
        return state, out.astype(dtype)

    dtype = inputs["value"].dtype
    state, out = jax.lax.scan(body, state, (_indices(time, length), _cut_inputs(inputs, length, heads)))
    return _join(out, time), state


def backward(
    inputs: Inputs, state: State, d_out: jax.Array, d_final: State, *, chunk: Chunk, chunk_size: int | None
) -> tuple[Inputs, State]:
    """Gradients of the inputs and of the first state."""
    time, heads = inputs["query"].shape[1:3]
    length = chunk_length(time, chunk_size or _CHUNK_SIZE, 1)
    indices, cut = _indices(time, length), _cut_inputs(inputs, length, heads)

    def step(index: jax.Array, state: State, inputs: Inputs) -> tuple[State, jax.Array]:
        return _step(chunk, state, inputs, count_tokens(time, length, index))

    def advance(state: State, now: tuple[jax.Array, Inputs]) -> tuple[State, State]:
        index, inputs = now
        return step(index, state, inputs)[0], state

    def retreat(d_state: State, now: Any) -> tuple[State, Inputs]:
        index, state, inputs, d_out = now
        _, pull = jax.vjp(partial(step, index), state, inputs)
        return pull((d_state, d_out.astype(state[0].dtype)))

    _, states = jax.lax.scan(advance, state, (indices, cut))
    d_state, d_cut = jax.lax.scan(retreat, d_final, (indices, states, cut, _cut(d_out, length, heads)), reverse=True)
    d_inputs = {}
    for name, x in inputs.items():
        joined = _join(d_cut[name] if x.ndim == 4 else d_cut[name].swapaxes(3, 4), time)
        d_inputs[name] = sum_heads(joined if x.ndim == 4 else joined[..., 0], x.shape[2])
    return d_inputs, d_state

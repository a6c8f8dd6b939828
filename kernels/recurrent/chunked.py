"""The loop over chunks for XLA: all heads at once, in memory linear in time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.recurrent.layout import Chunk, Inputs, State, chunk_length, count_tokens, pad_time, repeat_heads, sum_heads
from kernels.recurrent.tile import FLOAT32


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
    """All heads' chunk."""
    inputs = {name: x.astype(jnp.float32) for name, x in inputs.items()}
    return jax.vmap(jax.vmap(lambda state, inputs: chunk(state, inputs, tokens, FLOAT32)))(state, inputs)


def forward(
    inputs: Inputs, state: State, *, chunk: Chunk, chunk_size: int, save: bool
) -> tuple[jax.Array, State, State | None]:
    """Out (B, T, H, E), the last state, and with `save` the states before each chunk, (B, H, chunks, rows, columns)."""
    time, heads = inputs["query"].shape[1:3]
    length = chunk_length(time, chunk_size, 1)
    dtype = inputs["value"].dtype

    def body(state, now):
        index, inputs = now
        after, out = _step(chunk, state, inputs, count_tokens(time, length, index))
        return after, (out.astype(dtype), state if save else None)

    final, (out, states) = jax.lax.scan(body, state, (_indices(time, length), _cut_inputs(inputs, length, heads)))
    return _join(out, time), final, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), states)


def backward(
    inputs: Inputs, states: State, d_out: jax.Array, d_final: State, *, chunk: Chunk, chunk_size: int
) -> tuple[Inputs, State]:
    """Gradients of the inputs and of the first state."""
    time, heads = inputs["query"].shape[1:3]
    length = chunk_length(time, chunk_size, 1)

    def body(d_state, saved):
        index, state, inputs, d_out = saved
        tokens = count_tokens(time, length, index)
        _, pull = jax.vjp(lambda state, inputs: _step(chunk, state, inputs, tokens), state, inputs)
        return pull((d_state, d_out.astype(jnp.float32)))

    saved = (
        _indices(time, length),
        jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), states),
        _cut_inputs(inputs, length, heads),
        _cut(d_out, length, heads),
    )
    d_state, d_cut = jax.lax.scan(body, d_final, saved, reverse=True)
    d_inputs = {}
    for name, x in inputs.items():
        joined = _join(d_cut[name] if x.ndim == 4 else d_cut[name].swapaxes(3, 4), time)
        d_inputs[name] = sum_heads(joined if x.ndim == 4 else joined[..., 0], x.shape[2])
    return d_inputs, d_state

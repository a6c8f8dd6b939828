"""The selective scan for XLA: the backward pass goes through chunks and keeps the states of one at a time.

The forward pass is the definition's, which keeps no states: on a CPU chunks and unrolled tokens were
slower.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.recurrent.layout import chunk_length, pad_time
from kernels.selective_scan.operands import Operands, Options, finish_backward, steps
from kernels.selective_scan.reference import forward

__all__ = ["backward", "forward"]

_CHUNK_SIZE = 64


def _cut(array: jax.Array, length: int) -> jax.Array:
    """(B, T, ...) -> (chunks, length, B, ...)."""
    array = pad_time(array, length)
    batch, time = array.shape[:2]
    return jnp.moveaxis(array.reshape(batch, time // length, length, *array.shape[2:]), 0, 2)


def _join(array: jax.Array, time: int) -> jax.Array:
    """The inverse of `_cut`."""
    array = jnp.moveaxis(array, 2, 0)
    return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :time]


def _cuts(operands: Operands, options: Options) -> tuple[int, Any]:
    """The length of a chunk, and of every chunk its x, delta, b, c, gate and which tokens exist."""
    time = operands.x.shape[1]
    length = chunk_length(time, options.chunk_size or _CHUNK_SIZE, 1)
    cut = [None if array is None else _cut(array, length) for array in operands[:5]]
    exists = (jnp.arange(cut[0].shape[0] * length) < time).reshape(-1, length, 1, 1, 1)  # type: ignore[union-attr]
    return length, (*cut, exists)


def _wide(*arrays: jax.Array | None) -> list[Any]:
    return [None if array is None else array.astype(jnp.float32) for array in arrays]


def _product(subscripts: str, first: jax.Array, second: jax.Array) -> jax.Array:
    # Not a sum of products: XLA's CPU compiler would fuse the recurrence into that, and compute it again and again.
    return jnp.einsum(subscripts, first, second, precision="highest")


def _next(state: jax.Array, step: jax.Array, driven: jax.Array, b: jax.Array, a: jax.Array) -> jax.Array:
    """A token's recurrence: state (B, G, N, E); step and driven = step x (B, G, E); b (B, G, N)."""
    return jnp.exp(step[:, :, None] * a) * state + b[..., None] * driven[:, :, None]


def backward(operands: Operands, d_out: jax.Array, d_final: jax.Array, options: Options) -> Operands:
    """Gradients of every operand."""
    time, a = operands.x.shape[1], operands.a
    length, cuts = _cuts(operands, options)

    def token(state: jax.Array, now: Any) -> tuple[jax.Array, jax.Array]:
        step, driven, b = now
        return _next(state, step, driven, b, a), state

    def advance(state: jax.Array, now: Any) -> tuple[jax.Array, jax.Array]:
        x, delta, b = _wide(*now[:3])
        step = steps(delta, operands.delta_bias, now[5], options.softplus).step
        after, _ = jax.lax.scan(
            lambda h, t: (token(h, t)[0], None), state, (step, step * x, b), reverse=options.reverse
        )
        return after, state

    def token_back(carry: tuple[jax.Array, jax.Array], now: Any) -> tuple[Any, Any]:
        """From the gradient of the state after a token to that of the state before it."""
        d_state, d_a = carry
        before, step, driven, b, c, d_y = now
        decay = jnp.exp(step[:, :, None] * a)
        d_state += c[..., None] * d_y[:, :, None]
        after = decay * before + b[..., None] * driven[:, :, None]
        d_c = _product("bgne,bge->bgn", after, d_y)
        d_b = _product("bgne,bge->bgn", d_state, driven)
        d_driven = _product("bgne,bgn->bge", d_state, b)
        d_before = decay * d_state
        d_exponent = d_before * before
        d_a += d_exponent * step[:, :, None]
        return (d_before, d_a), (d_b, d_c, d_driven, _product("bgne,gne->bge", d_exponent, a))

    def retreat(carry: Any, now: Any) -> tuple[Any, Any]:
        d_state, d_a, d_skip, d_bias = carry
        first, d_out, *inputs = now
        x, delta, b, c, gate = _wide(*inputs[:5])
        rows = steps(delta, operands.delta_bias, inputs[5], options.softplus)
        driven = rows.step * x
        last, before = jax.lax.scan(token, first, (rows.step, driven, b), reverse=options.reverse)
        if gate is None:
            y = x  # of no consequence
        else:
            ends = [before[1:], last[None]] if not options.reverse else [last[None], before[:-1]]
            y = _product("tbgn,tbgne->tbge", c, jnp.concatenate(ends))
        d_y, d_gate = finish_backward(d_out.astype(jnp.float32), y, x, operands.skip, gate)
        (d_state, d_a), (d_b, d_c, d_driven, d_step) = jax.lax.scan(
            token_back, (d_state, d_a), (before, rows.step, driven, b, c, d_y), reverse=not options.reverse
        )
        d_delta = (d_step + d_driven * x) * rows.slope
        d_x = d_driven * rows.step + operands.skip * d_y
        d_skip, d_bias = d_skip + jnp.sum(d_y * x, axis=(0, 1)), d_bias + jnp.sum(d_delta, axis=(0, 1))
        wide = (d_x, d_delta, d_b, d_c, d_gate)
        narrow = [None if d is None else d.astype(i.dtype) for d, i in zip(wide, inputs[:5], strict=True)]
        return (d_state, d_a, d_skip, d_bias), narrow

    _, states = jax.lax.scan(advance, operands.state, cuts, reverse=options.reverse)
    zeros = jnp.zeros_like(operands.state), jnp.zeros_like(operands.skip), jnp.zeros_like(operands.delta_bias)
    (d_state, d_a, d_skip, d_bias), wide = jax.lax.scan(
        retreat, (d_final, *zeros), (states, _cut(d_out, length), *cuts), reverse=not options.reverse
    )
    d_x, d_delta, d_b, d_c, d_gate = (None if d is None else _join(d, time) for d in wide)
    return Operands(d_x, d_delta, d_b, d_c, d_gate, d_a.sum(0), d_skip, d_bias, d_state)  # type: ignore[arg-type]

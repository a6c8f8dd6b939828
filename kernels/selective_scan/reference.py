"""The selective scan, one token at a time: the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.selective_scan.operands import Operands, Options


def forward(operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(delta_t a) h_{t-1} + delta_t b_t x_t; out_t = (c_t . h_t + skip x_t) silu(gate_t).

    Returns:
      out (B, T, G, E) in x's dtype, and the state after the last token read, (B, G, N, E).
    """
    x, delta, b, c = (array.astype(jnp.float32) for array in operands[:4])
    delta = delta + operands.delta_bias
    if options.softplus:
        delta = jax.nn.softplus(delta)

    def token(state, inputs):
        x, delta, b, c = inputs
        decay = jnp.exp(delta[:, :, None] * operands.a)
        state = decay * state + b[..., None] * (delta * x)[:, :, None]
        return state, jnp.einsum("bgn,bgne->bge", c, state, precision="highest")

    by_time = [array.swapaxes(0, 1) for array in (x, delta, b, c)]
    state, y = jax.lax.scan(token, operands.state, by_time, reverse=options.reverse)
    out = y.swapaxes(0, 1) + operands.skip * x
    if operands.gate is not None:
        out *= jax.nn.silu(operands.gate.astype(jnp.float32))
    return out.astype(operands.x.dtype), state

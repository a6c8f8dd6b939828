"""What the implementations of the selective scan take, and the elementwise mathematics around the recurrence."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Options(NamedTuple):
    """Static."""

    softplus: bool  # of delta + delta_bias
    reverse: bool  # from the last token to the first
    chunk_size: int | None


class Operands(NamedTuple):
    """Arrays of B sequences, T tokens, G groups of E channels with states of N; the gradients have the same fields."""

    x: jax.Array  # (B, T, G, E)
    delta: jax.Array  # (B, T, G, E)
    b: jax.Array  # (B, T, G, N)
    c: jax.Array  # (B, T, G, N)
    gate: jax.Array | None  # (B, T, G, E)
    a: jax.Array  # (G, N, E) float32
    skip: jax.Array  # (G, E) float32
    delta_bias: jax.Array  # (G, E) float32
    state: jax.Array  # (B, G, N, E) float32, before the first token read


class Rows(NamedTuple):
    """What the elementwise part of a chunk leaves, of the shape of its x, float32."""

    step: jax.Array  # delta as the recurrence takes it
    slope: jax.Array  # its derivative by delta


def steps(delta: jax.Array, bias: jax.Array, exists: jax.Array | bool, softplus: bool) -> Rows:
    """Delta with its bias and softplus; 0 where there is no token, which leaves the state alone."""
    raw = delta.astype(jnp.float32) + bias
    if softplus:
        step, slope = jnp.maximum(raw, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(raw))), jax.nn.sigmoid(raw)
    else:
        step, slope = raw, jnp.ones_like(raw)
    if exists is True:
        return Rows(step, slope)
    return Rows(jnp.where(exists, step, 0.0), jnp.where(exists, slope, 0.0))


def finish(y: jax.Array, x: jax.Array, skip: jax.Array, gate: jax.Array | None) -> jax.Array:
    """(y + skip x) silu(gate), float32."""
    out = y + skip * x
    return out if gate is None else out * gate * jax.nn.sigmoid(gate)


def finish_backward(
    d_out: jax.Array, y: jax.Array, x: jax.Array, skip: jax.Array, gate: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of `finish` by (y + skip x) and by the gate."""
    if gate is None:
        return d_out, None
    opened = jax.nn.sigmoid(gate)
    d_gate = d_out * (y + skip * x) * opened * (1 + gate * (1 - opened))
    return d_out * gate * opened, d_gate

"""Attention within groups of a map in XLA's operations: groups are a batch of small matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.spanning_window.layout import Options, Pattern

# Where a map (B, Y, X, H, D) has its tokens, once both axes are cut in two: close is (group, member), remote (member,
# group). Below, (batch, groups of y, groups of x, heads, members, dim).
_ORDER: dict[Pattern, tuple[int, ...]] = {"close": (0, 1, 3, 5, 2, 4, 6), "remote": (0, 2, 4, 5, 1, 3, 6)}


def _cut(size: int, window: int, pattern: Pattern) -> tuple[int, int]:
    return (size // window, window) if pattern == "close" else (window, size // window)


def gather(x: jax.Array, window: int, pattern: Pattern) -> jax.Array:
    """(B, Y, X, H, D) to (B, groups, H, window^2, D)."""
    batch, height, width, heads, dim = x.shape
    x = x.reshape(batch, *_cut(height, window, pattern), *_cut(width, window, pattern), heads, dim)
    return x.transpose(_ORDER[pattern]).reshape(batch, -1, heads, window**2, dim)


def scatter(x: jax.Array, height: int, width: int, window: int, pattern: Pattern) -> jax.Array:
    """The inverse of `gather`."""
    batch, _, heads, _, dim = x.shape
    x = x.reshape(batch, height // window, width // window, heads, window, window, dim)
    inverse = [_ORDER[pattern].index(axis) for axis in range(7)]
    return x.transpose(inverse).reshape(batch, height, width, heads, dim)


def forward(query: jax.Array, key: jax.Array, value: jax.Array, *, options: Options) -> jax.Array:
    """See `reference.forward`."""
    height, width = query.shape[1:3]
    out = jnp.zeros((), jnp.float32)
    for pattern in options.patterns:
        q, k, v = (gather(x.astype(jnp.float32), options.window, pattern) for x in (query, key, value))
        logits = jnp.einsum("bghtd,bghsd->bghts", options.scale * q, k, precision="highest")
        weights = jax.nn.softmax(logits)
        part = jnp.einsum("bghts,bghse->bghte", weights, v, precision="highest")
        out = out + scatter(part, height, width, options.window, pattern)
    return out.astype(query.dtype)


def backward(
    query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array, *, options: Options
) -> tuple[jax.Array, ...]:
    """Gradients of query, key and value; the weights are made again."""
    return jax.vjp(lambda *arrays: forward(*arrays, options=options), query, key, value)[1](d_out)

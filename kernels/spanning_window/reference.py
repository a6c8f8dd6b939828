"""Attention within groups of a map, by masks on the whole matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.spanning_window.layout import Options, group


def forward(query: jax.Array, key: jax.Array, value: jax.Array, *, options: Options) -> jax.Array:
    """sum over patterns of softmax(scale q k^T within the pattern's groups) v, on maps (B, Y, X, H, D)."""
    height, width = query.shape[1:3]
    flat = [x.reshape(x.shape[0], height * width, *x.shape[3:]).astype(jnp.float32) for x in (query, key, value)]
    logits = options.scale * jnp.einsum("bthd,bshd->bhts", *flat[:2], precision="highest")
    y, x = jnp.divmod(jnp.arange(height * width), width)
    out = jnp.zeros((), jnp.float32)
    for pattern in options.patterns:
        rows = group(pattern, y, height // options.window, options.window)
        columns = group(pattern, x, width // options.window, options.window)
        together = (rows[:, None] == rows) & (columns[:, None] == columns)
        weights = jax.nn.softmax(jnp.where(together, logits, -jnp.inf))
        out = out + jnp.einsum("bhts,bshe->bthe", weights, flat[2], precision="highest")
    return out.reshape(*query.shape[:4], -1).astype(query.dtype)

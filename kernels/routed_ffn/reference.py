"""The definition: every row meets every weight, and keeps the product with its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _membership(sizes: jax.Array, rows: int) -> jax.Array:
    """Float32 (R, groups), 1 where a row is of a group."""
    ends = jnp.cumsum(sizes)
    row = jnp.arange(rows)[:, None]
    return ((row < ends) & (row >= ends - sizes)).astype(jnp.float32)


def product(rows: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """(R, D), (groups, D, F) -> (R, F)."""
    own = _membership(sizes, rows.shape[0])
    return jnp.einsum(
        "rg,rd,gdf->rf", own, rows.astype(jnp.float32), weight.astype(jnp.float32), precision="highest"
    ).astype(rows.dtype)


def weight_gradient(rows: jax.Array, cotangent: jax.Array, sizes: jax.Array) -> jax.Array:
    """(R, D), (R, F) -> float32 (groups, D, F)."""
    own = _membership(sizes, rows.shape[0])
    return jnp.einsum(
        "rg,rd,rf->gdf", own, rows.astype(jnp.float32), cotangent.astype(jnp.float32), precision="highest"
    )

"""The definition of the query sparsity measure: all scores, of which only the sampled ones are looked at."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def measure(query: jax.Array, key: jax.Array, sample_indices: jax.Array) -> jax.Array:
    """max_j q_l k_s(l,j) - sum_j q_l k_s(l,j) / L_K for s (L_Q, U); float32 (B, H, L_Q)."""
    scores = jnp.einsum("blhe,bmhe->bhlm", query, key, precision="highest", preferred_element_type=jnp.float32)
    sampled = jnp.take_along_axis(scores, sample_indices[None, None], axis=3)
    return sampled.max(-1) - sampled.sum(-1) / key.shape[1]

"""Linear attention, one token at a time: the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.linear_attention.features import Options, features


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    decay: jax.Array | None,
    state: tuple[jax.Array, jax.Array],
    options: Options,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """S_t = exp(g_t) S_{t-1} + phi(k_t) v_t^T, z_t likewise with 1 for v_t; out_t = S_t^T phi(q_t) [/ z_t . phi(q_t)].

    Args:
      query, key: (B, T, H, D).
      value: (B, T, H, E).
      decay: log decay (B, T, H), (B, T, H, D) or None.
      state: S (B, H, F, E) and z (B, H, F), float32.
      options: static options.

    Returns:
      out (B, T, H, E) and the state after the last token.
    """
    query, key = features(query.astype(jnp.float32), key.astype(jnp.float32), options)
    if decay is None:
        decay = jnp.zeros(query.shape[:3])
    if decay.ndim == 3:
        decay = decay[..., None]

    def token(state, inputs):
        memory, key_sum = state
        query, key, value, decay = inputs
        key_sum = jnp.exp(decay) * key_sum + key
        memory = jnp.exp(decay)[..., None] * memory + key[..., None] * value[..., None, :]
        out = jnp.einsum("bhf,bhfe->bhe", query, memory, precision="highest")
        if options.normalize:
            out /= jnp.einsum("bhf,bhf->bh", query, key_sum, precision="highest")[..., None] + options.epsilon
        return (memory, key_sum), out

    by_time = [x.astype(jnp.float32).swapaxes(0, 1) for x in (query, key, value, decay)]
    state, out = jax.lax.scan(token, state, by_time)
    return out.swapaxes(0, 1).astype(value.dtype), state

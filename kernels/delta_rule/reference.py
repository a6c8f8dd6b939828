"""The gated delta rule, one token at a time: the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    decay: jax.Array | None,
    state: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """S' = exp(g_t) S_{t-1};  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T;  out_t = scale * S_t^T q_t.

    Args:
      query, key: (B, T, H, D).
      value: (B, T, H, E).
      beta: (B, T, H).
      decay: log decay g (B, T, H), or None.
      state: S (B, H, D, E), float32.
      scale: of the output.

    Returns:
      out (B, T, H, E) and the state after the last token.
    """
    decay = jnp.zeros(beta.shape) if decay is None else decay

    def token(state, inputs):
        query, key, value, beta, decay = inputs
        state = jnp.exp(decay)[..., None, None] * state
        surprise = value - jnp.einsum("bhd,bhde->bhe", key, state, precision="highest")
        state += (beta[..., None] * key)[..., None] * surprise[..., None, :]
        return state, scale * jnp.einsum("bhd,bhde->bhe", query, state, precision="highest")

    by_time = [x.astype(jnp.float32).swapaxes(0, 1) for x in (query, key, value, beta, decay)]
    state, out = jax.lax.scan(token, state, by_time)
    return out.swapaxes(0, 1).astype(value.dtype), state

"""The delta rule, plain (DeltaNet) and gated (Gated DeltaNet)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels import recurrent
from kernels.common import Implementation, check_implementation
from kernels.delta_rule import reference
from kernels.delta_rule.chunked import Chunk


def delta_rule(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    *,
    decay: jax.Array | None = None,
    state: jax.Array | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """S_t = exp(g_t) (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T;  out_t = scale * S_t^T q_t.

    A step of gradient descent on |S^T k_t - v_t|^2 / 2 for each token: DeltaNet (Schlag et al. 2021; Yang et al. 2024),
    with a decay Gated DeltaNet (Yang et al. 2025). Keys are used as they come. The recurrence is stable where
    beta_t |k_t|^2 <= 2, so callers normalise keys to length 1 (and queries, by custom) beforehand.

    Args:
      query: (batch, time, heads, D).
      key: (batch, time, key_heads, D); `heads` is a multiple of `key_heads`, consecutive query heads share one.
      value: (batch, time, key_heads, E).
      beta: (batch, time, heads), float: the size of the step.
      decay: log decay g <= 0, float (batch, time, heads), of the state before the step. Anything below -120 is a reset.
      state: (batch, heads, D, E): what an earlier call returned; None is an empty past. Differentiable.
      scale: of the output, default D ** -0.5.
      chunk_size: a power of 2 of at least 16, no part of the result; None leaves it to the platform.
      implementation: "reference", "chunked", "tpu", "gpu", or None for the platform compiled for.

    Returns:
      out (batch, time, heads, E) in the inputs' dtype, and the state after the last token, float32.

    Raises:
      ValueError, TypeError: an argument's shape, dtype or range is wrong.
    """
    check_implementation(implementation)
    recurrent.check_recurrent_heads(query, key, value)
    recurrent.check_chunk_size(chunk_size)
    batch, time, heads, width = query.shape
    scale = width**-0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    recurrent.check_array("beta", beta, (batch, time, heads))
    if decay is not None:
        recurrent.check_array("decay", decay, (batch, time, heads))
        decay = decay.astype(jnp.float32)
    shape = (batch, heads, width, value.shape[3])
    if state is None:
        state = jnp.zeros(shape)
    recurrent.check_array("state", state, shape)
    beta, state = beta.astype(jnp.float32), state.astype(jnp.float32)
    if implementation == "reference":  # the definition is differentiated by JAX itself
        key, value = recurrent.repeat_heads(key, heads), recurrent.repeat_heads(value, heads)
        return reference.forward(query, key, value, beta, decay, state, float(scale))
    inputs = {"query": query, "key": key, "value": value, "beta": beta}
    if decay is not None:
        inputs["decay"] = decay
    out, (memory,) = recurrent.run(inputs, (state.swapaxes(2, 3),), Chunk(float(scale)), chunk_size, implementation)
    return out, memory.swapaxes(2, 3)

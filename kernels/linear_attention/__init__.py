"""Causal linear attention with scalar, per-channel or no decay, normalised or not, and its feature maps."""

from __future__ import annotations

from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp

from kernels import recurrent
from kernels.common import Implementation, check_implementation
from kernels.linear_attention import reference
from kernels.linear_attention.chunked import Chunk
from kernels.linear_attention.features import FeatureMap, Options, feature_size, taylor_features

__all__ = ["FeatureMap", "LinearAttentionState", "feature_size", "linear_attention", "taylor_features"]


class LinearAttentionState(NamedTuple):
    """What the past leaves: float32, of the features F of a key (`feature_size`)."""

    memory: jax.Array  # (B, H, F, E): sum of phi(key) value^T, decayed
    key_sum: jax.Array  # (B, H, F): sum of phi(key), decayed


def linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    decay: jax.Array | None = None,
    state: LinearAttentionState | None = None,
    feature_map: FeatureMap = "identity",
    normalize: bool = False,
    epsilon: float = 1e-6,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, LinearAttentionState]:
    """out_t = scale * sum_{s<=t} (phi(q_t) . exp(g_{s+1} + ... + g_t) phi(k_s)) v_s, over its own sum without v.

    Linear attention (Katharopoulos et al. 2020); with a decay: one constant per head is RetNet (Sun et al. 2023), one
    number per head and token Mamba-2's SSD (Dao and Gu 2024), one per channel GLA (Yang et al. 2024); with
    `feature_map="taylor"` and `normalize` Based (Arora et al. 2024), whose features no implementation but "reference"
    ever writes to memory for each token.

    Args:
      query: (batch, time, heads, D).
      key: (batch, time, key_heads, D); `heads` is a multiple of `key_heads`, consecutive query heads share one.
      value: (batch, time, key_heads, E).
      decay: log decay g <= 0, float: (batch, time, heads) or, for pointwise feature maps, (batch, time, heads, D). It
        acts on the state before the token is added: S_t = exp(g_t) S_{t-1} + phi(k_t) v_t^T. Anything below -120 is a
        reset, -inf included.
      state: what an earlier call returned; None is an empty past. Differentiable.
      feature_map: phi: "identity", "elu" (elu(x) + 1), "relu", or "taylor", for which phi(q) . phi(k) = 1 + s + s^2 / 2
        with s = scale * q . k.
      normalize: divide by the sum of the weights, plus `epsilon`.
      epsilon: see there.
      scale: default D ** -0.5. Except in Taylor's map a factor of the output, and then without effect (other than on
        epsilon) where `normalize`.
      chunk_size: a power of 2 of at least 16, no part of the result; None leaves it to the platform.
      implementation: "reference", "chunked", "tpu", "gpu", or None for the platform compiled for.

    Returns:
      out (batch, time, heads, E) in the inputs' dtype, and the state after the last token.

    Raises:
      ValueError, TypeError: an argument's shape, dtype or range is wrong.
    """
    check_implementation(implementation)
    recurrent.check_recurrent_heads(query, key, value)
    recurrent.check_chunk_size(chunk_size)
    batch, time, heads, width = query.shape
    if feature_map not in get_args(FeatureMap):
        raise ValueError(f"feature_map must be one of {get_args(FeatureMap)}, got {feature_map!r}")
    if scale is None:
        scale = width**-0.5
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    if decay is not None:
        shapes: list[tuple[int, ...]] = [(batch, time, heads)]
        if feature_map != "taylor":
            shapes.append((batch, time, heads, width))
        recurrent.check_array("decay", decay, *shapes)
        decay = decay.astype(jnp.float32)
    size = feature_size(feature_map, width)
    memory_shape = (batch, heads, size, value.shape[3])
    if state is None:
        state = LinearAttentionState(jnp.zeros(memory_shape), jnp.zeros(memory_shape[:3]))
    recurrent.check_array("state.memory", state.memory, memory_shape)
    recurrent.check_array("state.key_sum", state.key_sum, memory_shape[:3])
    memory, key_sum = (x.astype(jnp.float32) for x in state)
    options = Options(float(scale), feature_map, bool(normalize), float(epsilon))
    if implementation == "reference":  # the definition is differentiated by JAX itself
        key, value = recurrent.repeat_heads(key, heads), recurrent.repeat_heads(value, heads)
        out, final = reference.forward(query, key, value, decay, (memory, key_sum), options)
        return out, LinearAttentionState(*final)
    inputs = {"query": query, "key": key, "value": value}
    if decay is not None:
        inputs["decay" if decay.ndim == 3 else "channel_decay"] = decay
    out, (memory, key_sum) = recurrent.run(
        inputs, (memory.swapaxes(2, 3), key_sum[:, :, None]), Chunk(options, width), chunk_size, implementation
    )
    return out, LinearAttentionState(memory.swapaxes(2, 3), key_sum[:, :, 0])

"""Feature maps phi, with phi(q) . phi(k) in place of exp(q . k)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels.recurrent.tile import Arithmetic, places, product

FeatureMap = Literal["identity", "elu", "relu", "taylor"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known at trace time (hashable)."""

    scale: float
    feature_map: FeatureMap = "identity"
    normalize: bool = False
    epsilon: float = 1e-6


def feature_size(feature_map: FeatureMap, width: int) -> int:
    """Rows of the state: the features of `width` channels."""
    return 1 + width + width * (width + 1) // 2 if feature_map == "taylor" else width


def pointwise(x: jax.Array, feature_map: FeatureMap) -> jax.Array:
    """The maps that act on each channel alone: elu(x) + 1 (Katharopoulos et al. 2020), relu, or x itself."""
    if feature_map == "elu":
        return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))
    return jnp.maximum(x, 0) if feature_map == "relu" else x


def features(query: jax.Array, key: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """phi of queries and keys (..., D) -> (..., F). `scale` is inside Taylor's map and outside of every other."""
    if options.feature_map == "taylor":
        root = math.sqrt(options.scale)
        return taylor_features(root * query), taylor_features(root * key)
    return options.scale * pointwise(query, options.feature_map), pointwise(key, options.feature_map)


def taylor_features(x: jax.Array, *, packed: bool = True) -> jax.Array:
    """phi with phi(x) . phi(y) = 1 + s + s^2 / 2 for s = x . y (Arora et al. 2024, "Based", section 4.1).

    Args:
      x: (..., D), already scaled: by D ** -0.25 for Based's s = q . k / sqrt(D).
      packed: x_a x_b for a <= b only, sqrt(2) times as large off the diagonal; else for all a, b, row by row.

    Returns:
      (..., 1 + D + D (D + 1) / 2), or (..., 1 + D + D^2) where not packed.
    """
    width = x.shape[-1]
    if packed:
        first, second = np.triu_indices(width)
        squares = x[..., first] * x[..., second] * np.where(first == second, math.sqrt(0.5), 1.0).astype(np.float32)
    else:
        squares = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], width * width) * math.sqrt(0.5)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, squares], axis=-1)


def taylor_tile(x: jax.Array, scale: float, width: int, size: int, arithmetic: Arithmetic) -> jax.Array:
    """`taylor_features` of sqrt(scale) x, a matrix (time, width or more), padded to (time, size), without a gather.

    Every feature is a product of two factors, each a channel or 1; two products with matrices of 0 and 1 fetch them,
    exactly where x is of the arithmetic's dtype.
    """
    channel, feature = places(x.shape[1], size)
    pair = feature - (1 + width)
    start = channel * width - ((channel * (channel - 1)) >> 1)  # of the pairs (a, a), (a, a + 1), ...
    in_run = (channel < width) & (pair >= start) & (pair < start + width - channel)
    # Each feature's first channel, and how far the second lies beyond it: sums with one term, or none.
    first = jnp.sum(jnp.where(in_run, channel, 0), axis=0, keepdims=True)
    beyond = jnp.sum(jnp.where(in_run, pair - start, 0), axis=0, keepdims=True)
    place = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    is_pair = (place > width) & (place < feature_size("taylor", width))
    linear = (channel < width) & (channel == feature - 1)

    def fetch(mask: jax.Array) -> jax.Array:
        return product(x, mask.astype(jnp.float32), (1, 0), arithmetic)

    left = fetch(in_run | linear) + (place == 0).astype(jnp.float32)
    right = fetch(is_pair & (channel == first + beyond)) + (place <= width).astype(jnp.float32)
    of_pair = jnp.where(beyond == 0, scale * math.sqrt(0.5), scale)
    weight = jnp.where(is_pair, of_pair, jnp.where(place == 0, 1.0, math.sqrt(scale)))
    return left * right * weight

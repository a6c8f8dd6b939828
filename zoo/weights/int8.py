"""Weights of 8 bits: a matrix is kept as integers with a scale for each output feature."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Int8:
    """values * scale, in place of a float array."""

    values: jax.Array  # int8
    scale: jax.Array  # float32, 1 in all axes but the scales'
    dtype: Any = flax.struct.field(pytree_node=False, default=jnp.float32)


def quantize_int8(variables: Any) -> Any:
    """Variables with every matrix (two axes or more) as `Int8`, at a quarter of float32's memory while they are kept.

    A program that computes with them multiplies them out first, and while it runs needs a float copy as well.

    A kernel has one scale for each output feature, an embedding one for each row: the largest magnitude is 127.
    """

    def quantize(path: tuple, leaf: jax.Array) -> Any:
        if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        axes = (leaf.ndim - 1,) if getattr(path[-1], "key", None) == "embedding" else tuple(range(leaf.ndim - 1))
        wide = leaf.astype(jnp.float32)
        scale = jnp.max(jnp.abs(wide), axis=axes, keepdims=True) / 127
        values = jnp.round(wide / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
        return Int8(values, scale, leaf.dtype)

    return jax.tree.map_with_path(quantize, nn.meta.unbox(variables))


def dequantize(variables: Any) -> Any:
    """Variables with every `Int8` as a float array again; what is none stays as it is."""

    def restore(leaf: Any) -> Any:
        return (leaf.values * leaf.scale).astype(leaf.dtype) if isinstance(leaf, Int8) else leaf

    return jax.tree.map(restore, variables, is_leaf=lambda leaf: isinstance(leaf, Int8))

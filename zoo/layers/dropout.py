"""Dropout whose mask costs no memory."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.common import hash_uniform


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) with a mask that is a hash of an element's indices.

    `nn.Dropout` makes its random bits as an array, which on a CPU takes a tenth of a small transformer's training step;
    a hash is computed where it is used. The mask is a function of the key of the rng collection "dropout", the same on
    any mesh.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """In training, zeroes elements of x (any shape) with probability `rate`, scales the others by 1 / (1 - rate).

        Raises ValueError for a rate outside [0, 1).
        """
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"rate must be in [0, 1), got {self.rate}")
        if not train or self.rate == 0.0:
            return x
        seed = jax.random.bits(self.make_rng("dropout"), dtype=jnp.uint32)
        # The element's index, and not a coordinate an axis: one round of hashing is cheap to compute, and to compile.
        strides = [math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim)]
        index = sum(
            jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
            for axis, stride in enumerate(strides)
        )
        return jnp.where(hash_uniform(seed, jnp.asarray(index)) >= self.rate, x / (1 - self.rate), 0)

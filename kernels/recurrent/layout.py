"""What the loops over chunks share: the protocol of a core, and how time is cut."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

from kernels.recurrent.tile import Arithmetic

Inputs = dict[str, jax.Array]
State = tuple[jax.Array, ...]


class Chunk(Protocol):
    """A core's function of one chunk. Hashable and equal by value, as it is static under `jax.jit`."""

    @property
    def name(self) -> str:
        """Of the core; its kernels are called `<name>_tpu_forward` and so on."""
        ...

    @property
    def value_states(self) -> tuple[bool, ...]:
        """For each array of the state, whether its rows are channels of the value, each computed from its own alone."""
        ...

    def __call__(
        self, state: State, inputs: Inputs, tokens: jax.Array | None, arithmetic: Arithmetic
    ) -> tuple[State, jax.Array]:
        """From float32 matrices to float32 matrices.

        Args:
          state: before the chunk.
          inputs: of its tokens.
          tokens: how many of them exist, the others' inputs are zeros; None for all.
          arithmetic: of large products.
        """
        ...


def chunk_length(time: int, chunk_size: int, least: int) -> int:
    """Tokens of a chunk: fewer than `chunk_size` where there are fewer tokens, so that decoding is cheap."""
    return min(chunk_size, max(least, 1 << (time - 1).bit_length()))


def pad_time(array: jax.Array, length: int) -> jax.Array:
    """(B, T, ...) with zeros up to a multiple of `length`."""
    missing = -array.shape[1] % length
    return jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2)) if missing else array


def count_tokens(time: int, length: int, chunk: jax.Array) -> jax.Array | None:
    """How many tokens the chunk of that index has; None where all chunks are full."""
    return None if time % length == 0 else jnp.minimum(time - chunk * length, length)


def repeat_heads(array: jax.Array, heads: int) -> jax.Array:
    """(B, T, G, ...) -> (B, T, heads, ...): head h is what head h // (heads // G) was."""
    return array if array.shape[2] == heads else jnp.repeat(array, heads // array.shape[2], axis=2)


def sum_heads(array: jax.Array, heads: int) -> jax.Array:
    """The transpose of `repeat_heads`: (B, T, H, ...) -> (B, T, heads, ...)."""
    if array.shape[2] == heads:
        return array
    grouped = array.reshape(*array.shape[:2], heads, -1, *array.shape[3:])
    return grouped.astype(jnp.float32).sum(3).astype(array.dtype)

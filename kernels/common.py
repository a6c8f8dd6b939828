"""What every core shares: choosing an implementation, sizes of blocks, dropout that all implementations agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

Implementation = Literal["reference", "chunked", "tpu", "gpu"]
NEGATIVE_INFINITY = float(jnp.finfo(jnp.float32).min) * 0.5  # finite, so that differences of two are 0 and not NaN


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for a name that is not an implementation."""
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(f"implementation must be None or one of {get_args(Implementation)}, got {implementation!r}")


def by_platform(
    implementations: Mapping[str, Callable[..., Any]], implementation: Implementation | None, *operands: Any
) -> Any:
    """Calls the implementation named, or the one that belongs to the platform being compiled for.

    Args:
      implementations: functions of the same operands and outputs. "tpu" and "gpu" take a keyword `interpret`.
      implementation: a name insists; a Pallas kernel named on a foreign platform is interpreted there. None chooses
        at lowering, never by the host's devices: a program compiled ahead of time for a TPU holds the TPU kernel.
      *operands: pytrees of arrays.
    """
    if implementation is None:
        return jax.lax.platform_dependent(
            *operands,
            tpu=partial(implementations["tpu"], interpret=False),
            cuda=partial(implementations["gpu"], interpret=False),
            default=implementations["chunked"],
        )
    function = implementations[implementation]
    if implementation in ("reference", "chunked"):
        return function(*operands)
    platform = "tpu" if implementation == "tpu" else "cuda"
    return jax.lax.platform_dependent(
        *operands, **{platform: partial(function, interpret=False)}, default=partial(function, interpret=True)
    )


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def hash_uniform(seed: jax.Array, *coordinates: jax.Array) -> jax.Array:
    """Uniform float32 in [0, 1) as a pure function of integer coordinates: the same in every implementation.

    A counter-based hash (the finaliser of MurmurHash3, once a coordinate) of uint32 words, so that a kernel can make
    any tile of a dropout mask in registers and its backward pass can make it again.

    Args:
      seed: uint32 scalar.
      *coordinates: integer arrays that broadcast together. For attention: the head (batch and head counted as one), the
        query and the key.
    """

    def mix(word: jax.Array) -> jax.Array:
        word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
        word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
        return word ^ (word >> 16)

    word = mix(jnp.asarray(seed, jnp.uint32) + jnp.uint32(0x9E3779B9))
    for coordinate in coordinates:
        word = mix(word ^ (coordinate.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)))
    # 24 bits through int32: TPU and Triton convert signed integers only.
    return (word >> 8).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2**-24)

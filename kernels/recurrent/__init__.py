"""Recurrent cores: a state that each token reads and changes, computed a chunk of tokens at a time.

A core writes one function, its `Chunk`: from the state before some tokens and their inputs to the state after them and
their outputs, on plain matrices (`tile` has the mathematics). The loop over chunks is written once for XLA, TPU and
GPU; so is the backward pass, which computes the states between chunks again and differentiates the chunk where it runs,
inside the kernel on TPU and GPU. Between the passes nothing is kept but the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.common import Implementation, by_platform, check_heads, head_shards, repeat_for_shards
from kernels.recurrent import chunked, gpu, tpu
from kernels.recurrent.layout import Chunk, Inputs, State, repeat_heads

__all__ = [
    "Chunk",
    "Inputs",
    "State",
    "check_array",
    "check_chunk_size",
    "check_recurrent_heads",
    "repeat_heads",
    "run",
]

_FORWARD: dict[str, Callable[..., Any]] = {"chunked": chunked.forward, "tpu": tpu.forward, "gpu": gpu.forward}
_BACKWARD: dict[str, Callable[..., Any]] = {"chunked": chunked.backward, "tpu": tpu.backward, "gpu": gpu.backward}


def _by_platform(
    functions: dict[str, Callable[..., Any]], chunk: Chunk, chunk_size: int | None,
    implementation: Implementation | None, inputs: Inputs, state: State, *operands: Any, axes: Any, out_axes: Any,
) -> Any:  # fmt: skip
    functions = {name: partial(f, chunk=chunk, chunk_size=chunk_size) for name, f in functions.items()}
    if implementation is None and not gpu.fits(state, chunk):
        plain = functions["chunked"]  # a kernel would spill its registers to memory at every chunk
        functions["gpu"] = lambda *operands, interpret: plain(*operands)
    return by_platform(functions, implementation, inputs, state, *operands, axes=axes, out_axes=out_axes)


def run(
    inputs: Inputs, state: State, chunk: Chunk, chunk_size: int | None, implementation: Implementation | None
) -> tuple[jax.Array, State]:
    """Runs a core over time.

    Args:
      inputs: by name. "value" (B, T, G, E) gives the outputs' width and dtype, "query" (B, T, H, D) the heads; others
        are (B, T, H or a divisor, width), or a number a token and head, (B, T, H) float32.
      state: arrays (B, H, rows, columns) float32.
      chunk: the core.
      chunk_size: tokens of a chunk, a power of 2, at least 16; None leaves it to the platform.
      implementation: as for `kernels.common.by_platform`, without "reference". None is "chunked" on a GPU where a
        state that cannot be cut along the value's channels does not fit a program's registers.

    Returns:
      out (B, T, H, E) and the state after the last token.
    """
    heads, shards = inputs["query"].shape[2], head_shards(inputs, state)
    inputs = {name: repeat_for_shards(array, heads, shards) for name, array in inputs.items()}
    return _jitted(inputs, state, chunk, chunk_size, implementation)


_OUT_AXES = "b.h."
_STATE_AXES = "bh.."


def _axes(inputs: Inputs) -> dict[str, str]:
    """Letters as of `kernels.common.by_platform`. A key head that all heads share is whole on every device."""
    return {name: f"b.{'.' if x.shape[2] == 1 else 'h'}" + "." * (x.ndim - 3) for name, x in inputs.items()}


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _run(
    inputs: Inputs, state: State, chunk: Chunk, chunk_size: int | None, implementation: Implementation | None
) -> tuple[jax.Array, State]:
    state_axes = (_STATE_AXES,) * len(state)
    return _by_platform(
        _FORWARD, chunk, chunk_size, implementation, inputs, state,
        axes=(_axes(inputs), state_axes), out_axes=(_OUT_AXES, state_axes),
    )  # fmt: skip


def _forward(
    inputs: Inputs, state: State, chunk: Chunk, chunk_size: int | None, implementation: Implementation | None
) -> tuple[tuple[jax.Array, State], tuple[Inputs, State]]:
    return _run(inputs, state, chunk, chunk_size, implementation), (inputs, state)


def _backward(
    chunk: Chunk,
    chunk_size: int | None,
    implementation: Implementation | None,
    residuals: tuple[Inputs, State],
    cotangents: tuple[jax.Array, State],
) -> tuple[Inputs, State]:
    inputs, state = residuals
    state_axes = (_STATE_AXES,) * len(state)
    return _by_platform(
        _BACKWARD, chunk, chunk_size, implementation, inputs, state, *cotangents,
        axes=(_axes(inputs), state_axes, _OUT_AXES, state_axes), out_axes=(_axes(inputs), state_axes),
    )  # fmt: skip


_run.defvjp(_forward, _backward)
# Within a program too: a network's layers then trace every platform's kernel once, not each.
_jitted = jax.jit(_run, static_argnums=(2, 3, 4))


# ------------------------------------------------------------------------------------------------ checks at the door


def check_recurrent_heads(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    """Raises ValueError or TypeError, with the shape and what was expected."""
    check_heads(query, key, value)
    if key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3]:
        raise ValueError(f"query and key must agree in batch, time and dim, got {query.shape} and {key.shape}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"key and value must agree in batch, time and heads, got {key.shape} and {value.shape}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"query heads ({query.shape[2]}) must be a multiple of key/value heads ({key.shape[2]})")


def check_array(name: str, array: jax.Array, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError for another shape, TypeError for a dtype that is not floating point."""
    if array.shape not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {array.shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {array.dtype}")


def check_chunk_size(chunk_size: int | None) -> None:
    """Raises ValueError unless it is None or a power of 2 and at least 16."""
    if chunk_size is None:
        return
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of 2 and at least 16, got {chunk_size}")

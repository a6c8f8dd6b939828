"""The selective scan S6 of Mamba (Gu and Dao 2023, arXiv 2312.00752), its discretisation, skip and gate fused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.common import Implementation, by_platform, check_implementation
from kernels.recurrent import check_array, check_chunk_size
from kernels.selective_scan import chunked, gpu, reference, tpu
from kernels.selective_scan.operands import Operands, Options

__all__ = ["selective_scan"]

_FORWARD: dict[str, Callable[..., Any]] = {"chunked": chunked.forward, "tpu": tpu.forward, "gpu": gpu.forward}
_BACKWARD: dict[str, Callable[..., Any]] = {"chunked": chunked.backward, "tpu": tpu.backward, "gpu": gpu.backward}


def selective_scan(
    x: jax.Array,
    delta: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    skip: jax.Array | None = None,
    gate: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    softplus: bool = False,
    state: jax.Array | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(delta_t a) h_{t-1} + delta_t b_t x_t; out_t = (c_t . h_t + skip x_t) silu(gate_t).

    Every channel has a state h of N numbers that decay at rates of their own; the channels of a group share b and c.
    Where a is one number a head, this is `linear_attention` with decay delta a, value delta x, key b and query c, which
    is the faster form (Mamba-2's SSD). No implementation writes the states of all tokens to memory; beside the inputs
    the gradient needs them once a chunk.

    Args:
      x: (batch, time, groups, channels), float: the input u.
      delta: like x, float of any dtype: the step.
      a: (groups, channels, N), not positive (exp(delta a) would grow): A of the paper, -exp(A_log).
      b: (batch, time, groups, N), x's dtype: the input's weight in the state.
      c: like b: the read-out.
      skip: (groups, channels): D of the paper; None is no skip.
      gate: like x: z of Mamba's block; None is no gate.
      delta_bias: (groups, channels), added to delta.
      softplus: apply it to delta and its bias.
      state: (batch, groups, channels, N), what an earlier call returned; None is an empty past. Differentiable.
      reverse: from the last token to the first: the state is that after the tokens, and what comes back is that before.
      chunk_size: a power of 2 of at least 16, no part of the result; None leaves it to the platform, as on GPUs always.
      implementation: "reference", "chunked", "tpu", "gpu", or None for the platform compiled for.

    Returns:
      out like x, and the state after the last token read, float32.

    Raises:
      ValueError, TypeError: an argument's shape or dtype is wrong.
    """
    check_implementation(implementation)
    check_chunk_size(chunk_size)
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must be (batch, time, groups, channels) and not empty, got {x.shape}")
    batch, _, groups, channels = x.shape
    if a.ndim != 3 or a.shape[:2] != (groups, channels) or a.shape[2] == 0:
        raise ValueError(f"a must be (groups, channels, N) = ({groups}, {channels}, N >= 1), got {a.shape}")
    size = a.shape[2]
    check_array("x", x, x.shape)
    check_array("delta", delta, x.shape)
    check_array("a", a, a.shape)
    for name, array, shape in (("b", b, (*x.shape[:3], size)), ("c", c, (*x.shape[:3], size)), ("gate", gate, x.shape)):
        if array is not None:
            check_array(name, array, shape)
            if array.dtype != x.dtype:
                raise TypeError(f"{name} must have x's dtype, {x.dtype}, got {array.dtype}")
    vectors = []
    for name, array in (("skip", skip), ("delta_bias", delta_bias)):
        vectors.append(jnp.zeros((groups, channels)) if array is None else array)
        check_array(name, vectors[-1], (groups, channels))
    if state is None:
        state = jnp.zeros((batch, groups, channels, size))
    check_array("state", state, (batch, groups, channels, size))
    wide_skip, wide_bias = (vector.astype(jnp.float32) for vector in vectors)
    operands = Operands(
        x, delta, b, c, gate, a.astype(jnp.float32).swapaxes(1, 2), wide_skip, wide_bias,
        state.astype(jnp.float32).swapaxes(2, 3),
    )  # fmt: skip
    options = Options(bool(softplus), bool(reverse), chunk_size)
    if implementation == "reference":  # the definition is differentiated by JAX itself
        out, final = reference.forward(operands, options)
    else:
        out, final = _jitted(operands, options, implementation)
    return out, final.swapaxes(2, 3)


def _axes(operands: Operands) -> Any:
    """Letters as of `kernels.common.by_platform`: a mesh cuts the groups, or the channels of a single one."""
    group, channel = (".", "h") if operands.x.shape[2] == 1 else ("h", ".")
    rows, shared, vector = f"b.{group}{channel}", f"b.{group}.", f"{group}{channel}"
    gate = None if operands.gate is None else rows
    letters: Any = (rows, rows, shared, shared, gate, f"{group}.{channel}", vector, vector, f"b{group}.{channel}")
    return Operands(*letters)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _scan(operands: Operands, options: Options, implementation: Implementation | None) -> tuple[jax.Array, jax.Array]:
    axes = _axes(operands)
    return by_platform(
        {name: partial(function, options=options) for name, function in _FORWARD.items()},
        implementation, operands, axes=(axes,), out_axes=(axes.x, axes.state),
    )  # fmt: skip


def _forward(
    operands: Operands, options: Options, implementation: Implementation | None
) -> tuple[tuple[jax.Array, jax.Array], Operands]:
    return _scan(operands, options, implementation), operands


def _backward(
    options: Options,
    implementation: Implementation | None,
    operands: Operands,
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[Operands]:
    axes = _axes(operands)
    gradients = by_platform(
        {name: partial(function, options=options) for name, function in _BACKWARD.items()},
        implementation, operands, *cotangents, axes=(axes, axes.x, axes.state), out_axes=axes,
    )  # fmt: skip
    return (gradients,)


_scan.defvjp(_forward, _backward)
# Within a program too: a network's layers then trace every platform's kernel once, not each.
_jitted = jax.jit(_scan, static_argnums=(1, 2))

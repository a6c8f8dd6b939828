"""Contextual attention: additive scores of tokens under a context, whose weights pool the tokens.

    u_th = tanh(x_t W_h + c_h), l_th = u_th . v_h, a_h = softmax_t(l_th), o_h = sum_t a_th x_t

Additive attention (Bahdanau et al. 2015) with the query of PaccMann (Manica et al. 2019, arXiv 1904.11223, eq. 1 to 3):
the hidden layer is made a block of tokens at a time and never kept, T H A numbers a sequence otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.common import Implementation, by_platform, check_implementation
from kernels.contextual_attention import chunked, gpu, reference, tpu
from kernels.contextual_attention.operands import AXES, OUT_AXES, Operands, check

_FORWARD: Mapping[str, Callable[..., Any]] = {
    "chunked": chunked.forward,
    "tpu": tpu.forward,
    "gpu": gpu.forward,
}
# The gradient is XLA's everywhere, in blocks of tokens too.
_BACKWARD: Mapping[str, Callable[..., Any]] = {
    "chunked": chunked.backward,
    "tpu": lambda *operands, interpret: chunked.backward(*operands),
    "gpu": lambda *operands, interpret: chunked.backward(*operands),
}


def contextual_attention(
    tokens: jax.Array,
    weight: jax.Array,
    context: jax.Array,
    score: jax.Array,
    *,
    valid: jax.Array | None = None,
    temperature: float = 1.0,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Pools tokens by H heads' additive attention.

    Args:
      tokens: x, float (batch, time, width).
      weight: W, (heads, width, hidden).
      context: c, (batch, 1 or time, heads, hidden); biases of the hidden layer are part of it.
      score: v, (heads, hidden).
      valid: bool (batch, time); tokens that are not take no part. None: all do.
      temperature: divides the scores.
      implementation: "reference", "chunked", "tpu", "gpu", or None for the platform compiled for.

    Returns:
      pooled (batch, heads, width) in the tokens' dtype, and the weights, float32 (batch, time, heads). Both are zero
      where no token is valid.

    Raises:
      ValueError, TypeError: an argument's shape, dtype or range is wrong.
    """
    check_implementation(implementation)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if valid is None and tokens.ndim == 3:
        valid = jnp.ones(tokens.shape[:2], bool)
    operands = Operands(tokens, weight, context, score / temperature, valid)
    check(operands)
    if implementation == "reference":  # the definition is differentiated by JAX itself
        pooled, logits = reference.forward(operands)
    else:
        pooled, logits = _jitted(operands, implementation)
    weights = jax.nn.softmax(logits, axis=1)
    return pooled, jnp.where(operands.valid[:, :, None], weights, 0)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(operands: Operands, implementation: Implementation | None) -> tuple[jax.Array, jax.Array]:
    return by_platform(_FORWARD, implementation, operands, axes=(AXES,), out_axes=OUT_AXES)


def _forward(operands: Operands, implementation: Implementation | None) -> tuple[Any, Any]:
    pooled, logits = _attend(operands, implementation)
    return (pooled, logits), (operands, pooled, logits)


def _backward(implementation: Implementation | None, residuals: Any, cotangents: Any) -> tuple[Operands]:
    gradients: tuple[Any, ...] = by_platform(
        _BACKWARD, implementation, *residuals, *cotangents,
        axes=(AXES, *OUT_AXES, *OUT_AXES), out_axes=tuple(AXES[:4]),
    )  # fmt: skip
    tokens, weight, context, score = gradients
    return (Operands(tokens, weight, context, score, None),)


_attend.defvjp(_forward, _backward)
# Called outside a program too, every layer of the same shapes finds one compiled.
_jitted = jax.jit(_attend, static_argnums=1)

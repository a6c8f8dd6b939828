"""What a memory is trained for: the attentional biases of Miras (Behrouz et al. 2025, section 4 and 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

_SMALL = 1e-6
_SHARPNESS = 10.0  # of the smooth sign; the paper gives no number


def smooth_sign(x: jax.Array) -> jax.Array:
    """tanh(10 x), with which training goes through signs."""
    return jnp.tanh(_SHARPNESS * x)


def smooth_absolute(x: jax.Array) -> jax.Array:
    """sqrt(x^2 + 1e-6)."""
    return jnp.sqrt(x * x + _SMALL)


def _length(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _SMALL)


Bias = Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array]  # (prediction, target, delta, p)


def _huber(absolute: jax.Array, delta: jax.Array, linear: jax.Array) -> jax.Array:
    """Of a non-negative residual: quadratic up to delta, then delta times what grows linearly, less delta^2 / 2."""
    return jnp.where(absolute <= delta, absolute**2 / 2, delta * linear - delta**2 / 2)


# Residuals r = prediction - target. Each entry: the loss (...,), and its gradient by the prediction (..., D).
LOSSES: Mapping[str, Bias] = {
    "dot": lambda y, v, delta, p: -jnp.sum(y * v, axis=-1),
    "l2": lambda y, v, delta, p: jnp.sum((y - v) ** 2, axis=-1) / 2,
    "lp": lambda y, v, delta, p: jnp.sum(smooth_absolute(y - v) ** p, axis=-1),
    "huber_coord": lambda y, v, delta, p: jnp.sum(_huber(jnp.abs(y - v), delta, jnp.abs(y - v)), axis=-1),
    "huber_l2": lambda y, v, delta, p: _huber(_length(y - v), delta, _length(y - v))[..., 0],
    "huber_mix": lambda y, v, delta, p: _huber(_length(y - v), delta, jnp.sum(jnp.abs(y - v), axis=-1, keepdims=True))[
        ..., 0
    ],
    "robust": lambda y, v, delta, p: (
        jnp.sum((y - v) ** 2, axis=-1) / 2 + (delta * _length(y - v) + delta**2 / 2)[..., 0]
    ),
}
GRADIENTS: Mapping[str, Bias] = {
    "dot": lambda y, v, delta, p: -v,
    "l2": lambda y, v, delta, p: y - v,
    "lp": lambda y, v, delta, p: p * smooth_sign(y - v) * smooth_absolute(y - v) ** (p - 1),
    "huber_coord": lambda y, v, delta, p: jnp.where(jnp.abs(y - v) <= delta, y - v, delta * smooth_sign(y - v)),
    "huber_l2": lambda y, v, delta, p: jnp.where(_length(y - v) <= delta, y - v, delta * (y - v) / _length(y - v)),
    "huber_mix": lambda y, v, delta, p: jnp.where(_length(y - v) <= delta, y - v, delta * smooth_sign(y - v)),
    "robust": lambda y, v, delta, p: y - v + delta * (y - v) / _length(y - v),
}


def attentional_bias(
    name: str, prediction: jax.Array, target: jax.Array, *, delta: jax.Array | float = 1.0, p: float = 3.0
) -> tuple[jax.Array, jax.Array]:
    """A loss of a memory's answer, and its gradient by the answer, with the paper's smooth signs and absolutes.

    With r = prediction - target: "dot" -<prediction, target>; "l2" |r|^2 / 2; "lp" sum |r|^p; "huber_coord" Huber's of
    each channel; "huber_l2" of |r|; "huber_mix" (Yaad) |r|^2 / 2 where |r| <= delta, beyond it delta |r|_1; "robust"
    against values that shift by up to delta, |r|^2 / 2 + delta |r| + delta^2 / 2.

    Args:
      name: of the bias.
      prediction, target: float (..., D).
      delta: threshold or shift, broadcasts to (..., 1).
      p: of "lp", a real number of at least 1.

    Returns:
      Loss (...,) and gradient (..., D).

    Raises:
      ValueError: the name is unknown, p below 1.
    """
    check_bias(name, p)
    delta = jnp.asarray(delta)
    return LOSSES[name](prediction, target, delta, p), GRADIENTS[name](prediction, target, delta, p)


def check_bias(name: str, p: float) -> None:
    """Raises ValueError for an unknown bias, or a p below 1."""
    if name not in GRADIENTS:
        raise ValueError(f"bias must be one of {sorted(GRADIENTS)}, got {name!r}")
    if not p >= 1:
        raise ValueError(f"p must be at least 1, got {p}")

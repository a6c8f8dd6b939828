"""A network trained while it reads, one token at a time: the definition."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

NORM_EPSILON = 1e-6
Weights = tuple[jax.Array, ...]


def read(weights: Weights, norm: tuple[jax.Array, jax.Array] | None, x: jax.Array) -> jax.Array:
    """M(x) = x + LN(W_L gelu(... gelu(W_1 x))), or W_L gelu(... gelu(W_1 x)) without `norm`, of one vector (D,)."""
    y = x
    for layer, weight in enumerate(weights):
        y = jnp.dot(weight, jax.nn.gelu(y, approximate=True) if layer else y, precision="highest")
    if norm is None:
        return y
    y = y - y.mean()
    return x + y * jax.lax.rsqrt(jnp.mean(y * y) + NORM_EPSILON) * norm[0] + norm[1]


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    alpha: Weights,
    eta: Weights | None,
    theta: Weights,
    live: jax.Array,
    complete: jax.Array,
    weights: Weights,
    momentum: Weights,
    border: Weights,
    norm: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, tuple[Weights, Weights, Weights]]:
    """For each token that is live, layer by layer (Behrouz et al. 2024, equations 8 to 15):

        S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2 at the border's weights
        W_t = (1 - alpha_t) W_{t-1} + S_t,    out_t = M_{W_t}(q_t)

    Args:
      query, key, value: (B, T, H, D).
      alpha, eta, theta: of each layer (B, T, H, 1 or out).
      live, complete: bool (B, T): the token exists; after it a chunk ends, and W_t becomes the border's weights.
      weights, momentum, border: of each layer (B, H, out, in), float32 or float64. Momentum is empty if eta is None.
      norm: scale and bias (H, D), or None.

    Returns:
      out (B, T, H, D), and weights, momentum and the border's weights after the last token.
    """
    dtype = value.dtype

    def one_head(query, key, value, alpha, eta, theta, live, complete, weights, momentum, border, norm):
        def loss(weights, key, value):
            return jnp.sum((read(weights, norm, key) - value) ** 2)

        def token(carry, now):
            weights, momentum, border = carry
            query, key, value, alpha, eta, theta, live, complete = now
            steps = [-theta[i][:, None] * g for i, g in enumerate(jax.grad(loss)(border, key, value))]
            if momentum:
                steps = [eta[i][:, None] * s + step for i, (s, step) in enumerate(zip(momentum, steps, strict=True))]
                momentum = tuple(jnp.where(live, new, old) for new, old in zip(steps, momentum, strict=True))
            weights = tuple(
                jnp.where(live, (1 - alpha[i][:, None]) * w + steps[i], w) for i, w in enumerate(weights)
            )  # fmt: skip
            border = tuple(jnp.where(complete, w, old) for w, old in zip(weights, border, strict=True))
            return (weights, momentum, border), read(weights, norm, query)

        sequence = (query, key, value, alpha, eta, theta, live, complete)
        return jax.lax.scan(token, (weights, momentum, border), sequence)

    compute = weights[0].dtype
    sequence = jax.tree.map(lambda x: x.astype(compute), (query, key, value, alpha, eta, theta))
    by_head = jax.vmap(one_head, in_axes=(1, 1, 1, 1, 1, 1, None, None, 0, 0, 0, 0), out_axes=(0, 1))
    by_batch: Any = jax.vmap(by_head, in_axes=(0,) * 11 + (None,))
    states, out = by_batch(*sequence, live, complete, weights, momentum, border, norm)
    return out.astype(dtype), states

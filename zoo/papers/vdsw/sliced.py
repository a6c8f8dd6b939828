"""Transport between clouds of points along lines: sliced, max-sliced, distributional and adaptive Wasserstein costs.

B pairs of clouds, m and n points, d coordinates, L directions. By default costs are the published ones: sums over the
points of squared differences, m times the squared Wasserstein distance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo.papers.vdsw.von_mises_fisher import VonMisesFisher

Reduction = Literal["sum", "mean"]
AscentOptimizer = Literal["adam", "sgd"]


@jax.custom_vjp
def sorted_values(z: jax.Array) -> jax.Array:
    """The last axis sorted. The backward pass sorts the gradient back by the permutation, without a scatter."""
    return jnp.sort(z, axis=-1)


def _sorted_forward(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    order = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
    values, permutation = jax.lax.sort((z, order), num_keys=1)
    return values, permutation


def _sorted_backward(permutation: jax.Array, d_values: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.sort((permutation, d_values), num_keys=1)[1],)


sorted_values.defvjp(_sorted_forward, _sorted_backward)


def unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis; a vector of zeros stays one."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-30))


def check_clouds(x: jax.Array | np.ndarray, y: jax.Array | np.ndarray) -> None:
    """Raises ValueError unless both are (batch, points, d) of one batch size and dimension."""
    if x.ndim != 3 or y.ndim != 3 or x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2] or 0 in x.shape + y.shape:
        raise ValueError(f"clouds must be (batch, points, d) of the same batch and d, got {x.shape} and {y.shape}")


def _quantiles(m: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the quantile functions of m and n points are constant: index into each, and the pieces' widths."""
    # In units of 1 / (m n), so that places are integers.
    cuts = np.union1d(np.arange(m + 1) * n, np.arange(n + 1) * m)
    left = cuts[:-1]
    return left // n, left // m, np.diff(cuts) / (m * n)


def sliced_costs(x: jax.Array, y: jax.Array, theta: jax.Array, p: float = 2, reduction: Reduction = "sum") -> jax.Array:
    """C(theta) = sum_i |sort(X theta)_i - sort(Y theta)_i|^p, the cost along each direction.

    Clouds of unequal sizes are compared by their quantile functions. Gradients by x, y and theta.

    Args:
      x: (B, m, d).
      y: (B, n, d).
      theta: unit vectors (B or 1, L, d).
      p: degree, at least 1.
      reduction: "sum" over the points (of equally many), or "mean", the p-th power of the Wasserstein distance.

    Returns:
      (B, L).

    Raises:
      ValueError: the shapes do not fit, p is below 1, or a sum is asked for of clouds of unequal sizes.
    """
    check_clouds(x, y)
    if theta.ndim != 3 or theta.shape[0] not in (1, x.shape[0]) or theta.shape[2] != x.shape[2]:
        raise ValueError(f"theta must be ({x.shape[0]} or 1, directions, {x.shape[2]}), got {theta.shape}")
    if p < 1:
        raise ValueError(f"p must be at least 1, got {p}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    m, n = x.shape[1], y.shape[1]
    if reduction == "sum" and m != n:
        raise ValueError(f"a sum over points needs clouds of equal size, got {m} and {n}: use reduction='mean'")
    theta = jnp.broadcast_to(theta, (x.shape[0], *theta.shape[1:]))
    projected = partial(jnp.einsum, "bmd,bld->blm", precision=jax.lax.Precision.HIGHEST)
    xs, ys = sorted_values(projected(x, theta)), sorted_values(projected(y, theta))
    if m == n:
        power = _power(xs - ys, p)
        return power.sum(-1) if reduction == "sum" else power.mean(-1)
    at_x, at_y, width = _quantiles(m, n)
    return jnp.sum(_power(xs[..., at_x] - ys[..., at_y], p) * jnp.asarray(width, xs.dtype), -1)


def _power(difference: jax.Array, p: float) -> jax.Array:
    return jnp.square(difference) if p == 2 else jnp.abs(difference) ** p


def sliced_wasserstein(
    x: jax.Array, y: jax.Array, theta: jax.Array, p: float = 2, reduction: Reduction = "sum", *, squared: bool = True
) -> jax.Array:
    """The mean of `sliced_costs` over the directions: (B,). With `squared=False` its p-th root, a distance."""
    mean = sliced_costs(x, y, theta, p, reduction).mean(-1)
    return mean if squared else jnp.maximum(mean, 1e-30) ** (1 / p)


def uniform_directions(key: jax.Array, batch: int, count: int, d: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Unit vectors (batch, count, d), uniform on the sphere."""
    return unit(jax.random.normal(key, (batch, count, d), dtype))


def _ascend(
    objective: Callable, theta: jax.Array, keys: jax.Array | None, steps: int, lr: float, optimizer: AscentOptimizer
) -> tuple[jax.Array, jax.Array]:
    """Gradient ascent on the sphere: each step's unconstrained update is projected, the optimizer's state is not.

    Returns the last theta, and what the objective was before each step, (steps, B).
    """
    if steps < 0 or lr <= 0:
        raise ValueError(f"steps must not be negative and lr positive, got {steps}, {lr}")
    if optimizer not in ("adam", "sgd"):
        raise ValueError(f"optimizer must be 'adam' or 'sgd', got {optimizer!r}")
    rule = optax.adam(lr) if optimizer == "adam" else optax.sgd(lr)

    def step(carry: tuple, key: jax.Array | None) -> tuple[tuple, jax.Array]:
        theta, state = carry

        def loss(theta: jax.Array) -> tuple:
            value = objective(theta, key)
            return -jnp.mean(value), value

        gradient, value = jax.grad(loss, has_aux=True)(theta)
        updates, state = rule.update(gradient, state)
        return (unit(optax.apply_updates(theta, updates)), state), value

    (theta, _), trace = jax.lax.scan(step, (theta, rule.init(theta)), keys, length=steps)
    return theta, trace


class Ascent(NamedTuple):
    """What a search for directions found."""

    cost: jax.Array  # (B,), differentiable by the clouds with the direction held
    theta: jax.Array  # (B, d), the direction or the location
    trace: jax.Array  # (steps, B), the cost before each step


def max_sliced_wasserstein(
    x: jax.Array,
    y: jax.Array,
    key: jax.Array | None = None,
    *,
    start: jax.Array | None = None,
    steps: int = 50,
    lr: float = 1e-4,
    optimizer: AscentOptimizer = "adam",
    p: float = 2,
    reduction: Reduction = "sum",
) -> Ascent:
    """The cost along the worst direction, found by gradient ascent (Deshpande et al. 2019).

    Args:
      x, y: clouds (B, m, d) and (B, n, d).
      key: of random starts, or
      start: where to start, (B, d); normalised first. A prediction that is refined, say.
      steps, lr, optimizer: of the ascent of the mean over the batch.
      p, reduction: as of `sliced_costs`.

    Raises ValueError unless one of key and start is given.
    """
    theta = _start(x, key, start)
    fixed = jax.lax.stop_gradient((x, y))
    theta, trace = _ascend(
        lambda theta, _: sliced_costs(*fixed, theta[:, None], p, reduction)[:, 0], theta, None, steps, lr, optimizer
    )
    theta = jax.lax.stop_gradient(theta)
    return Ascent(sliced_costs(x, y, theta[:, None], p, reduction)[:, 0], theta, trace)


def _start(x: jax.Array, key: jax.Array | None, start: jax.Array | None) -> jax.Array:
    if start is not None and key is None:
        return unit(jax.lax.stop_gradient(start))
    if key is None or start is not None:
        raise ValueError("give a key for random starts, or the starts")
    return uniform_directions(key, x.shape[0], 1, x.shape[2], x.dtype)[:, 0]


def v_dsw(
    x: jax.Array,
    y: jax.Array,
    key: jax.Array,
    *,
    kappa: float = 1.0,
    directions: int = 100,
    start: jax.Array | None = None,
    steps: int = 50,
    lr: float = 1e-4,
    optimizer: AscentOptimizer = "adam",
    p: float = 2,
    reduction: Reduction = "sum",
) -> Ascent:
    """The mean cost over a von Mises-Fisher distribution, whose location is found by ascent with fresh draws each step.

    A metric for every fixed concentration; kappa to 0 gives the sliced, to infinity the max-sliced distance.

    Args:
      x, y: clouds (B, m, d) and (B, n, d).
      key: of starts and draws.
      kappa: concentration.
      directions: L, drawn at each step and for the cost.
      start: where to start, (B, d); None is random. With the prediction of an amortised model and few steps: its
        semi-amortised refinement.
      steps, lr, optimizer, p, reduction: as of `max_sliced_wasserstein`.
    """
    start_key, final_key, steps_key = jax.random.split(key, 3)
    location = _start(x, start_key if start is None else None, start)
    fixed = jax.lax.stop_gradient((x, y))

    def objective(location: jax.Array, key: jax.Array) -> jax.Array:
        drawn = VonMisesFisher(location, kappa).sample(key, directions)
        return sliced_wasserstein(*fixed, jnp.moveaxis(drawn, 0, 1), p, reduction)

    keys = jax.random.split(steps_key, steps)
    location, trace = _ascend(objective, location, keys, steps, lr, optimizer)
    location = jax.lax.stop_gradient(location)
    theta = jnp.moveaxis(VonMisesFisher(location, kappa).sample(final_key, directions), 0, 1)
    return Ascent(sliced_wasserstein(x, y, theta, p, reduction), location, trace)


def dsw(
    x: jax.Array,
    y: jax.Array,
    key: jax.Array,
    *,
    directions: int = 100,
    penalty: float = 1.0,
    steps: int = 50,
    lr: float = 1e-3,
    p: float = 2,
    reduction: Reduction = "sum",
) -> jax.Array:
    """Distributional sliced Wasserstein (Nguyen, Ho, Pham, Bui 2021): uniform directions pushed by a learned map.

    The map is theta -> W theta / |W theta|, one W for each pair, from the identity on; it ascends the mean cost less
    penalty times the cost's scale times the mean absolute cosine of two of its directions, which keeps them apart.

    Args:
      x, y: clouds (B, m, d) and (B, n, d).
      key: of the directions, drawn anew at each step.
      directions: L.
      penalty: see above.
      steps, lr: of Adam's ascent.
      p, reduction: as of `sliced_costs`.

    Returns:
      (B,), differentiable by the clouds with the map held.
    """
    check_clouds(x, y)
    batch, _, d = x.shape
    fixed = jax.lax.stop_gradient((x, y))
    rule = optax.adam(lr)

    def pushed(weight: jax.Array, key: jax.Array) -> jax.Array:
        return unit(jnp.einsum("bld,bed->ble", uniform_directions(key, batch, directions, d, x.dtype), weight))

    def loss(weight: jax.Array, key: jax.Array) -> jax.Array:
        theta = pushed(weight, key)
        cost = sliced_wasserstein(*fixed, theta, p, reduction)
        spread = jnp.abs(jnp.einsum("bld,bkd->blk", theta, theta)).mean((1, 2))
        return -jnp.mean(cost - penalty * jax.lax.stop_gradient(cost) * spread)

    def step(carry: tuple, key: jax.Array) -> tuple:
        weight, state = carry
        updates, state = rule.update(jax.grad(loss)(weight, key), state)
        return (optax.apply_updates(weight, updates), state), None

    keys = jax.random.split(key, steps + 1)
    weight = jnp.broadcast_to(jnp.eye(d, dtype=x.dtype), (batch, d, d))
    (weight, _), _ = jax.lax.scan(step, (weight, rule.init(weight)), keys[1:])
    return sliced_wasserstein(x, y, jax.lax.stop_gradient(pushed(weight, keys[0])), p, reduction)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def adaptive_sw(
    x: jax.Array,
    y: jax.Array,
    key: jax.Array,
    epsilon: float,
    confidence: float = 2.0,
    most: int = 500,
    share: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """Sliced cost with as many directions as its variance asks for (Nguyen, Pham, Hua 2021).

    From two directions on one is added until confidence^2 (mean of C^2 - (mean of C)^2) <= (n - 1) epsilon^2 for all
    but a share of the batch. Value and gradients are summed up direction by direction, so that memory does not grow.

    Args:
      x, y: clouds (B, m, d), of equal sizes.
      key: of the directions.
      epsilon: the error that is allowed.
      confidence: in standard deviations of the mean.
      most: the largest number of directions.
      share: of the batch that may miss the bound.

    Returns:
      Cost (B,), sums over points, and the number of directions taken.
    """
    value, count, _ = _adaptive(x, y, key, epsilon, confidence, most, share)
    return value, count


def _adaptive(x, y, key, epsilon, confidence, most, share):
    check_clouds(x, y)
    if epsilon <= 0 or most < 2:
        raise ValueError(f"epsilon must be positive and most at least 2, got {epsilon}, {most}")

    def slice_(index: jax.Array) -> tuple:
        theta = uniform_directions(jax.random.fold_in(key, index), x.shape[0], 1, x.shape[2], x.dtype)
        cost, transpose = jax.vjp(lambda x, y: sliced_costs(x, y, theta)[:, 0], x, y)
        return cost, transpose(jnp.ones_like(cost))

    def going(carry: tuple) -> jax.Array:
        n, first, second, _ = carry
        spread = second / n - jnp.square(first / n)
        missed = confidence**2 * spread > (n - 1) * epsilon**2
        return (n < 2) | ((n < most) & (jnp.mean(missed.astype(jnp.float32)) > share))

    def add(carry: tuple) -> tuple:
        n, first, second, gradients = carry
        cost, more = slice_(n)
        return n + 1, first + cost, second + jnp.square(cost), jax.tree.map(jnp.add, gradients, more)

    zero = jnp.zeros(x.shape[0], x.dtype)
    start = (jnp.int32(0), zero, zero, (jnp.zeros_like(x), jnp.zeros_like(y)))
    count, first, _, gradients = jax.lax.while_loop(going, add, start)
    return first / count, count, jax.tree.map(lambda g: g / count, gradients)


def _adaptive_forward(x, y, key, epsilon, confidence, most, share):
    value, count, gradients = _adaptive(x, y, key, epsilon, confidence, most, share)
    return (value, count), gradients


def _adaptive_backward(epsilon, confidence, most, share, gradients, d_out):
    d_value = d_out[0][:, None, None]
    return (*(d_value * gradient for gradient in gradients), None)


adaptive_sw.defvjp(_adaptive_forward, _adaptive_backward)

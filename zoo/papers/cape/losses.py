"""How the solvers learn: roll-outs under a curriculum, the gradient penalty, the spectral residual of PINO; and scores.

B samples, T frames, *grid cells, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.papers.cape.model import CAPEModel

NOISE = 1e-3  # standard deviation of what is added to a step's input
INTERMEDIATE = {1: 5.7e-5, 2: 8.34e-5}  # weight of the intermediate losses, by the field's directions
PENALTY, TARGET_GRADIENT = 5.16e-4, 4.58  # of the gradient penalty, on a line


def relative_l2(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over the batch of ||prediction - target|| / ||target||, norms over all other axes."""
    axes = tuple(range(1, target.ndim))
    difference = jnp.sqrt(jnp.sum(jnp.square(prediction - target), axes))
    return jnp.mean(difference / jnp.sqrt(jnp.sum(jnp.square(target), axes)))


def curriculum_steps(epoch: Any, epochs: int, warmup: int, frames: int, slope: float = 0.2) -> np.ndarray:
    """How many of the first steps are auto-regressive: clip(int(T (1 + tanh((s - 1/2) / slope)) / 2), 1, T).

    s = (epoch - warmup) / (epochs - warmup) is the share of the training that is done.

    Args:
      epoch: one, or an array of them.
      epochs: of the whole training.
      warmup: epochs before the curriculum, fewer than `epochs`.
      frames: T.
      slope: how many of the epochs the border takes to move.

    Returns:
      int like `epoch`.
    """
    if not 0 <= warmup < epochs:
        raise ValueError(f"warmup must be in [0, {epochs}) epochs, got {warmup}")
    share = (np.asarray(epoch, np.float64) - warmup) / (epochs - warmup)
    return np.clip((frames * 0.5 * (1 + np.tanh((share - 0.5) / slope))).astype(int), 1, frames)


class RollOutLoss(NamedTuple):
    """What a training roll-out gives."""

    total: jax.Array
    intermediate: jax.Array  # sum over the steps but the last of the intermediate fields' losses
    prediction: jax.Array  # (B, T, *grid, C), the first frame included
    model_state: Mapping[str, Any]


def rollout_loss(
    model: CAPEModel,
    params: Any,
    model_state: Mapping[str, Any],
    solution: jax.Array,
    parameters: jax.Array,
    autoregressive: jax.Array | int,
    *,
    coefficient: float | None = None,
    noise: float = NOISE,
    key: jax.Array | None = None,
    train: bool = True,
    checkpoint: bool = False,
) -> RollOutLoss:
    """sum_t rel(next_t, y_t) + c sum_{t < T-1} a_t with the running sum a_t = sum_{s <= t} rel(e_s, y_s).

    The running sum is added at each step, as published: early intermediate fields count T - 1 - t times. Step t reads
    the network's own last field where t <= the border, else the true one; gradients flow through its own fields.

    Args:
      model, params, model_state: the network, its parameters, and its "batch_stats" or {}.
      solution: (B, T, *grid, C), at least two frames.
      parameters: of the equations, (B, P).
      autoregressive: the border, int, of all samples or (B,): field t was computed, and is read on, where t < border.
      coefficient: c; None is the published one.
      noise: standard deviation of what is added to every step's input, at which no gradient stops.
      key: of the noise; None is none.
      train: batch norms are those of training.
      checkpoint: compute each step again in the backward pass; memory no longer grows with T times the network's depth.

    Raises:
      ValueError: the shapes do not fit.
    """
    config = model.config
    if solution.ndim != config.dims + 3 or solution.shape[1] < 2:
        raise ValueError(f"solution must be (batch, at least 2 frames, *{config.grid}, {config.channels}), got "
                         f"{solution.shape}")  # fmt: skip
    c = INTERMEDIATE[config.dims] if coefficient is None else coefficient
    frames = solution.shape[1]
    condition = model.apply({"params": params, **model_state}, parameters, method="condition")
    border = jnp.broadcast_to(jnp.asarray(autoregressive), solution.shape[:1])
    border = border.reshape(-1, *(1,) * (config.dims + 1))
    targets = jnp.moveaxis(solution[:, 1:], 1, 0)
    keys = None if key is None else jax.random.split(key, frames - 1)

    def step(carry: tuple, inputs: tuple) -> tuple:
        u, state, total, running = carry
        t, target, key = inputs
        if key is not None:
            u = u + noise * jax.random.normal(key, u.shape, u.dtype)
        mutable = list(state) if train else []
        (following, intermediate), changed = model.apply(
            {"params": params, **state}, u, condition, train=train, mutable=mutable, method="step"
        )
        total = total + relative_l2(following, target)
        if intermediate is not None:
            wanted = jnp.concatenate([target] * config.embeddings, axis=-1)
            inner = t < frames - 1  # the last step has no intermediate loss
            running = running + jnp.where(inner, relative_l2(intermediate, wanted), 0.0)
            total = total + jnp.where(inner, c * running, 0.0)
        following = following.astype(target.dtype)
        u = jnp.where(t < border, following, target)
        return (u, changed if train else state, total, running), following

    zero = jnp.zeros((), solution.dtype)
    start = (solution[:, 0], dict(model_state), zero, zero)
    body = jax.checkpoint(step) if checkpoint else step
    (_, state, total, running), fields = jax.lax.scan(body, start, (jnp.arange(1, frames), targets, keys))
    prediction = jnp.concatenate([solution[:, :1], jnp.moveaxis(fields, 0, 1)], axis=1)
    return RollOutLoss(total, running, prediction, state)


def rollout(model: CAPEModel, variables: Any, u0: jax.Array, parameters: jax.Array, steps: int) -> jax.Array:
    """The network's own time steps from the first frame: (B, steps + 1, *grid, C), u0 (B, *grid, C) included."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    condition = model.apply(variables, parameters, method="condition")

    def step(u: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        following = model.apply(variables, u, condition, method="step")[0].astype(u.dtype)
        return following, following

    _, fields = jax.lax.scan(step, u0, None, length=steps)
    return jnp.concatenate([u0[:, None], jnp.moveaxis(fields, 0, 1)], axis=1)


def gradient_penalty(
    model: CAPEModel,
    variables: Any,
    u: jax.Array,
    parameters: jax.Array,
    key: jax.Array,
    *,
    target: float = TARGET_GRADIENT,
) -> jax.Array:
    """Mean of (|d sum(next) / dq| - target)^2 at parameters q drawn around the batch's own (published on a line only).

    q = p_mn + (z + 1) / 2 (p_mx - p_mn) with z standard normal, p_mx = 2 max p and p_mn = max(0, min p / 2).

    Args:
      model, variables: the network; batch norms are those of evaluation.
      u: fields (B, *grid, C); in training the first frame.
      parameters: (B, P).
      key: of the draw.
      target: the norm that the gradient should have.
    """
    highest = 2 * parameters.max(0)
    lowest = jax.nn.relu(0.5 * parameters.min(0))
    drawn = lowest + 0.5 * (jax.random.normal(key, parameters.shape, u.dtype) + 1) * (highest - lowest)
    gradient = jax.grad(lambda q: jnp.sum(model.apply(variables, u, q)[0]))(drawn)
    norm = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=-1) + 1e-12)
    return jnp.mean(jnp.square(norm - target))


Equation = Literal["advection", "burgers"]


def pino_residual(
    u: jax.Array,
    parameters: jax.Array,
    equation: Equation,
    *,
    duration: float = 2.0,
    length: float = 1.0,
    as_published: bool = False,
) -> jax.Array:
    """Mean square of the equation's residual (Li et al. 2021): differences in time, Fourier derivatives in space.

    Advection: u_t + beta u_x. Burgers: u_t + u u_x - (nu / pi) u_xx; the published baseline adds nu u_xx instead.

    Args:
      u: (B, T, nx), at least three frames.
      parameters: beta or nu, (B, 1).
      equation: which.
      duration, length: of the frames from the first to the last, and of the periodic line.
      as_published: the published form of Burgers' residual.

    Raises:
      ValueError: the shapes do not fit, or the equation is unknown.
    """
    if u.ndim != 3 or u.shape[1] < 3:
        raise ValueError(f"u must be (batch, at least 3 frames, nx), got {u.shape}")
    if equation not in ("advection", "burgers"):
        raise ValueError(f"equation must be 'advection' or 'burgers', got {equation!r}")
    frames, cells = u.shape[1:]
    rate = (u[:, 2:] - u[:, :-2]) / (2 * duration / (frames - 1))
    wave = 2j * jnp.pi * jnp.arange(cells // 2 + 1) / length
    spectrum = jnp.fft.rfft(u, axis=2)
    slope = jnp.fft.irfft(wave * spectrum, cells, axis=2)[:, 1:-1]
    p = parameters.reshape(-1, 1, 1)
    if equation == "advection":
        return jnp.mean(jnp.square(rate + p * slope))
    curvature = jnp.fft.irfft(wave**2 * spectrum, cells, axis=2)[:, 1:-1]
    diffusion = p * curvature if as_published else -p / jnp.pi * curvature
    return jnp.mean(jnp.square(rate + u[:, 1:-1] * slope + diffusion))


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of a roll-out, means over channels and frames (PDEBench, Takamoto et al. 2022)."""

    rmse: jax.Array
    nrmse: jax.Array  # over the target's root mean square, sample by sample and channel by channel
    conserved: jax.Array  # of the sum over the cells, divided by their number
    maximum: jax.Array
    boundary: jax.Array
    low: jax.Array  # Fourier modes below 4,
    middle: jax.Array  # from 4 to 11,
    high: jax.Array  # and from 12 on


jax.tree_util.register_dataclass(Scores)


def pde_metrics(prediction: jax.Array, target: jax.Array) -> Scores:
    """The eight scores of fields (B, T, *grid, C) on a line or a plane. Leave the given first frame out.

    Raises ValueError where the shapes differ or are of other fields.
    """
    if prediction.shape != target.shape or target.ndim not in (4, 5):
        raise ValueError(f"both must be (batch, frames, nx[, ny], channels), got {prediction.shape}, {target.shape}")
    space = tuple(range(2, target.ndim - 1))
    grid = target.shape[2:-1]
    cells = int(np.prod(grid))
    error = prediction - target
    root = jnp.sqrt(jnp.mean(jnp.square(error), space))  # (B, T, C)
    scale = jnp.sqrt(jnp.mean(jnp.square(target), space))
    conserved = jnp.sqrt(jnp.mean(jnp.square(jnp.sum(error, space)), 0)) / cells
    maximum = jnp.max(jnp.abs(error), (0, *space))
    edges = jnp.zeros(())
    for axis in space:
        faces = jnp.square(jnp.take(error, 0, axis)) + jnp.square(jnp.take(error, -1, axis))
        edges += faces.sum(tuple(range(2, faces.ndim - 1)))
    boundary = jnp.sqrt(edges / (2 * sum(grid) if len(grid) == 2 else 2)).mean(0)
    bands = _spectrum(error, grid)  # (modes, T, C)
    low, middle, high = (jnp.mean(bands[part]) for part in (slice(0, 4), slice(4, 12), slice(12, None)))
    return Scores(
        jnp.mean(root), jnp.mean(root / scale), jnp.mean(conserved), jnp.mean(maximum), jnp.mean(boundary),
        low, middle, high,
    )  # fmt: skip


def _spectrum(error: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    """Root of the mean over samples of the squared Fourier error, by mode: (modes, T, C)."""
    if len(grid) == 1:
        power = jnp.mean(jnp.square(jnp.abs(jnp.fft.rfft(error, axis=2))), 0)
        return jnp.moveaxis(jnp.sqrt(power), 1, 0) / grid[0]
    power = jnp.mean(jnp.square(jnp.abs(jnp.fft.fft2(error, axes=(2, 3)))), 0)
    rows, columns = grid[0] // 2, grid[1] // 2
    radius = np.floor(np.hypot(*np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))).astype(int)
    count = min(rows, columns)
    bins = jnp.asarray(radius[..., None] == np.arange(count), power.dtype)  # larger radii belong to no bin
    return jnp.sqrt(jnp.einsum("txyc,xyk->ktc", power[:, :rows, :columns], bins)) / (grid[0] * grid[1])


def loss(
    model: CAPEModel,
    *,
    intermediate_only: bool = False,
    penalty: float = 0.0,
    residual: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    **options: Any,
) -> Callable:
    """A solver's loss, for `zoo.train`.

    The batch holds `solution` (B, T, *grid, C), `parameters` (B, P) and `border` (B,) int, see `rollout_loss`. Rngs:
    "dropout" draws the noise. Metrics: "intermediate" and "relative_l2" of the whole roll-out.

    Args:
      model: the network.
      intermediate_only: the intermediate fields' losses alone, as in the warm-up, which moves the block only.
      penalty: weight of `gradient_penalty` at the first frame; 5.16e-4 in the published runs on a line.
      residual: what is added for a roll-out (B, T, *grid, C) and its parameters: PINO's, weighed, say.
      **options: of `rollout_loss`.
    """

    def loss_function(params, model_state, batch, rngs, train):
        noise_key, draw_key = jax.random.split(rngs["dropout"]) if train else (None, None)
        found = rollout_loss(
            model, params, model_state, batch["solution"], batch["parameters"], batch["border"],
            key=noise_key, train=train, **options,
        )  # fmt: skip
        value = found.intermediate if intermediate_only else found.total
        if penalty and train:
            variables = {"params": params, **model_state}
            first = batch["solution"][:, 0]
            value = value + penalty * gradient_penalty(model, variables, first, batch["parameters"], draw_key)
        if residual is not None:
            value = value + residual(found.prediction, batch["parameters"])
        whole = relative_l2(found.prediction, batch["solution"])
        return value, (found.model_state, {"intermediate": found.intermediate, "relative_l2": whole})

    return loss_function


def example_targets(config: Any, batch_size: int) -> dict[str, np.ndarray]:
    """Three frames, and borders within them."""
    rng = np.random.default_rng(1)
    shape = (batch_size, 3, *config.grid, config.channels)
    return {
        "solution": rng.standard_normal(shape, np.float32),
        "border": np.full(batch_size, 2, np.int32),
    }

"""Optimizers and learning-rate schedules from a config."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

OptimizerName = Literal["adam", "adamw", "lion", "sgd"]
ScheduleName = Literal["constant", "cosine", "linear", "step"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    # adam, adamw and lion as published; sgd with (heavy-ball) momentum.
    name: OptimizerName = "adamw"
    # At its highest, after the warm-up.
    learning_rate: float = 1e-3
    # After the warm-up: constant; cosine or linear down to the last step; step: times decay_factor every decay_epochs.
    schedule: ScheduleName = "constant"
    # Steps over which the learning rate rises linearly.
    warmup_steps: int = 0
    # Where cosine and linear end, as a part of learning_rate.
    final_fraction: float = 0.0
    # Schedule "step": epochs between two drops.
    decay_epochs: int = 1
    # Schedule "step": factor of a drop.
    decay_factor: float = 0.5
    # Decay of the first moment (adam, adamw, lion) or the momentum (sgd).
    b1: float = 0.9
    # Decay of the second moment (adam, adamw), or of lion's momentum.
    b2: float = 0.999
    # Added to the root of adam's and adamw's second moment.
    eps: float = 1e-8
    # Of arrays with two axes or more: decoupled in adamw and lion, added to the gradient in sgd.
    weight_decay: float = 0.0
    # Gradients with a larger global norm are scaled down to it.
    clip_norm: float | None = None
    # Gradients are scaled down to this part of their parameters' norm, output by output (see `adaptive_clip`).
    adaptive_clip: float | None = None
    # Micro-batches that a batch is cut into; their gradients are averaged into one update.
    accumulation_steps: int = 1
    # Evaluate with the average ema <- ema_decay ema + (1 - ema_decay) params.
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        for field, names in (("name", OptimizerName), ("schedule", ScheduleName)):
            if getattr(self, field) not in get_args(names):
                raise ValueError(f"{field} must be one of {get_args(names)}, got {getattr(self, field)!r}")
        conditions = {
            "learning_rate": (self.learning_rate > 0, "positive"),
            "warmup_steps": (self.warmup_steps >= 0, "at least 0"),
            "final_fraction": (0 <= self.final_fraction <= 1, "in [0, 1]"),
            "decay_epochs": (self.decay_epochs >= 1, "at least 1"),
            "decay_factor": (0 < self.decay_factor <= 1, "in (0, 1]"),
            "b1": (0 <= self.b1 < 1, "in [0, 1)"),
            "b2": (0 <= self.b2 < 1, "in [0, 1)"),
            "eps": (self.eps > 0, "positive"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "None or positive"),
            "adaptive_clip": (self.adaptive_clip is None or self.adaptive_clip > 0, "None or positive"),
            "accumulation_steps": (self.accumulation_steps >= 1, "at least 1"),
            "ema_decay": (self.ema_decay is None or 0 < self.ema_decay < 1, "None or in (0, 1)"),
        }
        for field, (holds, expected) in conditions.items():
            if not holds:
                raise ValueError(f"{field} must be {expected}, got {getattr(self, field)}")
        if self.name == "adam" and self.weight_decay:
            raise ValueError(f"adam has no weight_decay, got {self.weight_decay}: use name='adamw'")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What a training step needs to know to make an update. `build_optimizer` gives one; any Optax chain may be put in.

    `schedule` is what is logged as the learning rate; the transformation applies it.
    """

    transformation: optax.GradientTransformation
    schedule: optax.Schedule
    accumulation_steps: int = 1
    ema_decay: float | None = None


def build_optimizer(config: OptimizerConfig, total_steps: int, steps_per_epoch: int | None = None) -> Optimizer:
    """The config as Optax.

    Args:
      config: see its fields.
      total_steps: where cosine and linear schedules end.
      steps_per_epoch: needed by the schedule "step".

    Raises:
      ValueError: the warm-up is not shorter than the training, or steps_per_epoch is missing.
    """
    schedule = learning_rate_schedule(config, total_steps, steps_per_epoch)
    decay = optax.add_decayed_weights(config.weight_decay, mask=_has_two_axes) if config.weight_decay else None
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm is not None else None
    adaptive = adaptive_clip(config.adaptive_clip) if config.adaptive_clip is not None else None
    scale = {
        "adam": lambda: optax.scale_by_adam(config.b1, config.b2, config.eps),
        "adamw": lambda: optax.scale_by_adam(config.b1, config.b2, config.eps),
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2),
        "sgd": lambda: optax.trace(config.b1),
    }[config.name]()
    # Weight decay as a term of the gradient comes before the momentum, decoupled decay after the scaling.
    chain = [clip, adaptive, decay, scale] if config.name == "sgd" else [clip, adaptive, scale, decay]
    chain.append(optax.scale_by_learning_rate(schedule))
    transformation = optax.chain(*(part for part in chain if part is not None))
    return Optimizer(transformation, schedule, config.accumulation_steps, config.ema_decay)


def adaptive_clip(factor: float, eps: float = 1e-3) -> optax.GradientTransformation:
    """Adaptive gradient clipping (Brock et al. 2021, NFNets, eq. 3): gradients relative to their parameters.

    The gradient of each output unit (all axes but the last; a vector as a whole) is scaled down to a norm of
    `factor` times that of its parameters, which count as at least `eps`.

    Args:
      factor: largest ratio of the norms.
      eps: lower bound of a parameter's norm.
    """

    def norm(x: jax.Array) -> jax.Array:
        axes = tuple(range(x.ndim - 1)) if x.ndim > 1 else None
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))

    def clip(gradient: jax.Array, param: jax.Array) -> jax.Array:
        largest, size = factor * jnp.maximum(norm(param), eps), norm(gradient)
        return jnp.where(size > largest, gradient * (largest / jnp.maximum(size, 1e-6)), gradient)

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise ValueError("adaptive_clip needs the parameters: call update(gradient, state, params)")
        return jax.tree.map(clip, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def layerwise_decay(groups: Any, decay: float) -> optax.GradientTransformation:
    """Smaller steps for earlier layers: updates times decay ** (highest group - group) (Clark et al. 2020, ELECTRA).

    Put behind an optimizer, whose decoupled weight decay it makes smaller too:
    `optax.chain(build_optimizer(...).transformation, layerwise_decay(groups, 0.9))`.

    Args:
      groups: like the parameters, integers; larger ones are nearer to the output.
      decay: in (0, 1].

    Raises ValueError for a decay outside.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}")
    top = max(jax.tree.leaves(groups))

    def update(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda update, group: update * decay ** (top - group), updates, groups)

    return optax.stateless(update)


def learning_rate_schedule(
    config: OptimizerConfig, total_steps: int, steps_per_epoch: int | None = None
) -> optax.Schedule:
    """Learning rate of the update after `step` updates; the warm-up's first update has learning_rate / warmup_steps."""
    warmup = config.warmup_steps
    if total_steps < 1 or warmup >= total_steps:
        raise ValueError(f"total_steps must be more than warmup_steps = {warmup}, got {total_steps}")
    if config.schedule == "step" and (steps_per_epoch is None or steps_per_epoch < 1):
        raise ValueError(f"the schedule 'step' needs steps_per_epoch of at least 1, got {steps_per_epoch}")
    drop_every = config.decay_epochs * (steps_per_epoch or 1)

    def schedule(step: Any) -> jax.Array:
        elapsed = jnp.clip((step - warmup) / (total_steps - warmup), 0.0, 1.0)
        if config.schedule == "cosine":
            fraction = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * elapsed))
        elif config.schedule == "linear":
            fraction = 1 + (config.final_fraction - 1) * elapsed
        elif config.schedule == "step":
            fraction = config.decay_factor ** (step // drop_every)
        else:
            fraction = jnp.ones(())
        rise = jnp.minimum(1.0, (step + 1) / warmup) if warmup else 1.0
        return jnp.asarray(config.learning_rate * rise * fraction, jnp.float32)

    return schedule


def _has_two_axes(params: Any) -> Any:
    # Biases and the scales of norms are not decayed.
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)

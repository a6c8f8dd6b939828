"""Losses of classifiers: cross-entropy with soft targets, and distillation as DeiT does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the batch of -sum_c target_c log softmax(logits)_c.

    Args:
      logits: (B, C).
      targets: integer classes (B,), or probabilities (B, C).

    Raises:
      ValueError: the shapes do not fit.
    """
    if targets.shape not in (logits.shape, logits.shape[:1]) or logits.ndim != 2:
        raise ValueError(f"targets of shape {targets.shape} do not belong to logits of shape {logits.shape}")
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    if targets.ndim == 1:
        return -jnp.take_along_axis(log_probabilities, targets[:, None], axis=1).mean()
    return -jnp.sum(targets * log_probabilities, axis=1).mean()


def accuracy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Share of examples whose largest logit is the target's class (of soft targets, the most probable)."""
    classes = targets if targets.ndim == 1 else jnp.argmax(targets, axis=-1)
    return jnp.mean(jnp.argmax(logits, axis=-1) == classes, dtype=jnp.float32)


def smooth_labels(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """(B,) classes as probabilities (B, classes): 1 - smoothing on the class, and smoothing shared out among all."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
    return jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


class Distillation(NamedTuple):
    """A loss and its two parts, means over the batch."""

    total: jax.Array
    base: jax.Array
    distillation: jax.Array


def hard_distillation(
    logits: jax.Array, student: jax.Array, targets: jax.Array, teacher: jax.Array, alpha: float = 0.5
) -> Distillation:
    """(1 - alpha) CE(logits, targets) + alpha CE(student, argmax teacher) (Touvron et al. 2021, DeiT, eq. 3).

    Args:
      logits: (B, C) of the head that learns the targets.
      student: (B, C) of the head that learns the teacher's decisions.
      targets: as of `cross_entropy`.
      teacher: (B, C) logits.
      alpha: share of the teacher.
    """
    base, learned = cross_entropy(logits, targets), cross_entropy(student, jnp.argmax(teacher, axis=-1))
    return Distillation((1 - alpha) * base + alpha * learned, base, learned)


def soft_distillation(
    logits: jax.Array, student: jax.Array, targets: jax.Array, teacher: jax.Array, alpha: float = 0.5, tau: float = 1.0
) -> Distillation:
    """(1 - alpha) CE(logits, targets) + alpha tau^2 KL(teacher || student) at temperature tau.

    The divergence is divided by B C, and not by B, as DeiT's code does; arguments as of `hard_distillation`.
    """
    base = cross_entropy(logits, targets)
    log_student, log_teacher = jax.nn.log_softmax(student / tau), jax.nn.log_softmax(teacher / tau)
    learned = tau**2 * jnp.mean(jnp.exp(log_teacher) * (log_teacher - log_student))
    return Distillation((1 - alpha) * base + alpha * learned, base, learned)


def distilled_targets(config: Any, batch_size: int) -> dict[str, np.ndarray]:
    """`labels`, (B,) int32, and with distillation the teacher's logits (B, num_classes)."""
    rng = np.random.default_rng(1)
    targets: dict[str, np.ndarray] = {"labels": rng.integers(0, config.num_classes, batch_size).astype(np.int32)}
    if config.distillation:
        targets["teacher"] = rng.standard_normal((batch_size, config.num_classes), dtype=np.float32)
    return targets


def distilled_loss(model: Any, alpha: float = 0.5) -> Callable:
    """A classifier's loss, for `zoo.train`: cross-entropy, with hard distillation where the batch brings a teacher.

    The batch holds `images`, `labels`, (B,) integers or (B, num_classes) probabilities (smoothed, mixed), and, for the
    distillation, `teacher`: the teacher's logits (B, num_classes) of the same, mixed images. Without them a second
    head learns from the labels too. Metrics: "accuracy".
    """

    def loss_function(params, model_state, batch, rngs, train):
        variables = {"params": params, **model_state}
        logits, model_state = model.apply(variables, batch["images"], train=train, rngs=rngs, mutable=list(model_state))
        if isinstance(logits, tuple):
            teacher = batch.get("teacher")
            if teacher is None:
                value = (cross_entropy(logits[0], batch["labels"]) + cross_entropy(logits[1], batch["labels"])) / 2
            else:
                value = hard_distillation(*logits, batch["labels"], teacher, alpha).total
            logits = (logits[0] + logits[1]) / 2
        else:
            value = cross_entropy(logits, batch["labels"])
        return value, (model_state, {"accuracy": accuracy(logits, batch["labels"])})

    return loss_function

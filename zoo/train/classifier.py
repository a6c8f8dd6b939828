"""Training of image classifiers: one recipe for all backbones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from zoo.data.augmentation import Recipe, evaluation_batches, train_batches
from zoo.data.images import ImageData
from zoo.train.loop import FitResult, evaluate
from zoo.train.network import fit_network
from zoo.train.optimizer import OptimizerConfig
from zoo.train.run import Run
from zoo.train.sharding import MeshConfig, make_mesh
from zoo.train.step import LossFunction, make_evaluation_step

_EVALUATION_BATCH = 100


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained: AdamW, linear warm-up, cosine."""

    epochs: int = 300
    batch_size: int = 1024
    # At its highest.
    learning_rate: float = 1e-3
    warmup_epochs: int = 5
    weight_decay: float = 0.025
    # Where the cosine ends, as a part of learning_rate.
    final_fraction: float = 0.01
    # Of gradients relative to their parameters; None: none.
    adaptive_clip: float | None = None
    # Of the gradients' global norm; None: none.
    clip_norm: float | None = None
    # Of the average of parameters that is evaluated; None: the parameters themselves.
    ema_decay: float | None = None
    # What is done to the images.
    recipe: Recipe = Recipe()
    # Shorter epochs, for a quick look; None: all images.
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "steps_per_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs must be in 0 .. epochs - 1, got {self.warmup_epochs} of {self.epochs}")


def fit_classifier(
    model: nn.Module,
    loss: LossFunction,
    data: ImageData,
    size: tuple[int, int],
    config: ClassifierConfig,
    run: Run,
    seed: int,
    *,
    rng_streams: tuple[str, ...] = ("dropout",),
    teacher: Callable[[np.ndarray], np.ndarray] | None = None,
) -> FitResult:
    """Trains on data.train, and evaluates "test_loss" and "test_accuracy" on data.test after every epoch.

    Args:
      model: takes float images (B, *size, 3).
      loss: reads "images", "labels" (B, classes) and, with a teacher, "teacher" from its batch; its metrics have
        "accuracy".
      data: images of any size.
      size: height and width that they get.
      config: see its fields.
      run: from `open_run`.
      seed: of the parameters, the order and the augmentation.
      rng_streams: that the loss needs.
      teacher: logits (B, classes) of a batch of images as the model sees them, mixed ones too.
    """
    dataset = train_batches(data.train, size, config.batch_size, data.classes, config.recipe, seed)
    if teacher is not None:
        dataset = dataset.map(lambda batch: {**batch, "teacher": np.asarray(teacher(batch["images"]), np.float32)})
    steps = min(len(data.train) // config.batch_size, config.steps_per_epoch or len(data.train))
    optimizer = OptimizerConfig(
        learning_rate=config.learning_rate, schedule="cosine", warmup_steps=config.warmup_epochs * steps,
        final_fraction=config.final_fraction, weight_decay=config.weight_decay, adaptive_clip=config.adaptive_clip,
        clip_norm=config.clip_norm, ema_decay=config.ema_decay,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(data=1))
    evaluation_step = make_evaluation_step(loss, rng_streams)
    test = evaluation_batches(data.test, size, min(_EVALUATION_BATCH, len(data.test)))

    def measure(state: Any) -> Mapping[str, float]:
        metrics = evaluate(evaluation_step, state, test, mesh)
        return {f"test_{name}": metrics[name] for name in ("loss", "accuracy")}

    return fit_network(
        model, loss, {"images": np.zeros((1, *size, 3), np.float32)}, dataset, optimizer, run, seed,
        epochs=config.epochs, steps_per_epoch=steps, rng_streams=rng_streams, evaluate=measure,
    )  # fmt: skip


def compare(
    models: Mapping[str, nn.Module],
    loss: Callable[[Any], LossFunction],
    data: ImageData,
    size: tuple[int, int],
    config: ClassifierConfig,
    seeds: Sequence[int],
    open_run: Callable[[str], Run],
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Test accuracies in percent and test losses after the last epoch of networks trained alike, one a seed.

    Args:
      models: by name.
      loss: model -> its loss.
      data, size, config: as of `fit_classifier`.
      seeds: of the trainings; all networks see the same batches.
      open_run: name -> the folder of one training.
    """
    accuracies: dict[str, list[float]] = {name: [] for name in models}
    losses: dict[str, list[float]] = {name: [] for name in models}
    for seed in seeds:
        for name, model in models.items():
            run = open_run(f"{name.replace(' ', '_')}_seed{seed}")
            measured = fit_classifier(model, loss(model), data, size, config, run, seed).evaluation
            accuracies[name].append(round(100 * measured["test_accuracy"], 2))
            losses[name].append(round(measured["test_loss"], 4))
    return accuracies, losses

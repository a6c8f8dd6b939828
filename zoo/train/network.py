"""Training of one network on one device, from nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import grain
import jax

from zoo.train.loop import FitConfig, FitResult, fit
from zoo.train.optimizer import OptimizerConfig, build_optimizer
from zoo.train.run import Run
from zoo.train.sharding import MeshConfig, init_sharded, make_mesh
from zoo.train.step import LossFunction, make_train_step


def fit_network(
    model: nn.Module,
    loss: LossFunction,
    inputs: Mapping[str, Any],
    dataset: grain.MapDataset,
    optimizer: OptimizerConfig,
    run: Run,
    seed: int,
    *,
    epochs: int,
    steps_per_epoch: int,
    rng_streams: tuple[str, ...] = ("dropout",),
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
) -> FitResult:
    """Initial parameters, optimizer and loop.

    Args:
      model: a Flax module.
      loss: its loss.
      inputs: keyword arguments of its `init`.
      dataset: endless batches.
      optimizer: its schedule ends with the last epoch.
      run: from `open_run`.
      seed: of the parameters.
      epochs, steps_per_epoch: how long.
      rng_streams: that the loss needs.
      evaluate: of a state, after every epoch.
    """
    built = build_optimizer(optimizer, total_steps=epochs * steps_per_epoch)
    mesh = make_mesh(MeshConfig(data=1))
    state = init_sharded(lambda rng: model.init(rng, **inputs), built, jax.random.key(seed), mesh)
    return fit(
        make_train_step(loss, built, state, rng_streams),
        state,
        dataset,
        FitConfig(epochs=epochs, log_every=min(20, steps_per_epoch)),
        run,
        mesh=mesh,
        steps_per_epoch=steps_per_epoch,
        evaluate=evaluate,
    )

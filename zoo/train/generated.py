"""Training on examples that are made step by step, by one recipe for small networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import grain
import jax
import numpy as np

from zoo.train.loop import FitConfig, fit
from zoo.train.optimizer import OptimizerConfig, build_optimizer
from zoo.train.run import Run
from zoo.train.sharding import MeshConfig, init_sharded, make_mesh
from zoo.train.step import LossFunction, make_train_step


def fit_generated(
    model: nn.Module,
    loss: LossFunction,
    batch: Callable[[int], dict[str, np.ndarray]],
    run: Run,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    inputs: Sequence[str] = ("tokens",),
    weight_decay: float = 0.1,
    variables: Any = None,
) -> Any:
    """Trains with AdamW (gradients clipped at 1, a tenth of warm-up, then a cosine) on one device.

    Args:
      model: takes the batch's `inputs`.
      loss: see `LossFunction`.
      batch: the batch of each step, a function of its number.
      run: from `open_run`.
      steps: updates.
      learning_rate: at its highest.
      seed: of the initial parameters.
      inputs: names of the batch's arrays that the model takes, in its order.
      weight_decay: of AdamW.
      variables: to start from, in place of the model's own; its "params" are trained.

    Returns:
      The trained variables.
    """
    config = OptimizerConfig(
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule="cosine",
        clip_norm=1.0,
        warmup_steps=steps // 10,
    )
    optimizer = build_optimizer(config, steps)
    mesh = make_mesh(MeshConfig(data=1))
    example = batch(0)
    first = [example[name][:1] for name in inputs]

    def initial(rng: jax.Array) -> Any:
        return model.init(rng, *first) if variables is None else variables

    state = init_sharded(initial, optimizer, jax.random.key(seed), mesh)
    step = make_train_step(loss, optimizer, state)
    data = grain.MapDataset.range(steps + 1).map(batch)
    options = FitConfig(steps=steps, log_every=max(steps // 20, 1))
    result = fit(step, state, data, options, run, mesh=mesh)
    return nn.meta.unbox(result.state.evaluation_variables)

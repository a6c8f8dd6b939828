"""Training, for any model: state, step, loop, checkpoints, sharding, metrics, logs.

A two-layer network learns y = 2 x - 1 and leaves a run's folder behind:

>>> import tempfile, flax.linen as nn, grain, jax, jax.numpy as jnp, numpy as np
>>> from zoo import train
>>> x = np.random.default_rng(0).uniform(-1, 1, (256, 1)).astype(np.float32)
>>> data = grain.MapDataset.source([{"x": a, "y": 2 * a - 1} for a in x]).shuffle(seed=0).repeat().batch(32)
>>> model = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(1)])
>>> def loss_fn(params, model_state, batch, rngs, train):
...     error = model.apply({"params": params}, batch["x"]) - batch["y"]
...     return jnp.mean(error**2), (model_state, {"mae": jnp.mean(jnp.abs(error))})
>>> config = train.FitConfig(steps=200)
>>> mesh = train.make_mesh(train.MeshConfig(data=1))
>>> optimizer = train.build_optimizer(train.OptimizerConfig(learning_rate=0.01), total_steps=200)
>>> state = train.init_sharded(lambda rng: model.init(rng, x[:1]), optimizer, jax.random.key(0), mesh)
>>> step = train.make_train_step(loss_fn, optimizer, state)
>>> with tempfile.TemporaryDirectory() as folder:
...     run = train.open_run(folder, config)
...     result = train.fit(step, state, data, config, run, mesh=mesh)
>>> float(model.apply({"params": result.state.params}, jnp.ones((1, 1)))[0, 0]).__round__(1)
1.0
"""

from zoo.train.checkpoint import CheckpointError, Checkpoints
from zoo.train.generated import fit_generated
from zoo.train.loop import FitConfig, FitResult, NonFiniteError, evaluate, fit
from zoo.train.metrics import MeanAccumulator
from zoo.train.network import fit_network
from zoo.train.optimizer import Optimizer, OptimizerConfig, build_optimizer, layerwise_decay, learning_rate_schedule
from zoo.train.run import Run, open_run, write_json
from zoo.train.sharding import (
    RULES,
    DistributedConfig,
    MeshConfig,
    init_sharded,
    initialize_distributed,
    make_mesh,
    process_shard,
    shard_batch,
)
from zoo.train.state import TrainState, create_state
from zoo.train.step import LossFunction, make_evaluation_step, make_train_step

__all__ = [
    "RULES",
    "CheckpointError",
    "Checkpoints",
    "DistributedConfig",
    "FitConfig",
    "FitResult",
    "LossFunction",
    "MeanAccumulator",
    "MeshConfig",
    "NonFiniteError",
    "Optimizer",
    "OptimizerConfig",
    "Run",
    "TrainState",
    "build_optimizer",
    "create_state",
    "evaluate",
    "fit",
    "fit_generated",
    "fit_network",
    "init_sharded",
    "initialize_distributed",
    "layerwise_decay",
    "learning_rate_schedule",
    "make_evaluation_step",
    "make_mesh",
    "make_train_step",
    "open_run",
    "process_shard",
    "shard_batch",
    "write_json",
]

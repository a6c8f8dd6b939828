"""A small problem with everything in it that training has to carry: dropout, batch statistics, logical axes, shuffling.

It is also the program that the tests kill: `train_to_the_end` is the main function of their child processes.
"""

import dataclasses
import functools
import multiprocessing
import multiprocessing.util
import os
import pathlib
import time

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from zoo import train
from zoo.layers.partitioning import dense

EXAMPLES, FEATURES = 96, 4


class Network(nn.Module):
    dropout_rate: float = 0.25
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    batch_norm: bool = True

    @nn.compact
    def __call__(self, x, deterministic):
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = dense(8, (None, "embed"), **options)(x)
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=deterministic, **options)(x)
        x = nn.gelu(dense(64, ("embed", "mlp"), **options)(x))
        x = nn.Dropout(self.dropout_rate, deterministic=deterministic)(x)
        return dense(1, ("mlp", None), **options)(x)


def make_loss(network):
    def loss_fn(params, model_state, batch, rngs, train):
        prediction, model_state = network.apply(
            {"params": params, **model_state},
            batch["x"],
            deterministic=not train,
            rngs=rngs,
            mutable=list(model_state) if train else [],
        )
        error = prediction.astype(jnp.float32) - batch["y"]
        return jnp.mean(error**2), (model_state, {"mae": jnp.mean(jnp.abs(error))})

    return loss_fn


def initializer(network):
    return lambda rng: network.init(rng, jnp.zeros((1, FEATURES)), deterministic=True)


def examples(seed=0):
    x = np.random.default_rng(seed).normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
    return [{"x": row, "y": np.sin(row[:1] * row[1:2])} for row in x]


def batches(seed=0, batch_size=16, transform=lambda batch: batch):
    return grain.MapDataset.source(examples()).shuffle(seed).repeat().batch(batch_size).map(transform)


@dataclasses.dataclass(frozen=True)
class Config:
    fit: train.FitConfig = train.FitConfig(
        steps=32, log_every=3, evaluate_every=8, checkpoint_every=10, best_metric="loss"
    )
    optimizer: train.OptimizerConfig = train.OptimizerConfig(
        learning_rate=1e-2, schedule="cosine", warmup_steps=3, weight_decay=0.1, clip_norm=1.0, ema_decay=0.9
    )
    mesh: train.MeshConfig = train.MeshConfig(data=1)
    dropout_rate: float = 0.25
    seed: int = 0


@dataclasses.dataclass
class Setup:
    """All arguments of `fit`."""

    step: object
    evaluation_step: object
    state: train.TrainState
    mesh: object

    def evaluate(self, state):
        validation = grain.MapDataset.source(examples(seed=1)).batch(32)
        return train.evaluate(self.evaluation_step, state, validation, self.mesh)


@functools.cache
def compiled(optimizer_config, mesh_config, total_steps, seed, network):
    """Made once for all tests."""
    mesh = train.make_mesh(mesh_config)
    optimizer = train.build_optimizer(optimizer_config, total_steps)
    state = train.init_sharded(initializer(network), optimizer, jax.random.key(seed), mesh)
    loss_fn = make_loss(network)
    return Setup(train.make_train_step(loss_fn, optimizer, state), train.make_evaluation_step(loss_fn), state, mesh)


def setup(config, network=Network()):
    made = compiled(config.optimizer, config.mesh, config.fit.steps or 100, config.seed, network)
    return dataclasses.replace(made, state=jax.tree.map(jnp.copy, made.state))  # a step uses its state up


def fit(folder, config=Config(), resume=False, transform=lambda batch: batch, step=None, evaluate=None, figures=None):
    """Trains and writes result.json, as an experiment does."""
    run = train.open_run(folder, config, resume=resume)
    made = setup(config, Network(config.dropout_rate))
    data = train.process_shard(grain.MapDataset.source(examples()).shuffle(config.seed).repeat())
    data = data.batch(16 // jax.process_count()).map(transform)
    result = train.fit(
        step or made.step, made.state, data, config.fit, run,
        mesh=made.mesh, evaluate=evaluate or made.evaluate, figures=figures,
    )  # fmt: skip
    if jax.process_index() == 0:
        record = {"best_step": result.best_step, "best_value": result.best_value, **result.evaluation}
        train.write_json(run.path / "result.json", record)
    return result


def bits(tree):
    """Arrays as bytes by name: equal exactly if every bit is."""

    def plain(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(plain(leaf)).tobytes() for path, leaf in leaves}


def records(folder):
    """What a run leaves that must not depend on interruptions, as bytes."""
    folder = pathlib.Path(folder)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".csv", ".json")
        and path.parts[len(folder.parts)] in ("metrics", "result.json", "config.json")
    }


def train_to_the_end(folder, config, started=None, environment=None):
    """The main function of child processes: trains with --resume and saves the final parameters' bits.

    Args:
      started: an event to set after the first step; training is then slowed down, so that there is something to kill.
      environment: variables to set before JAX finds its devices.
    """
    os.environ.update(environment or {})
    train.initialize_distributed()
    # A script does this as it exits; children of multiprocessing skip what was registered with atexit.
    multiprocessing.util.Finalize(None, jax.distributed.shutdown, exitpriority=1)

    made = setup(config, Network(config.dropout_rate))

    def step(state, batch):
        state, metrics = made.step(state, batch)
        if started is not None:
            jax.block_until_ready(state)
            started.set()
            time.sleep(0.03)
        return state, metrics

    result = fit(folder, config, resume=True, step=step)
    params = multihost_utils.process_allgather(result.state.params, tiled=True)
    if jax.process_index() == 0:
        final = {name: np.frombuffer(data, np.uint8) for name, data in bits(params).items()}
        np.savez(pathlib.Path(folder) / "final.npz", **final)


# Children are forked from a process that has imported everything and touched no device: they start at once.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.train.problem"])

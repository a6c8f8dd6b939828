"""One update, one evaluation: pure functions, compiled once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from zoo.train.optimizer import Optimizer
from zoo.train.state import PyTree, TrainState

Metrics = dict[str, jax.Array]  # float32 scalars


class LossFunction(Protocol):
    """What a model brings to training: a mean over the batch's examples, so that micro-batches average to the batch.

    Returns (loss, (model_state, metrics)): a scalar to descend, the changed Flax collections (`model_state` itself
    where none is mutable), and named scalars, means over the batch like the loss.
    """

    def __call__(
        self, params: PyTree, model_state: PyTree, batch: PyTree, rngs: Mapping[str, jax.Array], train: bool
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The loss in training (train=True: dropout on) or evaluation; `rngs` as for `module.apply`."""


def make_train_step(
    loss_fn: LossFunction, optimizer: Optimizer, state: TrainState, rng_streams: Sequence[str] = ("dropout",)
) -> Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]:
    """Compiles `(state, batch) -> (state, metrics)`; the state's buffers are donated.

    A batch is cut into `optimizer.accumulation_steps` micro-batches whose gradients are averaged (model_state passes
    through them in turn). The metrics are loss_fn's, averaged, with "loss", "gradient_norm" (before clipping) and
    "learning_rate". An update from a loss or gradient that is not finite is not applied; see `TrainState.healthy`.

    Args:
      loss_fn: see `LossFunction`; called with train=True.
      optimizer: from `build_optimizer`.
      state: arrays, or jax.ShapeDtypeStruct for compiling ahead of time: its shardings are the next state's too.
      rng_streams: names of the PRNG keys that loss_fn gets, fresh at every step and micro-batch.

    Raises (at the first call):
      ValueError: the batch size is not a multiple of accumulation_steps, or loss_fn's metrics are not scalars.
    """
    microbatches = optimizer.accumulation_steps

    def gradients(params: PyTree, model_state: PyTree, batch: PyTree, rng: jax.Array) -> tuple[PyTree, PyTree, Metrics]:
        rngs = dict(zip(rng_streams, jax.random.split(rng, len(rng_streams)), strict=True))
        (loss, (model_state, metrics)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
            params, model_state, batch, rngs, train=True
        )
        return gradient, model_state, _scalars(loss, metrics)

    def accumulated(
        params: PyTree, model_state: PyTree, batch: PyTree, rng: jax.Array
    ) -> tuple[PyTree, PyTree, Metrics]:
        def body(carry: tuple[PyTree, PyTree], inputs: tuple[PyTree, jax.Array]) -> tuple[Any, Metrics]:
            total, model_state = carry
            gradient, model_state, metrics = gradients(params, model_state, *inputs)
            return (jax.tree.map(jnp.add, total, gradient), model_state), metrics

        zeros = jax.tree.map(jnp.zeros_like, params)
        inputs = (jax.tree.map(split, batch), jax.random.split(rng, microbatches))
        (total, model_state), metrics = jax.lax.scan(body, (zeros, model_state), inputs)
        return jax.tree.map(lambda x: x / microbatches, total), model_state, jax.tree.map(jnp.mean, metrics)

    def split(array: jax.Array) -> jax.Array:
        if array.shape[0] % microbatches:
            raise ValueError(f"batch size {array.shape[0]} is not a multiple of accumulation_steps = {microbatches}")
        # Micro-batch i takes the examples i, i + microbatches, ...: each device cuts its own part of the batch.
        return array.reshape(-1, microbatches, *array.shape[1:]).swapaxes(0, 1)

    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.step)
        gradient, model_state, metrics = (gradients if microbatches == 1 else accumulated)(
            state.params, state.model_state, batch, rng
        )
        updates, opt_state = optimizer.transformation.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if optimizer.ema_decay is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - optimizer.ema_decay)
        metrics["gradient_norm"] = optax.global_norm(gradient)
        metrics["learning_rate"] = jnp.asarray(optimizer.schedule(state.step), jnp.float32)

        healthy = state.healthy & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        old = (state.step, state.params, state.model_state, state.opt_state, state.ema_params)
        new = (state.step + 1, params, model_state, opt_state, ema_params)
        step, params, model_state, opt_state, ema_params = jax.tree.map(partial(jnp.where, healthy), new, old)
        return TrainState(step, params, model_state, opt_state, ema_params, state.rng, healthy), metrics

    # Shardings of the result are fixed: a second call finds what the first found, and every buffer can be reused.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, state.step.sharding))


def make_evaluation_step(
    loss_fn: LossFunction, rng_streams: Sequence[str] = ("dropout",)
) -> Callable[[TrainState, PyTree], Metrics]:
    """Compiles `(state, batch) -> metrics`: loss_fn with train=False and the averaged parameters where there are any.

    The keys of rng_streams are for models that sample while evaluating; they depend on the state alone.
    """

    @jax.jit
    def evaluation_step(state: TrainState, batch: PyTree) -> Metrics:
        variables = state.evaluation_variables
        params = variables.pop("params")
        keys = jax.random.split(jax.random.fold_in(state.rng, state.step), len(rng_streams))
        rngs = dict(zip(rng_streams, keys, strict=True))
        loss, (_, metrics) = loss_fn(params, variables, batch, rngs, train=False)
        return _scalars(loss, metrics)

    return evaluation_step


def _scalars(loss: jax.Array, metrics: Metrics) -> Metrics:
    reserved = {"loss", "gradient_norm", "learning_rate"} & set(metrics)
    if reserved:
        raise ValueError(f"loss_fn must not name its metrics {sorted(reserved)}: the step does")
    for name, value in {"loss": loss, **metrics}.items():
        if jnp.shape(value):
            raise ValueError(f"loss_fn must return scalars, got {name} of shape {jnp.shape(value)}")
    return {name: jnp.asarray(value, jnp.float32) for name, value in {"loss": loss, **metrics}.items()}

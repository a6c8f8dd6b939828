"""What a training step maps to its successor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from zoo.train.optimizer import Optimizer

PyTree = Any


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes, as one pytree of arrays.

    `healthy` turns False at the first loss or gradient that is not finite; from then on no update is applied, so that
    the state stays as it was before that step until somebody looks.
    """

    step: jax.Array  # () int32, updates applied so far
    params: PyTree  # float32
    model_state: PyTree  # the other Flax collections, e.g. {"batch_stats": ...}; {} for most models
    opt_state: PyTree
    ema_params: PyTree | None  # exponential moving average of params, None where the optimizer has no ema_decay
    rng: jax.Array  # a typed PRNG key, the same at every step: step t draws from fold_in(rng, t)
    healthy: jax.Array  # () bool

    @property
    def evaluation_variables(self) -> dict[str, PyTree]:
        """Flax variables to evaluate: the averaged parameters where there are any."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, **self.model_state}


def create_state(init: Callable[[jax.Array], PyTree], optimizer: Optimizer, rng: jax.Array) -> TrainState:
    """The state before the first step; pure, so that `zoo.train.sharding.init_sharded` can compile it.

    Args:
      init: maps a PRNG key to Flax variables, e.g. `lambda rng: model.init(rng, **example_inputs)`.
      optimizer: gives the optimizer's state and says whether there is an average.
      rng: a typed key (`jax.random.key(seed)`).

    Raises:
      TypeError: a parameter is not float32. Modules compute in their `dtype`; updates are kept in float32.
    """
    init_rng, rng = jax.random.split(rng)
    variables = dict(init(init_rng))
    params = variables.pop("params")
    for path, leaf in jax.tree.leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(f"parameters must be float32 (set param_dtype, not only dtype): {name} is {leaf.dtype}")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=variables,
        opt_state=optimizer.transformation.init(params),
        ema_params=None if optimizer.ema_decay is None else jax.tree.map(jnp.copy, params),
        rng=rng,
        healthy=jnp.ones((), bool),
    )

"""An autoencoder that descends a cost, and a network of directions that ascends it, in turns on each batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zoo.papers.vdsw.amortized import AmortizedDirection, directions
from zoo.papers.vdsw.sliced import Reduction, sliced_wasserstein, uniform_directions, v_dsw
from zoo.train import Optimizer, TrainState

Cost = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x, reconstruction, key) -> (B,)


def direction_optimizer(learning_rate: float = 1e-3) -> optax.GradientTransformation:
    """Adam with betas (0, 0.9), as published for the network of directions."""
    return optax.adam(learning_rate, b1=0.0, b2=0.9)


def two_players(autoencoder: optax.GradientTransformation, direction: optax.GradientTransformation) -> Optimizer:
    """Both players' optimizers as one, for `zoo.train.init_sharded`; parameters are {"autoencoder", "direction"}."""
    rules = {"autoencoder": autoencoder, "direction": direction}

    def init(params: Any) -> Any:
        return {name: rules[name].init(params[name]) for name in params}

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        found = {name: rules[name].update(gradients[name], state[name], params[name]) for name in gradients}
        return {name: pair[0] for name, pair in found.items()}, {
            name: found[name][1] if name in found else old for name, old in state.items()
        }

    return Optimizer(optax.GradientTransformation(init, update), lambda step: 0.0)


def two_player_step(
    autoencoder: Any,
    direction: AmortizedDirection | None,
    optimizer: Optimizer,
    *,
    cost: Cost | None = None,
    direction_steps: int = 1,
    fine_tuning: int = 0,
    fine_tuning_rate: float = 1e-3,
    reduction: Reduction = "sum",
    squared: bool = True,
    start: int = 0,
    end: int | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles `(state, batch) -> (state, metrics)` for `zoo.train.fit`; the batch holds clouds `x`.

    On each batch the directions ascend the cost of clouds and reconstructions, which are held, `direction_steps` times;
    then the autoencoder descends it along fresh directions around the prediction, which is held.

    Args:
      autoencoder: `x` to (code, reconstruction).
      direction: the network of directions; None descends `cost`.
      optimizer: from `two_players`.
      cost: what to descend without a network of directions; None is the sliced cost of 100 directions, also before
        `start` and from `end` on.
      direction_steps: see above.
      fine_tuning: steps of ascent from the prediction on (semi-amortised); needs a concentration.
      fine_tuning_rate: of their Adam.
      reduction, squared: as of `sliced_wasserstein`.
      start, end: the updates in between which the network of directions is used.

    Raises:
      ValueError: fine-tuning without a concentration, or no step of the directions.
    """
    if direction_steps < 1 or fine_tuning < 0:
        raise ValueError(
            f"direction_steps must be positive, fine_tuning not negative: {direction_steps}, {fine_tuning}"
        )
    if fine_tuning and (direction is None or direction.config.kappa is None):
        raise ValueError("fine_tuning needs a network of directions with a concentration")

    def plain(x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        theta = uniform_directions(key, len(x), 100, x.shape[-1])
        return sliced_wasserstein(x, y, theta, 2, reduction, squared=squared)

    fallback = plain if cost is None else cost

    def along(params: Any, x: jax.Array, y: jax.Array, key: jax.Array, held: bool) -> jax.Array:
        assert direction is not None
        location: Any = direction.apply({"params": params}, *jax.lax.stop_gradient((x, y)))
        if not held:
            theta = directions(location, key, direction.config)
        elif fine_tuning:
            kappa = direction.config.kappa
            assert kappa is not None
            return v_dsw(
                x, y, key, kappa=kappa, directions=direction.config.directions, start=location, steps=fine_tuning,
                lr=fine_tuning_rate, reduction=reduction,
            ).cost  # fmt: skip
        else:
            theta = directions(jax.lax.stop_gradient(location), key, direction.config)
        return sliced_wasserstein(x, y, theta, 2, reduction, squared=squared)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        x, params, opt_state = batch["x"], dict(state.params), dict(state.opt_state)
        keys = jax.random.split(jax.random.fold_in(state.rng, state.step), direction_steps + 2)
        amortized = jnp.asarray(direction is not None) & (state.step >= start)
        amortized = amortized if end is None else amortized & (state.step < end)

        def rebuilt(params: Any) -> tuple:
            variables = {"params": params, **state.model_state}
            (_, y), changed = autoencoder.apply(
                variables, x, train=True, mutable=list(state.model_state), rngs={"dropout": keys[-1]}
            )
            return y, changed

        y: jax.Array
        changed: Any
        y, transpose, changed = jax.vjp(rebuilt, params["autoencoder"], has_aux=True)
        if direction is not None:
            held = jax.lax.stop_gradient(y)
            for key in keys[:direction_steps]:
                gradient = jax.grad(lambda q: -along(q, x, held, key, False).mean())(params["direction"])  # noqa: B023
                moved, moved_state = _update(optimizer, "direction", gradient, opt_state, params)
                params, opt_state = jax.tree.map(
                    partial(jnp.where, amortized), (moved, moved_state), (params, opt_state)
                )

        def descend(y: jax.Array) -> jax.Array:
            if direction is None:
                return fallback(x, y, keys[-2]).mean()
            used = params["direction"]
            return jax.lax.cond(
                amortized,
                lambda y: along(used, x, y, keys[-2], True).mean(),
                lambda y: fallback(x, y, keys[-2]).mean(),
                y,
            )

        value, d_y = jax.value_and_grad(descend)(y)
        (gradient,) = transpose(d_y)
        params, opt_state = _update(optimizer, "autoencoder", gradient, opt_state, params)
        metrics = {"loss": value, "gradient_norm": optax.global_norm(gradient), "learning_rate": jnp.zeros(())}
        healthy = state.healthy & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        old = (state.step, dict(state.params), state.model_state, dict(state.opt_state))
        new = jax.tree.map(partial(jnp.where, healthy), (state.step + 1, params, changed, opt_state), old)
        number, kept, model_state, kept_state = new
        return TrainState(number, kept, model_state, kept_state, state.ema_params, state.rng, healthy), metrics

    return jax.jit(step, donate_argnums=0)


def _update(optimizer: Optimizer, player: str, gradient: Any, opt_state: dict, params: dict) -> tuple[dict, dict]:
    updates, opt_state = optimizer.transformation.update({player: gradient}, opt_state, params)
    return {**params, player: optax.apply_updates(params[player], updates[player])}, opt_state

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zoo.train import OptimizerConfig, build_optimizer, learning_rate_schedule

PARAMS = {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3), "bias": jnp.ones(3)}
GRADIENTS = {"kernel": jnp.full((2, 3), 0.5), "bias": jnp.array([0.1, -0.2, 0.3])}


def updates_of(config, steps=1):
    transformation = build_optimizer(config, total_steps=10).transformation
    state = transformation.init(PARAMS)
    for _ in range(steps):
        updates, state = transformation.update(GRADIENTS, state, PARAMS)
    return updates


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (OptimizerConfig("adam", 0.1), optax.adam(0.1)),
        (OptimizerConfig("adam", 0.1, b1=0.5, b2=0.9, eps=1e-3), optax.adam(0.1, 0.5, 0.9, 1e-3)),
        (
            OptimizerConfig("adamw", 0.1, weight_decay=0.2),
            optax.adamw(0.1, weight_decay=0.2, mask={"kernel": True, "bias": False}),
        ),
        (
            OptimizerConfig("lion", 0.1, b2=0.99, weight_decay=0.2),
            optax.lion(0.1, weight_decay=0.2, mask={"kernel": True, "bias": False}),
        ),
        (OptimizerConfig("sgd", 0.1), optax.sgd(0.1, momentum=0.9)),
        (
            OptimizerConfig("adam", 0.1, clip_norm=0.01),
            optax.chain(optax.clip_by_global_norm(0.01), optax.adam(0.1)),
        ),
    ],
)
def test_optimizers_are_those_of_optax(config, published):
    state = published.init(PARAMS)
    for _ in range(3):
        expected, state = published.update(GRADIENTS, state, PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates_of(config, 3), expected)


def test_sgd_adds_weight_decay_to_the_gradient_of_matrices():
    updates = updates_of(OptimizerConfig("sgd", 1.0, b1=0.0, weight_decay=0.1))
    np.testing.assert_allclose(updates["kernel"], -(GRADIENTS["kernel"] + 0.1 * PARAMS["kernel"]), rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], -GRADIENTS["bias"], rtol=1e-6)


def test_step_schedule_halves_every_epoch():
    # Informer's "type1": epoch e, counted from 0, trains with learning_rate / 2**e.
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1e-4, schedule="step"), 70, steps_per_epoch=7)
    np.testing.assert_allclose([schedule(step) for step in range(70)], [1e-4 * 0.5 ** (s // 7) for s in range(70)])


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("constant", lambda u: 1.0),
        ("linear", lambda u: 1 - 0.9 * u),
        ("cosine", lambda u: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * u))),
    ],
)
def test_schedule_rises_linearly_then_follows_its_formula(name, formula):
    config = OptimizerConfig(learning_rate=2.0, schedule=name, warmup_steps=5, final_fraction=0.1)
    schedule = learning_rate_schedule(config, total_steps=25)
    np.testing.assert_allclose([schedule(s) for s in range(5)], [2 * (s + 1) / 5 for s in range(5)], rtol=1e-6)
    expected = [2 * formula((s - 5) / 20) for s in range(5, 26)]
    np.testing.assert_allclose([schedule(s) for s in range(5, 26)], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "adamm"}, "name must be one of .*got 'adamm'"),
        ({"schedule": "cos"}, "schedule must be one of .*got 'cos'"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"final_fraction": 1.5}, r"final_fraction must be in \[0, 1\], got 1.5"),
        ({"decay_epochs": 0}, "decay_epochs must be at least 1"),
        ({"decay_factor": 0.0}, r"decay_factor must be in \(0, 1\]"),
        ({"b1": 1.0}, r"b1 must be in \[0, 1\)"),
        ({"b2": -0.1}, r"b2 must be in \[0, 1\)"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"clip_norm": 0.0}, "clip_norm must be None or positive"),
        ({"accumulation_steps": 0}, "accumulation_steps must be at least 1"),
        ({"ema_decay": 1.0}, r"ema_decay must be None or in \(0, 1\)"),
        ({"name": "adam", "weight_decay": 0.1}, "adam has no weight_decay, got 0.1"),
    ],
)
def test_wrong_fields_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OptimizerConfig(), **wrong)


def test_schedule_needs_room_and_epochs():
    with pytest.raises(ValueError, match="total_steps must be more than warmup_steps = 5, got 5"):
        build_optimizer(OptimizerConfig(warmup_steps=5), total_steps=5)
    with pytest.raises(ValueError, match="'step' needs steps_per_epoch"):
        build_optimizer(OptimizerConfig(schedule="step"), total_steps=5)

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import problem
from zoo import train


def make(network=problem.Network(), loss_fn=None, mesh=train.MeshConfig(data=1), **optimizer):
    options = {"learning_rate": 1e-2, **optimizer}
    built = train.build_optimizer(train.OptimizerConfig(**options), total_steps=100)
    state = train.init_sharded(problem.initializer(network), built, jax.random.key(0), train.make_mesh(mesh))
    return train.make_train_step(loss_fn or problem.make_loss(network), built, state), state, built


def batch(index=0, size=16):
    return jax.tree.map(jnp.asarray, problem.batches(batch_size=size)[index])


def test_accumulating_four_micro_batches_equals_one_batch():
    network = problem.Network(dropout_rate=0.0, batch_norm=False)
    one_step, one, _ = make(network, name="sgd", clip_norm=0.5)
    four_step, four, _ = make(network, name="sgd", clip_norm=0.5, accumulation_steps=4)
    for index in range(3):
        one, one_metrics = one_step(one, batch(index))
        four, four_metrics = four_step(four, batch(index))
        for name in one_metrics:
            np.testing.assert_allclose(one_metrics[name], four_metrics[name], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one.params, four.params)


def test_accumulation_passes_batch_statistics_through_the_micro_batches():
    step, state, _ = make(problem.Network(dropout_rate=0.0), accumulation_steps=2, name="sgd")
    network, params, statistics = problem.Network(), state.params, state.model_state
    variables = jax.tree.map(jnp.copy, {"params": params, **statistics})
    examples = batch()
    for part in (0, 1):
        x = examples["x"][part::2]
        _, changed = network.apply(
            variables, x, deterministic=False, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"]
        )
        variables = {**variables, **changed}
    state, _ = step(state, examples)
    for got, expected in zip(
        jax.tree.leaves(state.model_state), jax.tree.leaves(variables["batch_stats"]), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_average_of_parameters_follows_its_formula():
    step, state, _ = make(ema_decay=0.75)
    expected = jax.tree.map(np.asarray, state.params)
    for index in range(4):
        state, _ = step(state, batch(index))
        expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * np.asarray(p), expected, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.ema_params, expected)
    assert state.evaluation_variables["params"] is state.ema_params


def test_gradient_is_clipped_and_its_norm_reported_before():
    network = problem.Network(dropout_rate=0.0, batch_norm=False)
    step, state, _ = make(network, name="sgd", b1=0.0, learning_rate=1.0, clip_norm=1e-3)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = step(state, batch())
    change = jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, before)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(change)))
    np.testing.assert_allclose(norm, 1e-3, rtol=1e-3)
    assert metrics["gradient_norm"] > 1e-2


def test_first_non_finite_step_and_all_later_ones_change_nothing():
    step, state, _ = make(ema_decay=0.9)
    state, _ = step(state, batch(0))
    before = problem.bits(state.replace(healthy=None))
    bad = batch(1)
    bad["x"] = bad["x"].at[3, 1].set(jnp.inf)
    state, metrics = step(state, bad)
    assert not jnp.isfinite(metrics["loss"]) and not state.healthy and state.step == 1
    state, metrics = step(state, batch(2))
    assert jnp.isfinite(metrics["loss"]) and not state.healthy
    assert problem.bits(state.replace(healthy=None)) == before


def test_infinite_gradient_of_a_finite_loss_is_noticed():
    def loss_fn(params, model_state, batch, rngs, train):
        return jnp.sqrt(jnp.sum(jnp.square(params["w"]))), (model_state, {})  # at 0: loss 0, gradient NaN

    optimizer = train.build_optimizer(train.OptimizerConfig(), total_steps=10)
    state = train.create_state(lambda rng: {"params": {"w": jnp.zeros(3)}}, optimizer, jax.random.key(0))
    state, metrics = train.make_train_step(loss_fn, optimizer, state)(state, {"x": jnp.zeros(2)})
    assert metrics["loss"] == 0 and not state.healthy


def test_state_is_donated():
    step, state, _ = make(ema_decay=0.9)
    leaves = jax.tree.leaves(state)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.opt_state))}
    new, _ = step(state, batch())
    assert all(leaf.is_deleted() for leaf in leaves)
    reused = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(new)}
    assert len(pointers & reused) > len(pointers) // 2
    memory = step.lower(new, batch()).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((new.params, new.ema_params, new.opt_state, new.model_state)))
    assert memory.alias_size_in_bytes >= size


def host_operations(step, state):
    text = step.lower(state, batch()).compile().as_text()
    return re.findall(r'custom_call_target="[^"]*callback[^"]*"| (?:infeed|outfeed|send|recv)\(', text)


def test_compiled_step_never_calls_the_host():
    step, state, _ = make(accumulation_steps=2, clip_norm=1.0, ema_decay=0.9)
    assert host_operations(step, state) == []

    def talkative(params, model_state, batch, rngs, train):
        jax.debug.print("{}", batch["x"])
        return jnp.sum(params["Dense_0"]["bias"]), (model_state, {})

    step, state, _ = make(loss_fn=talkative)
    assert host_operations(step, state) != []  # the search finds what it looks for


def test_random_keys_differ_between_steps_and_micro_batches_and_repeat_with_the_seed():
    def loss_fn(params, model_state, batch, rngs, train):
        draw = jax.random.uniform(rngs["dropout"])
        return jnp.sum(params["w"]) * draw, (model_state, {"draw": draw, "square": draw**2})

    def draws(accumulation_steps):
        optimizer = train.build_optimizer(train.OptimizerConfig(accumulation_steps=accumulation_steps), total_steps=9)
        state = train.create_state(lambda rng: {"params": {"w": jnp.zeros(3)}}, optimizer, jax.random.key(0))
        step = train.make_train_step(loss_fn, optimizer, state)
        metrics = []
        for _ in range(3):
            state, metric = step(state, {"x": jnp.zeros(4)})
            metrics.append(metric)
        return metrics

    single = [float(metric["draw"]) for metric in draws(1)]
    assert len(set(single)) == 3 and single == [float(metric["draw"]) for metric in draws(1)]
    # Were the two draws of a step equal, the mean of squares would be the square of the mean.
    assert all(metric["square"] > metric["draw"] ** 2 + 1e-6 for metric in draws(2))


def test_bfloat16_module_keeps_float32_parameters_and_gradients():
    step, state, _ = make(problem.Network(dtype=jnp.bfloat16))
    state, metrics = step(state, batch())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state.params, metrics)))
    assert "bf16" in step.lower(state, batch()).as_text()


def test_bfloat16_parameters_are_refused():
    with pytest.raises(TypeError, match=r"parameters must be float32 .*BatchNorm_0/bias is bfloat16"):
        make(problem.Network(param_dtype=jnp.bfloat16))


def test_evaluation_uses_the_average_and_no_dropout():
    network = problem.Network(dropout_rate=0.9)
    step, state, _ = make(network, ema_decay=0.5)
    state, _ = step(state, batch())
    metrics = train.make_evaluation_step(problem.make_loss(network))(state, batch())
    prediction = network.apply({"params": state.ema_params, **state.model_state}, batch()["x"], deterministic=True)
    np.testing.assert_allclose(metrics["loss"], jnp.mean((prediction - batch()["y"]) ** 2), rtol=1e-6)
    assert set(metrics) == {"loss", "mae"}


def test_mean_over_unequal_batches_is_the_mean_over_examples():
    network = problem.Network()
    _, state, _ = make(network)
    mesh = train.make_mesh(train.MeshConfig(data=1))
    evaluation_step = train.make_evaluation_step(problem.make_loss(network))
    whole = jax.tree.map(lambda *rows: np.stack(rows), *problem.examples())
    parts = [jax.tree.map(lambda rows, at=at: rows[slice(*at)], whole) for at in ((0, 40), (40, 80), (80, 96))]
    together = train.evaluate(evaluation_step, state, [whole], mesh)
    for name, value in train.evaluate(evaluation_step, state, parts, mesh).items():
        np.testing.assert_allclose(value, together[name], rtol=1e-6)
    with pytest.raises(ValueError, match="the data is empty"):
        train.evaluate(evaluation_step, state, [], mesh)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda params, model_state, batch, rngs, train: (batch["y"][0, 0], ({}, {"loss": 0.0})), "must not name"),
        (
            lambda params, model_state, batch, rngs, train: (batch["y"][0, 0], ({}, {"mae": batch["y"]})),
            r"scalars, got mae of shape \(16, 1\)",
        ),
    ],
)
def test_wrong_metrics_are_named(loss_fn, message):
    step, state, _ = make(loss_fn=loss_fn)
    with pytest.raises(ValueError, match=message):
        step(state, batch())


def test_batch_must_divide_into_micro_batches():
    step, state, _ = make(accumulation_steps=3)
    with pytest.raises(ValueError, match="batch size 16 is not a multiple of accumulation_steps = 3"):
        step(state, batch())

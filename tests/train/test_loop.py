import csv
import dataclasses
import math
import os
import signal

import grain
import matplotlib.figure
import numpy as np
import pytest

from tests.train import problem
from zoo import train

CONFIG = problem.Config()


def config_with(**fields):
    return dataclasses.replace(CONFIG, fit=dataclasses.replace(CONFIG.fit, **fields))


def rows(folder, table):
    with open(folder / "metrics" / f"{table}.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from start to end."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, problem.fit(folder)


def test_same_seed_gives_the_same_bits(finished, tmp_path):
    folder, result = finished
    again = problem.fit(tmp_path)
    assert problem.bits(again.state) == problem.bits(result.state)
    assert problem.records(tmp_path) == problem.records(folder)


def test_another_seed_gives_another_state(finished, tmp_path):
    _, result = finished
    other = problem.fit(tmp_path, dataclasses.replace(CONFIG, seed=1))
    assert problem.bits(other.state.params) != problem.bits(result.state.params)


def test_loop_applies_the_step_to_the_batches_in_order(finished):
    _, result = finished
    made = problem.setup(CONFIG)
    state = made.state
    for index in range(32):
        state, _ = made.step(state, train.shard_batch(problem.batches()[index], made.mesh))
    assert problem.bits(state) == problem.bits(result.state)


def test_rows_are_means_over_the_steps_between(finished):
    folder, _ = finished
    made = problem.setup(CONFIG)
    state, losses = made.state, []
    for index in range(32):
        state, metrics = made.step(state, train.shard_batch(problem.batches()[index], made.mesh))
        losses.append(float(metrics["loss"]))
    table = rows(folder, "train")
    assert [int(row["step"]) for row in table] == [*range(3, 32, 3), 32]
    assert [float(row["loss"]) for row in table] == [np.mean(losses[i : i + 3]) for i in range(0, 32, 3)]
    assert set(table[0]) == {"step", "loss", "mae", "gradient_norm", "learning_rate"}
    assert [int(row["step"]) for row in rows(folder, "evaluation")] == [8, 16, 24, 32]


def test_training_lowers_the_loss_and_reports_the_best_state(finished):
    folder, result = finished
    values = [float(row["loss"]) for row in rows(folder, "evaluation")]
    assert min(values) < values[0]
    assert result.best_value == min(values) and result.best_step == 8 * (1 + int(np.argmin(values)))
    assert problem.setup(CONFIG).evaluate(result.best_state)["loss"] == result.best_value
    assert result.evaluation["loss"] == values[-1] and not result.stopped_early


def test_run_leaves_events_and_checkpoints(finished):
    folder, _ = finished
    assert list((folder / "tensorboard").glob("events*"))
    assert (folder / "checkpoints" / "32").is_dir() and (folder / "config.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [1, 3])  # in the evaluations at steps 8 and 24
def test_signal_saves_and_exits_with_zero_and_resuming_gives_the_same_bits(finished, tmp_path, number, at):
    folder, result = finished
    made = problem.setup(CONFIG)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    calls = []

    def evaluate(state):
        calls.append(int(state.step))
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return made.evaluate(state)

    with pytest.raises(SystemExit) as stopped:
        problem.fit(tmp_path, evaluate=evaluate)
    assert stopped.value.code == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert calls[-1] == 8 * at
    resumed = problem.fit(tmp_path, resume=True)
    assert problem.bits(resumed.state) == problem.bits(result.state)
    assert problem.bits(resumed.best_state) == problem.bits(result.best_state)
    assert problem.records(tmp_path) == problem.records(folder)


def test_rows_after_the_checkpoint_are_written_once(finished, tmp_path):
    """As a kill between two checkpoints leaves it: rows that will be computed again, the last one cut short."""
    folder, result = finished
    made = problem.setup(CONFIG)

    def evaluate(state):
        if state.step == 16:
            raise RuntimeError("power cut")
        return made.evaluate(state)

    with pytest.raises(RuntimeError, match="power cut"):
        problem.fit(tmp_path, evaluate=evaluate)
    assert int(rows(tmp_path, "train")[-1]["step"]) == 15
    with open(tmp_path / "metrics" / "train.csv", "a") as file:
        file.write("18,0.25,0.5,0.1,0.2\n21,0.1")
    resumed = problem.fit(tmp_path, resume=True)
    assert problem.bits(resumed.state) == problem.bits(result.state)
    assert problem.records(tmp_path) == problem.records(folder)


def test_finished_run_resumes_to_the_same_result(finished):
    folder, result = finished
    before = problem.records(folder)
    again = problem.fit(folder, resume=True)
    assert problem.bits(again.state) == problem.bits(result.state)
    assert again._replace(state=None, best_state=None) == result._replace(state=None, best_state=None)
    assert problem.records(folder) == before


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_training_stops_after_evaluations_without_a_best_one(tmp_path, mode, sign):
    values = iter([5.0, 3.0, math.nan, 3.0, 4.0, 1.0])  # NaN and a tie are not better
    config = config_with(steps=96, patience=3, best_metric="score", best_mode=mode)
    result = problem.fit(tmp_path, config, evaluate=lambda state: {"score": sign * next(values)})
    assert result.stopped_early and result.best_step == 16 and result.best_value == sign * 3.0
    assert result.state.step == 40 and result.best_state.step == 16
    resumed = problem.fit(tmp_path, config, resume=True, evaluate=None)
    assert resumed.stopped_early and problem.bits(resumed.state) == problem.bits(result.state)


def test_non_finite_loss_stops_with_the_step_and_the_batch(tmp_path):
    bad_x = problem.batches()[6]["x"]

    def transform(batch):
        y = batch["y"] * np.where(np.array_equal(batch["x"], bad_x), np.nan, 1).astype(np.float32)
        return {**batch, "y": y}

    with pytest.raises(train.NonFiniteError, match=r"step 7: loss nan, gradient norm nan\. .*step_7\.npz"):
        problem.fit(tmp_path, transform=transform)
    with np.load(tmp_path / "non_finite" / "step_7.npz") as saved:
        np.testing.assert_array_equal(saved["x"], bad_x)
        assert np.isnan(saved["y"]).all()
    assert sorted(path.name for path in (tmp_path / "non_finite").iterdir()) == ["step_7.npz"]
    # The rows before it are there, and resuming after the data was repaired continues.
    assert [int(row["step"]) for row in rows(tmp_path, "train")] == [3, 6]
    assert problem.fit(tmp_path, resume=True).state.step == 32


def test_figures_are_written_at_evaluations(tmp_path):
    def figures(state):
        figure = matplotlib.figure.Figure(figsize=(1, 1))
        figure.subplots().plot([0, int(state.step)])
        return {"forecast": figure}

    problem.fit(tmp_path, config_with(steps=8), figures=figures)
    assert (tmp_path / "figures" / "forecast.png").read_bytes().startswith(b"\x89PNG")


def test_epochs_count_in_steps_per_epoch(tmp_path):
    config = config_with(steps=None, epochs=3, evaluate_every=None, checkpoint_every=None)
    made = problem.setup(CONFIG)
    run = train.open_run(tmp_path, config)
    result = train.fit(
        made.step, made.state, problem.batches(), config.fit, run,
        mesh=made.mesh, steps_per_epoch=6, evaluate=made.evaluate,
    )  # fmt: skip
    assert result.state.step == 18
    assert [int(row["step"]) for row in rows(tmp_path, "evaluation")] == [6, 12, 18]
    # The two latest and the best: a checkpoint follows each evaluation.
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"12", "18", str(result.best_step)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": None}, "give steps or epochs, and one of them"),
        ({"epochs": 2}, "give steps or epochs, and one of them"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"evaluate_every": -1}, "evaluate_every must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"best_mode": "least"}, "best_mode must be 'min' or 'max', got 'least'"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"patience": 3, "best_metric": None}, "needs best_metric, got 3 and None"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        config_with(**fields)


@pytest.mark.parametrize(
    ("data", "fields", "options", "error", "message"),
    [
        (problem.batches(), {"steps": None, "epochs": 2}, {}, ValueError, "epochs need steps_per_epoch"),
        ([{"x": 0}], {}, {}, TypeError, "data must be a Grain dataset .*, got list"),
        (problem.batches(), {}, {"evaluate": None}, ValueError, "best_metric 'loss' needs evaluate"),
        (
            problem.batches(), {"evaluate_every": 1}, {"evaluate": lambda state: {"mse": 1.0}},
            ValueError, r"best_metric 'loss' is not one of \['mse'\]",
        ),
        (
            grain.MapDataset.source(problem.examples()).batch(16), {}, {},
            ValueError, "the data ended after 6 of 32 steps: repeat it",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(tmp_path, data, fields, options, error, message):
    made = problem.setup(CONFIG)
    config = config_with(**fields)
    run = train.open_run(tmp_path, config)
    options = {"evaluate": made.evaluate, **options}
    with pytest.raises(error, match=message):
        train.fit(made.step, made.state, data, config.fit, run, mesh=made.mesh, **options)


def test_table_keeps_its_columns(tmp_path):
    values = iter([{"loss": 1.0}, {"loss": 1.0, "mae": 2.0}])
    with pytest.raises(ValueError, match=r"evaluation has the columns \['step', 'loss'\], got .* at step 16"):
        problem.fit(tmp_path, evaluate=lambda state: next(values))


def test_metrics_are_read_late(tmp_path):
    """The host never waits for the step that it has just started."""
    made = problem.setup(CONFIG)
    started, lags = [0], []

    class Watched(dict):
        def items(self):
            lags.append(started[0] - self.number)
            return super().items()

    def step(state, batch):
        state, metrics = made.step(state, batch)
        started[0] += 1
        watched = Watched(metrics)
        watched.number = started[0]
        return state, watched

    config = config_with(evaluate_every=32, checkpoint_every=None)
    run = train.open_run(tmp_path, config)
    train.fit(step, made.state, problem.batches(), config.fit, run, mesh=made.mesh, evaluate=made.evaluate)
    assert lags == [4] * 28 + [3, 2, 1, 0]

"""Runs that are really killed, in processes of their own."""

import functools
import os
import random
import signal

import numpy as np
import pytest

from tests.train import problem
from zoo import train


def config(steps):
    return problem.Config(
        fit=train.FitConfig(
            steps=steps, log_every=3, evaluate_every=40, checkpoint_every=8, keep_checkpoints=1, best_metric="loss"
        )
    )


def start(folder, steps):
    """A run in a process of its own, after its first step."""
    started = problem.processes.Event()
    process = problem.processes.Process(target=problem.train_to_the_end, args=(folder, config(steps), started))
    process.start()
    assert started.wait(timeout=120)
    return process


def finish(folder, steps):
    """All that the run leaves, as bytes."""
    process = problem.processes.Process(target=problem.train_to_the_end, args=(folder, config(steps)))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0
    with np.load(folder / "final.npz") as file:
        return {name: file[name].tobytes() for name in file.files} | problem.records(folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return functools.cache(lambda steps: finish(tmp_path_factory.mktemp("uninterrupted"), steps))


@pytest.mark.parametrize(("kills", "steps"), [(3, 60), pytest.param(10, 180, marks=pytest.mark.slow)])
def test_run_killed_at_random_moments_ends_with_the_same_bits(uninterrupted, tmp_path, kills, steps):
    moments = random.Random(kills)
    for _ in range(kills):
        process = start(tmp_path, steps)
        process.join(timeout=moments.uniform(0.0, 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    assert finish(tmp_path, steps) == uninterrupted(steps)


def test_sigterm_ends_a_process_with_status_zero_and_a_checkpoint(uninterrupted, tmp_path):
    process = start(tmp_path, steps=60)
    process.join(timeout=0.3)
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=60)
    assert process.exitcode == 0 and not (tmp_path / "result.json").exists()
    assert any((tmp_path / "checkpoints").iterdir())
    assert finish(tmp_path, steps=60) == uninterrupted(60)

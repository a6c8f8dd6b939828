"""Runs that are really killed, in processes of their own."""

import os
import random
import signal

import numpy as np
import pytest

from tests.train import problem
from zoo import train

CONFIG = problem.Config(fit=train.FitConfig(steps=160, log_every=3, evaluate_every=40, checkpoint_every=4))


def start(folder):
    started = problem.processes.Event()
    process = problem.processes.Process(target=problem.train_to_the_end, args=(folder, CONFIG, started))
    process.start()
    assert started.wait(timeout=120)
    return process


def final(folder):
    with np.load(folder / "final.npz") as file:
        return {name: file[name].tobytes() for name in file.files}


def finish(folder):
    process = problem.processes.Process(target=problem.train_to_the_end, args=(folder, CONFIG))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0
    return final(folder), problem.records(folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_run_killed_at_random_moments_ends_with_the_same_bits(uninterrupted, tmp_path, kills):
    moments = random.Random(kills)
    for _ in range(kills):
        process = start(tmp_path)
        process.join(timeout=moments.uniform(0.0, 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    assert finish(tmp_path) == uninterrupted


def test_sigterm_ends_a_process_with_status_zero_and_a_checkpoint(uninterrupted, tmp_path):
    process = start(tmp_path)
    process.join(timeout=0.3)
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=60)
    assert process.exitcode == 0 and not (tmp_path / "result.json").exists()
    assert any((tmp_path / "checkpoints").iterdir())
    assert finish(tmp_path) == uninterrupted

"""Two real processes that talk by gloo."""

import dataclasses
import os
import signal
import socket
import time

import numpy as np
import pytest

from tests.train import problem
from zoo import train

# SGD and no dropout: rows lie in another order, so that the sums differ in their last bits, and only in those.
CONFIG = problem.Config(
    fit=train.FitConfig(steps=24, log_every=3, evaluate_every=12, checkpoint_every=6, best_metric="loss"),
    optimizer=train.OptimizerConfig("sgd", learning_rate=0.05, clip_norm=1.0, ema_decay=0.9),
    dropout_rate=0.0,
)


def start(folder, config, slow=False):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    events, children = [], []
    for index in range(2):
        environment = {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        events.append(problem.processes.Event() if slow else None)
        children.append(
            problem.processes.Process(target=problem.train_to_the_end, args=(folder, config, events[-1], environment))
        )
        children[-1].start()
    return children, events


def join(children):
    for child in children:
        child.join(timeout=240)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


@pytest.mark.parametrize(
    "mesh", [train.MeshConfig(data=1, fsdp=2, tensor=2), pytest.param(train.MeshConfig(), marks=pytest.mark.slow)]
)
def test_two_processes_give_the_result_of_one(tmp_path, mesh):
    single = problem.fit(tmp_path / "single", CONFIG)
    children, _ = start(tmp_path / "two", dataclasses.replace(CONFIG, mesh=mesh))
    assert join(children) == [0, 0]
    with np.load(tmp_path / "two" / "final.npz") as file:
        for name, expected in problem.bits(single.state.params).items():
            got, expected = file[name].view(np.float32), np.frombuffer(expected, np.float32)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    for table in ("train", "evaluation"):
        tables = [
            np.genfromtxt(tmp_path / run / "metrics" / f"{table}.csv", delimiter=",", names=True)
            for run in ("single", "two")
        ]
        for column in tables[0].dtype.names:
            np.testing.assert_allclose(tables[1][column], tables[0][column], rtol=1e-4)


def test_sigterm_to_one_process_stops_both_at_the_same_step(tmp_path):
    config = dataclasses.replace(
        CONFIG, mesh=train.MeshConfig(data=2, fsdp=2), fit=train.FitConfig(steps=400, log_every=10)
    )
    children, events = start(tmp_path, config, slow=True)
    for event in events:
        assert event.wait(timeout=120)
    time.sleep(0.5)
    os.kill(children[1].pid, signal.SIGTERM)
    assert join(children) == [0, 0]
    assert not (tmp_path / "final.npz").exists() and any((tmp_path / "checkpoints").iterdir())

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cape as experiment
from zoo import reports


@pytest.mark.slow
def test_a_run_leaves_its_record(tmp_path):
    experiment.run(experiment.PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and len(result.claims) == 4
    assert {claim.verdict for claim in result.claims} == {"not tested"}
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "guidance", "rollouts", "gates", "curriculum", "plane",
    }  # fmt: skip


@pytest.mark.slow
def test_the_quickest_claims_run(tmp_path):
    config = dataclasses.replace(experiment.PRESETS["smoke"], claims=("cost",))
    (claim,) = experiment.run(config, tmp_path).claims
    assert claim.measured["CAPE: parameters"] > 1000 and claim.verdict == "not tested"


def test_the_warm_up_moves_the_block_alone():
    params = {name: {"kernel": jnp.ones(3)} for name in ("block", "core", "mix")}
    optimizer = experiment.block_alone(0.1).transformation
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert jnp.abs(updates["block"]["kernel"]).min() > 0.09
    assert not jnp.any(updates["core"]["kernel"]) and not jnp.any(updates["mix"]["kernel"])


def test_borders_of_the_schedules():
    assert experiment.border_of("teacher forcing", 9, 10, 1, 21) == 1
    assert experiment.border_of("auto-regressive", 0, 10, 1, 21) == 21
    assert experiment.border_of("curriculum", 0, 10, 1, 21) == 1


def test_trajectories_are_split_by_shuffling():
    config = experiment.PRESETS["smoke"]
    kept, test = experiment.advection(config, config.speeds, 20, 0).split()
    assert len(kept.solution) == 36 and len(test.solution) == 4
    assert len(np.unique(kept.parameters)) == 2


def test_wrong_configs_and_missing_files_say_so(tmp_path):
    with pytest.raises(ValueError, match=r"unseen speeds are among the seen ones: \[0.2\]"):
        experiment.Config(unseen_speeds=(0.2,))
    with pytest.raises(ValueError, match="more epochs than the 3"):
        experiment.Config(training=experiment.Training(epochs=3))
    with pytest.raises(FileNotFoundError, match=r"1D_Advection_Sols_beta0\.2\.hdf5"):
        experiment.run(experiment.Config(data_dir=tmp_path), tmp_path / "run")

import dataclasses

import jax
import numpy as np
import pytest

from experiments import vdsw as experiment
from zoo import reports


@pytest.mark.slow
def test_a_run_leaves_its_record(tmp_path):
    experiment.run(experiment.PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and len(result.claims) == 4
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"invariance", "gap", "reconstructions"}


@pytest.mark.parametrize("cost", experiment.COSTS)
def test_every_cost_is_positive(cost):
    config = dataclasses.replace(experiment.PRESETS["smoke"], costs=("sw", cost))
    x, y = np.random.default_rng(0).normal(size=(2, 3, 16, 3)).astype(np.float32)
    value = jax.jit(experiment.cost_of(cost, config))(x, y, jax.random.key(0))
    assert value.shape == (3,) and (value > 0).all()


def test_wrong_configs_and_missing_data_say_so(tmp_path):
    with pytest.raises(ValueError, match=r"costs must be among .* got \['emd'\]"):
        experiment.Config(costs=("sw", "emd"))
    with pytest.raises(ValueError, match="no more test_points than points"):
        experiment.Config(points=100)
    with pytest.raises(ValueError, match="concentrations must be positive"):
        experiment.Config(kappas=(0.0,))
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        experiment.run(experiment.Config(data_dir=tmp_path / "none"), tmp_path / "run")

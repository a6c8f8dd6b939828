import dataclasses

import numpy as np
import pytest

from experiments import des_design
from zoo import reports
from zoo.papers.des_design import TASKS

SMOKE = des_design.PRESETS["smoke"]


@pytest.mark.slow
def test_a_run_leaves_its_record(tmp_path):
    des_design.run(SMOKE, tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and {claim.verdict for claim in result.claims} == {"not tested"}
    assert len(result.claims) == 5
    assert result.claims[-1].measured["designs with the fragment"] == [1.0]
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"forward", "inverse", "inpainting"}


@pytest.mark.slow
def test_one_claim_runs_alone(tmp_path):
    config = dataclasses.replace(SMOKE, claims=("synergy",))
    claim = des_design.run(config, tmp_path).claims[0]
    assert {"together, error", "together, unreadable"} <= set(claim.measured)
    assert {"alone, error", "Morgan + ridge, error"} <= set(claim.baselines)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "language_model_solubility_seed0",
        f"language_model_{'_'.join(TASKS)}_seed0",
    }


def test_parts_have_no_molecule_in_common_and_training_fixes_the_scale():
    data = des_design.prepare(des_design.load(SMOKE), 0)
    parts = [set(table.smiles) for table in data.properties]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    scaled = data.scaler.scale(data.properties.training.values)
    assert (scaled.min(), scaled.max()) == (-1, 1)


def test_tasks_are_texts_of_both_tables():
    data = des_design.prepare(des_design.load(SMOKE), 0)
    found = {task: des_design.texts(data, task)[0] for task in TASKS}
    assert found["properties"].count(",") == found["design"].count(",") == 6
    assert found["solubility"].startswith("Solubility<") and found["design_soluble"].startswith("DesignSoluble<")


def test_the_nearest_training_molecule_is_a_baseline_and_r2_of_the_mean_is_0():
    truth = np.array([[0.0, 1.0], [2.0, 5.0]])
    np.testing.assert_allclose(des_design.r2(np.tile(truth.mean(0), (2, 1)), truth), 0)
    networks = des_design.Networks(SMOKE, des_design.prepare(des_design.load(SMOKE), 0), 0, None)
    assert set(des_design.nearest(networks)) <= set(networks.data.properties.training.smiles)


def test_wrong_configs_and_missing_files_say_so(tmp_path):
    with pytest.raises(ValueError, match="length must be a multiple of 2"):
        dataclasses.replace(SMOKE, length=15)
    with pytest.raises(ValueError, match="there must be a seed"):
        dataclasses.replace(SMOKE, seeds=())
    with pytest.raises(FileNotFoundError, match=r"xtb_small\.csv"):
        des_design.run(des_design.Config(data_dir=tmp_path), tmp_path / "run")
    with pytest.raises(ValueError, match="molecules have at most"):
        des_design.load(dataclasses.replace(SMOKE, longest=2))

import dataclasses

import pytest

from experiments import druggen
from zoo import reports

SMOKE = druggen.PRESETS["smoke"]


@pytest.mark.slow
def test_a_run_leaves_its_record(tmp_path):
    druggen.run(SMOKE, tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and [claim.verdict for claim in result.claims] == ["not tested"]
    assert {"inputs: validity", "random edits: motif"} <= set(result.claims[0].baselines)
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"target", "attention"}


@pytest.mark.slow
def test_the_other_claims_run(tmp_path):
    config = dataclasses.replace(SMOKE, claims=("modulation", "penalty"), atom_features=True)
    claims = druggen.run(config, tmp_path).claims
    assert len(claims) == 2
    assert druggen.run(config, tmp_path, resume=True).claims == claims


def test_wrong_configs_and_missing_files_say_so(tmp_path):
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        druggen.Config(learning_rate=0)
    with pytest.raises(FileNotFoundError, match=r"chembl_druglike\.smi\.gz"):
        druggen.run(druggen.Config(data_dir=tmp_path), tmp_path / "run")
    with pytest.raises(ValueError, match="target akt1 needs --data-dir"):
        druggen.run(druggen.PRESETS["paper"], tmp_path / "run")

import dataclasses

import pytest

from experiments import dsf as experiment
from zoo import reports


@pytest.mark.slow
def test_a_run_leaves_its_record(tmp_path):
    experiment.run(experiment.PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke"
    assert [claim.verdict for claim in result.claims] == ["reproduced", "not tested", "not tested", "not tested"]
    names = {"exactness", "normaliser", "expansion", "reversed_sigmoid"}
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == names


def test_a_claim_alone_leaves_its_record(tmp_path):
    config = dataclasses.replace(experiment.PRESETS["smoke"], claims=("expansion",), expansions=(2,))
    (claim,) = experiment.run(config, tmp_path).claims
    assert claim.verdict == "not tested" and len(claim.measured) == 1
    assert (tmp_path / "figures" / "expansion.png").exists()


def test_wrong_configs_say_so():
    with pytest.raises(ValueError, match="seeds must not be empty"):
        experiment.Config(seeds=())
    with pytest.raises(ValueError, match=r"at least 4 pairs .*Task\(length=16, pairs=8, d_model=8\)"):
        experiment.Config(attention_task=experiment.Task(16, 8, 8))
    with pytest.raises(ValueError, match="at least batch_size = 64 examples, got 3"):
        experiment.Config(examples=3)

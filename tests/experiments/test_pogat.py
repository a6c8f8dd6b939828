import dataclasses

import pytest

from experiments import pogat
from zoo import reports

SMOKE = pogat.PRESETS["smoke"]


@pytest.mark.slow
def test_a_run_leaves_its_record(tmp_path):
    pogat.run(SMOKE, tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and [claim.verdict for claim in result.claims] == ["not tested"]
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"xor"}


@pytest.mark.slow
def test_the_other_claims_run(tmp_path):
    claims = pogat.run(dataclasses.replace(SMOKE, claims=("films", "perturbation")), tmp_path).claims
    assert {name.split(":")[0] for name in claims[0].baselines} == {"HAN", "R-GCN", "GAT", "logistic regression"}


def test_splits_are_apart():
    parts = pogat.split(pogat.planted_task(SMOKE).labelled, 0)
    assert len({*parts.train, *parts.validation, *parts.test}) == sum(map(len, parts)) == 40


def test_wrong_configs_and_missing_files_say_so(tmp_path):
    with pytest.raises(ValueError, match=r"few_labels must be in \(0, 1\)"):
        pogat.Config(few_labels=1.0)
    with pytest.raises(FileNotFoundError, match=r"codex_film\.npz"):
        pogat.run(pogat.Config(data_dir=tmp_path), tmp_path / "run")

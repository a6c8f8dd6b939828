import pytest

from experiments import deconstructing_attention as experiment
from zoo import reports


def test_a_run_leaves_its_record(tmp_path):
    experiment.run(experiment.PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke"
    assert [claim.verdict for claim in result.claims] == ["not tested"] * 3
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"arrangements", "indicators", "context"}


def test_wrong_configs_and_missing_files_say_so(tmp_path):
    with pytest.raises(ValueError, match="the variant 'standard' to compare with"):
        experiment.Config(variants=("mlp",))
    with pytest.raises(ValueError, match="did you mean 'even'"):
        experiment.Config(hybrid="evn")
    with pytest.raises(ValueError, match="length must be at least 16, got 8"):
        experiment.Config(length=8)
    with pytest.raises(FileNotFoundError, match=r"holds no \.txt file"):
        experiment.run(experiment.Config(data_dir=tmp_path), tmp_path / "run")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="the text has 9 bytes"):
        experiment.run(experiment.Config(data_dir=tmp_path), tmp_path / "run")

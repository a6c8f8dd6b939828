import pytest

from experiments import icl_meta_optimizer
from zoo import reports


def test_a_run_leaves_its_record(tmp_path):
    icl_meta_optimizer.run(icl_meta_optimizer.PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke"
    assert [claim.verdict for claim in result.claims] == ["reproduced", "not tested", "not tested"]
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"similarity", "momentum"}


def test_wrong_configs_and_missing_files_say_so(tmp_path):
    with pytest.raises(ValueError, match=r"momenta must be in \(0, 1\)"):
        icl_meta_optimizer.Config(momenta=(1.0,))
    with pytest.raises(FileNotFoundError, match=r"no stsa\.binary\.train"):
        icl_meta_optimizer.run(icl_meta_optimizer.Config(data_dir=tmp_path), tmp_path / "run")

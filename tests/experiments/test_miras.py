import dataclasses

import pytest

from experiments import miras
from zoo import reports

SMOKE = miras.PRESETS["smoke"]


def test_outliers_leave_their_record(tmp_path):
    config = dataclasses.replace(SMOKE, claims=("outliers",))
    miras.run(config, tmp_path / "run")
    result = reports.load_result(tmp_path / "run/result.json")
    assert result.paper == "miras" and len(result.claims[0].measured) == 12
    assert (tmp_path / "run/figures/outliers.png").exists()
    with pytest.raises(FileExistsError, match="holds a run"):
        miras.run(config, tmp_path / "run")


@pytest.mark.slow
def test_language_models_train(tmp_path):
    result = miras.run(dataclasses.replace(SMOKE, claims=("language",)), tmp_path / "run")
    assert result.claims[0].verdict == "not tested" and "order" in result.claims[0].measured


def test_instances_equal_their_kernels():
    found = miras.instance_errors(time=20)
    assert set(found) == {
        "linear_attention", "retnet", "mamba2", "gla", "deltanet", "gated_deltanet", "ttt_linear"
    }  # fmt: skip
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": dataclasses.replace(SMOKE.language, seeds=())}, "at least one seed"),
        ({"language": dataclasses.replace(SMOKE.language, mixers=("yad",))}, "mixers must be of .*got 'yad'"),
        ({"stream": dataclasses.replace(SMOKE.stream, etas=())}, "at least one seed and step"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **options)

import dataclasses

import pytest

from experiments import cloudformer
from zoo import reports


def test_smoke_leaves_its_record(tmp_path):
    cloudformer.run(cloudformer.PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and [claim.verdict for claim in result.claims] == ["not tested"] * 4
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "unseen", "explanation", "dynamic", "resolution"
    }  # fmt: skip


@pytest.mark.slow
def test_all_networks(tmp_path):
    config = dataclasses.replace(
        cloudformer.PRESETS["smoke"], claims=("unseen",), networks=("dual", "temporal", "system", "lstm")
    )
    assert len(cloudformer.run(config, tmp_path).claims) == 1


@pytest.mark.parametrize(
    "options, message",
    [({"networks": ("lstm",)}, "networks must have 'dual'"), ({"runs": 9}, "runs must be at least 50, for all parts")],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(cloudformer.PRESETS["smoke"], **options)

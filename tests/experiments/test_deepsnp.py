import dataclasses

import pytest

from experiments import deepsnp
from zoo import reports


def test_smoke_leaves_its_record(tmp_path):
    deepsnp.run(deepsnp.PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and [claim.verdict for claim in result.claims] == ["not tested"] * 3
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"windows", "sequence", "localization", "loh"}


@pytest.mark.slow
def test_all_networks(tmp_path):
    config = dataclasses.replace(
        deepsnp.PRESETS["smoke"], claims=("windows",), networks=("v1", "v2", "v1_no_att", "v1_full_att", "densenet")
    )
    assert len(deepsnp.run(config, tmp_path).claims) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"networks": ("v2",)}, "networks must have 'v1' and 'densenet'"),
        ({"batch_size": 7}, "batch_size must be even"),
        ({"cellularities": (1.5,)}, r"cellularities must be in \[0, 1\], got 1\.5"),
        ({"margin": 5}, "a window of 20 probes is too short"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(deepsnp.PRESETS["smoke"], **options)

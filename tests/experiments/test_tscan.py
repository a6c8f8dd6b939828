import dataclasses

import pytest

from experiments import tscan
from zoo import reports


def test_smoke_leaves_its_record(tmp_path):
    tscan.run(tscan.PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and [claim.verdict for claim in result.claims] == ["not tested"] * 3
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"ihm", "indicators", "order"}


@pytest.mark.slow
def test_all_tasks_and_networks(tmp_path):
    config = dataclasses.replace(
        tscan.PRESETS["smoke"], claims=("tasks",), tasks=("ihm", "decomp", "los", "ph"),
        networks=("tandf", "t", "f", "transformer", "gru"),
    )  # fmt: skip
    assert len(tscan.run(config, tmp_path).claims) == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"networks": ("gru",)}, "networks must have 'tandf' and 'f'"),
        ({"claims": ("order",)}, "claims 'indicators' and 'order' read the networks of claim 'tasks'"),
        ({"seeds": ()}, "seeds must not be empty"),
        ({"patients": 3}, "patients must be at least 50"),
        ({"tasks": ("ihm", "ph"), "data_dir": "somewhere"}, "the real set has no phenotypes"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tscan.PRESETS["smoke"], **options)

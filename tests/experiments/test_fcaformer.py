import dataclasses

import pytest

from experiments import fcaformer
from zoo import reports

SMOKE = fcaformer.PRESETS["smoke"]


def test_a_run_leaves_its_record(tmp_path):
    fcaformer.run(dataclasses.replace(SMOKE, claims=("training",)), tmp_path / "run")
    result = reports.load_result(tmp_path / "run/result.json")
    assert result.data == "digits" and result.claims[0].verdict == "not tested"


@pytest.mark.slow
def test_every_claim_is_measured(tmp_path):
    claims = ("training", "cross", "plain", "factors")
    found = fcaformer.run(dataclasses.replace(SMOKE, claims=claims), tmp_path / "run").claims
    assert [claim.verdict for claim in found] == ["not tested"] * 4
    assert {f"{name}, accuracy %" for name in ("no cross tokens", "no enhancement", "neither")} < set(
        found[1].baselines
    )
    assert found[3].measured["distance of factors before the norm from 1, root mean square"][0] < 0.1
    assert all((tmp_path / f"run/figures/{name}.png").exists() for name in claims[1:])


def test_data_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ValueError, match="sign_digits is not part of the zoo: give --data-dir"):
        fcaformer.run(dataclasses.replace(SMOKE, data="sign_digits"), tmp_path)
    with pytest.raises(ValueError, match="at least one seed"):
        dataclasses.replace(SMOKE, seeds=())

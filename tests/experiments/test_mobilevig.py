import dataclasses

import numpy as np
import pytest

from experiments import mobilevig
from zoo import reports

SMOKE = mobilevig.PRESETS["smoke"]


def test_a_run_leaves_its_record(tmp_path):
    mobilevig.run(dataclasses.replace(SMOKE, claims=("training",)), tmp_path / "run")
    result = reports.load_result(tmp_path / "run/result.json")
    assert result.data == "digits" and result.claims[0].verdict == "not tested"


@pytest.mark.slow
def test_every_claim_is_measured(tmp_path):
    claims = mobilevig.run(SMOKE, tmp_path / "run").claims
    assert [claim.verdict for claim in claims] == ["not tested"] * 4
    assert len(claims[1].measured["accuracy with KNN, %"]) == 1 and claims[1].measured["SVGA block, 7 x 7, ms"] > 0
    assert claims[2].baselines.keys() == {"accuracy with nothing, %", "accuracy with convolution, %"}
    assert (tmp_path / "run/figures/graph.png").exists()


def test_pairs_are_the_same_digit_or_not():
    data = mobilevig.pairs_of_digits(400)
    assert data.train.images.shape == (400, 64, 64, 3) and len(data.test) == 100
    assert 0.4 < np.mean(data.train.labels) < 0.6
    assert not data.train.images[:, :16, 48:].any()  # nothing in the other corners


def test_data_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ValueError, match="sign_digits is not part of the zoo: give --data-dir"):
        mobilevig.run(dataclasses.replace(SMOKE, data="sign_digits"), tmp_path)
    with pytest.raises(ValueError, match="at least one seed"):
        dataclasses.replace(SMOKE, seeds=())

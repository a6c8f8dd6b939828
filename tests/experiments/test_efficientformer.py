import dataclasses
import json

import numpy as np
import pytest

from experiments import efficientformer
from zoo import reports
from zoo.papers.efficientformer import search

SMOKE = efficientformer.PRESETS["smoke"]


def test_a_run_leaves_its_record(tmp_path):
    config = dataclasses.replace(SMOKE, claims=("training",))
    efficientformer.run(config, tmp_path / "run")
    result = reports.load_result(tmp_path / "run/result.json")
    assert result.data == "digits" and result.claims[0].verdict == "not tested"
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["image_size"] == [32, 32]
    assert (tmp_path / "run/figures/predictions.png").exists()


@pytest.mark.slow
def test_the_search_runs_end_to_end(tmp_path):
    config = dataclasses.replace(SMOKE, claims=("dimensions", "slimming", "attention"))
    result = efficientformer.run(config, tmp_path / "run")
    dimensions, slimming, attention = result.claims
    assert "tokens over L1, batch 1" in dimensions.measured
    start, found = slimming.measured["blocks' latency by the table, start and found, ms"]
    assert found <= 0.81 * start and slimming.baselines["uniform widths"]
    assert set(attention.measured) >= {"accuracy with 0 on tokens, %", "accuracy with 1 on tokens, %"}
    assert (tmp_path / "run/figures/slimming.png").exists()


def test_the_uniform_network_is_the_largest_within_the_latency():
    config = SMOKE.slimming.model
    config = dataclasses.replace(config, widths=(32, 32, 32, 64), depths=(1, 1, 1, 1))
    seconds = {(s, p, w): w * (1 + p) for s in range(4) for p in range(2) for w in range(16, 65, 16)}
    table = search.LatencyTable(seconds)
    whole = efficientformer.uniform(config, table, np.inf)
    assert whole.widths == config.widths
    half = efficientformer.uniform(config, table, 0.6 * table.total(whole, config))
    assert half.widths == (16, 16, 16, 48) and half.paths == whole.paths


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "sign_digits"}, "sign_digits is not part of the zoo: give --data-dir"),
        ({"data": "imagenet2012"}, "imagenet2012 is not part of the zoo"),
    ],
)
def test_data_that_is_not_there_says_so(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        efficientformer.run(dataclasses.replace(SMOKE, **options), tmp_path)


def test_wrong_configs_say_so():
    with pytest.raises(ValueError, match=r"needs model\.distillation"):
        dataclasses.replace(SMOKE, teacher="regnety_160")
    with pytest.raises(ValueError, match=r"slimming\.target must be in \(0, 1\), got 1"):
        dataclasses.replace(SMOKE, slimming=dataclasses.replace(SMOKE.slimming, target=1))

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import informer
from zoo import reports
from zoo.data.time_series import Series, time_features

SMOKE = informer.PRESETS["smoke"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "smoke"
    informer.run(SMOKE, workdir)
    return workdir


@pytest.mark.slow  # every claim; `zoo run` of one is in tests/test_cli.py
def test_a_run_leaves_its_record(folder):
    result = reports.load_result(folder / "result.json")
    assert result.claims[0].verdict == "not tested"
    assert result.preset == "smoke" and result.data == "traffic" and len(result.claims) == 3
    assert {"persistence, mse", "seasonal naive, mse", "linear map, mae"} <= set(result.claims[0].baselines)
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["d_model"] == 16
    with open(folder / "metrics" / "evaluation.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4"]
    assert list((folder / "tensorboard").iterdir()) and list((folder / "checkpoints").iterdir())
    pictures = {path.name.split("_")[0].split(".")[0] for path in (folder / "figures").rglob("*.png")}
    assert {"cost", "forecasts", "active"} <= pictures


@pytest.mark.slow  # every claim; `zoo run` of one is in tests/test_cli.py
def test_resuming_a_finished_run_changes_nothing(folder):
    before = reports.load_result(folder / "result.json")
    config = dataclasses.replace(SMOKE, claims=("accuracy",))
    with pytest.raises(FileExistsError, match="holds a run"):
        informer.run(SMOKE, folder)
    with pytest.raises(ValueError, match="claims was"):
        informer.run(config, folder, resume=True)
    after = informer.run(SMOKE, folder, resume=True)
    assert after.claims[:2] == before.claims[:2]


def test_baselines_know_what_they_say():
    # A series with a rhythm of a day: yesterday's value is exact, and so is a linear map.
    dates = np.datetime64("2020-01-01", "s") + np.arange(20 * 30 * 24) * np.timedelta64(1, "h")
    phase = 2 * np.pi * np.arange(len(dates))[:, None] / 24 + np.arange(3)
    series = Series(dates, np.sin(phase), ("a", "b", "c"))
    model = dataclasses.replace(SMOKE.model, seq_len=48, label_len=24, pred_len=24)
    config = dataclasses.replace(SMOKE, model=model, evaluation_batches=None)
    scores = informer.baselines(informer.cut(series, model, config), model, config)
    assert scores["seasonal naive"].metrics["mse"] < 1e-9 and scores["linear map"].metrics["mse"] < 1e-9
    assert scores["linear map per channel"].metrics["mse"] < 1e-9
    # The mean of (x_t - x_last)^2 over a day's horizons, of a sinusoid of variance 1.
    np.testing.assert_allclose(scores["persistence"].metrics["mse"], 2.0, rtol=1e-3)
    windows = len(informer.cut(series, model, config).test)
    assert scores["persistence"].of_windows.shape == (windows // 32 * 32,)


def test_batches_are_what_the_network_takes():
    dates = np.datetime64("2020-01-01", "s") + np.arange(20 * 30 * 24) * np.timedelta64(1, "h")
    values = np.random.default_rng(0).normal(size=(len(dates), 3))
    model = dataclasses.replace(SMOKE.model, features="MS", c_out=1)
    config = dataclasses.replace(SMOKE, model=model, inverse=True)
    data = informer.cut(Series(dates, values, ("a", "b", "c")), model, config)
    batch = informer.network_batches(data.test, model, config, None)[0]
    assert batch["x_enc"].shape == (32, 24, 3) and batch["x_dec"].shape == (32, 24, 3)
    assert batch["y"].shape == (32, 12, 1) and (batch["x_dec"][:, 12:] == 0).all()
    np.testing.assert_allclose(batch["x_dec"][:, :12], batch["x_enc"][:, 12:])
    start = 16 * 30 * 24  # the first test target; `inverse` leaves it in the data's units
    np.testing.assert_allclose(batch["y"][0, :, 0], values[start : start + 12, 2], rtol=1e-6)
    np.testing.assert_allclose(batch["x_mark_dec"][0], time_features(dates[start - 12 : start + 12]))


def test_the_published_formulation_of_probsparse_is_the_same_function():
    query, key, value = (jax.random.normal(rng, (2, 40, 3, 8)) for rng in jax.random.split(jax.random.key(0), 3))
    sample = informer.prob_sparse.sample_keys(jax.random.key(1), 40, 40, 20)
    operands = (query, key, value, sample)
    np.testing.assert_allclose(
        informer.published_prob_sparse(*operands), informer.zoo_prob_sparse(*operands), atol=1e-5
    )
    np.testing.assert_allclose(informer.published_canonical(*operands), informer.zoo_canonical(*operands), atol=1e-5)


def test_block_bootstrap_is_as_wide_as_correlated_noise_is():
    rng = np.random.default_rng(0)
    noise = np.convolve(rng.normal(size=3000), np.ones(50) / 50, "valid")
    low, high = informer.block_bootstrap(noise, block=200)
    assert low < noise.mean() < high
    # The mean's standard deviation is 3000^-0.5, seven times what independent draws of the values would suggest.
    np.testing.assert_allclose(high - low, 2 * 1.96 * 3000**-0.5, rtol=0.25)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seeds": ()}, "seeds must name at least one seed"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **options)


def test_data_of_other_channels_says_so(tmp_path):
    model = dataclasses.replace(SMOKE.model, enc_in=7)
    with pytest.raises(ValueError, match=r"traffic with features 'M' has 3 columns: set model\.enc_in"):
        informer.run(dataclasses.replace(SMOKE, model=model), tmp_path)


def test_data_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ValueError, match="ETTh1 is not part of the zoo: give --data-dir"):
        informer.run(dataclasses.replace(SMOKE, data="ETTh1"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ETTh1\.csv"):
        informer.run(dataclasses.replace(SMOKE, data="ETTh1", data_dir=tmp_path), tmp_path)

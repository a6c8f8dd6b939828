import dataclasses

import numpy as np
import pytest

from zoo.bootstrap import bootstrap_interval
from zoo.data import icu


@pytest.fixture(scope="module")
def stays():
    return icu.simulate_icu(120)


def test_values_are_carried_forward_and_filled_with_the_median(stays):
    values = np.full((4, 48, 1), np.nan, np.float32)
    values[0, 3], values[0, 10] = 1.0, 3.0
    values[1, 0] = 2.0
    values[2, 0] = 1000.0  # clipped to what training patients have
    small = icu.ICUStays(values, np.zeros((4, 1), np.float32), ("a",), ("b",), {}, {})
    encoded = icu.encode_stays(small, np.array([0, 1]))
    channel = encoded.x[:, :, 0]
    assert encoded.x.shape == (4, 48, 3) and encoded.names == ("a", "b")
    assert (channel[0, 3:10] == channel[0, 3]).all() and (channel[0, 10:] == channel[0, 10]).all()
    assert channel[0, 0] == channel[1, 0] == channel[3, 5]  # the median, 2
    assert channel[2, 0] == pytest.approx(channel[0, 10], abs=0.1)
    np.testing.assert_array_equal(encoded.x[0, :, 2], np.isin(np.arange(48), (3, 10)))


def test_statistics_are_of_training_patients_alone(stays):
    training = np.arange(60)
    x = icu.encode_stays(stays, training).x
    channels = len(stays.names) + len(stays.static_names)
    np.testing.assert_allclose(x[:60, :, :channels].mean((0, 1)), 0, atol=1e-4)
    np.testing.assert_allclose(x[:60, :, :channels].std((0, 1)), 1, atol=1e-3)
    changed = dataclasses.replace(stays, values=np.concatenate([stays.values[:60], 9 + stays.values[60:]]))
    np.testing.assert_array_equal(icu.encode_stays(changed, training).x[:60], x[:60])


def test_parts_share_no_patient():
    split = icu.split_patients(100)
    assert sorted(np.concatenate(split)) == list(range(100)) and [len(part) for part in split] == [70, 10, 20]


def test_the_simulator_s_sick_patients_die(stays):
    pressure = np.nanmean(stays.values[:, 24:, stays.names.index("MAP")], axis=1)
    death = stays.labels["ihm"] == 1
    assert 0.05 < death.mean() < 0.5 and pressure[death].mean() < pressure[~death].mean()
    assert stays.labels["decomp"].sum() <= death.sum() and stays.labels["ph"].shape == (120, 3)


def test_the_published_table_is_read(tmp_path):
    np.savez(
        tmp_path / "set_a_hourly.npz", patient=[0, 1], hour=[5, 47], variable=[1, 0], value=[7.5, 2.0],
        static=[[60, 1, 170, 3, 70], [np.nan, 0, 1.8, 1, 80]], outcomes=[[1, 5, 3, 12, 4], [0, -1, -1, -1, 2]],
        outcome_names=["in_hospital_death", "length_of_stay_days", "survival_days", "saps_i", "sofa"],
        variable_names=["HR", "GCS"],
    )  # fmt: skip
    stays = icu.read_physionet2012(tmp_path)
    assert stays.values.shape == (2, 48, 2) and stays.values[0, 5, 1] == 7.5 and np.isnan(stays.values[0, 5, 0])
    assert list(stays.labels["decomp"]) == [1, 0] and list(stays.labels["los"]) == [5, -1]
    assert np.isnan(stays.static[1, 2]) and stays.static[1, 8] == 1 and list(stays.static[0, 4:8]) == [0, 0, 1, 0]
    assert np.isnan(stays.scores["saps_i"][1])
    with pytest.raises(FileNotFoundError, match=r"give the folder of set_a_hourly\.npz"):
        icu.read_physionet2012(tmp_path / "nowhere")


def test_a_mean_s_interval_is_as_wide_as_theory_says():
    x = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(np.mean, x)
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15) and low < x.mean() < high
    with pytest.raises(ValueError, match="equally many examples"):
        bootstrap_interval(np.mean, x, x[:3])

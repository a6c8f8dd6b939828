import datetime
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.data.hourly_traffic import hourly_traffic
from zoo.data.pipeline import batches
from zoo.data.time_series import (
    Scaler,
    Series,
    Windows,
    extend_dates,
    forecast_windows,
    future_window,
    month_borders,
    ratio_borders,
    read_csv,
    time_features,
)


def hourly(rows: int, columns: int = 3, seed: int = 0) -> Series:
    dates = np.datetime64("2016-07-01T00:00:00") + np.arange(rows) * np.timedelta64(3600, "s")
    values = np.random.default_rng(seed).normal(size=(rows, columns)).cumsum(0) + 5
    return Series(dates, values, tuple("abcdefg"[:columns]), "h")


@pytest.fixture(scope="module")
def series() -> Series:
    return hourly(17420)


def write(path, rows, header="date,a,b"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


GOOD = ["2016-07-01 00:00:00,1,2.5", "2016-07-01 01:00:00,3,-4e-1", "2016-07-01 02:00:00,5,6"]


def test_csv_gives_dates_values_and_columns(tmp_path):
    table = read_csv(write(tmp_path / "t.csv", GOOD))
    assert table.columns == ("a", "b") and len(table) == 3
    np.testing.assert_array_equal(table.values, [[1, 2.5], [3, -0.4], [5, 6]])
    assert table.dates[1] == np.datetime64("2016-07-01T01:00:00")
    assert read_csv(tmp_path / "t.csv", columns=["b"]).columns == ("b",)


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (GOOD, "time,a,b", "no column 'date' in the header"),
        (GOOD, "date,a,a", "repeats a name"),
        (GOOD, "date,a", "line 2: 3 cells, the header has 2"),
        ([], "date,a,b", "has a header but no rows"),
        ([GOOD[0], "2016-07-01 01:00:00,,2"], "date,a,b", r"1 rows have missing or infinite values, lines 3"),
        ([GOOD[0], "2016-07-01 01:00:00,nan,2"], "date,a,b", r"missing or infinite values, lines 3"),
        ([GOOD[0], "2016-07-01 01:00:00,inf,2"], "date,a,b", r"missing or infinite values, lines 3"),
        ([GOOD[0], "2016-07-01 01:00:00,x,2"], "date,a,b", "line 3: column 'a' holds 'x', not a number"),
        ([GOOD[0], "yesterday,1,2"], "date,a,b", "line 3: 'yesterday' is not a date"),
        ([GOOD[0], ",1,2"], "date,a,b", "line 3: '' is not a date"),
        ([GOOD[0], GOOD[0]], "date,a,b", "row 1: .* repeats"),
        ([GOOD[1], GOOD[0]], "date,a,b", "row 1: .* goes back from"),
        ([GOOD[0], GOOD[2]], "date,a,b", "row 1: .* does not follow .*1 irregular steps"),
        (['2016-07-01 00:00:00,1,"2'], "date,a,b", "not a comma-separated table"),
    ],
)
def test_wrong_csv_is_named_with_its_line(tmp_path, rows, header, message):
    with pytest.raises(ValueError, match=message):
        read_csv(write(tmp_path / "t.csv", rows, header))


def test_wrong_files_and_columns(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_csv(tmp_path / "absent.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00date")
    with pytest.raises(ValueError, match="not a UTF-8 text file"):
        read_csv(tmp_path / "b.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="no column 'date'"):
        read_csv(tmp_path / "empty.csv")
    with pytest.raises(ValueError, match="no column 'OT'"):
        read_csv(write(tmp_path / "t.csv", GOOD), columns=["a", "OT"])
    with pytest.raises(ValueError, match=r"frequency must be one of .* got 'hourly'"):
        read_csv(tmp_path / "t.csv", frequency="hourly")
    with pytest.raises(ValueError, match="no column 'z'; the columns are a, b"):
        read_csv(tmp_path / "t.csv").select(["z"])


def test_missing_values_are_interpolated_in_time(tmp_path):
    rows = [GOOD[0], "2016-07-01 01:00:00,,2", "2016-07-01 02:00:00,nan,2", "2016-07-01 03:00:00,7,2"]
    table = read_csv(write(tmp_path / "t.csv", rows), missing="interpolate")
    np.testing.assert_allclose(table.values[:, 0], [1, 3, 5, 7])


def test_first_marks_of_etth1():
    marks = time_features(np.array(["2016-07-01T00:00:00"], "datetime64[s]"), "h")
    np.testing.assert_allclose(marks, [[-0.5, 4 / 6 - 0.5, -0.5, (183 - 1) / 365 - 0.5]], atol=1e-7)
    np.testing.assert_allclose(marks[0, 3], -0.00137, atol=1e-5)


MOMENTS = st.datetimes(datetime.datetime(1890, 1, 1), datetime.datetime(2100, 1, 1)).map(
    lambda moment: moment.replace(microsecond=0)
)


@given(moment=MOMENTS)
def test_marks_equal_the_calendar(moment):
    date = np.array([moment], "datetime64[s]")
    day_of_year, week = moment.timetuple().tm_yday, moment.isocalendar().week
    daily = [moment.weekday() / 6, (moment.day - 1) / 30, (day_of_year - 1) / 365]
    hourly = [moment.hour / 23, *daily]
    by_minute = [moment.minute / 59, *hourly]
    expected = {
        "s": [moment.second / 59, *by_minute],
        "15min": by_minute,
        "t": by_minute,
        "h": hourly,
        "d": daily,
        "b": daily,
        "w": [(moment.day - 1) / 30, (week - 1) / 52],
        "m": [(moment.month - 1) / 11],
    }
    for frequency, marks in expected.items():
        np.testing.assert_allclose(time_features(date, frequency)[0], np.array(marks) - 0.5, atol=1e-6)
    categories = [moment.month, moment.day, moment.weekday(), moment.hour, moment.minute // 15]
    for frequency, width in {"t": 5, "h": 4, "d": 3, "b": 3, "w": 1, "m": 1}.items():
        assert time_features(date, frequency, "categorical")[0].tolist() == categories[:width]


def test_marks_refuse_what_is_not_a_time():
    with pytest.raises(TypeError, match="datetime64"):
        time_features(np.zeros(3), "h")
    with pytest.raises(ValueError, match=r"dates\[1\] is not a time"):
        time_features(np.array(["2016-07-01", "NaT"], "datetime64[s]"), "h")
    with pytest.raises(ValueError, match="do not resolve seconds"):
        time_features(np.array(["2016-07-01"], "datetime64[s]"), "s", "categorical")
    with pytest.raises(ValueError, match="marks must be one of"):
        time_features(np.array(["2016-07-01"], "datetime64[s]"), "h", "timeF")


@pytest.mark.parametrize(
    ("frequency", "dates", "following"),
    [
        ("h", ["2016-07-01T22"], ["2016-07-01T23", "2016-07-02T00"]),
        ("15min", ["2016-07-01T23:30"], ["2016-07-01T23:45", "2016-07-02T00:00"]),
        ("d", ["2016-02-28"], ["2016-02-29", "2016-03-01"]),
        ("b", ["2016-07-01"], ["2016-07-04", "2016-07-05"]),
        ("w", ["2016-07-01"], ["2016-07-08", "2016-07-15"]),
        ("m", ["2016-01-01"], ["2016-02-01", "2016-03-01"]),
        ("m", ["2015-12-31", "2016-01-31"], ["2016-02-29", "2016-03-31"]),
        ("m", ["2015-12-30", "2016-01-30"], ["2016-02-29", "2016-03-30"]),
    ],
)
def test_dates_go_on_at_their_frequency(frequency, dates, following):
    dates = np.array(dates, "datetime64[s]")
    ahead = extend_dates(dates, 2, frequency)
    np.testing.assert_array_equal(ahead, np.array(following, "datetime64[s]"))
    if frequency != "m" or dates[-1].astype("datetime64[D]").item().day == 1:
        Series(np.concatenate([dates, ahead]), np.zeros((len(dates) + 2, 1)), ("a",), frequency)


def test_published_borders_counts_and_scaling(series):
    data = forecast_windows(series, seq_len=48, label_len=48, pred_len=24)
    assert [len(part) for part in data[:3]] == [8569, 2857, 2857]
    assert len(batches(data.train, 32)) == 267 and len(batches(data.test, 32)) * 32 == 2848
    train = series.values[:8640]
    np.testing.assert_allclose(data.scaler.mean, train.mean(0))
    np.testing.assert_allclose(data.scaler.std, np.sqrt(((train - train.mean(0)) ** 2).mean(0)))
    np.testing.assert_allclose(data.train.values, (train - train.mean(0)) / train.std(0), rtol=1e-5, atol=1e-5)
    first_target = {part: getattr(data, part).dates[48] for part in ("val", "test")}
    assert first_target["val"] == np.datetime64("2017-06-26T00:00:00")
    assert first_target["test"] == np.datetime64("2017-10-24T00:00:00")
    assert data.test.dates[-1] == np.datetime64("2018-02-20T23:00:00")


@given(lengths=st.sampled_from([(48, 48, 24), (96, 48, 24), (7, 0, 3), (1, 1, 1)]), index=st.integers(0, 100))
def test_windows_are_views_of_the_rows_they_say(lengths, index):
    seq_len, label_len, pred_len = lengths
    series = hourly(400)
    data = forecast_windows(
        series, seq_len=seq_len, label_len=label_len, pred_len=pred_len, borders=ratio_borders(series)
    )
    index %= len(data.train)
    window = data.train[index]
    scaled = data.scaler.transform(series.values).astype(np.float32)
    marks = time_features(series.dates, "h")
    known = slice(index, index + seq_len)
    decoded = slice(index + seq_len - label_len, index + seq_len + pred_len)
    for name, rows, array in [("x", known, scaled), ("y", decoded, scaled), ("x_mark", known, marks)]:
        np.testing.assert_array_equal(window[name], array[rows])
    np.testing.assert_array_equal(window["y_mark"], marks[decoded])
    assert np.shares_memory(window["x"], data.train.values) and np.shares_memory(window["y"], data.train.values)


def test_ratio_borders_are_seven_one_two():
    assert ratio_borders(hourly(1001)) == (700, 801, 1001)


def test_features_choose_columns_with_the_target_last(series):
    sizes = {"seq_len": 8, "label_len": 4, "pred_len": 4}
    assert forecast_windows(series, **sizes).columns == ("a", "b", "c")
    assert forecast_windows(series, **sizes, features="S").columns == ("c",)
    many_to_one = forecast_windows(series, **sizes, features="MS", target="a")
    assert many_to_one.columns == ("b", "c", "a")
    np.testing.assert_allclose(many_to_one.scaler.mean[-1], series.values[:8640, 0].mean())
    categorical = forecast_windows(series, **sizes, marks="categorical")
    assert categorical.train[0]["x_mark"].dtype == np.int32


def test_inverse_keeps_inputs_standardised_and_targets_in_their_units(series):
    data = forecast_windows(series, seq_len=8, label_len=4, pred_len=4, inverse=True)
    window = data.val[5]
    start = 8640 - 8 + 5 + 8
    np.testing.assert_allclose(window["y"][4:], series.values[start : start + 4], rtol=1e-6)
    np.testing.assert_allclose(window["y"][:4], window["x"][4:])


def test_scaler_inverts_all_columns_or_the_last():
    values = np.random.default_rng(0).normal(3, 5, (50, 3))
    scaler = Scaler.fit(values)
    np.testing.assert_allclose(scaler.inverse(scaler.transform(values)), values)
    np.testing.assert_allclose(scaler.inverse(scaler.transform(values)[:, -1:]), values[:, -1:])
    with pytest.raises(ValueError, match="expected 3 columns, or the last one alone, got 2"):
        scaler.inverse(values[:, :2])


def test_future_window_ends_at_the_last_row(series):
    data = forecast_windows(series, seq_len=8, label_len=4, pred_len=6)
    future = future_window(series, data.scaler, seq_len=8, label_len=4, pred_len=6)
    np.testing.assert_allclose(data.scaler.inverse(future.x), series.values[-8:], rtol=1e-4)
    np.testing.assert_array_equal(future.label, future.x[4:])
    assert future.dates[0] == series.dates[-1] + np.timedelta64(3600, "s") and len(future.dates) == 6
    np.testing.assert_array_equal(future.y_mark[4:], time_features(future.dates, "h"))
    np.testing.assert_array_equal(future.y_mark[:4], future.x_mark[4:])
    with pytest.raises(ValueError, match="the scaler has 3 columns, the task 1"):
        future_window(series, data.scaler, seq_len=8, label_len=4, pred_len=6, features="S")


def test_epochs_visit_every_window_once_in_another_order():
    windows = forecast_windows(hourly(200), seq_len=8, label_len=4, pred_len=4, borders=(131, 165, 200)).train
    starts = [int(np.flatnonzero((windows.values == windows[i]["x"][0]).all(1))[0]) for i in range(len(windows))]
    assert starts == list(range(120))

    def order(dataset, steps):
        rows = [row[0] for step in steps for row in dataset[step]["x"]]
        return [int(np.flatnonzero((windows.values == row).all(1))[0]) for row in rows]

    dataset = batches(windows, 40, shuffle_seed=3, epochs=2)
    assert len(dataset) == 6
    first, second = order(dataset, range(3)), order(dataset, range(3, 6))
    assert sorted(first) == sorted(second) == starts and first != second and first != starts
    assert order(batches(windows, 40, shuffle_seed=3), range(3)) == first
    assert order(batches(windows, 40), range(3)) == starts
    assert len(batches(windows, 50)) == 2 and len(batches(windows, 50, drop_last=False)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "must be positive"),
        ({"pred_len": 0}, "must be positive"),
        ({"label_len": 9}, r"between 0 and seq_len \(8\), got 9"),
        ({"features": "X"}, "features must be one of"),
        ({"target": "OT"}, "no column 'OT'"),
        ({"borders": (10, 5, 20)}, "three increasing row counts"),
        ({"borders": (100, 200, 99999)}, "three increasing row counts"),
        ({"borders": (100, 101, 200)}, "validation part: 9 rows are too few"),
        ({"seq_len": 9000}, "longer than the 8640 train rows"),
        ({"marks": "fixed"}, "marks must be one of"),
    ],
)
def test_wrong_tasks(series, options, message):
    with pytest.raises(ValueError, match=message):
        forecast_windows(series, **({"seq_len": 8, "label_len": 4, "pred_len": 4} | options))


def test_wrong_series(series):
    with pytest.raises(ValueError, match=r"12 \+ 4 \+ 4 months are 14400 rows at 'h', the series has 100"):
        month_borders(hourly(100))
    flat = Series(series.dates, np.concatenate([series.values, np.ones((len(series), 1))], 1), (*"abc", "d"))
    with pytest.raises(ValueError, match="d cannot be standardised: constant over the 8640 train rows"):
        forecast_windows(flat, seq_len=8, label_len=4, pred_len=4)
    with pytest.raises(ValueError, match="one date a row"):
        Series(series.dates[1:], series.values, series.columns)
    with pytest.raises(ValueError, match="batch_size must be between 1 and"):
        batches(Windows(np.zeros((9, 1)), np.zeros((9, 4)), series.dates[:9], 2, 1, 1), 100)


def test_hourly_traffic_is_two_complete_years_without_importing_its_package():
    traffic = hourly_traffic()
    assert len(traffic) == 17520 and traffic.columns[-1] == "traffic_volume"
    assert traffic.dates[0] == np.datetime64("2016-10-01T00:00:00")
    assert traffic.values[0].tolist() == [20, 286.22, 1195] and traffic.values[-1].tolist() == [90, 282.12, 954]
    assert "autots" not in sys.modules
    data = forecast_windows(traffic, seq_len=96, label_len=48, pred_len=24)
    assert len(data.train) == 8640 - 96 - 24 + 1 and np.abs(data.test.values).max() < 4


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'zoo\[demo\]'"):
        hourly_traffic()

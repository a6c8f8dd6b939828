"""Regular time series for forecasting: reading, calendar features, and the windows of Informer's protocol.

The protocol (Zhou et al., "Informer", AAAI 2021, and its published code): cut the rows into train, validation and
test by fixed borders, standardise every column with the train rows' mean and population standard deviation, and slide
a window of `seq_len` known steps and `pred_len` steps to forecast over each part. A forecast's decoder also sees the
last `label_len` known steps, so targets start that much earlier.

    series = read_csv("ETTh1.csv")
    data = forecast_windows(series, seq_len=48, label_len=48, pred_len=24)
    for batch in zoo.data.pipeline.batches(data.train, 32, shuffle_seed=0): ...
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

Features = Literal["M", "S", "MS"]
Marks = Literal["continuous", "categorical"]

_UNITS = {"s": 1, "t": 60, "h": 3600, "d": 86400, "w": 604800}  # seconds
_ALIASES = {"min": "t", "m": "m", "b": "b"} | {unit: unit for unit in _UNITS}
_CALENDAR_FIELDS = {
    "s": ("second", "minute", "hour", "weekday", "day", "day_of_year"),
    "t": ("minute", "hour", "weekday", "day", "day_of_year"),
    "h": ("hour", "weekday", "day", "day_of_year"),
    "d": ("weekday", "day", "day_of_year"),
    "b": ("weekday", "day", "day_of_year"),
    "w": ("day", "week"),
    "m": ("month",),
}
_CATEGORIES = {
    "t": ("month", "day", "weekday", "hour", "quarter_hour"),
    "h": ("month", "day", "weekday", "hour"),
    "d": ("month", "day", "weekday"),
    "b": ("month", "day", "weekday"),
    "w": ("month",),
    "m": ("month",),
}
_FIELD_RANGES = {  # first value and span: a continuous mark is (field - first) / span - 0.5
    "second": (0, 59),
    "minute": (0, 59),
    "hour": (0, 23),
    "weekday": (0, 6),
    "day": (1, 30),
    "day_of_year": (1, 365),
    "week": (1, 52),
    "month": (1, 11),
}


def parse_frequency(frequency: str) -> tuple[int, str]:
    """Splits "h", "15min", "3h" into a count and a unit: s, t (minutes), h, d, b (business days), w or m (months).

    Raises ValueError for anything else.
    """
    match = re.fullmatch(r"(\d*)([a-z]+)", frequency.lower()) if isinstance(frequency, str) else None
    unit = _ALIASES.get(match[2]) if match else None
    if match is None or unit is None or match[1] == "0" or (unit == "b" and match[1] not in ("", "1")):
        raise ValueError(
            "frequency must be one of s, t (or min), h, d, b, w, m, with a count before it if not 1 "
            f"(such as '15min' or '3h'), got {frequency!r}"
        )
    return int(match[1] or 1), unit


def _field(name: str, dates: np.ndarray) -> np.ndarray:
    """One calendar field of dates, int64. Monday is weekday 0; days, months and ISO weeks count from 1."""
    days = dates.astype("datetime64[D]")
    weekday = (days.astype(np.int64) + 3) % 7  # day 0, 1970-01-01, was a Thursday
    if name in ("second", "minute", "hour"):
        seconds = (dates - days).astype(np.int64)
        return {"second": seconds % 60, "minute": seconds // 60 % 60, "hour": seconds // 3600}[name]
    if name == "quarter_hour":
        return _field("minute", dates) // 15
    if name == "weekday":
        return weekday
    if name == "day":
        return (days - days.astype("datetime64[M]")).astype(np.int64) + 1
    if name == "month":
        return days.astype("datetime64[M]").astype(np.int64) % 12 + 1
    if name == "day_of_year":
        return (days - days.astype("datetime64[Y]")).astype(np.int64) + 1
    thursday = days - weekday + 3  # an ISO week belongs to the year of its Thursday
    return (_field("day_of_year", thursday) - 1) // 7 + 1


def time_features(dates: np.ndarray, frequency: str = "h", marks: Marks = "continuous") -> np.ndarray:
    """Calendar features of time stamps, as the embeddings of Informer take them.

    Args:
      dates: (...,) datetime64.
      frequency: of the series, see `parse_frequency`; chooses the fields.
      marks: "continuous" ("timeF" in the published code) scales every field to [-0.5, 0.5]: (second) minute, hour,
        weekday (Monday first), day of the month, day of the year; weeks give day and ISO week, months the month.
        "categorical" ("fixed" and "learned") gives the indices month 1-12, day 1-31, weekday 0-6, hour 0-23 and
        quarter of the hour 0-3, as far as the frequency resolves them.

    Returns:
      (..., m) float32 with m = 6, 5, 4, 3, 3, 2, 1 for s, t, h, d, b, w, m; categorical int32 with m = 5, 4, 3, 3, 1, 1
      for t, h, d, b, w, m.
    """
    dates = np.asarray(dates)
    if not np.issubdtype(dates.dtype, np.datetime64):
        raise TypeError(f"dates must be datetime64, got {dates.dtype}")
    dates = dates.astype("datetime64[s]")
    if np.isnat(dates).any():
        raise ValueError(f"dates[{int(np.flatnonzero(np.isnat(dates))[0])}] is not a time (NaT)")
    _, unit = parse_frequency(frequency)
    if marks == "categorical":
        if unit not in _CATEGORIES:
            raise ValueError("categorical marks do not resolve seconds; use continuous marks for frequency 's'")
        return np.stack([_field(name, dates) for name in _CATEGORIES[unit]], -1).astype(np.int32)
    if marks != "continuous":
        raise ValueError(f"marks must be one of {get_args(Marks)}, got {marks!r}")
    columns = []
    for name in _CALENDAR_FIELDS[unit]:
        first, span = _FIELD_RANGES[name]
        columns.append((_field(name, dates) - first) / span - 0.5)
    return np.stack(columns, -1).astype(np.float32)


def extend_dates(dates: np.ndarray, steps: int, frequency: str) -> np.ndarray:
    """The `steps` time stamps that follow a regular series' last one, datetime64[s].

    Months keep the day of the month of the last date, and its last day if every date is a month's last day.
    """
    count, unit = parse_frequency(frequency)
    last = dates[-1].astype("datetime64[s]")
    ahead = np.arange(1, steps + 1)
    if unit in _UNITS:
        return last + ahead * np.timedelta64(count * _UNITS[unit], "s")
    day = last.astype("datetime64[D]")
    time_of_day = last - day
    if unit == "b":
        return np.busday_offset(day, ahead, roll="forward").astype("datetime64[s]") + time_of_day
    month = day.astype("datetime64[M]") + ahead * count
    ends = (month + 1).astype("datetime64[D]") - 1
    all_days = dates.astype("datetime64[D]")
    if ((all_days + 1).astype("datetime64[M]") > all_days.astype("datetime64[M]")).all():
        return ends.astype("datetime64[s]") + time_of_day
    same_day = month.astype("datetime64[D]") + (day - day.astype("datetime64[M]"))
    return np.minimum(same_day, ends).astype("datetime64[s]") + time_of_day


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Series:
    """A regular multivariate time series.

    Attributes:
      dates: (T,) datetime64[s], one step of `frequency` apart.
      values: (T, C) float64, finite.
      columns: C names, the target last by convention.
      frequency: see `parse_frequency`.

    Raises ValueError, naming the first offending row, for shapes that disagree, values that are not finite, and dates
    that repeat, go back or leave gaps.
    """

    dates: np.ndarray
    values: np.ndarray
    columns: tuple[str, ...]
    frequency: str = "h"

    def __post_init__(self):
        object.__setattr__(self, "dates", np.asarray(self.dates, "datetime64[s]"))
        object.__setattr__(self, "values", np.asarray(self.values, np.float64))
        if self.values.ndim != 2 or self.dates.shape != self.values.shape[:1]:
            raise ValueError(
                f"values must be (time, columns) with one date a row, got values {self.values.shape} "
                f"and dates {self.dates.shape}"
            )
        if len(self.columns) != self.values.shape[1]:
            raise ValueError(f"{self.values.shape[1]} columns of values, but {len(self.columns)} names {self.columns}")
        bad = np.flatnonzero(~np.isfinite(self.values).all(1))
        if bad.size:
            raise ValueError(f"{bad.size} rows have missing or infinite values: {_listed(bad)}")
        _check_regular(self.dates, self.frequency)

    def __len__(self) -> int:
        return len(self.dates)

    def __repr__(self) -> str:
        return f"Series({self.dates[0]} .. {self.dates[-1]}, {len(self)} rows of {', '.join(self.columns)})"

    def select(self, columns: Sequence[str]) -> Series:
        """The same series with these columns, in this order. Raises ValueError for a name it does not have."""
        missing = [name for name in columns if name not in self.columns]
        if missing:
            raise ValueError(f"no column {', '.join(map(repr, missing))}; the columns are {', '.join(self.columns)}")
        index = [self.columns.index(name) for name in columns]
        return dataclasses.replace(self, values=self.values[:, index], columns=tuple(columns))


def _listed(rows: np.ndarray, limit: int = 10) -> str:
    return ", ".join(map(str, rows[:limit])) + (f", ... ({rows.size - limit} more)" if rows.size > limit else "")


def _check_regular(dates: np.ndarray, frequency: str) -> None:
    count, unit = parse_frequency(frequency)
    if len(dates) < 2:
        return
    if unit in _UNITS:
        regular = np.diff(dates).astype(np.int64) == count * _UNITS[unit]
    elif unit == "b":
        days = dates.astype("datetime64[D]")
        regular = (np.busday_count(days[:-1], days[1:]) == 1) & np.is_busday(days[1:])
    else:
        regular = np.diff(dates.astype("datetime64[M]").astype(np.int64)) == count
    bad = np.flatnonzero(~regular)
    if not bad.size:
        return
    first = int(bad[0])
    before, after = dates[first], dates[first + 1]
    what = "repeats" if after == before else "goes back from" if after < before else "does not follow"
    raise ValueError(
        f"row {first + 1}: {after} {what} {before} at frequency {frequency!r} ({bad.size} irregular steps in all)"
    )


def read_csv(
    path: str | pathlib.Path,
    *,
    frequency: str = "h",
    columns: Sequence[str] | None = None,
    date_column: str = "date",
    missing: Literal["error", "interpolate"] = "error",
) -> Series:
    """Reads a table with a header, a column of ISO dates and numeric columns.

    Args:
      path: a UTF-8 file.
      frequency: the dates' step, see `parse_frequency`.
      columns: which columns, in which order (the target last); by default all but the dates.
      date_column: its name.
      missing: what to do with rows that have an empty or NaN cell: refuse them, or interpolate linearly in time.

    Raises:
      FileNotFoundError: no such file.
      ValueError: anything that is wrong in the file, with the number of its line (the header is line 1).
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text file: {error}") from None
    return parse_csv(
        text.splitlines(), str(path), frequency=frequency, columns=columns, date_column=date_column, missing=missing
    )


def parse_csv(
    lines: Iterable[str],
    source: str,
    *,
    frequency: str = "h",
    columns: Sequence[str] | None = None,
    date_column: str = "date",
    missing: Literal["error", "interpolate"] = "error",
) -> Series:
    """`read_csv` for lines of text; `source` names them in errors."""
    if missing not in ("error", "interpolate"):
        raise ValueError(f"missing must be 'error' or 'interpolate', got {missing!r}")
    try:
        header, *rows = list(csv.reader(lines, strict=True)) or [[]]
    except csv.Error as error:
        raise ValueError(f"{source} is not a comma-separated table: {error}") from None
    if date_column not in header:
        raise ValueError(f"{source}: no column {date_column!r} in the header {header}")
    if len(set(header)) < len(header):
        raise ValueError(f"{source}: the header repeats a name: {header}")
    while rows and not rows[-1]:
        rows.pop()
    if not rows:
        raise ValueError(f"{source} has a header but no rows")
    for line, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"{source}, line {line}: {len(row)} cells, the header has {len(header)}")
    names = tuple(name for name in header if name != date_column) if columns is None else tuple(columns)
    absent = [name for name in names if name not in header]
    if absent or not names:
        raise ValueError(f"{source}: no column {', '.join(map(repr, absent))} in the header {header}")

    position = header.index(date_column)
    dates = _parse_dates([row[position] for row in rows], source)
    values = np.stack([_parse_numbers([row[header.index(name)] for row in rows], name, source) for name in names], 1)
    bad = np.flatnonzero(~np.isfinite(values).all(1))
    if bad.size and missing == "error":
        raise ValueError(f"{source}: {bad.size} rows have missing or infinite values, lines {_listed(bad + 2)}")
    if bad.size:
        good = np.flatnonzero(np.isfinite(values).all(1))
        if not good.size:
            raise ValueError(f"{source}: every row has a missing value")
        for column in values.T:
            column[bad] = np.interp(bad, good, column[good])
    try:
        return Series(dates, values, names, frequency)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _parse_dates(cells: list[str], source: str) -> np.ndarray:
    try:
        dates = np.array(cells, "datetime64[s]")
    except ValueError:
        dates = np.full(len(cells), np.datetime64("NaT"), "datetime64[s]")
        for i, cell in enumerate(cells):
            try:
                dates[i] = np.datetime64(cell, "s")
            except ValueError:
                break
    bad = np.flatnonzero(np.isnat(dates))
    if bad.size:
        line, cell = int(bad[0]) + 2, cells[bad[0]]
        raise ValueError(f"{source}, line {line}: {cell!r} is not a date (expected such as '2016-07-01 00:00:00')")
    return dates


def _parse_numbers(cells: list[str], name: str, source: str) -> np.ndarray:
    values = np.empty(len(cells))
    for i, cell in enumerate(cells):
        try:
            values[i] = float(cell) if cell.strip() else np.nan
        except ValueError:
            raise ValueError(f"{source}, line {i + 2}: column {name!r} holds {cell!r}, not a number") from None
    return values


class Scaler(NamedTuple):
    """Standardisation of columns: (x - mean) / std, with `mean` and `std` of shape (C,), float64."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, values: np.ndarray) -> Scaler:
        """Mean and population standard deviation of each column of (T, C) values."""
        return cls(values.mean(0), values.std(0))

    def transform(self, values: np.ndarray) -> np.ndarray:
        """To standardised units; (..., C)."""
        return (values - self.mean) / self.std

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """Back to the series' units; (..., C), or (..., 1) for the last column alone (task "MS")."""
        width = np.shape(values)[-1]
        if width not in (1, len(self.mean)):
            raise ValueError(f"expected {len(self.mean)} columns, or the last one alone, got {width}")
        return values * self.std[-width:] + self.mean[-width:]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Windows:
    """A random-access Grain source of forecasting windows, each a dictionary of views into the arrays below.

    Item i, for s = seq_len, l = label_len, p = pred_len:
      x: (s, C) float32, rows i .. i+s;  x_mark: (s, m), their time features.
      y: (l + p, C) float32, rows i+s-l .. i+s+p: the label steps, then the targets;  y_mark: (l + p, m).

    Attributes:
      values: (T, C) float32, standardised.
      marks: (T, m) float32 or int32, see `time_features`.
      targets: (T, C) float32 where the targets are wanted in other units than the inputs (`inverse`), else None.
      dates: (T,) datetime64[s].
    """

    values: np.ndarray
    marks: np.ndarray
    dates: np.ndarray
    seq_len: int
    label_len: int
    pred_len: int
    targets: np.ndarray | None = None

    def __post_init__(self):
        _check_lengths(self.seq_len, self.label_len, self.pred_len)
        if len(self.values) < self.seq_len + self.pred_len:
            raise ValueError(
                f"{len(self.values)} rows are too few for seq_len {self.seq_len} + pred_len {self.pred_len}"
            )

    def __len__(self) -> int:
        return len(self.values) - self.seq_len - self.pred_len + 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = int(index)
        if not 0 <= start < len(self):
            raise IndexError(f"window {start} of {len(self)}")
        known_end = start + self.seq_len
        label_start = known_end - self.label_len
        end = known_end + self.pred_len
        y = self.values[label_start:end]
        if self.targets is not None:
            y = np.concatenate([self.values[label_start:known_end], self.targets[known_end:end]])
        return {
            "x": self.values[start:known_end],
            "x_mark": self.marks[start:known_end],
            "y": y,
            "y_mark": self.marks[label_start:end],
        }

    def __repr__(self) -> str:
        return (
            f"Windows({self.dates[0]} .. {self.dates[-1]}, {self.values.shape[1]} columns, seq_len={self.seq_len}, "
            f"label_len={self.label_len}, pred_len={self.pred_len})"
        )


def _check_lengths(seq_len: int, label_len: int, pred_len: int) -> None:
    if seq_len < 1 or pred_len < 1:
        raise ValueError(f"seq_len and pred_len must be positive, got {seq_len} and {pred_len}")
    if not 0 <= label_len <= seq_len:
        raise ValueError(f"label_len must be between 0 and seq_len ({seq_len}), got {label_len}")


def month_borders(series: Series) -> tuple[int, int, int]:
    """Where train, validation and test end: 12 + 4 + 4 "months" of 30 days, as for the ETT data. Later rows are unused.

    Raises ValueError for a series shorter than 20 months, or sampled more slowly than daily.
    """
    count, unit = parse_frequency(series.frequency)
    if unit not in _UNITS or 86400 % (count * _UNITS[unit]):
        raise ValueError(f"months of 30 days need a step that divides a day, got frequency {series.frequency!r}")
    month = 30 * 86400 // (count * _UNITS[unit])
    if len(series) < 20 * month:
        raise ValueError(
            f"12 + 4 + 4 months are {20 * month} rows at {series.frequency!r}, the series has {len(series)}"
        )
    return 12 * month, 16 * month, 20 * month


def ratio_borders(series: Series) -> tuple[int, int, int]:
    """Where train, validation and test end: 70 %, 10 % and 20 % of the rows, as for every other data set."""
    train, test = int(len(series) * 0.7), int(len(series) * 0.2)
    return train, len(series) - test, len(series)


class ForecastData(NamedTuple):
    """The three parts of a series, the scaler fitted on the first, and the columns' names (the target last)."""

    train: Windows
    val: Windows
    test: Windows
    scaler: Scaler
    columns: tuple[str, ...]


def _task_series(series: Series, features: Features, target: str | None) -> Series:
    """The columns of a task, its target last."""
    if features not in get_args(Features):
        raise ValueError(f"features must be one of {get_args(Features)}, got {features!r}")
    target = series.columns[-1] if target is None else target
    others = [] if features == "S" else [name for name in series.columns if name != target]
    return series.select([*others, target])


def forecast_windows(
    series: Series,
    *,
    seq_len: int,
    label_len: int,
    pred_len: int,
    features: Features = "M",
    target: str | None = None,
    borders: tuple[int, int, int] | None = None,
    marks: Marks = "continuous",
    inverse: bool = False,
) -> ForecastData:
    """Cuts a series into the windows of Informer's protocol.

    Args:
      series: the data.
      seq_len, label_len, pred_len: steps known, steps of them given to the decoder, steps to forecast.
      features: "M" many to many, "S" the target alone, "MS" many to the target. The target becomes the last column; for
        "MS" windows still hold all columns, and the loss takes the last.
      target: its name, by default the last column.
      borders: the rows where train, validation and test end; `month_borders` by default. The inputs of the first
        validation (test) window are the last `seq_len` rows before its part.
      marks: see `time_features`.
      inverse: targets in the series' own units; inputs and label steps are standardised all the same.

    Raises:
      ValueError: lengths that do not fit the parts, an unknown column, a column that is constant over the train rows.
    """
    _check_lengths(seq_len, label_len, pred_len)
    series = _task_series(series, features, target)
    ends = month_borders(series) if borders is None else tuple(borders)
    if len(ends) != 3 or not 0 < ends[0] <= ends[1] <= ends[2] <= len(series):
        raise ValueError(f"borders must be three increasing row counts up to {len(series)}, got {ends}")
    if seq_len > ends[0]:
        raise ValueError(f"seq_len {seq_len} is longer than the {ends[0]} train rows")
    scaler = Scaler.fit(series.values[: ends[0]])
    constant = [name for name, std in zip(series.columns, scaler.std, strict=True) if std == 0]
    if constant:
        raise ValueError(f"{', '.join(constant)} cannot be standardised: constant over the {ends[0]} train rows")
    values = scaler.transform(series.values).astype(np.float32)
    stamps = time_features(series.dates, series.frequency, marks)
    targets = series.values.astype(np.float32) if inverse else None
    parts = []
    for name, start, end in (
        ("train", 0, ends[0]),
        ("validation", ends[0] - seq_len, ends[1]),
        ("test", ends[1] - seq_len, ends[2]),
    ):
        rows = slice(start, end)
        part = None if targets is None else targets[rows]
        try:
            parts.append(Windows(values[rows], stamps[rows], series.dates[rows], seq_len, label_len, pred_len, part))
        except ValueError as error:
            raise ValueError(f"{name} part: {error}") from None
    train, val, test = parts
    return ForecastData(train, val, test, scaler, series.columns)


class Future(NamedTuple):
    """One window without targets, at a series' end: (seq_len, C) x, (label_len, C) label, their marks, and the dates.

    `y_mark` covers the label steps and the `pred_len` steps to come; `dates` are those of the latter.
    """

    x: np.ndarray
    x_mark: np.ndarray
    label: np.ndarray
    y_mark: np.ndarray
    dates: np.ndarray


def future_window(
    series: Series,
    scaler: Scaler,
    *,
    seq_len: int,
    label_len: int,
    pred_len: int,
    features: Features = "M",
    target: str | None = None,
    marks: Marks = "continuous",
) -> Future:
    """The inputs of a forecast beyond the series' last row.

    Args:
      scaler: the one the network was trained with. (The published code fits one on the whole series here, which shifts
        the network's inputs; `Scaler.fit(series.values)` gives that.)
      Others as in `forecast_windows`.
    """
    _check_lengths(seq_len, label_len, pred_len)
    series = _task_series(series, features, target)
    if len(series) < seq_len:
        raise ValueError(f"the series has {len(series)} rows, fewer than seq_len {seq_len}")
    if len(scaler.mean) != len(series.columns):
        raise ValueError(f"the scaler has {len(scaler.mean)} columns, the task {len(series.columns)}: {series.columns}")
    x = scaler.transform(series.values[-seq_len:]).astype(np.float32)
    ahead = extend_dates(series.dates, pred_len, series.frequency)
    dates = np.concatenate([series.dates[-seq_len:], ahead])
    stamps = time_features(dates, series.frequency, marks)
    return Future(x, stamps[:seq_len], x[seq_len - label_len :], stamps[seq_len - label_len :], ahead)

"""Stays in intensive care: 48 hours of irregular measurements, encoded as benchmarks do, and a simulator."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

HOURS = 48
LOS_EDGES = (3.5, 7.5, 14.5)  # days: up to 3, 4 - 7, 8 - 14, above
STATIC_NAMES = (
    "Age", "Gender", "Height", "AdmissionWeight", "Coronary", "CardiacSurgery", "Medical", "Surgical", "HeightMissing",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ICUStays:
    """Stays of N patients.

    Attributes:
      values: float32 (N, 48, V), the last value in each hour; NaN where nothing was measured.
      static: float32 (N, S), what is known at admission; NaN where missing.
      names, static_names: of the V variables and of the S descriptors.
      labels: by task, -1 where unknown: "ihm" death in hospital (N,), "decomp" death within two days after the hours
        read (N,), "los" days (N,), "ph" phenotypes (N, P).
      scores: clinical scores by name, float (N,), NaN where unknown.
    """

    values: np.ndarray
    static: np.ndarray
    names: tuple[str, ...]
    static_names: tuple[str, ...]
    labels: Mapping[str, np.ndarray]
    scores: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.values)


def read_physionet2012(folder: str | pathlib.Path) -> ICUStays:
    """Set A of the PhysioNet/CinC Challenge 2012 (Silva et al. 2012): 4,000 adult stays, 37 variables.

    Licence of the data: Open Data Commons Attribution.

    Args:
      folder: holds set_a_hourly.npz, the table `patient`, `hour`, `variable`, `value` with `static` and `outcomes`.

    Raises:
      FileNotFoundError, ValueError: the file is not there, or lacks an entry.
    """
    path = pathlib.Path(folder) / "set_a_hourly.npz"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the folder of set_a_hourly.npz")
    wanted = {"patient", "hour", "variable", "value", "static", "outcomes", "outcome_names", "variable_names"}
    with np.load(path) as file:
        if missing := wanted - set(file.files):
            raise ValueError(f"{path} lacks {sorted(missing)}")
        table = {name: file[name] for name in wanted}
    names = tuple(map(str, table["variable_names"]))
    values = np.full((len(table["static"]), HOURS, len(names)), np.nan, np.float32)
    values[table["patient"], table["hour"], table["variable"]] = table["value"]
    age, gender, height, unit, weight = table["static"].T
    height = np.where((height > 100) & (height < 250), height, np.nan)  # centimetres; others are slips of the pen
    units = [(unit == kind).astype(np.float32) for kind in (1, 2, 3, 4)]
    static = np.stack([age, gender, height, weight, *units, np.isnan(height)], axis=1).astype(np.float32)
    outcomes = {name: table["outcomes"][:, index].astype(int) for index, name in enumerate(table["outcome_names"])}
    death, survival = outcomes["in_hospital_death"], outcomes["survival_days"]
    soon = ((death == 1) & (survival >= 0) & (survival <= 4)).astype(int)
    scores = {
        name: np.where(outcomes[name] < 0, np.nan, outcomes[name].astype(float)) for name in ("saps_i", "sofa")
    }  # fmt: skip
    labels = {"ihm": death, "decomp": soon, "los": outcomes["length_of_stay_days"].astype(float)}
    return ICUStays(values, static, names, STATIC_NAMES, labels, scores)


# Of the simulator: mean, spread, effect of severity, probability of a measurement in an hour.
_VITALS = {
    "HR": (85, 12, 8, 0.9),
    "MAP": (80, 10, -7, 0.9),
    "GCS": (14, 1.0, -1.6, 0.3),
    "Temp": (37, 0.5, 0.2, 0.4),
    "Urine": (100, 40, -25, 0.6),
    "BUN": (20, 6, 7, 0.08),
    "Lactate": (1.5, 0.5, 0.8, 0.08),
    "SaO2": (97, 1.2, -0.9, 0.3),
}
# Of each condition: the variables that it shifts, in spreads.
_CONDITIONS = {
    "sepsis": {"HR": 1.0, "Temp": 2.0, "Lactate": 1.5},
    "renal failure": {"BUN": 2.5, "Urine": -1.5},
    "respiratory failure": {"SaO2": -2.0, "HR": 0.5},
}
PHENOTYPES = tuple(_CONDITIONS)


def simulate_icu(patients: int, seed: int = 0) -> ICUStays:
    """Stays of patients whose severity wanders, drives the variables, and decides what becomes of them.

    Severity follows a random walk with a drift of its own; conditions shift some variables; the worse a patient is, the
    more often he is measured. Death has the log-odds 1.2 s + 15 d - 2.5 of the last severity s and the hourly drift d;
    all four tasks have labels.
    """
    rng = np.random.default_rng(seed)
    drift = rng.normal(0, 0.02, patients)
    start = rng.normal(0, 0.8, patients)
    steps = rng.normal(0, 0.08, (patients, HOURS))
    severity = start[:, None] + drift[:, None] * np.arange(HOURS) + np.cumsum(steps, axis=1)
    conditions = rng.random((patients, len(_CONDITIONS))) < 0.2
    severity = severity + 0.4 * conditions.sum(1, keepdims=True)
    values = np.empty((patients, HOURS, len(_VITALS)), np.float32)
    for column, (name, (mean, spread, effect, often)) in enumerate(_VITALS.items()):
        shift = sum(
            np.float64(shifts.get(name, 0.0)) * conditions[:, index]
            for index, shifts in enumerate(_CONDITIONS.values())
        )
        personal = rng.normal(0, 0.5 * spread, (patients, 1)) + spread * np.asarray(shift)[:, None]
        noise = rng.normal(0, 0.5 * spread, (patients, HOURS))
        measured = rng.random((patients, HOURS)) < often * (1 + 0.3 * np.tanh(severity))
        values[:, :, column] = np.where(measured, mean + effect * severity + personal + noise, np.nan)
    age = rng.normal(65, 15, patients)
    last = severity[:, -1] + 0.02 * (age - 65)
    odds = 1.2 * last + 15 * drift - 2.5
    death = (rng.random(patients) < 1 / (1 + np.exp(-odds))).astype(int)
    soon = death * (rng.random(patients) < 1 / (1 + np.exp(-last))).astype(int)
    days = np.exp(rng.normal(2.0 + 0.25 * severity.mean(1), 0.5)) + 2
    static = np.stack([age, rng.integers(0, 2, patients)], axis=1).astype(np.float32)
    labels = {"ihm": death, "decomp": soon, "los": np.round(days), "ph": conditions.astype(int)}
    return ICUStays(values, static, tuple(_VITALS), ("Age", "Gender"), labels, {})


class Encoded(NamedTuple):
    """Stays as a network reads them."""

    x: np.ndarray  # float32 (N, 48, V + S + V): values, descriptors repeated each hour, whether there was a measurement
    names: tuple[str, ...]  # of the V + S channels before the masks


def encode_stays(stays: ICUStays, training: np.ndarray) -> Encoded:
    """Clipped, filled and standardised stays, by statistics of training patients alone.

    Each variable is clipped to its 0.5 and 99.5 percentiles, carried forward over hours without a measurement, set to
    its median before the first one, and standardised. Descriptors likewise, without the hours.

    Args:
      stays: of N patients.
      training: indices of those whose statistics count.

    Raises:
      ValueError: there are no training patients.
    """
    if not len(training):
        raise ValueError("there must be a training patient")
    measured = ~np.isnan(stays.values)
    values = _clipped(stays.values, stays.values[training].reshape(-1, stays.values.shape[-1]))
    latest = np.maximum.accumulate(np.where(measured, np.arange(values.shape[1])[None, :, None], -1), axis=1)
    carried = np.take_along_axis(values, np.maximum(latest, 0), axis=1)
    medians = _nan_statistic(np.nanmedian, values[training], (0, 1))
    values = np.where(latest >= 0, carried, medians)
    static = _clipped(stays.static, stays.static[training])
    static = np.where(np.isnan(static), _nan_statistic(np.nanmedian, static[training], 0), static)
    both = np.concatenate([values, np.repeat(static[:, None], values.shape[1], axis=1)], axis=-1)
    mean, spread = both[training].mean((0, 1)), both[training].std((0, 1))
    both = (both - mean) / np.where(spread > 0, spread, 1)
    x = np.concatenate([both, measured], axis=-1).astype(np.float32)
    return Encoded(x, (*stays.names, *stays.static_names))


def _nan_statistic(statistic: Callable[..., np.ndarray], rows: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """A statistic that skips NaN; 0 for a variable that was never measured."""
    never = np.isnan(rows).all(axis)
    return statistic(np.where(never, 0.0, rows), axis=axis)


def _clipped(values: np.ndarray, training: np.ndarray) -> np.ndarray:
    never = np.isnan(training).all(0)
    low, high = np.nanpercentile(np.where(never, 0.0, training), [0.5, 99.5], axis=0)
    return np.where(never, np.nan, np.clip(values, low, high))


class Split(NamedTuple):
    """Indices of patients."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_patients(patients: int, seed: int = 0) -> Split:
    """70 % of the patients for training, 10 % for validation, 20 % for testing."""
    order = np.random.default_rng(seed).permutation(patients)
    first, second = 7 * patients // 10, 8 * patients // 10
    return Split(order[:first], order[first:second], order[second:])


def summaries(x: np.ndarray, dynamic: int, static: int) -> np.ndarray:
    """What simple baselines read: descriptors, last values, and mean, least, most and count of each variable.

    Args:
      x: (N, 48, V + S + V) of `encode_stays`.
      dynamic, static: V and S.

    Returns:
      float32 (N, S + 5 V).
    """
    values, masks = x[:, :, :dynamic], x[:, :, dynamic + static :]
    parts = [x[:, 0, dynamic : dynamic + static], values[:, -1]]
    return np.concatenate([*parts, values.mean(1), values.min(1), values.max(1), masks.mean(1)], axis=1)

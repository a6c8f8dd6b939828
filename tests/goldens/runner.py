"""Finds golden cases, runs them through their slug's adapter, and reports each case's error."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pathlib
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tests.goldens.golden import load_case
from zoo import registry


class Prefix(NamedTuple):
    """An output of which a case may hold the first entries along an axis only: generated tokens, say."""

    values: np.ndarray
    axis: int


class Suffix(NamedTuple):
    """An output of which a case may hold the last entries along an axis only."""

    values: np.ndarray
    axis: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one case. `error` and `tolerance` are None where the slug has no adapter."""

    name: str
    error: float | None
    tolerance: float | None
    remark: str = ""

    @property
    def has_adapter(self) -> bool:
        return self.error is not None

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.tolerance

    def __str__(self) -> str:
        remark = f"  ({self.remark})" if self.remark else ""
        if not self.has_adapter:
            return f"{self.name} - - no adapter{remark}"
        return f"{self.name} {self.error:.2e} {self.tolerance:.0e} {'ok' if self.passed else 'FAIL'}{remark}"


def find_cases(folder: pathlib.Path, slug: str | None = None) -> list[pathlib.Path]:
    """Every `<slug>/<case>.safetensors` and `.json` below the folder, sorted."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    paths = [p for p in folder.glob("*/*") if p.suffix in (".safetensors", ".json")]
    return sorted(p for p in paths if slug is None or p.parent.name == slug)


def load_adapter(slug: str) -> types.ModuleType | None:
    """The module `tests.goldens.adapters.<slug>`, or None where there is none."""
    name = f"tests.goldens.adapters.{slug}"
    if importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)


def run_case(path: pathlib.Path) -> Outcome:
    """Runs one case. An adapter that raises has failed with an infinite error, and the remark says why."""
    slug = path.parent.name
    name = f"{slug}/{path.stem}"
    module = load_adapter(slug)
    tolerance, remark = 0.0, ""
    if module is None:
        return Outcome(name, None, None)
    try:
        record = registry.papers().get(slug)
        if record is not None and record.fidelity == "reconstruction":
            remark = "reconstruction"
        if path.suffix == ".json":
            case = json.loads(path.read_text())
            return Outcome(name, _record_error(module.records(case), case), tolerance, remark)
        case = load_case(path)
        tolerance = case.tolerance
        if "reconstruct" in case.note.lower():
            remark = "reconstruction"
        outputs = module.adapter(case.variant, case.overrides, case.inputs, case.state_dict())
        return Outcome(name, case.error(_cut(outputs, case.outputs)), tolerance, remark)
    except Exception as error:  # one broken case must not hide the others
        return Outcome(name, math.inf, tolerance, f"{type(error).__name__}: {error}".replace("\n", " "))


def run_cases(folder: pathlib.Path, slug: str | None = None) -> Iterator[Outcome]:
    """Runs all cases below the folder, one after the other."""
    for path in find_cases(folder, slug):
        yield run_case(path)


def _cut(outputs: dict[str, Any], wanted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs with those that a case may hold in part cut to the case's length."""
    cut = {}
    for name, value in outputs.items():
        if isinstance(value, Prefix | Suffix):
            values, axis = value
            if name in wanted and wanted[name].ndim > axis:
                length = wanted[name].shape[axis]
                chosen = (
                    slice(0, length) if isinstance(value, Prefix) else slice(max(values.shape[axis] - length, 0), None)
                )
                values = values[(slice(None),) * axis + (chosen,)]
            value = values
        cut[name] = value
    return cut


def _record_error(ours: dict[str, Any], case: dict[str, Any]) -> float:
    """0 where every recomputed entry equals the record's (numbers to 1e-6 relative), else infinity."""
    if not ours:
        raise ValueError("the adapter computed nothing of this record")
    return 0.0 if all(key in case and _equal(value, case[key]) for key, value in ours.items()) else math.inf


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple | np.ndarray) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float | np.floating) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
    return bool(a == b)

"""Pairs of texts that mean alike: the STS benchmark's files, and functions with their descriptions."""

from __future__ import annotations

import csv
import importlib
import inspect
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple


class ScoredPair(NamedTuple):
    """Two sentences, and how alike people found them, 0 .. 5."""

    first: str
    second: str
    score: float


def read_stsb(path: pathlib.Path) -> list[ScoredPair]:
    """Rows "sentence1,sentence2,similarity" of a CSV file without a header (Cer et al. 2017).

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: a row is not of that kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    pairs = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            try:
                first, second, text = row
                score = float(text)
            except ValueError:
                raise ValueError(f"{path}, row {number}: expected two sentences and a number, got {row}") from None
            if not 0 <= score <= 5:
                raise ValueError(f"{path}, row {number}: a score is in 0 .. 5, got {score}")
            pairs.append(ScoredPair(first, second, score))
    return pairs


class Documented(NamedTuple):
    """A public function: the first line of its docstring, and the description that follows it."""

    name: str
    summary: str
    description: str


MODULES = ("numpy", "numpy.linalg", "numpy.fft", "scipy.signal", "scipy.special", "scipy.stats", "scipy.linalg",
           "scipy.ndimage", "scipy.optimize", "scipy.spatial.distance", "scipy.interpolate", "scipy.integrate",
           "scipy.sparse.linalg", "scipy.cluster.hierarchy", "scipy.fft")  # fmt: skip


def documented_functions(modules: Sequence[str] = MODULES, *, shortest: int = 40) -> list[Documented]:
    """Functions of installed packages whose docstrings have both a summary and a description, in order of names.

    A description is the first paragraph after the summary that is prose: no heading, no code, of `shortest` characters
    or more. Summaries and descriptions that occur twice are left out, and so are functions known by several names.
    """
    found: dict[str, Documented] = {}
    for module_name in modules:
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", None) or dir(module)):
            value = getattr(module, name, None)
            if name.startswith("_") or not callable(value) or inspect.isclass(value):
                continue
            parts = _parts(inspect.getdoc(value) or "", shortest)
            if parts is not None:
                found.setdefault(parts[0], Documented(f"{module_name}.{name}", *parts))
    by_description: dict[str, Documented] = {}
    for one in found.values():
        by_description.setdefault(one.description, one)
    return sorted(by_description.values())


def _parts(docstring: str, shortest: int) -> tuple[str, str] | None:
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring)]
    # Signatures stand first in docstrings of compiled functions.
    while paragraphs and re.match(r"\w+\(|\.\. ", paragraphs[0]):
        paragraphs = paragraphs[1:]
    if len(paragraphs) < 2 or len(paragraphs[0]) < 15:
        return None
    for part in paragraphs[1:]:
        if "----" in part or "====" in part:
            return None  # sections begin
        if len(part) >= shortest and part[0].isupper() and not part.startswith("As an instance of"):
            return paragraphs[0], part
    return None

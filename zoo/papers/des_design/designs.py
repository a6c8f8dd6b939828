"""Prompts of the language model's tasks, and scores of designed molecules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from zoo.data.molecular_properties import REFRACTIVITY, MoleculeTable, Scaler, refractivity
from zoo.data.molecules import canonical, generation_metrics
from zoo.data.prompts import numbers
from zoo.errors import unknown

# Forward and inverse, of the two tables; the second name is what a prompt begins with.
TASKS = {
    "properties": "Properties",
    "solubility": "Solubility",
    "design": "Design",
    "design_soluble": "DesignSoluble",
}


def prompt(task: str, *, smiles: str = "", values: Sequence[float] | np.ndarray = ()) -> str:
    """A question: `Properties<CCO>`, or `Design<-0.21,...>` with values of two digits.

    Raises ValueError for an unknown task, or where what it asks about is missing.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    argument = numbers(values) if task.startswith("design") else smiles
    if not argument:
        raise ValueError(f"{task} asks about {'values' if task.startswith('design') else 'smiles'}, got none")
    return f"{TASKS[task]}<{argument}>"


def example(task: str, smiles: str, values: Sequence[float] | np.ndarray) -> str:
    """A question and its answer, `Design<-0.21,...> [CCO]`."""
    answer = smiles if task.startswith("design") else numbers(values)
    return f"{prompt(task, smiles=smiles, values=values)} [{answer}]"


class DesignReport(NamedTuple):
    """How designed molecules fare; NaN where there are none to look at."""

    validity: float  # share of strings that are molecules
    uniqueness: float  # different molecules over valid strings
    novelty: float  # share of the different ones that training did not show
    diversity: float  # 1 - mean Tanimoto similarity of pairs
    judged_r2: float  # of all scaled properties together, by a forward model, of valid designs
    judged_error: float  # mean absolute, scaled, likewise
    refractivity_error: float  # mean absolute, in cm3/mol, computed exactly; NaN where it was not asked for


def design_report(
    designs: Sequence[str], targets: np.ndarray, training: MoleculeTable, scaler: Scaler,
    judge: Callable[[list[str]], np.ndarray],
) -> DesignReport:  # fmt: skip
    """Scores of designs, one a target.

    Args:
      designs: strings, perhaps no molecules.
      targets: (designs, properties), what was asked for, scaled.
      training: the molecules that training showed, and the properties' names.
      scaler: of the properties.
      judge: valid SMILES to their scaled properties (designs, properties), such as a trained forward model.

    Raises:
      ValueError: there is not one target a design.
    """
    if targets.shape != (len(designs), len(training.properties)):
        raise ValueError(f"needs targets {(len(designs), len(training.properties))}, got {targets.shape}")
    found = generation_metrics(designs, training.smiles)
    written = [canonical(text) for text in designs]
    valid = [place for place, text in enumerate(written) if text is not None]
    smiles = [str(written[place]) for place in valid]
    nan = float("nan")
    r2 = error = exact = nan
    if valid:
        asked, told = targets[valid], judge(smiles)
        error = float(np.abs(told - asked).mean())
        spread = float(np.square(asked - asked.mean()).sum())
        r2 = 1 - float(np.square(told - asked).sum()) / spread if spread > 0 else nan
        if REFRACTIVITY in training.properties:
            column = training.properties.index(REFRACTIVITY)
            wanted = scaler.unscale(asked)[:, column]
            exact = float(np.abs([refractivity(text) for text in smiles] - wanted).mean())
    return DesignReport(*found, r2, error, exact)

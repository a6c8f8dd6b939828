"""Tables of drug sensitivity: compounds by cell lines, with a profile of each line."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal, NamedTuple

import numpy as np

SplitKind = Literal["lenient", "cells", "compounds"]


@dataclasses.dataclass(frozen=True)
class Screen:
    """A screen.

    Attributes:
      name: for messages.
      smiles: of C compounds.
      ln_ic50: float32 (C, N), natural logarithms of micromolar, NaN where not measured.
      profiles: float32 (N, G), of the cell lines.
      genes: names of the profile's G numbers.
    """

    name: str
    smiles: tuple[str, ...]
    ln_ic50: np.ndarray
    profiles: np.ndarray
    genes: tuple[str, ...]

    def __post_init__(self) -> None:
        wanted = (len(self.smiles), len(self.profiles))
        if self.ln_ic50.shape != wanted or self.profiles.shape[1:] != (len(self.genes),):
            raise ValueError(f"a table of {self.ln_ic50.shape} does not belong to {wanted} compounds and cells")


def read_gdsc(folder: str | pathlib.Path) -> Screen:
    """GDSC's sensitivities with methylation of promoters as the profile, from `gdsc_methylation.npz`.

    Raises FileNotFoundError where the file is missing.
    """
    path = pathlib.Path(folder) / "gdsc_methylation.npz"
    if not path.is_file():
        raise FileNotFoundError(f"no gdsc_methylation.npz in {folder}")
    with np.load(path) as arrays:
        return Screen(
            "GDSC with methylation", tuple(map(str, arrays["drug_smiles"])), arrays["ln_ic50"].astype(np.float32),
            arrays["methylation"].astype(np.float32), tuple(map(str, arrays["probe"])),
        )  # fmt: skip


_CORES = ("c1ccccc1{}", "C1CCNCC1{}", "c1ccncc1{}", "C1COCCN1{}", "c1ccc2[nH]ccc2c1{}", "C1CCCC1{}")
_GROUPS = ("O", "Cl", "C(=O)O", "N", "C(F)(F)F", "S(=O)(=O)N", "Br", "OC")


def simulated_screen(cells: int = 60, genes: int = 40, seed: int = 0) -> Screen:
    """A screen that obeys a law: each fragment of a compound acts through one pathway of genes.

    ln IC50 = fragments' potencies + the activities of their pathways in the line + noise; a tenth is not measured.
    Compounds are a core with one or two groups.
    """
    rng = np.random.default_rng(seed)
    smiles: list[str] = []
    parts: list[tuple[int, ...]] = []
    for core_number, core in enumerate(_CORES):
        for first, group in enumerate(_GROUPS):
            smiles.append(core.format(group))
            parts.append((core_number, len(_CORES) + first))
            second = int(rng.integers(len(_GROUPS)))
            smiles.append(core.format(f"CC({group}){_GROUPS[second]}"))
            parts.append((core_number, len(_CORES) + first, len(_CORES) + second))
    fragments = len(_CORES) + len(_GROUPS)
    profiles = rng.standard_normal((cells, genes)).astype(np.float32)
    pathways = rng.standard_normal((fragments, genes)) * (rng.uniform(size=(fragments, genes)) < 0.1)
    activity = profiles @ pathways.T
    potency = rng.standard_normal(fragments)
    table = np.stack([sum(potency[part] + 0.5 * activity[:, part] for part in own) for own in parts])
    table += 0.3 * rng.standard_normal(table.shape)
    table[rng.uniform(size=table.shape) < 0.1] = np.nan
    names = tuple(f"gene{number}" for number in range(genes))
    return Screen("simulated screen", tuple(smiles), table.astype(np.float32), profiles, names)


class Pairs(NamedTuple):
    """Measured pairs."""

    compound: np.ndarray  # indices
    cell: np.ndarray
    ln_ic50: np.ndarray


def split(screen: Screen, kind: SplitKind, part: float, seed: int) -> tuple[Pairs, Pairs]:
    """Training and test pairs.

    Args:
      screen: the table.
      kind: "lenient": test pairs are drawn among all; "cells": all pairs of the test's cell lines; "compounds": all
        pairs of the test's compounds.
      part: share of pairs, lines or compounds for testing.
      seed: of the drawing.

    Raises:
      ValueError: an unknown kind, or a part that leaves one side empty.
    """
    compound, cell = np.nonzero(np.isfinite(screen.ln_ic50))
    rng = np.random.default_rng(seed)
    if kind == "lenient":
        test = rng.uniform(size=len(compound)) < part
    elif kind in ("cells", "compounds"):
        index = cell if kind == "cells" else compound
        count = screen.ln_ic50.shape[1 if kind == "cells" else 0]
        held_out = rng.permutation(count)[: round(part * count)]
        test = np.isin(index, held_out)
    else:
        raise ValueError(f"split must be lenient, cells or compounds, got {kind!r}")
    if not test.any() or test.all():
        raise ValueError(f"a part of {part} leaves nothing to train or to test on")
    values = screen.ln_ic50[compound, cell]
    return Pairs(compound[~test], cell[~test], values[~test]), Pairs(compound[test], cell[test], values[test])

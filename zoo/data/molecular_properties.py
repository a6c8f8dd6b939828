"""Small molecules with several properties, and molecules with their solubility."""

from __future__ import annotations

import csv
import itertools
import pathlib
from typing import NamedTuple

import numpy as np

from zoo.data.molecules import descriptor, flat

REFRACTIVITY = "molar_refractivity"  # in both tables; RDKit computes it of any molecule
# Of xtb_small.csv; the total energy, which is left out, is nearly a sum over atoms.
XTB = ("mu_debye", "homo_hartree", "lumo_hartree", "gap_hartree", "gyration2_angstrom2", REFRACTIVITY,
       "residual_energy_hartree")  # fmt: skip


class MoleculeTable(NamedTuple):
    """Molecules, canonical and without stereochemistry, none of them twice."""

    name: str
    smiles: list[str]
    properties: tuple[str, ...]
    values: np.ndarray  # float64 (molecules, properties)

    def part(self, places: np.ndarray) -> MoleculeTable:
        """Some of the molecules."""
        return self._replace(smiles=[self.smiles[place] for place in places], values=self.values[places])


def _table(name: str, path: pathlib.Path, properties: tuple[str, ...]) -> MoleculeTable:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    found: dict[str, list[float]] = {}
    for row in rows:
        text = flat(row["smiles"].strip())
        if text is None:
            raise ValueError(f"{path} holds {row['smiles']!r}, which is no molecule")
        found.setdefault(text, [float(row[name]) for name in properties])
    return MoleculeTable(name, list(found), properties, np.array(list(found.values())))


def read_xtb(folder: str | pathlib.Path) -> MoleculeTable:
    """Molecules of at most nine heavy atoms with properties by GFN2-xTB, of xtb_small.csv; the first of stereoisomers.

    Raises FileNotFoundError where it is missing.
    """
    return _table("GFN2-xTB, small molecules", pathlib.Path(folder) / "xtb_small.csv", XTB)


def read_solubility(folder: str | pathlib.Path) -> MoleculeTable:
    """Molecules with their measured log10 solubility in water in mol/l (Delaney 2004), of esol.csv.

    Raises FileNotFoundError where it is missing.
    """
    return _table("ESOL", pathlib.Path(folder) / "esol.csv", ("log_solubility",))


def refractivity(smiles: str) -> float:
    """Molar refractivity by Wildman and Crippen's contributions of atoms (1999), as in the tables."""
    return descriptor("MolMR", smiles)


_ENDS = ("C", "O", "N", "F", "C#N", "C=O", "OC", "C(C)C", "C(C)=O", "C(N)=O", "C1CC1", "C=C")
_CHAINS = ("", "C", "CC", "CO", "CN", "C(C)", "C(O)", "CC(=O)", "C=C", "C(F)")


def _made() -> list[str]:
    written = (f"C{chain}{first}" for chain, first in itertools.product(_CHAINS, _ENDS))
    branched = (f"C({first}){chain}{second}" for chain in _CHAINS for first in _ENDS[:6] for second in _ENDS)
    return list(dict.fromkeys(text for text in map(flat, (*written, *branched)) if text))


def computed_properties() -> MoleculeTable:
    """Chains with groups at their ends, with properties that RDKit computes of a graph."""
    names = {
        "log_p": "MolLogP", "polar_area": "TPSA", "weight": "MolWt", "surface": "LabuteASA", "balaban_j": "BalabanJ",
        REFRACTIVITY: "MolMR", "alpha": "HallKierAlpha",
    }  # fmt: skip
    smiles = _made()
    values = [[descriptor(name, text) for name in names.values()] for text in smiles]
    return MoleculeTable("chains with groups, computed properties", smiles, tuple(names), np.array(values))


def computed_solubility() -> MoleculeTable:
    """The same molecules with Delaney's estimate (2004): log S = 0.16 - 0.63 log P - 0.0062 weight + 0.066 rotors.

    The estimate's term for aromatic atoms is left out: there are none.
    """
    weights = {"MolLogP": -0.63, "MolWt": -0.0062, "NumRotatableBonds": 0.066}
    smiles = _made()
    values = [[0.16 + sum(weight * descriptor(name, text) for name, weight in weights.items())] for text in smiles]
    return MoleculeTable("the same, estimated solubility", smiles, ("log_solubility",), np.array(values))


class Scaler(NamedTuple):
    """Columns to [-1, 1], by their least and largest values."""

    least: np.ndarray
    most: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Scaler:
        """Of a table (molecules, properties). Raises ValueError for a column of one value."""
        least, most = values.min(0), values.max(0)
        if not (most > least).all():
            raise ValueError(f"columns {np.flatnonzero(most <= least).tolist()} hold one value only")
        return cls(least, most)

    def scale(self, values: np.ndarray) -> np.ndarray:
        """(..., properties) to the same."""
        return 2 * (values - self.least) / (self.most - self.least) - 1

    def unscale(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `scale`."""
        return (values + 1) / 2 * (self.most - self.least) + self.least

"""Protein chains with secondary structure, and peptides that are antimicrobial or not."""

from __future__ import annotations

import csv
import gzip
import pathlib
from typing import NamedTuple

import numpy as np


class Chain(NamedTuple):
    """A chain and, a letter a residue, its structure: H helix, E strand, C other."""

    sequence: str
    structure: str


class Proteins(NamedTuple):
    """Chains by split, and peptides with 1 (antimicrobial) or 0."""

    name: str
    training: list[Chain]
    test: list[Chain]
    peptides: list[tuple[str, int]]


def read_proteins(folder: str | pathlib.Path) -> Proteins:
    """Real chains and peptides: `secondary_structure.csv.gz` and `amp_vs_uniprot.csv`.

    Raises FileNotFoundError where one is missing.
    """
    folder = pathlib.Path(folder)
    chains, peptides = folder / "secondary_structure.csv.gz", folder / "amp_vs_uniprot.csv"
    for path in (chains, peptides):
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name} in {folder}")
    with gzip.open(chains, "rt") as file:
        rows = list(csv.DictReader(file))
    with peptides.open() as file:
        labelled = [(row["sequence"], int(row["antimicrobial"])) for row in csv.DictReader(file)]
    parts = {
        split: [Chain(row["sequence"], row["dssp3"]) for row in rows if row["split"] == split]
        for split in ("train", "test")
    }
    return Proteins("DSSP chains and peptides", parts["train"], parts["test"], labelled)


# Which residues helices and strands favour, and charged ones, roughly (Chou and Fasman 1978).
_FAVOURED = {"H": "AELMQKRH", "E": "VIYFWTLC", "C": "GPNDSTKE"}


def simulated_proteins(chains: int = 400, seed: int = 0) -> Proteins:
    """Chains of segments, whose residues mostly favour their structure; peptides rich in lysine are antimicrobial."""
    rng = np.random.default_rng(seed)

    def chain() -> Chain:
        sequence = structure = ""
        size = int(rng.integers(24, 48))
        while len(sequence) < size:
            kind = str(rng.choice(list("HEC")))
            length = int(rng.integers(4, 10))
            letters = _FAVOURED[kind] * 4 + "ACDEFGHIKLMNPQRSTVWY"
            sequence += "".join(rng.choice(list(letters), length))
            structure += kind * length
        return Chain(sequence[:size], structure[:size])

    def peptide() -> tuple[str, int]:
        label = int(rng.integers(2))
        letters = "ACDEFGHIKLMNPQRSTVWY" + "KRKW" * (5 * label)
        return "".join(rng.choice(list(letters), int(rng.integers(10, 25)))), label

    made = [chain() for _ in range(chains)]
    cut = chains // 5
    return Proteins("simulated proteins", made[cut:], made[:cut], [peptide() for _ in range(chains)])

"""Molecules as SMILES: tokens, random and canonical writings, fingerprints, measures of generated sets, drawings.

RDKit does the chemistry (`pip install 'zoo[molecules]'`); tokens need nothing.
"""

from __future__ import annotations

import collections
import gzip
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

# Bracket atoms, two-letter halogens, organic atoms, bonds, branches, ring closures of one and of two digits.
_TOKEN = re.compile(r"\[[^\[\]]+\]|Br|Cl|%\d{2}|[BCNOPSFIbcnops*]|[=#$:/\\~.()+\-@>?]|\d")
_ATOM = re.compile(r"\[[^\[\]]+\]|Br|Cl|[BCNOPSFIbcnops*]")


def rdkit() -> Any:
    """RDKit's module Chem, silenced. Raises ModuleNotFoundError where it is not installed."""
    try:
        from rdkit import Chem, rdBase
    except ModuleNotFoundError:
        raise ModuleNotFoundError("molecules need RDKit: pip install 'zoo[molecules]'") from None
    rdBase.DisableLog("rdApp.*")
    return Chem


def molecule(smiles: str) -> Any:
    """RDKit's molecule of a SMILES string. Raises ValueError where it is none."""
    parsed = rdkit().MolFromSmiles(smiles) if smiles else None
    if parsed is None:
        raise ValueError(f"{smiles!r} is not the SMILES of a molecule")
    return parsed


def canonical(smiles: str) -> str | None:
    """RDKit's canonical writing, or None where the string is no molecule (the empty one is none)."""
    chem = rdkit()
    parsed = chem.MolFromSmiles(smiles) if smiles else None
    return None if parsed is None else chem.MolToSmiles(parsed)


def descriptor(name: str, smiles: str) -> float:
    """A descriptor of a molecule, by RDKit's name, such as "MolLogP". Raises ValueError for a name it does not have."""
    from rdkit.Chem import Descriptors

    function = getattr(Descriptors, name, None)
    if function is None:
        raise ValueError(f"RDKit has no descriptor {name!r}")
    return float(function(molecule(smiles)))


def flat(smiles: str) -> str | None:
    """RDKit's canonical writing without stereochemistry, or None where the string is no molecule."""
    chem = rdkit()
    parsed = chem.MolFromSmiles(smiles) if smiles else None
    return None if parsed is None else chem.MolToSmiles(parsed, isomericSmiles=False)


def random_smiles(smiles: str, rng: np.random.Generator) -> str:
    """The same molecule, written from a random atom along random branches (Bjerrum 2017)."""
    chem, parsed = rdkit(), molecule(smiles)
    order = rng.permutation(parsed.GetNumAtoms()).tolist()
    return chem.MolToSmiles(chem.RenumberAtoms(parsed, order), canonical=False)


def tokenize(smiles: str) -> list[str]:
    """A SMILES string as tokens that join to it again. Raises ValueError where some of it is no token.

    >>> tokenize("C[C@@H](Cl)c%10ccBr")
    ['C', '[C@@H]', '(', 'Cl', ')', 'c', '%10', 'c', 'c', 'Br']
    """
    tokens = _TOKEN.findall(smiles)
    if "".join(tokens) != smiles:
        raise ValueError(f"{smiles!r} holds what is no SMILES token")
    return tokens


def atom_positions(tokens: Sequence[str]) -> list[int]:
    """Places of the atoms among the tokens, in the order in which RDKit numbers the atoms of that string."""
    return [place for place, token in enumerate(tokens) if _ATOM.fullmatch(token)]


class SmilesLanguage:
    """A dictionary of SMILES tokens, and sequences of a fixed length padded on the left.

    Numbers 0, 1, 2 and 3 are padding, unknown, start and stop.
    """

    PAD, UNKNOWN, START, STOP = range(4)

    def __init__(self, tokens: Iterable[str], length: int) -> None:
        """The tokens of the dictionary, and the length of sequences, start and stop included."""
        if length < 3:
            raise ValueError(f"length must leave room for start, stop and a token, got {length}")
        self.tokens = ("<PAD>", "<UNK>", "<START>", "<STOP>", *sorted(set(tokens)))
        self.length = length
        self._numbers = {token: number for number, token in enumerate(self.tokens)}

    @classmethod
    def of(cls, smiles: Iterable[str], length: int) -> SmilesLanguage:
        """The dictionary of all tokens that occur."""
        return cls((token for text in smiles for token in tokenize(text)), length)

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, smiles: str) -> np.ndarray:
        """int32 (length,): padding, start, tokens, stop. Raises ValueError for a longer string."""
        tokens = tokenize(smiles)
        if len(tokens) + 2 > self.length:
            raise ValueError(f"{smiles!r} has {len(tokens)} tokens, more than {self.length - 2}")
        row = np.zeros(self.length, np.int32)
        numbers = [self._numbers.get(token, self.UNKNOWN) for token in tokens]
        row[self.length - len(tokens) - 2 :] = [self.START, *numbers, self.STOP]
        return row

    def decode(self, numbers: Sequence[int]) -> str:
        """The string of a sequence: what stands between start and stop."""
        return "".join(self.tokens[number] for number in numbers if number > self.STOP)


class CharacterLanguage:
    """Characters of SMILES numbered from 1 by falling frequency; 0 fills sequences up. Ends may be marked, by @ and $.

    Fields:
      characters: in the order of their numbers.
      ends: whether sequences begin and end with a mark.
    """

    START, END = "@", "$"

    def __init__(self, smiles: Iterable[str], ends: bool = False) -> None:
        """Of all characters that occur, those as frequent in order of appearance.

        Raises ValueError where a mark is a character of the strings: chirality, say, which `flat` takes off.
        """
        texts = list(smiles)
        marks = self.START + self.END if ends else ""
        for text in texts:
            if set(text) & set(marks):
                raise ValueError(f"{text!r} holds {self.START} or {self.END}, which mark the ends of sequences")
        count = collections.Counter("".join(f"{marks[:1]}{text}{marks[1:]}" for text in texts))
        self.characters = "".join(sorted(count, key=lambda character: -count[character]))
        self.ends = ends

    def __len__(self) -> int:
        """How many numbers there are, 0 among them."""
        return len(self.characters) + 1

    def encode(self, smiles: str, length: int) -> np.ndarray:
        """int32 (length,). Raises ValueError for a string that is too long, or holds another character."""
        text = f"{self.START}{smiles}{self.END}" if self.ends else smiles
        if len(text) > length:
            raise ValueError(f"{smiles!r} does not fit a length of {length}")
        if not set(text) <= set(self.characters):
            raise ValueError(f"{smiles!r} holds other characters than {self.characters!r}")
        row = np.zeros(length, np.int32)
        row[: len(text)] = [self.characters.index(character) + 1 for character in text]
        return row

    def decode(self, numbers: Sequence[int] | np.ndarray) -> str:
        """The string of a sequence, zeros left out; where ends are marked, what stands before the first end."""
        text = "".join(self.characters[int(number) - 1] for number in numbers if number > 0)
        return text.removeprefix(self.START).split(self.END)[0] if self.ends else text


def morgan_fingerprints(smiles: Sequence[str], bits: int = 512, radius: int = 2) -> np.ndarray:
    """Morgan fingerprints (Rogers and Hahn 2010), float32 (molecules, bits) of zeros and ones."""
    molecules = [molecule(text) for text in smiles]
    from rdkit.Chem import rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=bits)
    return np.stack([generator.GetFingerprintAsNumPy(each) for each in molecules]).astype(np.float32)


def tanimoto(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Shared over all bits of each pair of fingerprints: (n, bits), (m, bits) to (n, m); of two empty ones 0."""
    shared = first @ second.T
    every = first.sum(1)[:, None] + second.sum(1)[None] - shared
    return shared / np.maximum(every, 1)


class GenerationMetrics(NamedTuple):
    """Measures of a generated set; NaN where there is nothing to count."""

    validity: float  # share of strings that are molecules
    uniqueness: float  # different molecules over valid strings
    novelty: float  # share of the different molecules that training did not show
    diversity: float  # 1 - mean Tanimoto similarity of pairs of different molecules (Morgan, 1024 bits)


def generation_metrics(generated: Sequence[str], training: Iterable[str]) -> GenerationMetrics:
    """Validity, uniqueness, novelty and diversity (Brown et al. 2019, GuacaMol; Polykovskiy et al. 2020, MOSES).

    Args:
      generated: SMILES strings, some of them perhaps no molecules.
      training: SMILES of the training set; strings that are none are left out.
    """
    valid = [text for text in map(canonical, generated) if text is not None]
    known = {canonical(text) for text in training}
    different = sorted(set(valid))
    nan = float("nan")
    diversity = nan
    if len(different) > 1:
        bits = morgan_fingerprints(different, 1024)
        similarity = tanimoto(bits, bits)
        diversity = 1 - float(similarity[~np.eye(len(different), dtype=bool)].mean())
    return GenerationMetrics(
        len(valid) / len(generated) if generated else nan,
        len(different) / len(valid) if valid else nan,
        sum(text not in known for text in different) / len(different) if different else nan,
        diversity,
    )


def draw(
    smiles: str, weights: Sequence[float] | np.ndarray | None = None, size: tuple[int, int] = (320, 240)
) -> np.ndarray:
    """A molecule's drawing, uint8 (height, width, 3), with a red disc on each atom as dark as its weight is large.

    Args:
      smiles: of the molecule.
      weights: one an atom, in the order of the string; None draws no discs.
      size: width and height in pixels.

    Raises:
      ValueError: it is no molecule, or there is not one weight an atom.
    """
    import io

    from PIL import Image

    parsed = molecule(smiles)
    from rdkit.Chem.Draw import rdMolDraw2D

    drawer = rdMolDraw2D.MolDraw2DCairo(*size)
    options: dict[str, Any] = {}
    if weights is not None:
        if len(weights) != parsed.GetNumAtoms():
            raise ValueError(f"{smiles!r} has {parsed.GetNumAtoms()} atoms, got {len(weights)} weights")
        values = np.asarray(weights, float)
        spread = np.ptp(values)
        values = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
        atoms = list(range(len(values)))
        options = {
            "highlightAtoms": atoms,
            "highlightAtomColors": {atom: (1.0, 1 - float(values[atom]), 1 - float(values[atom])) for atom in atoms},
            "highlightBonds": [],
        }
    rdMolDraw2D.PrepareAndDrawMolecule(drawer, parsed, **options)
    drawer.FinishDrawing()
    with Image.open(io.BytesIO(drawer.GetDrawingText())) as image:
        return np.asarray(image.convert("RGB"))


def read_smiles(path: str | pathlib.Path) -> list[str]:
    """The SMILES strings of a file, one a line (what follows white space is left out); .gz files are unpacked.

    Raises FileNotFoundError where there is no such file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [line.split()[0] for line in text.splitlines() if line.strip() and not line.startswith("#")]

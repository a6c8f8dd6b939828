"""Molecules as padded graphs of atom and bond classes, back to SMILES, and what generated ones are measured by.

Class 0 of atoms is padding, and of bonds no bond. Needs RDKit (`pip install 'zoo[molecules]'`).
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import importlib
import math
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from zoo.data.molecules import canonical, generation_metrics, molecule, morgan_fingerprints, rdkit, tanimoto

ATOM_FEATURES = 54
SULFONAMIDE = "S(=O)(=O)N"


class Graph(NamedTuple):
    """One molecule, or with a first axis several."""

    atoms: np.ndarray  # uint8 (N,), index into the codec's `atomic_numbers`
    bonds: np.ndarray  # uint8 (N, N), symmetric, index into the codec's `bond_types`
    features: np.ndarray  # float32 (N, 54), or (N, 0) without


@dataclasses.dataclass(frozen=True)
class MoleculeCodec:
    """Classes of atoms and bonds, and the number of vertices, of a set of molecules.

    Attributes:
      atomic_numbers: by class; the first is 0.
      bond_types: RDKit's numbers of its bond types, by class; the first is that of no bond.
      vertices: N.
      features: whether nodes have 54 more numbers than classes (degree, valences, hybridisation, hydrogens, rings ...).
    """

    atomic_numbers: tuple[int, ...]
    bond_types: tuple[int, ...]
    vertices: int
    features: bool = False

    @classmethod
    def of(cls, smiles: Iterable[str], vertices: int, features: bool = False) -> MoleculeCodec:
        """The codec of all atoms and bonds of the molecules with at most so many atoms.

        Raises ValueError where there is no such molecule.
        """
        atoms, bonds = set(), set()
        for text in smiles:
            parsed = rdkit().MolFromSmiles(text)
            if parsed is not None and 0 < parsed.GetNumAtoms() <= vertices:
                atoms |= {atom.GetAtomicNum() for atom in parsed.GetAtoms()}
                bonds |= {int(bond.GetBondType()) for bond in parsed.GetBonds()}
        if not bonds:
            raise ValueError(f"there is no molecule of at most {vertices} atoms with a bond")
        return cls((0, *sorted(atoms - {0})), (int(rdkit().BondType.ZERO), *sorted(bonds)), vertices, features)

    @property
    def node_types(self) -> int:
        """Width of a node: classes, and the features if there are any."""
        return len(self.atomic_numbers) + (ATOM_FEATURES if self.features else 0)

    @property
    def edge_types(self) -> int:
        """Width of an edge."""
        return len(self.bond_types)

    def encode(self, smiles: str) -> Graph | None:
        """The graph, or None as published: unreadable, too large, an atom without a bond, or of an unknown class."""
        parsed = rdkit().MolFromSmiles(smiles)
        if parsed is None or not 0 < parsed.GetNumAtoms() <= self.vertices:
            return None
        atoms = np.zeros(self.vertices, np.uint8)
        bonds = np.zeros((self.vertices, self.vertices), np.uint8)
        try:
            for atom in parsed.GetAtoms():
                atoms[atom.GetIdx()] = self.atomic_numbers.index(atom.GetAtomicNum())
            for bond in parsed.GetBonds():
                first, second = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
                bonds[first, second] = bonds[second, first] = self.bond_types.index(int(bond.GetBondType()))
        except ValueError:
            return None
        if not bonds[: parsed.GetNumAtoms()].any(axis=1).all():
            return None
        features = np.zeros((self.vertices, ATOM_FEATURES if self.features else 0), np.float32)
        if self.features:
            features[: parsed.GetNumAtoms()] = [atom_features(atom) for atom in parsed.GetAtoms()]
        return Graph(atoms, bonds, features)

    def encode_all(self, smiles: Iterable[str]) -> tuple[Graph, list[str]]:
        """Those that can be encoded, stacked, and their SMILES. Raises ValueError where there is none."""
        pairs = [(graph, text) for text in smiles if (graph := self.encode(text)) is not None]
        if not pairs:
            raise ValueError(f"no molecule has a graph of at most {self.vertices} vertices of these classes")
        graphs, kept = zip(*pairs, strict=True)
        return Graph(*(np.stack(arrays) for arrays in zip(*graphs, strict=True))), list(kept)

    def one_hot(self, graphs: Graph) -> tuple[np.ndarray, np.ndarray]:
        """float32 nodes (..., N, node_types) and edges (..., N, N, edge_types)."""
        nodes = np.eye(len(self.atomic_numbers), dtype=np.float32)[graphs.atoms]
        return (
            np.concatenate([nodes, graphs.features], axis=-1),
            np.eye(len(self.bond_types), dtype=np.float32)[graphs.bonds],
        )

    def classes(self, nodes: np.ndarray, edges: np.ndarray) -> Graph:
        """Graphs of the largest logits, symmetric by the lower triangle; features are left out."""
        atoms = np.argmax(nodes[..., : len(self.atomic_numbers)], axis=-1).astype(np.uint8)
        lower = np.tril(np.argmax(edges, axis=-1).astype(np.uint8), -1)
        return Graph(atoms, lower + lower.swapaxes(-1, -2), np.zeros((*atoms.shape, 0), np.float32))

    def build(self, graph: Graph) -> Any:
        """RDKit's editable molecule of one graph, not sanitised; padding becomes atoms of number 0."""
        chem = rdkit()
        built = chem.RWMol()
        for number in graph.atoms:
            built.AddAtom(chem.Atom(self.atomic_numbers[number]))
        for start, end in zip(*np.nonzero(np.tril(graph.bonds, -1)), strict=True):
            kind = chem.BondType.values[self.bond_types[graph.bonds[start, end]]]
            built.AddBond(int(start), int(end), kind)
        return built

    def decode(self, nodes: np.ndarray, edges: np.ndarray, strict: bool = False) -> list[str | None]:
        """SMILES of logits (M, N, node_types) and (M, N, N, edge_types).

        Args:
          nodes, edges: logits; see `classes`.
          strict: sanitise the whole graph, padding included, as the published code does with samples in training: None
            where that fails. Without, as in its inference: the longest fragment, with C for padding atoms in it, which
            may be no valid molecule.

        Raises:
          ValueError: the shapes are others.
        """
        shape = (len(nodes), self.vertices, self.vertices, self.edge_types)
        if nodes.shape != (*shape[:2], self.node_types) or edges.shape != shape:
            raise ValueError(
                f"expected nodes {(*shape[:2], self.node_types)} and edges {shape}, got {nodes.shape}, {edges.shape}"
            )
        found = self.classes(np.asarray(nodes), np.asarray(edges))
        return [
            self.smiles(Graph(*parts), strict) for parts in zip(found.atoms, found.bonds, found.features, strict=True)
        ]

    def smiles(self, graph: Graph, strict: bool = False) -> str | None:
        """The SMILES of one graph, see `decode`."""
        chem = rdkit()
        built = self.build(graph)
        if strict:
            try:
                chem.SanitizeMol(built)
            except ValueError:
                return None
        text = max(chem.MolToSmiles(built).split("."), key=len)
        return text.replace("*", "C")


def atom_features(atom: Any) -> list[float]:
    """54 numbers of an RDKit atom, all but four of them classes as zeros and a one."""

    def classes(value: int, values: Iterable[int]) -> list[float]:
        return [float(value == each) for each in values]

    valence = importlib.import_module("rdkit.Chem").ValenceType
    return [
        *classes(atom.GetDegree(), range(5)),
        *classes(atom.GetValence(valence.EXPLICIT), range(9)),
        *classes(int(atom.GetHybridization()), range(1, 7)),
        *classes(atom.GetValence(valence.IMPLICIT), range(9)),
        float(atom.GetIsAromatic()),
        float(atom.GetNoImplicit()),
        *classes(atom.GetNumExplicitHs(), range(5)),
        *classes(atom.GetNumImplicitHs(), range(5)),
        *classes(atom.GetNumRadicalElectrons(), range(5)),
        float(atom.IsInRing()),
        *(float(atom.IsInRingSize(size)) for size in range(2, 9)),
    ]


class Edits(NamedTuple):
    """How far generated graphs are from their inputs."""

    identical: float  # share of graphs that did not change
    atoms: float  # mean number of vertices whose class changed
    bonds: float  # mean number of pairs whose class changed


def edits(before: Graph, after: Graph) -> Edits:
    """Between stacked graphs, vertex by vertex."""
    atoms = (before.atoms != after.atoms).sum(-1)
    bonds = np.tril(before.bonds != after.bonds, -1).sum((-1, -2))
    return Edits(float(np.mean(atoms + bonds == 0)), float(atoms.mean()), float(bonds.mean()))


def random_edits(graphs: Graph, codec: MoleculeCodec, like: Edits, rng: np.random.Generator) -> Graph:
    """As many classes of vertices and pairs drawn anew (to another class) as `like` has in the mean."""

    def change(classes: np.ndarray, mean: float, count: int, kinds: int) -> np.ndarray:
        changed = rng.random(classes.shape) < mean / count
        shifted = (classes + rng.integers(1, kinds, classes.shape)) % kinds
        return np.where(changed, shifted, classes).astype(np.uint8)

    vertices = codec.vertices
    atoms = change(graphs.atoms, like.atoms, vertices, len(codec.atomic_numbers))
    bonds = change(graphs.bonds, like.bonds, vertices * (vertices - 1) // 2, codec.edge_types)
    lower = np.tril(bonds, -1)
    return Graph(atoms, lower + lower.swapaxes(1, 2), graphs.features)


class MoleculeMetrics(NamedTuple):
    """Measures of generated molecules; all but the first are of the valid ones, NaN where there are none."""

    validity: float
    uniqueness: float
    novelty: float  # share of different molecules that are not in the training set
    novelty_test: float
    novelty_target: float
    diversity: float  # 1 - mean Tanimoto similarity of pairs
    target_similarity: float  # mean over molecules of the largest Tanimoto similarity to the target set
    training_similarity: float  # likewise
    motif: float  # share with the target's substructure
    qed: float
    sa: float  # synthetic accessibility (Ertl and Schuffenhauer 2009), 1 easy .. 10 hard
    logp: float
    lipinski: float  # share that breaks none of the four rules
    veber: float  # share with at most 10 rotatable bonds and 140 square angstroms of polar surface
    pains: float  # share free of pan-assay interference patterns
    fragments: float  # cosine of BRICS fragments' counts with the target set's
    scaffolds: float  # likewise of Murcko scaffolds


def molecule_metrics(
    generated: Sequence[str | None],
    training: Sequence[str],
    target: Sequence[str],
    test: Sequence[str] = (),
    motif: str = SULFONAMIDE,
) -> MoleculeMetrics:
    """What DrugGEN reports of generated molecules but docking, and the distance to a trained network's features (FCD).

    Args:
      generated: SMILES, valid or not; None is not.
      training, target, test: SMILES of the three sets that novelty is against.
      motif: SMARTS of a substructure.
    """
    chem = rdkit()
    valid = [text for text in (canonical(text) if text else None for text in generated) if text is not None]
    different = sorted(set(valid))
    base = generation_metrics([text or "" for text in generated], training)
    if not valid:
        return MoleculeMetrics._make([0.0, *[math.nan] * 16])
    from rdkit.Chem import QED, FilterCatalog, rdMolDescriptors

    catalog = FilterCatalog.FilterCatalogParams()
    catalog.AddCatalog(FilterCatalog.FilterCatalogParams.FilterCatalogs.PAINS)
    pains, pattern, score = FilterCatalog.FilterCatalog(catalog), chem.MolFromSmarts(motif), _synthetic_accessibility()
    if pattern is None:
        raise ValueError(f"motif {motif!r} is no SMARTS pattern")
    weight = importlib.import_module("rdkit.Chem.Descriptors").MolWt
    rows = []
    for text in valid:
        one = molecule(text)
        logp, polar = rdMolDescriptors.CalcCrippenDescriptors(one)[0], rdMolDescriptors.CalcTPSA(one)
        rows.append((
            one.HasSubstructMatch(pattern), QED.qed(one), score(one), logp,
            weight(one) <= 500 and logp <= 5 and rdMolDescriptors.CalcNumLipinskiHBD(one) <= 5
            and rdMolDescriptors.CalcNumLipinskiHBA(one) <= 10,
            rdMolDescriptors.CalcNumRotatableBonds(one) <= 10 and polar <= 140, not pains.HasMatch(one),
        ))  # fmt: skip
    bits = morgan_fingerprints(valid, 1024)

    def new(known: Iterable[str]) -> float:
        canonicals = {canonical(text) for text in known}
        return sum(text not in canonicals for text in different) / len(different)

    def nearest(known: Sequence[str]) -> float:
        return float(tanimoto(bits, morgan_fingerprints(known, 1024)).max(1).mean())

    means = [float(mean) for mean in np.mean(np.asarray(rows, float), axis=0)]
    return MoleculeMetrics._make([
        base.validity, base.uniqueness, base.novelty, new(test), new(target), base.diversity, nearest(target),
        nearest(training), *means, _cosine(valid, target, _fragments), _cosine(valid, target, _scaffolds),
    ])  # fmt: skip


def _synthetic_accessibility() -> Any:
    """RDKit's score, which lies among its contributions and outside its package."""
    from rdkit.Chem import RDConfig

    folder = str(pathlib.Path(RDConfig.RDContribDir) / "SA_Score")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("sascorer").calculateScore


# Sets of training and target are measured against again and again.
@functools.cache
def _fragments(smiles: str) -> tuple[str, ...]:
    from rdkit.Chem import BRICS

    return tuple(BRICS.BRICSDecompose(molecule(smiles)))


@functools.cache
def _scaffolds(smiles: str) -> tuple[str, ...]:
    from rdkit.Chem.Scaffolds import MurckoScaffold

    return (MurckoScaffold.MurckoScaffoldSmiles(mol=molecule(smiles)),)


def _cosine(first: Sequence[str], second: Sequence[str], parts: Any) -> float:
    counts = [collections.Counter(part for text in texts for part in parts(text)) for texts in (first, second)]
    shared = sum(counts[0][part] * counts[1][part] for part in counts[0])
    norms = [math.sqrt(sum(number**2 for number in count.values())) for count in counts]
    return shared / (norms[0] * norms[1]) if min(norms) > 0 else 0.0


def read_inhibitors(path: str | pathlib.Path, least: float = 6.0, column: str = "pic50_akt1") -> list[str]:
    """SMILES of a table (columns "smiles" and a measured -log10 IC50 in mol/l) that reach `least`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a column is missing.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = {"smiles", column} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
        return [row["smiles"] for row in reader if float(row[column]) >= least]


def substituted_rings() -> list[str]:
    """Some 900 small molecules without any file: rings with two substituents, a sixth of them sulfonamides."""
    groups = [
        "C", "CC", "O", "OC", "N", "NC", "F", "Cl", "C#N", "C(=O)O", "C(=O)N", "C(F)(F)F", "S(=O)(=O)N",
        "CN", "CO", "C(C)C", "C(=O)C", "S(=O)(=O)NC",
    ]  # fmt: skip
    rings = ("c1ccc({})cc1{}", "c1cc({})ncc1{}", "C1CCC({})CC1{}", "c1csc({})c1{}")
    made = (canonical(ring.format(a, b)) for ring in rings for a in groups for b in groups)
    return sorted({text for text in made if text is not None})

"""Graphs of several types of nodes and links: reading, planting, their ontology's smallest instances, perturbations.

An ontology (a network schema) is a tree of slots, each of one node type, joined by links of one edge type. An instance
holds one node a slot, every link of the schema between them. Nodes are numbered within their type; number `count` of a
type is the missing node, which stands where a neighbourhood lacks the type.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_POOL = 8  # candidates for a replacement
_CHOSEN = 0.3  # chance of a slot to be replaced


class Negatives(NamedTuple):
    """False instances."""

    sub: np.ndarray  # int32 (M, k)
    changed: np.ndarray  # bool (M, k), slots that are other than the true instance's


@dataclasses.dataclass(frozen=True)
class HeteroGraph:
    """Typed nodes with features, typed links between them.

    Attributes:
      features: by node type, float32 (count, width).
      edges: by edge type, the two node types it joins and integers (number, 2).

    Raises ValueError for links to types or nodes that do not exist.
    """

    features: Mapping[str, np.ndarray]
    edges: Mapping[str, tuple[str, str, np.ndarray]]

    def __post_init__(self) -> None:
        for name, (first, second, pairs) in self.edges.items():
            for place, kind in enumerate((first, second)):
                if kind not in self.features:
                    raise ValueError(f"edge {name!r} joins {kind!r}, no type of {sorted(self.features)}")
                if len(pairs) and not 0 <= pairs[:, place].min() <= pairs[:, place].max() < len(self.features[kind]):
                    raise ValueError(f"edge {name!r} holds nodes that {kind!r} does not have")

    def count(self, kind: str) -> int:
        """Nodes of a type."""
        return len(self.features[kind])

    def adjacency(self, edge: str, first: str) -> np.ndarray:
        """bool (count + 1, count + 1) from nodes of the type `first` to their neighbours; the missing have none.

        Dense: for graphs of some thousands of nodes a type.
        """
        left, right, pairs = self.edges[edge]
        linked = np.zeros((self.count(left) + 1, self.count(right) + 1), bool)
        linked[pairs[:, 0], pairs[:, 1]] = True
        return linked if first == left else linked.T

    def with_missing(self) -> list[np.ndarray]:
        """Features by type, in order, with a last row of the missing node, told by a last column of its own."""
        padded = []
        for array in self.features.values():
            wide = np.zeros((len(array) + 1, array.shape[1] + 1), np.float32)
            wide[:-1, :-1] = array
            wide[-1, -1] = 1
            padded.append(wide)
        return padded


@dataclasses.dataclass(frozen=True)
class Schema:
    """An ontology's tree.

    Attributes:
      slots: the node type of each; a type may fill several.
      links: (slot, slot, edge type), each from a slot that comes earlier in the tree; slot 0 is the root.

    Raises ValueError where the links make no tree of all slots.
    """

    slots: tuple[str, ...]
    links: tuple[tuple[int, int, str], ...]

    def __post_init__(self) -> None:
        reached = {0}
        for parent, child, _ in self.links:
            if parent not in reached or child in reached or not 0 <= child < len(self.slots):
                raise ValueError(
                    f"link ({parent}, {child}) does not grow a tree of {len(self.slots)} slots from slot 0"
                )
            reached.add(child)
        if len(reached) != len(self.slots):
            raise ValueError(f"slots {sorted(set(range(len(self.slots))) - reached)} hang on no link")

    def relation(self) -> np.ndarray:
        """int32 (k, k): -1 not linked, 0 self, 1 + 2 n from the first to the second slot of link n, 2 + 2 n back."""
        table = np.full((len(self.slots), len(self.slots)), -1, np.int32)
        np.fill_diagonal(table, 0)
        for number, (first, second, _) in enumerate(self.links):
            table[first, second], table[second, first] = 1 + 2 * number, 2 + 2 * number
        return table


def enumerate_ontology(
    graph: HeteroGraph, schema: Schema, cap: int = 16, seed: int = 0, nodes: Sequence[int] | None = None
) -> np.ndarray:
    """Instances of a schema around each node of its root's type.

    All of them where a node has at most `cap`; else `cap` of them, each a walk of the tree from the root whose every
    step is uniform over neighbours (instances may then repeat).

    Args:
      graph: whose links the instances have.
      schema: slot 0 is the target's.
      cap: most instances a node.
      seed: of the walks.
      nodes: of the root's type; None is all.

    Returns:
      int32 (M, k), numbers within the slot's type; a type's count where the neighbourhood lacks it.

    Raises:
      ValueError: the cap is not positive, or a link joins other types than its edges.
    """
    if cap < 1:
        raise ValueError(f"cap must be at least 1, got {cap}")
    random: Any = np.random.default_rng(seed)
    neighbours: dict[tuple[int, int], list[np.ndarray]] = {}
    for parent, child, edge in schema.links:
        if edge not in graph.edges or {*graph.edges[edge][:2]} != {schema.slots[parent], schema.slots[child]}:
            raise ValueError(f"no edge {edge!r} joins {schema.slots[parent]!r} and {schema.slots[child]!r}")
        linked = graph.adjacency(edge, schema.slots[parent])
        missing = np.array([linked.shape[1] - 1])
        neighbours[parent, child] = [near if len(near := np.flatnonzero(row)) else missing for row in linked]
    rows: list[np.ndarray] = []
    found: Any
    for node in range(graph.count(schema.slots[0])) if nodes is None else nodes:
        if _instances(schema, neighbours, int(node)) <= cap:
            found = np.full((1, len(schema.slots)), node)
            for parent, child, _ in schema.links:
                options = [neighbours[parent, child][row[parent]] for row in found]
                found = np.repeat(found, [len(each) for each in options], axis=0)
                found[:, child] = np.concatenate(options)
        else:
            found = np.full((cap, len(schema.slots)), node)
            for parent, child, _ in schema.links:
                found[:, child] = [random.choice(neighbours[parent, child][row[parent]]) for row in found]
        rows.append(found)
    return np.concatenate(rows).astype(np.int32)


def _instances(schema: Schema, neighbours: Mapping[tuple[int, int], list[np.ndarray]], node: int) -> int:
    def below(slot: int, node: int) -> int:
        product = 1
        for parent, child, _ in schema.links:
            if parent == slot:
                product *= sum(below(child, int(other)) for other in neighbours[parent, child][node])
        return product

    return below(0, node)


def hard_replace(
    sub: np.ndarray, slot: int, pool: np.ndarray, features: np.ndarray, forbidden: np.ndarray
) -> np.ndarray:
    """Replaces a slot's nodes by the admissible candidates that are most like them.

    Args:
      sub: integers (M, k).
      slot: which column.
      pool: integers (M, c), candidates of the slot's type.
      features: (count, width) of that type; likeness is the cosine.
      forbidden: bool (M, c), candidates that must not be taken (the node itself never is).

    Returns:
      A changed copy; rows without an admissible candidate stay as they are.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    likeness = np.einsum("md,mcd->mc", unit[sub[:, slot]], unit[pool])
    return _replace(sub, slot, pool, np.where(_admissible(sub, slot, pool, forbidden), likeness, -np.inf))


def easy_replace(sub: np.ndarray, slot: int, pool: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
    """As `hard_replace`, by the first admissible candidate: uniform where the pool is."""
    order = -np.arange(pool.shape[1], dtype=float)
    return _replace(sub, slot, pool, np.where(_admissible(sub, slot, pool, forbidden), order, -np.inf))


def _admissible(sub: np.ndarray, slot: int, pool: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
    return ~forbidden.astype(bool) & (pool != sub[:, slot, None])


def _replace(sub: np.ndarray, slot: int, pool: np.ndarray, score: np.ndarray) -> np.ndarray:
    best = score.argmax(1)
    rows = np.arange(len(sub))
    changed = sub.copy()
    changed[:, slot] = np.where(np.isneginf(score[rows, best]), sub[:, slot], pool[rows, best])
    return changed


class Perturbation:
    """Makes false instances of true ones: some nodes become others of the same type that do not fit.

    Each slot is chosen with chance 0.3, at least one and never all; a chosen slot takes one of 8 nodes of its type,
    drawn uniformly, that is linked to none of its unchosen neighbours in the schema (and so makes no true instance):
    the most like one by features ("hard"), or any ("easy").
    """

    def __init__(self, graph: HeteroGraph, schema: Schema) -> None:
        """Of the graph's links and features."""
        self.schema = schema
        self.counts = [graph.count(kind) for kind in schema.slots]
        self.features = [np.pad(graph.features[kind], ((0, 1), (0, 0))) for kind in schema.slots]
        self.neighbours: list[list[tuple[int, np.ndarray]]] = [[] for _ in schema.slots]
        for first, second, edge in schema.links:
            linked = graph.adjacency(edge, schema.slots[first])
            self.neighbours[second].append((first, linked))
            self.neighbours[first].append((second, linked.T))

    def __call__(self, sub: np.ndarray, rng: np.random.Generator, hard: bool = True) -> Negatives:
        """False instances int32 (M, k), and which slots changed, bool; rows in which none did are to be left out."""
        count, slots = sub.shape
        chosen = rng.random((count, slots)) < _CHOSEN
        none = np.flatnonzero(~chosen.any(1))
        chosen[none, rng.integers(0, slots, len(none))] = True
        every = np.flatnonzero(chosen.all(1))
        chosen[every, rng.integers(0, slots, len(every))] = False
        changed = sub.copy()
        for slot in range(slots):
            rows = np.flatnonzero(chosen[:, slot])
            if not len(rows):
                continue
            pool = rng.integers(0, self.counts[slot], (len(rows), _POOL))
            forbidden = np.zeros(pool.shape, bool)
            for other, linked in self.neighbours[slot]:
                kept = ~chosen[rows, other]
                forbidden |= linked[sub[rows, other, None], pool] & kept[:, None]
            if hard:
                new = hard_replace(sub[rows], slot, pool, self.features[slot], forbidden)
            else:
                new = easy_replace(sub[rows], slot, pool, forbidden)
            changed[rows, slot] = new[:, slot]
        return Negatives(changed, changed != sub)


def codex_film(path: str | pathlib.Path, genres: int = 8) -> tuple[HeteroGraph, np.ndarray, np.ndarray]:
    """Films, persons and countries of CoDEx-M (Safavi and Koutra 2020), and the films' genres.

    No genre is in the graph. Films have their locations and countries as features, persons their occupations and
    citizenships, countries themselves.

    Args:
      path: of codex_film.npz.
      genres: the most frequent ones are labels.

    Returns:
      The graph; labels bool (films, genres); the films that have one, integers.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it lacks an array.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    names = ("film_cast_person", "film_director_person", "film_genre", "film_country", "film_location",
             "person_occupation", "person_citizenship")  # fmt: skip
    with np.load(path) as stored:
        missing = [name for name in names if f"edge_{name}" not in stored]
        if missing:
            raise ValueError(f"{path} has no edges {', '.join(missing)}")
        pairs = {name: stored[f"edge_{name}"].astype(np.int64) for name in names}
        counts = {kind: len(stored[f"id_{kind}"]) for kind in ("film", "person", "genre", "country", "location",
                                                                "occupation")}  # fmt: skip

    def indicator(edge: str, rows: str, columns: str) -> np.ndarray:
        table = np.zeros((counts[rows], counts[columns]), np.float32)
        table[tuple(pairs[edge].T)] = 1
        return table

    film = [indicator(f"film_{kind}", "film", kind) for kind in ("location", "country")]
    person = [indicator("person_occupation", "person", "occupation"),
              indicator("person_citizenship", "person", "country")]  # fmt: skip
    features = {
        "film": np.hstack(film),
        "person": np.hstack(person),
        "country": np.eye(counts["country"], dtype=np.float32),
    }
    edges = {
        "cast": ("film", "person", pairs["film_cast_person"]),
        "director": ("film", "person", pairs["film_director_person"]),
        "country": ("film", "country", pairs["film_country"]),
        "citizenship": ("person", "country", pairs["person_citizenship"]),
    }
    table = indicator("film_genre", "film", "genre") > 0
    frequent = np.argsort(-table.sum(0), kind="stable")[:genres]
    labels = table[:, frequent]
    return HeteroGraph(features, edges), labels, np.flatnonzero(labels.any(1))


def xor_graph(
    targets: int = 400, others: int = 60, noise: float = 0.3, seed: int = 0
) -> tuple[HeteroGraph, np.ndarray]:
    """A planted graph in which only two neighbour types together tell a target's class.

    Nodes of types "left" and "right" belong to one of two blocks each, which their features show with noise. A target
    is linked to 3 nodes of one block of either type; its class is whether the two blocks differ (0 or 1), so that
    either type alone tells nothing. Its own features are noise.
    """
    random = np.random.default_rng(seed)
    features = {"target": random.normal(size=(targets, 8)).astype(np.float32)}
    edges, blocks = {}, []
    for kind in ("left", "right"):
        block = np.arange(others) % 2
        shown = np.eye(2)[block] + noise * random.normal(size=(others, 2))
        features[kind] = shown.astype(np.float32)
        own = random.integers(0, 2, targets)
        chosen = [random.choice(np.flatnonzero(block == each), 3, replace=False) for each in own]
        edges[kind] = ("target", kind, np.stack([np.repeat(np.arange(targets), 3), np.concatenate(chosen)], axis=1))
        blocks.append(own)
    return HeteroGraph(features, edges), (blocks[0] != blocks[1]).astype(np.int32)

import numpy as np
import pytest

from zoo.data.hetero_graphs import (
    HeteroGraph,
    Perturbation,
    Schema,
    codex_film,
    easy_replace,
    enumerate_ontology,
    hard_replace,
    xor_graph,
)

STAR = Schema(("a", "b", "b", "c"), ((0, 1, "ab"), (0, 2, "ab"), (1, 3, "bc")))


@pytest.fixture
def graph():
    features = {kind: np.eye(count, 4, dtype=np.float32) for kind, count in (("a", 3), ("b", 4), ("c", 2))}
    edges = {
        "ab": ("a", "b", np.array([[0, 0], [0, 1], [1, 2]])),
        "bc": ("b", "c", np.array([[0, 0], [0, 1], [1, 1]])),
    }
    return HeteroGraph(features, edges)


def test_all_instances_are_found(graph):
    found = {tuple(map(int, row)) for row in enumerate_ontology(graph, STAR)}
    first = {(0, b, other, c) for b, c in ((0, 0), (0, 1), (1, 1)) for other in (0, 1)}
    # Node 2 of b has no c, node 2 of a has no b: the missing nodes are 2 of c and 4 of b.
    assert found == first | {(1, 2, 2, 2), (2, 4, 4, 2)}


def test_a_cap_makes_walks(graph):
    found = enumerate_ontology(graph, STAR, cap=5, seed=1)
    counts = np.bincount(found[:, 0])
    assert counts.tolist() == [5, 1, 1]
    every = {tuple(map(int, row)) for row in enumerate_ontology(graph, STAR)}
    assert {tuple(map(int, row)) for row in found} <= every
    with pytest.raises(ValueError, match="cap must be at least 1, got 0"):
        enumerate_ontology(graph, STAR, cap=0)


def test_relations_have_a_number_a_direction():
    expected = [[0, 1, 3, -1], [2, 0, -1, 5], [4, -1, 0, -1], [-1, 6, -1, 0]]
    np.testing.assert_array_equal(STAR.relation(), expected)


def test_missing_nodes_have_their_own_features(graph):
    wide = graph.with_missing()
    assert [x.shape for x in wide] == [(4, 5), (5, 5), (3, 5)]
    assert all(x[-1].tolist() == [0, 0, 0, 0, 1] and not x[:-1, -1].any() for x in wide)


def test_replacements_are_the_most_alike_that_may_be():
    features = np.array([[1, 0], [1, 0.1], [1, 1], [0, 1]], np.float32)
    sub = np.array([[7, 0], [7, 0], [7, 0]])
    pool = np.array([[3, 2, 1], [3, 2, 1], [0, 0, 0]])
    forbidden = np.array([[0, 0, 0], [0, 0, 1], [0, 0, 0]], bool)
    assert hard_replace(sub, 1, pool, features, forbidden)[:, 1].tolist() == [1, 2, 0]
    assert easy_replace(sub, 1, pool, forbidden)[:, 1].tolist() == [3, 3, 0]


@pytest.mark.parametrize("hard", [True, False])
def test_perturbed_instances_are_false_ones(hard):
    graph, _ = xor_graph(40, 20)
    schema = Schema(("target", "left", "right"), ((0, 1, "left"), (0, 2, "right")))
    sub = enumerate_ontology(graph, schema, 6)
    found = Perturbation(graph, schema)(sub, np.random.default_rng(0), hard)
    np.testing.assert_array_equal(found.changed, found.sub != sub)
    assert found.changed.any(1).mean() > 0.9 and not found.changed.all(1).any()
    linked = {kind: {tuple(pair) for pair in graph.edges[kind][2].tolist()} for kind in ("left", "right")}
    for row, changed in zip(found.sub.tolist(), found.changed, strict=True):
        for slot, kind in ((1, "left"), (2, "right")):
            if changed[0] != changed[slot]:  # one end replaced, the other kept
                assert (row[0], row[slot]) not in linked[kind]


def test_one_type_alone_tells_nothing_of_the_planted_classes():
    graph, labels = xor_graph(2000, 60)
    for kind in ("left", "right"):
        pairs = graph.edges[kind][2]
        block = pairs[::3, 1] % 2
        assert abs(labels[block == 0].mean() - labels[block == 1].mean()) < 0.1


def test_films_are_read(tmp_path):
    pair = np.array([[0, 0]], np.int32)
    names = ("film_cast_person", "film_director_person", "film_genre", "film_country", "film_location",
             "person_occupation", "person_citizenship")  # fmt: skip
    ids = {f"id_{kind}": np.array(["Q1", "Q2"]) for kind in
           ("film", "person", "genre", "country", "location", "occupation")}  # fmt: skip
    np.savez(tmp_path / "codex_film.npz", **ids, **{f"edge_{name}": pair for name in names})
    graph, labels, labelled = codex_film(tmp_path / "codex_film.npz", genres=1)
    assert labels.tolist() == [[True], [False]] and labelled.tolist() == [0]
    assert graph.features["film"].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert not any("genre" in name for name in graph.edges)
    with pytest.raises(FileNotFoundError, match="no file"):
        codex_film(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Schema(("a", "b"), ()), r"slots \[1\] hang on no link"),
        (lambda: Schema(("a", "b"), ((1, 0, "ab"),)), "does not grow a tree"),
        (lambda: HeteroGraph({"a": np.ones((1, 1))}, {"e": ("a", "b", np.zeros((1, 2), int))}), "joins 'b', no type"),
        (lambda: HeteroGraph({"a": np.ones((1, 1))}, {"e": ("a", "a", np.ones((1, 2), int))}), "'a' does not have"),
    ],
)
def test_wrong_graphs_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()

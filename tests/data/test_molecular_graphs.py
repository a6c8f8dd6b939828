import math

import numpy as np
import pytest

from zoo.data import molecular_graphs as graphs
from zoo.data.molecules import canonical

SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "CNS(=O)(=O)c1ccc(F)cc1", "C#CCN"]


@pytest.fixture(scope="module")
def codec():
    return graphs.MoleculeCodec.of(SMILES, 14)


def test_classes_come_from_the_data(codec):
    assert codec.atomic_numbers == (0, 6, 7, 8, 9, 16)
    assert len(codec.bond_types) == 5 and (codec.node_types, codec.edge_types) == (6, 5)
    assert graphs.MoleculeCodec.of(["C#C", "C" * 20], 14).edge_types == 2


@pytest.mark.parametrize("strict", [True, False])
def test_molecules_come_back(codec, strict):
    encoded, kept = codec.encode_all(SMILES)
    assert kept == SMILES and encoded.atoms.shape == (3, 14) and not encoded.atoms[2, 4:].any()
    nodes, edges = codec.one_hot(encoded)
    assert [canonical(text) for text in codec.decode(nodes, edges, strict)] == [canonical(text) for text in SMILES]


def test_what_has_no_graph_is_left_out(codec):
    assert all(codec.encode(text) is None for text in ("C" * 15, "CBr", "CC.C", "C(", ""))
    with pytest.raises(ValueError, match="no molecule has a graph of at most 14 vertices"):
        codec.encode_all(["CBr"])


def test_decoding_reads_the_lower_triangle_and_the_longest_fragment(codec):
    nodes, edges = codec.one_hot(codec.encode_all(["CCCO"])[0])
    edges[0, 0, 3] = [0, 0, 9, 0, 0]  # an upper entry
    assert codec.decode(nodes, edges) == ["CCCO"]
    edges[0, 2, 1] = [9, 0, 0, 0, 0]  # cut in two equal parts, and one more atom by a padding vertex
    edges[0, 5, 3] = [0, 9, 0, 0, 0]
    assert [canonical(text) for text in codec.decode(nodes, edges)] == [canonical("COC")]
    edges[0, 1, 0] = [0, 0, 0, 9, 0]
    edges[0, 4, 1] = edges[0, 5, 1] = [0, 0, 9, 0, 0]
    assert codec.decode(nodes, edges, strict=True) == [None]  # seven bonds at a carbon
    with pytest.raises(ValueError, match=r"expected nodes \(1, 14, 6\)"):
        codec.decode(nodes[..., :3], edges)


def test_features_follow_the_classes():
    codec = graphs.MoleculeCodec.of(SMILES, 14, features=True)
    nodes, _ = codec.one_hot(codec.encode_all(SMILES)[0])
    assert nodes.shape == (3, 14, 60) and codec.node_types == 60
    assert nodes[0, 0, 6:11].tolist() == [0, 1, 0, 0, 0]  # a methyl group's degree
    assert not nodes[2, 4:, 6:].any()
    edges = codec.one_hot(codec.encode_all(SMILES)[0])[1]
    assert canonical(codec.decode(nodes, edges)[1]) == canonical(SMILES[1])


def test_edits_are_counted_and_matched(codec):
    encoded, _ = codec.encode_all(SMILES)
    assert graphs.edits(encoded, encoded) == graphs.Edits(1.0, 0.0, 0.0)
    many = graphs.Graph(*(np.repeat(array[:1], 200, 0) for array in encoded))
    changed = graphs.random_edits(many, codec, graphs.Edits(0.0, 3.0, 5.0), np.random.default_rng(0))
    found = graphs.edits(many, changed)
    assert found.atoms == pytest.approx(3, abs=0.4) and found.bonds == pytest.approx(5, abs=0.6)
    np.testing.assert_array_equal(changed.bonds, changed.bonds.swapaxes(1, 2))


def test_metrics():
    found = graphs.molecule_metrics([SMILES[1], SMILES[1], "CCO", "C(", None], SMILES, [SMILES[1]], ["CCO"])
    assert found.validity == 0.6 and found.uniqueness == pytest.approx(2 / 3)
    assert (found.novelty, found.novelty_test, found.novelty_target) == (0.5, 0.5, 0.5)
    assert found.motif == pytest.approx(2 / 3) and 0.6 < found.target_similarity < 1
    assert found.lipinski == found.veber == found.pains == 1 and 1 <= found.sa <= 10
    assert found.fragments > 0 and found.scaffolds > 0
    none = graphs.molecule_metrics([None, "C("], SMILES, SMILES)
    assert none.validity == 0 and math.isnan(none.qed)


def test_inhibitors_are_read(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("smiles,pic50_akt1\nCCO,5.9\nCCN,6.0\n")
    assert graphs.read_inhibitors(path) == ["CCN"]
    path.write_text("smiles\nCCO\n")
    with pytest.raises(ValueError, match="has no column pic50_akt1"):
        graphs.read_inhibitors(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        graphs.read_inhibitors(tmp_path / "nowhere")

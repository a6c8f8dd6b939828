import numpy as np
import pytest

from zoo.data import molecules

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"


@pytest.mark.parametrize(
    "smiles, tokens",
    [
        ("[NH3+][C@@H](Cl)Br", ["[NH3+]", "[C@@H]", "(", "Cl", ")", "Br"]),
        ("C%10CC%10", ["C", "%10", "C", "C", "%10"]),
        ("F/C=C/F", ["F", "/", "C", "=", "C", "/", "F"]),
    ],
)
def test_tokens(smiles, tokens):
    assert molecules.tokenize(smiles) == tokens


def test_what_is_no_token_is_refused():
    with pytest.raises(ValueError, match="no SMILES token"):
        molecules.tokenize("C!C")


def test_sequences_are_padded_on_the_left():
    language = molecules.SmilesLanguage.of([ASPIRIN, "CCl"], 24)
    row = language.encode("CCl")
    assert row.tolist()[:20] == [0] * 20 and row[20] == language.START and row[-1] == language.STOP
    assert language.decode(row) == "CCl"
    with pytest.raises(ValueError, match="more than 3"):
        molecules.SmilesLanguage.of([ASPIRIN], 5).encode(ASPIRIN)


def test_random_writings_are_the_same_molecule():
    rng = np.random.default_rng(0)
    written = {molecules.random_smiles(ASPIRIN, rng) for _ in range(10)}
    assert len(written) > 3
    assert {molecules.canonical(text) for text in written} == {molecules.canonical(ASPIRIN)}


def test_atoms_are_numbered_as_rdkit_does():
    text = "Clc1[nH]c(Br)cc1"
    tokens = molecules.tokenize(text)
    symbols = [atom.GetSymbol() for atom in molecules.molecule(text).GetAtoms()]
    assert [tokens[place].strip("[]")[: len(s)].capitalize() for place, s in
            zip(molecules.atom_positions(tokens), symbols, strict=True)] == symbols  # fmt: skip


def test_metrics_of_a_generated_set():
    found = molecules.generation_metrics(["CCO", "OCC", "c1ccccc1", "C(", ""], ["CCO"])
    assert found.validity == 3 / 5 and found.uniqueness == 2 / 3 and found.novelty == 1 / 2
    assert 0 < found.diversity <= 1


def test_tanimoto_of_a_set_with_itself():
    bits = molecules.morgan_fingerprints([ASPIRIN, "CCO"])
    similarity = molecules.tanimoto(bits, bits)
    np.testing.assert_allclose(np.diag(similarity), 1)
    assert similarity[0, 1] == similarity[1, 0] < 1


def test_drawings_need_a_weight_an_atom():
    assert molecules.draw("CCO", [0, 0.5, 1]).shape == (240, 320, 3)
    with pytest.raises(ValueError, match="has 3 atoms, got 2"):
        molecules.draw("CCO", [0, 1])
    with pytest.raises(ValueError, match="not the SMILES"):
        molecules.draw("C(")

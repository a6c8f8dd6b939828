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


def test_characters_are_numbered_by_frequency():
    language = molecules.CharacterLanguage(["CCO", "CN"])
    assert language.characters == "CON" and len(language) == 4
    assert language.encode("CNO", 5).tolist() == [1, 3, 2, 0, 0]
    assert language.decode([1, 0, 3, 0]) == "CN"


def test_marked_sequences_end_at_the_first_end():
    language = molecules.CharacterLanguage(["CCO", "CN"], ends=True)
    assert language.characters == "C@$ON"
    row = language.encode("CN", 6)
    assert row.tolist() == [2, 1, 5, 3, 0, 0] and language.decode(row) == "CN"
    assert language.decode([2, 1, 3, 1, 1]) == "C"


def test_sequences_that_do_not_fit_are_refused():
    language = molecules.CharacterLanguage(["CCO"], ends=True)
    with pytest.raises(ValueError, match="does not fit a length of 4"):
        language.encode("CCO", 4)
    with pytest.raises(ValueError, match="other characters"):
        language.encode("CN", 9)
    with pytest.raises(ValueError, match="mark the ends"):
        molecules.CharacterLanguage(["C[C@H](N)O"], ends=True)


def test_stereochemistry_is_taken_off():
    assert molecules.flat("C[C@H](N)O") == molecules.flat("C[C@@H](O)N") == "CC(N)O"
    assert molecules.flat("C(") is None


def test_descriptors_go_by_name():
    assert molecules.descriptor("MolWt", "C") == pytest.approx(16.04, abs=0.01)
    with pytest.raises(ValueError, match="no descriptor"):
        molecules.descriptor("Charm", "C")

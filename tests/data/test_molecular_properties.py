import numpy as np
import pytest

from zoo.data import molecular_properties
from zoo.data.molecular_properties import Scaler


def test_made_molecules_are_different_and_their_properties_are_those_of_rdkit():
    table = molecular_properties.computed_properties()
    assert len(set(table.smiles)) == len(table.smiles) > 300 and table.values.shape == (len(table.smiles), 7)
    column = table.properties.index(molecular_properties.REFRACTIVITY)
    assert table.values[3, column] == pytest.approx(molecular_properties.refractivity(table.smiles[3]))
    part = table.part(np.array([5, 1]))
    assert part.smiles == [table.smiles[5], table.smiles[1]] and (part.values[1] == table.values[1]).all()


def test_larger_greasier_molecules_dissolve_worse():
    table = molecular_properties.computed_solubility()
    found = dict(zip(table.smiles, table.values[:, 0], strict=True))
    assert found["CC"] < found["CO"]


def test_tables_are_read_flat_and_once(tmp_path):
    header = ",".join(("smiles", *molecular_properties.XTB))
    rows = [f"{smiles},{','.join([str(number)] * 7)}" for number, smiles in enumerate(["C/C=C/C", "C/C=C\\C", "OCC"])]
    (tmp_path / "xtb_small.csv").write_text("\n".join([header, *rows]))
    table = molecular_properties.read_xtb(tmp_path)
    assert table.smiles == ["CC=CC", "CCO"] and table.values[:, 0].tolist() == [0, 2]
    with pytest.raises(FileNotFoundError, match=r"esol\.csv"):
        molecular_properties.read_solubility(tmp_path)
    (tmp_path / "esol.csv").write_text("smiles,log_solubility\nC(,1")
    with pytest.raises(ValueError, match="no molecule"):
        molecular_properties.read_solubility(tmp_path)


def test_scaling_goes_there_and_back():
    values = np.array([[0.0, 10.0], [2.0, 30.0], [1.0, 20.0]])
    scaler = Scaler.of(values)
    np.testing.assert_array_equal(scaler.scale(values), [[-1, -1], [1, 1], [0, 0]])
    np.testing.assert_array_equal(scaler.unscale(scaler.scale(values)), values)
    with pytest.raises(ValueError, match="one value only"):
        Scaler.of(np.ones((3, 1)))

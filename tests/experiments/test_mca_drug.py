import dataclasses
import json

import numpy as np
import pytest

from experiments import mca_drug
from zoo.data.drug_sensitivity import Pairs, read_gdsc, simulated_screen, split


def test_smoke(tmp_path):
    config = dataclasses.replace(mca_drug.PRESETS["smoke"], models=("mca",))
    result = mca_drug.run(config, tmp_path / "run")
    assert [claim.verdict for claim in result.claims] == ["not tested"] * 3
    assert (tmp_path / "run/figures/atoms.png").exists() and (tmp_path / "run/figures/errors.png").exists()
    assert json.loads((tmp_path / "run/result.json").read_text())["paper"] == "mca_drug"


@pytest.mark.slow
def test_smoke_of_all_baselines(tmp_path):
    result = mca_drug.run(mca_drug.PRESETS["smoke"], tmp_path / "run")
    assert "RMSE, rnn" in result.claims[0].baselines


@pytest.mark.parametrize("kind", ["lenient", "cells", "compounds"])
def test_splits_hold_out_what_they_say(kind):
    screen = simulated_screen(cells=12, genes=5)
    training, test = split(screen, kind, 0.25, 0)
    assert len(training.cell) + len(test.cell) == np.isfinite(screen.ln_ic50).sum()
    shared = {name: set(getattr(training, name)) & set(getattr(test, name)) for name in ("cell", "compound")}
    assert bool(shared["cell"]) == (kind != "cells") and bool(shared["compound"]) == (kind != "compounds")


def test_additive_baselines_are_exact_where_the_table_is_additive():
    compound, cell = np.divmod(np.arange(12), 4)
    pairs = Pairs(compound, cell, 1.0 + compound + 0.1 * cell)
    np.testing.assert_allclose(mca_drug.additive(pairs, pairs, 3, 4)["compound + cell mean"], pairs.ln_ic50)


def test_wrong_flags_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="models must name mca"):
        dataclasses.replace(mca_drug.PRESETS["smoke"], models=("dnn",))
    with pytest.raises(FileNotFoundError, match="gdsc_methylation"):
        read_gdsc(tmp_path)
    with pytest.raises(ValueError, match="tokens long"):
        mca_drug.load(dataclasses.replace(mca_drug.PRESETS["smoke"], length=5))

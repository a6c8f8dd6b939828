"""The experiments on attention heads: retrieval and calibration, with a tiny network."""

import json

import numpy as np
import pytest

from experiments import act, circuit_reuse, retrieval_head
from zoo import reports


def test_retrieval_leaves_its_record(tmp_path):
    retrieval_head.run(retrieval_head.PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and [claim.verdict for claim in result.claims] == ["not tested"] * 3
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"scores", "needles", "masking"}
    assert (tmp_path / "head_scores.json").exists()


def test_calibration_leaves_its_record(tmp_path):
    act.run(act.PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and [claim.verdict for claim in result.claims] == ["not tested"] * 3
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"sinks", "heads", "accuracy"}
    assert np.load(tmp_path / "head_search.npz")["margin_gain"].shape == (2, 2)


def test_files_are_read_and_balanced(tmp_path):
    (tmp_path / "trec.txt").write_text("DESC:manner How ?\nNUM:count How many ?\nDESC:def What ?\nDESC:def Why ?\n")
    examples = act.read_examples(tmp_path / "trec.txt", "trec")
    assert examples[1] == ("NUM", "How many ?")
    assert sorted(label for label, _ in act.balanced(examples, 2, 0)) == ["DESC", "NUM"]
    (tmp_path / "bad.txt").write_text("0 fine\n7 what\n")
    with pytest.raises(ValueError, match=r"bad\.txt, line 2: expected a label"):
        act.read_examples(tmp_path / "bad.txt", "sst2")
    with pytest.raises(FileNotFoundError, match=r"no sst2_dev\.txt"):
        act.run(act.Config(data_dir=tmp_path), tmp_path / "run")


def test_a_bias_to_a_label_is_taken_off():
    logits = np.array([[3.0, 1.0], [3.0, 2.0], [3.0, 0.0], [3.0, 2.5]])
    assert act.accuracies(logits, np.array([0, 1, 0, 1])) == (0.5, 1.0)


def test_wrong_configs_say_so():
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]"):
        act.Config(beta=2.0)
    with pytest.raises(ValueError, match=r"needles must be in 1 \.\. 6"):
        retrieval_head.Config(needles=7)
    with pytest.raises(ValueError, match=r"depths must be in 0 \.\. 100"):
        retrieval_head.Config(depths=(120,))


@pytest.mark.slow
def test_circuits_leave_their_record(tmp_path):
    circuit_reuse.run(circuit_reuse.PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and [claim.verdict for claim in result.claims] == ["not tested"] * 6
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"effects", "circuits", "repair"}
    assert np.load(tmp_path / "effects.npz")["ioi"].shape == (2, 4)
    graphs = json.loads((tmp_path / "circuits.json").read_text())
    assert {edge["component"] for edge in graphs["IOI"]["edges"]} == {"residual", "q", "v"}


def test_circuits_say_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no ioi/ioi_500\.json"):
        circuit_reuse.run(circuit_reuse.Config(data_dir=tmp_path, tiny=True), tmp_path / "run")
    with pytest.raises(ValueError, match="so at most as many"):
        circuit_reuse.Config(patched=200)

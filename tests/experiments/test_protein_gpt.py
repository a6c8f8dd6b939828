import dataclasses

import pytest

from experiments import protein_gpt
from zoo import reports
from zoo.data.proteins import read_proteins, simulated_proteins


@pytest.mark.slow
def test_a_run_leaves_its_record(tmp_path):
    protein_gpt.run(protein_gpt.PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert [claim.verdict for claim in result.claims] == ["not tested"] * 3 + ["reproduced"]
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"graphs", "inverse"}


def test_causality_through_the_graph(tmp_path):
    config = dataclasses.replace(protein_gpt.PRESETS["smoke"], claims=("causality",))
    assert [claim.verdict for claim in protein_gpt.run(config, tmp_path).claims] == ["reproduced"]


def test_labels_are_the_answer():
    batch = protein_gpt.rows(["Task<AB> [C]", "Sequence<AB> []"], 20, "Sequence")
    assert batch["weights"][0].tolist() == [0.0] * 8 + [1.0] * 4 + [0.0] * 8
    assert batch["weights"][1].sum() == len("Sequence<AB> []")


def test_baselines_learn_simulated_chains():
    data = simulated_proteins(80)
    assert protein_gpt.window_logistic(data.training, data.test) > 0.5
    told = protein_gpt.ridge(data.training)(["AELMQKRHAELMQKRH", "VIYFWTLCVIYFWTLC"])
    assert told[0, 0] > told[1, 0] and told[0, 1] < told[1, 1]


def test_wrong_flags_and_missing_files_say_so(tmp_path):
    with pytest.raises(ValueError, match="graph_layers must be at least 1"):
        dataclasses.replace(protein_gpt.PRESETS["smoke"], graph_layers=0)
    with pytest.raises(ValueError, match="chains are at most 5"):
        protein_gpt.load(dataclasses.replace(protein_gpt.PRESETS["smoke"], longest=5))
    with pytest.raises(FileNotFoundError, match=r"no secondary_structure\.csv\.gz"):
        read_proteins(tmp_path)

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import zoo
from tests.goldens.golden import load_case
from zoo import cli


def output(capsys, line):
    cli.main(line.split())
    return capsys.readouterr().out


def test_list_names_models_and_their_parameters(capsys):
    text = output(capsys, "list informer_etth1_m2*")
    assert "informer_etth1_m24" in text and "11,330,055" in text and "informer_hf" not in text


def test_show_tells_paper_config_inputs_and_parameters(capsys):
    text = output(capsys, "show informer_etth1_m24")
    assert (
        "arXiv 2012.07436" in text
        and "d_model=512" in text
        and "(1, 48, 7)" in text
        and "11,330,055 parameters" in text
    )


def test_converted_weights_are_those_of_the_checkpoint(capsys, tmp_path):
    case = load_case("tests/goldens/informer/m24_prob.safetensors")
    save_file(case.state_dict(), tmp_path / "published.safetensors")
    output(capsys, f"convert informer_etth1_m24 {tmp_path}/published.safetensors --to {tmp_path}/ours.safetensors")
    expected = zoo.load_weights("informer_etth1_m24", case.state_dict())
    jax.tree.map(
        np.testing.assert_array_equal, zoo.load_weights("informer_etth1_m24", tmp_path / "ours.safetensors"), expected
    )


def test_run_is_the_experiment(tmp_path):
    """The smallest claim of the smoke preset, through both front doors' common path."""
    cli.main(["run", "informer", "--preset", "smoke", "--claims", "accuracy", "--workdir", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["paper"] == "informer" and result["preset"] == "own"
    with pytest.raises(SystemExit, match="error: "):  # a finished run is not overwritten
        cli.main(["run", "informer", "--preset", "smoke", "--claims", "accuracy", "--workdir", str(tmp_path / "run")])


def test_compile_reports_memory_cost_and_kernels(capsys):
    text = output(capsys, "compile informer_etth1_m24 --target h100 --batch-size 2")
    assert "11,330,055" in text and "of 79.097 GiB" in text and "prob_sparse_measure x3" in text


@pytest.mark.slow
def test_a_sharded_training_step_fits_a_slice(capsys):
    text = output(capsys, "compile informer_hf --target tpu-v5e --mesh 2x2 --train --batch-size 4")
    assert "tpu-v5e, 4 device(s)" in text

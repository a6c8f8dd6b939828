import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.goldens.runner import find_cases, run_case

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


SLOW = {
    # A real model; the same analyses of small ones are quick cases.
    "act/smollm2_act",
    "circuit_reuse/path_patching",
    "circuit_reuse/path_patching_position",
    "circuit_reuse/smollm2_ioi",
    "retrieval_head/smollm2_needle",
    # Whole networks and their training steps, which take long to compile; their parts are quick cases.
    "des_design/forward_unet_full",
    "des_design/inverse_unet_full",
    "des_design/small_sampling",
    "efficientformer/l1_train_step",
    "efficientformer/l3_224",
    "emov2/emov2_1m_train_step_64",
    "fcaformer/l1_224",
    "fcaformer/l1_train_step_128",
    "fcaformer/l2_dense_240x256",
    "mobilevig/mask_rcnn_mobilevig_m",
    "mobilevig/ti_train_step_128",
    "sentence_attention/b0_train_step_64",
}


def cases():
    for path in find_cases(HERE):
        name = f"{path.parent.name}/{path.stem}"
        yield pytest.param(path, id=name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("path", cases())
def test_our_model_computes_what_the_published_code_does(path):
    outcome = run_case(path)
    assert outcome.passed, str(outcome)


def test_kept_cases_are_small():
    assert sum(path.stat().st_size for path in find_cases(HERE)) < 15e6


def run_module(*arguments):
    command = [sys.executable, "-m", "tests.goldens", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_command_counts_and_exits(tmp_path):
    """A passing case, a broken file, and a slug without an adapter, which only --strict counts."""
    for slug in ("informer", "unheard_of"):
        (tmp_path / slug).mkdir()
        shutil.copy(HERE / "informer/probsparse_self.safetensors", tmp_path / slug / "renamed.safetensors")
    (tmp_path / "informer/broken.safetensors").write_bytes(b"not a case")
    out = run_module(tmp_path)
    lines = out.stdout.splitlines()
    assert lines[-1] == "1 passed, 1 failed" and out.returncode == 1
    assert "informer/renamed" in lines[1] and lines[1].endswith("ok")
    assert "informer/broken inf" in lines[0] and "FAIL" in lines[0]
    assert lines[2] == "unheard_of/renamed - - no adapter"
    assert run_module(tmp_path, "--slug", "unheard_of").returncode == 0
    strict = run_module(tmp_path, "--slug", "unheard_of", "--strict")
    assert strict.stdout.splitlines()[-1] == "0 passed, 1 failed" and strict.returncode == 1


def test_missing_folder_is_an_error(tmp_path):
    out = run_module(tmp_path / "nowhere")
    assert out.returncode == 2 and "no folder" in out.stderr

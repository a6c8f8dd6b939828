import dataclasses

import numpy as np
import pytest

from experiments import titans
from experiments.mixer_lab import count_parameters
from zoo import reports
from zoo.data.recall import IGNORED, text_needles

SMOKE = titans.PRESETS["smoke"]


@pytest.mark.slow
def test_a_run_leaves_its_record(tmp_path):
    titans.run(SMOKE, tmp_path / "smoke")
    result = reports.load_result(tmp_path / "smoke/result.json")
    assert (result.paper, result.preset) == ("titans", "smoke")
    dual, recall, hybrids = result.claims
    assert dual.measured["largest error, in standard deviations"] < 1e-4
    assert recall.verdict == "not tested" and len(recall.measured) == 4
    assert "order" in hybrids.measured and len(hybrids.measured) == 6
    assert {path.stem for path in (tmp_path / "smoke/figures").glob("*.png")} == {"recall", "hybrids"}


def test_one_claim_runs_alone(tmp_path):
    needles = dataclasses.replace(SMOKE.needles, models=("linear memory",), multiples=(1,))
    config = dataclasses.replace(SMOKE, claims=("recall", "dual"), needles=needles)
    result = titans.run(config, tmp_path / "run")
    assert [claim.verdict for claim in result.claims][1] == "not tested"
    with pytest.raises(FileExistsError, match="holds a run"):
        titans.run(config, tmp_path / "run")


def test_networks_have_one_number_of_parameters():
    training = titans.PRESETS["cpu"].hybrids
    count = count_parameters(titans.network("mac", training))
    for kind in titans.KINDS:
        assert abs(count_parameters(titans.with_parameters(kind, training, count)) / count - 1) < 0.01, kind


def test_needles_are_in_the_text():
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog " * 9, np.uint8)
    task = text_needles(0, 20, 96, text, facts=2, gap=20)
    for tokens, labels in zip(task.tokens, task.labels, strict=True):
        row = bytes(tokens.astype(np.uint8))
        question, answer = row[-10:-4], row[-4:]
        assert question.startswith(b"? ") and row.index(question[2:] + answer) + 9 + 20 <= 86
        asked = np.flatnonzero(labels != IGNORED)
        np.testing.assert_array_equal(labels[asked], tokens[asked + 1])
        assert bytes(labels[asked].astype(np.uint8)) == answer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 40}, "length must be at least 10"),
        ({"facts": 0}, "0 facts"),
        ({"text": np.zeros(96, np.uint8)}, "the text must be longer than a row of 96 bytes, got 96"),
    ],
)
def test_wrong_needles_say_so(arguments, message):
    defaults = {"seed": 0, "examples": 1, "length": 96, "text": np.zeros(200, np.uint8), "facts": 2}
    with pytest.raises(ValueError, match=message):
        text_needles(**(defaults | arguments))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recall": dataclasses.replace(SMOKE.recall, seeds=())}, "at least one seed"),
        ({"needles": dataclasses.replace(SMOKE.needles, models=("ful",))}, "models must be of .*got 'ful'"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **options)

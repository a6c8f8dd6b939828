import numpy as np
import pytest

from experiments import pavlovian
from zoo import reports

SMOKE = pavlovian.PRESETS["smoke"]


def test_a_run_leaves_its_record(tmp_path):
    pavlovian.run(SMOKE, tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and len(result.claims) == 4
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {"capacity", "conditioning", "recall"}
    measured = result.claims[1].measured
    assert len(measured["trained, delta, blocking (index)"]) == 1
    assert any("injected, softmax" in name for name in result.claims[3].measured)


def test_streams_ask_only_what_was_seen():
    config = pavlovian.Streams()
    batch = pavlovian.streams(np.random.default_rng(0), 8, config)
    tokens, labels = (batch[name].reshape(8, config.trials, 3) for name in ("tokens", "labels"))
    assert (labels[:, :, ::2] == pavlovian.IGNORED).all() and tokens.max() < config.vocab_size
    asked = labels[:, :, 1] != pavlovian.IGNORED
    assert 0.2 < asked.mean() < 0.9
    for row, trial in zip(*np.nonzero(asked), strict=True):
        shown = set(tokens[row, trial, :2])
        before = [set(tokens[row, earlier, :2]) == shown for earlier in range(trial)]
        latest = np.flatnonzero(before)[-1]
        assert labels[row, trial, 1] == tokens[row, latest, 2] == tokens[row, trial, 2]


def test_tests_in_context_end_with_their_question():
    config = pavlovian.Streams()
    tokens, outcome = pavlovian.test_stream(
        np.random.default_rng(0), [("A", True), ("AB", True)], "B", trials=2, config=config
    )
    trials = tokens[:-2].reshape(-1, 3)
    assert len(trials) == 8 and (trials[::2, 2] == outcome).all()
    a, b = trials[0, 0], tokens[-2]
    assert set(trials[4, :2]) == {a, b} and tokens[-1] == config.blank


def testcrossings_are_interpolated():
    assert pavlovian.crossing((2, 4, 8), np.array([0.0, 0.2, 0.6]), 0.4) == pytest.approx(6)
    assert pavlovian.crossing((2, 4), np.array([0.0, 0.2]), 0.4) == 4
    assert pavlovian.crossing((2, 4), np.array([0.5, 0.6]), 0.4) == 2


def test_wrong_configs_say_so():
    with pytest.raises(ValueError, match="rules must be of"):
        pavlovian.Config(conditioning=pavlovian.Training(rules=("hebbian",)))
    with pytest.raises(ValueError, match="at least two steps"):
        pavlovian.Config(recall=pavlovian.Training(rules=("hebb",), steps=1))

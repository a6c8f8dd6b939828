"""The experiment on sparse fine-tuning, with a tiny network in place of the checkpoint."""

import dataclasses

import numpy as np
import pytest

from experiments import spt
from zoo import reports


@pytest.mark.slow
def test_a_run_leaves_its_record(tmp_path):
    spt.run(spt.PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and [claim.verdict for claim in result.claims] == ["not tested"] * 5
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "selection", "cost", "tuning", "plans", "steps",
    }  # fmt: skip


def test_a_finished_run_is_not_measured_again(tmp_path):
    config = spt.PRESETS["smoke"]
    claim = reports.Claim("a statement", "not tested", {})
    spt.train.open_run(tmp_path, config)
    reports.Result("spt", "smoke", "text", (claim,) * 5).save(tmp_path / "result.json")
    assert spt.run(config, tmp_path, resume=True).claims == (claim,) * 5
    assert not list((tmp_path / "figures").iterdir())


def test_codewords_are_medians_of_what_is_nearest_to_them():
    rng = np.random.default_rng(0)
    centres = np.array([[[-8.0, 0.0], [8.0, 1.0]], [[0.0, 9.0], [1.0, -9.0]]])  # (subspaces, codewords, 2)
    vectors = np.concatenate([centres[i, rng.integers(2, size=200)] + rng.normal(size=(200, 2)) for i in range(2)], 1)
    found = spt.fit_codebook(vectors, 2, 2, 10, seed=1)
    assert found.shape == (2, 2, 2) and found.dtype == np.float32
    for part, words in zip((vectors[:, :2], vectors[:, 2:]), found, strict=True):
        nearest = np.abs(part[:, None] - words).sum(-1).argmin(1)
        for word in range(2):
            np.testing.assert_allclose(words[word], np.median(part[nearest == word], axis=0), rtol=1e-5)

    def error(iterations: int) -> float:
        words = spt.fit_codebook(vectors, 2, 2, iterations, seed=1)
        return sum(
            np.abs(vectors[:, None, 2 * i : 2 * i + 2] - words[i]).sum(-1).min(1).sum() for i in range(2)
        )  # fmt: skip

    assert error(10) <= error(1) <= error(0)


def test_wrong_configs_say_so(tmp_path):
    with pytest.raises(ValueError, match="must be at least 16, iterations positive"):
        spt.Config(tokens=8)
    with pytest.raises(ValueError, match="at least one seed"):
        dataclasses.replace(spt.PRESETS["smoke"], seeds=())
    with pytest.raises(FileNotFoundError, match=r"no dracula\.txt"):
        spt.run(spt.Config(data_dir=tmp_path), tmp_path / "run")

"""The experiment on pooling, with a tiny network and stand-ins for the data."""

import dataclasses

import numpy as np
import pytest

from experiments import pooling_attention
from experiments.pooling_attention import PRESETS, Config, Heads, Pairs
from zoo import reports
from zoo.data.sentence_pairs import ScoredPair


def test_layers_leave_their_record(tmp_path):
    config = dataclasses.replace(PRESETS["smoke"], claims=("layers",))
    pooling_attention.run(config, tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert [claim.verdict for claim in result.claims] == ["not tested"]
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"layers", "correlation"}
    record = tmp_path / "metrics" / "claim_layers.json"
    changed = record.stat().st_mtime_ns
    assert pooling_attention.run(config, tmp_path, resume=True).claims == result.claims
    assert record.stat().st_mtime_ns == changed


@pytest.mark.slow
def test_all_claims_leave_their_record(tmp_path):
    pooling_attention.run(PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and [claim.verdict for claim in result.claims] == ["not tested"] * 4
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "layers", "correlation", "bidirectional", "trained", "designs",
    }  # fmt: skip
    assert len(list((tmp_path / "metrics").glob("design*_seed0_*.json"))) == 5


def test_triples_are_positive_pairs_and_another_sentence():
    pairs = Pairs.of([ScoredPair(f"a{i}", f"b{i}", 5.0 if i % 2 else 1.0) for i in range(20)])
    config = Heads(batch_size=4, steps=8)
    found = pooling_attention.triples(pairs, config, 0)
    assert found.shape == (8, 4, 3)
    positive = {(a, b) for a, b, score in zip(pairs.first, pairs.second, pairs.scores, strict=True) if score == 5}
    assert {tuple(pair) for pair in found[..., :2].reshape(-1, 2)} <= positive
    assert not np.any((found[..., 2] == found[..., 0]) | (found[..., 2] == found[..., 1]))
    assert len({tuple(pair) for pair in found[:2, :, :2].reshape(-1, 2)}) == 8  # a pass has no pair twice
    with pytest.raises(ValueError, match="needs as many positive pairs"):
        pooling_attention.triples(pairs, Heads(batch_size=12), 0)


def test_wrong_configs_say_so(tmp_path):
    with pytest.raises(ValueError, match="a claim and a seed"):
        Config(seeds=())
    with pytest.raises(ValueError, match=r"other_seeds must be in 1 \.\. 3"):
        Config(other_seeds=4)
    with pytest.raises(ValueError, match="checkpoints must divide"):
        Config(pooling=Heads(steps=10))
    with pytest.raises(FileNotFoundError, match=r"no stsb/test\.csv"):
        pooling_attention.run(Config(data_dir=tmp_path), tmp_path / "run")

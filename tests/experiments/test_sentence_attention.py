import dataclasses

import numpy as np
import pytest

from experiments import sentence_attention
from zoo import reports
from zoo.backbones.efficientnet import EfficientNetConfig
from zoo.papers.sentence_attention import SentenceAttentionConfig

SMOKE = sentence_attention.PRESETS["smoke"]


@pytest.mark.slow  # a minute of compilation
def test_a_run_leaves_its_record(tmp_path):
    sentence_attention.run(SMOKE, tmp_path / "run")
    result = reports.load_result(tmp_path / "run/result.json")
    assert result.data == "digits" and result.claims[0].verdict == "not tested"
    assert (tmp_path / "run/figures/selection.png").exists()


@pytest.mark.slow
def test_every_claim_is_measured(tmp_path):
    claims = sentence_attention.run(dataclasses.replace(SMOKE, claims=("scales", "gate")), tmp_path / "run").claims
    assert [claim.verdict for claim in claims] == ["not tested"] * 2
    assert len(claims[0].baselines) == 3 and len(claims[1].baselines) == 3


def test_questions_are_drawn_in_training_and_all_asked_in_tests():
    known, held_out = sentence_attention.digits(SMOKE)
    assert known.vectors.shape == (10, 3, 384) and held_out.vectors.shape == (10, 2, 384)
    tests = list(sentence_attention.batches(held_out, 3, None))
    assert sum(len(batch["labels"]) for batch in tests) == 2 * len(held_out)
    batch = sentence_attention.batches(known, 4, 0)[0]
    assert batch["images"].dtype == np.float32 and batch["images"].max() > 1 and batch["labels"].max() == 1


def test_overlaps():
    weights = np.zeros((2, 2, 4))
    weights[0, :, :2], weights[1, 0, 1:3], weights[1, 1, 2:] = 1, 1, 1
    within, between = sentence_attention.overlaps([weights], most=2)
    assert within == pytest.approx((1 + 1 / 3) / 2) and between == pytest.approx((1 / 3 + 0) / 2)


def test_what_is_not_there_says_so(tmp_path):
    model = SentenceAttentionConfig(EfficientNetConfig(0.25, 0.1))
    with pytest.raises(ValueError, match="bccd is not part of the zoo: give --data-dir"):
        sentence_attention.run(dataclasses.replace(SMOKE, data="bccd"), tmp_path)
    with pytest.raises(ValueError, match=r"model\.image_size must be that of the canvas, 24"):
        dataclasses.replace(SMOKE, model=model)

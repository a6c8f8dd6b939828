import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import patchct
from tests.parameters import random_parameters
from zoo import reports
from zoo.papers.patchct import PatchCT

SMOKE = patchct.PRESETS["smoke"]


def test_a_run_leaves_its_record(tmp_path):
    patchct.run(SMOKE, tmp_path / "run")
    result = reports.load_result(tmp_path / "run/result.json")
    pointing, cost = result.claims
    assert pointing.verdict == "not tested" and cost.measured["streaming, ms"] > 0
    assert all((tmp_path / f"run/figures/{name}.png").exists() for name in ("navigators", "cost"))


@pytest.mark.slow
def test_every_claim_is_measured(tmp_path):
    claims = patchct.run(dataclasses.replace(SMOKE, claims=("transport", "directions")), tmp_path / "run").claims
    assert [claim.verdict for claim in claims] == ["not tested"] * 2
    assert {"without, mAP %", "cross-attention from labels, mAP %"} < set(claims[0].baselines)


def test_rollout_is_a_share_of_the_class_token():
    model, images, tokens = PatchCT(SMOKE.model), jnp.ones((2, 48, 48, 3)), patchct.prompts(10, SMOKE.model)
    variables = random_parameters(model, images, tokens)
    shares = patchct.attention_rollout(model, variables, images, tokens)
    # One layer: half of the class token stays, and what it attends to of itself.
    assert shares.shape == (2, 36) and (shares > 0).all() and (shares.sum(1) < 0.5).all()


def test_prompts_end_with_the_highest_token():
    tokens = patchct.prompts(10, SMOKE.model)
    np.testing.assert_array_equal(tokens.argmax(1), 2)
    assert len({tuple(row) for row in tokens.tolist()}) == 10
    with pytest.raises(ValueError, match="a vocabulary of 16 has no tokens for 15 labels"):
        patchct.prompts(15, SMOKE.model)


def test_what_is_not_there_says_so(tmp_path):
    with pytest.raises(ValueError, match="bccd is not part of the zoo: give --data-dir"):
        patchct.run(dataclasses.replace(SMOKE, data="bccd"), tmp_path)
    with pytest.raises(ValueError, match="pictures must fill a batch"):
        dataclasses.replace(SMOKE, pictures=4)

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import based
from tests.parameters import random_parameters
from zoo import mixers, reports
from zoo.data.recall import IGNORED
from zoo.papers.based import Based, BasedMQAR, MQARConfig
from zoo.train.recall import recall_loss

SMOKE = based.PRESETS["smoke"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "smoke"
    based.run(SMOKE, workdir)
    return workdir


def test_a_run_leaves_its_record(folder):
    result = reports.load_result(folder / "result.json")
    assert (result.paper, result.preset, result.data) == ("based", "smoke", "generated")
    recall, features, throughput = result.claims
    assert recall.measured["attention: bytes of state"] > 0 and recall.seeds == (1,)
    assert features.baselines["elu: bytes of state"] == features.measured["taylor: bytes of state"]
    assert len(throughput.measured["based: tokens a second"]) == 2
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {"recall", "throughput"}
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 32


def test_resuming_a_finished_run_trains_nothing(folder):
    before = reports.load_result(folder / "result.json")
    config = dataclasses.replace(SMOKE, claims=("recall",))
    with pytest.raises(FileExistsError, match="holds a run"):
        based.run(SMOKE, folder)
    with pytest.raises(ValueError, match="claims was"):
        based.run(config, folder, resume=True)
    assert based.run(SMOKE, folder, resume=True).claims[:2] == before.claims[:2]


def test_feature_maps_are_compared_at_one_size_of_state():
    config = dataclasses.replace(based.PRESETS["cpu"])
    laboratory = based.Laboratory(config, None, False)
    taylor = laboratory.state_bytes(based.TAYLOR)
    for name in based.FEATURE_MAPS:
        assert abs(laboratory.state_bytes(name) / taylor - 1) < 0.01, name


def test_batches_keep_segments_apart():
    segments = (based.Segment(16, 2, 10), based.Segment(32, 4, 9))
    found = based.segment_batches(segments, 64, 4, seed=1)
    assert [batch["tokens"].shape for batch in found] == [(4, 16), (4, 16), (4, 32), (4, 32)]
    for batch, pairs in zip(found, (2, 2, 4, 4), strict=True):
        assert batch["places"].shape == batch["answers"].shape == (4, 4)
        assert (batch["answers"] >= 0).sum() == 4 * pairs


def test_the_loss_of_answers_is_the_published_loss():
    batch = based.segment_batches((based.Segment(16, 3, 5), based.Segment(16, 4, 5)), 32, 5, seed=1)[0]
    labels = np.full((5, 16), IGNORED)
    row, column = np.nonzero(batch["answers"] >= 0)
    labels[row, batch["places"][row, column]] = batch["answers"][row, column]
    model = BasedMQAR(MQARConfig(vocab_size=32, d_model=8, mixers=("BaseConv",)))
    params = random_parameters(model, batch["tokens"])["params"]
    ours, (_, metrics) = based.loss_of_answers(model)(params, {}, batch, {}, True)
    whole, (_, expected) = recall_loss(model)(params, {}, {"tokens": batch["tokens"], "labels": labels}, {}, True)
    np.testing.assert_allclose([ours, metrics["accuracy"]], [whole, expected["accuracy"]], rtol=1e-5)


def test_a_filled_state_has_seen_its_tokens():
    model = Based(SMOKE.throughput.model)
    state = based.filled_state(model, 2, 8, 3)
    np.testing.assert_array_equal(state.length, [8, 8])
    assert mixers.state_bytes(model, 11) == sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"models": ("atention",)}, "models must be of .*'attention'.*got 'atention'"),
        ({"feature_maps": ("taylor",)}, "feature_maps must be of"),
        ({"seeds": ()}, "must not be empty"),
        ({"batch_size": 65}, "a segment needs at least batch_size = 65 examples"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **options)

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from experiments import emov2
from zoo import reports
from zoo.data.bccd import bccd

SMOKE = emov2.PRESETS["smoke"]


def test_a_run_leaves_its_record(tmp_path):
    emov2.run(dataclasses.replace(SMOKE, claims=("training",)), tmp_path / "run")
    result = reports.load_result(tmp_path / "run/result.json")
    assert result.data == "digits" and result.claims[0].verdict == "not tested"
    assert 0 <= result.claims[0].measured["test accuracy, %"] <= 100


@pytest.mark.slow
def test_patterns_and_blocks_are_compared(tmp_path):
    config = dataclasses.replace(SMOKE, claims=("patterns", "block"))
    patterns, block = emov2.run(config, tmp_path / "run").claims
    assert patterns.verdict == block.verdict == "not tested"
    assert set(patterns.baselines) == {"remote, accuracy %", "close, accuracy %", "none, accuracy %"}
    assert "no inner skip, test loss" in block.baselines
    assert (tmp_path / "run/figures/patterns.png").exists()


@pytest.fixture
def cells(tmp_path):
    """Files like the published set's: noise with boxes."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(6):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (64, 96, 3), np.uint8)).save(buffer, "JPEG")
        pictures.append(np.frombuffer(buffer.getvalue(), np.uint8))
    boxes = np.array([[4, 4, 40, 40], [50, 10, 90, 60], [8, 8, 30, 30]], np.float32)
    np.savez(
        tmp_path / "bccd.npz", jpeg=np.concatenate(pictures), offsets=np.cumsum([0, *map(len, pictures)]),
        split=np.array([0, 0, 0, 0, 1, 2]), box=boxes,
        box_label=np.array([0, 1, 2]), box_image=np.array([0, 0, 5]),
    )  # fmt: skip
    return tmp_path


def test_boxes_are_read_and_mirrored(cells):
    data = bccd(cells)
    assert [len(part) for part in data] == [4, 1, 1] and data.train.boxes.shape == (4, 2, 4)
    assert data.train.labels.tolist() == [[0, 1], [-1, -1], [-1, -1], [-1, -1]]
    seen = {tuple(batch["boxes"][0, 1]) for batch in emov2.detection_batches(data.train, 1, seed=0)[:64]}
    assert seen == {(50.0, 10.0, 90.0, 60.0), (6.0, 10.0, 46.0, 60.0), (0.0, 0.0, 0.0, 0.0), (96.0, 0.0, 96.0, 0.0)}


@pytest.mark.slow
def test_detection_runs_end_to_end(cells, tmp_path):
    backbone = dataclasses.replace(SMOKE.model, stem_stride=2, window=5)
    model = dataclasses.replace(SMOKE.detection.model, backbone=backbone, channels=8, image_size=(64, 96))
    options = emov2.Detection(model, epochs=1, batch_size=2, steps_per_epoch=1, test_images=1)
    config = dataclasses.replace(SMOKE, claims=("detection",), data_dir=cells, detection=options)
    claim = emov2.run(config, tmp_path / "run").claims[0]
    assert claim.verdict == "not tested" and (tmp_path / "run/figures/detection.png").exists()


def test_the_published_learning_rate_is_in_proportion_to_the_batch():
    assert emov2.PRESETS["paper"].training.learning_rate == pytest.approx(3e-3)
    assert emov2.learning_rate(256) == pytest.approx(7.5e-4)


def test_data_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ValueError, match="sign_digits is not part of the zoo: give --data-dir"):
        emov2.run(dataclasses.replace(SMOKE, data="sign_digits"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"bccd\.npz"):
        emov2.run(dataclasses.replace(SMOKE, claims=("detection",), data_dir=tmp_path), tmp_path)
    with pytest.raises(ValueError, match="seeds must name at least one seed"):
        dataclasses.replace(SMOKE, patterns=dataclasses.replace(SMOKE.patterns, seeds=()))

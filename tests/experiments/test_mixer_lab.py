import csv
import dataclasses
import json

import numpy as np
import pytest

from experiments import mixer_lab
from experiments.mixer_lab import Config, Text
from zoo import mixers
from zoo.data.recall import IGNORED

SMOKE = mixer_lab.PRESETS["smoke"]
TEXT = Text(np.arange(200, dtype=np.uint8), np.arange(100, 200, dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "smoke"
    mixer_lab.run(SMOKE, workdir)
    return workdir


def test_a_run_leaves_one_table_and_its_figures(folder):
    with open(folder / "table.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:5] == ["mixer", "width", "parameters", "state bytes", "mqar"]
    assert {"bits/byte at 16", "bits/byte at 32", "decode us/token at 32"} <= set(head)
    assert [row[:2] for row in rows] == [["softmax", "16"], ["gla", "16"]]
    assert (folder / "table.md").read_text().count("\n") == 4
    drawn = {path.stem for path in (folder / "figures").glob("*.png")}
    assert drawn == {"recall_state", "language_length", "cost_length"}
    result = json.loads((folder / "result.json").read_text())
    assert result["preset"] == "smoke" and len(result["rows"][0]["scores"]["language bits_32"]) == 1


def test_resuming_a_finished_run_trains_nothing(folder):
    before = json.loads((folder / "result.json").read_text())
    config = dataclasses.replace(SMOKE, steps=3)
    with pytest.raises(FileExistsError, match="holds a run"):
        mixer_lab.run(SMOKE, folder)
    with pytest.raises(ValueError, match="steps was"):
        mixer_lab.run(config, folder, resume=True)
    rows = mixer_lab.run(SMOKE, folder, resume=True)
    assert [row.scores for row in rows] == [row["scores"] for row in before["rows"]]


def test_every_registered_mixer_has_a_network_of_one_size():
    config = Config()
    budget = mixer_lab.count_parameters(mixer_lab.network("softmax", 64, config))
    config = dataclasses.replace(config, parameters=budget)
    narrow = {"qlstm": 48}  # its recurrence alone is larger than attention and MLP of width 64
    for mixer in (*mixers.names(), *config.mixers):
        count = mixer_lab.count_parameters(mixer_lab.network(mixer, narrow.get(mixer, 64), config))
        assert abs(count - budget) <= 64 * config.layers, mixer
    with pytest.raises(ValueError, match=r"ssd with the narrowest MLP has [\d,]+ parameters, the budget is 20,000"):
        mixer_lab.network("ssd", 64, dataclasses.replace(config, parameters=20_000))


def test_mixers_are_written_with_options_and_layer_after_layer():
    names, options = mixer_lab.parse("based:feature_dim=8+softmax:window=16,qk_norm=rms+gla")
    assert names == ("based", "softmax", "gla")
    assert options == ({"feature_dim": 8}, {"window": 16, "qk_norm": "rms"}, {})
    model = mixer_lab.network("based:feature_dim=8+softmax:window=4", 16, dataclasses.replace(SMOKE))
    assert model.config.make_mixer(0).feature_dim == 8 and model.config.make_mixer(1).window == 4
    with pytest.raises(ValueError, match="written name=value, got 'window'"):
        mixer_lab.parse("softmax:window")
    with pytest.raises(ValueError, match="unknown mixer 'softmacks'; did you mean 'softmax'"):
        mixer_lab.network("softmacks", 16, SMOKE)
    with pytest.raises(TypeError, match="'gla' has no option 'window'"):
        mixer_lab.network("gla:window=3", 16, SMOKE)


@pytest.mark.parametrize("task", ["mqar", "needle", "copying", "induction", "language"])
def test_tasks_fit_the_vocabulary(task):
    task = mixer_lab.rows(task, SMOKE, TEXT, seed=3, examples=5, length=24, test=False)
    assert task.tokens.shape == task.labels.shape == (5, 24)
    assert task.tokens.min() >= 0 and max(task.tokens.max(), task.labels.max()) < mixer_lab.BYTES
    assert (task.labels != IGNORED).any(axis=1).all()


def test_language_asks_for_the_next_byte_of_its_part():
    for test, low in ((False, 0), (True, 100)):
        found = mixer_lab.rows("language", SMOKE, TEXT, seed=0, examples=50, length=8, test=test)
        np.testing.assert_array_equal(found.labels, found.tokens + 1)
        assert found.tokens.min() >= low


def test_spreads_are_standard_deviations():
    assert mixer_lab.spread([0.5]) == "0.500" and mixer_lab.spread([0.4, 0.6]) == "0.500 ± 0.141"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"mixers": ()}, "mixers must not be empty"),
        ({"pairs": 5}, "mqar needs an even length of at least 4 pairs = 20, got 16"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **options)


def test_text_that_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \.txt file"):
        mixer_lab.run(dataclasses.replace(SMOKE, data_dir=tmp_path), tmp_path / "run")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="the text has 9 bytes"):
        mixer_lab.run(dataclasses.replace(SMOKE, data_dir=tmp_path), tmp_path / "run")

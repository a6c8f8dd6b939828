import dataclasses
import json

import pytest

from zoo.train import open_run


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    sizes: tuple[int, ...] = (1, 2)


def test_run_writes_its_config(tmp_path):
    run = open_run(tmp_path / "new" / "run", Config())
    assert json.loads((run.path / "config.json").read_text()) == {"seed": 0, "sizes": [1, 2]}


def test_run_is_never_overwritten_by_accident(tmp_path):
    open_run(tmp_path, Config())
    with pytest.raises(FileExistsError, match="pass --resume to continue it or --force to remove it"):
        open_run(tmp_path, Config())


def test_resuming_needs_the_same_config(tmp_path):
    open_run(tmp_path, Config())
    assert open_run(tmp_path, Config(), resume=True).resume
    with pytest.raises(ValueError, match=r"another config: seed was 0, now 1; sizes was \[1, 2\], now \[3\]"):
        open_run(tmp_path, Config(seed=1, sizes=(3,)), resume=True)


def test_resuming_an_empty_folder_starts(tmp_path):
    open_run(tmp_path, Config(), resume=True)
    assert (tmp_path / "config.json").exists()


def test_force_removes_the_run_and_nothing_else(tmp_path):
    open_run(tmp_path, Config())
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    open_run(tmp_path, Config(seed=1), force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "thesis.tex"]
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


def test_resume_and_force_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="give one of them"):
        open_run(tmp_path, Config(), resume=True, force=True)

"""A run's folder: its config, and where the rest goes."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils

from zoo.files import atomic

# All that a run leaves; `force` removes nothing else.
_CONTENTS = ("config.json", "result.json", "metrics", "tensorboard", "figures", "checkpoints", "non_finite")


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder with config.json, result.json, metrics/, tensorboard/, figures/ and checkpoints/."""

    path: pathlib.Path
    resume: bool


def open_run(path: str | os.PathLike, config: Any, *, resume: bool = False, force: bool = False) -> Run:
    """Claims a folder for the run of a config (a dataclass), made if needed.

    Args:
      path: the folder. Other files in it are left alone.
      config: written as config.json.
      resume: continue the run that is there, which must have the same config; start one if there is none.
      force: remove a run that is there first.

    Raises:
      FileExistsError: a run is there, and neither resume nor force is given.
      ValueError: both are given, or the run to resume has another config (the fields that differ are named).
    """
    path = pathlib.Path(path).absolute()
    if resume and force:
        raise ValueError("resume continues a run and force removes it: give one of them")
    if jax.process_index() == 0:
        _claim(path, json.loads(json.dumps(dataclasses.asdict(config), default=str)), resume, force)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("open_run")
    return Run(path, resume)


def _claim(path: pathlib.Path, config: dict, resume: bool, force: bool) -> None:
    file = path / "config.json"
    if force:
        for name in _CONTENTS:
            if (path / name).is_dir():
                shutil.rmtree(path / name)
            else:
                (path / name).unlink(missing_ok=True)
    elif any((path / name).exists() for name in _CONTENTS):
        if not resume:
            raise FileExistsError(f"{path} holds a run: pass --resume to continue it or --force to remove it")
        old = json.loads(file.read_text()) if file.exists() else {}
        differences = [
            f"{name} was {old.get(name)!r}, now {config.get(name)!r}"
            for name in sorted(old.keys() | config.keys())
            if old.get(name) != config.get(name)
        ]
        if differences:
            raise ValueError(f"{path} holds a run of another config: {'; '.join(differences)}")
    write_json(file, config)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")

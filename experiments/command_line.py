"""The command line that all experiments share: a preset, a folder, and every field of the config as a flag."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro

from zoo.errors import unknown


def main(name: str, presets: Mapping[str, Any], run: Callable[..., Any], arguments: Sequence[str] | None = None) -> Any:
    """Parses `--preset NAME --workdir DIR [--resume | --force] [--FIELD VALUE ...]` and calls `run`.

    Args:
      name: the experiment's, for messages and the default folder `runs/<name>-<preset>`.
      presets: frozen config dataclasses by name.
      run: called as `run(config, workdir, resume=..., force=...)`.
      arguments: the command line without the program, default `sys.argv[1:]`.

    Returns:
      What `run` returns.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # The preset decides the other flags' defaults, so it is read first.
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default=next(iter(presets)))
    preset = first.parse_known_args(arguments)[0].preset
    if preset not in presets:
        raise SystemExit(f"error: {unknown('preset', preset, presets)}")
    default = presets[preset]
    command = dataclasses.make_dataclass(
        "Command",
        [
            ("preset", Annotated[Literal[tuple(presets)], tyro.conf.arg(help="named set of defaults")], preset),
            (
                "workdir",
                Annotated[pathlib.Path, tyro.conf.arg(help="folder of the run's metrics, figures and checkpoints")],
                pathlib.Path("runs") / f"{name}-{preset}",
            ),
            ("resume", Annotated[bool, tyro.conf.arg(help="continue the run in workdir")], False),
            ("force", Annotated[bool, tyro.conf.arg(help="delete an earlier run in workdir")], False),
            ("config", Annotated[type(default), tyro.conf.arg(name="")], default),
        ],
        frozen=True,
    )
    parsed: Any = tyro.cli(command, prog=f"zoo run {name}", args=arguments)
    if parsed.resume and parsed.force:
        raise SystemExit("error: --resume continues a run and --force deletes it; give one of them")
    try:
        return run(parsed.config, parsed.workdir, resume=parsed.resume, force=parsed.force)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def run_module(module: types.ModuleType, arguments: Sequence[str]) -> Any:
    """Runs an experiment's module (`PRESETS` and `run`) with a command line."""
    return main(module.__name__.rsplit(".", 1)[-1], module.PRESETS, module.run, arguments)


def preset_name(config: Any, presets: Mapping[str, Any]) -> str:
    """The preset that a config equals but for its data's folder, or "own"."""

    def bare(config: Any) -> Any:
        return dataclasses.replace(config, data_dir=None) if hasattr(config, "data_dir") else config

    return next((name for name, preset in presets.items() if bare(preset) == bare(config)), "own")

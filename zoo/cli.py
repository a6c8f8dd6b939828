"""`zoo`: lists and shows models, runs experiments, compiles for accelerators, converts weights, writes reports."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from zoo import registry
from zoo.errors import unknown


@dataclasses.dataclass(frozen=True)
class List:
    """List models."""

    pattern: tyro.conf.Positional[str] = "*"
    """Shell-style pattern of ids, such as 'informer*'."""

    def __call__(self) -> None:
        names = registry.list_models(self.pattern)
        if not names:
            raise ValueError(f"no model matches {self.pattern!r}; `zoo list` lists all")
        table = Table("id", "paper", "parameters", "checkpoint")
        for name in names:
            entry = registry.model(name)
            count = entry.variant.parameters
            table.add_row(
                name, entry.paper.title, f"{count:,}" if count is not None else "", str(entry.variant.checkpoint or "")
            )
        Console().print(table)


@dataclasses.dataclass(frozen=True)
class Show:
    """Show a model: its paper, its config, its inputs, and its parameters by name."""

    id: tyro.conf.Positional[str]
    """A model's id."""
    depth: int = 2
    """How many levels of the parameter tree to list."""

    def __call__(self) -> None:
        import jax
        from flax import linen as nn
        from flax.traverse_util import flatten_dict

        console = Console()
        entry = registry.model(self.id)
        paper = entry.paper
        console.print(f"[bold]{paper.title}[/bold], {paper.authors}, {paper.venue} {paper.year}")
        console.print(paper.claim)
        if paper.arxiv:
            console.print(f"arXiv {paper.arxiv}")
        if paper.code:
            console.print(f"code {paper.code} ({paper.code_license or 'no licence'})")
        if paper.remarks:
            console.print(paper.remarks)
        console.print(f"numbers checked against: {paper.fidelity}")
        console.print(entry.variant.config)
        inputs = registry.example_inputs(self.id, 1)
        table = Table("input", "shape", "dtype")
        for name, value in inputs.items():
            for path, leaf in jax.tree_util.tree_leaves_with_path(value):
                table.add_row(name + jax.tree_util.keystr(path), str(leaf.shape), str(leaf.dtype))
        console.print(table)
        shapes = jax.eval_shape(lambda: registry.create(self.id).init(jax.random.key(0), **inputs))
        table = Table("collection", "parameters", "values")
        counts: dict[str, int] = {}
        for path, leaf in flatten_dict(nn.unbox(shapes)).items():
            name = "/".join(path[: self.depth + 1])
            counts[name] = counts.get(name, 0) + leaf.size
        for name, count in counts.items():
            table.add_row(*name.split("/", 1), f"{count:,}")
        console.print(table)
        total = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        console.print(f"{total:,} parameters")


@dataclasses.dataclass(frozen=True)
class Run:
    """Run a paper's experiment: `zoo run informer --preset cpu`; `zoo run informer --help` lists its flags."""

    experiment: tyro.conf.Positional[str]
    """An experiment's name; its own flags follow."""

    def __call__(self, arguments: Sequence[str]) -> None:
        import experiments
        from experiments import command_line

        names = {module.name for module in pkgutil.iter_modules(experiments.__path__)} - {"command_line"}
        if self.experiment not in names:
            raise unknown("experiment", self.experiment, names)
        command_line.run_module(importlib.import_module(f"experiments.{self.experiment}"), arguments)


@dataclasses.dataclass(frozen=True)
class Compile:
    """Compile a model for an accelerator that is not here, and print what its compiler says."""

    id: tyro.conf.Positional[str]
    """A model's id."""
    target: str = "tpu-v5e"
    """The accelerator: tpu-v5e, tpu-v5p, tpu-v6e, h100, ..."""
    mesh: str | None = None
    """Devices as FSDP, FSDPxTENSOR or DATAxFSDPxTENSOR, such as 8x4; default one device."""
    train: bool = False
    """The whole training step (forward, backward, Adam) and not the forward pass."""
    batch_size: int = 8
    """Examples in the whole batch."""

    def __call__(self) -> None:
        import jax

        from zoo import compilation

        jax.config.update("jax_platforms", "cpu")  # compilers need no device, and must not look for one
        try:
            report = compilation.compile_model(
                self.id, self.target, _parse_mesh(self.mesh), training=self.train, batch_size=self.batch_size
            )
        except (compilation.CompilerMissingError, compilation.DeviceMemoryError) as error:
            raise SystemExit(f"error: {error}") from error
        print(report)


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a published checkpoint into the zoo's variables."""

    id: tyro.conf.Positional[str]
    """A model's id."""
    source: tyro.conf.Positional[str]
    """A .safetensors, .pth or .gguf file, or hf://organisation/repository/file."""
    to: pathlib.Path
    """The .safetensors file to write."""

    def __call__(self) -> None:
        from zoo import weights

        if self.to.suffix != ".safetensors":
            raise ValueError(f"--to must name a .safetensors file, got {self.to}")
        weights.save(registry.load_weights(self.id, self.source), self.to)
        print(f"wrote {self.to}")


@dataclasses.dataclass(frozen=True)
class Report:
    """Write experiments/README.md from the results of all experiments: every claim, the failures first."""

    def __call__(self) -> None:
        from zoo import reports

        print(f"wrote {reports.write_claims()}")


@dataclasses.dataclass(frozen=True)
class Readme:
    """Write the table of papers in README.md from their records."""

    def __call__(self) -> None:
        from zoo import reports

        print(f"wrote {reports.write_readme()}")


def _parse_mesh(text: str | None) -> tuple[int, ...]:
    if text is None:
        return (1,)
    sizes = text.split("x")
    if not 1 <= len(sizes) <= 3 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(f"--mesh must be one to three positive sizes joined by x, such as 8x4, got {text!r}")
    return tuple(int(size) for size in sizes)


def main(arguments: Sequence[str] | None = None) -> None:
    """The `zoo` command. Wrong input ends with `error: ...` and exit status 1, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # What follows `run NAME` is the experiment's own command line.
    passed_on = arguments[2:] if arguments[:1] == ["run"] and arguments[1:2] not in ([], ["-h"], ["--help"]) else []
    command: Any = tyro.extras.subcommand_cli_from_dict(
        {c.__name__.lower(): c for c in (List, Show, Run, Compile, Convert, Report, Readme)},
        prog="zoo", description=__doc__, args=arguments[:2] if passed_on else arguments,
    )  # fmt: skip
    try:
        if isinstance(command, Run):
            command(passed_on)
        else:
            command()
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()

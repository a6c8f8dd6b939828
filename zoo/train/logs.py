"""Metrics as CSV and TensorBoard events, figures as PNG, progress on the console."""

from __future__ import annotations

import csv
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import rich.console
import rich.progress

from zoo.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class MetricWriter:
    """Appends rows to metrics/<table>.csv and scalars to tensorboard/.

    CSV files hold what a run computes and no times, so that an interrupted and resumed run leaves the same bytes.

    Args:
      path: the run's folder.
      step: continue after this step; rows of later steps (written after the checkpoint that training resumes from),
        and a last row that was cut short, are removed.
    """

    def __init__(self, path: pathlib.Path, step: int) -> None:
        import tensorboardX  # here, as it imports torch where that is installed: a second

        self._path = path
        self._columns: dict[str, list[str]] = {}
        self._events = tensorboardX.SummaryWriter(str(path / "tensorboard"), purge_step=step + 1)
        for file in sorted((path / "metrics").glob("*.csv")):
            self._truncate(file, step)

    def _truncate(self, file: pathlib.Path, step: int) -> None:
        lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = lines[:1] + [line for line in lines[1:] if int(line.split(",", 1)[0]) <= step]
        if len(kept) < 2:
            file.unlink()
            return
        with atomic(file) as temporary:
            temporary.write_text("".join(kept))
        self._columns[file.stem] = next(csv.reader(kept))

    def write(self, table: str, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row. Raises ValueError if its names are not those of the table's first row."""
        columns = ["step", *metrics]
        rows = [[str(step), *(repr(float(value)) for value in metrics.values())]]
        if table not in self._columns:
            self._columns[table] = columns
            rows.insert(0, columns)
        if columns != self._columns[table]:
            raise ValueError(f"{table} has the columns {self._columns[table]}, got {columns} at step {step}")
        file = self._path / "metrics" / f"{table}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows(rows)
        self.scalars(table, step, metrics)

    def scalars(self, table: str, step: int, metrics: Mapping[str, float]) -> None:
        """TensorBoard alone: for what differs from run to run, such as times."""
        for name, value in metrics.items():
            self._events.add_scalar(f"{table}/{name}", value, step)

    def figures(self, step: int, figures: Mapping[str, Figure]) -> None:
        """Writes figures/<name>.png, replacing that of an earlier step; TensorBoard keeps all of them.

        Make them with `matplotlib.figure.Figure()`: no display and no global state.
        """
        for name, figure in figures.items():
            with atomic(self._path / "figures" / f"{name}.png") as temporary:
                figure.savefig(temporary)
            self._events.add_figure(name, figure, step, close=False)

    def flush(self) -> None:
        """All rows so far are on the disk."""
        for table in self._columns:
            with open(self._path / "metrics" / f"{table}.csv", "rb") as stream:
                os.fsync(stream.fileno())
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        self._events.close()


class ProgressDisplay:
    """A bar with steps/s, time left and loss; without a terminal a line now and then."""

    def __init__(self, step: int, total_steps: int, quiet: bool = False) -> None:
        self._console = rich.console.Console(stderr=True, quiet=quiet)
        self._total_steps = total_steps
        self._interval = 0.1 if self._console.is_terminal else 10.0
        self._first: tuple[int, float] | None = None  # step and time when the first step was done: compiling is over
        self._shown = -math.inf
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step"),
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[status]}"),
            rich.progress.TextColumn("ETA"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=step, status="compiling")
        self._bar.start()

    def steps_per_second(self, step: int) -> float:
        """Since the first step was done, evaluations included; NaN before there are two."""
        if self._first is None or step == self._first[0]:
            return math.nan
        return (step - self._first[0]) / (time.monotonic() - self._first[1])

    def update(self, step: int, loss: float) -> None:
        """Shows a step, unless another one was shown a moment ago."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
            return  # there is no speed yet
        if now - self._shown < self._interval and step != self._total_steps:
            return
        self._shown = now
        speed = self.steps_per_second(step)
        status = f"{speed:.1f} steps/s  loss {loss:.4g}"
        self._bar.update(self._task, completed=step, status=status)
        if not self._console.is_terminal:
            left = (self._total_steps - step) / speed
            self.note(f"step {step}/{self._total_steps}  {status}  ETA {left:.0f} s")

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.stop()

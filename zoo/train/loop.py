"""The training loop."""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from zoo.files import atomic
from zoo.train.checkpoint import Checkpoints
from zoo.train.logs import MetricWriter, ProgressDisplay
from zoo.train.metrics import MeanAccumulator
from zoo.train.run import Run
from zoo.train.sharding import shard_batch
from zoo.train.state import PyTree, TrainState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Steps that the host runs ahead of the device. Metrics are read when a step is that old, so that nobody waits for them.
_IN_FLIGHT = 4
# Batches read ahead of the loop: few, as Grain's 500 would fill the memory with images and cost 0.2 ms a step.
_READ_AHEAD = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long to train, and how often to look."""

    # Steps to train; either this or epochs.
    steps: int | None = None
    # Epochs to train; either this or steps.
    epochs: int | None = None
    # Steps between two rows of metrics, means over the steps between.
    log_every: int = 50
    # Steps between two evaluations; None: once an epoch (and in any case at the end).
    evaluate_every: int | None = None
    # Steps between two checkpoints, besides one after each evaluation.
    checkpoint_every: int | None = None
    # How many of the latest checkpoints stay, besides the best.
    keep_checkpoints: int = 2
    # Evaluation metric by which a state is the best.
    best_metric: str | None = None
    # Whether the best is the smallest or the largest.
    best_mode: Literal["min", "max"] = "min"
    # Evaluations in a row without a best one after which training stops; None: never.
    patience: int | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give steps or epochs, and one of them: got steps={self.steps}, epochs={self.epochs}")
        for field in ("steps", "epochs", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        if self.best_mode not in ("min", "max"):
            raise ValueError(f"best_mode must be 'min' or 'max', got {self.best_mode!r}")
        if self.patience is not None and (self.patience < 1 or self.best_metric is None):
            raise ValueError(
                f"patience must be at least 1 and needs best_metric, got {self.patience} and {self.best_metric!r}"
            )

    def total_steps(self, steps_per_epoch: int | None) -> int:
        """Steps to train. Raises ValueError where epochs are given and steps_per_epoch is not."""
        if self.steps is not None:
            return self.steps
        if steps_per_epoch is None or steps_per_epoch < 1:
            raise ValueError(f"epochs need steps_per_epoch of at least 1, got {steps_per_epoch}")
        assert self.epochs is not None
        return self.epochs * steps_per_epoch


class NonFiniteError(FloatingPointError):
    """The loss or a gradient was not finite; says at which step and where its batch is."""


class FitResult(NamedTuple):
    """What training came to."""

    state: TrainState  # after the last step
    best_state: TrainState  # at the best evaluation; `state` where there is no best_metric
    best_step: int | None
    best_value: float | None
    evaluation: dict[str, float]  # the last evaluation's metrics
    stopped_early: bool


@dataclasses.dataclass
class _Progress:
    """What the loop itself has to remember over an interruption (JSON)."""

    step: int = 0
    window: dict = dataclasses.field(default_factory=lambda: MeanAccumulator().state)  # metrics since the last row
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)
    best_step: int | None = None
    best_value: float | None = None
    evaluations_since_best: int = 0


def fit(
    train_step: Callable[[TrainState, PyTree], tuple[TrainState, Mapping[str, jax.Array]]],
    state: TrainState,
    data: grain.MapDataset | grain.IterDataset,
    config: FitConfig,
    run: Run,
    *,
    mesh: Mesh,
    steps_per_epoch: int | None = None,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    figures: Callable[[TrainState], Mapping[str, Figure]] | None = None,
) -> FitResult:
    """Trains, evaluates, logs and checkpoints; continues an interrupted run where it was, bit for bit.

    SIGTERM or SIGINT ends the process with status 0 after the current step and a checkpoint (a second SIGINT at once).

    Args:
      train_step: from `make_train_step`. Donates the state: the one passed in is used up.
      state: from `init_sharded`.
      data: batches (numpy arrays, axis 0 the examples; this process's part of them), repeated for long enough. A
        MapDataset is read a few batches ahead; `to_iter_dataset` chooses otherwise.
      config: see its fields.
      run: from `open_run`; where it resumes, the newest checkpoint replaces `state`.
      mesh: from `make_mesh`, the state's.
      steps_per_epoch: needed where config counts in epochs.
      evaluate: metrics of a state; see `zoo.train.evaluate`. Rows of metrics/evaluation.csv.
      figures: pictures of a state by name, drawn after each evaluation.

    Raises:
      NonFiniteError: the loss or a gradient was not finite. The batch is in non_finite/step_<step>.npz.
      ValueError: an argument is wrong, or the data ended too early.
    """
    total_steps = config.total_steps(steps_per_epoch)
    evaluate_every = config.evaluate_every or steps_per_epoch or total_steps
    if config.best_metric is not None and evaluate is None:
        raise ValueError(f"best_metric {config.best_metric!r} needs evaluate")
    if not isinstance(data, grain.MapDataset | grain.IterDataset):
        raise TypeError(f"data must be a Grain dataset (its iterators have a state to save), got {type(data).__name__}")
    iterator = _read(data)

    checkpoints = Checkpoints(run.path / "checkpoints", config.keep_checkpoints)
    progress = _Progress()
    if run.resume and (restored := checkpoints.restore(state, iterator)) is not None:
        state, progress = restored[0], _Progress(**restored[1])
    writer = MetricWriter(run.path, progress.step) if jax.process_index() == 0 else None
    display = ProgressDisplay(progress.step, total_steps, quiet=writer is None)
    window = MeanAccumulator(progress.window)
    in_flight: collections.deque[tuple[int, PyTree, Mapping[str, jax.Array]]] = collections.deque()

    def stopped_early() -> bool:
        return config.patience is not None and progress.evaluations_since_best >= config.patience

    def settle(remaining: int) -> None:
        """Reads the metrics of all but the last `remaining` steps."""
        nonlocal window
        while len(in_flight) > remaining:
            step, batch, device_metrics = in_flight.popleft()
            metrics = {name: float(value) for name, value in device_metrics.items()}
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])):
                raise _non_finite(run.path, step, batch, metrics)
            window.add(metrics)
            display.update(step, metrics["loss"])
            if step % config.log_every == 0 or step == total_steps:
                if writer is not None:
                    writer.write("train", step, window.means())
                    writer.scalars("time", step, {"steps_per_second": display.steps_per_second(step)})
                window = MeanAccumulator()

    def save() -> None:
        settle(0)
        if writer is not None:
            writer.flush()  # rows up to a checkpoint's step are never written again
        progress.window = window.state
        checkpoints.save(progress.step, state, iterator, dataclasses.asdict(progress), progress.best_step)

    def look() -> None:
        if evaluate is None:
            return
        settle(0)
        progress.evaluation = {name: float(value) for name, value in evaluate(state).items()}
        pictures = {} if figures is None else figures(state)
        if writer is not None:
            writer.write("evaluation", progress.step, progress.evaluation)
            writer.figures(progress.step, pictures)
        if config.best_metric is None:
            return
        if config.best_metric not in progress.evaluation:
            raise ValueError(f"best_metric {config.best_metric!r} is not one of {sorted(progress.evaluation)}")
        value, best = progress.evaluation[config.best_metric], progress.best_value
        better = best is None or (value < best if config.best_mode == "min" else value > best)
        if better and not math.isnan(value):
            progress.best_step, progress.best_value, progress.evaluations_since_best = progress.step, value, 0
        else:
            progress.evaluations_since_best += 1

    try:
        with _StopSignals() as stop:
            while progress.step < total_steps and not stopped_early():
                try:
                    batch = next(iterator)
                except StopIteration:
                    raise ValueError(
                        f"the data ended after {progress.step} of {total_steps} steps: repeat it"
                    ) from None
                state, metrics = train_step(state, shard_batch(batch, mesh))
                progress.step += 1
                in_flight.append((progress.step, batch, metrics))
                settle(_IN_FLIGHT)

                is_evaluation = progress.step % evaluate_every == 0 or progress.step == total_steps
                is_checkpoint = config.checkpoint_every is not None and progress.step % config.checkpoint_every == 0
                is_stop = stop.requested(progress.step)
                if is_evaluation:
                    look()
                if is_evaluation or is_checkpoint or is_stop:
                    save()
                if is_stop and progress.step < total_steps:
                    display.note(f"stopped at step {progress.step} of {total_steps}; --resume continues")
                    raise SystemExit(0)
        best_state = state
        if progress.best_step is not None and progress.best_step != progress.step:
            best_state = checkpoints.restore_state(progress.best_step, state)
    finally:
        display.close()
        if writer is not None:
            writer.close()
        checkpoints.close()
    return FitResult(state, best_state, progress.best_step, progress.best_value, progress.evaluation, stopped_early())


def evaluate(
    evaluation_step: Callable[[TrainState, PyTree], Mapping[str, jax.Array]],
    state: TrainState,
    batches: grain.MapDataset | grain.IterDataset | Iterable[PyTree],
    mesh: Mesh,
) -> dict[str, float]:
    """Means of the metrics over all examples of a finite dataset.

    Args:
      evaluation_step: from `make_evaluation_step`.
      state: is not used up.
      batches: as for `fit`.
      mesh: the state's.
    """
    means = MeanAccumulator()
    in_flight: collections.deque[tuple[int, Mapping[str, jax.Array]]] = collections.deque()

    def settle(remaining: int) -> None:
        while len(in_flight) > remaining:
            examples, metrics = in_flight.popleft()
            means.add(metrics, weight=examples)

    for batch in _read(batches):
        in_flight.append((len(jax.tree.leaves(batch)[0]), evaluation_step(state, shard_batch(batch, mesh))))
        settle(_IN_FLIGHT)
    settle(0)
    return means.means()


def _read(data: Any) -> Any:
    return iter(data.to_iter_dataset(_READ_AHEAD) if isinstance(data, grain.MapDataset) else data)


def _non_finite(path: pathlib.Path, step: int, batch: PyTree, metrics: Mapping[str, float]) -> NonFiniteError:
    file = path / "non_finite" / f"step_{step}.npz"
    if jax.process_count() > 1:
        file = file.with_stem(f"{file.stem}_process_{jax.process_index()}")
    arrays = {
        jax.tree_util.keystr(key, simple=True, separator="/") or "batch": np.asarray(leaf)
        for key, leaf in jax.tree.leaves_with_path(batch)
    }
    with atomic(file) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
    return NonFiniteError(
        f"step {step}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}. The update was not applied; "
        f"the batch is in {file}. --resume replays from the last checkpoint, to the same step."
    )


class _StopSignals:
    """Catches SIGTERM and SIGINT while training; several processes agree on the step."""

    def __init__(self) -> None:
        self._received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        # In several processes JAX's coordination service listens for SIGTERM itself.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: Any) -> None:
        self._received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def requested(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

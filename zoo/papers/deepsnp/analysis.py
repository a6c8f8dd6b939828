"""From a network's steps back to probes: where breakpoints are, whole sequences, and metrics of windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from zoo.data.snp_array import PADDING, savitzky_golay_slope


def localization_delta(p: np.ndarray) -> np.ndarray:
    """How fast the probability of a breakpoint changes along the steps: |slope| of p (..., T), same shape."""
    return np.abs(savitzky_golay_slope(np.asarray(p)))


def to_probes(track: np.ndarray, probes: int) -> np.ndarray:
    """A track of steps (T,) at the probes' resolution (probes,): each repeated floor(probes / T) times, the last on.

    Raises ValueError for more steps than probes.
    """
    if track.ndim != 1 or not 1 <= len(track) <= probes:
        raise ValueError(f"expected a track of 1 .. {probes} steps, got shape {track.shape}")
    repeated = np.repeat(track, probes // len(track))
    return np.pad(repeated, (0, probes - len(repeated)), mode="edge")


class SequenceCalls(NamedTuple):
    """What a network finds in a sequence of N probes, cut into K windows.

    Attributes:
      windows: int (K,), 1 where the window has a breakpoint.
      probability: float (N,), of the class breakpoint, step by step.
      change: float (N,), how fast it changes.
      breakpoints: int, the probes of the largest change in windows with a breakpoint whose probability is above 0.5
        somewhere.
    """

    windows: np.ndarray
    probability: np.ndarray
    change: np.ndarray
    breakpoints: np.ndarray


def predict_sequence(
    apply: Callable[[np.ndarray], Mapping[str, Any]], lrr: np.ndarray, baf: np.ndarray, window: int, *, at_once: int = 8
) -> SequenceCalls:
    """Reads a whole sequence in windows that do not overlap, the last one padded with -2.

    Args:
      apply: (B, 2, window, 1) to "probs" and "localization", a `DeepSNP` with its variables.
      lrr, baf: (N,), the log R ratio and the B-allele frequency.
      window: probes of a window.
      at_once: B.

    Raises:
      ValueError: the two tracks do not fit, or are empty.
    """
    if lrr.shape != baf.shape or lrr.ndim != 1 or not len(lrr):
        raise ValueError(f"expected two tracks of the same length, got shapes {lrr.shape} and {baf.shape}")
    count = -(-len(lrr) // window)
    tracks = np.full((2, -(-count // at_once) * at_once * window), PADDING, np.float32)
    tracks[:, : len(lrr)] = baf, lrr
    windows = tracks.reshape(2, -1, window).swapaxes(0, 1)[..., None]
    decided, located = [], []
    for start in range(0, len(windows), at_once):
        out = apply(windows[start : start + at_once])
        decided.append(np.asarray(out["probs"]).argmax(-1))
        located.append(np.asarray(out["localization"])[..., 1])
    calls, steps = np.concatenate(decided)[:count], np.concatenate(located)[:count]
    changes = localization_delta(steps)
    probability, change = (np.concatenate([to_probes(row, window) for row in rows]) for rows in (steps, changes))
    breakpoints = [
        index * window + middle_of_largest(changes[index], window)
        for index in np.flatnonzero(calls)
        if steps[index].max() > 0.5
    ]
    where = np.asarray(breakpoints, int)
    return SequenceCalls(calls, probability[: len(lrr)], change[: len(lrr)], where[where < len(lrr)])


def middle_of_largest(track: np.ndarray, window: int) -> int:
    """The probe in the middle of the step with the largest value."""
    return int((track.argmax() + 0.5) * (window // len(track)))


def window_metrics(labels: np.ndarray, calls: np.ndarray) -> dict[str, float]:
    """F1 (binary, micro, macro), precision, recall and accuracy of windows, by scikit-learn.

    Args:
      labels, calls: 0 or 1 (N,).

    Raises:
      ValueError: shapes do not fit.
      ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn import metrics

    if np.shape(labels) != np.shape(calls) or np.ndim(labels) != 1:
        raise ValueError(f"labels {np.shape(labels)} and calls {np.shape(calls)} must be of the same windows")
    found = {
        f"f1_{kind}": metrics.f1_score(labels, calls, average=kind, zero_division=0)
        for kind in ("binary", "micro", "macro")
    }
    found["precision"] = metrics.precision_score(labels, calls, zero_division=0)
    found["recall"] = metrics.recall_score(labels, calls, zero_division=0)
    found["accuracy"] = metrics.accuracy_score(labels, calls)
    return {name: float(value) for name, value in found.items()}

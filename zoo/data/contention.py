"""A simulator of virtual machines that share a host, seen from outside: what neighbours do to a machine's performance.

A stand-in for measurements of a cloud, which are not public. Interference counts only while the victim is active, so
that seconds must be aligned, and its size depends on products of demands, so that metrics must be combined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np

Scenario = Literal["static", "dynamic", "mixed"]
APPLICATIONS, METRICS, LONGEST, NEIGHBOURS = 24, 206, 120, 4
LATENTS = (
    "cpu", "cache share", "miss ratio", "bandwidth", "total bandwidth", "neighbours' cache", "neighbours' bandwidth",
    "neighbours' network", "network", "instructions per cycle", "cache demand", "change of miss ratio", "neighbours",
    "neighbours' cache times bandwidth",
)  # fmt: skip
_CACHE, _BANDWIDTH, _NETWORK = 20.0, 16.0, 10.0  # MB, GB/s and Gbit/s of the host


class Runs(NamedTuple):
    """Runs of N victims.

    Attributes:
      x: float32 (N, 120, 206), metrics a second; zero behind a run's end.
      length: int32 (N,), seconds, 40 .. 120.
      performance: float32 (N,), ideal time over observed time, in (0, 1].
      application: int32 (N,), the victim's, 0 .. 23.
      dynamic: bool (N,), whether its neighbours come and go.
    """

    x: np.ndarray
    length: np.ndarray
    performance: np.ndarray
    application: np.ndarray
    dynamic: np.ndarray

    def rows(self, index: np.ndarray) -> Runs:
        """Some of the runs."""
        return Runs(*(array[index] for array in self))


class _Applications(NamedTuple):
    """Fixed profiles (24,) each."""

    cpu: np.ndarray
    cache: np.ndarray
    bandwidth: np.ndarray
    network: np.ndarray
    miss: np.ndarray
    ipc: np.ndarray
    to_cache: np.ndarray  # sensitivities
    to_bandwidth: np.ndarray
    to_network: np.ndarray
    period: np.ndarray
    amplitude: np.ndarray


@functools.cache
def _applications() -> _Applications:
    rng = np.random.default_rng(2025)
    ranges = (
        (0.3, 1.0), (1, 12), (0.5, 8), (0, 4), (0.02, 0.3), (0.4, 1.6), (0.2, 1), (0.2, 1), (0, 0.5), (5, 25), (0, 0.8),
    )  # fmt: skip
    return _Applications(*(rng.uniform(low, high, APPLICATIONS) for low, high in ranges))


@functools.cache
def _mixture() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (14, 206) of the metrics, a fifth of them not zero, the function of each, and an offset."""
    rng = np.random.default_rng(206)
    weights = rng.normal(size=(len(LATENTS), METRICS)) * (rng.random((len(LATENTS), METRICS)) < 0.2)
    empty = ~weights.any(0)
    weights[rng.integers(0, len(LATENTS), empty.sum()), np.flatnonzero(empty)] = 1.0
    return weights, rng.integers(0, 4, METRICS), rng.normal(size=METRICS)


@functools.cache
def _scales() -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread of each latent trace, from runs of their own."""
    latents, _, valid, _ = _simulate(256, np.random.default_rng(7), np.random.default_rng(8).random(256) < 0.5)
    rows = latents[valid]
    return rows.mean(0), rows.std(0)


def _activity(application: np.ndarray, phase: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Phases of applications (...,): (..., T), positive."""
    profile = _applications()
    angle = 2 * np.pi * (time / profile.period[application][..., None] + phase[..., None])
    return 1 + profile.amplitude[application][..., None] * np.sin(angle)


def _bursts(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Whether a neighbour is on, bool (*shape, 120): pieces of 5 - 30 s, each on with probability 0.55."""
    pieces = LONGEST // 5
    ends = np.cumsum(rng.uniform(5, 30, (*shape, pieces)), axis=-1)
    piece = (np.arange(LONGEST)[:, None] >= ends[..., None, :]).sum(-1)
    return np.take_along_axis(rng.random((*shape, pieces + 1)) < 0.55, piece, axis=-1)


def _simulate(
    runs: int, rng: np.random.Generator, dynamic: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Latent traces (N, 120, 14), performance (N,), valid seconds (N, 120), victims (N,)."""
    profile, time = _applications(), np.arange(LONGEST)
    victim = rng.integers(0, APPLICATIONS, runs)
    length = rng.integers(40, LONGEST + 1, runs)
    neighbour = rng.integers(0, APPLICATIONS, (runs, NEIGHBOURS))
    present = np.arange(NEIGHBOURS) < rng.integers(0, NEIGHBOURS + 1, runs)[:, None]
    bursts = _bursts((runs, NEIGHBOURS), rng)
    on = present[..., None] & (bursts | ~dynamic[:, None, None])
    act = _activity(victim, rng.random(runs), time)
    others = _activity(neighbour, rng.random((runs, NEIGHBOURS)), time) * on  # (N, 4, T)
    cache, bandwidth, network = (
        (others * values[neighbour][..., None]).sum(1) for values in (profile.cache, profile.bandwidth, profile.network)
    )
    own_cache, own_network = (values[victim][:, None] * act for values in (profile.cache, profile.network))
    total = own_cache + cache
    share = own_cache / total * np.minimum(total, _CACHE)
    missing = 1 - share / own_cache
    growth = 1 + missing  # miss ratio over that of a machine of its own
    miss = np.minimum(profile.miss[victim][:, None] * growth, 1)
    growth = miss / profile.miss[victim][:, None]
    own_bandwidth = profile.bandwidth[victim][:, None] * act * growth
    saturation = np.maximum((own_bandwidth + bandwidth) / _BANDWIDTH - 0.8, 0)
    congestion = np.maximum((own_network + network) / _NETWORK - 0.8, 0)
    slow = (
        1
        + profile.to_cache[victim][:, None] * 0.35 * (growth - 1)
        + 1.5 * profile.to_bandwidth[victim][:, None] * saturation * (1 + np.maximum(growth - 1, 0))
        + profile.to_network[victim][:, None] * congestion
    )
    # A machine alone may already saturate the host: its ideal is without neighbours, not without limits.
    alone = np.maximum(profile.bandwidth[victim][:, None] * act / _BANDWIDTH - 0.8, 0)
    alone_network = np.maximum(own_network / _NETWORK - 0.8, 0)
    slow = (
        slow - 1.5 * profile.to_bandwidth[victim][:, None] * alone - profile.to_network[victim][:, None] * alone_network
    )
    slow = np.maximum(slow, 1)
    valid = time < length[:, None]
    performance = (act * valid).sum(1) / (act * slow * valid).sum(1)
    latents = np.stack(
        [
            profile.cpu[victim][:, None] * act, share, miss, own_bandwidth, own_bandwidth + bandwidth, cache, bandwidth,
            network, own_network, profile.ipc[victim][:, None] / slow, own_cache, np.gradient(miss, axis=1),
            on.sum(1).astype(float), cache * bandwidth,
        ],
        axis=-1,
    )  # fmt: skip
    return latents, performance, valid, victim


def simulate_contention(runs: int, seed: int = 0, scenario: Scenario = "mixed") -> Runs:
    """Runs of machines beside none to four neighbours on one host.

    A victim's cache share, and so its miss ratio, bandwidth and network meet the neighbours' in each second: slow(t) is
    1 + terms of cache, bandwidth and network, and performance sum act / sum (act slow). The 206 metrics are sparse
    mixtures of 14 latent traces through four functions, with a gain of their own in a run (10 %) and noise (0.5).

    Args:
      runs: how many.
      seed: of everything but the applications and the metrics, which are always the same.
      scenario: neighbours always on ("static"), in bursts ("dynamic"), or one or the other ("mixed").

    Raises:
      ValueError: there are no runs, or the scenario is unknown.
    """
    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}")
    if scenario not in get_args(Scenario):
        raise ValueError(f"scenario must be one of {get_args(Scenario)}, got {scenario!r}")
    rng = np.random.default_rng(seed)
    dynamic = {"static": np.zeros(runs, bool), "dynamic": np.ones(runs, bool)}.get(scenario, rng.random(runs) < 0.5)
    latents, performance, valid, victim = _simulate(runs, rng, dynamic)
    mean, spread = _scales()
    weights, kind, offset = _mixture()
    mixed = ((latents - mean) / spread).astype(np.float32) @ weights.astype(np.float32) + offset.astype(np.float32)
    functions: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
        lambda v: v, np.tanh, lambda v: np.log1p(np.abs(v)), np.square,
    )  # fmt: skip
    x = np.empty_like(mixed)
    for index, function in enumerate(functions):
        x[..., kind == index] = function(mixed[..., kind == index])
    x *= 1 + 0.1 * rng.standard_normal((runs, 1, METRICS), dtype=np.float32)
    x += 0.5 * rng.standard_normal(x.shape, dtype=np.float32)
    x[~valid] = 0
    return Runs(
        x, valid.sum(1).astype(np.int32), performance.astype(np.float32), victim.astype(np.int32), dynamic
    )  # fmt: skip


def hold_out(runs: Runs, unseen: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the runs of most applications, and of those of `unseen` whole applications.

    Raises ValueError where that leaves none on a side.
    """
    if not 0 < unseen < APPLICATIONS:
        raise ValueError(f"unseen must be in 1 .. {APPLICATIONS - 1} applications, got {unseen}")
    chosen = np.random.default_rng(seed).permutation(APPLICATIONS)[:unseen]
    apart = np.isin(runs.application, chosen)
    return np.flatnonzero(~apart), np.flatnonzero(apart)


def coarser(runs: Runs, seconds: int) -> Runs:
    """The same runs at a lower resolution: every second shows the mean of its interval of `seconds`."""
    if seconds < 1:
        raise ValueError(f"seconds must be at least 1, got {seconds}")
    valid = np.arange(runs.x.shape[1]) < runs.length[:, None]
    x = np.zeros_like(runs.x)
    for start in range(0, runs.x.shape[1], seconds):
        part = slice(start, start + seconds)
        count = np.maximum(valid[:, part].sum(1), 1)[:, None]
        mean = (runs.x[:, part] * valid[:, part, None]).sum(1) / count
        x[:, part] = mean[:, None] * valid[:, part, None]
    return runs._replace(x=x)


def shuffled(runs: Runs, seed: int = 0) -> Runs:
    """The same runs with each metric's seconds in an order of its own: distributions stay, coincidences go."""
    rng = np.random.default_rng(seed)
    x = runs.x.copy()
    for row, length in zip(x, runs.length, strict=True):
        row[:length] = rng.permuted(row[:length], axis=0)
    return runs._replace(x=x)


def summary_statistics(x: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Mean, standard deviation and 90th percentile of each metric over a run: (N, 3 F)."""
    rows = [series[:count] for series, count in zip(x, length, strict=True)]
    return np.stack([np.concatenate([row.mean(0), row.std(0), np.quantile(row, 0.9, axis=0)]) for row in rows])

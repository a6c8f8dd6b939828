"""SNP arrays: real loci of known copy number put together to sequences, a simulator, windows with labels, baselines.

A probe has a log R ratio (LRR, log2 of its intensity over that of two copies) and, where it is of a SNP, a B-allele
frequency (BAF). A breakpoint is where the copies change: from (1, 1) to (0, 2) with no change of their number.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PADDING = -2.0  # behind a sequence's ends
NO_SNP = -1.0  # the BAF of a probe that is of no SNP
_ACNR = ("GSE11976_CRL2324", "GSE13372_HCC1143")


class Profile(NamedTuple):
    """N probes in the order of the genome, float32 (N,): LRR, BAF, total copy number, number of the state."""

    lrr: np.ndarray
    baf: np.ndarray
    copy_number: np.ndarray
    state: np.ndarray


class Windows(NamedTuple):
    """K windows.

    Attributes:
      x: float32 (K, 2, W, 1), BAF and LRR.
      label: int32 (K,), 1 where more than one copy number (or state) occurs.
      position: int32 (K,), the breakpoint nearest to the middle, counted from the window's start; -1 without one.
    """

    x: np.ndarray
    label: np.ndarray
    position: np.ndarray


def savitzky_golay_slope(track: np.ndarray) -> np.ndarray:
    """The first derivative of a linear fit to three neighbours (Savitzky and Golay 1964), along the last axis.

    (c[t + 1] - c[t - 1]) / 2, at the ends the slope of the fit to the three outermost values.

    Raises ValueError for fewer than three values.
    """
    track = np.asarray(track)
    if track.shape[-1] < 3:
        raise ValueError(f"a slope needs at least three values, got shape {track.shape}")
    inside = (track[..., 2:] - track[..., :-2]) / 2
    return np.concatenate([inside[..., :1], inside, inside[..., -1:]], axis=-1)


def breakpoints_from_copy_number(track: np.ndarray) -> np.ndarray:
    """Where a copy number changes: int, the last probe before each change.

    Of the indices at which |Savitzky-Golay slope| > 0.001 those whose successor is one too. A single probe between two
    equal ones, which a slope over three does not see, is none, as published.

    Args:
      track: (N,), copy numbers or numbers of states.
    """
    track = np.asarray(track)
    if track.ndim != 1:
        raise ValueError(f"a track must be (probes,), got shape {track.shape}")
    found = np.flatnonzero(np.abs(savitzky_golay_slope(track)) > 0.001)
    return found[:-1][np.diff(found) == 1]


class Loci(NamedTuple):
    """Real or simulated loci of one state and tumour fraction, in genomic order: LRR and BAF (N,)."""

    lrr: np.ndarray
    baf: np.ndarray


class AnnotatedLoci(NamedTuple):
    """Loci by state, such as "(0,2)" for (minor, major) copies, of one array and one tumour fraction."""

    states: dict[str, Loci]
    cellularity: float

    def half(self, second: bool) -> AnnotatedLoci:
        """The first or the second half of each state's loci, which share none: for training and for testing."""

        def cut(loci: Loci) -> Loci:
            middle = len(loci.lrr) // 2
            return Loci(*(array[middle:] if second else array[:middle] for array in loci))

        return AnnotatedLoci({state: cut(loci) for state, loci in self.states.items()}, self.cellularity)


def read_acnr(folder: str | pathlib.Path, array: str = "GSE11976_CRL2324", least: int = 100) -> list[AnnotatedLoci]:
    """Annotated regions of two public SNP arrays (Pierre-Jean et al., R package acnr, LGPL).

    "GSE11976_CRL2324": Illumina HumanCNV370, 7 states at several tumour fractions; "GSE13372_HCC1143": Affymetrix
    GenomeWideSNP_6, 4 states at 0 and 100 %.

    Args:
      folder: holds the array's .npz: total_cn_milli, baf_milli, region, regions, cellularity_pct.
      array: one of the two names.
      least: states with fewer loci are left out.

    Returns:
      One entry a tumour fraction, the smallest first.

    Raises:
      FileNotFoundError, ValueError: the file is not there, or the name unknown.
    """
    if array not in _ACNR:
        raise ValueError(f"array must be one of {_ACNR}, got {array!r}")
    path = pathlib.Path(folder) / f"{array}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the folder of {array}.npz")
    with np.load(path) as file:
        table = {name: file[name] for name in file.files}
    lrr = np.log2(np.maximum(table["total_cn_milli"], 50) / 2000).astype(np.float32)
    baf = np.where(table["baf_milli"] < -1000, NO_SNP, table["baf_milli"] / 1000).astype(np.float32)
    found = []
    for fraction in np.unique(table["cellularity_pct"]):
        states = {}
        for index, name in enumerate(table["regions"]):
            chosen = (table["cellularity_pct"] == fraction) & (table["region"] == index)
            if chosen.sum() >= least:
                states[str(name)] = Loci(lrr[chosen], baf[chosen])
        found.append(AnnotatedLoci(states, float(fraction) / 100))
    return found


def simulate_loci(count: int, cellularity: float, seed: int = 0, states: Sequence[str] | None = None) -> AnnotatedLoci:
    """Loci of an array with its waves, noise, genotype clusters and dilution by normal cells.

    With tumour fraction f and copies (a, b): n = 2 (1 - f) + f (a + b); LRR = 0.7 log2(n / 2) + an autoregressive wave
    (0.1) + Student noise (0.2); the BAF of a heterozygous SNP (f b + 1 - f) / n or its mirror image, of a
    homozygous one 0 or 1, all +- 0.03; a tenth of the probes is of no SNP.

    Args:
      count: loci of each state.
      cellularity: f, in [0, 1].
      seed: of all draws.
      states: such as "(0,1)"; None: deletion, copy-neutral loss of heterozygosity, normal, gain.

    Raises:
      ValueError: the fraction is out of range.
    """
    if not 0 <= cellularity <= 1:
        raise ValueError(f"cellularity must be in [0, 1], got {cellularity}")
    rng = np.random.default_rng(seed)
    found = {}
    for state in states or ("(0,1)", "(0,2)", "(1,1)", "(1,2)"):
        minor, major = map(int, state.strip("()").split(","))
        total = 2 * (1 - cellularity) + cellularity * (minor + major)
        wave = np.convolve(rng.normal(0, 1, count + 199), np.exp(-np.arange(200) / 40.0), mode="valid")
        lrr = 0.7 * np.log2(max(total, 0.05) / 2) + 0.1 * wave / wave.std() + 0.2 * rng.standard_t(5, count) / 1.29
        share = (cellularity * major + 1 - cellularity) / max(total, 0.05)
        heterozygous = np.where(rng.random(count) < 0.5, share, 1 - share)
        baf = np.where(rng.random(count) < 0.3, heterozygous, rng.integers(0, 2, count))
        baf = np.clip(baf + rng.normal(0, 0.03, count), 0, 1)
        baf = np.where(rng.random(count) < 0.1, NO_SNP, baf)
        found[state] = Loci(lrr.astype(np.float32), baf.astype(np.float32))
    return AnnotatedLoci(found, cellularity)


def acnr_sequence(
    loci: AnnotatedLoci,
    probes: int,
    segments: tuple[int, int] = (500, 20_000),
    seed: int = 0,
    states: Sequence[str] | None = None,
) -> Profile:
    """A sequence with exactly known breakpoints, of consecutive real loci.

    Lengths of segments are log-uniform, states random and other than the last one's; a segment takes the loci from a
    random place of its state on, around its end if need be.

    Args:
      loci: from `read_acnr` or `simulate_loci`.
      probes: N.
      segments: shortest and longest.
      seed: of all draws.
      states: those to use; None: all.

    Raises:
      ValueError: fewer than two states, an unknown one, or lengths out of order.
    """
    names = list(loci.states if states is None else states)
    if len(names) < 2 or not set(names) <= set(loci.states):
        raise ValueError(f"expected two or more of the states {list(loci.states)}, got {names}")
    if not 1 <= segments[0] <= segments[1]:
        raise ValueError(f"segments must be a shortest and a longest length, got {segments}")
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    state, done = -1, 0
    while done < probes:
        state = int(rng.choice([index for index in range(len(names)) if index != state]))
        length = min(int(np.exp(rng.uniform(*np.log(segments)))), probes - done)
        source = loci.states[names[state]]
        rows = (rng.integers(len(source.lrr)) + np.arange(length)) % len(source.lrr)
        total = sum(map(int, names[state].strip("()").split(",")))
        parts.append(np.stack([source.lrr[rows], source.baf[rows], np.full(length, total), np.full(length, state)]))
        done += length
    return Profile(*np.concatenate(parts, axis=1).astype(np.float32))


def simulate_snp_array(
    probes: int, cellularity: float = 0.8, segments: tuple[int, int] = (500, 20_000), seed: int = 0
) -> Profile:
    """A sequence of simulated loci; see `simulate_loci` and `acnr_sequence`."""
    return acnr_sequence(simulate_loci(20_000, cellularity, seed), probes, segments, seed)


def window_at(sequence: Profile, start: int, width: int) -> tuple[np.ndarray, int, int]:
    """The window from a probe on, padded with -2 beyond the ends: x (2, width, 1), its label, its breakpoint or -1."""
    first, last = max(start, 0), min(start + width, len(sequence.lrr))
    x = np.full((2, width, 1), PADDING, np.float32)
    inside = slice(first - start, last - start)
    x[0, inside, 0], x[1, inside, 0] = sequence.baf[first:last], sequence.lrr[first:last]
    changes = np.flatnonzero(np.diff(sequence.state[first:last])) + first - start
    if not len(changes):
        return x, 0, -1
    return x, 1, int(changes[np.abs(changes - width // 2).argmin()])


def make_windows(sequence: Profile, margin: int, seed: int = 0, jitter: bool = True) -> Windows:
    """Windows of 4 margins: one at each breakpoint, and some far from all.

    The positive window of a breakpoint b starts uniformly in [max(0, b - W + margin / 2), b - margin / 2), without
    `jitter` so that b is in its middle. Where two breakpoints are at least 3 W apart, four negative windows have their
    centres at random places at least W from both.

    Args:
      sequence: with its states.
      margin: a quarter of W.
      seed: of all draws.
      jitter: see there.

    Raises:
      ValueError: the margin is not positive.
    """
    if margin < 2:
        raise ValueError(f"margin must be at least 2, got {margin}")
    rng, width, probes = np.random.default_rng(seed), 4 * margin, len(sequence.lrr)
    # A state's number is what changes everywhere: a copy number stays where an allele is lost and the other doubled.
    breakpoints = breakpoints_from_copy_number(sequence.state)
    starts: list[int] = []
    for b in breakpoints:
        low, high = max(0, b - width + margin // 2), b - margin // 2
        starts.append(int(rng.integers(low, high)) if jitter and high > low else int(b) - width // 2)
    for left, right in zip([0, *breakpoints], [*breakpoints, probes - 1], strict=True):
        if right - left >= 3 * width:
            starts += (rng.integers(left + width, right - width + 1, 4) - width // 2).tolist()
    rows = [window_at(sequence, start, width) for start in starts]
    if not rows:
        return Windows(np.zeros((0, 2, width, 1), np.float32), np.zeros(0, np.int32), np.zeros(0, np.int32))
    x, label, position = zip(*rows, strict=True)
    return Windows(np.stack(x), np.array(label, np.int32), np.array(position, np.int32))


def balanced_windows(
    loci: AnnotatedLoci, margin: int, count: int, seed: int = 0, states: Sequence[str] | None = None
) -> Windows:
    """`count` windows of 4 margins, half of them with a breakpoint, of as many sequences as that takes.

    Segments are between one and eight windows long, so that there are far places and a window has seldom two changes.
    """
    width, rng = 4 * margin, np.random.default_rng(seed)
    kept: dict[int, list[tuple[np.ndarray, int]]] = {0: [], 1: []}
    wanted = {0: count // 2, 1: count - count // 2}
    while any(len(kept[label]) < wanted[label] for label in kept):
        number = int(rng.integers(2**31))
        sequence = acnr_sequence(loci, 60 * width, (width, 8 * width), number, states)
        found = make_windows(sequence, margin, number)
        for x, label, position in zip(*found, strict=True):
            if len(kept[int(label)]) < wanted[int(label)]:
                kept[int(label)].append((x, int(position)))
    rows = [(x, label, position) for label in kept for x, position in kept[label]]
    order = rng.permutation(len(rows))
    return Windows(
        np.stack([rows[i][0] for i in order]),
        np.array([rows[i][1] for i in order], np.int32),
        np.array([rows[i][2] for i in order], np.int32),
    )


class Split(NamedTuple):
    """The best cut of each track in two: what it gains by the Bayesian information criterion, and its place."""

    gain: np.ndarray
    position: np.ndarray


def binary_segmentation(tracks: np.ndarray, least: int = 5) -> Split:
    """The first step of binary segmentation with Gaussian noise, the classical baseline (as circular ones begin).

    gain = N log(RSS) - N log(RSS of the best cut) - 2 log N, for two parameters more: a cut is made where it is
    positive, or above another threshold.

    Args:
      tracks: float (K, N), the LRR of windows, say.
      least: probes on each side of a cut.

    Raises:
      ValueError: tracks are too short for a cut.
    """
    count = tracks.shape[-1] if tracks.ndim == 2 else 0
    if count < 2 * least:
        raise ValueError(f"tracks must be (windows, at least {2 * least} probes), got shape {tracks.shape}")
    values = tracks - tracks.mean(1, keepdims=True, dtype=np.float64)
    total = (values**2).sum(1)
    sums = np.cumsum(values, axis=1)[:, least - 1 : count - least]
    left = np.arange(least, count - least + 1)
    between = sums**2 / left + sums**2 / (count - left)  # the mean is zero, so both sides' sums are opposite
    place = between.argmax(1)
    rest = np.maximum(total - between.max(1), 1e-12)
    gain = count * np.log(np.maximum(total, 1e-12) / rest) - 2 * np.log(count)
    return Split(gain, place + least - 1)


class DatProfile(NamedTuple):
    """One patient's profile from a `.dat` file: chromosome (N,) of str, and float (N,) tracks by name."""

    chromosome: np.ndarray
    tracks: dict[str, np.ndarray]


_COLUMNS = ("Chr", "Pos", "LRR", "BAF", "tCN", "cCN", "GC", "MAP")


def read_dat(path: str | pathlib.Path) -> DatProfile:
    """Reads a curated profile: tab-separated lines under the header `#Chr Pos LRR BAF tCN cCN GC MAP`.

    tCN is the true copy number, cCN another program's; a BAF of -1 is of a probe without a SNP.

    Raises:
      FileNotFoundError, ValueError: the file is not there, or a line is not what the header says.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    lines = path.read_text().splitlines()
    header = tuple(lines[0].lstrip("#").split()) if lines else ()
    if header != _COLUMNS:
        raise ValueError(f"{path}: expected the header {'#' + ' '.join(_COLUMNS)!r}, got {lines[0] if lines else ''!r}")
    chromosomes, rows = [], []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        cells = line.split("\t")
        try:
            rows.append([float(cell) for cell in cells[1:]])
            if len(cells) != len(_COLUMNS):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: expected {len(_COLUMNS)} cells, numbers behind the first, got {line!r}"
            ) from None
        chromosomes.append(cells[0])
    table = np.array(rows, np.float64).reshape(-1, len(_COLUMNS) - 1)
    return DatProfile(np.array(chromosomes), dict(zip(_COLUMNS[1:], table.T, strict=True)))

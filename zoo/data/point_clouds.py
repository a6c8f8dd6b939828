"""Clouds of points: handwritten digits in relief, generated solids, surfaces of meshes, and the published sets' files.

A set is `PointClouds`: clouds of m points each, centred and scaled into the unit ball, with labels where there are any.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PointClouds(NamedTuple):
    """Clouds, and what they are of."""

    points: np.ndarray  # float32 (N, m, 3)
    labels: np.ndarray  # int32 (N,)
    names: tuple[str, ...]  # of the labels

    def split(self, test: float, seed: int = 0) -> tuple[PointClouds, PointClouds]:
        """Shuffled: the rest, and a share for tests."""
        if not 0 < test < 1:
            raise ValueError(f"test must be a share in (0, 1), got {test}")
        order = np.random.default_rng(seed).permutation(len(self.points))
        cut = max(round(test * len(order)), 1)
        return self.take(order[cut:]), self.take(order[:cut])

    def take(self, index: np.ndarray) -> PointClouds:
        """Those clouds."""
        return PointClouds(self.points[index], self.labels[index], self.names)


def normalized(points: np.ndarray) -> np.ndarray:
    """Clouds (..., m, 3) centred on their mean and scaled so that the farthest point is at 1: float32."""
    points = points - points.mean(-2, keepdims=True)
    radius = np.linalg.norm(points, axis=-1).max(-1)[..., None, None]
    return (points / np.where(radius > 0, radius, 1)).astype(np.float32)


def resampled(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of each cloud's points (N, m, 3), drawn with replacement, as the published recipe does at each visit."""
    index = rng.integers(0, points.shape[1], (len(points), count))
    return np.take_along_axis(points, index[..., None], axis=1)


def digits3d(count: int = 512, seed: int = 0, samples: int | None = None) -> PointClouds:
    """scikit-learn's 1,797 handwritten digits as reliefs: real shapes with 10 labels.

    A pixel (row r, column c) with ink g > 0 of 16 gives points at (c, -r) with a density proportional to g, jittered by
    half a pixel, and as thick as its ink: |z| <= 0.15 g / 16 pixels.

    Args:
      count: points a cloud.
      seed: of the points.
      samples: how many digits, the first ones; None is all.

    Raises ModuleNotFoundError where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install 'zoo[demo]'") from None
    found = load_digits()
    rng = np.random.default_rng(seed)
    clouds = []
    for image in found.images[:samples]:
        ink = image.ravel() / image.sum()
        pixel = rng.choice(image.size, count, p=ink)
        row, column = np.divmod(pixel, image.shape[1])
        across = rng.uniform(-0.5, 0.5, (2, count))
        height = rng.uniform(-0.15, 0.15, count) * image.ravel()[pixel] / 16
        clouds.append(np.stack([column + across[0], -row + across[1], height], -1))
    labels = found.target[:samples].astype(np.int32)
    return PointClouds(normalized(np.stack(clouds)), labels, tuple(map(str, range(10))))


SOLIDS = ("chair", "table", "torus", "cylinder", "cone", "box", "ellipsoid", "airplane")


def _box(low: Sequence[float], high: Sequence[float]) -> tuple[float, object]:
    """A box's area, and a function of (rng, count) to points on its surface."""
    low_, size = np.asarray(low, float), np.asarray(high, float) - np.asarray(low, float)
    faces = np.array([size[1] * size[2], size[0] * size[2], size[0] * size[1]])

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        axis = rng.choice(3, count, p=faces / faces.sum())
        place = rng.random((count, 3))
        place[np.arange(count), axis] = rng.integers(0, 2, count)
        return low_ + size * place

    return 2 * faces.sum(), draw


def _ellipsoid(radii: Sequence[float], centre: Sequence[float] = (0, 0, 0)) -> tuple[float, object]:
    r = np.asarray(radii, float)

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        kept, have = [], 0
        while have < count:  # a sphere's point stays with the probability of how much its surroundings are stretched
            x = rng.normal(size=(4 * count, 3))
            x /= np.linalg.norm(x, axis=-1, keepdims=True)
            stretch = np.linalg.norm(x / r, axis=-1) * r.min()
            kept.append(x[rng.random(len(x)) < stretch])
            have += len(kept[-1])
        return np.concatenate(kept)[:count] * r + np.asarray(centre)

    # Knud Thomsen's approximation of the area, within a percent or so.
    p = 1.6075
    products = (r[0] * r[1]) ** p + (r[0] * r[2]) ** p + (r[1] * r[2]) ** p
    return 4 * np.pi * (products / 3) ** (1 / p), draw


def _round(lower: float, upper: float, height: float) -> tuple[float, object]:
    """A cylinder or a cone with its lids; radii below and above."""
    slant = float(np.hypot(height, lower - upper))
    areas = np.array([np.pi * (lower + upper) * slant, np.pi * lower**2, np.pi * upper**2])

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        part, angle = rng.choice(3, count, p=areas / areas.sum()), rng.uniform(0, 2 * np.pi, count)
        u = rng.random(count)
        # Along the slope the density is proportional to the radius.
        along = u if lower == upper else (lower - np.sqrt(lower**2 + u * (upper**2 - lower**2))) / (lower - upper)
        radius = np.select(
            [part == 0, part == 1], [lower + along * (upper - lower), lower * np.sqrt(u)], upper * np.sqrt(u)
        )
        z = height * np.select([part == 0, part == 1], [along, 0.0], 1.0)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], -1)

    return float(areas.sum()), draw


def _torus(large: float, small: float) -> tuple[float, object]:
    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        kept, have = [], 0
        while have < count:
            v = rng.uniform(0, 2 * np.pi, 3 * count)
            v = v[rng.random(len(v)) < (large + small * np.cos(v)) / (large + small)]
            kept.append(v)
            have += len(v)
        v, u = np.concatenate(kept)[:count], rng.uniform(0, 2 * np.pi, count)
        ring = large + small * np.cos(v)
        return np.stack([ring * np.cos(u), ring * np.sin(u), small * np.sin(v)], -1)

    return 4 * np.pi**2 * large * small, draw


def _legs(half_width: float, half_depth: float, height: float, thickness: float) -> list:
    corners = [(x, y) for x in (-half_width, half_width - thickness) for y in (-half_depth, half_depth - thickness)]
    return [_box((x, y, 0), (x + thickness, y + thickness, height)) for x, y in corners]


def _solid(kind: str, rng: np.random.Generator) -> list:
    """The parts of a solid of random proportions."""
    size = lambda low, high: float(rng.uniform(low, high))  # noqa: E731
    if kind in ("chair", "table"):
        w, d, h, t = size(0.35, 0.6), size(0.35, 0.6), size(0.4, 0.8), size(0.04, 0.09)
        if kind == "table":
            w, d = 1.6 * w, 1.6 * d
        parts = [*_legs(w, d, h, t), _box((-w, -d, h), (w, d, h + t))]
        return [*parts, _box((-w, d - t, h + t), (w, d, h + size(0.5, 1.0)))] if kind == "chair" else parts
    if kind == "torus":
        return [_torus(1.0, size(0.15, 0.5))]
    if kind == "cylinder":
        radius = size(0.2, 0.8)
        return [_round(radius, radius, size(0.5, 2.0))]
    if kind == "cone":
        return [_round(size(0.3, 0.9), size(0.0, 0.15), size(0.6, 2.0))]
    if kind == "box":
        return [_box((0, 0, 0), (size(0.3, 1), size(0.3, 1), size(0.3, 1)))]
    if kind == "ellipsoid":
        return [_ellipsoid((size(0.3, 1), size(0.3, 1), size(0.3, 1)))]
    length = size(0.8, 1.2)  # an airplane: body, wings, tail
    return [
        _ellipsoid((length, 0.12, 0.12)),
        _ellipsoid((size(0.12, 0.25), size(0.7, 1.1), 0.03)),
        _ellipsoid((0.1, size(0.2, 0.4), 0.03), (-0.85 * length, 0, size(0.05, 0.2))),
    ]


def cad_shapes(samples: int, count: int = 512, seed: int = 0, kinds: Sequence[str] = SOLIDS) -> PointClouds:
    """Solids of random proportions, turned about the vertical axis; points uniform over their surface.

    Args:
      samples: clouds, the kinds in turn.
      count: points a cloud.
      seed: of everything.
      kinds: of `SOLIDS`.
    """
    unknown = sorted(set(kinds) - set(SOLIDS))
    if unknown or samples < 1:
        raise ValueError(f"there must be a sample, of kinds among {SOLIDS}, got {samples} of {unknown or kinds}")
    rng = np.random.default_rng(seed)
    clouds = []
    for index in range(samples):
        parts = _solid(kinds[index % len(kinds)], rng)
        areas = np.array([area for area, _ in parts])
        shares = rng.multinomial(count, areas / areas.sum())
        points = np.concatenate([draw(rng, share) for (_, draw), share in zip(parts, shares, strict=True) if share])
        angle = rng.uniform(0, 2 * np.pi)
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        clouds.append(rng.permutation(points @ turn.T))
    labels = (np.arange(samples) % len(kinds)).astype(np.int32)
    return PointClouds(normalized(np.stack(clouds)), labels, tuple(kinds))


def joined(*sets: PointClouds) -> PointClouds:
    """Several sets as one; labels of later ones count on."""
    offsets = np.cumsum([0, *(len(one.names) for one in sets[:-1])])
    return PointClouds(
        np.concatenate([one.points for one in sets]),
        np.concatenate([one.labels + offset for one, offset in zip(sets, offsets, strict=True)]).astype(np.int32),
        tuple(name for one in sets for name in one.names),
    )


def read_off(path: str | pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """A mesh of an OFF file, as ModelNet has them: vertices float64 (V, 3) and triangles int64 (F, 3).

    Faces of more corners are cut into triangles around their first. Counts that follow "OFF" on the same line, without
    a space even, are read as ModelNet's files need it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not what it says; the message names the file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    lines = (line.split("#")[0].strip() for line in path.read_text(errors="replace").splitlines())
    words = " ".join(line for line in lines if line).split()
    if not words or not words[0].startswith("OFF"):
        raise ValueError(f"{path} is not an OFF file: it starts with {words[:1]}")
    words = ([words[0][3:]] if len(words[0]) > 3 else []) + words[1:]
    try:
        count, faces = int(words[0]), int(words[1])
        vertices = np.array(words[3 : 3 + 3 * count], float).reshape(count, 3)
        triangles, place = [], 3 + 3 * count
        for _ in range(faces):
            corners = [int(word) for word in words[place + 1 : place + 1 + int(words[place])]]
            if len(corners) != int(words[place]):
                raise ValueError("it ends within a face")
            triangles += [(corners[0], *pair) for pair in itertools.pairwise(corners[1:])]
            place += 1 + len(corners)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    index = np.array(triangles, np.int64).reshape(-1, 3)
    if index.size == 0 or index.min() < 0 or index.max() >= count:
        raise ValueError(f"{path} is damaged: it has no face, or a corner that is no vertex")
    return vertices, index


def sample_surface(vertices: np.ndarray, triangles: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Points uniform over a mesh's surface, float64 (count, 3). Raises ValueError for a surface without area."""
    a, b, c = (vertices[triangles[:, corner]] for corner in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=-1)
    if not area.sum() > 0:
        raise ValueError("the mesh has no area")
    chosen = rng.choice(len(area), count, p=area / area.sum())
    root, v = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    return (1 - root) * a[chosen] + root * (1 - v) * b[chosen] + root * v * c[chosen]


def read_meshes(folder: str | pathlib.Path, count: int = 2048, seed: int = 0) -> PointClouds:
    """Clouds on the surfaces of all OFF files below a folder; each file's label is its first folder's name."""
    folder = pathlib.Path(folder)
    paths = sorted(folder.rglob("*.off"))
    if not paths:
        raise FileNotFoundError(f"no .off file below {folder}")
    rng = np.random.default_rng(seed)
    kinds = [path.relative_to(folder).parts[0] if path.parent != folder else folder.name for path in paths]
    names = tuple(sorted(set(kinds)))
    clouds = np.stack([sample_surface(*read_off(path), count, rng) for path in paths])
    return PointClouds(normalized(clouds), np.array([names.index(kind) for kind in kinds], np.int32), names)


def read_clouds(path: str | pathlib.Path) -> PointClouds:
    """The published sets: ShapeNet's .npz (key "data", (N, m, 3)) or ModelNet40's .h5 ("data" and "label").

    Raises:
      FileNotFoundError, ModuleNotFoundError: no such file; no h5py for an .h5.
      ValueError: another kind of file, or without clouds.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    labels = None
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            points = file.get("data")
    elif path.suffix in (".h5", ".hdf5"):
        try:
            import h5py
        except ModuleNotFoundError:
            raise ModuleNotFoundError("reading .h5 files needs h5py: pip install 'zoo[hdf5]'") from None
        with h5py.File(path, "r") as file:
            points = file["data"][()] if "data" in file else None
            labels = file["label"][()].reshape(-1) if "label" in file else None
    else:
        raise ValueError(f"expected a .npz, .h5 or .hdf5 file, got {path}")
    if points is None or points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(f"{path} must hold 'data' of shape (clouds, points, 3)")
    labels = np.zeros(len(points), np.int32) if labels is None else labels.astype(np.int32)
    return PointClouds(normalized(points), labels, tuple(map(str, range(int(labels.max()) + 1))))

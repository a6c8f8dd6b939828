"""How near clouds are to one another, and sets of clouds: Chamfer, exact transport, and the scores of generation."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.papers.vdsw.sliced import check_clouds


def chamfer(x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean squared distance to the nearest neighbour, from x to y plus from y to x: (B,).

    Args:
      x, y: (B, m, d) and (B, n, d).
    """
    check_clouds(x, y)
    cross = jnp.einsum("bmd,bnd->bmn", x, y, precision=jax.lax.Precision.HIGHEST)
    square = jnp.sum(jnp.square(x), -1)[:, :, None] + jnp.sum(jnp.square(y), -1)[:, None] - 2 * cross
    square = jnp.maximum(square, 0)
    return square.min(2).mean(1) + square.min(1).mean(1)


def emd_exact(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Earth mover's distance, exactly: the least mean distance that points have to go, (B,) float64 (on the host).

    By the network simplex of POT; for equally many points it is an assignment.

    Args:
      x, y: (B, m, d) and (B, n, d).

    Raises ModuleNotFoundError where POT is not installed.
    """
    try:
        import ot
    except ModuleNotFoundError:
        raise ModuleNotFoundError("exact transport needs POT: pip install 'zoo[transport]'") from None
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    check_clouds(x, y)
    return np.array(
        [ot.emd2([], [], ot.dist(a, b, metric="euclidean"), numItermax=1_000_000) for a, b in zip(x, y, strict=True)]
    )


class GenerationScores(NamedTuple):
    """Of generated clouds beside real ones (Achlioptas et al. 2018; Lopez-Paz and Oquab 2017)."""

    jsd: float  # divergence of where points lie, in nats
    minimum_matching: float  # mean distance of each real cloud to the nearest generated one
    coverage: float  # share of the real clouds that are nearest to some generated one
    one_neighbour: float  # accuracy of telling both apart by the nearest neighbour; best is 0.5


def generation_scores(
    generated: np.ndarray, real: np.ndarray, distance: Literal["chamfer", "emd"] = "chamfer", resolution: int = 28
) -> GenerationScores:
    """Scores of a set of clouds (N, m, 3) beside another (M, m, 3), both in the unit ball."""
    both = np.concatenate([generated, real])
    count = len(generated)
    if distance not in ("chamfer", "emd"):
        raise ValueError(f"distance must be 'chamfer' or 'emd', got {distance!r}")
    pair = jax.jit(chamfer) if distance == "chamfer" else emd_exact
    matrix = np.zeros((len(both), len(both)))
    for row in range(len(both) - 1):
        others = both[row + 1 :]
        matrix[row, row + 1 :] = pair(np.broadcast_to(both[row], others.shape), others)
    matrix += matrix.T
    cross = matrix[:count, count:]
    np.fill_diagonal(matrix, np.inf)
    nearest = matrix.argmin(1) < count
    return GenerationScores(
        _divergence(generated, real, resolution),
        float(cross.min(0).mean()),
        len(np.unique(cross.argmin(1))) / len(real),
        float(np.mean(nearest == (np.arange(len(both)) < count))),
    )


def _divergence(a: np.ndarray, b: np.ndarray, resolution: int) -> float:
    """Jensen and Shannon's, of the shares of points in the cells of a grid over [-1, 1]^3."""
    shares = []
    for clouds in (a, b):
        places = np.clip(((clouds.reshape(-1, 3) + 1) / 2 * resolution).astype(int), 0, resolution - 1)
        counts = np.bincount(np.ravel_multi_index(tuple(places.T), (resolution,) * 3), minlength=resolution**3)
        shares.append(counts / counts.sum())
    middle = (shares[0] + shares[1]) / 2

    def divergence(share: np.ndarray) -> float:
        there = share > 0
        return float(np.sum(share[there] * np.log(share[there] / middle[there])))

    return (divergence(shares[0]) + divergence(shares[1])) / 2

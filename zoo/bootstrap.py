"""How certain a statistic of examples is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def bootstrap_interval(
    statistic: Callable[..., float], *arrays: np.ndarray, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of a statistic over examples drawn with replacement (Efron 1979).

    Args:
      statistic: of the arrays; draws for which it is not finite (one class only, say) do not count.
      *arrays: all with the examples as first axis.
      draws: how many.
      level: of the interval, in (0, 1).
      seed: of the draws.

    Returns:
      Lower and upper end.

    Raises:
      ValueError: there are no examples, or not as many in each array, or no draw gives a finite number.
    """
    if not arrays or not len(arrays[0]) or any(len(array) != len(arrays[0]) for array in arrays):
        raise ValueError(f"expected arrays of equally many examples, got lengths {[len(array) for array in arrays]}")
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(arrays[0]), (draws, len(arrays[0])))
    values = np.array([statistic(*(array[row] for array in arrays)) for row in rows])
    values = values[np.isfinite(values)]
    if not len(values):
        raise ValueError("the statistic is not finite in any draw")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

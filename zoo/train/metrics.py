"""Means of metrics over batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import SupportsFloat


class MeanAccumulator:
    """Weighted means of named scalars, summed in double precision. `state` is JSON, exact through a checkpoint.

    >>> accumulator = MeanAccumulator()
    >>> accumulator.add({"loss": 1.0}, weight=3)
    >>> accumulator.add({"loss": 2.0}, weight=1)
    >>> accumulator.means()
    {'loss': 1.25}
    """

    def __init__(self, state: Mapping | None = None) -> None:
        self._totals: dict[str, float] = dict(state["totals"]) if state else {}
        self._weight: float = state["weight"] if state else 0.0

    def add(self, metrics: Mapping[str, SupportsFloat], weight: float = 1.0) -> None:
        """Adds a batch's means; `weight` is its number of examples."""
        for name, value in metrics.items():
            self._totals[name] = self._totals.get(name, 0.0) + weight * float(value)
        self._weight += weight

    def means(self) -> dict[str, float]:
        """The means so far. Raises ValueError if nothing was added."""
        if not self._weight:
            raise ValueError("no batch was added: the data is empty")
        return {name: total / self._weight for name, total in self._totals.items()}

    @property
    def state(self) -> dict:
        """What the constructor takes to continue."""
        return {"totals": dict(self._totals), "weight": self._weight}

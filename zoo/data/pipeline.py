"""Grain pipelines over random-access sources."""

from __future__ import annotations

from typing import Any

import grain


def batches(
    source: Any, batch_size: int, *, shuffle_seed: int | None = None, drop_last: bool = True, epochs: int | None = 1
) -> grain.MapDataset:
    """Batches of a random-access source, as a Grain dataset (index it, iterate over it, or `.to_iter_dataset()`).

    Args:
      source: anything with `__len__` and `__getitem__` whose items are pytrees of arrays of equal shapes.
      batch_size: items a batch.
      shuffle_seed: another order every epoch, a function of this seed; None keeps the order.
      drop_last: leave out an epoch's incomplete last batch (the published protocol does, also for validation and test).
      epochs: how often; None is without end. `len(batches(source, n))` is the number of steps of an epoch.
    """
    if not 1 <= batch_size <= len(source):
        raise ValueError(f"batch_size must be between 1 and the {len(source)} items, got {batch_size}")
    dataset = grain.MapDataset.source(source)
    if shuffle_seed is not None:
        dataset = dataset.seed(shuffle_seed).shuffle()
    dataset = dataset.batch(batch_size, drop_remainder=drop_last)
    return dataset if epochs == 1 else dataset.repeat(epochs)

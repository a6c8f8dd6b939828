"""TFDS data sets as Grain sources: ArrayRecord files read at random, TensorFlow neither imported nor installed."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorflow_datasets.core.data_sources.base import BaseDataSource


def array_record_source(name: str, split: str, data_dir: str | pathlib.Path) -> BaseDataSource:
    """A prepared TFDS data set as a random-access source for Grain (`grain.MapDataset.source`, `zoo.data.pipeline`).

    Args:
      name: "dataset" or "dataset/config", of the TFDS catalogue or of a builder that has been imported.
      split: such as "train" or "train[:80%]".
      data_dir: the folder below which TFDS prepared it, as ArrayRecord.

    Returns:
      A sequence of examples, each a dictionary of numpy values as the data set's features say; it can be pickled, so
      Grain's worker processes can share it.

    Raises FileNotFoundError where it is not prepared there, ValueError for an unknown name or split or another format.
    """
    import tensorflow_datasets as tfds  # takes a second or two

    try:
        builder = tfds.builder(name, data_dir=str(data_dir))
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"no TFDS data set {name!r}") from error
    except ValueError as error:
        raise ValueError(f"no TFDS data set {name!r}: {str(error).splitlines()[0]}") from error
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"{name} is not prepared in {data_dir}: tfds.builder({name!r}, data_dir={str(data_dir)!r}, "
            "file_format='array_record').download_and_prepare()"
        )
    stored = builder.info.file_format
    if stored != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(f"{name} in {data_dir} is stored as {stored.value}, expected array_record")
    try:
        return builder.as_data_source(split)
    except (ValueError, KeyError) as error:
        known = ", ".join(builder.info.splits)
        raise ValueError(f"{name} has no split {split!r}; it has {known} ({error})") from None

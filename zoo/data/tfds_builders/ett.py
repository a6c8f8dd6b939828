"""TFDS builder of ETT, the electricity transformer temperatures that Informer was published with.

One split, "series": the rows in their order, so that windows may cross the borders of train, validation and test.
`zoo.data.ett` reads it back; `tfds.builder("ett/h1", data_dir=...)` works too once this module is imported.
"""

from __future__ import annotations

import pathlib
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.util import DownloadError

from zoo.data.ett import COLUMNS, FREQUENCIES, ROWS, SPLIT, URL
from zoo.data.time_series import read_csv

_DESCRIPTION = """\
Load of an electricity transformer (six columns) and its oil temperature (OT, the target), July 2016 to July 2018: two
transformers (1, 2), hourly (h) and every 15 minutes (m).
"""

_CITATION = """\
@inproceedings{zhou2021informer,
  title = {Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting},
  author = {Zhou, Haoyi and Zhang, Shanghang and Peng, Jieqi and Zhang, Shuai and Li, Jianxin and Xiong, Hui and
            Zhang, Wancai},
  booktitle = {AAAI},
  year = {2021}
}
"""


class Ett(tfds.core.GeneratorBasedBuilder):
    """Configs h1, h2, m1, m2: (date, seven float64 values) a row."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=name.removeprefix("ETT")) for name in FREQUENCIES)
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Optional: a folder that has ETTh1.csv, ... already; otherwise they are downloaded."

    def _info(self) -> tfds.core.DatasetInfo:
        values = tfds.features.Tensor(
            shape=(len(COLUMNS),), dtype=np.float64, encoding="bytes"
        )  # Example has no float64
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict({"date": tfds.features.Text(), "values": values}),
            homepage="https://github.com/zhouhaoyi/ETDataset",
            license="CC BY-ND 4.0",
            citation=_CITATION,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {SPLIT: self._generate_examples(self._csv(dl_manager))}

    def _csv(self, dl_manager: tfds.download.DownloadManager) -> pathlib.Path:
        name = f"ETT{self.builder_config.name}"
        try:
            given = pathlib.Path(dl_manager.manual_dir) / f"{name}.csv"
        except AssertionError:  # no such folder, or an empty one
            given = None
        if given is not None and given.is_file():
            return given
        address = URL.format(name=name)
        try:
            # TFDS knocks at an unreachable host for minutes before it says so.
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=30).close()
            path = pathlib.Path(dl_manager.download(address))
        except (OSError, DownloadError) as error:
            raise ConnectionError(
                f"{address} cannot be downloaded ({type(error).__name__}); with {name}.csv in a folder, give that"
            ) from error
        rows = len(read_csv(path, frequency=FREQUENCIES[name], columns=COLUMNS))
        if rows != ROWS[name]:
            raise ValueError(f"{address} gave {rows} rows, expected {ROWS[name]}: an incomplete download")
        return path

    def _generate_examples(self, path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
        series = read_csv(path, frequency=FREQUENCIES[f"ETT{self.builder_config.name}"], columns=COLUMNS)
        for i, (date, values) in enumerate(zip(series.dates.astype(str), series.values, strict=True)):
            yield i, {"date": date, "values": values}

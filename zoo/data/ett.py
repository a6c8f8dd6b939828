"""ETT, the electricity transformer data of the Informer paper: from CSV files, or as a TFDS data set in ArrayRecord.

Data: Zhou et al., "Informer", AAAI 2021, CC BY-ND 4.0. Not part of the zoo: `prepare_ett` downloads it.
"""

from __future__ import annotations

import pathlib

import numpy as np

from zoo.data.time_series import Series, read_csv
from zoo.errors import unknown

FREQUENCIES = {"ETTh1": "h", "ETTh2": "h", "ETTm1": "15min", "ETTm2": "15min"}
ROWS = {"ETTh1": 17420, "ETTh2": 17420, "ETTm1": 69680, "ETTm2": 69680}
COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
SPLIT = "series"
URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/{name}.csv"


def read_ett(name: str, data_dir: str | pathlib.Path) -> Series:
    """One of the ETT series: six loads, then the oil temperature OT (degrees Celsius), the target.

    Args:
      name: "ETTh1", "ETTh2" (hourly), "ETTm1" or "ETTm2" (every 15 minutes).
      data_dir: a folder with `{name}.csv`, or one where `prepare_ett` put the data set.

    Raises FileNotFoundError where neither is there, ValueError for another name or a damaged file.
    """
    frequency = _frequency(name)
    data_dir = pathlib.Path(data_dir)
    csv = data_dir / f"{name}.csv"
    if csv.is_file():
        return read_csv(csv, frequency=frequency, columns=COLUMNS)
    if not (data_dir / "ett" / name.removeprefix("ETT")).is_dir():
        raise FileNotFoundError(
            f"neither {csv} nor a prepared data set in {data_dir}; "
            f"zoo.data.ett.prepare_ett({name!r}, folder) downloads it"
        )
    from zoo.data.tfds import array_record_source
    from zoo.data.tfds_builders import ett as _registers  # noqa: F401

    config = name.removeprefix("ETT")
    try:
        source = array_record_source(f"ett/{config}", SPLIT, data_dir)
        rows = source.__getitems__(range(len(source)))
    except RuntimeError as error:  # of the ArrayRecord reader
        folder = data_dir / "ett" / config
        raise ValueError(f"the data set in {folder} is damaged, remove that and prepare it again: {error}") from None
    dates = np.array([row["date"].decode() for row in rows], "datetime64[s]")
    return Series(dates, np.stack([row["values"] for row in rows]), COLUMNS, frequency)


def prepare_ett(name: str, data_dir: str | pathlib.Path, csv_dir: str | pathlib.Path | None = None) -> pathlib.Path:
    """Builds the TFDS data set of a series below `data_dir` and returns its folder; built already, it stays.

    Args:
      name: as for `read_ett`.
      data_dir: where TFDS data sets live.
      csv_dir: a folder with `{name}.csv`; downloaded from the published address without it.

    Raises ConnectionError where the download fails, ValueError for a damaged file, FileNotFoundError for no such file.
    """
    _frequency(name)
    if csv_dir is not None and not (pathlib.Path(csv_dir) / f"{name}.csv").is_file():
        raise FileNotFoundError(f"no such file: {pathlib.Path(csv_dir) / f'{name}.csv'}")
    import tensorflow_datasets as tfds

    from zoo.data.tfds_builders.ett import Ett

    builder = Ett(config=name.removeprefix("ETT"), data_dir=str(data_dir), file_format="array_record")
    manual = None if csv_dir is None else str(csv_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
    return pathlib.Path(builder.data_dir)


def _frequency(name: str) -> str:
    if name not in FREQUENCIES:
        raise unknown("ETT series", name, FREQUENCIES)
    return FREQUENCIES[name]

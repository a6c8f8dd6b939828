"""The zoo's default time series: two real years of hourly road traffic and weather, out of an installed package."""

from __future__ import annotations

import importlib.util
import io
import pathlib
import zipfile

from zoo.data.time_series import Series, parse_csv

COLUMNS = ("clouds_all", "temp", "traffic_volume")


def hourly_traffic() -> Series:
    """Westbound traffic on Interstate 94 near Minneapolis and its weather, 2016-10-01 00:00 to 2018-09-30 23:00.

    17,520 hourly rows of: cloud cover (percent), temperature (kelvin) and, the target, traffic volume (vehicles an
    hour). The 104 hours that were not recorded (gaps of 9 hours at most) are interpolated linearly. Left out are snow
    (zero throughout), rain (zero throughout the validation and test months) and the weather in words.

    Data: J. Hogue, "Metro Interstate Traffic Volume", UCI Machine Learning Repository, 2019, doi 10.24432/C5X60B,
    CC BY 4.0; the two years come inside the Python package `autots`, which is located but not imported.

    Raises ModuleNotFoundError where that package is not installed, FileNotFoundError or ValueError where its file is
    gone or not what it was.
    """
    spec = importlib.util.find_spec("autots")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the hourly traffic data comes inside the package autots: pip install 'zoo[demo]'")
    path = pathlib.Path(spec.origin).parent / "datasets" / "data" / "traffic_hourly.zip"
    if not path.is_file():
        raise FileNotFoundError(
            f"autots is installed, but without {path}; the zoo's demo extra pins a release that has it"
        )
    try:
        with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
            lines = io.TextIOWrapper(file, "utf-8").read().splitlines()
    except (zipfile.BadZipFile, UnicodeDecodeError, OSError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return parse_csv(lines, str(path), columns=COLUMNS, date_column="datetime", missing="interpolate")

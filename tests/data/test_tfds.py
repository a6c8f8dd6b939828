import pathlib
import pickle
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest

from zoo.data.ett import COLUMNS, prepare_ett, read_ett
from zoo.data.pipeline import batches
from zoo.data.tfds import array_record_source
from zoo.data.time_series import forecast_windows

ROWS = 500


def write_csv(folder, name, step_minutes=60, rows=ROWS):
    values = np.random.default_rng(len(name)).normal(size=(rows, 7)).round(6)
    dates = np.datetime64("2016-07-01T00:00:00") + np.arange(rows) * np.timedelta64(step_minutes * 60, "s")
    lines = [
        f"{str(date).replace('T', ' ')},{','.join(map(repr, row))}"
        for date, row in zip(dates, values.tolist(), strict=True)
    ]
    (folder / f"{name}.csv").write_text("\n".join([",".join(["date", *COLUMNS]), *lines]) + "\n")


@pytest.fixture(scope="module")
def csv_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("csv")
    write_csv(folder, "ETTh1")
    write_csv(folder, "ETTm1", 15)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, csv_dir):
    folder = tmp_path_factory.mktemp("tfds")
    for name in ("ETTh1", "ETTm1"):
        prepare_ett(name, folder, csv_dir)
    return folder


@pytest.mark.parametrize("name", ["ETTh1", "ETTm1"])
def test_array_record_holds_what_the_csv_holds(csv_dir, prepared, name):
    assert [*prepared.glob(f"ett/{name[3:]}/*/*.array_record-*")]
    from_csv, from_record = read_ett(name, csv_dir), read_ett(name, prepared)
    np.testing.assert_array_equal(from_csv.values, from_record.values)
    np.testing.assert_array_equal(from_csv.dates, from_record.dates)
    assert from_record.columns == COLUMNS and from_record.frequency == from_csv.frequency


def test_preparing_again_changes_nothing(csv_dir, prepared):
    files = {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()}
    prepare_ett("ETTh1", prepared, csv_dir)
    assert files == {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()}


def test_source_feeds_grain_in_the_rows_order(csv_dir, prepared):
    source = array_record_source("ett/h1", "series", prepared)
    expected = read_ett("ETTh1", csv_dir).values
    assert len(source) == ROWS and len(array_record_source("ett/h1", "series[:10%]", prepared)) == ROWS // 10
    values = np.concatenate([batch["values"] for batch in batches(source, 100)])
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[7]["values"], expected[7])


def test_windows_over_the_prepared_series(prepared):
    data = forecast_windows(read_ett("ETTh1", prepared), seq_len=8, label_len=4, pred_len=4, borders=(300, 400, 500))
    assert [len(part) for part in data[:3]] == [289, 97, 97]


def test_tensorflow_is_not_imported(prepared):
    code = (
        "import sys; from zoo.data.ett import read_ett; assert 'tensorflow_datasets' not in sys.modules; "
        f"print(len(read_ett('ETTh1', {str(prepared)!r}))); assert 'tensorflow' not in sys.modules"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == str(ROWS), done.stderr


def test_wrong_names_and_places(tmp_path, csv_dir, prepared):
    with pytest.raises(ValueError, match="unknown ETT series 'ETTh3'; did you mean"):
        read_ett("ETTh3", csv_dir)
    with pytest.raises(FileNotFoundError, match=r"neither .*ETTh2\.csv nor a prepared data set .* downloads it"):
        read_ett("ETTh2", csv_dir)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*ETTh2\.csv"):
        prepare_ett("ETTh2", tmp_path, csv_dir)
    with pytest.raises(FileNotFoundError, match="ett/h2 is not prepared in"):
        array_record_source("ett/h2", "series", prepared)
    with pytest.raises(ValueError, match="ett/h1 has no split 'train'; it has series"):
        array_record_source("ett/h1", "train", prepared)
    with pytest.raises(ValueError, match="no TFDS data set 'no_such_thing'"):
        array_record_source("no_such_thing", "train", prepared)
    with pytest.raises(ValueError, match="no TFDS data set 'ett/h9'"):
        array_record_source("ett/h9", "series", prepared)


def test_damaged_files_are_named(tmp_path, csv_dir, prepared):
    shutil.copytree(prepared / "ett", tmp_path / "ett")
    (record,) = tmp_path.glob("ett/h1/*/*.array_record-*")
    record.write_bytes(record.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"ett/h1 is damaged, remove that and prepare it again"):
        read_ett("ETTh1", tmp_path)
    lines = (csv_dir / "ETTh1.csv").read_text().splitlines()
    (tmp_path / "ETTh1.csv").write_text("\n".join([*lines[:50], lines[50][:25]]))
    with pytest.raises(ValueError, match=r"ETTh1\.csv, line 51: 2 cells, the header has 8"):
        prepare_ett("ETTh1", tmp_path / "new", tmp_path)
    with pytest.raises(ValueError, match=r"ETTh1\.csv, line 51"):
        read_ett("ETTh1", tmp_path)


def test_unreachable_download_says_so_at_once(tmp_path, monkeypatch):
    def refuse(request, timeout):
        raise urllib.error.URLError(f"no route to {request.host}")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(ConnectionError, match=r"ETTh2\.csv cannot be downloaded .* with ETTh2\.csv in a folder"):
        prepare_ett("ETTh2", tmp_path / "data")


def test_download_of_too_few_rows_is_refused(tmp_path, csv_dir, monkeypatch):
    import tensorflow_datasets as tfds

    class Reached:
        def close(self):
            pass

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Reached())
    monkeypatch.setattr(tfds.download.DownloadManager, "download", lambda self, url: csv_dir / "ETTh1.csv")
    with pytest.raises(ValueError, match="gave 500 rows, expected 17420: an incomplete download"):
        prepare_ett("ETTh1", tmp_path / "data")

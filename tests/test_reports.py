import json

import pytest

import zoo
from zoo import reports
from zoo.files import atomic
from zoo.reports import Claim, Result


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "RESULTS", tmp_path)
    claims = (
        Claim("Water is wet.", "reproduced", {"wetness": [0.9, 1.0]}, seeds=(0, 1), published={"wetness": 1.0}),
        Claim("Fire is cold.", "not reproduced", {"temperature": 800.0}, baselines={"ice": 273.15}, remark="It burns."),
    )
    result = Result("informer", "cpu", "a real fire", claims)
    result.save(tmp_path / "informer.json")
    return result


def test_a_result_survives_the_disk(kept):
    assert reports.results() == [kept]


def test_failures_come_first(kept):
    page = reports.claims_page()
    assert page.index("Fire is cold.") < page.index("Water is wet.")
    assert "| baselines: ice | 273.1 |" in page and "| measured: wetness | 0.9, 1 |" in page and "It burns." in page
    assert page.count("| seeds | 0, 1 |") == 1  # of the claim that was trained
    assert page.count("| built from | official code |") == 2  # a reconstruction is called one


def test_papers_table_counts_reproduced_claims(kept):
    row = next(line for line in reports.papers_table().splitlines() if "`informer`" in line)
    assert row.endswith("| 1 of 2 |")


def test_readme_holds_the_generated_table():
    text = (reports.ROOT / "README.md").read_text()
    assert reports.readme_with_table(text) == text, "run `zoo readme`"
    with pytest.raises(ValueError, match="must hold the lines"):
        reports.readme_with_table("no marks")


def test_claims_page_is_up_to_date():
    assert (reports.ROOT / "experiments/README.md").read_text() == reports.claims_page(), "run `zoo report`"


def test_verdicts_are_words_we_know():
    with pytest.raises(ValueError, match="verdict must be one of"):
        Claim("x", "sort of", {})


def test_a_foreign_file_is_no_result(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"claims": [{"what": 1}]}))
    with pytest.raises(ValueError, match="is not an experiment's result"):
        reports.load_result(tmp_path / "x.json")


def test_nothing_is_half_written(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_not_a_number_is_not_written(tmp_path):
    result = Result("informer", "cpu", "none", (Claim("x", "not tested", {"loss": float("nan")}),))
    with pytest.raises(ValueError):
        result.save(tmp_path / "result.json")
    assert not list(tmp_path.iterdir())


def test_every_result_belongs_to_a_paper():
    assert all(zoo.paper(result.paper) for result in reports.results())

"""``report.json``: read whoever and whichever version wrote it, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from histoflare.report.page import write_page
from histoflare.report.report_file import ALWAYS, FORMAT, PARTS, drop_missing, read_report, sites_of
from tests.refusals import raises_reason
from tests.report.made import full_report
from tests.report.parsed import assert_loads_nothing, parse


def written(folder: Path, content: Any) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps(content))
    return path


def bare() -> dict[str, Any]:
    return {name: value for name, value in full_report().items() if name in ALWAYS}


def test_a_report_of_version_0_1_says_no_format_and_is_read(tmp_path: Path) -> None:
    old = full_report()
    del old["format"]
    assert "evaluated_model" not in old
    found = read_report(written(tmp_path, old))
    assert set(found) >= {*ALWAYS, *PARTS}
    write_page(found, tmp_path / "page.html")
    assert "amsterdam" in parse(tmp_path / "page.html").text


def test_a_report_without_any_part_has_a_page_without_them(tmp_path: Path) -> None:
    found = read_report(written(tmp_path, bare()))
    write_page(found, tmp_path / "page.html")
    assert_loads_nothing(tmp_path / "page.html")
    titles = parse(tmp_path / "page.html").text
    assert "Who took part" in titles and "amsterdam" in titles
    for part in ("Figures", "The model tested at the sites", "What the bounds are", "SHA-256 of the model"):
        assert part not in titles
    assert drop_missing(found) == bare()
    assert sites_of(found) >= {"amsterdam", "graz"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": FORMAT + 1}, [f"format {FORMAT + 1}", FORMAT]),
        ({"format": "2"}, ["format", "'2'"]),
        ({"participation": {}}, ["participation "]),
        ({"sites": []}, [" sites "]),
        ({"data": "sounds"}, [" data "]),
    ],
)
def test_what_cannot_be_read_is_one_line(change: dict[str, Any], says: list[object], tmp_path: Path) -> None:
    with raises_reason("JOB_INVALID", tmp_path, *says) as caught:
        read_report(written(tmp_path, full_report() | change))
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    content = bare()
    del content["guarantee"]
    with raises_reason("JOB_INVALID", "guarantee"):
        read_report(written(tmp_path, content))

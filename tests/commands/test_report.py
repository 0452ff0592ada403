"""``histoflare report``: pages from a run's files; what is no report is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from histoflare.bags.model_file import save_model
from histoflare.cli import app
from histoflare.errors import JobError
from histoflare.site.configuration import write_site_file
from tests.flare.bags_on_disk import write_site
from tests.report.made import full_report
from tests.report.parsed import assert_loads_nothing, parse
from tests.site.test_pictures import TASK


@pytest.fixture
def report_file(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "report.json"
    path.parent.mkdir()
    path.write_text(json.dumps(full_report()))
    return path


def test_the_page_lies_beside_its_report_or_where_asked(report_file: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["report", "page", str(report_file)]).exit_code == 0
    assert_loads_nothing(report_file.with_name("report.html"))
    asked = ["--out", str(tmp_path / "new" / "page.html")]
    assert CliRunner().invoke(app, ["report", "page", str(report_file), *asked]).exit_code == 0
    assert (tmp_path / "new" / "page.html").read_text() == report_file.with_name("report.html").read_text()


@pytest.mark.parametrize("content", ["", "[1]", '{"job": 1}', "\x00"])
def test_what_is_no_report_is_refused_and_nothing_is_written(content: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    found = CliRunner().invoke(app, ["report", "page", str(path)])
    assert isinstance(found.exception, JobError)
    assert not path.with_name("report.html").exists()
    assert isinstance(CliRunner().invoke(app, ["report", "page", str(tmp_path / "no")]).exception, JobError)


def test_a_sites_own_page(report_file: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    task = replace(
        TASK, labels=["glandular", "solid"], encoder="densenet121-random:v1", features=1024, patch_px=224
    )
    configuration = write_site(tmp_path, "graz")
    write_site_file(tmp_path / "histoflare.toml", configuration)
    save_model(tmp_path / "model.safetensors", task.build_model().state_dict(), task)
    arguments = [
        "--report",
        str(report_file),
        "--model",
        str(tmp_path / "model.safetensors"),
        "--name",
        "graz",
    ]
    out = tmp_path / "site-graz.html"
    found = CliRunner().invoke(
        app, ["report", "site", str(tmp_path / "histoflare.toml"), *arguments, "--out", str(out)]
    )
    assert found.exit_code == 0, found.output
    assert "graz" in parse(out).text
    assert str(tmp_path) not in out.read_text(), "no paths on a page"

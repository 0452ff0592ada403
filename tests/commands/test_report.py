"""``histoflare report``: pages from a run's files; what is no report is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from histoflare.cli import app
from histoflare.errors import JobError
from histoflare.model_file import save_model
from histoflare.site.configuration import SiteConfiguration, write_site_file
from tests.flare.bags_on_disk import write_site
from tests.masks.made import TASK as MASK_TASK
from tests.masks.made import make_site
from tests.report.made import full_report
from tests.report.made_masks import segmentation_facts
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


@pytest.fixture
def images_site(tmp_path: Path) -> list[str]:
    """Arguments for the page of a site with images: its file, name, and a network's file."""
    configuration = SiteConfiguration(images=make_site(tmp_path / "images", patients=3, side_px=64))
    write_site_file(tmp_path / "histoflare.toml", configuration)
    model = tmp_path / "model.safetensors"
    save_model(model, MASK_TASK.build_model().state_dict(), MASK_TASK)
    return [str(tmp_path / "histoflare.toml"), "--name", "tnbc-1", "--model", str(model)]


def test_the_own_page_of_a_site_with_images(images_site: list[str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps(full_report(**segmentation_facts())))
    out = tmp_path / "site.html"
    arguments = ["report", "site", *images_site, "--report", str(report), "--out", str(out)]
    found = CliRunner().invoke(app, [*arguments, "--pictures", "2"])
    assert found.exit_code == 0, found.output
    assert_loads_nothing(out)
    parsed = parse(out)
    assert len(parsed.named("img")) == 2 * 2
    assert "2 images of 3, test images first" in parsed.text
    assert str(tmp_path) not in out.read_text(), "no paths on a page"


def test_report_and_model_of_two_kinds_are_refused(
    images_site: list[str], report_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "site.html"
    arguments = ["report", "site", *images_site, "--report", str(report_file), "--out", str(out)]
    arguments[arguments.index("tnbc-1")] = "graz"
    found = CliRunner().invoke(app, arguments)
    assert isinstance(found.exception, JobError)
    assert "the model of a segmentation, the report is of a classification" in str(found.exception)
    assert not out.exists()

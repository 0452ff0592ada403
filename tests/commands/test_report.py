"""``histoflare report``: pages from a run's files; what is no report is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from histoflare.cli import app
from histoflare.errors import JobError
from histoflare.flare.site_policy import write_first_policy
from histoflare.model_file import save_model
from histoflare.privacy.accountant import epsilon
from histoflare.privacy.budget import Budget
from histoflare.privacy.ledger import Booking
from histoflare.privacy.policy import POLICIES
from histoflare.privacy.spend import Spend
from histoflare.privacy.words import IF_CA_IS_HONEST
from histoflare.report.guarantee_words import ALL_COLLUDE, say_epsilon
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.ledgers import audit_log_of, on_workstation, open_ledger
from histoflare.site.records import RunRecords
from histoflare.site.site_file import write_site_file
from histoflare.slides.manifest import read_manifest
from tests.flare.bags_on_disk import write_site
from tests.masks.made import TASK as MASK_TASK
from tests.masks.made import make_site
from tests.refusals import raises_reason
from tests.report.made import full_report
from tests.report.made_masks import segmentation_facts
from tests.report.parsed import assert_loads_nothing, parse
from tests.site.test_pictures import TASK

BAG_TASK = replace(
    TASK, labels=["glandular", "solid"], encoder="densenet121-random:v1", features=1024, patch_px=224
)


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
    task = BAG_TASK
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
        app, ["report", "site", "--site", str(tmp_path / "histoflare.toml"), *arguments, "--out", str(out)]
    )
    assert found.exit_code == 0, found.output
    assert "graz" in parse(out).text
    assert str(tmp_path) not in out.read_text(), "no paths on a page"


@pytest.fixture
def images_site(tmp_path: Path) -> list[str]:
    """Arguments for the page of a site with images: its file, name, and a network's file."""
    configuration = SiteConfiguration({"images": make_site(tmp_path / "images", patients=3, side_px=64)})
    write_site_file(tmp_path / "histoflare.toml", configuration)
    model = tmp_path / "model.safetensors"
    save_model(model, MASK_TASK.build_model().state_dict(), MASK_TASK)
    return ["--site", str(tmp_path / "histoflare.toml"), "--name", "tnbc-1", "--model", str(model)]


def test_the_own_page_of_a_site_with_images(images_site: list[str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps(full_report(**segmentation_facts())))
    out = tmp_path / "site.html"
    arguments = ["report", "site", *images_site, "--report", str(report), "--out", str(out)]
    found = CliRunner().invoke(app, [*arguments, "--pictures", "2"])
    assert found.exit_code == 0, found.output
    assert_loads_nothing(out)
    parsed = parse(out)
    assert len(parsed.named("img")) == (2 + 2) * 2  # image, outlines; given and federated mask
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
    assert found.exception.reason == "JOB_INVALID"
    said = str(found.exception)
    assert str(tmp_path / "model.safetensors") in said and "segmentation" in said and "classification" in said
    assert not out.exists()


# a site's own page, without anything of a lead's


@pytest.fixture
def own(tmp_path: Path) -> SiteConfiguration:
    """A site that trained two protected rounds of one run, answered one of them, and refused another run."""
    configuration = on_workstation("graz", write_site(tmp_path, "graz"))
    write_site_file(tmp_path / "histoflare.toml", configuration)
    ledger, log = open_ledger(configuration), audit_log_of(configuration)
    budget = Budget(8.0, 1e-5)
    asked: dict[str, Any] = {"about": "dp-patient: dp-sgd", "spend": Spend(4.0, 0.5, 3), "rounds": 5}
    roles = {f"p{index}": "train" for index in range(7)}
    reserved = ledger.reserve(run="run-1", roles=roles, budget=budget, **asked)
    first, second = (ledger.book(reserved, index, f"{index}" * 64, budget) for index in (0, 1))
    assert isinstance(first, Booking) and isinstance(second, Booking)
    ledger.release(first, "a" * 64)
    ledger.fail(second)
    log.write("refused", run="run-0", reason="PURPOSE_NOT_ALLOWED", detail="not for <this>")
    log.write("released", run="run-1", kind="update", round=0)
    log.write("refused", run="run-2", reason="BUDGET_EXHAUSTED", detail="too much")
    records = RunRecords(configuration.records, "run-1", "graz")
    records.claim(BAG_TASK.to_json(), {"name": "fedavg"}, None)
    for index, loss in enumerate((2.5, 1.5)):
        records.add_scalars(index, {"loss": loss})
    return configuration


def site_page(tmp_path: Path, *options: str) -> str:
    out = tmp_path / "page.html"
    arguments = ["report", "site", "--site", str(tmp_path / "histoflare.toml"), "--out", str(out), *options]
    found = CliRunner().invoke(app, arguments)
    if isinstance(found.exception, JobError):
        raise found.exception
    assert found.exit_code == 0, found.output
    assert_loads_nothing(out)
    return parse(out).text


def test_own_records_say_what_left_and_what_it_cost(own: SiteConfiguration, tmp_path: Path) -> None:
    said = site_page(tmp_path)
    assert "run run-1" in said and "Updates left the site in 1 of at most 5 rounds." in said
    assert "update let out 7 yes, booked" in said
    assert "failed: nothing left, and the round is paid for 7 yes, booked" in said
    # Opened, the run is charged its five reserved rounds of three steps.
    charged = say_epsilon({"epsilon": epsilon([Spend(4.0, 0.5, 15)], 1e-5, "rdp")})
    assert f"spent ε = {charged} (RDP)" in said and "2 of 5 reserved rounds are booked" in said
    assert "Mean training loss" in said
    assert "Other runs of this site: run-0, run-2" in said


@pytest.mark.parametrize("has_policy", [False, True])
def test_a_run_with_shared_noise_has_both_figures_on_the_sites_page(
    own: SiteConfiguration, tmp_path: Path, has_policy: bool
) -> None:
    if has_policy:
        policy = (POLICIES / "dp-shared.toml").read_text().replace("colluders = 1", "colluders = 2")
        (tmp_path / "policy_dp-shared.toml").write_text(policy)
        write_first_policy(tmp_path)
    ledger, spend = open_ledger(own), Spend(4.0, 0.5, 1, honest=3)
    budget = Budget(8.0, 1e-5, 1, 40.0)
    asked: dict[str, Any] = {"about": "dp-shared: dp-sgd-shared", "rounds": 4, "budget": budget}
    roles = {f"q{index}": "train" for index in range(7)}
    reserved = ledger.reserve(run="run-3", roles=roles, spend=spend, trusts_ca=has_policy, **asked)
    ledger.book(reserved, 0, "5" * 64, budget, countable=4)
    audit_log_of(own).write("released", run="run-3", kind="update", round=0)
    said = site_page(tmp_path, "--run", "run-3")
    # With two colluders what was booked at four known sites has two honest ones; three are to come.
    events = [spend.against(2), spend.against(3).times(3)] if has_policy else [spend.against(3).times(4)]
    holds = Budget(8.0, 1e-5, 2, 20.0)  # the policy's; a site without one has no filter to count by
    counted = holds.spent(events) if has_policy else epsilon(events, 1e-5, "rdp")
    charged, way = say_epsilon({"epsilon": counted}), "" if has_policy else " (RDP)"
    whom = "the server and any 2 other sites" if has_policy else "the server and any 1 other site"
    assert f"spent ε = {charged}{way} at δ = 1e-5 against {whom}" in said
    worst = [spend.alone().times(4)]
    counted = holds.if_all_collude.spent(worst) if has_policy else epsilon(worst, 1e-5, "rdp")
    alone = say_epsilon({"epsilon": counted})
    assert f"{ALL_COLLUDE}, ε = {alone}" in said
    assert (IF_CA_IS_HONEST in said) == has_policy
    assert ("over all jobs" in said) == has_policy


def test_a_run_that_was_refused_says_why_in_the_sites_words(own: SiteConfiguration, tmp_path: Path) -> None:
    said = site_page(tmp_path, "--run", "run-0")
    assert "No update left the site. Refused with PURPOSE_NOT_ALLOWED (1×)." in said
    assert "not for <this>" in said and "nothing left, and nothing was spent" in said
    with raises_reason("RUN_INVALID", "run-9: ", "run-0, run-2, run-1"):
        site_page(tmp_path, "--run", "run-9")


def test_the_answers_to_an_evaluation_are_on_the_page(own: SiteConfiguration, tmp_path: Path) -> None:
    manifest = read_manifest(own.files["manifest"], BAG_TASK.labels, check_files=False)
    row = next(row for row in manifest.rows if row.split == "test")
    records = RunRecords(own.records, "run-1", "graz")
    header = ["slide", "patient", "label", "predicted", "p_glandular", "p_solid"]
    shares = ["0.125", "0.875"] if row.label == "solid" else ["0.875", "0.125"]
    records.write_predictions(
        "test", header, [[manifest.row_id(row), row.patient, row.label, row.label, *shares]]
    )
    said = site_page(tmp_path)
    assert "names the right label for 1 of 1 test slide" in said and "0.875" in said

"""The consortium's page says what the report says, and nothing else."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from histoflare.lab import generated
from histoflare.privacy.plan import DpSgd, UpdateNoise
from histoflare.reasons import explain
from histoflare.report.figures import WHY_WITHHELD
from histoflare.report.generated import GeneratedImage
from histoflare.report.guarantee_words import ALL_COLLUDE, say_epsilon
from histoflare.report.page import write_page
from histoflare.report.rendering import write_interval
from histoflare.report.site_page import encode_picture
from histoflare.rounds.comparison import SiteComparison
from histoflare.rounds.evaluation import Figure
from tests.report.made import HOSTILE, full_report, many_sites, metrics, protected_report, row
from tests.report.parsed import Parsed, assert_loads_nothing, parse


def written(report: dict[str, Any], folder: Path) -> Parsed:
    """Write the page of what a script would read from report.json, and parse it."""
    write_page(json.loads(json.dumps(report, allow_nan=False)), folder / "report.html")
    return parse(folder / "report.html")


def figures_in(value: Any) -> Iterator[tuple[float | None, Any]]:
    """Yield every figure of a report with its interval."""
    for name, entry in value.items() if isinstance(value, dict) else []:
        if name in ("accuracy", "balanced_accuracy", "auc") and not isinstance(entry, dict):
            yield entry, value.get(f"{name}_ci95")
        elif isinstance(entry, dict):
            if "value" in entry:
                yield entry["value"], (entry["low"], entry["high"]) if "low" in entry else None
            else:
                yield from figures_in(entry)


@pytest.mark.parametrize("make", [full_report, many_sites])
def test_every_figure_is_there_and_nothing_is_loaded(tmp_path: Path, make: Any) -> None:
    report = make()
    page = written(report, tmp_path)
    assert_loads_nothing(tmp_path / "report.html")
    found = list(figures_in({key: report[key] for key in report if key != "participation"}))
    assert len(found) > 50
    for value, interval in found:
        assert ("–" if value is None else f"{value:.3f}") in page.text
        if interval:
            assert f"{interval[0]:.2f}–{interval[1]:.2f}" in page.text
    for expected in (report["model_sha256"], report["protocol"]["sha256"], report["privacy"], "ε = ∞"):
        assert expected in page.text
    assert f"{report['bytes_up']:,}".replace(",", " ") in page.text, "white space is made one here"
    for spent in report["seconds_per_site"].values():
        if spent["waiting"] < 120:
            assert f"{spent['waiting']:.1f} s" in page.text


def test_a_hostile_name_is_text(tmp_path: Path) -> None:
    report = full_report(job="</title><img src=x onerror=alert(1)>", runtime='"><b>')
    page = written(report, tmp_path)
    assert_loads_nothing(tmp_path / "report.html")
    assert HOSTILE in page.text
    assert "A<b>" in page.text, "a subgroup's value"
    assert not page.named("img")
    assert not page.named("b")


def test_refusals_are_named_and_explained(tmp_path: Path) -> None:
    page = written(full_report(), tmp_path)
    assert "TRAINER_DIED" in page.text
    assert explain("TRAINER_DIED") in page.text
    assert "1–3, 8" in page.text
    assert "POLICY_INVALID" in page.text
    assert "took part in 26 of 30" in page.text
    cells = [rect["class"] for rect in page.named("rect") if rect["class"].startswith("cell")]
    legend = 3
    assert cells.count("cell c-refused") == 4 + 1
    assert cells.count("cell c-silent") == 2 + 1
    assert len(cells) == 4 * 30 + legend


def test_an_answer_that_was_not_combined_is_no_taking_part(tmp_path: Path) -> None:
    sites = ["amsterdam", "graz", HOSTILE, "nijmegen"]
    page = written(full_report(participation=[row(0, sites, taking_part=sites[1:])], rounds=1), tmp_path)
    assert "answered, not used" in page.text
    assert "took part in 0 of 1" in page.text


def test_a_figure_that_does_not_exist_is_a_dash_with_its_reason(tmp_path: Path) -> None:
    report = full_report(federated=metrics(0.8, 46, auc=False))
    page = written(report, tmp_path)
    assert "– all slides are of one class" in page.text
    untested = {"a": SiteComparison(10, 0, None, None, None)}
    page = written(full_report(site_figures=untested), tmp_path)
    assert "– no test patients" in page.text


def test_a_report_with_next_to_nothing(tmp_path: Path) -> None:
    report = full_report(
        site_figures={"only": SiteComparison(10, 0, None, None, None)},
        federated=None,
        pooled=None,
        local={},
        external={},
        participation=[],
        rounds=0,
        protocol=None,
        seconds={},
        evaluated_at_sites=None,
        evaluation_refused={},
        task={"encoder": "e:v1"},
    )
    page = written(report, tmp_path)
    assert_loads_nothing(tmp_path / "report.html")
    assert "No result: no site has test patients." in page.text
    assert "No round was run." in page.text
    assert "External cohort" not in page.text
    assert "Round by round" not in page.text
    assert "Seconds of each site" not in page.text
    assert "not counted in this run" in page.text


def test_a_report_from_before_the_newer_keys(tmp_path: Path) -> None:
    report = full_report(participation=[["amsterdam"], ["amsterdam", "graz"]], rounds=2)
    for key in ("data", "protocol", "privacy_mechanism", "bytes_up", "bytes_down", "seconds_per_site"):
        del report[key]
    for key in ("evaluated_at_sites", "evaluation_refused"):
        del report[key]
    report["participation"] = [
        {"round": index, "taking_part": entry["taking_part"]}
        for index, entry in enumerate(report["participation"])
    ]
    page = written(report, tmp_path)
    assert "graz 1 of 2" in page.text
    assert "Never took part: " in page.text


def test_many_rounds_are_drawn_as_strips(tmp_path: Path) -> None:
    page = written(many_sites(rounds=200), tmp_path)
    cells = [rect for rect in page.named("rect") if rect["class"].startswith("cell")]
    assert len(cells) < 12 * 20
    assert "One grey line for each of 12 sites" in page.text


def test_a_page_has_pictures_of_generated_images_and_else_none(tmp_path: Path) -> None:
    picture = encode_picture(Image.new("RGB", (40, 30)))
    image = GeneratedImage("one", "hospital-1", [("Image", picture, False), ("True mask", picture, True)])
    write_page(full_report(), tmp_path / "report.html", [image])
    assert_loads_nothing(tmp_path / "report.html")
    page = parse(tmp_path / "report.html")
    assert len(page.named("img")) == 2
    assert "Generated: no patient and no hospital is in these pictures." in page.text
    bare = written(full_report(), tmp_path)
    assert not bare.named("img") and "Generated" not in bare.text


def test_only_what_the_program_drew_can_be_shown() -> None:
    """The maker of such pictures is handed what images are drawn from, and reads no file of a site."""
    source = Path(generated.__file__).parents[1]
    makers = [path.name for path in source.rglob("*.py") if "GeneratedImage(" in path.read_text()]
    assert makers == ["generated.py"]
    body = inspect.getsource(generated.draw_generated)
    assert "render_image(" in body
    assert not any(word in body for word in (".read(", "open(", "cohorts", "experiment.sites", "Path"))


def test_shared_noise_has_two_figures_wherever_one_is_said(tmp_path: Path) -> None:
    plan = DpSgd(noise="shared", honest=3, noise_multiplier=9.0, sample_rate=0.1)
    sites = ["amsterdam", "graz", HOSTILE, "nijmegen"]
    report = protected_report(plan, participation=[row(index, sites) for index in range(3)])
    second = say_epsilon(report["guarantee"]["if_all_collude"]["federation"])
    text = written(report, tmp_path).text
    assert report["guarantee"]["against"] == "against the server and any 1 other site"
    assert text.count(report["guarantee"]["against"]) >= 3
    assert text.count(f"{ALL_COLLUDE}, ε = {second}") >= 3, "at the top, and in the section on privacy"
    local = written(protected_report(DpSgd(noise_multiplier=9.0, sample_rate=0.1)), tmp_path).text
    assert ALL_COLLUDE not in local


def test_findings_come_before_accountants_and_noise(tmp_path: Path) -> None:
    plan = UpdateNoise(noise_multiplier=60.0)
    text = written(protected_report(plan), tmp_path).text
    for word in ("RDP", "Gaussian", "multiplier"):
        assert text.index("Who took part") < text.index(word), word
    assert text.index("ε = ") < text.index("Figures"), "the privacy itself is said at the top"


def test_in_one_process_nothing_was_sent_and_no_size_says_so(tmp_path: Path) -> None:
    text = written(full_report(runtime="inprocess"), tmp_path).text
    assert "nothing was sent" in text and "had they been sent" in text
    assert "sent by the sites" not in text
    assert "sent by the sites" in written(full_report(), tmp_path).text


def test_no_interval_says_why(tmp_path: Path) -> None:
    few = replace(
        metrics(0.8, 2),
        figures={"balanced_accuracy": Figure(1.0, patients=1, no_interval="2 patients: no interval")},
    )
    for name in ("accuracy", "auc"):
        few.figures[name] = few.figures["balanced_accuracy"]  # type: ignore[index]
    page = written(full_report(federated=few), tmp_path)
    assert "2 patients: no interval" in page.text
    assert "1.00–1.00" not in page.text
    narrow = write_interval((0.9961, 0.9999))
    assert narrow == "0.996–1.000"


def test_a_figure_that_no_site_let_out_has_no_column(tmp_path: Path) -> None:
    text = written(full_report(), tmp_path).text  # graz let out its AUC alone
    assert "From no site: balanced accuracy, accuracy; not let out, or no such figure there." in text
    assert WHY_WITHHELD in text

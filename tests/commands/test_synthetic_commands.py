"""``histoflare synthetic``: what its commands write and print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from histoflare.commands.synthetic import app
from histoflare.errors import JobError, ManifestError
from histoflare.masks.image_manifest import read_image_manifest
from histoflare.slides.manifest import read_manifest

runner = CliRunner()


def test_slides_are_made_and_counted(tmp_path: Path) -> None:
    arguments = ["slides", "--out", str(tmp_path), "--hospitals", "1", "--slides-per-hospital", "4"]
    result = runner.invoke(app, [*arguments, "--no-external", "--um-field", "200", "--json"])
    assert result.exit_code == 0, result.output
    (site,) = json.loads(result.stdout)["sites"].values()
    assert site["slides"] == 4
    assert len(read_manifest(Path(site["manifest"]), labels=("glandular", "solid")).rows) == 4


def test_bags_add_up_to_the_count(tmp_path: Path) -> None:
    arguments = ["bags", "--out", str(tmp_path), "--count", "11", "--hospitals", "2", "--patches", "1"]
    result = runner.invoke(app, [*arguments, "--patch-px", "32", "--json"])
    assert result.exit_code == 0, result.output
    assert [site["slides"] for site in json.loads(result.stdout)["sites"].values()] == [3, 3, 5]
    assert len(list(tmp_path.glob("*/bags/*.h5"))) == 11


def test_images_are_made_and_counted(tmp_path: Path) -> None:
    arguments = ["images", "--out", str(tmp_path), "--sites", "1", "--patients", "3", "--side-px", "48"]
    result = runner.invoke(app, [*arguments, "--images-per-patient", "2", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["labels"] == ["background", "nucleus"]
    assert list(printed["sites"]) == ["hospital-1", "external"]
    assert [site["images"] for site in printed["sites"].values()] == [6, 6]
    assert [site["test_patients"] for site in printed["sites"].values()] == [1, 3]
    assert all(len(read_image_manifest(Path(s["manifest"])).rows) == 6 for s in printed["sites"].values())
    result = runner.invoke(app, [*arguments, "--images-per-patient", "1"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    *table, where = result.stdout.splitlines()
    assert where == f"manifests: {tmp_path}/<site>/images.csv"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table if line.startswith("│")]
    assert rows == [["hospital-1", "3", "3", "1"], ["external", "3", "3", "3"]]


@pytest.mark.parametrize("wrong", ["aca", "=LUAD", "aca="])
def test_a_label_pair_must_be_a_pair(tmp_path: Path, wrong: str) -> None:
    result = runner.invoke(
        app,
        ["assemble", str(tmp_path / "i.csv"), "--out", str(tmp_path), "--label", wrong, "--label", "scc=B"],
    )
    assert result.exit_code == 2
    assert "TILE_LABEL=SLIDE_LABEL" in result.output


def test_two_labels_and_a_resolution_are_needed_before_anything_is_made(tmp_path: Path) -> None:
    arguments = ["assemble", str(tmp_path / "i.csv"), "--out", str(tmp_path / "out")]
    result = runner.invoke(app, [*arguments, "--label", "aca=LUAD", "--label", "mixed=LUAD"])
    assert result.exit_code == 2 and "two labels" in result.output
    result = runner.invoke(app, [*arguments, "--mpp", "nan"])
    assert isinstance(result.exception, JobError) and "mpp" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_assembling_without_an_index_is_an_error_of_ours(tmp_path: Path) -> None:
    result = runner.invoke(app, ["assemble", str(tmp_path / "none.csv"), "--out", str(tmp_path)])
    assert isinstance(result.exception, ManifestError)


def test_the_lung_tiles_assemble(test_data: Path, tmp_path: Path) -> None:
    index = test_data / "cls_lc25000_lung" / "index.csv"
    arguments = ["assemble", str(index), "--out", str(tmp_path), "--json", "--label", "lung_n=benign"]
    result = runner.invoke(app, [*arguments, "--label", "lung_aca=tumour", "--sites", "2"])
    assert result.exit_code == 0, result.output
    sites = json.loads(result.stdout)["sites"]
    assert list(sites) == ["hospital-1", "hospital-2", "external"]
    assert all(set(site["labels"]) == {"benign", "tumour"} for site in sites.values())

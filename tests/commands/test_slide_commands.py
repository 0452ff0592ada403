"""The commands slide, mosaic and manifest as a user runs them."""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from histoflare.commands import manifest, mosaic, prepare, slide
from histoflare.errors import ManifestError, SlideError
from histoflare.slides.mosaic import Mosaic
from histoflare.slides.pyramid import write_pyramid
from histoflare.slides.splits import SplitRule
from tests.refusals import raises_reason

JOBS = Path(__file__).parents[2] / "jobs"

app = typer.Typer()
app.add_typer(slide.app, name="slide")
app.add_typer(manifest.app, name="manifest")
app.command("mosaic")(mosaic.mosaic)


def run(*arguments: str | Path) -> str:
    """Run the command and return its stdout; what it raises is raised."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def cmu(test_data: Path) -> Path:
    return test_data / "wsi" / "CMU-1-Small-Region.svs"


def test_slide_info_json(cmu: Path) -> None:
    about = json.loads(run("slide", "info", cmu, "--json"))
    assert about["mpp"] == 0.499
    assert about["vendor"] == "aperio"
    assert about["levels"] == [{"lv_size_px": [2220, 2967], "downsample": 1.0, "mpp": 0.499}]
    assert json.loads(run("slide", "info", cmu, "--json", "--mpp", "0.3"))["mpp_source"] == "given"


def test_slide_info_for_people(cmu: Path, test_data: Path) -> None:
    shown = run("slide", "info", cmu)
    assert "0.499 µm/px, from the slide" in shown
    without = run("slide", "info", test_data / "wsi" / "openslide_python_fixtures" / "boxes.tiff")
    assert "--mpp" in without


def test_every_malformed_slide_is_one_error(test_data: Path) -> None:
    files = [file for file in (test_data / "wsi_malformed").iterdir() if file.name != "README.txt"]
    assert len(files) == 7
    for file in files:
        with pytest.raises(SlideError):
            run("slide", "info", file, "--json")
        with pytest.raises(SlideError):
            run("mosaic", file, "--out", file.parent / "never")


def test_mosaic_writes_json_and_picture(cmu: Path, tmp_path: Path) -> None:
    run("mosaic", cmu, "--out", tmp_path, "--patch-px", "224", "--selection", "spatial", "--fraction", "0.2")
    assert {file.name for file in tmp_path.iterdir()} == {
        "CMU-1-Small-Region.mosaic.json",
        "CMU-1-Small-Region.overlay.png",
    }
    content = json.loads((tmp_path / "CMU-1-Small-Region.mosaic.json").read_text())
    built = Mosaic.from_json(content)
    assert (built.parameters.selection, built.parameters.fraction) == ("spatial", 0.2)
    assert content["slide"]["mpp"] == 0.499
    with Image.open(tmp_path / "CMU-1-Small-Region.overlay.png") as picture:
        assert max(picture.size) > 1400
    again = tmp_path / "again"
    run("mosaic", cmu, "--out", again, "--patch-px", "224", "--selection", "spatial", "--fraction", "0.2")
    for file in again.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_mosaic_that_cannot_be_leaves_nothing(cmu: Path, tmp_path: Path) -> None:
    with pytest.raises(SlideError):
        run("mosaic", cmu, "--out", tmp_path / "out", "--patch-px", "9000")
    assert not (tmp_path / "out").exists()


def test_manifest_check(tmp_path: Path) -> None:
    path = tmp_path / "north.csv"
    path.write_text("slide,patient,label,split\na.svs,1,x,train\nb.svs,1,x,train\nc.svs,2,y,test\n")
    with pytest.raises(ManifestError) as caught:
        run("manifest", "check", path)
    assert len(caught.value.problems) == 3
    counts = json.loads(run("manifest", "check", path, "--no-files", "--json"))
    assert counts == {
        "slides": 3,
        "patients": 2,
        "labels": {"x": 2, "y": 1},
        "splits": {"test": 1, "train": 2},
        "split_column": True,
        "warnings": ["no training patient of class 'y'", "no test patient of class 'x'"],
    }
    with raises_reason("MANIFEST_INVALID", "'y'", "x, z"):
        run("manifest", "check", path, "--no-files", "--label", "x", "--label", "z")


def test_manifest_check_says_who_is_for_testing_without_a_split_column(tmp_path: Path) -> None:
    path = tmp_path / "north.csv"
    names = [f"p{index}" for index in range(40)]
    path.write_text("slide,patient,label\n" + "".join(f"{n}.svs,{n},{'xy'[n < 'p2']}\n" for n in names))
    found = json.loads(run("manifest", "check", path, "--no-files", "--json"))
    tested = sum(SplitRule().role_of(name) == "test" for name in names)
    assert found["splits"] == {"test": tested, "train": 40 - tested}
    assert (found["split_column"], found["warnings"]) == (False, [])
    path.write_text("slide,patient,label,split\na.svs,a,x,train\nb.svs,b,y,\n")
    with pytest.raises(ManifestError) as caught:
        run("manifest", "check", path, "--no-files")
    assert caught.value.problems == ("line 3: no split",)


def test_a_name_too_long_to_be_one_is_a_fault_of_its_line(tmp_path: Path) -> None:
    path = tmp_path / "north.csv"
    path.write_text(f"slide,patient,label\n{'x' * 300}.svs,1,x\ngone.svs,2,y\n")
    with pytest.raises(ManifestError) as caught:
        run("manifest", "check", path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["line 2", "line 3"]


def write_slide(path: Path, mpp: float) -> None:
    write_pyramid(path, np.full((300, 300, 3), 240, np.uint8), mpp)


def test_a_resolution_that_cannot_be_is_named_before_anything_is_made(tmp_path: Path) -> None:
    """Line 2 is sound; 3 says 0.025; 4 too, but the manifest corrects it."""
    for name, mpp in (("a", 0.25), ("b", 0.025), ("c", 0.025)):
        write_slide(tmp_path / f"{name}.tif", mpp)
    (tmp_path / "d.tif").write_bytes(b"")
    path = tmp_path / "north.csv"
    path.write_text("slide,patient,label,mpp\na.tif,1,x,\nb.tif,2,y,\nc.tif,3,y,0.25\nd.tif,4,x,\n")
    check = ["manifest", "check", str(path), "--patch-px", "32"]
    result = CliRunner().invoke(app, [*check, "--json"])
    assert result.exit_code == 3
    findings = json.loads(result.stdout)["slides_to_look_at"]
    assert [(each["line"], each["usable"]) for each in findings] == [(3, False), (4, True), (5, False)]
    assert "0.025 µm/px, finer" in findings[0]["message"]
    result = CliRunner().invoke(app, check)
    assert result.exit_code == 3 and "line 3: " in result.stdout and "warning: line 4: " in result.stderr
    assert "0.025 µm/px, finer" in run("slide", "info", tmp_path / "b.tif")
    assert json.loads(run("slide", "info", tmp_path / "b.tif", "--json"))["mpp"] is None
    with raises_reason("SLIDE_MPP_MISSING", "b.tif", "0.025"):
        run("mosaic", tmp_path / "b.tif", "--out", tmp_path / "out", "--patch-px", "32")
    for command in (("slide", "info"), ("mosaic", "--out", tmp_path / "out")):
        with raises_reason("SLIDE_MPP_INVALID", "a.tif", "40"):
            run(*command, tmp_path / "a.tif", "--mpp", "40")
    path.write_text("slide,patient,label,mpp\na.tif,1,x,40\nb.tif,2,y,\n")
    with raises_reason("MANIFEST_INVALID", "line 2: ", "'40'"):
        run("manifest", "check", path)


def test_manifest_tcga(tmp_path: Path) -> None:
    names = [f"TCGA-{site}-{patient:04d}-01Z-00-DX1.AB.svs" for site in ("05", "66") for patient in range(5)]
    (tmp_path / "slides").mkdir()
    for name in names:
        (tmp_path / "slides" / name).write_bytes(b"slide")
    rows = [f"id{number}\t{name}\t0\t5\treleased" for number, name in enumerate(names)]
    (tmp_path / "gdc.txt").write_text("\n".join(["id\tfilename\tmd5\tsize\tstate", *rows]))
    arguments = (
        "manifest",
        "tcga",
        tmp_path / "gdc.txt",
        "--slides",
        tmp_path / "slides",
        "--out",
        tmp_path / "m",
    )
    report = json.loads(run(*arguments, "--json"))
    assert report["manifests"]["Indivumed"]["splits"] == {"test": 2, "train": 8}
    assert report["table_2"]["Indivumed"]["diagnostic"] == {"LUAD": 5, "LUSC": 5}
    shown = run(*arguments)
    assert "94 + 117" in shown and "5 + 5" in shown and "884" not in shown and "1269" in shown
    shown = run("manifest", "check", tmp_path / "m" / "indivumed.csv", "--no-files")
    assert "LUAD 5, LUSC 5" in shown


@pytest.mark.parametrize("command", [mosaic.mosaic, prepare.prepare])
@pytest.mark.parametrize("job", sorted(path.name for path in JOBS.glob("mem_*")))
def test_patches_are_by_default_what_the_shipped_jobs_ask_for(command: Callable[..., None], job: str) -> None:
    protocol = tomllib.loads((JOBS / job / "app" / "config" / "protocol.toml").read_text())
    defaults = {name: each.default for name, each in inspect.signature(command).parameters.items()}
    assert (defaults["patch_mpp"], defaults["patch_px"]) == (protocol["mpp"], protocol["patch_px"])

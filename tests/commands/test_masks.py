"""``histoflare masks``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from histoflare.commands import masks
from histoflare.commands.job import app as job_app
from histoflare.errors import MaskError
from histoflare.flare.job import read_job
from histoflare.flare.job_variant import write_variant
from histoflare.masks.checkpoints import LoadedWeights
from histoflare.masks.task import MaskTask
from histoflare.model_file import read_model_file, read_model_header
from histoflare.privacy.protocol import hash_protocol
from histoflare.slides.pyramid import write_pyramid
from tests.masks.image_folders import rgb, save, write_cohort

app = typer.Typer()
app.add_typer(masks.app, name="masks")
runner = CliRunner()


def test_check_counts_and_warns(tmp_path: Path) -> None:
    path = write_cohort(tmp_path)
    for index in range(4):
        save(tmp_path / f"m{index}.png", np.eye(48, dtype=np.uint8))
    command = ["masks", "check", str(path), "--labels", "a, b,c", "--window-px", "48"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "train" in result.stdout and "b 2.1 %" in result.stdout
    assert "no pixel of a training mask is 'c'" in result.output
    counts = json.loads(runner.invoke(app, [*command, "--json"]).stdout)
    assert counts["train"]["images"] == 3 and counts["test"]["patients"] == 1
    assert counts["train"]["classes"] == {
        "a": pytest.approx(47 / 48),
        "b": pytest.approx(1 / 48),
        "c": 0.0,
        "not annotated": 0.0,
    }


def test_check_lists_faults(tmp_path: Path) -> None:
    path = write_cohort(tmp_path)
    result = runner.invoke(app, ["masks", "check", str(path), "--labels", "a", "--window-px", "49"])
    assert result.exit_code == 1 and isinstance(result.exception, MaskError)
    assert str(result.exception).count("class index 1") == 4


def test_check_of_two_resolutions_names_its_own_option(tmp_path: Path) -> None:
    path = write_cohort(tmp_path)
    lines = path.read_text().splitlines()
    mpps = ["mpp", "0.25", "0.5", "0.5", "0.5"]
    path.write_text("".join(f"{line},{mpp}\n" for line, mpp in zip(lines, mpps, strict=True)))
    result = runner.invoke(app, ["masks", "check", str(path), "--labels", "a,b"])
    assert isinstance(result.exception, MaskError)
    assert "Name one (with --mpp)" in str(result.exception) and "protocol" not in str(result.exception)


def test_nuclei_are_imported_and_checked(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / "set" / "images" / f"{name}.png", rgb(16, 16, seed=ord(name)))
        save(tmp_path / "set" / "masks" / f"{name}.png", np.eye(16, dtype=np.uint8))
    out = tmp_path / "out"
    command = ["masks", "import", "nuclei", str(tmp_path / "set"), "--out", str(out), "--mpp", "0.25"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "2 images of 2 patients; labels background,nucleus" in result.stdout
    assert "each image counts as a patient" in result.output
    report = json.loads(runner.invoke(app, [*command, "--json"]).stdout)
    assert report["images"] == 2 and Path(report["manifest"]) == out / "images.csv"
    unsaid = json.loads(runner.invoke(app, [*command[:-2], "--json"]).stdout)
    assert any("--mpp" in note for note in unsaid["notes"]) and "--mpp" not in str(report["notes"])
    again = runner.invoke(app, ["masks", "check", report["manifest"], "--labels", ",".join(report["labels"])])
    assert again.exit_code == 0, again.output


def test_binary_masks_are_imported_under_a_name_of_ones_own(tmp_path: Path) -> None:
    save(tmp_path / "set" / "img" / "a.png", rgb(16, 16))
    save(tmp_path / "set" / "gt" / "a_mask.png", np.eye(16, dtype=np.uint8) * np.uint8(255))
    command = ["masks", "import", "binary", str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    result = runner.invoke(app, [*command, "--label", "gland", "--images", "img", "--masks", "gt"])
    assert result.exit_code == 0, result.output
    assert "1 images of 1 patients; labels background,gland" in result.stdout


def test_wsss4luad_is_imported(tmp_path: Path) -> None:
    part = tmp_path / "set" / "3.testing"
    save(part / "img" / "00.png", rgb(20, 20))
    save(part / "mask" / "00.png", np.zeros((20, 20), np.uint8))
    command = ["masks", "import", "wsss4luad", str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    result = runner.invoke(app, [*command, "--smallest-px", "20", "--polarity", "tissue"])
    assert result.exit_code == 0, result.output
    assert "1 images of 1 patients; labels tumour,stroma,normal,background" in result.stdout
    assert runner.invoke(app, command).exit_code == 1
    assert runner.invoke(app, [*command, "--polarity", "either"]).exit_code == 2


def test_geojson_is_imported(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "s.tif", rgb(128, 128), 0.5)
    ring = [[16, 16], [80, 16], [80, 80], [16, 80], [16, 16]]
    content = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}
    content["properties"] = {"classification": {"name": "tumour"}}
    (tmp_path / "s.geojson").write_text(json.dumps([content]))
    command = ["masks", "import", "geojson", str(tmp_path / "s.tif"), str(tmp_path / "s.geojson")]
    command += [
        "--out",
        str(tmp_path / "out"),
        "--labels",
        "background,tumour",
        "--mpp",
        "1",
        "--patient",
        "p",
    ]
    result = runner.invoke(app, [*command, "--smallest-px", "8", "--offset", "8", "0"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "images" / "s_x24_y16.png").is_file()


def test_pretrained_weights_are_a_model_file_that_a_job_starts_from(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_variant(repository / "jobs" / "dhunet_fedavg", tmp_path / "job", {"task.width": 24})
    monkeypatch.setattr(
        "histoflare.masks.checkpoints.load_pretrained", lambda *_, **files: LoadedWeights(173, 0)
    )
    (tmp_path / "swin.pth").write_bytes(b"read by the stand-in")
    out = tmp_path / "first.safetensors"
    command = ["masks", "pretrained", str(job), "--swin", str(tmp_path / "swin.pth"), "--out", str(out)]
    result = runner.invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    read = read_job(job)
    loaded = read_model_file(out, MaskTask)
    assert loaded.task == read.task and loaded.header.training == {"pretrained": "ImageNet"}
    assert loaded.header.protocol_sha256 == hash_protocol(read.protocol)
    made = ["make", str(job), "--model", str(out), "--sites", "a,b", "--out", str(tmp_path / "made")]
    assert runner.invoke(job_app, made, catch_exceptions=False).exit_code == 0
    start = tmp_path / "made" / "app_server" / "config" / "start_model.safetensors"
    assert read_model_header(start).task == loaded.header.task

"""The command segment as a user runs it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from histoflare.commands import segment
from histoflare.errors import JobError
from histoflare.masks.task import MaskTask
from histoflare.model_file import ModelHeader, save_model
from histoflare.slides.mask_overlay import class_colours
from histoflare.slides.pyramid import write_pyramid
from histoflare.slides.reader import Slide
from tests.bags.conftest import paint_slide
from tests.commands.quick import loaded_by, wrong_slide
from tests.masks.window_models import ByDarkness

app = typer.Typer()
app.command("segment")(segment.segment)


@dataclass
class StandIn(ByDarkness):
    """A task and its network, neither of which is one."""

    @property
    def task(self) -> StandIn:
        return self

    def build_model(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def window_probabilities(
        self, network: torch.nn.Module, windows: NDArray[np.uint8]
    ) -> NDArray[np.float32]:
        assert isinstance(network, torch.nn.Identity)
        return self.probabilities(windows)


def run(*arguments: str | Path) -> str:
    """Run the command and return its stdout; what it raises is raised."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def slide_path(tmp_path: Path) -> Path:
    write_pyramid(tmp_path / "s.tif", paint_slide(1, (300, 250)), 0.5)
    return tmp_path / "s.tif"


def use(monkeypatch: pytest.MonkeyPatch, stand_in: StandIn, folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(b"a model")
    header = ModelHeader(path, "images", {"mpp": stand_in.mpp}, None, None, None, None, {})
    monkeypatch.setattr("histoflare.model_file.read_model_header", lambda path: header)
    monkeypatch.setattr("histoflare.model_file.read_model_file", lambda *_: stand_in)
    return folder


def test_mask_outlines_and_picture(slide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = use(monkeypatch, StandIn(background="light"), tmp_path)
    out = tmp_path / "results"
    names = (out / "m.tiff", out / "m.geojson", out / "m.png")
    arguments = ("--out", names[0], "--geojson", names[1], "--overlay", names[2])
    shown = run(slide_path, "--model", model, *arguments)
    assert {path.name for path in out.iterdir()} == {"m.tiff", "m.geojson", "m.png"}
    values = tifffile.imread(names[0])
    assert values.shape == (250, 300)
    for label in ("light", "middle", "dark"):
        assert label in shown
    features = json.loads(names[1].read_text())["features"]
    assert {each["properties"]["classification"]["name"] for each in features} == {"middle", "dark"}
    with Image.open(names[2]) as picture:
        assert picture.size[0] == 1400
    about = json.loads(run(slide_path, "--model", model / "model.safetensors", "--out", names[0], "--json"))
    assert about["mpp"] == 0.5
    assert about["outside"] == 0
    areas = {label: each["area_mm2"] for label, each in about["classes"].items()}
    assert areas["dark"] == pytest.approx((values == 2).sum() * 0.25e-6)
    assert sum(each["share_of_tissue"] for each in about["classes"].values()) == pytest.approx(1)


def test_the_picture_has_the_classes_where_the_slide_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rgb = np.full((1000, 1400, 3), (210, 140, 185), np.uint8)
    rgb[:, 700:] = (130, 70, 160)
    write_pyramid(tmp_path / "s.tif", rgb, 0.5)
    model = use(monkeypatch, StandIn(labels=("light", "left", "right"), stride_px=64), tmp_path)
    run(tmp_path / "s.tif", "--model", model, "--out", tmp_path / "m.tiff", "--overlay", tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(float)
    for x, (slide, index) in {300: ((210, 140, 185), 1), 1100: ((130, 70, 160), 2)}.items():
        mixed = 0.55 * np.array(slide) + 0.45 * np.array(class_colours(3)[index])
        assert np.allclose(pixels[500, x], mixed, atol=4)


def test_a_real_network_on_a_slide_given_its_resolution(slide_path: Path, tmp_path: Path) -> None:
    task = MaskTask(labels=("a", "b"), width=24, mpp=1.0, window_px=64, stride_px=64, patch_px=32)
    save_model(tmp_path / "run" / "model.safetensors", task.build_model().state_dict(), task)
    arguments = ("--model", tmp_path / "run", "--out", tmp_path / "m.tiff", "--device", "cpu", "--json")
    about = json.loads(run(slide_path, *arguments, "--mpp", "0.25"))
    assert about["mpp"] == pytest.approx(2.0)
    assert about["size_px"] == [38, 32]
    with openslide.OpenSlide(tmp_path / "m.tiff") as opened:
        assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(2.0)
    with Slide(slide_path, mpp=0.25) as slide:
        window = slide.read((0, 0), (64, 64), 1.0)
    network = task.build_model().eval()
    (found,) = task.window_probabilities(network, window[None])  # (k, 32, 32)
    # the next window begins at column 6: what is left of it is the first window's alone
    values, found = tifffile.imread(tmp_path / "m.tiff")[:, :6], found[:, :, :6]
    told = (values != 255) & (np.abs(found[0] - found[1]) > 1e-4)
    assert told.any()
    assert np.array_equal(values[told], found.argmax(axis=0)[told])


@pytest.mark.parametrize("fault", ["missing", "no slide", "no mpp", "no tissue"])
def test_what_is_wrong_with_the_slide_is_found_before_anything_slow_is_loaded(
    tmp_path: Path, fault: str
) -> None:
    task = MaskTask(labels=("a", "b"), width=24, mpp=1.0, window_px=64, stride_px=64, patch_px=32)
    save_model(tmp_path / "model.safetensors", task.build_model().state_dict(), task)
    path, words = wrong_slide(tmp_path, fault)
    said, slow = loaded_by("segment", path, "--model", tmp_path, "--out", tmp_path / "m.tiff")
    assert words in said and slow == []
    assert not list(tmp_path.glob("m.tiff*"))


def test_no_model(slide_path: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        run(slide_path, "--model", tmp_path, "--out", tmp_path / "m.tiff")
    assert caught.value.reason == "MODEL_FILE_MISSING"
    assert not (tmp_path / "m.tiff").exists()


def test_many_slides_and_many_images(tmp_path: Path) -> None:
    task = MaskTask(labels=("a", "b"), width=24, mpp=1.0, window_px=64, stride_px=64, patch_px=32)
    save_model(tmp_path / "run" / "model.safetensors", task.build_model().state_dict(), task)
    slides, images = tmp_path / "slides", tmp_path / "images"
    slides.mkdir()
    images.mkdir()
    write_pyramid(slides / "s.tif", paint_slide(1, (300, 250)), 0.5)
    (slides / "broken.svs").write_text("no slide")
    Image.fromarray(paint_slide(1, (100, 80))).save(images / "i.png")
    (images / "images.csv").write_text("image,patient,mpp\ni.png,p1,0.5\n")
    for source, statuses, suffix in (
        (slides, ["failed", "done"], "tiff"),
        (images / "images.csv", ["done"], "png"),
    ):
        out = tmp_path / f"masks-{suffix}"
        arguments = [source, "--model", tmp_path / "run", "--out", out, "--device", "cpu"]
        for kept in (0, 1):
            ended = CliRunner().invoke(app, [*map(str, arguments), "--json"])
            assert ended.exit_code == (3 if "failed" in statuses else 0), ended.output
            about = json.loads(ended.stdout)
            assert about["kept"] == kept and [row["status"] for row in about["rows"]] == statuses
        (made,) = out.glob(f"*.{suffix}")
        assert about["rows"][-1]["mask"] == made.name
    with Image.open(made) as mask:
        values = np.asarray(mask)
    assert values.shape == (80, 100) and set(np.unique(values)) <= {0, 1}
    row = about["rows"][0]
    assert row["patient"] == "p1" and "brought to the model's 1" in row["warnings"]
    assert float(row["share_b"]) == pytest.approx((values == 1).mean(), abs=1e-6)
    assert float(row["mm2_b"]) == pytest.approx((values == 1).sum() * 0.25e-6, rel=1e-4)

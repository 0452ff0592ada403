"""The command classify as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from histoflare.bags.model_file import load_model, save_model
from histoflare.bags.patches import MosaicPatchDataset
from histoflare.bags.task import MemTask
from histoflare.commands import classify
from histoflare.errors import JobError
from histoflare.slides.mosaic import MosaicParameters, build_mosaic
from histoflare.slides.pyramid import write_pyramid
from histoflare.slides.reader import Slide
from tests.bags.conftest import MeanColour, paint_slide

PARAMETERS = MosaicParameters(patch_px=64, fraction=0.3, clusters=3)

app = typer.Typer()
app.command("classify")(classify.classify)
app.callback()(lambda: None)  # so that the command keeps its name


def run(*arguments: str | Path) -> str:
    """Run the command and return its stdout; what it raises is raised."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


class Pinned(MeanColour):
    id = "mean-colour:v1"


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Pinned:
    made = Pinned()
    monkeypatch.setattr("histoflare.bags.encoder.load_encoder", lambda *_: made)
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    task = MemTask(labels=("a", "b"), encoder="mean-colour:v1", features=3, patch_px=64, input_norm="rms")
    path = tmp_path / "run" / "model.safetensors"
    save_model(path, task.build_model().state_dict(), task, mosaic=PARAMETERS.to_json())
    return path


@pytest.fixture
def slide_path(tmp_path: Path) -> Path:
    write_pyramid(tmp_path / "s.tif", paint_slide(1, (660, 530)), 0.5)
    return tmp_path / "s.tif"


def test_it_says_what_the_model_says_of_the_mosaic(slide_path: Path, model: Path, encoder: Pinned) -> None:
    with Slide(slide_path) as slide:
        mosaic = build_mosaic(slide, PARAMETERS)
        patches = torch.stack([torch.as_tensor(each["image"]) for each in MosaicPatchDataset(slide, mosaic)])
    loaded = load_model(model)
    with torch.inference_mode():
        found = loaded.task.probabilities(loaded.build_model(), encoder.encode(patches))
    for named in (model, model.parent):
        answer = json.loads(run("classify", slide_path, "--model", named, "--json"))
        assert (answer["patches"], answer["encoder"]) == (len(mosaic.chosen), "mean-colour:v1")
        assert list(answer["probabilities"]) == ["a", "b"]
        assert list(answer["probabilities"].values()) == pytest.approx(found.tolist(), abs=1e-6)
    shown = run("classify", slide_path, "--model", model)
    for label, share in answer["probabilities"].items():
        assert label in shown
        assert f"{share:.3f}" in shown


def test_heat_map_and_picture(slide_path: Path, model: Path, encoder: Pinned, tmp_path: Path) -> None:
    heat, picture = tmp_path / "out" / "h.tiff", tmp_path / "out" / "h.png"
    plain = json.loads(run("classify", slide_path, "--model", model, "--json"))
    encoder.encoded = 0
    arguments = ("--heatmap", heat, "--overlay", picture, "--json")
    answer = json.loads(run("classify", slide_path, "--model", model, *arguments))
    assert {name: answer[name] for name in plain} == plain  # the heat map changes no answer
    assert {path.name for path in heat.parent.iterdir()} == {"h.tiff", "h.png"}
    with Slide(slide_path) as slide:
        mosaic = build_mosaic(slide, PARAMETERS)
    assert answer["attention"]["patches"] == len(mosaic.candidates) == encoder.encoded
    assert answer["attention"]["least"] <= 1 <= answer["attention"]["most"]
    values = tifffile.imread(heat)  # patches of 32 µm: one pixel each
    assert values.shape == (9, 11)
    there = np.zeros_like(values, dtype=bool)
    for patch in mosaic.candidates:
        there[patch.l0_y_px // 64, patch.l0_x_px // 64] = True
    assert np.array_equal(values != 255, there)
    with Image.open(picture) as image:
        assert image.size[0] == 1400


def test_a_model_of_imported_features_cannot_cut_a_slide(
    slide_path: Path, tmp_path: Path, encoder: Pinned
) -> None:
    task = MemTask(labels=("a", "b"), encoder="mean-colour:v1", features=3, patch_px=64)
    save_model(tmp_path / "m.safetensors", task.build_model().state_dict(), task)
    with pytest.raises(JobError, match="imported"):
        run("classify", slide_path, "--model", tmp_path / "m.safetensors")

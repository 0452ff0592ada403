"""A saved model on bags asked about a slide, with a heat map, by the command that users run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tifffile
import typer
from typer.testing import CliRunner

from histoflare.bags.task import BagTask
from histoflare.commands import classify
from histoflare.model_file import read_model_header, save_model
from histoflare.slides.mosaic import MosaicParameters
from histoflare.slides.pyramid import write_pyramid

from .conftest import MeanColour, paint_slide

PARAMETERS = MosaicParameters(patch_px=64, fraction=0.3, clusters=3)

app = typer.Typer()
app.command("classify")(classify.classify)
app.callback()(lambda: None)


class Pinned(MeanColour):
    id = "mean-colour:v1"


def ask(task: BagTask, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], str]:
    """Return what ``classify --json`` says of a slide, and the table of ``classify --out``."""
    monkeypatch.setattr("histoflare.bags.encoder.load_encoder", lambda *_: Pinned())
    model, slide, heat = folder / "model.safetensors", folder / "s.tif", folder / "heat.tiff"
    save_model(model, task.build_model().state_dict(), task, mosaic=PARAMETERS.to_json())
    assert BagTask.from_json(read_model_header(model).task) == task
    write_pyramid(slide, paint_slide(1, (660, 530)), 0.5)
    outputs = []
    for options in (["--heatmap", heat, "--json"], ["--out", folder / "answers.csv"]):
        done = CliRunner().invoke(app, ["classify", str(slide), "--model", str(model), *map(str, options)])
        assert done.exit_code == 0, done.output
        outputs.append(done.stdout)
    answer: dict[str, Any] = json.loads(outputs[0])
    assert answer["attention"]["least"] <= 1 + 1e-6 and answer["attention"]["most"] >= 1 - 1e-6
    assert len(set(tifffile.imread(heat).flatten().tolist()) - {255}) >= 1
    return answer, (folder / "answers.csv").read_text()

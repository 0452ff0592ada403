"""The command classify as a user runs it."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from histoflare.bags.encoder import load_encoder
from histoflare.bags.patches import MosaicPatchDataset
from histoflare.bags.task import BagTask
from histoflare.commands import classify
from histoflare.errors import EncoderError
from histoflare.model_file import describe_model, read_model_file, save_model, write_model_file
from histoflare.slides.mosaic import MosaicParameters, build_mosaic
from histoflare.slides.pyramid import write_pyramid
from histoflare.slides.reader import Slide
from tests.bags.conftest import MeanColour, paint_slide
from tests.commands.quick import loaded_by, wrong_slide
from tests.refusals import raises_reason

from ..mem import make_mem_task

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
    task = make_mem_task(
        labels=("a", "b"), encoder="mean-colour:v1", features=3, patch_px=64, input_norm="rms"
    )
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
    loaded = read_model_file(model, BagTask)
    with torch.inference_mode():
        found = list(loaded.task.answer(loaded.build_model(), encoder.encode(patches)).probabilities.values())
    for named in (model, model.parent):
        answer = json.loads(run("classify", slide_path, "--model", named, "--json"))
        assert (answer["patches"], answer["encoder"]) == (len(mosaic.chosen), "mean-colour:v1")
        assert list(answer["probabilities"]) == ["a", "b"]
        assert list(answer["probabilities"].values()) == pytest.approx(found, abs=1e-6)
    shown = run("classify", slide_path, "--model", model)
    for label, share in answer["probabilities"].items():
        assert label in shown
        assert f"{share:.3f}" in shown


def test_what_a_consortium_left_open_of_the_mosaic_is_said(
    slide_path: Path, model: Path, encoder: Pinned, tmp_path: Path
) -> None:
    task = read_model_file(model, BagTask).task
    open_one = tmp_path / "federated.safetensors"
    agreed = {"mpp": PARAMETERS.mpp, "patch_px": PARAMETERS.patch_px}
    save_model(open_one, task.build_model().state_dict(), task, mosaic=agreed)
    for path, says in ((open_one, True), (model, False)):
        result = CliRunner().invoke(app, ["classify", str(slide_path), "--model", str(path)])
        assert result.exit_code == 0 and ("clusters 9" in result.stderr) == says


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
    values = tifffile.imread(heat)[::32, ::32]  # 11 patches are 352 pixels: more than a tile
    assert values.shape == (9, 11)
    there = np.zeros_like(values, dtype=bool)
    for patch in mosaic.candidates:
        there[patch.l0_y_px // 64, patch.l0_x_px // 64] = True
    assert np.array_equal(values != 255, there)
    with Image.open(picture) as image:
        assert image.size[0] == 1400


def test_the_model_that_a_consortium_downloads(
    slide_path: Path, model: Path, encoder: Pinned, tmp_path: Path
) -> None:
    """What a server writes says of the mosaic what the protocol says; the rest is as 'prepare' does it."""
    loaded = read_model_file(model, BagTask)
    workspace = tmp_path / "result" / "workspace"
    facts = describe_model(loaded.task, mosaic=loaded.task.mosaic, run="run-1", round_index=29)
    write_model_file(workspace / "global_model.safetensors", loaded.state, facts)
    answer = json.loads(run("classify", slide_path, "--model", workspace.parent, "--json"))
    with Slide(slide_path) as slide:
        assert answer["patches"] == len(build_mosaic(slide, MosaicParameters(patch_px=64)).chosen)
    assert list(answer["probabilities"]) == ["a", "b"]


def test_it_warns_of_an_answer_from_one_or_two_patches(
    slide_path: Path, model: Path, encoder: Pinned, tmp_path: Path
) -> None:
    assert json.loads(run("classify", slide_path, "--model", model, "--json"))["warnings"] == []
    loaded = read_model_file(model, BagTask)
    few = tmp_path / "few.safetensors"
    mosaic = MosaicParameters(patch_px=64, max_patches=2).to_json()
    save_model(few, loaded.state, loaded.task, mosaic=mosaic)
    result = CliRunner().invoke(app, ["classify", str(slide_path), "--model", str(few)])
    assert "rests on 2 patches" in result.stderr and "rests on" not in result.stdout
    (warning,) = json.loads(run("classify", slide_path, "--model", few, "--json"))["warnings"]
    assert "2 patches" in warning


@pytest.mark.parametrize("fault", ["missing", "no slide", "no mpp", "no tissue"])
def test_what_is_wrong_with_the_slide_is_found_before_anything_slow_is_loaded(
    model: Path, tmp_path: Path, fault: str
) -> None:
    path, words = wrong_slide(tmp_path, fault)
    said, slow = loaded_by("classify", path, "--model", model)
    assert words in said and slow == []


def test_a_missing_weight_file_is_found_before_the_slide_is_cut(
    slide_path: Path, model: Path, tmp_path: Path
) -> None:
    with raises_reason("ENCODER_WEIGHTS_MISSING", tmp_path / "gone.pt"):
        run("classify", slide_path, "--model", model, "--weights", tmp_path / "gone.pt")
    loaded = read_model_file(model, BagTask)
    task = replace(loaded.task, encoder="torchscript:uni:0123456789ab-01234567")
    path = tmp_path / "uni.safetensors"
    save_model(path, loaded.state, task, mosaic=PARAMETERS.to_json())
    with raises_reason("ENCODER_WEIGHTS_MISSING", "--weights"):
        run("classify", slide_path, "--model", path)


def test_other_weights_and_a_missing_device_are_found_before_the_mosaic(
    slide_path: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_mosaic(*_: object) -> None:
        raise AssertionError("the mosaic was built")

    monkeypatch.setattr("histoflare.slides.mosaic.build_mosaic", no_mosaic)
    loaded = read_model_file(model, BagTask)
    task = replace(loaded.task, encoder="densenet121:0123456789ab")
    save_model(tmp_path / "m.safetensors", loaded.state, task, mosaic=PARAMETERS.to_json())
    (tmp_path / "other.pth").write_bytes(b"other weights")
    with pytest.raises(EncoderError) as caught:
        run(
            "classify", slide_path, "--model", tmp_path / "m.safetensors", "--weights", tmp_path / "other.pth"
        )
    assert caught.value.reason == "ENCODER_HASH"
    with raises_reason("ENCODER_UNKNOWN", "abacus"):
        run("classify", slide_path, "--model", model, "--device", "abacus")


def test_the_model_knows_its_encoder_s_weights(slide_path: Path, tmp_path: Path) -> None:
    """A TorchScript file with its mean and std beside it, and no hash on the command line."""
    weights = tmp_path / "mean.pt"
    torch.jit.script(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())).save(weights)
    beside = tmp_path / "mean.pt.toml"
    beside.write_text("mean = [0, 0, 0]\nstd = [1, 1, 1]\ninput_px = 64\n")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    encoder_id = load_encoder("torchscript:mean", weights, digest, "cpu").id
    task = make_mem_task(labels=("a", "b"), encoder=encoder_id, features=3, patch_px=64)
    save_model(tmp_path / "m", task.build_model().state_dict(), task, mosaic=PARAMETERS.to_json())
    arguments = ("classify", slide_path, "--model", tmp_path / "m", "--weights", weights, "--json")
    assert json.loads(run(*arguments))["encoder"] == encoder_id
    beside.write_text("mean = [0, 0, 0]\nstd = [0.5, 0.5, 0.5]\ninput_px = 64\n")
    with raises_reason("ENCODER_MISMATCH", encoder_id, "mean, std, input_px"):
        run(*arguments)


def test_a_model_of_imported_features_cannot_cut_a_slide(
    slide_path: Path, tmp_path: Path, encoder: Pinned
) -> None:
    task = make_mem_task(labels=("a", "b"), encoder="mean-colour:v1", features=3, patch_px=64)
    save_model(tmp_path / "m.safetensors", task.build_model().state_dict(), task)
    with raises_reason("JOB_INVALID", tmp_path / "m.safetensors"):
        run("classify", slide_path, "--model", tmp_path / "m.safetensors")


def test_a_folder_of_slides_becomes_a_table_that_goes_on(
    model: Path, encoder: Pinned, tmp_path: Path
) -> None:
    folder, table = tmp_path / "slides", tmp_path / "r" / "results.csv"
    (folder / "b").mkdir(parents=True)
    for name in ("a.tif", "b/a.tif"):
        write_pyramid(folder / name, paint_slide(1, (660, 530)), 0.5)
    (folder / "broken.svs").write_text("no slide")
    arguments = ["classify", folder, "--model", model, "--out", table, "--geojson", tmp_path / "r" / "tiles"]
    for asked in (True, False):
        encoder.encoded = 0
        ended = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert ended.exit_code == 3, ended.output
        assert json.loads(ended.stdout)["kept"] == (0 if asked else 2) and bool(encoder.encoded) == asked
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["slide"], row["status"]) for row in rows] == [
        ("a.tif", "done"),
        ("b/a.tif", "done"),
        ("broken.svs", "failed"),
    ]
    alone = json.loads(run("classify", folder / "a.tif", "--model", model, "--json"))
    for label, share in alone["probabilities"].items():
        assert float(rows[0][f"p_{label}"]) == pytest.approx(share, abs=1e-6)
    assert rows[0]["predicted"] == max(alone["probabilities"], key=alone["probabilities"].__getitem__)
    assert int(rows[0]["patches"]) == alone["patches"] and rows[2]["reason"] == "SLIDE_UNSUPPORTED"
    tiles = sorted((tmp_path / "r" / "tiles").iterdir())
    assert len(tiles) == 2
    with Slide(folder / "a.tif") as slide:
        candidates = build_mosaic(slide, PARAMETERS).candidates
    features = json.loads(tiles[0].read_text())["features"]
    corners = [tuple(each["geometry"]["coordinates"][0][0]) for each in features]
    assert corners == [(patch.l0_x_px, patch.l0_y_px) for patch in candidates]


def test_several_slides_without_a_table_are_refused(model: Path, encoder: Pinned, tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text("slide\na.svs\n")
    with raises_reason("JOB_INVALID", tmp_path / "manifest.csv", "--out"):
        run("classify", tmp_path / "manifest.csv", "--model", model)

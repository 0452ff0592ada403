from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from histoflare.commands import bags, prepare
from histoflare.errors import EncoderError, HistoflareError
from histoflare.slides.pyramid import write_pyramid
from tests.commands.quick import loaded_by

app = typer.Typer()
app.command("prepare")(prepare.prepare)
app.add_typer(bags.app, name="bags")
runner = CliRunner()

RANDOM = ["--encoder", "densenet121-random"]
FEW = ["--patch-px", "32", "--max-patches", "3", "--device", "cpu", *RANDOM]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("s0", "s1"):
        rgb = np.full((256, 256, 3), 243, np.uint8)
        rgb[40:220, 40:220] = rng.integers((100, 60, 130), (230, 160, 200), (180, 180, 3))
        write_pyramid(tmp_path / f"{name}.tif", rgb, 0.5)
    path = tmp_path / "m.csv"
    path.write_text("slide,patient,label\ns0.tif,p0,a\ns1.tif,p1,b\ngone.tif,p2,b\n")
    return path


def test_prepare_lists_what_it_left_out(manifest: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, ["prepare", str(manifest), "--out", str(tmp_path / "bags"), *FEW])
    assert result.exit_code == 3, result.output
    assert "2 made" in result.output and "1 failed" in result.output
    assert "densenet121-random" in result.output
    assert "warning: random weights" in result.stderr
    assert "  line 4: gone.tif, failed (SLIDE_MISSING)" in result.stdout
    assert max(map(len, result.stdout.partition("left out:")[2].splitlines())) <= 80
    again = runner.invoke(app, ["prepare", str(manifest), "--out", str(tmp_path / "bags"), *FEW, "--json"])
    report = json.loads(again.stdout)
    assert (report["made"], report["kept"], report["failed"]) == (0, 2, 1)
    assert report["rows"][2]["reason"] == "SLIDE_MISSING" and report["mosaic"]["patch_px"] == 32


def test_show_one_bag_and_a_folder(manifest: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bags"
    runner.invoke(app, ["prepare", str(manifest), "--out", str(folder), *FEW])
    shown = json.loads(runner.invoke(app, ["bags", "show", str(folder), "--json"]).stdout)
    assert [bag["patches"] for bag in shown["bags"]] == [3, 3] and shown["damaged"] == []
    path = sorted(folder.glob("*.h5"))[0]
    one = runner.invoke(app, ["bags", "show", str(path)])
    assert one.exit_code == 0 and "densenet121-random:v1" in one.output
    path.write_bytes(path.read_bytes()[:-400])
    listed = runner.invoke(app, ["bags", "show", str(folder)])
    assert listed.exit_code == 3 and "damaged" in listed.output


def test_import_brings_features_in(manifest: Path, tmp_path: Path) -> None:
    for name in ("s0", "s1", "gone"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["features"] = np.ones((2, 3), np.float32)
            file["coords"] = np.zeros((2, 2), np.int64)
    command = ["bags", "import", str(tmp_path), "--manifest", str(manifest), "--out", str(tmp_path / "bags")]
    result = runner.invoke(app, [*command, "--encoder", "uni2"])
    assert result.exit_code == 0, result.output
    assert "3 made" in result.output and "imported:uni2" in result.output


def test_odd_names_cost_no_other_slide_and_are_shown_as_they_are(manifest: Path, tmp_path: Path) -> None:
    odd = ["[b]old [red] :x: ü.tif", "line\nbreak.tif", f"{'long' * 62}.tif"]
    for name in odd:
        (tmp_path / name).write_bytes((tmp_path / "s0.tif").read_bytes())
    rows = "".join(f'"{name}",p{number},a\n' for number, name in enumerate(odd, start=5))
    manifest.write_text(f"slide,patient,label\ns0.tif,p0,a\n{rows}{'x' * 300}.tif,p3,b\ns1.tif,p1,b\n")
    arguments = ["prepare", str(manifest), "--out", str(tmp_path / "bags ü [b]"), *FEW]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 3, result.output
    assert "5 made" in result.stdout and "1 failed" in result.stdout and "bags ü [b]" in result.stdout
    assert len(list((tmp_path / "bags ü [b]").glob("*.h5"))) == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--mpp", "nan"], "--mpp must be"),
        (["--mpp", "-1"], "--mpp must be"),
        (["--labels", ""], "unknown label"),
    ],
)
def test_prepare_refuses_what_cannot_be_meant(
    options: list[str], says: str, manifest: Path, tmp_path: Path
) -> None:
    result = runner.invoke(app, ["prepare", str(manifest), "--out", str(tmp_path / "bags"), *FEW, *options])
    assert isinstance(result.exception, HistoflareError) and says in str(result.exception)
    assert not (tmp_path / "bags").exists()


def test_prepare_takes_a_folder_of_sites(manifest: Path, tmp_path: Path) -> None:
    """Bags lie as 'run --sites DIR --bags DIR' reads them; a site of one class is a site."""
    sites = tmp_path / "sites"
    (sites / "clinic-a").mkdir(parents=True)
    for name, slide in (
        ("clinic-a/manifest", "../../s0.tif"),
        ("clinic-b", "../s1.tif"),
        ("external", "../s0.tif"),
    ):
        (sites / f"{name}.csv").write_text(f"slide,patient,label\n{slide},p,a\n")
    out = tmp_path / "bags"
    result = runner.invoke(app, ["prepare", "--sites", str(sites), "--out", str(out), *FEW])
    assert result.exit_code == 0, result.output
    assert "every row has the label 'a'" in result.stderr
    for site in ("clinic-a", "clinic-b", "external"):
        assert len(list((out / site).glob("*.h5"))) == 1
    again = runner.invoke(app, ["prepare", "--sites", str(sites), "--out", str(out), *FEW, "--json"])
    assert {name: each["kept"] for name, each in json.loads(again.stdout)["sites"].items()} == {
        "clinic-a": 1, "clinic-b": 1, "external": 1,
    }  # fmt: skip


def test_prepare_finds_cheap_faults_before_it_loads_the_encoder(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histoflare.bags.encoder.load_encoder", lambda *_, **__: pytest.fail("loaded"))
    out = ["--out", str(tmp_path / "bags"), *RANDOM]
    for arguments, says in (
        ([str(manifest), *out, "--mpp", "40"], "magnification"),
        ([str(tmp_path / "none.csv"), *out], "cannot be read"),
        (out, "one manifest"),
        ([str(manifest), *out, "--sites", str(tmp_path)], "one manifest"),
        ([*out, "--sites", str(tmp_path / "none")], "no <site>"),
    ):
        result = runner.invoke(app, ["prepare", *arguments])
        assert isinstance(result.exception, HistoflareError) and says in str(result.exception)


def test_without_a_name_the_encoder_is_the_installed_one_or_is_asked_for(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(spec: str, *_: object, **__: object) -> None:
        asked.append(spec)
        raise EncoderError("enough")

    monkeypatch.setattr("histoflare.bags.encoder.load_encoder", load)
    for packaged in (manifest, None):
        monkeypatch.setattr(
            "histoflare.bags.encoder_names.find_packaged_weights", lambda packaged=packaged: packaged
        )
        result = runner.invoke(app, ["prepare", str(manifest), "--out", str(tmp_path / "bags")])
    assert asked == ["efficientnet-lite0"]
    assert isinstance(result.exception, EncoderError) and result.exception.reason == "ENCODER_UNKNOWN"
    assert "--encoder" in str(result.exception) and "histoflare[demo]" in str(result.exception)


def test_a_wrong_encoder_is_refused_before_anything_slow_is_loaded(manifest: Path, tmp_path: Path) -> None:
    command = ["prepare", manifest, "--out", tmp_path / "bags", "--encoder"]
    for encoder, more in (("densenet", []), ("densenet121", ["--weights", tmp_path / "none.pth"])):
        said, loaded = loaded_by(*command, encoder, *more)
        assert encoder in said and not loaded

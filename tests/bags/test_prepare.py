from __future__ import annotations

import errno
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from histoflare import storage
from histoflare.bags import prepare as prepare_module
from histoflare.bags.bag import read_bag, write_bag
from histoflare.bags.folder import read_left_out, writing_to
from histoflare.bags.prepare import prepare
from histoflare.errors import BagError, EncoderError
from histoflare.slides import files
from histoflare.slides.files import fingerprint
from histoflare.slides.manifest import read_manifest
from histoflare.slides.mosaic import MosaicParameters, build_mosaic
from histoflare.slides.pyramid import write_pyramid
from histoflare.slides.reader import Slide
from tests.refusals import raises_reason

from .conftest import MakeManifest, MeanColour, paint_slide, write_rows


def statuses(report: prepare_module.PrepareReport) -> list[str]:
    return [row.status for row in report.rows]


def test_a_bag_holds_its_mosaics_features(
    make_manifest: MakeManifest, tmp_path: Path, encoder: MeanColour, parameters: MosaicParameters
) -> None:
    manifest = make_manifest(2)
    report = prepare(manifest, tmp_path / "bags", encoder, parameters)
    assert statuses(report) == ["made", "made"] and report.exit_code == 0
    row = manifest.rows[1]
    bag = read_bag(tmp_path / "bags" / f"{manifest.row_id(row)}.h5")
    with Slide(row.slide) as slide:
        mosaic = build_mosaic(slide, parameters)
        for patch, corner, feature in zip(mosaic.patches, bag.l0_coords, bag.features, strict=True):
            assert corner.tolist() == [patch.l0_x_px, patch.l0_y_px]
            pixels = slide.read((patch.l0_x_px, patch.l0_y_px), (64, 64), 0.5)
            np.testing.assert_allclose(feature, pixels.mean(axis=(0, 1)), rtol=1e-5)
    assert report.rows[1].patches == len(bag) > 3
    assert bag.header.slide_sha256 == fingerprint(row.slide).sha256
    assert MosaicParameters.from_json(bag.header.mosaic) == parameters
    assert (bag.header.encoder, bag.header.patch_px, bag.header.patch_mpp) == ("mean-colour", 64, 0.5)


def test_a_bag_says_nothing_of_whose_it_is(
    make_manifest: MakeManifest, tmp_path: Path, encoder: MeanColour, parameters: MosaicParameters
) -> None:
    manifest = make_manifest(2, patient=["Patient-Known", "p1"], label=["a", "b"])
    prepare(manifest, tmp_path / "bags", encoder, parameters)
    for path in (tmp_path / "bags").iterdir():
        content = path.read_bytes()
        assert b"Patient-Known" not in content
        assert str(tmp_path).encode() not in content and b".tif" not in content


def test_only_what_is_missing_or_changed_is_made(
    make_manifest: MakeManifest, tmp_path: Path, encoder: MeanColour, parameters: MosaicParameters
) -> None:
    manifest, bags = make_manifest(4), tmp_path / "bags"
    prepare(manifest, bags, encoder, parameters)
    before = {path.name: path.stat().st_mtime_ns for path in bags.glob("*.h5")}
    encoded = encoder.encoded
    assert statuses(prepare(manifest, bags, encoder, parameters)) == ["kept"] * 4
    assert encoder.encoded == encoded
    assert {path.name: path.stat().st_mtime_ns for path in bags.glob("*.h5")} == before

    names = [manifest.row_id(row) for row in manifest.rows]
    (bags / f"{names[0]}.h5").unlink()
    (bags / f"{names[1]}.h5").write_bytes(b"damaged")
    write_pyramid(manifest.rows[2].slide, paint_slide(99), 0.5)
    assert statuses(prepare(manifest, bags, encoder, parameters)) == ["made", "made", "made", "kept"]
    assert statuses(prepare(manifest, bags, encoder, parameters)) == ["kept"] * 4


def test_settings_that_change_the_bag_make_it_again(
    make_manifest: MakeManifest, tmp_path: Path, encoder: MeanColour, parameters: MosaicParameters
) -> None:
    manifest, bags = make_manifest(1), tmp_path / "bags"
    prepare(manifest, bags, encoder, parameters)
    assert statuses(prepare(manifest, bags, encoder, replace(parameters, seed=1))) == ["made"]
    assert statuses(prepare(manifest, bags, encoder, parameters)) == ["made"]
    other = MeanColour()
    other.id = "other"
    assert statuses(prepare(manifest, bags, other, parameters)) == ["made"]
    given = make_manifest(1, mpp=["0.45"])
    assert statuses(prepare(given, bags, other, parameters)) == ["made"]
    assert statuses(prepare(given, bags, other, parameters)) == ["kept"]
    assert statuses(prepare(given, bags, other, parameters, workers=3)) == ["kept"]


def test_a_touched_slide_is_hashed_once_and_kept(
    make_manifest: MakeManifest,
    tmp_path: Path,
    encoder: MeanColour,
    parameters: MosaicParameters,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest, bags = make_manifest(1), tmp_path / "bags"
    prepare(manifest, bags, encoder, parameters)
    os.utime(manifest.rows[0].slide, ns=(0, 10**18))
    hashed = []
    monkeypatch.setattr(files, "fingerprint", lambda path: hashed.append(path) or fingerprint(path))
    for _ in range(2):
        assert statuses(prepare(manifest, bags, encoder, parameters)) == ["kept"]
    assert len(hashed) == 1


def test_workers_do_not_change_the_bytes(
    make_manifest: MakeManifest, tmp_path: Path, encoder: MeanColour, parameters: MosaicParameters
) -> None:
    manifest = make_manifest(2)
    for workers in (1, 4):
        prepare(manifest, tmp_path / f"bags{workers}", encoder, parameters, workers)
    for path in (tmp_path / "bags1").glob("*.h5"):
        assert path.read_bytes() == (tmp_path / "bags4" / path.name).read_bytes()


def test_unusable_slides_cost_no_other(
    make_manifest: MakeManifest,
    tmp_path: Path,
    test_data: Path,
    encoder: MeanColour,
    parameters: MosaicParameters,
) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    bad = [path for path in sorted((test_data / "wsi_malformed").iterdir()) if path.suffix != ".txt"]
    for path in bad:
        shutil.copy(path, slides / path.name)
    write_pyramid(slides / "glass.tif", paint_slide(5, tissue=False), 0.5)
    write_pyramid(slides / "dark.tif", 255 - paint_slide(5, tissue=False), 0.5)
    names = [*(path.name for path in bad), "glass.tif", "dark.tif", "nowhere.tif"]
    extra = [{"slide": f"slides/{name}", "patient": name, "label": "a", "mpp": "0.5"} for name in names]
    manifest = make_manifest(2, extra)
    # the two good ones at both ends
    manifest = replace(manifest, rows=(manifest.rows[0], *manifest.rows[2:], manifest.rows[1]))
    report = prepare(manifest, tmp_path / "bags", encoder, replace(parameters, patch_px=16))
    assert statuses(report)[0] == statuses(report)[-1] == "made"
    assert report.exit_code == 3 and len(report.left_out) == len(names)
    by_name = {Path(row.slide).name: row for row in report.rows}
    assert by_name["unreadable.svs"].reason == "SLIDE_READ_FAILED"
    assert (by_name["glass.tif"].status, by_name["glass.tif"].reason) == ("skipped", "SLIDE_NO_TISSUE")
    assert (by_name["dark.tif"].status, by_name["dark.tif"].reason) == ("skipped", "SLIDE_DARK_BACKGROUND")
    assert (by_name["nowhere.tif"].status, by_name["nowhere.tif"].reason) == ("failed", "SLIDE_MISSING")
    for row in report.left_out:
        assert Path(row.slide).name in row.message and row.reason
    noted = read_left_out(tmp_path / "bags")
    assert set(noted) == {row.row_id for row in report.left_out}
    assert json.loads(json.dumps(report.to_json()))["failed"] == report.count("failed")
    assert len(list((tmp_path / "bags").glob("*.h5"))) == 2


def test_a_slide_that_breaks_half_way_costs_no_other(
    make_manifest: MakeManifest,
    tmp_path: Path,
    encoder: MeanColour,
    parameters: MosaicParameters,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = make_manifest(3)
    broken = manifest.rows[1].slide
    encode, calls = encoder.encode, []

    def count(patches: torch.Tensor) -> torch.Tensor:
        calls.append(len(patches))
        return encode(patches)

    read = Slide.read

    def fail(slide: Slide, *args: object) -> np.ndarray:
        if slide.path == broken and args[1] == (64, 64):
            raise ValueError("no such tile")
        return read(slide, *args)

    monkeypatch.setattr(encoder, "encode", count)
    monkeypatch.setattr(Slide, "read", fail)
    report = prepare(manifest, tmp_path / "bags", encoder, parameters)
    assert statuses(report) == ["made", "failed", "made"]
    assert "no such tile" in report.rows[1].message and len(calls) == 2


def test_an_encoder_that_does_not_fit_stops_the_run(
    make_manifest: MakeManifest, tmp_path: Path, encoder: MeanColour, parameters: MosaicParameters
) -> None:
    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise EncoderError("wrong size", reason="ENCODER_INPUT")

    encoder.encode = refuse  # type: ignore[method-assign]
    with pytest.raises(EncoderError):
        prepare(make_manifest(2), tmp_path / "bags", encoder, parameters)
    assert not list((tmp_path / "bags").glob("*.h5"))


def test_slides_without_mpp_take_the_default(
    tmp_path: Path, encoder: MeanColour, parameters: MosaicParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tifffile

    for name in ("own.tif", "none.tif"):
        write_pyramid(tmp_path / name, paint_slide(2), 0.5)
    with tifffile.TiffFile(tmp_path / "none.tif", mode="r+b") as tiff:
        for page in tiff.pages:
            page.tags["XResolution"].overwrite((0, 1))
    rows = [{"slide": name, "patient": name, "label": "a"} for name in ("own.tif", "none.tif")]
    manifest = write_rows(tmp_path / "m.csv", rows)
    report = prepare(manifest, tmp_path / "bags", encoder, parameters)
    assert statuses(report) == ["made", "failed"] and report.rows[1].reason == "SLIDE_MPP_MISSING"
    report = prepare(manifest, tmp_path / "bags", encoder, parameters, default_mpp=0.5)
    assert statuses(report) == ["kept", "made"]
    assert (
        statuses(prepare(manifest, tmp_path / "bags", encoder, parameters, default_mpp=0.5)) == ["kept"] * 2
    )
    report = prepare(manifest, tmp_path / "bags", encoder, parameters, default_mpp=0.45)
    assert statuses(report) == ["kept", "made"]


def test_bags_of_removed_rows_are_named_and_left_alone(
    make_manifest: MakeManifest, tmp_path: Path, encoder: MeanColour, parameters: MosaicParameters
) -> None:
    manifest = make_manifest(2)
    prepare(manifest, tmp_path / "bags", encoder, parameters)
    fewer = replace(manifest, rows=manifest.rows[:1])
    report = prepare(fewer, tmp_path / "bags", encoder, parameters)
    assert report.not_in_manifest == (f"{manifest.row_id(manifest.rows[1])}.h5",)
    assert len(list((tmp_path / "bags").glob("*.h5"))) == 2


def test_two_writers_do_not_meet(
    make_manifest: MakeManifest, tmp_path: Path, encoder: MeanColour, parameters: MosaicParameters
) -> None:
    manifest = make_manifest(1)
    with writing_to(tmp_path / "bags"), raises_reason("BAGS_BUSY"):
        prepare(manifest, tmp_path / "bags", encoder, parameters)
    assert statuses(prepare(manifest, tmp_path / "bags", encoder, parameters)) == ["made"]


def test_a_full_disk_is_one_error_and_leaves_whole_bags(
    make_manifest: MakeManifest,
    tmp_path: Path,
    encoder: MeanColour,
    parameters: MosaicParameters,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest, bags = make_manifest(4), tmp_path / "bags"
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # the second bag's file: one for the file, one for the folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(storage.os, "fsync", full)
    with raises_reason("BAG_NOT_WRITTEN") as error:
        prepare(manifest, bags, encoder, parameters)
    monkeypatch.undo()
    assert error.value.reason == "BAG_NOT_WRITTEN"
    made = list(bags.glob("*.h5"))
    assert made and all(len(read_bag(path)) for path in made)
    assert not list(bags.glob("*.partial")) and not list(bags.glob(".*.partial"))
    report = prepare(manifest, bags, encoder, parameters)
    assert sorted(set(statuses(report))) == ["kept", "made"]


def test_a_folder_that_cannot_be_made_is_one_error(
    make_manifest: MakeManifest, tmp_path: Path, encoder: MeanColour, parameters: MosaicParameters
) -> None:
    (tmp_path / "bags").write_text("a file")
    with pytest.raises(BagError) as error:
        prepare(make_manifest(1), tmp_path / "bags", encoder, parameters)
    assert error.value.reason == "BAG_NOT_WRITTEN"


# A process of its own, to be killed: prepare with the stand-in encoder, a little slow.
CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from bags.conftest import MeanColour
from histoflare.bags.prepare import prepare
from histoflare.slides.manifest import read_manifest
from histoflare.slides.mosaic import MosaicParameters
class Slow(MeanColour):
    def encode(self, patches):
        time.sleep({seconds})
        return super().encode(patches)
print("ready", flush=True)
report = prepare(read_manifest(Path({manifest!r})), Path({bags!r}), Slow(),
                 MosaicParameters(patch_px=64, fraction=0.5, clusters=3),
                 on_row=lambda row: print(row.status, flush=True))
"""


def start_child(manifest: Path, bags: Path, seconds: float, **options: object) -> subprocess.Popen[str]:
    code = CHILD.format(
        tests=str(Path(__file__).parents[1]), manifest=str(manifest), bags=str(bags), seconds=seconds
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.slow
def test_killed_at_any_moment_leaves_whole_bags(
    make_manifest: MakeManifest, tmp_path: Path, encoder: MeanColour, parameters: MosaicParameters
) -> None:
    manifest, bags = make_manifest(12), tmp_path / "bags"
    moments = random.Random(0)
    seen = 0
    for turn in range(4):
        child = start_child(manifest.path, bags, 0.1)  # 12 slides: the first kill always comes before the end
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0.02, 0.6))
        child.send_signal(signal.SIGKILL)
        _, errors = child.communicate()
        assert child.returncode == -signal.SIGKILL or (turn and child.returncode == 0), errors
        whole = list(bags.glob("*.h5"))
        assert all(len(read_bag(path)) for path in whole)
        assert len(whole) >= seen
        seen = len(whole)
    (bags / ".s0.h5.123.partial").write_bytes(b"half a bag")
    report = prepare(manifest, bags, encoder, parameters)
    assert report.exit_code == 0 and report.count("kept") == seen
    fresh = prepare(manifest, tmp_path / "fresh", encoder, parameters)
    assert fresh.count("made") == 12
    for path in (tmp_path / "fresh").glob("*.h5"):
        assert path.read_bytes() == (bags / path.name).read_bytes()
    assert not list(bags.glob(".*.partial"))


@pytest.mark.slow
def test_ctrl_c_ends_soon_and_leaves_whole_bags(make_manifest: MakeManifest, tmp_path: Path) -> None:
    manifest, bags = make_manifest(12), tmp_path / "bags"
    child = start_child(manifest.path, bags, 1.0)  # all of them take longer than may pass until it has ended
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    assert child.stdout.readline() == "made\n"
    started = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode != 0 and "KeyboardInterrupt" in errors
    assert time.monotonic() - started < 10
    made = list(bags.glob("*.h5"))
    assert 1 <= len(made) < 12 and all(len(read_bag(path)) for path in made)
    assert not list(bags.glob(".*.partial"))


@pytest.mark.slow
def test_a_write_that_breaks_off_leaves_nothing(make_manifest: MakeManifest, tmp_path: Path) -> None:
    """A real short write: the child may write no file longer than 2 kB, a bag is longer."""
    manifest = make_manifest(2)
    limit = 2048
    child = start_child(
        manifest.path,
        tmp_path / "bags",
        0,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1 and "BagError" in errors and "File too large" in errors
    assert [path.name for path in (tmp_path / "bags").iterdir()] == [".lock"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_slides(
    make_manifest: MakeManifest, tmp_path: Path, encoder: MeanColour, parameters: MosaicParameters
) -> None:
    slides, warm = 16, 4
    manifest = make_manifest(slides)
    done = 0
    levels: list[tuple[int, int, int]] = []

    def note(_: object) -> None:
        nonlocal done
        done += 1
        if done in (warm, slides):
            gc.collect()
            kinds = Counter(map(type, gc.get_objects()))
            levels.append((tracemalloc.get_traced_memory()[0], kinds[torch.Tensor], kinds[Slide]))

    tracemalloc.start()
    try:
        prepare(manifest, tmp_path / "bags", encoder, parameters, on_row=note)
    finally:
        tracemalloc.stop()
    early, late = levels
    grown = late[0] - early[0]
    assert grown < (slides - warm) * 20_000  # bytes of Python and NumPy; a slide's patches are 300,000
    assert late[1] <= early[1] + 2, "patches stay in memory"
    assert late[2] <= early[2] + 2, "slides stay in memory"


def test_rows_of_the_report_are_the_manifests(
    make_manifest: MakeManifest, tmp_path: Path, encoder: MeanColour, parameters: MosaicParameters
) -> None:
    manifest = make_manifest(3)
    rows, patches = [], []
    report = prepare(
        manifest,
        tmp_path / "bags",
        encoder,
        parameters,
        on_row=rows.append,
        on_patches=lambda row, done, total: patches.append((row.line, done, total)),
    )
    assert list(report.rows) == rows
    assert [row.line for row in report.rows] == [row.line for row in manifest.rows] == [2, 3, 4]
    assert [done for _, done, total in patches if done == total] == [row.patches for row in rows]
    assert read_manifest(manifest.path).rows == manifest.rows
    empty = replace(manifest, rows=())
    assert prepare(empty, tmp_path / "none", encoder, parameters).rows == ()


def test_a_bag_made_elsewhere_by_the_same_settings_is_kept(
    make_manifest: MakeManifest, tmp_path: Path, encoder: MeanColour, parameters: MosaicParameters
) -> None:
    manifest = make_manifest(1)
    prepare(manifest, tmp_path / "bags", encoder, parameters)
    path = next((tmp_path / "bags").glob("*.h5"))
    write_bag(tmp_path / "elsewhere" / path.name, read_bag(path))
    assert statuses(prepare(manifest, tmp_path / "elsewhere", encoder, parameters)) == ["kept"]

"""Slides from labelled tiles: every tile once at most, its pixels in place, sites and splits right."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from histoflare.errors import JobError, ManifestError
from histoflare.slides.assemble import (
    AssembledSlide,
    AssemblyParameters,
    Tile,
    assemble,
    lay_tiles,
    plan_assembly,
    read_tiles,
)
from histoflare.slides.manifest import read_manifest
from tests.refusals import raises_reason

TILE_PX = 48


def write_index(folder: Path, rows: list[tuple[str, str, str]], make: bool = True) -> Path:
    """An index of one-coloured tiles: (file, label, source_tile)."""
    for number, (name, _, _) in enumerate(rows):
        if make:
            colour = np.array([number % 250, 100 + number // 250, 50], np.uint8)
            Image.fromarray(np.broadcast_to(colour, (TILE_PX, TILE_PX, 3)).copy()).save(folder / name)
    path = folder / "index.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "source_tile"), *rows])
    return path


@pytest.fixture
def index(tmp_path: Path) -> Path:
    rows = [
        (f"{label}{i}.png", label, f"{label}-{i}") for label in ("lung_aca", "lung_scc") for i in range(70)
    ]
    return write_index(tmp_path, [*rows, ("benign.png", "lung_n", "lung_n-0")])


def tiles(count: int, labels: tuple[str, ...] = ("A", "B")) -> list[Tile]:
    return [Tile(Path(f"{label}{i}"), f"{label}{i}", label) for label in labels for i in range(count)]


def test_only_mapped_labels_are_read_under_their_new_name(index: Path) -> None:
    assert Counter(tile.label for tile in read_tiles(index)) == {"LUAD": 70, "LUSC": 70}
    assert Counter(tile.label for tile in read_tiles(index, {"lung_n": "benign"})) == {"benign": 1}


def test_of_copies_of_a_tile_the_first_is_read(tmp_path: Path) -> None:
    path = write_index(
        tmp_path, [("a.png", "lung_aca", "x"), ("b.png", "lung_aca", "x"), ("c.png", "lung_aca", "")]
    )
    assert [tile.name for tile in read_tiles(path)] == ["a.png", "c.png"]


def test_an_index_is_read_as_spreadsheets_write_it(tmp_path: Path) -> None:
    write_index(tmp_path, [("a.png", "lung_aca", ""), ("b.png", "lung_scc", "")])
    path = tmp_path / "index.csv"
    path.write_bytes("\ufeffFile;Label;Patient\r\n.\\a.png;lung_aca;1\r\nB.PNG;lung_scc; 2\r\n".encode())
    assert [(tile.path.name, tile.label, tile.patient) for tile in read_tiles(path)] == [
        ("a.png", "LUAD", "1"),
        ("b.png", "LUSC", "2"),
    ]


def test_every_fault_of_an_index_is_named_at_once(tmp_path: Path) -> None:
    path = write_index(tmp_path, [("a.png", "lung_aca", "1"), ("a.png", "lung_aca", "1")])
    with path.open("a") as file:
        file.write("gone.png,lung_scc,2\n")
    with pytest.raises(ManifestError) as caught:
        read_tiles(path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["line 3", "line 4"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("name,kind\na,b\n", ["column file"]),
        ("file,label\na.png,spleen\n", ["spleen", "lung_aca, lung_scc"]),
        ("file,label\n", ["lung_aca, lung_scc"]),
    ],
)
def test_an_index_without_tiles_is_refused(tmp_path: Path, content: str, says: list[str]) -> None:
    (tmp_path / "index.csv").write_text(content)
    with raises_reason("MANIFEST_INVALID", tmp_path / "index.csv", *says):
        read_tiles(tmp_path / "index.csv")


def test_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        read_tiles(tmp_path / "none.csv")
    assert caught.value.reason == "MANIFEST_UNREADABLE"


@pytest.mark.parametrize("seed", range(5))
def test_no_tile_is_used_twice_and_sizes_are_kept(seed: int) -> None:
    planned = plan_assembly(tiles(150), AssemblyParameters(seed=seed))
    used = [tile.name for slide in planned for tile in slide.tiles]
    assert len(used) == len(set(used))
    assert len(used) >= 2 * (150 - 2)  # of each label fewer than one slide's tiles are left over
    assert {len(slide.tiles) for slide in planned} == {3, 4}
    assert all(tile.label == slide.label for slide in planned for tile in slide.tiles)
    per_patient = Counter(slide.patient for slide in planned)
    assert set(per_patient.values()) == {1, 2}
    assert all(len({s.site for s in planned if s.patient == patient}) == 1 for patient in per_patient)


def patients_by_site(seed: int, **options: object) -> Counter[tuple[str, str]]:
    planned = plan_assembly(tiles(150), AssemblyParameters(seed=seed, **options))  # type: ignore[arg-type]
    patients = {(slide.site, slide.label, slide.patient) for slide in planned}
    return Counter((site, label) for site, label, _ in patients)


@pytest.mark.parametrize("seed", range(5))
def test_iid_is_dealt_evenly(seed: int) -> None:
    counts = patients_by_site(seed, iid=True)
    for label in "AB":
        of_label = [counts[f"hospital-{number}", label] for number in range(1, 5)]
        assert min(of_label) >= 2 and max(of_label) - min(of_label) <= 1
        assert counts["external", label] >= 2


def test_a_site_that_drew_few_patients_is_not_filled_up() -> None:
    drawn = [patients_by_site(seed)[f"hospital-{number}", "A"] for seed in range(5) for number in range(1, 5)]
    assert min(drawn) < 2


def label_spread(iid: bool) -> float:
    """Mean over seeds of the spread, over sites, of the share of label A."""
    spreads = []
    for seed in range(20):
        planned = plan_assembly(tiles(300), AssemblyParameters(seed=seed, iid=iid, external_share=0))
        counts = Counter((s.site, s.label) for s in planned)
        shares = [
            counts[f"hospital-{i}", "A"] / (counts[f"hospital-{i}", "A"] + counts[f"hospital-{i}", "B"])
            for i in range(1, 5)
        ]
        spreads.append(np.ptp(shares))
    return float(np.mean(spreads))


def test_sites_have_other_mixes_of_labels_unless_iid() -> None:
    assert label_spread(iid=False) > label_spread(iid=True) + 0.15


def test_too_few_tiles_say_what_to_change() -> None:
    with raises_reason("JOB_INVALID", "label A ", " 4 patients", " 10"):
        plan_assembly(tiles(20), AssemblyParameters())


@pytest.mark.parametrize(
    "wrong",
    [{"tiles_per_slide": (4, 3)}, {"slides_per_patient": (0, 1)}, {"sites": 0}, {"external_share": 1.0}],
)
def test_impossible_parameters_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(JobError):
        AssemblyParameters(**wrong)  # type: ignore[arg-type]


def test_tiles_lie_on_the_slide_as_they_were(index: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assemble(index, out, AssemblyParameters(sites=2, external_share=0, mpp=0.5))
    described = json.loads((out / "assembly.json").read_text())["slides"]
    for entry in described[:6]:
        path = out / entry["site"] / "slides" / f"{entry['slide']}.tif"
        with openslide.OpenSlide(path) as slide:
            assert slide.dimensions == (2 * TILE_PX, 2 * TILE_PX)
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
            shown = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")).astype(int)
        centres = {tuple(shown[y, x]) for y in (24, 72) for x in (24, 72)}
        wanted = [np.asarray(Image.open(index.parent / name))[0, 0].astype(int) for name in entry["tiles"]]
        wanted += [np.array([255, 255, 255])] * (4 - len(wanted))
        for colour in wanted:
            assert min(np.abs(np.array(centre) - colour).max() for centre in centres) <= 4


def test_same_seed_same_bytes(index: Path, tmp_path: Path) -> None:
    parameters = AssemblyParameters(sites=2)
    for name in ("a", "b"):
        assemble(index, tmp_path / name, parameters)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 20
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_a_tile_that_is_no_picture_is_named(index: Path, tmp_path: Path) -> None:
    for path in index.parent.glob("lung_scc*.png"):
        path.write_bytes(b"no picture")
    with raises_reason("SLIDE_READ_FAILED", "lung_scc"):
        assemble(index, tmp_path / "out", AssemblyParameters(sites=2))


def tiles_of_patients(labels_of: dict[str, str], tiles_each: int) -> list[Tile]:
    return [
        Tile(Path(name), name, label, patient)
        for patient, labels in labels_of.items()
        for label in labels
        for name in (f"{patient}{label}{i}" for i in range(tiles_each))
    ]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_patients_are_never_mixed(seed: int, mixed: bool) -> None:
    """Neither in a slide nor over sites, also if each has tiles of both labels, or fewer than a slide has."""
    labels_of = {f"Ä/{i}": "AB" if mixed else "AB"[i % 2] for i in range(30)} | {"few": "A"}
    given = [tile for tile in tiles_of_patients(labels_of, 7) if tile.name not in ("fewA1", "fewA2")]
    given = [tile for tile in given if tile.patient != "few" or tile.name == "fewA0"]
    planned = plan_assembly(given, AssemblyParameters(seed=seed, sites=2))
    for slide in planned:
        assert {(tile.patient, tile.label) for tile in slide.tiles} == {(slide.patient, slide.label)}
        assert "/" not in slide.slide_id
    sites = {patient: {slide.site for slide in planned if slide.patient == patient} for patient in labels_of}
    assert all(len(at) == 1 for at in sites.values())
    assert {*sites["few"]} and len({slide.slide_id for slide in planned}) == len(planned)
    assert {site for at in sites.values() for site in at} == {"hospital-1", "hospital-2", "external"}


def test_the_patients_of_an_index_come_into_the_manifests(tmp_path: Path) -> None:
    rows = [
        (f"{label}{i}.png", label, f"{label}{i}") for label in ("lung_aca", "lung_scc") for i in range(48)
    ]
    path = write_index(tmp_path, rows)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file", "label", "source_tile", "patient"))
        table.writerows((*row, f"p{number // 6}") for number, row in enumerate(rows))
    made = assemble(path, tmp_path / "out", AssemblyParameters(sites=2, external_share=0))
    patients = [{row.patient for row in read_manifest(manifest).rows} for manifest in made.values()]
    assert set().union(*patients) == {f"p{number}" for number in range(16)}
    assert sum(map(len, patients)) == 16
    path.write_text(path.read_text().replace("lung_aca0,p0", "lung_aca0,"))
    with pytest.raises(ManifestError) as caught:
        read_tiles(path)
    assert caught.value.problems == ("line 2: no patient",)


def test_tiles_are_laid_the_right_way_up(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3  # turned by 180 degrees
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 200
    Image.fromarray(pixels[::-1, ::-1].copy()).save(tmp_path / "t.png", exif=exif)
    slide = AssembledSlide("s", "p", "site", "A", (Tile(tmp_path / "t.png", "t.png", "A"),))
    laid = lay_tiles(slide, AssemblyParameters(tiles_per_slide=(1, 1)))
    np.testing.assert_array_equal(laid, pixels)


def test_the_lung_tiles_make_a_federation(test_data: Path, tmp_path: Path) -> None:
    made = assemble(test_data / "cls_lc25000_lung" / "index.csv", tmp_path)
    assert list(made) == ["hospital-1", "hospital-2", "hospital-3", "hospital-4", "external"]
    manifests = {site: read_manifest(path, labels=("LUAD", "LUSC")) for site, path in made.items()}
    assert 297 // 4 - 1 <= sum(len(m.rows) for m in manifests.values()) <= 297 // 3
    for site, manifest in manifests.items():
        splits = {(row.split, row.label) for row in manifest.rows}
        assert len(splits) == (2 if site == "external" else 4)

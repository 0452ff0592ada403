"""Folders of images and of masks with one class."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from histoflare.errors import HistoflareError, ManifestError, MaskError
from histoflare.masks.image_manifest import read_image_manifest
from histoflare.masks.importers import ImportReport
from histoflare.masks.importers.binary import Source, import_binary, read_binary
from histoflare.masks.windows import IGNORE
from tests.refusals import raises_reason

from .image_folders import rgb, save


def import_nuclei(folder: Path, out: Path, **options: Any) -> ImportReport:
    return import_binary(Source(folder), out, "nucleus", **options)


def write_set(folder: Path, index: str | None = "name,patient\na,1\nb,1\nc,2\n") -> Path:
    for number, name in enumerate("abc"):
        save(folder / "images" / f"{name}.png", rgb(8, 10, number))
        save(folder / "masks" / f"{name}.png", np.eye(8, 10, dtype=np.uint8) * np.uint8(255))
    if index is not None:
        (folder / "index.csv").write_text(index)
    return folder


def test_binary_masks_and_patients(tmp_path: Path) -> None:
    report = import_nuclei(write_set(tmp_path / "set"), tmp_path / "out", mpp=0.25)
    assert report.labels == ("background", "nucleus") and report.notes == ()
    rows = report.manifest.rows
    assert [(row.patient, row.mpp) for row in rows] == [("1", 0.25), ("1", 0.25), ("2", 0.25)]
    assert rows[0].image.resolve() == (tmp_path / "set" / "images" / "a.png").resolve()
    np.testing.assert_array_equal(np.asarray(Image.open(rows[0].mask)), np.eye(8, 10))


@pytest.mark.parametrize("index", [None, "name,w\na,1\nb,1\nc,1\n"])
def test_without_patients_each_image_is_one_and_a_note_says_so(tmp_path: Path, index: str | None) -> None:
    report = import_nuclei(write_set(tmp_path / "set", index), tmp_path / "out")
    assert [row.patient for row in report.manifest.rows] == ["a", "b", "c"]
    (note,) = report.notes
    assert "each image counts as a patient" in note and "index.csv" in note


def test_masks_of_every_form_are_nuclei(tmp_path: Path) -> None:
    expected = np.array([[0, 1], [1, 0]])
    binary = (expected * 255).astype(np.uint8)
    forms = {
        "gray": binary,
        "instances": np.array([[0, 1], [300, 0]], np.uint16),
        "many": np.array([[0, 1], [256 * 256, 0]], np.int32),
        "colours": np.dstack([binary * 0, binary, binary * 0]),
        "alpha": np.dstack([binary, binary, binary, binary * 0 + 255]).astype(np.uint8),
        "bits": expected.astype(bool),
    }
    for name, pixels in forms.items():
        suffix = ".tif" if name == "many" else ".png"
        np.testing.assert_array_equal(read_binary(save(tmp_path / f"{name}{suffix}", pixels)), expected, name)


def test_a_second_import_changes_nothing(tmp_path: Path) -> None:
    source, out = write_set(tmp_path / "set"), tmp_path / "out"
    import_nuclei(source, out)
    first = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*.png")}
    manifest = (out / "images.csv").read_bytes()
    (out / "masks" / "b.png").write_bytes(b"half of")
    import_nuclei(source, out)
    assert (out / "images.csv").read_bytes() == manifest
    for path, (content, changed) in first.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == changed) == (path.name != "b.png")


@pytest.mark.parametrize("inside", [".", "masks", "images"])
def test_what_is_imported_is_never_written_over(tmp_path: Path, inside: str) -> None:
    source = write_set(tmp_path / "set")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    with raises_reason("MASK_UNUSABLE", source / inside):
        import_nuclei(source, source / inside)
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


def test_a_folder_inside_one_that_is_read_can_be_written(tmp_path: Path) -> None:
    save(tmp_path / "a.png", rgb(8, 10))
    save(tmp_path / "a_mask.png", np.eye(8, 10, dtype=np.uint8))
    for _ in range(2):
        report = import_binary(Source(tmp_path, ".", "."), tmp_path / "out", "gland")
        assert [row.image for row in report.manifest.rows] == [tmp_path / "a.png"]
    save(tmp_path / "set" / "masks" / "a.png", np.eye(8, 10, dtype=np.uint8))
    with raises_reason("MASK_UNUSABLE", tmp_path / "set"):  # the masks it reads are where it writes them
        import_binary(Source(tmp_path, ".", "set/masks"), tmp_path / "set", "gland")


def refusal(folder: Path, out: Path, kind: type[HistoflareError] = MaskError) -> str:
    with pytest.raises(kind) as caught:
        import_nuclei(folder, out)
    assert not (out / "images.csv").exists()
    return str(caught.value)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    source, out = write_set(tmp_path / "set"), tmp_path / "out"
    (source / "index.csv").write_text("name,patient\na,1\na,2\nb,\nz,3\n")
    message = refusal(source, out, ManifestError)
    for part in (
        "line 3: image 'a' has another",
        "line 4: no patient",
        "line 5: no image 'z'",
        "image 'c' is not",
    ):
        assert part in message
    (source / "index.csv").unlink()
    save(source / "masks" / "a.png", np.zeros((8, 9), np.uint8))
    (source / "masks" / "b.png").write_bytes((source / "masks" / "c.png").read_bytes()[:60])
    message = refusal(source, out)
    assert "a.png: has 10 x 8 px, and its mask 9 x 8" in message and "b.png: the mask is damaged" in message
    (source / "masks" / "a.png").unlink()
    save(source / "masks" / "d.png", np.zeros((8, 10), np.uint8))
    message = refusal(source, out)
    assert "a.png: has no mask" in message and "d.png: a mask without an image" in message
    assert "no such folder" in refusal(tmp_path, out)


def test_folders_and_classes_of_any_name(tmp_path: Path) -> None:
    for name in ("img", "img/sub"):
        save(tmp_path / name / "a.1.jpg", rgb(8, 10))
    save(tmp_path / "msk" / "a.1_mask.png", np.eye(8, 10, dtype=np.uint8) * np.uint8(255))
    source = Source(tmp_path, "img", "msk")
    report = import_binary(source, tmp_path / "out", "gland", background="other")
    assert report.labels == ("other", "gland")
    (row,) = report.manifest.rows
    assert row.image.name == "a.1.jpg" and np.asarray(Image.open(row.mask)).sum() == 8
    for label in ("other", " "):
        with raises_reason("JOB_INVALID", repr(label), "'other'"):
            import_binary(source, tmp_path / "out", label, background="other")
    save(tmp_path / "msk" / "a.1-label.png", np.eye(8, 10, dtype=np.uint8))
    with raises_reason("MASK_MISSING", "a.1_mask.png", "a.1.jpg"):
        import_binary(source, tmp_path / "out", "gland")


def test_images_and_masks_in_one_folder(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"{name}.png", rgb(8, 10))
        save(tmp_path / f"{name}_seg.png", np.eye(8, 10, dtype=np.uint8))
    report = import_binary(Source(tmp_path, ".", "."), tmp_path.parent / "out", "gland")
    assert [row.image.name for row in report.manifest.rows] == ["a.png", "b.png"]


def test_splits_sites_and_resolutions_of_the_index_are_kept(tmp_path: Path) -> None:
    index = (
        "image;patient;split;site;sex;mpp;n\na.png;1;train;north;F;0.5;3\n"
        "b.png;1;train;north;F;;\nc.png;2;test;;;;\n"
    )
    report = import_nuclei(write_set(tmp_path / "set", index), tmp_path / "out", mpp=None)
    rows = read_image_manifest(report.manifest.path).rows
    assert [(row.patient, row.split, row.mpp) for row in rows] == [
        ("1", "train", 0.5),
        ("1", "train", None),
        ("2", "test", None),
    ]
    assert rows[0].subgroups == {"site": "north", "sex": "F"} and rows[2].subgroups == {}
    again = import_nuclei(write_set(tmp_path / "set", index), tmp_path / "out", mpp=0.25)
    assert {row.mpp for row in again.manifest.rows} == {0.25}


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffImage;Patient;Split\r\na.png;1;train\r\nb.png;1;train\r\nc.png;2;test\r\n".encode(),
        b"sep=;\r\nname;patient;split\r\na;1;train\r\nb;1;train\r\nc;2;test\r\n",
        "File\tPATIENT\tsplit\r\na\t1\ttrain\r\n\r\nb\t1\ttrain\r\nc\t2\ttest\r\n".encode("utf-16"),
    ],
)
def test_an_index_is_read_as_spreadsheets_write_it(tmp_path: Path, content: bytes) -> None:
    source = write_set(tmp_path / "set")
    (source / "index.csv").write_bytes(content)
    report = import_nuclei(source, tmp_path / "out")
    assert [(row.patient, row.split) for row in report.manifest.rows] == [
        ("1", "train"),
        ("1", "train"),
        ("2", "test"),
    ]
    assert report.notes == ()


def test_a_mask_whose_255_may_be_not_annotated_is_refused(tmp_path: Path) -> None:
    source = write_set(tmp_path / "set")
    both = np.zeros((8, 10), np.uint8)
    both[0, 0], both[1] = 1, 255
    save(source / "masks" / "b.png", both)
    assert "masks check" in refusal(source, tmp_path / "out")
    both[2, 0] = 2  # a number an object
    save(source / "masks" / "b.png", both)
    assert len(import_nuclei(source, tmp_path / "out").manifest.rows) == 3


@pytest.mark.parametrize(
    ("index", "part"),
    [
        ("name,patient,split\na,1,train\nb,1,test\nc,2,test\n", "line 3: patient 1 is in 'test' here"),
        ("name,patient,split\na,1,train\nb,1,train\nc,2,\n", "some rows have a split and others not"),
        ("name,patient,split\na,1,teach\nb,1,train\nc,2,test\n", "line 2: split 'teach' is none of"),
        ("name,patient,mpp\na,1,40x\nb,1,\nc,2,\n", "line 2: mpp '40x' is not"),
        ("name,split\na,train\na,test\nb,train\nc,test\n", "line 3: image 'a' has another patient, split"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(tmp_path: Path, index: str, part: str) -> None:
    assert part in refusal(write_set(tmp_path / "set", index), tmp_path / "out", ManifestError)


def test_splits_without_patients_are_kept(tmp_path: Path) -> None:
    index = "name,split\na,train\nb,train\nc,test\n"
    report = import_nuclei(write_set(tmp_path / "set", index), tmp_path / "out")
    assert [(row.patient, row.split) for row in report.manifest.rows] == [
        ("a", "train"),
        ("b", "train"),
        ("c", "test"),
    ]
    assert "no column 'patient'" in report.notes[0]


def imagescope(*layers: str, mpp: str = 'MicronsPerPixel="0.252"') -> str:
    return f'<?xml version="1.0"?>\n<Annotations {mpp}>{"".join(layers)}</Annotations>'


def layer(regions: str, name: str = "") -> str:
    attribute = f'<Attributes><Attribute Name="{name or "Description"}" Id="0" Value=""/></Attributes>'
    return f'<Annotation Id="1" Name="" Type="4">{attribute}<Regions>{regions}</Regions></Annotation>'


def region(*corners: tuple[float, float], negative: int = 0, kind: int = 0) -> str:
    vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in corners)
    return f'<Region Id="7" Type="{kind}" NegativeROA="{negative}"><Vertices>{vertices}</Vertices></Region>'


def box(left: float, top: float, right: float, bottom: float, negative: int = 0) -> str:
    corners = (left, top), (right, top), (right, bottom), (left, bottom)
    return region(*corners, negative=negative)


def write_monuseg(folder: Path, content: str, stem: str = "TCGA-A7-A13E-01Z-00-DX1") -> Path:
    save(folder / "Tissue Images" / f"{stem}.tif", rgb(60, 80))
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "Annotations" / f"{stem}.xml").write_text(content)
    return folder


def test_monuseg_as_it_is_given(tmp_path: Path) -> None:
    drawn = layer(
        box(10, 20, 30, 40) + box(25, 30, 40, 45) + box(14, 24, 18, 28, negative=1) + region((1, 1), (5, 5))
    )
    folder = write_monuseg(tmp_path / "set", imagescope(drawn, layer("")))
    report = import_nuclei(folder, tmp_path / "out")
    (row,) = report.manifest.rows
    expected = np.zeros((60, 80), np.uint8)
    expected[20:40, 10:30] = expected[30:45, 25:40] = 1
    expected[24:28, 14:18] = 0
    np.testing.assert_array_equal(np.asarray(Image.open(row.mask)), expected)
    assert (row.patient, row.mpp) == ("TCGA-A7-A13E", 0.252)
    assert report.notes == ("there is no index.csv: patients are those in TCGA's names",)


def test_images_and_xmls_in_one_folder(tmp_path: Path) -> None:
    save(tmp_path / "t.tif", rgb(60, 80))
    (tmp_path / "t.xml").write_text(imagescope(layer(region((10, 10), (50, 30), kind=2)), mpp=""))
    report = import_binary(Source(tmp_path, ".", "."), tmp_path.parent / "out", "gland")
    (row,) = report.manifest.rows
    assert row.mpp is None
    # an ellipse of half axes 20 and 10
    assert np.asarray(Image.open(row.mask)).sum() == pytest.approx(np.pi * 20 * 10, rel=0.02)


def test_a_resolution_that_no_manifest_may_have_is_refused_or_left_out(tmp_path: Path) -> None:
    with raises_reason("SLIDE_MPP_INVALID", "--mpp"):
        import_nuclei(write_set(tmp_path / "set"), tmp_path / "out", mpp=20.0)
    assert not (tmp_path / "out").exists()
    drawn = imagescope(layer(box(10, 20, 30, 40)), mpp='MicronsPerPixel="20"')
    (row,) = import_nuclei(write_monuseg(tmp_path / "xml", drawn), tmp_path / "out").manifest.rows
    assert row.mpp is None


def test_layers_that_are_not_the_class_are_not_annotated(tmp_path: Path) -> None:
    layers = [
        layer(box(0, 0, 20, 20), "Epithelial"),
        layer(box(10, 10, 30, 30), "Ambiguous"),
        layer(box(40, 40, 50, 50), "Lymphocyte"),
    ]
    folder = write_monuseg(tmp_path / "set", imagescope(*layers))
    message = refusal(folder, tmp_path / "out")
    assert "layers Epithelial, Ambiguous, Lymphocyte" in message and "--layer" in message
    with raises_reason("MASK_UNUSABLE", "Epitelial; ", "Ambiguous, Epithelial, Lymphocyte"):
        import_binary(Source(folder, layers=("Epitelial",)), tmp_path / "out", "nucleus")
    source = Source(folder, layers=("Epithelial", "Lymphocyte"))
    (row,) = import_binary(source, tmp_path / "out", "nucleus").manifest.rows
    expected = np.zeros((60, 80), np.uint8)
    expected[10:30, 10:30] = IGNORE
    expected[:20, :20] = expected[40:50, 40:50] = 1
    np.testing.assert_array_equal(np.asarray(Image.open(row.mask)), expected)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("<Annotations>", "the XML is damaged"),
        ("<ASAP_Annotations/>", "begins with <ASAP_Annotations>"),
        (
            imagescope(layer('<Region Id="9"><Vertex X="1"/></Region>')),
            "region 9 has a corner that is not two",
        ),
        (imagescope(layer(region((0, 0), (float("nan"), 1), (2, 2)))), "region 7 has a corner that is not"),
    ],
)
def test_xmls_that_cannot_be_read_say_why(tmp_path: Path, content: str, part: str) -> None:
    assert part in refusal(write_monuseg(tmp_path / "set", content), tmp_path / "out")


def test_a_real_set_of_instances(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "seg_dsb2018_he"
    seen: list[tuple[int, int]] = []
    report = import_nuclei(source, tmp_path, on_image=lambda *done: seen.append(done))
    assert seen[-1] == (107, 107) and len(report.manifest.rows) == 107
    with (source / "index.csv").open() as file:
        counts = {row["name"]: int(row["n_nuclei"]) for row in csv.DictReader(file)}
    for row in report.manifest.rows[::20]:
        instances = np.asarray(Image.open(source / "masks" / f"{row.image.stem}.png"))
        assert len(np.unique(instances)) - 1 == counts[row.image.stem]
        made = np.asarray(Image.open(row.mask))
        assert set(np.unique(made)) == {0, 1}
        np.testing.assert_array_equal(made == 1, instances != 0)

"""TCGA names and the manifests made from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from histoflare.errors import ManifestError
from histoflare.slides.manifest import read_manifest
from histoflare.slides.tcga import HOSPITALS, LABELS, Barcode, parse_barcode, write_tcga_manifests
from tests.refusals import raises_reason

UUID = "6b6b2c1a-9d1c-4c4f-8f0a-1234567890ab"


def name(site: str, patient: int, sample: str = "01Z", section: str = "DX1", portion: str = "00") -> str:
    return f"TCGA-{site}-{patient:04d}-{sample}-{portion}-{section}.{UUID.upper()}.svs"


def gdc(
    folder: Path, filenames: list[str], content: bytes = b"slide", flat: bool = False
) -> tuple[Path, Path]:
    """Write a GDC manifest and the slides it lists, as gdc-client does."""
    lines = ["id\tfilename\tmd5\tsize\tstate"]
    slides = folder / "slides"
    for number, filename in enumerate(filenames):
        where = slides if flat else slides / f"id{number}"
        where.mkdir(parents=True, exist_ok=True)
        (where / filename).write_bytes(content)
        lines.append(f"id{number}\t{filename}\t{'0' * 32}\t{len(content)}\treleased")
    path = folder / "gdc_manifest.txt"
    path.write_text("\n".join(lines) + "\n")
    return path, slides


@pytest.mark.parametrize(
    ("filename", "barcode"),
    [
        (name("05", 4244), Barcode("05", "TCGA-05-4244", "01", "DX")),
        (name("55", 1, "11A", "TS1", "01"), Barcode("55", "TCGA-55-0001", "11", "TS")),
        (name("33", 2, "01A", "BSA", "01"), Barcode("33", "TCGA-33-0002", "01", "BS")),
        (name("L9", 3, "02A", "MS2", "02").lower(), Barcode("L9", "TCGA-L9-0003", "02", "MS")),
        ("CMU-1.svs", None),
        ("TCGA-05.svs", None),
    ],
)
def test_names(filename: str, barcode: Barcode | None) -> None:
    assert parse_barcode(filename) == barcode


def test_table_is_the_papers() -> None:
    """Tissue source sites as in the fact sheet: hospital, LUAD, LUSC, external."""
    table = {
        (
            each.name,
            *(next((c for c, of in each.codes.items() if of == label), None) for label in LABELS),
            each.external,
        )
        for each in HOSPITALS
    }
    assert table == {
        ("International Genomics Consortium", "55", "56", False),
        ("Indivumed", "05", "66", False),
        ("Asterand", "86", "85", False),
        ("Johns Hopkins", "49", "33", False),
        ("Christiana Healthcare", "44", "43", True),
        ("Roswell Park", "73", "60", True),
        ("Princess Margaret", None, "18", True),
    }


@pytest.mark.parametrize("flat", [False, True])
def test_one_manifest_per_hospital(tmp_path: Path, flat: bool) -> None:
    filenames = [name("05", patient, section=f"DX{n}") for patient in range(10) for n in (1, 2)]
    filenames += [name("66", patient) for patient in range(10, 20)]
    filenames += [name("49", 30), name("33", 31), name("18", 40), name("18", 41)]
    path, slides = gdc(tmp_path, filenames, flat=flat)
    result = write_tcga_manifests(path, slides, tmp_path / "out")
    written = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*.csv")}
    assert written == {"indivumed.csv", "johns-hopkins.csv", "external/princess-margaret.csv"}
    assert (result.left_out, result.missing) == ({}, ())

    indivumed = read_manifest(tmp_path / "out" / "indivumed.csv", LABELS)
    assert {(row.patient[5:7], row.label) for row in indivumed.rows} == {("05", "LUAD"), ("66", "LUSC")}
    assert {row.site for row in indivumed.rows} == {"Indivumed"}
    tested = {row.patient for row in indivumed.rows if row.split == "test"}
    assert len(tested) == 4  # 2 of the 10 patients of each label
    assert not tested & {row.patient for row in indivumed.rows if row.split == "train"}
    assert len(indivumed.rows) == 30
    external = read_manifest(tmp_path / "out" / "external" / "princess-margaret.csv", LABELS)
    assert {row.split for row in external.rows} == {"test"}


def test_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    filenames = [
        name("05", 1),
        name("05", 1, "01A", "TS1", "01"),
        name("05", 2, "01A", "BS1", "01"),
        name("05", 3, "11A", "TS1", "01"),
        name("05", 4, "06Z"),
        name("99", 5),
        "notes.svs",
    ]
    path, slides = gdc(tmp_path, filenames)
    diagnostic = write_tcga_manifests(path, slides, tmp_path / "dx")
    assert diagnostic.left_out == {
        "frozen sections (--frozen takes them)": 2,
        "normal tissue (sample 11)": 1,
        "neither primary nor recurrent tumour (sample 06)": 1,
        "of another tissue source site (99)": 1,
        "not named as a TCGA slide": 1,
    }
    assert len(diagnostic.manifests["Indivumed"].rows) == 1
    both = write_tcga_manifests(path, slides, tmp_path / "both", frozen=True)
    assert len(both.manifests["Indivumed"].rows) == 3


def test_missing_and_truncated_slides_are_all_named(tmp_path: Path) -> None:
    path, slides = gdc(tmp_path, [name("05", 1), name("05", 2), name("66", 3)])
    (slides / "id0" / name("05", 1)).unlink()
    (slides / "id1" / name("05", 2)).write_bytes(b"sli")
    with pytest.raises(ManifestError) as caught:
        write_tcga_manifests(path, slides, tmp_path / "out")
    first, second = caught.value.problems
    assert first == f"line 2: no {name('05', 1)}"
    assert second.startswith("line 3: ")
    assert "3 of 5 bytes" in second
    assert not (tmp_path / "out").exists()
    allowed = write_tcga_manifests(path, slides, tmp_path / "out", allow_missing=True)
    assert allowed.missing == caught.value.problems
    assert [row.patient for row in allowed.manifests["Indivumed"].rows] == ["TCGA-66-0003"]


@pytest.mark.parametrize("text", ["", "slide,patient,label\na,b,c\n", "id,filename\na,b\n"])
def test_not_a_gdc_manifest(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gdc.txt"
    path.write_text(text)
    with raises_reason("MANIFEST_UNREADABLE", "GDC"):
        write_tcga_manifests(path, tmp_path, tmp_path / "out")


def test_faults_of_the_gdc_manifest(tmp_path: Path) -> None:
    good = name("05", 1)
    path = tmp_path / "gdc.txt"
    rows = [
        f"a\t{good}\t0\t5\tr",
        f"\t{good}\t0\t5\tr",
        f"b\t../{good}\t0\t5\tr",
        "c\tx.svs\t0\tbig\tr",
        f"d\t{good}\t0\t5\tr",
    ]
    path.write_text("\n".join(["id\tfilename\tmd5\tsize\tstate", *rows, ""]))
    with pytest.raises(ManifestError) as caught:
        write_tcga_manifests(path, tmp_path, tmp_path / "out")
    assert caught.value.problems == (
        "line 3: no id or no filename",
        "line 4: id and filename may not be paths",
        "line 5: size 'big' is not a number of bytes",
        f"line 6: {good} is already in line 2",
    )


def test_no_slide_of_a_known_hospital(tmp_path: Path) -> None:
    path, slides = gdc(tmp_path, [name("99", 1)])
    with raises_reason("MANIFEST_INVALID", path, "(99)"):
        write_tcga_manifests(path, slides, tmp_path / "out")


def test_counts_stand_beside_the_papers(tmp_path: Path) -> None:
    """Adnan et al. 2022, Table 2: 884 images for training and testing, 385 external."""
    names = [name("55", 1), name("55", 2), name("55", 3, "01A", "TS1"), name("56", 4, "01A", "BS1")]
    names += [name("18", 5), name("55", 6, "11A", "TS1"), name("ZZ", 7)]
    path, slides = gdc(tmp_path, names)
    (slides / "id1" / names[1]).unlink()
    for frozen in (False, True):
        made = write_tcga_manifests(path, slides, tmp_path / "out", frozen=frozen, allow_missing=True).counts
        first, last = made["International Genomics Consortium"], made["Princess Margaret"]
        assert (first.published, first.diagnostic, first.frozen) == (
            {"LUAD": 189, "LUSC": 78},
            {"LUAD": 2, "LUSC": 0},
            {"LUAD": 1, "LUSC": 1},
        )
        assert (last.published["LUAD"], last.diagnostic) == (0, {"LUAD": 0, "LUSC": 1})
    totals = {each.name: sum(each.published.values()) for each in HOSPITALS}
    assert list(totals.values()) == [267, 211, 207, 199, 223, 110, 52]

"""Which files a slide is made of, and their fingerprint."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from histoflare.errors import SlideError
from histoflare.slides.files import DIRECTORY_CLASS_UID, fingerprint, opening_file, slide_files
from histoflare.slides.reader import Slide
from tests.refusals import raises_reason


def test_one_file(test_data: Path) -> None:
    path = test_data / "wsi" / "CMU-1-Small-Region.svs"
    print_ = fingerprint(path)
    assert slide_files(path) == [path]
    assert print_.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (print_.size_bytes, print_.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)


def test_dicom_series_is_all_its_files_and_no_other(test_data: Path, tmp_path: Path) -> None:
    fixtures = test_data / "wsi" / "openslide_python_fixtures"
    for file in [
        *fixtures.glob("boxes_*.dcm"),
        *(test_data / "wsi" / "dicom" / "highdicom_sm").glob("*.dcm"),
    ]:
        shutil.copy(file, tmp_path / file.name)
    series = [tmp_path / "boxes_0.dcm", tmp_path / "boxes_1.dcm"]
    assert slide_files(series[0]) == slide_files(series[1]) == series
    assert fingerprint(series[0]).sha256 == fingerprint(series[1]).sha256
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in series]
    assert fingerprint(series[0]).sha256 == hashlib.sha256(b"".join(digests)).hexdigest()
    assert fingerprint(series[0]).size_bytes == sum(file.stat().st_size for file in series)
    with pytest.raises(SlideError) as caught:
        opening_file(tmp_path)
    assert caught.value.reason == "SLIDE_AMBIGUOUS"
    (tmp_path / "sm_image_control.dcm").unlink()
    assert opening_file(tmp_path) == series[0]


def test_folder_without_slides(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no slide")
    with pytest.raises(SlideError) as caught:
        opening_file(tmp_path)
    assert caught.value.reason == "SLIDE_UNSUPPORTED"


def test_mirax_has_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a.mrxs").write_bytes(b"index")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "Data0000.dat").write_bytes(b"pixels")
    before = fingerprint(tmp_path / "a.mrxs")
    assert before.size_bytes == len(b"index") + len(b"pixels")
    (tmp_path / "a" / "Data0000.dat").write_bytes(b"pixelS")
    assert fingerprint(tmp_path / "a.mrxs").sha256 != before.sha256


def test_vms_has_the_files_it_names(tmp_path: Path) -> None:
    (tmp_path / "a.vms").write_text("[Virtual Microscope Specimen]\nImageFile=a.jpg\nMapFile=missing.jpg\n")
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    (tmp_path / "b.jpg").write_bytes(b"of another slide")
    assert slide_files(tmp_path / "a.vms") == [tmp_path / "a.jpg", tmp_path / "a.vms"]


def directory() -> bytes:
    """Return a DICOMDIR: it names a series too, and sorts before the instances."""
    meta = b"\x02\x00\x02\x00UI\x14\x00" + DIRECTORY_CLASS_UID
    return bytes(128) + b"DICM" + meta + b"\x20\x00\x0e\x00UI\x04\x001.2\x00"


def test_a_medium_as_a_pacs_writes_it(test_data: Path, tmp_path: Path) -> None:
    """DICOMDIR, sub-folders, instances without an ending; a series of another modality beside it."""
    fixtures = test_data / "wsi" / "openslide_python_fixtures"
    instances = tmp_path / "DICOM" / "ST000000" / "SE000000"
    instances.mkdir(parents=True)
    for number in range(2):
        shutil.copy(fixtures / f"boxes_{number}.dcm", instances / f"IM{number:06d}")
    (tmp_path / "DICOMDIR").write_bytes(directory())
    other = tmp_path / "DICOM" / "ST000000" / "SE000001"
    other.mkdir()
    (other / "IM000000").write_bytes(bytes(128) + b"DICM" + b"\x20\x00\x0e\x00UI\x04\x009.9\x00")
    assert opening_file(tmp_path) == instances / "IM000000"
    assert slide_files(tmp_path) == [instances / "IM000000", instances / "IM000001"]
    with Slide(tmp_path) as slide:
        assert slide.info.vendor == "dicom"
    with raises_reason("SLIDE_UNSUPPORTED", tmp_path / "DICOMDIR"):
        Slide(tmp_path / "DICOMDIR")


def test_a_folder_of_one_slide_is_that_slide(tmp_path: Path) -> None:
    (tmp_path / "uuid" / "logs").mkdir(parents=True)
    for name in ("TCGA.svs", "annotations.txt", "logs/TCGA.svs.parcel", "._TCGA.svs"):
        (tmp_path / "uuid" / name).write_bytes(b"x")
    assert opening_file(tmp_path / "uuid") == tmp_path / "uuid" / "TCGA.svs"
    (tmp_path / "uuid" / "second.ndpi").write_bytes(b"x")
    with pytest.raises(SlideError) as caught:
        opening_file(tmp_path / "uuid")
    assert caught.value.reason == "SLIDE_AMBIGUOUS"
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "Slidedat.ini").write_bytes(b"x")
    with raises_reason("SLIDE_MISSING", ".mrxs"):
        opening_file(tmp_path / "m")
    (tmp_path / "m.mrxs").write_bytes(b"x")
    assert opening_file(tmp_path / "m") == tmp_path / "m.mrxs"

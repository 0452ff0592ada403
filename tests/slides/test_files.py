"""Which files a slide is made of, and their fingerprint."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from histoflare.errors import SlideError
from histoflare.slides.files import fingerprint, opening_file, slide_files


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

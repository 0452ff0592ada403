"""Which slides and images a folder or a manifest names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histoflare.errors import SlideError
from histoflare.slides.mask_pyramid import write_mask_pyramid
from histoflare.slides.planes import Plane
from histoflare.slides.pyramid import write_pyramid
from histoflare.slides.sources import find_sources
from tests.refusals import raises_reason

RGB = np.full((40, 50, 3), 200, np.uint8)


def test_a_folder_s_slides(tmp_path: Path) -> None:
    """Two of one name have different ids; what this package made, images and hidden files are no slides."""
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    for name in ("a.tif", "sub/a.tif", "sub/.hidden/a.tif"):
        write_pyramid(tmp_path / name, RGB, 0.5)
    (tmp_path / "damaged.svs").write_text("no slide")
    Image.fromarray(RGB).save(tmp_path / "photo.png")
    mask = np.zeros((40, 50), np.uint8)
    (tmp_path / "scratch").mkdir()
    write_mask_pyramid(
        tmp_path / "mask.tiff",
        lambda x, y, width, height: mask[y : y + height, x : x + width],
        (50, 40),
        0.5,
        plane=Plane("level0", (0, 0), (50, 40)),
        scratch=tmp_path / "scratch",
    )
    found = find_sources(tmp_path, images=True)
    assert [source.written for source in found] == ["a.tif", "damaged.svs", "sub/a.tif"]
    assert {source.kind for source in found} == {"slide"}
    assert len({source.file_id for source in found}) == 3
    assert found[0].file_id.startswith("a-") and found[2].file_id.startswith("a-")


def test_a_folder_of_images(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.tif"):
        Image.fromarray(RGB).save(tmp_path / name)
    found = find_sources(tmp_path, images=True)
    assert [(source.written, source.kind) for source in found] == [
        (name, "image") for name in ("a.png", "b.jpg", "c.tif")
    ]
    with pytest.raises(SlideError):
        find_sources(tmp_path)


def test_a_manifest_needs_the_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    path.write_text("slide\na.svs\nsub/a.svs\n")
    assert [source.path for source in find_sources(path)] == [tmp_path / "a.svs", tmp_path / "sub" / "a.svs"]
    path.write_text("slide,patient,label,mpp\na.svs,p1,x,0.25\n")
    (row,) = find_sources(path)
    assert (row.patient, row.mpp, row.kind) == ("p1", 0.25, "slide")
    path.write_text("image,mask,patient\na.png,m.png,p1\n")
    (row,) = find_sources(path, images=True)
    assert (row.path, row.kind) == (tmp_path / "a.png", "image")
    path.write_text("slide\na.svs\na.svs\n")
    with raises_reason("MANIFEST_INVALID", "line 3: slide a.svs", "line 2"):
        find_sources(path)

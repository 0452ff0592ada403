"""Images as viewers show them, whatever they are saved in."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histoflare.slides.image_file import UnreadableImageError, open_image, rgb_on_white

# Exif 2.32, table 6: where the visible image's first row and column lie in what is stored
STORED_FROM_SHOWN = {
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.swapaxes(0, 1),
    6: lambda shown: shown.swapaxes(0, 1)[::-1],
    7: lambda shown: shown[::-1, ::-1].swapaxes(0, 1),
    8: lambda shown: shown.swapaxes(0, 1)[:, ::-1],
}


def encoded(pixels: NDArray[np.uint8], kind: str, orientation: int | None = None, mode: str = "") -> bytes:
    content = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[274] = orientation
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if mode == "P":
        image.putpalette([channel for index in range(256) for channel in (index, 0, 255 - index)])
    quality = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    image.save(content, kind, exif=exif, **quality)  # type: ignore[arg-type]
    return content.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", STORED_FROM_SHOWN)
def test_an_image_is_turned_as_its_tag_says(kind: str, orientation: int) -> None:
    shown = np.kron(np.arange(1, 7).reshape(2, 3), np.ones((16, 16))).astype(np.uint8) * np.uint8(40)
    stored = STORED_FROM_SHOWN[orientation](np.dstack([shown, shown, 255 - shown]))
    opened = rgb_on_white(open_image(encoded(stored, kind, orientation)))
    assert opened.shape == (32, 48, 3)
    assert np.abs(opened[..., 0].astype(int) - shown).max() <= (3 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", STORED_FROM_SHOWN)
def test_a_mask_with_a_palette_is_turned_too_and_keeps_its_values(orientation: int) -> None:
    shown = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = open_image(encoded(STORED_FROM_SHOWN[orientation](shown), "PNG", orientation, "P"))
    assert image.mode == "P" and image.getpalette() is not None
    np.testing.assert_array_equal(np.asarray(image), shown)


@pytest.mark.parametrize("orientation", [0, 9, 700])
def test_an_orientation_that_is_none_changes_nothing(orientation: int) -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(np.asarray(open_image(encoded(pixels, "PNG", orientation))), pixels)


def test_exif_that_cannot_be_read_says_nothing() -> None:
    pixels = np.full((16, 16, 3), 99, np.uint8)
    content = encoded(pixels, "JPEG", 6)
    start = content.index(b"Exif\0\0") + 6
    broken = content[:start] + b"garbage." + content[start + 8 :]
    np.testing.assert_array_equal(np.asarray(open_image(broken)), pixels)


def test_which_of_several_planes_is_meant_is_not_guessed(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), np.uint8)
    path = tmp_path / "a.ome.tif"
    for pixels, photometric, axes in ((rgb, "rgb", "ZYXS"), (rgb[..., 0], "minisblack", "CYX")):
        tifffile.imwrite(path, pixels, photometric=photometric, metadata={"axes": axes})
        with pytest.raises(UnreadableImageError, match="3 images of 48 x 32 px"):
            open_image(path.read_bytes())


def test_one_plane_its_copies_and_planes_by_channel_are_one_image(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, rgb[None], photometric="rgb", metadata={"axes": "ZYXS"})
    np.testing.assert_array_equal(np.asarray(open_image(path.read_bytes())), rgb)
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(rgb, photometric="rgb", metadata=None)
        tiff.write(rgb[::2, ::2], photometric="rgb", subfiletype=1, metadata=None)
        tiff.write(rgb[:9, :8], photometric="rgb", metadata=None)  # a label
    np.testing.assert_array_equal(np.asarray(open_image(path.read_bytes())), rgb)
    tifffile.imwrite(path, np.moveaxis(rgb, 2, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(np.asarray(open_image(path.read_bytes())), rgb)

"""What is said of files that are no slides, or of a kind that is not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from histoflare.errors import SlideError
from histoflare.slides.reader import Slide


def said_of(path: Path) -> str:
    with pytest.raises(SlideError) as caught:
        Slide(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    ("name", "content", "says", "remedy"),
    [
        ("a.svs", b"", "empty", "Copy it again"),
        ("a.svs", b"<!DOCTYPE html>\n<html><body>403</body></html>", "web page", "Download"),
        ("a.svs", b"  <HTML><head>", "web page", "Download"),
        ("._a.svs", b"\0\5\x16\7\0\2\0\0Mac OS X", "macOS", "without '._'"),
        ("~$a.svs", b"\5owner", "lock file", "Leave it out"),
        ("a.svs", b"PK\x03\x04\x14\0", "zip archive", "Unpack"),
        ("a.svs.gz", b"\x1f\x8b\x08\0", "gzip archive", "Unpack"),
        ("a.pdf", b"%PDF-1.7", "PDF", "Leave it out"),
        ("a.svs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS", "git lfs pull"),
        ("a.czi", b"ZISRAWFILE\0\0\0\0\0\0" + bytes(64), "cannot be opened", "Copy it again"),
        ("a.vsi", b"II*\0" + bytes(64), "Olympus VSI", "convert"),
        ("a.nd2", b"\xda\xce\xbe\x0a" + bytes(64), "Nikon", "convert"),
        ("a.lif", b"\x70\0\0\0" + bytes(64), "Leica LIF", "convert"),
        ("a.isyntax", b'<DataObject ObjectType="DPUfsImport">' + bytes(64), "iSyntax", "convert"),
        ("a.svs.part", b"II*\0" + bytes(64), "not ended", "Download"),
        ("a.tif", b"II*\0" + bytes(64), "damaged", "Copy it again"),
        ("a.mrxs", b"\xff\xd8\xff\xe0" + bytes(64), "folder 'a'", "Copy it too"),
        ("a.svs", b"a,b\n1,2\n", "text file", "leave it out"),
        ("noending", b"\1\2\0\3" * 40, "not a slide format", "svs"),
    ],
)
def test_every_other_file_is_named_with_what_to_do(
    tmp_path: Path, name: str, content: bytes, says: str, remedy: str
) -> None:
    (tmp_path / name).write_bytes(content)
    message = said_of(tmp_path / name)
    assert says in message and remedy in message


def test_pictures_and_plain_tiffs_are_whole_files_to_convert(tmp_path: Path) -> None:
    picture = Image.fromarray(np.full((64, 64, 3), 200, np.uint8))
    for name in ("a.png", "a.jpg", "a.tif"):
        picture.save(tmp_path / name)
        message = said_of(tmp_path / name)
        assert "tiled TIFF" in message and "again" not in message


def test_a_kind_that_is_not_supported_is_not_called_damaged(tmp_path: Path) -> None:
    """A healthy SVS with a compression that OpenSlide does not know."""
    tifffile.imwrite(
        tmp_path / "a.svs",
        np.full((512, 512, 3), 200, np.uint8),
        tile=(256, 256),
        photometric="rgb",
        compression=34712,
        description="Aperio Image Library v12\r\n512x512|AppMag = 40|MPP = 0.25",
        metadata=None,
    )
    message = said_of(tmp_path / "a.svs")
    assert "not supported" in message and "34712" in message and "convert" in message
    assert "again" not in message


@pytest.mark.parametrize(
    ("axes", "shape", "says"),
    [
        ("YXS", (300, 400, 3), ""),
        ("ZYXS", (3, 300, 400, 3), "3 focal planes"),
        ("TYXS", (2, 300, 400, 3), "2 points in time"),
        ("CYX", (4, 300, 400), "4 channels"),
    ],
)
def test_planes_of_an_ome_tiff(tmp_path: Path, axes: str, shape: tuple[int, ...], says: str) -> None:
    path = tmp_path / "a.ome.tif"
    photometric = "rgb" if axes.endswith("S") else "minisblack"
    tifffile.imwrite(
        path, np.zeros(shape, np.uint8), tile=(64, 64), ome=True, photometric=photometric,
        metadata={"axes": axes},
    )  # fmt: skip
    if says:
        assert says in said_of(path)
    else:
        with Slide(path, mpp=0.5) as slide:
            assert slide.info.l0_size_px == (400, 300)


def test_images_of_an_ome_tiff(tmp_path: Path) -> None:
    """The first is read: right if it is the largest, and said if it is the label."""
    for name, sides in (("right", (512, 64)), ("label", (64, 512))):
        with tifffile.TiffWriter(tmp_path / f"{name}.ome.tif", ome=True) as writer:
            for side in sides:
                image = np.full((side, side, 3), 200, np.uint8)
                writer.write(image, tile=(64, 64), photometric="rgb", metadata={"axes": "YXS"})
    with Slide(tmp_path / "right.ome.tif", mpp=0.5) as slide:
        assert slide.info.l0_size_px == (512, 512)
    assert "2 images" in said_of(tmp_path / "label.ome.tif")

"""What a file is that OpenSlide does not open, and what to do with it: seldom is it damaged.

Told by the first bytes, as ``file`` does, not by the name.
"""

from __future__ import annotations

import re
from pathlib import Path

import tifffile

from histoflare.slides.files import DIRECTORY_CLASS_UID

HEAD_BYTES = 4096

CONVERT = "convert it to a tiled TIFF, e.g. with QuPath or Bio-Formats (bfconvert)"
TILE = "make a tiled TIFF of it, e.g. 'vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg'"

ARCHIVES = {
    b"PK\x03\x04": "zip",
    b"\x1f\x8b": "gzip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}
PICTURES = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"BM": "BMP", b"GIF8": "GIF"}
MICROSCOPES = {
    b"\xda\xce\xbe\x0a": "a Nikon ND2 file",
    b"\x70\x00\x00\x00": "a Leica LIF file",
    b"<DataObject": "a Philips iSyntax file",
}
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".aspx", ".filepart")

KIND_NOT_SUPPORTED = re.compile(
    r"unsupported|not supported|dissimilar|inconsistent main|pyramid levels|image flavor|not a wsi dicom",
    re.IGNORECASE,
)
"""What OpenSlide says of whole files that it cannot read, as opposed to broken ones."""


def describe_unknown(path: Path) -> str:
    """Return what the file at ``path``, whose format OpenSlide does not know, is, and what to do with it."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if path.name.startswith("._") or head.startswith(b"\0\x05\x16\x07"):
        return "a companion file that macOS makes, not the slide. Name the file without '._'"
    if path.name.startswith("~$"):
        return "a lock file of a program that has another file open, not a slide. Leave it out"
    if not head:
        return "the file is empty. Copy it again from its source"
    if path.suffix.lower() in UNFINISHED:
        return "a download that has not ended. Download it again"
    if path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir():
        return f"the folder '{path.stem}' that belongs beside the .mrxs file is not there. Copy it too"
    return _by_content(path, head)


def describe_refused(cause: str) -> str:
    """Return what is wrong with a file that OpenSlide knows and does not open; ``cause`` is what it says."""
    if KIND_NOT_SUPPORTED.search(cause):
        return f"not supported ({cause}). The file may well be whole: {CONVERT}"
    return f"the slide cannot be opened ({cause}). Copy it again from its source, or leave it out"


def ome_fault(description: str, l0_size_px: tuple[int, int]) -> str:
    """Return why the first plane of an OME-TIFF is not the slide, "" if it is.

    Args:
        description: OME-XML (https://docs.openmicroscopy.org/ome-model), or any other text.
        l0_size_px: (width, height) of what would be read.
    """
    if "<OME" not in description:
        return ""
    images = [
        dict(re.findall(r'(\w+)="([^"]*)"', tag)) for tag in re.findall(r"<Pixels\b[^>]*>", description)
    ]
    if not images:
        return ""
    largest = max(_number(image, "SizeX") * _number(image, "SizeY") for image in images)
    if largest > l0_size_px[0] * l0_size_px[1]:
        return f"an OME-TIFF of {len(images)} images of which the first is not the largest"
    for axis, what in (("SizeZ", "focal planes"), ("SizeT", "points in time")):
        if _number(images[0], axis) > 1:
            return f"an OME-TIFF of {images[0][axis]} {what}"
    samples = re.findall(r'<Channel\b[^>]*\bSamplesPerPixel="(\d+)"', description)
    if _number(images[0], "SizeC") > 1 and (not samples or samples[0] == "1"):
        return f"an OME-TIFF of {images[0]['SizeC']} channels, each a plane of its own"
    return ""


def _number(attributes: dict[str, str], name: str) -> int:
    text = attributes.get(name, "1")
    return int(text) if text.isdigit() else 1


def _by_content(path: Path, head: bytes) -> str:
    for magic, name in ARCHIVES.items():
        if head.startswith(magic):
            return f"a {name} archive. Unpack it, and name the slide in it"
    if head[257:262] == b"ustar":
        return "a tar archive. Unpack it, and name the slide in it"
    if head.startswith(b"%PDF"):
        return "a PDF document, not a slide. Leave it out"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the slide itself. Get it with 'git lfs pull'"
    if path.suffix.lower() == ".vsi":
        return f"an Olympus VSI file (its pixels lie in the folder _{path.stem}_): not supported; {CONVERT}"
    for magic, name in MICROSCOPES.items():
        if head.startswith(magic):
            return f"{name}: not supported; {CONVERT}"
    for magic, name in PICTURES.items():
        if head.startswith(magic):
            return f"an ordinary {name} picture, not a whole-slide format; {TILE}"
    if head.startswith(TIFF):
        return _tiff(path)
    if head[128:132] == b"DICM" and DIRECTORY_CLASS_UID in head[:1024]:
        return "the index of a DICOM medium. Name the folder that holds the slide's files"
    if head[128:132] == b"DICM":
        return f"a DICOM file, but none of whole-slide microscopy that can be read; {CONVERT}"
    if b"<html" in head.lower() or b"<!doctype html" in head.lower():
        return "a web page, perhaps an error in place of a download. Download the slide again"
    if b"\0" not in head:
        return "a text file, not a slide. Download or copy the slide again, or leave it out"
    return (
        "not a slide format OpenSlide knows, or the file is damaged. Whole-slide formats such as svs, ndpi, "
        "mrxs, scn, bif, tiled tiff and DICOM are read"
    )


def _tiff(path: Path) -> str:
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            tiled, photometric, shape = page.is_tiled, page.photometric, page.shape
    except Exception:  # whatever tifffile stumbles over: a TIFF that is none
        return "a TIFF file that is damaged or cut short. Copy it again from its source, or leave it out"
    if not tiled:
        return f"a TIFF without tiles, not a whole-slide one; {TILE}"
    kind = f"{photometric.name.lower()}, {' x '.join(map(str, shape))}"
    return f"a TIFF of a kind that OpenSlide does not read ({kind}); {CONVERT}"

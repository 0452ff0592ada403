"""The files a slide is made of, and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from histoflare.errors import SlideError

SERIES_UID_TAG = b"\x20\x00\x0e\x00"
"""DICOM (0020,000E) Series Instance UID, little endian. It is compared between files and never kept."""

SLIDE_CLASS_UID = b"1.2.840.10008.5.1.4.1.1.77.1.6"
"""DICOM PS3.4 B.5: VL Whole Slide Microscopy Image Storage. It stands in a file's first group."""

DIRECTORY_CLASS_UID = b"1.2.840.10008.1.3.10"
"""Media Storage Directory Storage: a DICOMDIR, which lists files and has no pixels."""

MOST_FILES = 10_000
"""Of a folder's sub-folders looked through; a slide has some tens."""

SLIDE_SUFFIXES = {
    ".svs",
    ".ndpi",
    ".mrxs",
    ".scn",
    ".bif",
    ".svslide",
    ".vms",
    ".vmu",
    ".tif",
    ".tiff",
    ".czi",
}

DICOM_HEADER_BYTES = 1 << 18
"""The series UID stands in group 0020, well before the pixels; more than this is not searched."""


@dataclass(frozen=True)
class SlideFingerprint:
    """Which bytes a slide was: SHA-256 in hex, total size, latest change (nanoseconds since 1970)."""

    sha256: str
    size_bytes: int
    mtime_ns: int


def slide_files(path: Path) -> list[Path]:
    """Return the files the slide at ``path`` is made of, sorted; the file itself for one-file formats.

    A Mirax slide is its ``.mrxs`` file and the folder of that name, a DICOM slide all files of its series in
    the same folder, a Hamamatsu VMS/VMU slide the files its index names.

    Raises:
        SlideError: As :func:`opening_file`.
    """
    first = opening_file(path)
    suffix = first.suffix.lower()
    if suffix == ".mrxs":
        folder = first.with_suffix("")
        return sorted([first, *(file for file in folder.rglob("*") if file.is_file())])
    if suffix in {".vms", ".vmu"}:
        lines = first.read_text("utf-8", "replace").splitlines()
        named = {first.parent / line.partition("=")[2].strip() for line in lines if "=" in line}
        return sorted({first, *(file for file in named if file.is_file())})
    series = _series_uid(first)
    if series is not None:
        return sorted(file for file in _files_in(first.parent) if _series_uid(file) == series)
    return [first]


def fingerprint(path: Path) -> SlideFingerprint:
    """Return the fingerprint of the slide at ``path``.

    For one file ``sha256`` is that of its bytes (what ``sha256sum`` prints); for several it is the SHA-256
    over the files' SHA-256 digests in the order of their names.

    Raises:
        SlideError: As :func:`opening_file`, or a file cannot be read (``SLIDE_OPEN_FAILED``).
    """
    digests, size_bytes, mtime_ns = [], 0, 0
    for file in slide_files(path):
        try:
            with file.open("rb") as opened:
                digests.append(hashlib.file_digest(opened, "sha256").digest())
            stat = file.stat()
        except OSError as error:
            raise SlideError(f"{file}: cannot be read ({error}).", reason="SLIDE_OPEN_FAILED") from error
        size_bytes += stat.st_size
        mtime_ns = max(mtime_ns, stat.st_mtime_ns)
    sha256 = digests[0].hex() if len(digests) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()
    return SlideFingerprint(sha256, size_bytes, mtime_ns)


def fingerprint_if_same(path: Path, known: SlideFingerprint) -> SlideFingerprint | None:
    """Return the fingerprint of the slide at ``path`` if it has the bytes of ``known``, else None.

    A slide of the same size and time of change is taken for the same, and not read.

    Raises:
        SlideError: As :func:`fingerprint`.
        OSError: A file cannot be looked at.
    """
    stats = [file.stat() for file in slide_files(path)]
    if sum(stat.st_size for stat in stats) != known.size_bytes:
        return None
    if max(stat.st_mtime_ns for stat in stats) == known.mtime_ns:
        return known
    found = fingerprint(path)
    return found if found.sha256 == known.sha256 else None


def opening_file(path: Path) -> Path:
    """Return the file to open for ``path``: itself, or for a folder the slide that it holds.

    That is the first file of a DICOM series, in the folder or below it; the ``.mrxs`` file that a folder with
    a ``Slidedat.ini`` belongs to; or the only file with a slide's ending.

    Raises:
        SlideError: No such file or folder (``SLIDE_MISSING``), a folder without a slide
            (``SLIDE_UNSUPPORTED``) or with several (``SLIDE_AMBIGUOUS``).
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise SlideError(
            f"{path}: no such slide. Correct the path, or copy the slide there.", reason="SLIDE_MISSING"
        )
    whole = [file for file in _files_in(path) if file.suffix.lower() in SLIDE_SUFFIXES]
    if (path / "Slidedat.ini").is_file():
        whole = [path.parent / f"{path.name}.mrxs"]
        if not whole[0].is_file():
            raise SlideError(
                f"{path}: the folder of a .mrxs file, which is not beside it. Copy it there.",
                reason="SLIDE_MISSING",
            )
    by_series = _dicom_series(_files_in(path)) or _dicom_series(_files_below(path))
    if len(by_series) > 1:
        raise SlideError(
            f"{path}: the folder holds {len(by_series)} DICOM series. Name one file of the slide "
            "that is meant.",
            reason="SLIDE_AMBIGUOUS",
        )
    found = [*by_series.values(), *whole]
    if len(found) > 1:
        raise SlideError(
            f"{path}: the folder holds {len(found)} slides. Name the file that is meant.",
            reason="SLIDE_AMBIGUOUS",
        )
    if not found:
        raise SlideError(
            f"{path}: a folder without DICOM files or one other slide. Name the slide's file itself.",
            reason="SLIDE_UNSUPPORTED",
        )
    return found[0]


def dicom_slides(folder: Path) -> list[Path]:
    """Return the first file of each DICOM series in ``folder`` (not below it), sorted."""
    return sorted(_dicom_series(_files_in(folder)).values())


def _dicom_series(files: Iterable[Path]) -> dict[bytes, Path]:
    """Return the first file of each DICOM series; of other modalities only if none is a slide's."""
    series: dict[bytes, Path] = {}
    slides: dict[bytes, Path] = {}
    for file in files:
        uid, is_slide = _series_uid(file), False
        if uid is not None:
            with file.open("rb") as opened:
                is_slide = SLIDE_CLASS_UID in opened.read(1024)
            series.setdefault(uid, file)
        if uid is not None and is_slide:
            slides.setdefault(uid, file)
    return slides or series


def _files_below(folder: Path) -> list[Path]:
    """Return the files in sub-folders, as a PACS writes them, sorted; at most ``MOST_FILES``."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return sorted(islice(files, MOST_FILES))


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def _series_uid(file: Path) -> bytes | None:
    """Return the series UID of a DICOM file, None for any other file.

    Found by its tag, without a DICOM reader: OpenSlide groups files by it but does not list them.
    """
    try:
        with file.open("rb") as opened:
            header = opened.read(DICOM_HEADER_BYTES)
    except OSError:
        return None
    if header[128:132] != b"DICM" or DIRECTORY_CLASS_UID in header[:1024]:
        return None
    at = header.find(SERIES_UID_TAG)
    if at < 0:
        return b""
    value = at + 8
    explicit = header[at + 4 : at + 6] == b"UI"
    length = int.from_bytes(header[at + 6 : value] if explicit else header[at + 4 : value], "little")
    return header[value : value + min(length, 64)].rstrip(b"\0 ")

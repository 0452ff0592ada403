"""A bag: the features of one slide's mosaic, one HDF5 file.

The file holds ``features`` (n, f) float32 and ``coords`` (n, 2) int64 (x, y of a patch's top-left corner in
level-0 pixels), the names TRIDENT and CLAM use, and one JSON header as the root attribute ``histoflare``.
It names neither the patient nor the label nor the slide's path: those stay in the manifest.
The same content gives the same bytes, and a hash in the header tells damage apart from data.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from histoflare.errors import BagError
from histoflare.storage import write_bytes

HEADER_ATTRIBUTE = "histoflare"
BAG_VERSION = 1

# What h5py raises on a file that is cut off or overwritten depends on where the damage lies.
DAMAGE = (AttributeError, OSError, KeyError, ValueError, TypeError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class BagHeader:
    """What a bag was made from and with.

    Args:
        version: Version of this header.
        slide_sha256: SHA-256 of the slide's content; None for imported features.
        slide_size_bytes, slide_mtime_ns: Size and time of change of the slide, to tell quickly that it is
            the same; 0 for imported features.
        mosaic: The mosaic's parameters as JSON; None for imported features.
        encoder: The encoder's id.
        features: Number f of features of a patch.
        given_mpp: Resolution of level 0 as the manifest gave it; None if the slide's own was used.
        source: What made the features: ``histoflare``, or the toolkit they were imported from.
        patch_mpp, patch_px: Resolution (µm/px) and side of the encoded patches, None where unknown.
        l0_patch_px: Side of a patch in level-0 pixels, None where unknown.
        preprocessing: What the encoder did to a patch (``bags.preprocessing``) as JSON; None where unknown.
        content_sha256: Hash of features and coordinates; set by :func:`write_bag`.
    """

    version: int
    slide_sha256: str | None
    slide_size_bytes: int
    slide_mtime_ns: int
    mosaic: Mapping[str, Any] | None
    encoder: str
    features: int
    given_mpp: float | None = None
    source: str = "histoflare"
    patch_mpp: float | None = None
    patch_px: int | None = None
    l0_patch_px: int | None = None
    preprocessing: Mapping[str, Any] | None = None
    content_sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the header as plain JSON values."""
        plain = {
            name: None if value is None else dict(value)
            for name, value in (("mosaic", self.mosaic), ("preprocessing", self.preprocessing))
        }
        return asdict(self) | plain


@dataclass(frozen=True)
class Bag:
    """Features float32 (n, f) of n patches and their corners (top left) ``l0_coords`` int64 (n, 2): x, y."""

    header: BagHeader
    features: npt.NDArray[np.float32]
    l0_coords: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.features)


def content_hash(features: npt.NDArray[np.float32], l0_coords: npt.NDArray[np.int64]) -> str:
    """Return the SHA-256 over the shape, the features and the coordinates (little-endian)."""
    digest = hashlib.sha256(repr((features.shape, l0_coords.shape)).encode())
    digest.update(np.ascontiguousarray(features, dtype="<f4").tobytes())
    digest.update(np.ascontiguousarray(l0_coords, dtype="<i8").tobytes())
    return digest.hexdigest()


def encode_bag(bag: Bag) -> bytes:
    """Return the bytes of the bag's file; the same bag gives the same bytes.

    Raises:
        BagError: The arrays do not fit each other or the header (BAG_SHAPE), or hold NaN or infinity
            (BAG_NOT_FINITE).
    """
    features = np.ascontiguousarray(bag.features, dtype="<f4")
    l0_coords = np.ascontiguousarray(bag.l0_coords, dtype="<i8")
    n = len(features)
    if features.shape != (n, bag.header.features) or l0_coords.shape != (n, 2):
        raise BagError(
            f"features {features.shape} and coords {l0_coords.shape} do not make a bag of "
            f"{bag.header.features} features a patch",
            reason="BAG_SHAPE",
        )
    if not np.isfinite(features).all():
        raise BagError("the features hold NaN or infinity: check the encoder", reason="BAG_NOT_FINITE")
    header = bag.header.to_json() | {
        "version": BAG_VERSION,
        "content_sha256": content_hash(features, l0_coords),
    }
    buffer = io.BytesIO()
    # The oldest file format stores no times, and every HDF5 reader opens it.
    with h5py.File(buffer, "w", libver="earliest", track_order=False) as file:
        file.create_dataset("features", data=features, track_times=False)
        file.create_dataset("coords", data=l0_coords, track_times=False)
        file.attrs[HEADER_ATTRIBUTE] = json.dumps(header, sort_keys=True, allow_nan=False)
    return buffer.getvalue()


def write_bag(path: Path, bag: Bag) -> None:
    """Write ``bag`` to ``path``, whole or not at all.

    Raises:
        BagError: The bag is not consistent (see :func:`encode_bag`).
        OSError: The disk is full or the folder cannot be written.
    """
    write_bytes(path, encode_bag(bag))


def read_header(path: Path) -> BagHeader:
    """Read the header of the bag at ``path``; its features stay on the disk.

    Raises:
        BagError: There is no file (BAG_MISSING), it is damaged (BAG_DAMAGED), or it is no bag (BAG_FOREIGN).
    """
    header, _ = read_header_and_count(path)
    return header


def read_header_and_count(path: Path) -> tuple[BagHeader, int]:
    """Read the header of the bag at ``path`` and its number of patches. Raises as :func:`read_header`."""
    try:
        with _open(path) as file:
            header = _header(path, file)
            n, _ = _shapes(path, file, header)
    except DAMAGE as error:
        raise _damaged(path, error) from error
    return header, n


def read_bag(path: Path) -> Bag:
    """Read the bag at ``path`` and check it against its own hash. Raises as :func:`read_header`.

    >>> from pathlib import Path
    >>> from histoflare import read_bag
    >>> bag = read_bag(min(Path("clinic-a/bags").glob("*.h5")))
    >>> bag.features.shape == (len(bag.l0_coords), bag.header.features)
    True
    """
    try:
        with _open(path) as file:
            header = _header(path, file)
            _shapes(path, file, header)
            features = np.asarray(file["features"][()], dtype=np.float32)  # (n, f)
            l0_coords = np.asarray(file["coords"][()], dtype=np.int64)  # (n, 2)
    except DAMAGE as error:
        raise _damaged(path, error) from error
    if content_hash(features, l0_coords) != header.content_sha256:
        raise _damaged(path, "its content does not have the hash in its header")
    return Bag(header, features, l0_coords)


def read_rows(path: Path, rows: Sequence[int]) -> tuple[BagHeader, npt.NDArray[np.float32]]:
    """Read the features (len(rows), f) of some patches of the bag at ``path``, and nothing of the others.

    How long it takes depends on how many ``rows`` there are, not on how long the bag is. They are not checked
    against the bag's hash, which is over all of it. Raises as :func:`read_header`.
    """
    try:
        with _open(path) as file:
            header = _header(path, file)
            n, f = _shapes(path, file, header)
            stored = file["features"]
            if any(not 0 <= row < n for row in rows):
                raise IndexError(f"it has {n} patches, and others were asked for")
            start = stored.id.get_offset()
            if start is None or stored.dtype != np.dtype("<f4"):  # not as write_bag stores it
                return header, np.asarray(stored[()][list(rows)], dtype=np.float32)
        found = np.empty((len(rows), f), dtype="<f4")
        with path.open("rb", buffering=0) as raw:
            for row, target in zip(rows, found, strict=True):
                raw.seek(start + 4 * f * row)
                if raw.readinto(target.data) != 4 * f:
                    raise EOFError("it is cut off")
    except (*DAMAGE, IndexError, EOFError) as error:
        raise _damaged(path, error) from error
    return header, found.astype(np.float32, copy=False)


def _open(path: Path) -> Any:
    if not path.is_file():
        # A bag's name ends with a hash of the slide's path in the manifest: a moved manifest has others.
        slide = path.stem.rpartition("-")[0]
        other = next(path.parent.glob(f"{glob.escape(slide)}-????????.h5"), None) if slide else None
        moved = f" ({other.name} there is of a slide of that name at another path)" if other else ""
        raise BagError(
            f"{path}: there is no such bag{moved}; make it with 'histoflare prepare'", reason="BAG_MISSING"
        )
    return h5py.File(path, "r")


def _header(path: Path, file: Any) -> BagHeader:
    if HEADER_ATTRIBUTE not in file.attrs:
        raise BagError(
            f"{path}: an HDF5 file, but not a bag of histoflare; features of TRIDENT, CLAM or STAMP come in "
            "by 'histoflare bags import'",
            reason="BAG_FOREIGN",
        )
    stored = json.loads(file.attrs[HEADER_ATTRIBUTE])
    if stored["version"] != BAG_VERSION:
        raise BagError(
            f"{path}: a bag of version {stored['version']}, this histoflare reads version {BAG_VERSION}; "
            "remove it and run 'histoflare prepare' again",
            reason="BAG_VERSION",
        )
    stored.setdefault("preprocessing", None)  # bags did not always say it
    return BagHeader(**{field.name: stored[field.name] for field in fields(BagHeader)})


def _shapes(path: Path, file: Any, header: BagHeader) -> tuple[int, int]:
    shape, corners = file["features"].shape, file["coords"].shape
    if len(shape) != 2 or shape[1] != header.features or corners != (shape[0], 2):
        raise _damaged(path, f"features {shape} and coords {corners} do not fit its header")
    # A damaged size must not become an allocation: the arrays are stored plainly, so the file is larger.
    if 4 * math.prod(shape) + 8 * math.prod(corners) > path.stat().st_size:
        raise _damaged(path, "it is shorter than its arrays")
    return int(shape[0]), int(shape[1])


def _damaged(path: Path, cause: object) -> BagError:
    return BagError(
        f"{path}: the bag is damaged ({cause}); remove it and run 'histoflare prepare' again",
        reason="BAG_DAMAGED",
    )

"""The released bytes of one run, on the site's own disk, so that the same ones can be sent again.

Room for a release is made before its round is trained: a disk that is full afterwards would cost a charge for
nothing. Files are safetensors, written array by array from the memory they lie in.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors

from histoflare.errors import JobError
from histoflare.privacy.ledger.file import translated
from histoflare.storage import PARTIAL_SUFFIX, atomic_path, make_folder

KEPT = 2
"""Releases that are kept: a server asks again for the round it was in, never for an older one."""

MARGIN_BYTES = 1 << 20
"""Made room for beside the arrays: the file's header, and the ledger's next entries once it is given back."""

_EXTRA = "extra"
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class StoredRelease:
    """What :meth:`ReleaseStore.load` found.

    Attributes:
        arrays: Name → array.
        extra: What was saved with them.
    """

    arrays: dict[str, np.ndarray[Any, np.dtype[Any]]]
    extra: dict[str, Any]


class ReleaseStore:
    """A folder with the newest releases of one run, by number of booking.

    Args:
        folder: A folder of this run alone; it is made when the first room is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make_room(self, booking: int, n_bytes: int) -> None:
        """Take hold of disk for a release of ``n_bytes``; room that a crash left is given back.

        Raises:
            LedgerError: There is not that much (LEDGER_FULL), or the folder cannot be written
                (LEDGER_UNUSABLE). Nothing is held then.
        """
        path = self._path(booking)
        with translated(path):
            make_folder(self._folder)
            for leftover in self._folder.glob(f".*{PARTIAL_SUFFIX}"):
                leftover.unlink(missing_ok=True)
            room = self._room(booking)
            held = os.open(room, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(held, 0, n_bytes + MARGIN_BYTES)
            except OSError as error:
                room.unlink(missing_ok=True)
                error.filename = str(path)
                raise
            finally:
                os.close(held)

    def save(
        self, booking: int, arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]], extra: Mapping[str, Any]
    ) -> None:
        """Save a release, whole or not at all, into the room made for it; the newest two are kept.

        Nothing is copied but arrays that are not contiguous, one at a time.

        Args:
            booking: Number of the booking.
            arrays: What may leave; of the dtypes that safetensors has.
            extra: Plain JSON values that go with it.

        Raises:
            LedgerError: There is no room after all (LEDGER_FULL), or the folder cannot be written.
            JobError: An array has a dtype that cannot be saved (STATE_INVALID).
        """
        header = _header(arrays, extra)
        path = self._path(booking)
        with translated(path):
            with atomic_path(path) as partial:
                if self._room(booking).exists():
                    self._room(booking).replace(partial)
                with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
                    file.write(header)
                    for name in _order(arrays):
                        _write_array(file, arrays[name])
                    file.truncate()
            for old in sorted(self._folder.glob("release_*.safetensors"))[:-KEPT]:
                old.unlink(missing_ok=True)

    def load(self, booking: int) -> StoredRelease | None:
        """Return a release; None if its bytes are lost: not there, cut short or damaged.

        Whether they are the bytes that were released is for the caller to see, by their digest.

        Raises:
            LedgerError: The file is there, and the disk does not give it (LEDGER_UNUSABLE). It is not taken
                for lost: its round would be charged anew.
        """
        path = self._path(booking)
        with translated(path):
            if not path.exists():
                return None
            try:
                with safetensors.safe_open(path, framework="numpy") as file:
                    extra = json.loads((file.metadata() or {})[_EXTRA])
                    return StoredRelease({name: file.get_tensor(name) for name in file.keys()}, extra)  # noqa: SIM118
            except (safetensors.SafetensorError, KeyError, ValueError):
                return None

    def _path(self, booking: int) -> Path:
        return self._folder / f"release_{booking:012d}.safetensors"

    def _room(self, booking: int) -> Path:
        return self._folder / f".room_{booking:012d}{PARTIAL_SUFFIX}"


def _order(arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> list[str]:
    """Return the names, largest items first, so that every array begins at a multiple of its item's size."""
    return sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))


def _header(arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]], extra: Mapping[str, Any]) -> bytes:
    """Return what a safetensors file begins with: its header's length (8 bytes) and the header, as JSON."""
    entries: dict[str, Any] = {"__metadata__": {_EXTRA: json.dumps(extra, allow_nan=False)}}
    begin = 0
    for name in _order(arrays):
        array = arrays[name]
        if array.dtype.name not in _DTYPES:
            raise JobError(f"{name}: arrays of {array.dtype} cannot be saved.", reason="STATE_INVALID")
        entries[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, begin + array.nbytes],
        }
        begin += array.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_array(file: BinaryIO, array: np.ndarray[Any, np.dtype[Any]]) -> None:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    file.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)

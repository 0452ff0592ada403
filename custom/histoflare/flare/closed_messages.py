"""What a process of a site, or of the lead, makes of the bytes of a message: few types, bounded, and no file.

FLARE decodes a message before anybody is asked whether it may come. As it comes, its decoder imports modules
that a message names, builds objects attribute by attribute, looks whether folders are there, and writes what
a message calls a file to the machine's temporary folder. Worst is an object that stands for a file: sent back
by a site, in the cookies of a task, it takes with it whatever file of the site it was made to name.

Here a message consists of plain values and of :data:`TYPES`. All of it is FLARE's inside; a process whose
FLARE is not the one known here ends (:mod:`histoflare.flare.loaders`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
from nvflare.apis.dxo import DataKind
from nvflare.apis.job_def import JobMetaKey
from nvflare.fuel.f3.drivers import socket_conn
from nvflare.fuel.utils.class_loader import get_class_name
from nvflare.fuel.utils.fobs import fobs, lobs
from nvflare.fuel.utils.fobs.datum import DatumManager
from nvflare.fuel.utils.fobs.decomposer import DATA_CONTENT, EnumTypeDecomposer
from nvflare.private.fed.utils.fed_utils import nvflare_fobs_initialize

from histoflare.flare.loaders import parameters, require_known_flare

_deserialize = fobs.deserialize

TYPES: Mapping[str, frozenset[str] | None] = {
    **dict.fromkeys(("tuple", "numpy.ndarray", "nvflare.apis.shareable.Shareable"), None),
    "nvflare.apis.fl_context.FLContext": None,
    get_class_name(DataKind): None,
    get_class_name(JobMetaKey): None,
    "nvflare.private.admin_defs.Message": frozenset({"id", "topic", "body", "headers"}),
    "nvflare.fuel.utils.fobs.datum.DatumRef": frozenset({"datum_id", "unwrap"}),
}
"""Type that a message may have in it → the attributes that it sets; None: it sets none by name."""

MOST_VALUES = 100_000
"""In all lists and mappings of a message. (A model has some per tensor; a tensor is one value.)"""

MOST_FRAME_BYTES = 32 << 20
"""Of what comes over the wire in one piece. (Larger messages come in pieces of a megabyte or two.)"""


class ClosedPacker(fobs.Packer):
    """FLARE's decoder for :data:`TYPES` alone, of a message of at most :data:`MOST_VALUES`."""

    def __init__(self, manager: DatumManager) -> None:
        super().__init__(manager)
        self._values = 0

    def count(self, values: list[Any] | dict[Any, Any]) -> Any:
        """Return a list or mapping of a message as it is.

        Raises:
            ValueError: The message has too many values.
        """
        self._values += 1 + len(values)
        if self._values > MOST_VALUES:
            raise ValueError("the message has too many values")
        return values

    def unpack(self, obj: Any) -> Any:
        """Return what a mapping of a message stands for.

        Raises:
            ValueError: It is of no listed type, or sets what is none of its attributes.
        """
        self.count(obj)
        if fobs.FOBS_TYPE in obj:
            name, content = obj[fobs.FOBS_TYPE], obj.get(fobs.FOBS_DATA)
            if not isinstance(name, str) or name not in TYPES or name not in fobs._decomposers:
                raise ValueError("the message has an object in it that no message needs")
            known = TYPES[name]
            if known is not None and not _sets(content, known):
                raise ValueError("the message sets what is no attribute of its object")
        return super().unpack(obj)


def _sets(content: Any, attributes: frozenset[str]) -> bool:
    """Return whether an object of a message has these attributes and nothing else."""
    return (
        type(content) is dict and set(content) == {DATA_CONTENT} and set(content[DATA_CONTENT]) == attributes
    )


def _refuse_extension(code: int, content: bytes) -> Any:
    raise ValueError("the message has an extension in it")


def close_messages() -> None:
    """Have FLARE decode messages as said above in this process; it may be called again.

    Raises:
        JobError: FLARE's inside is not what is known here (FLARE_CHANGED).
    """
    require_known_flare(_KNOWN)
    nvflare_fobs_initialize()
    for kind in (DataKind, JobMetaKey):
        fobs.register(EnumTypeDecomposer(kind))
    fobs.deserialize = lobs.deserialize = deserialize
    lobs.get_datum_dir = _no_files
    socket_conn.MAX_FRAME_SIZE = MOST_FRAME_BYTES


def deserialize(data: bytes, manager: DatumManager) -> Any:
    """Return what a message says, as FLARE's function of this name does, in bounds.

    Raises:
        ValueError, LookupError, TypeError: It is no message that a site takes.
    """
    packer = ClosedPacker(manager)
    message = msgpack.unpackb(
        data,
        strict_map_key=False,
        object_hook=packer.unpack,
        list_hook=packer.count,
        ext_hook=_refuse_extension,
        max_array_len=MOST_VALUES,
        max_map_len=MOST_VALUES,
    )
    manager.post_process()
    return message


def _no_files() -> str:
    raise ValueError("the message has a file in it")


_KNOWN = {
    "fobs.Packer": lambda: parameters(fobs.Packer.unpack) == ["self", "obj"],
    "fobs.deserialize": lambda: parameters(_deserialize) == ["data", "manager", "kwargs"],
    "fobs._decomposers": lambda: type(fobs._decomposers) is dict,
    "lobs.deserialize": lambda: lobs.deserialize in (_deserialize, deserialize),
    "lobs.get_datum_dir": lambda: parameters(lobs.get_datum_dir) == [],
    "socket_conn.MAX_FRAME_SIZE": lambda: type(socket_conn.MAX_FRAME_SIZE) is int,
}
"""What of FLARE's inside is relied on → whether it is as it was."""

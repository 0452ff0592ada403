"""Objects that a message of FLARE could have in it, as its serializer spells them: one table.

FLARE's reader makes objects of them, and of some imports a module, opens a file or looks for a folder.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

PLANTED = ("planted_for_fobs.py", "tenseal.py", "cma_decomposer.py", "xgboost/__init__.py", "xgboost/core.py")
"""Modules that are there to be imported; the last four are in FLARE's own lists of what may be."""

FLARE = "nvflare.fuel.utils.fobs"
DATA = f"{FLARE}.decomposer.DataClassDecomposer"
ENUM = f"{FLARE}.decomposer.EnumTypeDecomposer"
MESSAGE = "nvflare.private.admin_defs.Message"
MAIN, FILE = 100, 103
"""Marks of the sections of a message."""


def thing(kind: Any, content: Any, decomposer: str | None = DATA) -> dict[str, Any]:
    """Return an object of a type, with the decomposer that is to make it."""
    made = {"__fobs_type__": kind, "__fobs_data__": content}
    return made if decomposer is None else made | {"__fobs_dc__": decomposer}


def data(**attributes: Any) -> dict[str, Any]:
    return {"data": attributes}


def file_of(path: Path) -> dict[str, Any]:
    """Return an object that, sent back, takes a file with it."""
    said = data(datum_id="12345678-1234-5678-1234-567812345678", datum_type="x", dot=0, value=str(path))
    return thing(f"{FLARE}.datum.Datum", said)


def objects(file: Path, folder: Path) -> dict[str, Any]:
    """Return name → an object that no message needs.

    Args:
        file: One of a site's. folder: A kit.
    """
    numbers = "nvflare.app_common.decomposers.numpy_decomposers"
    npy = io.BytesIO()
    np.save(npy, np.array([Path("x")], dtype=object), allow_pickle=True)
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    return {
        "a planted class": thing("planted_for_fobs.Kind", data(a=1)),
        "a planted enumeration": thing("planted_for_fobs.Kind", "A", ENUM),
        "a planted enumeration without a decomposer": thing("planted_for_fobs.Kind", "A", None),
        "a planted decomposer": thing("planted_for_fobs.Kind", [1], "planted_for_fobs.Decomposer"),
        "a planted decomposer of FLARE's list": thing(
            "tenseal.CKKSVector", [1], "cma_decomposer.CMADataLoggerDecomposer"
        ),
        "an enumeration of FLARE's list": thing("xgboost.core.DataSplitMode", "ROW", ENUM),
        "a class of FLARE's list that is not loaded": thing(
            "nvflare.edge.web.models.job_request.JobRequest", data(a=1)
        ),
        "a program": thing("subprocess.Popen", data(args="true")),
        "a function": thing("builtins.eval", "1", DATA),
        "an enumeration that is none": thing("os.system", "x", ENUM),
        "a class of this project": thing("histoflare.site.configuration.SiteConfiguration", data(site="x")),
        "the ledger": thing("histoflare.privacy.ledger.Ledger", data(path=str(file))),
        "a path": thing("pathlib.Path", data(x=str(file))),
        "a file": file_of(file),
        "a workspace": thing(
            "nvflare.apis.workspace.Workspace",
            [str(folder), "x", "config"],
            "nvflare.apis.utils.decomposers.flare_decomposers.WorkspaceDecomposer",
        ),
        "a message with methods": thing(
            MESSAGE, data(id="x", topic="x", body="", headers={}, get_header="x")
        ),
        "a message's class": thing(MESSAGE, data(__class__="x")),
        "a signal": thing("nvflare.apis.signal.Signal", data(_value=1)),
        "any attributes": thing("argparse.Namespace", data(workspace=str(folder))),
        "a snapshot": thing("nvflare.apis.fl_snapshot.RunSnapshot", data(a=1)),
        "an array by another": thing(
            f"{FLARE}.decomposers.via_downloader.LazyDownloadRef",
            {"lazy_dot": 3, "type": "ref", "data": "T0"},
            f"{FLARE}.decomposers.via_downloader.LazyDownloadRefDecomposer",
        ),
        "an array of objects": thing(
            "numpy.ndarray", {"type": "native", "data": npy.getvalue()}, f"{numbers}.NumpyArrayDecomposer"
        ),
        "a type that is no name": thing(["numpy.ndarray"], data(a=1)),
        "no type": thing(None, data(a=1)),
        "an empty type": thing("", data(a=1), ""),
        "a reference to nothing": thing(f"{FLARE}.datum.DatumRef", data(datum_id="x", unwrap=True)),
        "depth": deep,
        "many values": [[]] * 150_000,
        "many words": {str(n): "x" for n in range(150_000)},
    }


def section(mark: int, content: bytes, dot: int = 0) -> bytes:
    return struct.pack(">BBQ", mark, dot, len(content)) + content


def raw_messages(folder: Path) -> dict[str, bytes]:
    """Return name → the bytes of a message that no serializer writes."""
    command = msgpack.packb(thing(MESSAGE, data(id="x", topic="no.such", body="", headers={})))
    main = section(MAIN, command)
    reference = f'{{"fqcn": "server", "ref_id": "{"x" * 36}"}}'.encode()
    return {
        "nothing": b"",
        "no sections": b"x" * 100,
        "a section that says it is larger": struct.pack(">BBQ", MAIN, 0, 1 << 62) + command,
        "a file": main + section(FILE, b"F" * 16 + b"left by a message"),
        "a file that is to be handled": main + section(FILE, b"F" * 16 + b"left by a message", dot=3),
        "tensors to be fetched": main + section(101, b"T" * 16 + reference, dot=3),
        "an unknown handler": main + section(102, b"T" * 16 + b"x", dot=99),
        "a list that says it is long": section(MAIN, b"\xdd\xff\xff\xff\xff"),
        "a mapping that says it is long": section(MAIN, b"\xdf\xff\xff\xff\xff"),
        "an extension of msgpack": section(MAIN, msgpack.packb(msgpack.ExtType(5, str(folder).encode()))),
        "lists in lists": section(MAIN, b"\x91" * 100_000 + b"\xc0"),
        "millions of values": section(MAIN, b"\xdd" + struct.pack(">I", 3_000_000) + b"\x90" * 3_000_000),
        "millions of words": section(MAIN, b"\xdd" + struct.pack(">I", 3_000_000) + b"\xa1x" * 3_000_000),
        "too large": section(MAIN, b"\xc6" + struct.pack(">I", 40 << 20) + bytes(40 << 20)),
    }

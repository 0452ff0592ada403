"""A tap for FLARE processes: with ``WIRE_TAP=folder`` each message that the server's receive is kept there.

For the ``sitecustomize`` of the tests beside this folder, which have it on their path.
"""

import os
import sys
from pathlib import Path


def tap() -> None:
    """Keep what this process receives, if it is one of the server's and a folder is named."""
    if not os.environ.get("WIRE_TAP"):
        return
    if not any("nvflare.private.fed.app.server" in part for part in sys.orig_argv):
        return
    import nvflare.fuel.f3.cellnet.core_cell as core_cell

    received = core_cell.CoreCell._process_received_msg
    file = Path(os.environ["WIRE_TAP"]) / f"{os.getpid()}.bin"

    def process(self, endpoint, connection, message):  # type: ignore[no-untyped-def]
        payload = message.payload
        if not isinstance(payload, (bytes, bytearray, memoryview)):
            payload = repr(payload).encode()
        with file.open("ab") as out:
            out.write(repr(message.headers).encode() + b"\n" + bytes(payload) + b"\n")
        return received(self, endpoint, connection, message)

    core_cell.CoreCell._process_received_msg = process

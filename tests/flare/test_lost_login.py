"""A site's process that ended because the server had lost its first message."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from histoflare.errors import HistoflareError
from histoflare.flare.poc import Federation
from tests.refusals import raises_reason


@pytest.mark.parametrize(
    ("log", "times", "reason"),
    [
        ("RuntimeError: Login failed.", 1, None),
        ("RuntimeError: Login failed.", 2, "FEDERATION_FAILED"),
        ("another error", 1, "FEDERATION_FAILED"),
    ],
)
def test_a_site_whose_first_message_the_server_lost_is_started_once_more(
    tmp_path: Path, log: str, times: int, reason: str | None
) -> None:
    """Seen on a busy machine: FLARE's server drops what comes before it has noted the connection."""
    (tmp_path / "a.log").write_text(f"some lines\n{log}\n")
    started: list[str] = []
    federation: Any = SimpleNamespace(
        kits=SimpleNamespace(sites=["a"], server="server", port=1),
        log=lambda participant: tmp_path / f"{participant}.log",
        admin=SimpleNamespace(registered=lambda: ["a"] if len(started) >= times else []),
        _started={"a": SimpleNamespace(poll=lambda: 101, returncode=101)},
        _ended=lambda *_: HistoflareError("ended", reason="FEDERATION_FAILED"),
    )

    def again(participant: str) -> None:
        started.append(participant)
        if len(started) >= times:
            federation._started["a"] = SimpleNamespace(poll=lambda: None)

    if reason is None:
        Federation._await_registration(federation, 5.0, again)
    else:
        with raises_reason(reason):
            Federation._await_registration(federation, 5.0, again)
    assert started == (["a"] if log.startswith("Runtime") else [])

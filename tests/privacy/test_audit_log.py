"""A site's own log: every line is there, a torn one is shown as such."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from histoflare.errors import LedgerError
from histoflare.privacy.audit_log import AuditLog


def test_events_come_back_in_order(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "site" / "audit.jsonl")
    assert list(log.read()) == []
    log.write("released", round=3, digest="ab", epsilon=math.inf, path=tmp_path, nested={"a": [1, math.nan]})
    log.write("refused", reason="BUDGET_EXHAUSTED", words="ε\nä")
    first, second = log.read()
    assert first["time"] <= second["time"] and first["time"].endswith("+00:00")
    del first["time"], second["time"]
    assert first == {
        "what": "released",
        "round": 3,
        "digest": "ab",
        "epsilon": "inf",
        "path": str(tmp_path),
        "nested": {"a": [1, "nan"]},
    }
    assert second == {"what": "refused", "reason": "BUDGET_EXHAUSTED", "words": "ε\nä"}
    assert len((tmp_path / "site" / "audit.jsonl").read_text().splitlines()) == 2


def test_a_torn_line_costs_no_other(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.write("first")
    log.write("second")
    whole = (tmp_path / "audit.jsonl").read_bytes()
    begin = whole.index(b"\n") + 1
    for cut in range(begin + 1, len(whole)):
        (tmp_path / "audit.jsonl").write_bytes(whole[:cut])
        last = "second" if cut == len(whole) - 1 else "unreadable"
        assert [event["what"] for event in log.read()] == ["first", last]
        log.write("third")
        assert [event["what"] for event in log.read()] == ["first", last, "third"]
    (tmp_path / "audit.jsonl").write_bytes(b"\xff\n[1]\n" + whole)
    events = list(log.read())
    assert events[:2] == [{"what": "unreadable", "line": 1}, {"what": "unreadable", "line": 2}]
    assert [event["what"] for event in events[2:]] == ["first", "second"]


WRITER = """
import sys
from pathlib import Path
from histoflare.privacy.audit_log import AuditLog
log = AuditLog(Path(sys.argv[1]))
for index in range(100):
    log.write("event", writer=sys.argv[2], index=index, padding="x" * 5000)
"""


def test_processes_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    events = list(AuditLog(path).read())
    for name in "ab":
        assert [event["index"] for event in events if event["writer"] == name] == list(range(100))
    assert len(events) == 200


def test_a_log_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError) as caught:
        AuditLog(tmp_path / "file" / "audit.jsonl").write("event")
    assert caught.value.reason == "LEDGER_UNUSABLE"
    with pytest.raises(LedgerError) as caught:
        AuditLog(Path("/dev/full")).write("event")
    assert caught.value.reason == "LEDGER_FULL"

"""A ledger that is not as it was written says LEDGER_DAMAGED; nothing that is gone is made again."""

from __future__ import annotations

import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from histoflare.errors import LedgerError
from histoflare.privacy.ledger import Booking, Ledger
from histoflare.privacy.ledger.file import STATEMENTS
from histoflare.privacy.ledger.key import Head, KeyFolder
from tests.privacy.ledgers import BUDGET, FILLED, ROLES, book, fill, new_ledger, note, paths, reserve, sha
from tests.refusals import raises_reason

NEWEST = "entries ORDER BY seq DESC LIMIT 1"
VERSION_BYTES = range(60, 64)
"""SQLite's user version, which says which version of the format it is."""


def answers(folder: Path) -> Any:
    """Return all that a ledger says."""
    ledger = Ledger(*paths(folder))
    return (
        *(ledger.verify(), ledger.summary(BUDGET), ledger.identity(), ledger.disclosures()),
        list(ledger.events()),
    )


def refusal(act: Callable[[], object]) -> str:
    """Return the reason for which ``act`` was refused; any other exception is passed on."""
    with pytest.raises(LedgerError) as caught:
        act()
    return caught.value.reason


def everything(folder: Path) -> list[Callable[[], object]]:
    """Return every use of a ledger, each with a ledger of its own."""
    path, key = paths(folder)
    return [
        lambda: reserve(Ledger(path, key), "another"),
        lambda: Ledger(path, key).is_released(sha("bytes 0")),
        lambda: Ledger(path, key).close("run"),
        lambda: Ledger(path, key).fail(Booking(5, 4, 0, sha("model 0"), 1)),
        lambda: Ledger(path, key).disclose(
            run="x", model_sha256=sha("x"), patients=["dora"], roles=ROLES, limit=9
        ),
        lambda: Ledger(path, key).verify(),
        lambda: Ledger(path, key).summary(BUDGET),
        lambda: list(Ledger(path, key).events()),
        lambda: Ledger(path, key).identity(),
        lambda: Ledger(path, key).disclosures(),
        lambda: Ledger(path, key).check_usable(),
        lambda: note(Ledger(path, key), 7),
        lambda: Ledger(path, key).depart(),
        lambda: Ledger(path, key).move(old_is_gone=True),
        lambda: reserve(new_ledger(folder)),
    ]


def check_flips(folder: Path, flips: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Flip bits of one byte at a time; return after how many flips it was damaged, and the same."""
    path, _ = paths(folder)
    whole, said = path.read_bytes(), answers(folder)
    damaged = same = 0
    for at, bits in flips:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :])
        try:
            found = answers(folder)
        except LedgerError as error:
            # Of another version's ledger nothing is believed, not even that it is damaged.
            expected = "LEDGER_UNUSABLE" if at in VERSION_BYTES else "LEDGER_DAMAGED"
            assert error.reason == expected, f"byte {at}, bits {bits:08b}: {error}"
            assert refusal(lambda: reserve(Ledger(*paths(folder)), "another")) == expected
            damaged += 1
            continue
        assert found == said, f"byte {at}, bits {bits:08b}: another answer"
        same += 1
    path.write_bytes(whole)
    return damaged, same


def test_a_flipped_byte_is_seen_or_means_nothing(tmp_path: Path) -> None:
    fill(new_ledger(tmp_path))
    size = paths(tmp_path)[0].stat().st_size
    positions = [*range(0, 100), *random.Random(5).sample(range(100, size), 500)]
    damaged, same = check_flips(tmp_path, [(at, 1 << (at % 8)) for at in positions])
    assert damaged > 100 and same > 100, "the file has both rows and unused bytes"


@pytest.mark.parametrize("written", [b'failure{"of":', b'reservation{"about":"dp-patient: dp-sgd"'])
def test_every_flipped_byte_of_an_entry_is_seen(tmp_path: Path, written: bytes) -> None:
    fill(new_ledger(tmp_path))
    whole = paths(tmp_path)[0].read_bytes()
    first = whole.index(written)
    last = whole.index(b"}", first + len(written)) + 32  # and the chain, which follows its text
    damaged, same = check_flips(tmp_path, [(at, 1 << (at % 8)) for at in range(first, last + 1)])
    assert (damaged, same) == (last + 1 - first, 0)


@pytest.mark.parametrize(
    ("at", "what"),
    [
        (18, "the format to write: SQLite would open it read-only, or in WAL mode"),
        (19, "the format to read"),
        (20, "bytes reserved on each page"),
        (47, "the schema's format"),
        (59, "the text encoding"),
        (71, "the application"),
        (4096 + 7, "free bytes on the first page of entries: SQLite's quick check counts them"),
    ],
)
@pytest.mark.parametrize("add", [1, 2, 5])
def test_what_sqlite_would_overlook_or_obey_is_damage(tmp_path: Path, at: int, what: str, add: int) -> None:
    fill(new_ledger(tmp_path))
    path, _ = paths(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes([whole[at] + add]) + whole[at + 1 :])
    for act in everything(tmp_path):
        assert refusal(act) == "LEDGER_DAMAGED", what
    assert not list(path.parent.glob("*-wal"))


@pytest.mark.slow
def test_many_more_flipped_bytes(tmp_path: Path) -> None:
    fill(new_ledger(tmp_path))
    whole = paths(tmp_path)[0].read_bytes()
    dice = random.Random(6)
    written = [at for at, byte in enumerate(whole) if byte]
    damaged, _ = check_flips(tmp_path, [(at, dice.randrange(1, 256)) for at in dice.sample(written, 3000)])
    assert damaged > 1000


@pytest.mark.parametrize("name", ["ledger.key", "ledger.key.head"])
def test_a_flipped_byte_of_key_or_head_is_always_seen(tmp_path: Path, name: str) -> None:
    fill(new_ledger(tmp_path))
    path = tmp_path / "keys" / name
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bits in (1, 8, 0xFF):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :])
            assert refusal(lambda: answers(tmp_path)) == "LEDGER_DAMAGED"
            assert refusal(lambda: reserve(Ledger(*paths(tmp_path)))) == "LEDGER_DAMAGED"
    path.write_bytes(whole)
    reserve(new_ledger(tmp_path))


def test_a_ledger_cut_short_is_damaged(tmp_path: Path) -> None:
    fill(new_ledger(tmp_path))
    path, _ = paths(tmp_path)
    whole = path.read_bytes()
    for size in [0, 1, 99, 100, 4095, *range(4096, len(whole), 4096), len(whole) - 1]:
        path.write_bytes(whole[:size])
        for act in everything(tmp_path):
            assert refusal(act) == "LEDGER_DAMAGED", f"{size} bytes"
    path.write_bytes(whole)
    reserve(new_ledger(tmp_path))


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 8192, b"SQLite format 3\0" + b"\0" * 8000])
def test_another_file_is_no_ledger(tmp_path: Path, content: bytes) -> None:
    new_ledger(tmp_path)
    paths(tmp_path)[0].write_bytes(content)
    for act in everything(tmp_path):
        assert refusal(act) == "LEDGER_DAMAGED"
    assert paths(tmp_path)[0].read_bytes() == content, "a person must look: nothing is overwritten"


def test_an_older_copy_is_refused_and_the_newest_one_works_again(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path)
    path, _ = paths(tmp_path)
    copies = []
    reservation = reserve(ledger, rounds=3)
    for round_index in range(3):
        copies.append(path.read_bytes())
        book(ledger, reservation, round_index)
    newest = path.read_bytes()
    for copy in copies:
        path.write_bytes(copy)
        for act in everything(tmp_path):
            assert refusal(act) == "LEDGER_DAMAGED"
        assert refusal(lambda: ledger.is_released(sha("x"))) == "LEDGER_DAMAGED", (
            "whoever had it open sees it too"
        )
        with raises_reason("LEDGER_DAMAGED", path):
            Ledger(*paths(tmp_path)).verify()
    restored = path.with_name("restored")
    restored.write_bytes(newest)
    restored.replace(path)
    assert ledger.summary(BUDGET).runs[0].booked == 3
    assert refusal(lambda: book(ledger, reservation, 2)) == "LEDGER_MOVED", "a person has to say so first"
    assert ledger.move(old_is_gone=True)
    assert book(ledger, reservation, 2).attempt == 1


def test_a_history_that_went_another_way_is_refused(tmp_path: Path) -> None:
    """Set back, it went on under the same key: as long as the real one, but not the same."""
    ledger = new_ledger(tmp_path)
    path, key = paths(tmp_path)
    head = KeyFolder(key).head
    reserve(ledger)
    before = path.read_bytes(), head.read_bytes()
    reserve(ledger, "real", 2)
    real = head.read_bytes()
    path.write_bytes(before[0])
    head.write_bytes(before[1])
    reserve(Ledger(path, key), "unreal", 1)
    head.write_bytes(real)
    for act in everything(tmp_path):
        assert refusal(act) == "LEDGER_DAMAGED"
    assert refusal(lambda: ledger.is_released(sha("x"))) == "LEDGER_DAMAGED"


def test_a_head_that_a_crash_left_behind_catches_up(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path)
    head = tmp_path / "keys" / "ledger.key.head"
    reservation = reserve(ledger)
    old = head.read_bytes()
    booking = book(ledger, reservation, 0)
    new = head.read_bytes()
    head.write_bytes(old)
    assert Ledger(*paths(tmp_path)).verify().ahead == 1
    assert head.read_bytes() == old, "looking changes nothing"
    assert book(Ledger(*paths(tmp_path)), reservation, 0) == booking
    assert head.read_bytes() == new
    assert Ledger(*paths(tmp_path)).verify().ahead == 0


GONE = {"ledger": "data/ledger.sqlite", "key": "keys/ledger.key", "head": "keys/ledger.key.head"}


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        (["ledger"], "LEDGER_MISSING"),
        (["key"], "LEDGER_MISSING"),
        (["head"], "LEDGER_DAMAGED"),
        (["ledger", "key"], "LEDGER_MISSING"),
        (["ledger", "head"], "LEDGER_MISSING"),
        (["key", "head"], "LEDGER_MISSING"),
    ],
)
def test_what_is_gone_is_not_made_again(tmp_path: Path, gone: list[str], reason: str) -> None:
    fill(new_ledger(tmp_path))
    for name in gone:
        (tmp_path / GONE[name]).unlink()
    before = sorted(tmp_path.rglob("*"))
    for act in everything(tmp_path):
        assert refusal(act) == reason
    assert sorted(tmp_path.rglob("*")) == before


def test_a_ledger_that_never_was_is_missing(tmp_path: Path) -> None:
    for act in everything(tmp_path)[:-1]:
        assert refusal(act) == "LEDGER_MISSING"
    assert not list(tmp_path.iterdir())


def test_the_key_of_another_site_does_not_fit(tmp_path: Path) -> None:
    fill(new_ledger(tmp_path / "a"))
    open_before = new_ledger(tmp_path / "b")
    fill(open_before)
    shutil.copy(paths(tmp_path / "a")[1], paths(tmp_path / "b")[1])
    with raises_reason("LEDGER_DAMAGED", paths(tmp_path / "b")[0]):
        answers(tmp_path / "b")
    with raises_reason("LEDGER_DAMAGED", paths(tmp_path / "b")[0]):
        open_before.is_released(sha("x"))
    paths(tmp_path / "b")[1].write_bytes(b"short")
    assert refusal(lambda: answers(tmp_path / "b")) == "LEDGER_UNUSABLE"


def test_a_making_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    """A head of 0 says that nothing was ever booked."""
    folder = KeyFolder(paths(tmp_path)[1])
    folder.write_head(Head())
    assert refusal(lambda: Ledger(*paths(tmp_path)).verify()) == "LEDGER_MISSING"
    folder.make_key()
    key = folder.read_key()
    fill(new_ledger(tmp_path))
    assert folder.read_key() == key
    assert folder.read_head().seq > 1
    paths(tmp_path)[0].unlink()
    assert refusal(lambda: new_ledger(tmp_path)) == "LEDGER_MISSING"


@pytest.mark.parametrize("table", ["entries", "patients", "cohorts"])
def test_rows_are_only_added(tmp_path: Path, table: str) -> None:
    fill(new_ledger(tmp_path))
    connection = sqlite3.connect(paths(tmp_path)[0], isolation_level=None)
    key = "seq" if table == "entries" else "id"
    columns = len(connection.execute(f"SELECT * FROM {table}").fetchone())
    values = ", ".join("1" for _ in range(columns))
    for statement in (
        f"UPDATE {table} SET {key} = {key} + 100",
        f"DELETE FROM {table}",
        f"REPLACE INTO {table} VALUES ({values})",
    ):
        with pytest.raises(sqlite3.IntegrityError, match=table):
            connection.execute(statement)
    connection.close()
    assert Ledger(*paths(tmp_path)).verify().patients == len(ROLES)


@pytest.mark.parametrize(
    "statements",
    [
        ["DROP TRIGGER entries_delete", "DELETE FROM entries WHERE seq = (SELECT max(seq) FROM entries)"],
        ["DROP TRIGGER entries_update", "UPDATE entries SET unix_time = unix_time + 1 WHERE seq = 3"],
        ["DROP TRIGGER patients_update", "UPDATE patients SET role = 'test' WHERE role = 'train'"],
        ["DROP TRIGGER cohorts_update", "UPDATE cohorts SET members = x'01' WHERE id = 1"],
        ["DROP TRIGGER cohorts_delete", "DELETE FROM cohorts WHERE id = 1"],
        ["INSERT INTO patients VALUES (6, x'00112233445566778899aabbccddeeff', 'train')"],
        ["INSERT INTO cohorts VALUES (3, x'01')"],
        [f"INSERT INTO entries SELECT seq + 1, unix_time, kind, body, chain FROM {NEWEST}"],
        [f"INSERT INTO entries SELECT seq + 1, NULL, kind, body, chain FROM {NEWEST}"],
    ],
)
def test_whoever_writes_with_another_tool_is_seen(tmp_path: Path, statements: list[str]) -> None:
    ledger = new_ledger(tmp_path)
    fill(ledger)
    assert ledger.verify().entries == FILLED
    connection = sqlite3.connect(paths(tmp_path)[0], isolation_level=None)
    try:
        for statement in statements:
            connection.execute(statement)
        for name in {statement.split()[2] for statement in statements if statement.startswith("DROP")}:
            connection.execute(STATEMENTS[name])  # so that the tables look like ours again
    except sqlite3.IntegrityError:
        assert "NULL" in statements[0]
        return
    finally:
        connection.close()
    for act in everything(tmp_path):
        assert refusal(act) == "LEDGER_DAMAGED"


@pytest.mark.parametrize(
    "statement",
    ["DROP TRIGGER entries_delete", "CREATE TABLE more (x)", "CREATE INDEX i ON entries (kind)"],
)
def test_tables_that_are_not_ours_are_refused(tmp_path: Path, statement: str) -> None:
    fill(new_ledger(tmp_path))
    connection = sqlite3.connect(paths(tmp_path)[0], isolation_level=None)
    connection.execute(statement)
    connection.close()
    for act in everything(tmp_path):
        assert refusal(act) == "LEDGER_DAMAGED"


def test_a_clock_set_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = new_ledger(tmp_path)
    reservation = reserve(ledger)
    booking = book(ledger, reservation, 0)
    last = ledger.verify().last_unix_time
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    fresh = Ledger(*paths(tmp_path))
    assert reserve(fresh) == reservation
    assert book(fresh, reservation, 0) == booking
    fresh.release(booking, sha("bytes"))
    reserve(fresh, "later")
    assert fresh.summary(BUDGET).rho == pytest.approx(2 * BUDGET.cost(reservation.spend.times(3)))
    assert fresh.verify().last_unix_time == last


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "keys").touch()
    with raises_reason("LEDGER_UNUSABLE", tmp_path / "keys"):
        new_ledger(tmp_path)


def test_another_program_that_has_the_file_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = new_ledger(tmp_path)
    monkeypatch.setattr("histoflare.privacy.ledger.file.WAIT_S", 0.1)
    other = sqlite3.connect(paths(tmp_path)[0], isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with raises_reason("LEDGER_UNUSABLE", paths(tmp_path)[0]):
        reserve(ledger)
    assert refusal(ledger.verify) == "LEDGER_UNUSABLE"
    other.execute("ROLLBACK")
    other.close()
    reserve(ledger)

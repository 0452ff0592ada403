"""A ledger is made once, belongs to one site and one place, and goes on in one of two copies only."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from histoflare.errors import JobError, LedgerError
from histoflare.privacy.audit_log import AuditLog
from histoflare.privacy.ledger import STEWARD, WORKSTATION, Ledger
from histoflare.privacy.ledger import place as places
from histoflare.privacy.ledger.chain import Keys, canonical_json
from histoflare.privacy.ledger.file import STATEMENTS, VERSION
from histoflare.privacy.ledger.key import Head, KeyFolder
from histoflare.privacy.release_store import ReleaseStore
from tests.privacy.ledgers import (
    BUDGET,
    SITE,
    book,
    copied,
    fill,
    new_ledger,
    note,
    paths,
    reserve,
    sha,
)
from tests.refusals import raises_reason

HERE, ELSEWHERE = "1" * 32, "2" * 32


def refusal(act: Callable[[], object]) -> str:
    """Return the reason for which ``act`` was refused; any other exception is passed on."""
    with pytest.raises(LedgerError) as caught:
        act()
    return caught.value.reason


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Yield what changes the machine that this test runs on; it begins on :data:`HERE`."""
    file = tmp_path / "machine-id"
    monkeypatch.setattr(places, "MACHINE_FILES", (tmp_path / "none", file))

    def become(machine_id: str | None) -> None:
        file.unlink(missing_ok=True)
        if machine_id is not None:
            file.write_text(f"{machine_id}\n")

    become(HERE)
    yield become


class TestCreating:
    def test_a_steward_makes_it_once(self, tmp_path: Path) -> None:
        made = Ledger.create(*paths(tmp_path), SITE)
        found = made.identity()
        assert (found.site, found.owner, found.is_here, found.is_away) == (SITE, STEWARD, True, False)
        assert (found.place.ledger, found.place.key) == tuple(map(str, paths(tmp_path)))
        before = made.verify()
        assert refusal(lambda: Ledger.create(*paths(tmp_path), SITE)) == "LEDGER_UNUSABLE"
        assert refusal(lambda: Ledger.create(*paths(tmp_path), "other")) == "LEDGER_UNUSABLE"
        assert made.verify() == before

    @pytest.mark.parametrize("gone", ["data/ledger.sqlite", "keys/ledger.key"])
    def test_a_second_one_is_not_made_in_place_of_a_lost_one(self, tmp_path: Path, gone: str) -> None:
        fill(Ledger.create(*paths(tmp_path), SITE))
        (tmp_path / gone).unlink()
        for make in (Ledger.create, Ledger.open_or_create):
            assert refusal(lambda make=make: make(*paths(tmp_path), SITE)) == "LEDGER_MISSING"  # type: ignore[misc]
        assert not (tmp_path / gone).exists()

    def test_a_workstations_is_marked_and_no_stewards(self, tmp_path: Path) -> None:
        path, key = paths(tmp_path)
        made = Ledger.open_or_create(path, key, SITE)
        assert made.identity().owner == WORKSTATION
        of_steward = Ledger(path, key, site=SITE, owner=STEWARD)
        for act in (
            lambda: reserve(of_steward),
            lambda: note(of_steward),
            of_steward.check_usable,
            lambda: of_steward.is_released(sha("x")),
        ):
            assert refusal(act) == "LEDGER_FOREIGN"
        reserve(made)

    def test_another_sites_is_refused(self, tmp_path: Path) -> None:
        path, key = paths(tmp_path)
        Ledger.create(path, key, SITE)
        other = Ledger(path, key, site="hospital-b", owner=STEWARD)
        assert refusal(lambda: reserve(other)) == refusal(lambda: note(other)) == "LEDGER_FOREIGN"
        assert other.verify().entries == 1
        reserve(Ledger(path, key, site=SITE, owner=STEWARD))

    def test_a_name_is_needed(self, tmp_path: Path) -> None:
        with pytest.raises(JobError):
            Ledger.create(*paths(tmp_path), " ")
        assert not list(tmp_path.iterdir())

    def test_opening_makes_nothing(self, tmp_path: Path) -> None:
        assert refusal(lambda: reserve(Ledger(*paths(tmp_path)))) == "LEDGER_MISSING"
        assert not list(tmp_path.iterdir())

    def test_all_of_it_is_for_its_owner_alone(self, tmp_path: Path) -> None:
        old = os.umask(0o000)
        try:
            ledger = Ledger.create(*paths(tmp_path), SITE)
            reservation = reserve(ledger)
            store = ReleaseStore(tmp_path / "data" / "ledger.releases" / "run")
            store.make_room(1, 10)
            store.save(1, {}, {})
            AuditLog(tmp_path / "logs" / "deep" / "audit.jsonl").write("released")
            book(ledger, reservation, 0)
        finally:
            os.umask(old)
        made = list(tmp_path.rglob("*"))
        assert len(made) > 10
        for path in made:
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), f"{path}: {mode:o}"


class TestPlace:
    def test_the_machine_may_have_another_name_and_restart(
        self, tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ledger = new_ledger(tmp_path / "site")
        monkeypatch.setattr("socket.gethostname", lambda: "renamed")
        reserve(Ledger(*paths(tmp_path / "site")))
        assert ledger.identity().is_here

    @pytest.mark.parametrize("other", [ELSEWHERE, None])
    def test_on_another_machine_nothing_is_booked_before_the_move(
        self, tmp_path: Path, machine: Any, other: str | None
    ) -> None:
        ledger = new_ledger(tmp_path / "site")
        reservation = reserve(ledger)
        machine(other)
        fresh = Ledger(*paths(tmp_path / "site"))
        for act in (
            lambda: reserve(fresh),
            lambda: book(ledger, reservation, 0),
            lambda: note(fresh),
            lambda: ledger.is_released(sha("x")),
            lambda: fresh.close("run"),
            fresh.check_usable,
        ):
            assert refusal(act) == "LEDGER_MOVED"
        assert not fresh.identity().is_here and fresh.summary(BUDGET).runs[0].booked == 0, "to be looked at"
        assert refusal(fresh.move) == "LEDGER_MOVED", "the old one may be in use there"
        assert fresh.move(old_is_gone=True)
        assert book(ledger, reservation, 0).attempt == 1
        machine(HERE)
        assert refusal(lambda: book(ledger, reservation, 1)) == "LEDGER_MOVED"

    def test_without_a_machine_id_paths_and_files_are_bound(self, tmp_path: Path, machine: Any) -> None:
        machine(None)
        ledger = new_ledger(tmp_path / "site")
        assert ledger.identity().place.machine is None
        reserve(ledger)
        copied(tmp_path / "site", tmp_path / "copy")
        assert refusal(lambda: reserve(Ledger(*paths(tmp_path / "copy")))) == "LEDGER_MOVED"

    @pytest.mark.parametrize("text", ["", "uninitialized\n", "x" * 32, "1" * 31])
    def test_a_file_that_says_no_machine_is_none(self, tmp_path: Path, machine: Any, text: str) -> None:
        (tmp_path / "machine-id").write_text(text)
        assert places.machine_id() is None

    def test_the_machine_itself_is_not_written(self, tmp_path: Path, machine: Any) -> None:
        ledger = new_ledger(tmp_path / "site")
        assert HERE.encode() not in paths(tmp_path / "site")[0].read_bytes()
        assert HERE not in json.dumps(list(ledger.events()))

    def test_a_link_to_the_folder_is_the_same_place(self, tmp_path: Path) -> None:
        new_ledger(tmp_path / "site")
        (tmp_path / "link").symlink_to(tmp_path / "site")
        reserve(Ledger(*paths(tmp_path / "link")))

    def test_a_restored_file_in_the_same_place_is_seen(self, tmp_path: Path, machine: Any) -> None:
        ledger = new_ledger(tmp_path)
        path, _ = paths(tmp_path)
        shutil.copy(path, tmp_path / "data" / "backup")
        (tmp_path / "data" / "backup").replace(path)
        assert refusal(lambda: reserve(ledger)) == "LEDGER_MOVED"
        assert ledger.move(), "the key and the head are the same ones"
        reserve(ledger)

    def test_a_restored_folder_with_its_key_is_asked_about(self, tmp_path: Path, machine: Any) -> None:
        new_ledger(tmp_path / "site")
        copied(tmp_path / "site", tmp_path / "backup")
        shutil.move(tmp_path / "site", tmp_path / "lost")
        (tmp_path / "backup").rename(tmp_path / "site")
        ledger = Ledger(*paths(tmp_path / "site"))
        assert refusal(lambda: reserve(ledger)) == "LEDGER_MOVED"
        assert refusal(ledger.move) == "LEDGER_MOVED"
        assert ledger.move(old_is_gone=True)
        reserve(ledger)


class TestMoving:
    def test_of_two_copies_the_second_cannot_spend(self, tmp_path: Path) -> None:
        first = new_ledger(tmp_path / "a")
        reservation = reserve(first)
        second = Ledger(*paths(copied(tmp_path / "a", tmp_path / "b")))
        assert refusal(lambda: book(second, reservation, 0)) == "LEDGER_MOVED"
        book(first, reservation, 0)
        assert refusal(second.move) == "LEDGER_DAMAGED", "the first has gone on since"
        assert refusal(lambda: second.move(old_is_gone=True)) == "LEDGER_DAMAGED"
        assert refusal(lambda: book(second, reservation, 0)) == "LEDGER_MOVED"

    def test_a_move_closes_the_one_it_leaves(self, tmp_path: Path) -> None:
        first = new_ledger(tmp_path / "a")
        reservation = reserve(first)
        second = Ledger(*paths(copied(tmp_path / "a", tmp_path / "b")))
        assert second.move()
        book(second, reservation, 0)
        for act in (lambda: book(first, reservation, 0), lambda: reserve(first), first.check_usable):
            assert refusal(act) == "LEDGER_MOVED"
        assert first.identity().is_away
        third = Ledger(*paths(copied(tmp_path / "a", tmp_path / "c")))
        assert refusal(third.move) == "LEDGER_DAMAGED", "it has gone to the second"
        assert not second.move(), "it is there already"

    def test_it_may_come_back(self, tmp_path: Path) -> None:
        reservation = reserve(new_ledger(tmp_path / "a"))
        Ledger(*paths(copied(tmp_path / "a", tmp_path / "b"))).move()
        book(Ledger(*paths(tmp_path / "b")), reservation, 0)
        shutil.rmtree(tmp_path / "a")
        back = Ledger(*paths(copied(tmp_path / "b", tmp_path / "a")))
        assert back.move()
        assert back.summary(BUDGET).runs[0].booked == 1
        book(back, reservation, 1)
        assert refusal(lambda: book(Ledger(*paths(tmp_path / "b")), reservation, 1)) == "LEDGER_MOVED"

    def test_renamed_it_is_moved_without_a_question(self, tmp_path: Path, machine: Any) -> None:
        reservation = reserve(new_ledger(tmp_path / "a"))
        (tmp_path / "a").rename(tmp_path / "b")
        moved = Ledger(*paths(tmp_path / "b"))
        assert refusal(lambda: book(moved, reservation, 0)) == "LEDGER_MOVED"
        assert moved.move()
        book(moved, reservation, 0)

    def test_a_copy_without_its_key_shares_the_head(self, tmp_path: Path, machine: Any) -> None:
        path, key = paths(tmp_path)
        first = new_ledger(tmp_path)
        reservation = reserve(first)
        second = Ledger(tmp_path / "other" / "ledger.sqlite", key)
        second.path.parent.mkdir()
        shutil.copy(path, second.path)
        assert refusal(lambda: book(second, reservation, 0)) == "LEDGER_MOVED"
        assert second.move()
        book(second, reservation, 0)
        assert refusal(lambda: book(first, reservation, 0)) == "LEDGER_DAMAGED"

    def test_a_key_alone_may_be_moved(self, tmp_path: Path, machine: Any) -> None:
        path, key = paths(tmp_path)
        first = new_ledger(tmp_path)
        reservation = reserve(first)
        shutil.copytree(key.parent, tmp_path / "other")
        second = Ledger(path, tmp_path / "other" / key.name)
        assert refusal(lambda: book(second, reservation, 0)) == "LEDGER_MOVED"
        assert second.move()
        book(second, reservation, 0)
        assert refusal(lambda: book(first, reservation, 1)) == "LEDGER_MOVED"

    @pytest.mark.parametrize("shared", ["path", "link"])
    def test_a_shared_head_is_never_moved_past_the_copy(
        self, tmp_path: Path, machine: Any, shared: str
    ) -> None:
        """Without a machine's id nobody knows whether the same path is the same key."""
        machine(None)
        path, key = paths(tmp_path)
        first = new_ledger(tmp_path)
        reservation = reserve(first)
        (tmp_path / "other").mkdir()
        shutil.copy(path, tmp_path / "other" / "ledger.sqlite")
        if shared == "link":
            (tmp_path / "keys").rename(tmp_path / "real")
            (tmp_path / "keys").symlink_to(tmp_path / "real")
        second = Ledger(tmp_path / "other" / "ledger.sqlite", key)
        if shared == "path":
            assert refusal(second.move) == "LEDGER_MOVED"
        assert second.move(old_is_gone=shared == "path")
        book(second, reservation, 0)
        assert refusal(lambda: book(first, reservation, 1)) == "LEDGER_DAMAGED"

    def test_to_another_machine_it_is_closed_first(self, tmp_path: Path, machine: Any) -> None:
        first = new_ledger(tmp_path / "a")
        reservation = reserve(first)
        first.depart()
        assert refusal(lambda: book(first, reservation, 0)) == "LEDGER_MOVED"
        assert refusal(first.move) == "LEDGER_MOVED", "it may have been carried away"
        copied(tmp_path / "a", tmp_path / "b")
        shutil.rmtree(tmp_path / "a")
        machine(ELSEWHERE)
        second = Ledger(*paths(tmp_path / "b"))
        assert refusal(lambda: book(second, reservation, 0)) == "LEDGER_MOVED"
        assert second.move()
        book(second, reservation, 0)

    def test_what_did_not_leave_after_all_goes_on(self, tmp_path: Path) -> None:
        ledger = new_ledger(tmp_path)
        ledger.depart()
        assert ledger.move(old_is_gone=True)
        reserve(ledger)

    def test_what_was_taken_back_may_be_moved_again(self, tmp_path: Path, machine: Any) -> None:
        first = new_ledger(tmp_path / "a")
        second = Ledger(*paths(copied(tmp_path / "a", tmp_path / "b")))
        second.move()
        assert first.identity().went_to == str(second.path)
        assert refusal(lambda: first.move(old_is_gone=True)) == "LEDGER_DAMAGED", "two would be bound"
        assert first.identity().is_away and second.identity().is_here
        second.depart()
        assert refusal(lambda: first.move(old_is_gone=True)) == "LEDGER_DAMAGED", "it is older all the same"
        shutil.rmtree(tmp_path / "b")
        assert first.move(old_is_gone=True) and first.identity().went_to is None
        (tmp_path / "a").rename(tmp_path / "c")
        assert Ledger(*paths(tmp_path / "c")).move()
        reserve(Ledger(*paths(tmp_path / "c")))

    def test_another_ledger_in_the_old_place_is_left_alone(self, tmp_path: Path) -> None:
        new_ledger(tmp_path / "a")
        (tmp_path / "a").rename(tmp_path / "b")
        other = Ledger.create(*paths(tmp_path / "a"), SITE)
        assert refusal(Ledger(*paths(tmp_path / "b")).move) == "LEDGER_MOVED"
        reserve(other)

    def test_an_old_one_that_was_set_on_another_way_is_not_left_behind(self, tmp_path: Path) -> None:
        ledger = new_ledger(tmp_path / "a")
        path, key = paths(tmp_path / "a")
        head = KeyFolder(key).head
        before = path.read_bytes(), head.read_bytes()
        reserve(ledger, "one")
        copied(tmp_path / "a", tmp_path / "b")
        path.write_bytes(before[0])
        head.write_bytes(before[1])
        reserve(Ledger(path, key), "two")
        assert refusal(Ledger(*paths(tmp_path / "b")).move) == "LEDGER_DAMAGED"

    def test_a_site_may_get_another_name(self, tmp_path: Path) -> None:
        path, key = paths(tmp_path)
        ledger = Ledger.create(path, key, SITE)
        assert ledger.move(site="hospital-z") and not ledger.move(site="hospital-z")
        reserve(Ledger(path, key, site="hospital-z", owner=STEWARD))
        assert refusal(lambda: reserve(Ledger(path, key, site=SITE))) == "LEDGER_FOREIGN"


def write_entry(folder: Path, kind: str, body: dict[str, Any]) -> None:
    """Append an entry as another version of this program might, chained as it should be."""
    path, key = paths(folder)
    keys, head = Keys(key.read_bytes()), KeyFolder(key).read_head()
    text = canonical_json(body)
    chain = keys.link(head.chain, head.seq + 1, 2**31, kind.encode(), text.encode())
    with sqlite3.connect(path) as connection:
        row = (head.seq + 1, 2**31, kind, text, chain)
        connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", row)
    KeyFolder(key).write_head(Head(head.seq + 1, chain))


class TestVersions:
    @pytest.mark.parametrize(
        ("kind", "changes", "says"),
        [
            ("mask", {}, "'mask'"),
            (
                "booking",
                {"mechanism": {"kind": "shared-gaussian", "noise_multiplier": 2.3}},
                "'shared-gaussian'",
            ),
            ("booking", {"trust": {"server": True, "colluders": 1}}, "'colluders': 1"),
            ("booking", {"transcript": "00"}, "booking"),
            ("reservation", {"mechanism": {"kind": "correlated", "noise_multiplier": 2.3}}, "'correlated'"),
            (
                "reservation",
                {"mechanism": {"kind": "gaussian", "noise_multiplier": 2.3, "sites": 2}},
                "'sites': 2",
            ),
            ("reservation", {"mechanism": None}, "None"),
            ("reservation", {"trust": {"server": False}}, "'server': False"),
            ("disclosure", {"mechanism": {"kind": "gaussian", "noise_multiplier": 2.3}}, "'gaussian'"),
            ("release", {"more": 1}, "release"),
        ],
    )
    def test_what_a_later_version_wrote_is_refused(
        self, tmp_path: Path, kind: str, changes: dict[str, Any], says: str
    ) -> None:
        fill(new_ledger(tmp_path))
        known = {line["kind"]: line["body"] for line in Ledger(*paths(tmp_path)).events()}
        write_entry(tmp_path, kind, {**known.get(kind, {}), **changes})
        fresh = Ledger(*paths(tmp_path))
        for act in (lambda: reserve(fresh, "more"), fresh.verify, lambda: fresh.summary(BUDGET)):
            with raises_reason("LEDGER_UNUSABLE", says):
                act()

    def test_an_entry_of_this_version_is_not(self, tmp_path: Path) -> None:
        fill(new_ledger(tmp_path))
        write_entry(tmp_path, "departure", {"to": None})
        assert Ledger(*paths(tmp_path)).identity().is_away

    @pytest.mark.parametrize(
        ("version", "says"),
        [(VERSION - 1, "histoflare ledger create"), (VERSION + 1, f"version {VERSION + 1}")],
    )
    def test_another_versions_ledger_is_refused(self, tmp_path: Path, version: int, says: str) -> None:
        path, key = paths(tmp_path)
        new_ledger(tmp_path)
        path.unlink()
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA page_size = 4096")
        connection.execute("PRAGMA application_id = 0x48464C47")
        connection.execute(f"PRAGMA user_version = {version}")
        for statement in STATEMENTS.values():
            connection.execute(statement)
        connection.close()
        before = path.read_bytes()
        ledger = Ledger(path, key)
        for act in (lambda: reserve(ledger), ledger.verify, ledger.move, lambda: note(ledger)):
            with raises_reason("LEDGER_UNUSABLE", path, says):
                act()
        assert path.read_bytes() == before


class TestDisclosures:
    def test_what_left_unprotected_is_listed_by_run(self, tmp_path: Path) -> None:
        ledger = new_ledger(tmp_path)
        for round_index in range(3):
            first = note(ledger, round_index, f"update {round_index}")
            assert note(ledger, round_index, f"update {round_index}") == first, "the same bytes"
        ledger.note(
            what="evaluation",
            run="other",
            model_sha256=sha("m"),
            digest=sha("figures"),
            figures=["auc", "accuracy"],
            patients=7,
        )
        assert ledger.verify().entries == 5
        updates, evaluations = ledger.disclosures()
        assert (updates.what, updates.run, updates.times, updates.patients) == ("update", "open run", 3, 3)
        assert (updates.figures, updates.is_counted) == (("train/loss",), False)
        assert (evaluations.what, evaluations.run, evaluations.times) == ("evaluation", "other", 1)
        assert (evaluations.figures, evaluations.patients) == (("accuracy", "auc"), 7)
        assert ledger.is_released(sha("figures")) and ledger.is_released(sha("update 1"))
        summary = ledger.summary(BUDGET)
        assert (summary.rho, summary.disclosures, summary.patients) == (0.0, 0, 0), "no budget counts them"

    def test_counted_evaluations_name_their_figures_once_released(self, tmp_path: Path) -> None:
        ledger = new_ledger(tmp_path)
        roles = {"emil": "test", "anna": "train"}
        found = ledger.disclose(run="run", model_sha256=sha("m"), patients=["emil"], roles=roles, limit=1)
        (before,) = ledger.disclosures()
        assert (before.figures, before.is_counted, before.patients) == ((), True, 1)
        ledger.release(found, sha("figures"), ["auc"])
        (after,) = ledger.disclosures()
        assert (after.figures, after.times) == (("auc",), 1)

    @pytest.mark.parametrize("trusts_server", [False, True])
    def test_whom_a_reservation_trusts_is_kept(self, tmp_path: Path, trusts_server: bool) -> None:
        from tests.privacy.ledgers import ABOUT, ROLES, SPEND

        ledger = new_ledger(tmp_path)
        asked = {"run": "run", "about": ABOUT, "spend": SPEND, "rounds": 1, "roles": ROLES, "budget": BUDGET}
        token = ledger.reserve(**asked, trusts_server=trusts_server)  # type: ignore[arg-type]
        book(ledger, token, 0)
        bodies = [line["body"] for line in ledger.events() if line["kind"] in ("reservation", "booking")]
        assert [body["trust"] for body in bodies] == [{"server": True} if trusts_server else None] * 2
        (run,) = Ledger(*paths(tmp_path)).summary(BUDGET).runs
        assert run.trusts_server == trusts_server
        other = ledger.reserve(**asked, trusts_server=not trusts_server)  # type: ignore[arg-type]
        assert other.id != token.id

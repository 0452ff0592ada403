"""Real processes: killed before each of their writes, and racing for the last of the budget."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from histoflare.errors import LedgerError
from histoflare.privacy.audit_log import AuditLog
from histoflare.privacy.ledger import Booking, Ledger
from histoflare.privacy.ledger.key import KeyFolder
from histoflare.privacy.release_store import ReleaseStore
from tests.privacy.killed import (
    NOT_PERMITTED,
    ROUNDS,
    created,
    digest_of,
    place_of,
    take_part,
    update_of,
)
from tests.privacy.ledgers import (
    BUDGET,
    SITE,
    SPEND,
    book,
    copied,
    most_rounds,
    new_ledger,
    paths,
    quick_folder,
    reserve,
    sha,
)
from tests.refusals import raises_reason


def cost(events: int) -> float:
    """Return ρ of so many events."""
    return BUDGET.cost(SPEND.times(events))


@pytest.mark.slow
def test_killed_before_any_write_a_ledger_loses_no_booking(repository: Path) -> None:
    with quick_folder() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.privacy.killed", str(folder)],
            cwd=repository,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            timeout=600,
            check=False,
        )
        if done.returncode == NOT_PERMITTED:
            pytest.skip("no process may trace another one here")
        assert done.returncode == 0
        all_told = json.loads((folder / "told.json").read_text())
        assert len(all_told) > 150, "every write has its turn"
        assert [what for what, _ in all_told[-1]][-1] == "noted", "the last run was not killed"
        for n, told in enumerate(all_told, start=1):
            check_survivor(folder / str(n), told)


def check_survivor(folder: Path, told: list[tuple[str, Any]]) -> None:
    """Check what a killed run left, and that the run can be gone on with."""
    whats = [what for what, _ in told]
    at = place_of(folder)
    ledger = created(at)
    assert ledger.verify().ahead <= 3, "one transaction at most"
    assert "moved" not in whats or at != folder
    runs = [run for run in ledger.summary(BUDGET).runs if run.run == "run"]
    counts = {name: sum(getattr(run, name) for run in runs) for name in ("booked", "released", "failed")}
    assert whats.count("reserved") <= len(runs) <= 1
    for what, count in counts.items():
        assert whats.count(what) <= count <= whats.count(what) + 1
    assert counts["released"] + counts["failed"] <= counts["booked"]
    own = cost(max(ROUNDS, counts["booked"])) if runs else 0.0
    other = 0.0 if "closed" in whats else cost(2)
    assert own <= ledger.summary(BUDGET).rho <= own + other

    released = {line["body"]["digest"] for line in ledger.events() if line["kind"] == "release"}
    for what, id_ in told:
        if what == "released":
            stored = ReleaseStore(folder / "releases").load(id_)
            assert stored is not None
            booking = Booking(id_, 4, stored.extra["round"], "", 1)
            assert (stored.arrays["w"] == update_of(booking)["w"]).all()
            assert digest_of(booking) in released
    assert all(
        event["what"] in ("released", "unreadable") for event in AuditLog(folder / "audit.jsonl").read()
    )

    take_part(folder)
    assert place_of(folder) == folder / "moved"
    assert Ledger(*paths(folder)).identity().is_away, "of the two one goes on"
    with pytest.raises(LedgerError) as caught:
        reserve(Ledger(*paths(folder)), "further")
    assert caught.value.reason == "LEDGER_MOVED"
    ledger = Ledger(*paths(folder / "moved"))
    assert [(each.what, each.times) for each in ledger.disclosures()] == [("evaluation", 1), ("update", 1)]
    summary = ledger.summary(BUDGET)
    (run,) = [run for run in summary.runs if run.run == "run"]
    assert (run.booked, run.released, run.failed) == (ROUNDS + 1, ROUNDS, 1)
    assert summary.rho == cost(ROUNDS + 1), "what is run again is charged again only where it had failed"
    assert summary.disclosures == 1
    leftovers = [path.name for path in folder.rglob("*partial*") if path.parent.name != "releases"]
    assert len(leftovers) <= 1, "at most what the killed writer itself left"


def race(number: int, both: Barrier, folder: Path, repetitions: int, answers: Any) -> None:
    """Race another process for one of several things, again and again."""
    most = most_rounds()
    for repetition in range(repetitions):
        both.wait(60)
        ledger = new_ledger(folder / str(repetition))
        both.wait(60)
        try:
            reserve(ledger, f"run {number}", most - 1)
            won = "reserved"
        except LedgerError as error:
            won = error.reason
        both.wait(60)
        shared = reserve(ledger, "shared", 1)
        booked = book(ledger, shared, 0).id
        both.wait(60)
        try:
            further = ledger.book(shared, 1 + number, sha("m"), BUDGET)
            extra = "booked" if isinstance(further, Booking) else "released"
        except LedgerError as error:
            extra = error.reason
        answers.put((repetition, won, shared.id, booked, extra))


def test_of_two_processes_one_gets_the_last_of_the_budget(tmp_path: Path) -> None:
    repetitions = 25
    spawn = multiprocessing.get_context("spawn")
    both, answers = spawn.Barrier(2), spawn.Queue()
    arguments = (both, tmp_path, repetitions, answers)
    racers = [spawn.Process(target=race, args=(number, *arguments)) for number in range(2)]
    for racer in racers:
        racer.start()
    found = [answers.get(timeout=120) for _ in range(2 * repetitions)]
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    for repetition in range(repetitions):
        pair = [answer for answer in found if answer[0] == repetition]
        assert sorted(answer[1] for answer in pair) == ["BUDGET_EXHAUSTED", "reserved"]
        assert len({answer[2:4] for answer in pair}) == 1, "the same reservation, the same booking"
        assert [answer[4] for answer in pair] == ["BUDGET_EXHAUSTED"] * 2
        ledger = Ledger(*paths(tmp_path / str(repetition)))
        assert ledger.verify().ahead == 0
        assert BUDGET.admits(ledger.summary(BUDGET).rho)


def race_for_more(number: int, both: Barrier, folder: Path, repetitions: int, answers: Any) -> None:
    """Book rounds beyond the reserved ones against another process until there is no room."""
    ledger = new_ledger(folder)
    reserve(ledger, "rest", most_rounds() - repetitions - 1)
    reservation = reserve(ledger, "shared", 1)
    book(ledger, reservation, 0)
    both.wait(60)
    n = 0
    try:
        for n in range(2 * repetitions):
            ledger.book(reservation, n, sha(f"further {number}"), BUDGET)
    except LedgerError as error:
        answers.put((n, error.reason))


def test_two_processes_share_what_is_left_event_by_event(tmp_path: Path) -> None:
    left = 30
    spawn = multiprocessing.get_context("spawn")
    both, answers = spawn.Barrier(2), spawn.Queue()
    racers = [spawn.Process(target=race_for_more, args=(n, both, tmp_path, left, answers)) for n in range(2)]
    for racer in racers:
        racer.start()
    found = [answers.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join(60)
    assert sum(n for n, _ in found) == left
    assert {reason for _, reason in found} == {"BUDGET_EXHAUSTED"}
    summary = Ledger(*paths(tmp_path)).summary(BUDGET)
    assert summary.runs[1].booked == 1 + left
    assert BUDGET.admits(summary.rho)


def race_to_begin(number: int, both: Barrier, folder: Path, repetitions: int, answers: Any) -> None:
    """Race another process for making a ledger, and for carrying it on from one of two copies."""
    for repetition in range(repetitions):
        at = folder / str(repetition)
        both.wait(60)
        answers.put((repetition, "create", attempt(lambda at=at: Ledger.create(*paths(at), SITE))))
        both.wait(60)
        copy = copied(at, folder / f"{repetition} {number}")
        both.wait(60)
        answers.put((repetition, "move", attempt(Ledger(*paths(copy)).move)))
        booked = attempt(lambda copy=copy: reserve(Ledger(*paths(copy))))
        answers.put((repetition, "reserve", booked))


def attempt(act: Callable[[], object]) -> str:
    """Return ``"done"``, or the reason for which ``act`` was refused."""
    try:
        act()
    except LedgerError as error:
        return error.reason
    return "done"


def test_of_two_processes_one_makes_the_ledger_and_one_of_two_copies_goes_on(tmp_path: Path) -> None:
    repetitions = 25
    spawn = multiprocessing.get_context("spawn")
    both, answers = spawn.Barrier(2), spawn.Queue()
    arguments = (both, tmp_path, repetitions, answers)
    racers = [spawn.Process(target=race_to_begin, args=(number, *arguments)) for number in range(2)]
    for racer in racers:
        racer.start()
    found = [answers.get(timeout=120) for _ in range(6 * repetitions)]
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    expected = {"create": "LEDGER_UNUSABLE", "move": "LEDGER_MOVED", "reserve": "LEDGER_MOVED"}
    for repetition in range(repetitions):
        for what, refused in expected.items():
            pair = [answer for at, of, answer in found if (at, of) == (repetition, what)]
            assert sorted(pair) == [refused, "done"], what
        assert Ledger(*paths(tmp_path / str(repetition))).identity().is_away


HOLD = """
import sys, time
from pathlib import Path
from histoflare.privacy.ledger.key import KeyFolder
with KeyFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(600)
"""


def test_whoever_is_killed_lets_the_lock_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = new_ledger(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(paths(tmp_path)[1])], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    monkeypatch.setattr("histoflare.privacy.ledger.key.WAIT_S", 0.2)
    with raises_reason("LEDGER_UNUSABLE", paths(tmp_path)[1].parent):
        reserve(ledger)
    assert ledger.verify().entries == 1, "reading needs no lock"
    holder.send_signal(signal.SIGKILL)
    holder.wait(60)
    holder.stdout.close()
    assert reserve(ledger).rounds == 3
    assert KeyFolder(paths(tmp_path)[1]).read_head().seq == 4

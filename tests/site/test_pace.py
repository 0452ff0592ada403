"""Public times, with a clock that only moves when something works or waits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from histoflare.site.pace import EVALUATING, POLL_SECONDS, PREPARING, TRAINING, Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


class Site:
    """A site with a pace of 10 s."""

    def __init__(self, folder: Path, seconds: int = 10) -> None:
        self.file, self.log, self.clock = folder / "run" / "pace.json", list[str](), Clock()
        self.pace = Pace(seconds, self.file, self.log.append, self.clock, self.clock.work)

    def answer(self, works: float, kind: str = TRAINING) -> float:
        """Return how long after its arrival a task is answered."""
        arrived = self.clock.now
        self.pace.open(arrived)
        self.clock.work(works)
        assert self.pace.close(kind, lambda: False)
        return self.clock.now - arrived


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.mark.parametrize("works", [0.0, 0.01, 3.3, 9.999, 10.0])
def test_an_answer_comes_at_the_public_time_however_soon_it_is_there(site: Site, works: float) -> None:
    assert site.answer(works) == pytest.approx(10.0)
    assert not site.log and not site.file.exists()


@pytest.mark.parametrize(("works", "comes"), [(10.01, 20), (19.9, 20), (20.1, 40), (75, 80)])
def test_a_late_answer_comes_after_a_doubled_time_and_so_does_every_one_after_it(
    site: Site, works: float, comes: int
) -> None:
    assert site.answer(works) == pytest.approx(comes)
    assert "late" in site.log[0] and json.loads(site.file.read_text()) == {TRAINING: comes}
    assert site.answer(0.1) == pytest.approx(comes)
    assert len(site.log) == 1


def test_a_run_says_that_it_was_late_once_for_each_doubling_at_most(site: Site) -> None:
    times = [site.answer(works) for works in (3, 12, 15, 8, 18, 35, 2, 39, 11)]
    assert times == pytest.approx([10, 20, 20, 20, 20, 40, 40, 40, 40])


def test_each_kind_has_a_time_of_its_own(site: Site) -> None:
    assert site.answer(33, PREPARING) == pytest.approx(40)
    assert site.answer(1, TRAINING) == pytest.approx(10)
    assert site.answer(1, EVALUATING) == pytest.approx(10)
    assert site.answer(1, PREPARING) == pytest.approx(40)


def test_what_comes_after_preparing_is_opened_at_its_public_time(site: Site) -> None:
    """However long the data took to read, and a round after it: the sum is public."""
    for prepares, trains in ((0.2, 9.9), (9.9, 0.2), (5.0, 5.0)):
        arrived = site.clock.now
        site.pace.open(arrived)
        site.clock.work(prepares)
        site.pace.close(PREPARING, lambda: False)
        site.clock.work(trains)
        site.pace.close(TRAINING, lambda: False)
        assert site.clock.now - arrived == pytest.approx(20)


def test_a_longer_time_outlives_the_job_and_a_resumed_one_that_asks_for_less(
    site: Site, tmp_path: Path
) -> None:
    site.answer(15)
    assert Site(tmp_path, seconds=1).answer(0.1) == pytest.approx(20)
    assert Site(tmp_path, seconds=50).answer(0.1) == pytest.approx(50)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"train": "long"}', '{"train": null}'])
def test_a_damaged_note_is_said_and_the_jobs_time_counts(tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pace.json").write_text(content)
    assert Site(tmp_path).answer(1.0) == pytest.approx(10)


def test_a_time_that_cannot_be_written_counts_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    site = Site(tmp_path)
    assert [site.answer(15), site.answer(1)] == pytest.approx([20, 20])
    assert any("cannot be written" in line for line in site.log)


def test_whoever_stops_it_does_not_wait(site: Site) -> None:
    def after(seconds: float) -> Callable[[], bool]:
        until = site.clock.now + seconds
        return lambda: site.clock.now >= until

    site.pace.open(site.clock.now)
    started = site.clock.now
    assert not site.pace.close(TRAINING, after(2.0))
    assert 2.0 <= site.clock.now - started <= 2.0 + 2 * POLL_SECONDS

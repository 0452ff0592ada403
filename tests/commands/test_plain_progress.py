"""Progress in a log: lines when a step begins and ends, and now and then between."""

from __future__ import annotations

from histoflare.commands.plain_progress import PlainProgress


def test_a_long_step_speaks_every_tenth_and_every_ten_seconds() -> None:
    said: list[str] = []
    now = [0.0]
    bars = PlainProgress(said.append, lambda: now[0])
    with bars:
        task = bars.add_task("slides", total=100)
        assert said == ["slides … (0 of 100)"]
        for _ in range(9):
            now[0] += 1
            bars.advance(task)
        assert len(said) == 1  # neither a tenth nor ten seconds
        now[0] += 1
        bars.update(task, advance=1)
        assert said[1:] == ["slides: 10 of 100, 0:00:10 gone, about 0:01:30 left"]
        now[0] += 10
        bars.update(task, description="slides (a.svs)")  # nothing done, but time has gone
        assert said[2:] == ["slides (a.svs): 10 of 100, 0:00:20 gone, about 0:03:00 left"]
        bars.update(task, completed=60)  # at once: not within a second
        assert len(said) == 3
        bars.update(task, completed=100)
        assert said[3:] == ["slides: 100 of 100, done in 0:00:20"]
        bars.update(task, completed=100)
        assert len(said) == 4


def test_a_step_of_unknown_length_has_a_beginning_and_an_end() -> None:
    said: list[str] = []
    now = [0.0]
    bars = PlainProgress(said.append, lambda: now[0])
    task = bars.add_task("start", total=None)
    now[0] = 3.0
    bars.update(task, total=1, completed=1)
    assert said == ["start …", "start, done in 0:00:03"]


def test_what_was_done_before_says_nothing_about_the_time_left() -> None:
    said: list[str] = []
    now = [0.0]
    bars = PlainProgress(said.append, lambda: now[0])
    task = bars.add_task("windows", total=None)
    now[0] = 5.0
    bars.reset(task, completed=80, total=100)
    now[0] = 15.0
    bars.update(task, completed=90, total=100)
    assert said == ["windows …", "windows: 90 of 100, 0:00:10 gone, about 0:00:10 left"]

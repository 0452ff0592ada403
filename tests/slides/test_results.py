"""A table of results goes on where it was, and a slide that fails costs no other."""

from __future__ import annotations

import csv
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from histoflare.errors import EncoderError, JobError, SlideError
from histoflare.slides.results import Table, TableReport, fill_table
from histoflare.slides.sources import Source


class Work:
    """Notes which slides it was asked about; what it finds is the file's size."""

    def __init__(self, **errors: Exception) -> None:
        self.errors, self.asked = errors, list[str]()

    def __call__(self, source: Source) -> dict[str, Any]:
        self.asked.append(source.written)
        if source.written in self.errors:
            raise self.errors[source.written]
        return {"found": source.path.stat().st_size}


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    for name, content in (("a", "1"), ("b", "22"), ("c", "333")):
        (tmp_path / name).write_text(content)
    return [Source(tmp_path / name, name, patient=f"p-{name}") for name in "abc"]


def table(tmp_path: Path, model: str = "m1") -> Table:
    return Table(tmp_path / "out" / "results.csv", ["found"], {"model_sha256": model})


def rows(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "out" / "results.csv").open() as file:
        return list(csv.DictReader(file))


def fill(tmp_path: Path, sources: list[Source], work: Work, model: str = "m1") -> TableReport:
    return fill_table(table(tmp_path, model), sources, work)


def test_a_failure_costs_no_other_and_is_tried_again(tmp_path: Path, sources: list[Source]) -> None:
    work = Work(a=SlideError("no tissue", reason="SLIDE_NO_TISSUE"), b=RuntimeError("odd"))
    report = fill(tmp_path, sources, work)
    assert report.exit_code == 3 and work.asked == ["a", "b", "c"]
    found = rows(tmp_path)
    assert [(row["status"], row["reason"]) for row in found] == [
        ("skipped", "SLIDE_NO_TISSUE"),
        ("failed", "SLIDE_READ_FAILED"),
        ("done", ""),
    ]
    assert found[2]["found"] == "3" and found[2]["patient"] == "p-c"
    again = Work()
    assert fill(tmp_path, sources, again).exit_code == 0
    assert again.asked == ["a", "b"] and [row["found"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_what_a_row_rests_on_decides_whether_it_stands(tmp_path: Path, sources: list[Source]) -> None:
    fill(tmp_path, sources, Work())
    os.utime(sources[0].path, ns=(0, 10**18))  # the same bytes
    sources[1].path.write_text("44")  # the same size
    os.utime(sources[1].path, ns=(0, 2 * 10**18))
    work = Work()
    assert fill(tmp_path, sources, work).kept == 2 and work.asked == ["b"]
    other = Work()
    assert fill(tmp_path, sources, other, "m2").kept == 0 and other.asked == ["a", "b", "c"]
    beside = Work()
    there = [sources[0].path]
    report = fill_table(
        table(tmp_path, "m2"),
        sources,
        beside,
        files=lambda source: there if source.written == "a" else [tmp_path / "gone"],
    )
    assert report.kept == 1 and beside.asked == ["b", "c"]


def test_a_command_that_was_killed_loses_the_slide_in_work(tmp_path: Path, sources: list[Source]) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, sources, Work(c=KeyboardInterrupt()))  # type: ignore[arg-type]
    assert [row["slide"] for row in rows(tmp_path)] == ["a", "b"]
    path = tmp_path / "out" / "results.csv"
    path.write_bytes(path.read_bytes()[:-5])  # a line of which a part was written
    work = Work()
    assert fill(tmp_path, sources[::-1], work).exit_code == 0
    assert work.asked == ["c", "b"] and [row["slide"] for row in rows(tmp_path)] == ["c", "b", "a"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        EncoderError("of no slide", reason="ENCODER_INPUT"),
    ],
)
def test_what_is_no_slide_s_fault_ends_the_command(
    tmp_path: Path, sources: list[Source], error: Exception
) -> None:
    with pytest.raises(type(error)):
        fill(tmp_path, sources, Work(b=error))
    assert [row["slide"] for row in rows(tmp_path)] == ["a"]


def test_another_file_and_another_writer_are_left_alone(tmp_path: Path, sources: list[Source]) -> None:
    path = tmp_path / "out" / "results.csv"
    path.parent.mkdir()
    path.write_text("slide,patient,label\na,1,x\n")
    with pytest.raises(JobError) as caught:
        fill(tmp_path, sources, Work())
    assert caught.value.reason == "OUTPUT_TAKEN" and path.read_text().endswith("a,1,x\n")
    path.unlink()

    class Meanwhile(Work):
        def __call__(self, source: Source) -> dict[str, Any]:
            with pytest.raises(JobError) as busy:
                fill(tmp_path, sources, Work())
            assert busy.value.reason == "RESULTS_BUSY"
            return super().__call__(source)

    assert fill(tmp_path, sources[:1], Meanwhile()).exit_code == 0

"""What happened in each round: files in the server's run folder, which come with the job's result."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext

from histoflare.flare.job_files import EARLIER_ROUNDS_FILE
from histoflare.storage import write_json

ROUNDS_FILE = "rounds.json"
SITES_FILE = "sites.json"
EVALUATION_FILE = "evaluation.json"
"""Site → what it says of the model, or what its noised counts say."""
EVALUATION_TOTAL_FILE = "evaluation_total.json"
"""Of an evaluation under a budget: the ``figures`` of all ``sites`` that train together, the sum of their
noised ``counts`` (``tally_form``), and ``noise_std``, its standard deviation in each."""
BEST_EVALUATION_FILE = "best_evaluation.json"
"""As the one before, of the best model by the job's metric; where a best one was kept."""
EVALUATION_ROUND_FILE = "evaluation_round.json"
"""Who was asked about the model after a job's last round, who answered, and who refused with which code."""
BEST_EVALUATION_ROUND_FILE = "best_evaluation_round.json"
"""As the one before, of the best model."""


@dataclass
class RoundRecord:
    """One round as the server saw it. Times are of the server's monotonic clock, in seconds.

    Attributes:
        round_index: From 0. sites: All registered with the server. asked: Who was sent the task.
        sent, answered: Site → when its task left, when its reply came.
        refused: Site → fixed reason code of what it answered instead of a result.
        taking_part: Whose updates were combined.
        given_up: Why the run ended with this round; empty if it did not.
        stamps: Site → what its gate says of the update: ``scope``, ``mechanism``, ``spend`` (what one patient
            spent in this round), ``seeded_noise``.
        notes: What the strategy says of the round (``rounds.strategy.ServerOutcome.notes``).
        metrics: Site → metrics of the model it received, as far as its policy let them out.
        validation: Mean over the sites of the figure that says which model is best; None if not all said it.
        stopped: Why the run ends with this round, before its last (``rounds.patience.Patience.to_json``).
        voids: Attempts at this round's sum that were void: the ``sites`` on whose updates it counted, and of
            them ``no_answer`` and ``refused``. Both are empty where the sum itself was wrong.
        bytes_down, bytes_up: Of tensors.
    """

    round_index: int
    sites: list[str]
    asked: list[str]
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    sent: dict[str, float] = field(default_factory=dict)
    answered: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    taking_part: list[str] = field(default_factory=list)
    given_up: str = ""
    stamps: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    validation: float | None = None
    stopped: dict[str, Any] | None = None
    voids: list[dict[str, Any]] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the row of this round.

        ``seconds``: site → ``training`` (its task sent → its reply), ``waiting`` (its reply → the last one
        awaited) and ``idle`` (the rest of the round: combining, writing, the way of the task). A site that
        was asked and gave no answer has none of the first two.

        ``absent``: those of ``no_answer`` whom the task never reached, as they were not there.
        """
        row = {
            "round": self.round_index,
            "sites": self.sites,
            "asked": self.asked,
            "taking_part": sorted(self.taking_part),
            "refused": dict(sorted(self.refused.items())),
            "no_answer": [site for site in self.asked if site not in self.answered],
            "absent": [site for site in self.asked if site not in self.answered and site not in self.sent],
            "seconds": {site: self._seconds(site) for site in self.sites},
            "stamps": {site: self.stamps[site] for site in sorted(self.taking_part) if site in self.stamps},
            "metrics": dict(sorted(self.metrics.items())),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "unix_time": round(time.time(), 3),
        }
        ending: dict[str, Any] = {
            "given_up": self.given_up or None,
            "validation": self.validation,
            "stopped": self.stopped,
            "voids": self.voids or None,
        }
        return row | self.notes | {name: value for name, value in ending.items() if value is not None}

    def ask_again(self, sites: Iterable[str] | None = None) -> None:
        """Forget what these sites, or all, have answered: they are asked for something else now."""
        for each in list(self.sent if sites is None else sites):
            for said in (self.sent, self.answered, self.refused):
                said.pop(each, None)

    def note_void(self, sites: list[str]) -> None:
        """Note that the sum of these sites' updates is void, and forget what they said beside them."""
        self.metrics.clear()
        self.voids.append(
            {
                "sites": list(sites),
                "no_answer": [site for site in sites if site not in self.answered],
                "refused": {site: self.refused[site] for site in sites if site in self.refused},
            }
        )

    def _seconds(self, site: str) -> dict[str, float]:
        now = time.monotonic()
        whole = now - self.started
        training = waiting = 0.0
        if site in self.answered and site in self.sent:
            training = self.answered[site] - self.sent[site]
            waiting = max((self.ended or now) - self.answered[site], 0.0)
        idle = max(whole - training - waiting, 0.0)
        return {"training": round(training, 3), "waiting": round(waiting, 3), "idle": round(idle, 3)}


class RunRecord:
    """The rows of a run, rewritten as a whole whenever one is added: a run that is aborted keeps its own."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] | None = None
        self._pseudonyms: dict[str, str] = {}

    def write(self, current: RoundRecord, fl_ctx: FLContext, *, finished: bool) -> None:
        """Write the finished rows and the current one; a round that is not finished says so."""
        if self._rows is None:
            self._rows = _earlier_rounds(fl_ctx)
        row = current.to_json() | ({} if finished else {"finished": False})
        if finished:
            self._rows.append(row)
        write_json(run_folder(fl_ctx) / ROUNDS_FILE, self._rows if finished else [*self._rows, row])

    def count_voids(self, fl_ctx: FLContext) -> int:
        """Return how many attempts of the finished rounds were void, those of earlier jobs included."""
        rows = _earlier_rounds(fl_ctx) if self._rows is None else self._rows
        return sum(len(row.get("voids", ())) for row in rows)

    def name(self, site: str, pseudonym: str | None, fl_ctx: FLContext) -> None:
        """Note under which name other sites may see ``site``."""
        if pseudonym and self._pseudonyms.get(site) != pseudonym:
            self._pseudonyms[site] = pseudonym
            write_json(run_folder(fl_ctx) / SITES_FILE, self._pseudonyms)


def _earlier_rounds(fl_ctx: FLContext) -> list[dict[str, Any]]:
    folder = fl_ctx.get_engine().get_workspace().get_app_config_dir(fl_ctx.get_job_id())
    try:
        rows: list[dict[str, Any]] = json.loads((Path(folder) / EARLIER_ROUNDS_FILE).read_text())
    except FileNotFoundError:
        return []
    return rows


def run_folder(fl_ctx: FLContext) -> Path:
    """Return the server's folder of this job; what lies there is downloaded with the job's result."""
    return Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))


def read_rows(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return the rows of a run folder's rounds, and that of the question about the model, if there is one."""
    rows: list[dict[str, Any]] = read_if_there(folder / ROUNDS_FILE) or []
    return rows, read_if_there(folder / EVALUATION_ROUND_FILE)


def read_best_row(folder: Path) -> dict[str, Any] | None:
    """Return the row of the question about the best model, if there is one."""
    row: dict[str, Any] | None = read_if_there(folder / BEST_EVALUATION_ROUND_FILE)
    return row


def read_if_there(path: Path) -> Any:
    """Return what a JSON file of the run holds; None if it is not there."""
    return json.loads(path.read_text()) if path.is_file() else None

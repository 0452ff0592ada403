"""What a job left in the server's run folder: the simulator's, a download's, a resumed run's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from histoflare.errors import HistoflareError
from histoflare.flare.job import Job
from histoflare.flare.job_files import CONFIG_FOLDER, MOST_BYTES, PROTOCOL_FILE, SERVER_APP, read_toml
from histoflare.flare.job_schema import complete
from histoflare.flare.record import (
    EVALUATION_FILE,
    EVALUATION_TOTAL_FILE,
    SITES_FILE,
    read_best_row,
    read_if_there,
    read_rows,
)
from histoflare.model_file import GLOBAL_MODEL_FILE, handed_out
from histoflare.privacy.protocol import hash_protocol
from histoflare.report.evaluation_noise import state_evaluation
from histoflare.report.outcomes import SiteOutcome, find_outcomes
from histoflare.rounds.state import State
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.records import RunRecords


@dataclass(frozen=True)
class FederationResult:
    """What came out of a job.

    Attributes:
        state: What the job hands out, its last model or an ensemble; None if no round was finished.
        rounds: One row per round, see ``flare.record.RoundRecord.to_json``.
        evaluation: Site → metrics of the model, where the sites were asked.
        pseudonyms: Site → the name under which others may see it, of those that have one.
        evaluation_round: The row of that question, where it came after the rounds of a training; else None.
        best_evaluation_round: That of the question about the best model; None where nobody was asked.
        evaluation_total: What the sum of the sites' noised counts says (``flare.record``); None: no sum.
    """

    state: State | None
    rounds: list[dict[str, Any]]
    evaluation: dict[str, dict[str, float | None]]
    pseudonyms: dict[str, str]
    evaluation_round: dict[str, Any] | None = None
    best_evaluation_round: dict[str, Any] | None = None
    evaluation_total: dict[str, Any] | None = None

    @property
    def finished_rounds(self) -> int:
        """Rounds that were brought to their end."""
        return count_finished(self.rounds)

    @property
    def stopped(self) -> bool:
        """Whether the run ended before its last round because its patience was over."""
        return bool(self.rounds) and bool(self.rounds[-1].get("stopped"))

    @property
    def refused(self) -> dict[str, str]:
        """Site → fixed reason code of its last refusal."""
        return {site: code for row in self.rounds for site, code in row["refused"].items()}

    @property
    def evaluation_refused(self) -> dict[str, str]:
        """Site → fixed reason code that it answered to the question about the model after a training."""
        return dict(self.evaluation_round["refused"]) if self.evaluation_round else {}

    @property
    def best_evaluation_refused(self) -> dict[str, str]:
        """Site → fixed reason code that it answered to the question about the best model."""
        return dict(self.best_evaluation_round["refused"]) if self.best_evaluation_round else {}

    @property
    def given_up(self) -> str:
        """Why the run ended before its last round, in the server's words; empty if it did not."""
        return str(self.rounds[-1].get("given_up", "")) if self.rounds else ""

    def outcomes(self, deployment: Sequence[Any] = ()) -> dict[str, SiteOutcome]:
        """Return site → how it fared, see :func:`~histoflare.report.outcomes.find_outcomes`."""
        return find_outcomes(self.rounds, self.evaluation_round, deployment, self.best_evaluation_round)


@dataclass(frozen=True)
class FederationRun:
    """What came out of a job on one workstation.

    Attributes:
        training: Of the job, with what its sites said of the last model if they were asked.
        site_states: Site → what the strategy keeps there.
    """

    training: FederationResult
    site_states: dict[str, State]


def read_result(folder: Path) -> FederationResult:
    """Read a server's run folder (``workspace`` in a download). What is not there is empty."""
    model = folder / GLOBAL_MODEL_FILE
    rows, evaluation_round = read_rows(folder)
    return FederationResult(
        state=handed_out(load_file(model)) if model.is_file() else None,
        rounds=rows,
        evaluation=read_if_there(folder / EVALUATION_FILE) or {},
        pseudonyms=read_if_there(folder / SITES_FILE) or {},
        evaluation_round=evaluation_round,
        best_evaluation_round=read_best_row(folder),
        evaluation_total=read_if_there(folder / EVALUATION_TOTAL_FILE),
    )


def evaluation_noise_of(
    job: Job, total: Mapping[str, Any] | None, question: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Return what a job's evaluation cost, and its figures of all sites; None where no noise is in them.

    What was sent to a sum that did not open is paid for as well.

    Args:
        job: The job.
        total, question: ``evaluation_total`` and ``evaluation_round`` of a :class:`FederationResult`.
    """
    if job.tally is None:
        return None
    row = question or {}
    asked = max(job.most_evaluations, len(row.get("voids") or ()) + (total is not None))
    spend = job.tally.spend().times(asked).to_json()
    stamps = (row.get("stamps") or {}).values()
    trusts_ca = any(stamp.get("trusts_ca", False) for stamp in stamps)
    return state_evaluation(job.tally.to_json(), spend, total, trusts_ca=trusts_ca)


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's rounds so far; none before its first."""
    return read_rows(folder)[0]


def count_finished(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return how many rounds were brought to their end."""
    return sum(bool(row.get("finished", True)) for row in rows)


def find_protocol(model: Path, sha256: str) -> dict[str, Any] | None:
    """Return the protocol that a model was trained under, if its job lies beside it, as in a download.

    Args:
        model: Its file. sha256: The protocol's hash, as the model's header has it; no other one is returned.
    """
    workspace = model.parent
    places = [
        workspace / SERVER_APP,
        workspace / CONFIG_FOLDER.parent,
        workspace.parent / "job" / CONFIG_FOLDER.parent,
    ]
    for place in places:
        with suppress(HistoflareError, OSError):
            path = place / CONFIG_FOLDER.name / PROTOCOL_FILE
            with path.open("rb") as file:
                protocol = complete(read_toml(str(path), file.read(MOST_BYTES + 1)))
            if hash_protocol(protocol) == sha256:
                return protocol
    return None


def load_site_states(sites: Mapping[str, SiteConfiguration], run: str) -> dict[str, State]:
    """Return what the strategy kept at each site of one machine.

    Raises:
        JobError: A site's notes are damaged (RECORDS_INVALID).
    """
    return {site: RunRecords(where.records, run, site).load_state() for site, where in sites.items()}


def read_mean_loss(sites: Mapping[str, SiteConfiguration], run: str) -> float | None:
    """Return the mean of the training losses that sites of one machine noted last; None before the first."""
    noted = [RunRecords(where.records, run, site).read_loss() for site, where in sites.items()]
    known = [loss for loss in noted if loss is not None]
    return sum(known) / len(known) if known else None

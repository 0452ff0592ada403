"""What a job left in the server's run folder: the simulator's, a download's, a resumed run's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from histoflare.flare.record import EVALUATION_FILE, ROUNDS_FILE, SITES_FILE
from histoflare.model_file import GLOBAL_MODEL_FILE
from histoflare.rounds.state import State
from histoflare.rounds.strategy import split
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.records import RunRecords


@dataclass(frozen=True)
class FederationResult:
    """What came out of a job.

    Attributes:
        state: The last global model; None if no round was finished.
        rounds: One row per round, see ``flare.record.RoundRecord.to_json``.
        evaluation: Site → metrics, where the job was an evaluation.
        pseudonyms: Site → the name under which others may see it, of those that have one.
    """

    state: State | None
    rounds: list[dict[str, Any]]
    evaluation: dict[str, dict[str, float | None]]
    pseudonyms: dict[str, str]

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


@dataclass(frozen=True)
class FederationRun:
    """What came out of a job, and of the question about its model.

    Attributes:
        training: Of the job. evaluation: What each site said of the last model; None if it was not asked.
        site_states: Site → what the strategy keeps there.
    """

    training: FederationResult
    evaluation: FederationResult | None
    site_states: dict[str, State]


def read_result(folder: Path) -> FederationResult:
    """Read a server's run folder (``workspace`` in a download). What is not there is empty."""
    model = folder / GLOBAL_MODEL_FILE
    return FederationResult(
        state=split(load_file(model))[0] if model.is_file() else None,
        rounds=read_rounds(folder),
        evaluation=_read(folder / EVALUATION_FILE) or {},
        pseudonyms=_read(folder / SITES_FILE) or {},
    )


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's rounds so far; none before its first."""
    rows: list[dict[str, Any]] = _read(folder / ROUNDS_FILE) or []
    return rows


def count_finished(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return how many rounds were brought to their end."""
    return sum(bool(row.get("finished", True)) for row in rows)


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


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None

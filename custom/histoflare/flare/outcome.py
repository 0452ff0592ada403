"""How each site fared in a job, in codes for a console's status and in sentences for a lead.

From the server's record of the rounds (``flare.record``) and what FLARE noted of the deployment. It imports
no torch: FLARE's server process, which stays small, puts the codes into a job's status.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from histoflare.errors import REASONS
from histoflare.flare.record import BEST_EVALUATION_ROUND_FILE, EVALUATION_ROUND_FILE, ROUNDS_FILE
from histoflare.report.reasons import advise, explain

LONGEST_CODES = 200
"""Characters of the codes in a job's status; with more, sites are counted and not named."""


@dataclass
class SiteOutcome:
    """How one site fared.

    Attributes:
        asked: In how many rounds it was asked. took_part: In how many its update was combined.
        refused: Fixed reason code → rounds (from 1) in which it answered that instead of an update.
        silent: Rounds in which it had not answered when they, or the job, ended.
        deployed: What it said when the job was deployed to it, if it did not take it: a fixed reason code, or
            "" where there was no answer. None: it took it.
        evaluated: What it answered when it was asked about the model: "" figures, else a fixed reason code;
            None: nothing, or it was not asked.
        evaluated_best: As ``evaluated``, of the best model.
        unheard: Whether it gave no answer to the question about the last or the best model.
    """

    asked: int = 0
    took_part: int = 0
    refused: dict[str, list[int]] = field(default_factory=dict)
    silent: list[int] = field(default_factory=list)
    deployed: str | None = None
    evaluated: str | None = None
    evaluated_best: str | None = None
    unheard: bool = False

    @property
    def codes(self) -> list[str]:
        """Every fixed reason code that it gave."""
        said = [self.deployed or "", *self.refused, self.evaluated or "", self.evaluated_best or ""]
        return list(dict.fromkeys(code for code in said if code))


def read_rows(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return the rows of a run folder's rounds, and that of the question about the model, if there is one."""
    rows: list[dict[str, Any]] = _read(folder / ROUNDS_FILE) or []
    return rows, _read(folder / EVALUATION_ROUND_FILE)


def read_best_row(folder: Path) -> dict[str, Any] | None:
    """Return the row of the question about the best model, if there is one."""
    row: dict[str, Any] | None = _read(folder / BEST_EVALUATION_ROUND_FILE)
    return row


def find_outcomes(
    rows: Iterable[Mapping[str, Any]],
    evaluation: Mapping[str, Any] | None = None,
    deployment: Sequence[Any] = (),
    best: Mapping[str, Any] | None = None,
) -> dict[str, SiteOutcome]:
    """Return site → how it fared, in the order of the sites' names.

    Args:
        rows: Of the rounds (``flare.record.RoundRecord.to_json``).
        evaluation: The row of the question about the model at the end; None if there was none.
        deployment: FLARE's ``job_deploy_detail``: texts such as ``"clinic-a: OK"``.
        best: As ``evaluation``, of the best model.
    """
    found: dict[str, SiteOutcome] = {}
    for site, answer in _read_deployment(deployment):
        if answer != "OK":
            found.setdefault(site, SiteOutcome()).deployed = answer if answer in REASONS else ""
    for row in rows:
        number = row["round"] + 1
        for site in row.get("asked", ()):
            found.setdefault(site, SiteOutcome()).asked += 1
        for site in row.get("taking_part", ()):
            found.setdefault(site, SiteOutcome()).took_part += 1
        for site, code in row.get("refused", {}).items():
            found.setdefault(site, SiteOutcome()).refused.setdefault(code, []).append(number)
        for site in row.get("no_answer", ()):
            found.setdefault(site, SiteOutcome()).silent.append(number)
    for name, question in (("evaluated", evaluation), ("evaluated_best", best)):
        if question is None:
            continue
        answers = dict.fromkeys(question["taking_part"], "") | question["refused"]
        for site, answer in answers.items():
            setattr(found.setdefault(site, SiteOutcome()), name, answer)
        for site in question.get("no_answer", ()):
            if site not in answers:
                found.setdefault(site, SiteOutcome()).unheard = True
    return dict(sorted(found.items()))


def say_codes(outcomes: Mapping[str, SiteOutcome], given_up: str = "", *, completed: bool = False) -> str:
    """Return the codes of a job for its status in a console; empty if there is nothing to say.

    Such as ``KIT_CHANGED: clinic-a; TRAINER_DIED: clinic-b, clinic-c``; without any code what ended the run.

    Args:
        given_up: Why the run ended before its last round, in the server's words.
        completed: Whether the job did what it was to do. That a site only evaluates is no fault of it then.
    """
    sites: dict[str, list[str]] = {}
    for site, outcome in outcomes.items():
        for code in outcome.codes:
            if not (completed and code == "EVALUATION_ONLY"):
                sites.setdefault(code, []).append(site)
    named = "; ".join(f"{code}: {', '.join(names)}" for code, names in sorted(sites.items()))
    if len(named) > LONGEST_CODES:
        named = "; ".join(f"{code}: {len(names)} sites" for code, names in sorted(sites.items()))
    return (named or given_up)[:LONGEST_CODES]


def say_sites(outcomes: Mapping[str, SiteOutcome], rounds: int | None = None) -> list[str]:
    """Return a sentence for each site: in how many rounds it took part, and why it did not in the others.

    Args:
        rounds: Of the job; None: as many as the site was asked in.
    """
    return [f"{site}: {_say(outcome, rounds)}" for site, outcome in outcomes.items()]


def say_advice(outcomes: Mapping[str, SiteOutcome]) -> list[str]:
    """Return what the lead can do about the codes that the sites gave, each advice once."""
    codes = dict.fromkeys(code for outcome in outcomes.values() for code in outcome.codes)
    advices = dict.fromkeys(f"{code}: {advice}" for code in sorted(codes) if (advice := advise(code)))
    return list(advices)


def _say(outcome: SiteOutcome, rounds: int | None) -> str:
    if outcome.deployed is not None:
        return f"did not take the job: {_say_code(outcome.deployed)}"
    total = rounds if rounds is not None else outcome.asked
    parts = []
    if outcome.took_part or (outcome.asked and not outcome.refused):
        parts.append(f"took part in {outcome.took_part} of {total} rounds.")
    for code, numbers in outcome.refused.items():
        where = (
            "" if len(numbers) >= outcome.asked and not outcome.took_part else f" in {_say_rounds(numbers)}"
        )
        parts.append(f"{code}{where}: {explain(code)}")
    if outcome.silent:
        parts.append(
            f"No answer in {_say_rounds(outcome.silent)}: it was not there, or the round ended before."
        )
    if outcome.evaluated is not None:
        parts.append(_say_evaluated(outcome))
    if outcome.evaluated_best and outcome.evaluated_best != outcome.evaluated:
        parts.append(f"It did not evaluate the best model: {_say_code(outcome.evaluated_best)}")
    if outcome.unheard:
        which = "model" if outcome.evaluated is None else "best model"
        parts.append(f"No answer to the question about the {which}: it was not there, or too late.")
    return " ".join(parts)


def _say_evaluated(outcome: SiteOutcome) -> str:
    if not outcome.evaluated:
        return "It evaluated the model."
    if outcome.evaluated in outcome.refused:
        return "For the same reason it did not evaluate the model."
    return f"It did not evaluate the model: {_say_code(outcome.evaluated)}"


def _say_code(code: str) -> str:
    return f"{code}: {explain(code)}" if code else "it gave no answer."


def _say_rounds(numbers: Sequence[int]) -> str:
    """Return rounds in words: "round 3", "rounds 1 to 4", "rounds 2, 5 and 7"."""
    if len(numbers) == 1:
        return f"round {numbers[0]}"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"rounds {numbers[0]} to {numbers[-1]}"
    if len(numbers) > 6:
        return f"{len(numbers)} rounds"
    return f"rounds {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _read_deployment(deployment: Sequence[Any]) -> Iterable[tuple[str, str]]:
    """Yield site and answer of FLARE's notes; the server's own, and notes that name no site, are left out."""
    for note in deployment:
        site, colon, answer = str(note).partition(": ")
        if colon and " " not in site and site not in ("server", "invalid_clients"):
            yield site, answer.strip()


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None

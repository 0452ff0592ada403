"""How each site fared in a job, in codes for a console's status and in sentences for a lead.

From the server's record of the rounds (``flare.record``) and what FLARE noted of the deployment. It imports
no torch: FLARE's server process, which stays small, puts the codes into a job's status.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from histoflare.reasons import REASONS
from histoflare.report.participation import SiteRounds, name_rounds, say_refused, site_rounds

LONGEST_CODES = 200
"""Characters of the codes in a job's status; with more, sites are counted and not named."""


@dataclass
class SiteOutcome:
    """How one site fared.

    Attributes:
        rounds: What it did in each round.
        deployed: What it said when the job was deployed to it, if it did not take it: a fixed reason code, or
            "" where there was no answer. None: it took it.
        evaluated: What it answered when it was asked about the model: "" figures, else a fixed reason code;
            None: nothing, or it was not asked.
        evaluated_best: As ``evaluated``, of the best model.
        unheard: Whether it gave no answer to the question about the last or the best model.
    """

    rounds: SiteRounds
    deployed: str | None = None
    evaluated: str | None = None
    evaluated_best: str | None = None
    unheard: bool = False

    @property
    def codes(self) -> list[str]:
        """Every fixed reason code that it gave."""
        said = [self.deployed or "", *self.rounds.refusals, self.evaluated or "", self.evaluated_best or ""]
        return list(dict.fromkeys(code for code in said if code))


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
    answers = dict(_read_deployment(deployment))
    questions = {"evaluated": evaluation or {}, "evaluated_best": best or {}}
    names = {site for site, answer in answers.items() if answer != "OK"}
    for question in questions.values():
        for answered in ("taking_part", "refused", "no_answer"):
            names |= set(question.get(answered, ()))
    rounds = site_rounds({"sites": sorted(names), "participation": list(rows)})
    found = {each.site: SiteOutcome(each) for each in rounds}
    for site, answer in answers.items():
        if answer != "OK":
            found[site].deployed = answer if answer in REASONS else ""
    for name, question in questions.items():
        heard = dict.fromkeys(question.get("taking_part", ()), "") | question.get("refused", {})
        for site, answer in heard.items():
            setattr(found[site], name, answer)
        for site in question.get("no_answer", ()):
            found[site].unheard = found[site].unheard or site not in heard
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


def list_codes(outcomes: Mapping[str, SiteOutcome]) -> list[str]:
    """Return every code that a site gave, each once."""
    return sorted({code for outcome in outcomes.values() for code in outcome.codes})


def _say(outcome: SiteOutcome, rounds: int | None) -> str:
    if outcome.deployed is not None:
        return f"did not take the job: {_say_code(outcome.deployed)}"
    did = outcome.rounds
    parts = []
    if did.taken or (did.asked and not did.refusals):
        parts.append(f"took part in {did.taken} of {did.asked if rounds is None else rounds} rounds.")
    for code, numbers in did.refusals.items():
        always = len(numbers) >= did.asked and not did.taken
        parts.append(say_refused(code, () if always else numbers))
    if did.silent:
        parts.append(f"No answer in {name_rounds(did.silent)}: it was not there, or the round ended before.")
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
    if outcome.evaluated in outcome.rounds.refusals:
        return "For the same reason it did not evaluate the model."
    return f"It did not evaluate the model: {_say_code(outcome.evaluated)}"


def _say_code(code: str) -> str:
    return say_refused(code) if code else "it gave no answer."


def _read_deployment(deployment: Sequence[Any]) -> Iterable[tuple[str, str]]:
    """Yield site and answer of FLARE's notes; the server's own, and notes that name no site, are left out."""
    for note in deployment:
        site, colon, answer = str(note).partition(": ")
        if colon and " " not in site and site not in ("server", "invalid_clients"):
            yield site, answer.strip()

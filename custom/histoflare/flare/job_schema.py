"""What ``job.toml`` and ``protocol.toml`` may say outside their parts: a schema of words and numbers.

It imports neither torch nor a task: FLARE's client process looks at every job that is deployed, and stays
small. What stands in the tables of task, strategy, transport and privacy is looked at where they are made
(``flare.job``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from histoflare.checks import is_whole
from histoflare.errors import JobError, list_lines
from histoflare.flare.job_files import FORMAT, JOB_FILE, PROTOCOL_FILE
from histoflare.privacy.protocol import canonical_protocol
from histoflare.site.run_name import is_run_name

TRAINING, EVALUATION = "training", "evaluation"
"""The kinds of job: a model is trained in rounds, or every site is asked once what it thinks of one."""

HELLO, TRAIN, EVALUATE = "hello", "train", "evaluate"
"""FLARE's tasks: what the sites are asked for. TASK_OF: in the rounds of a job of either kind.

``hello`` comes before ``train`` where the server sees only the sum of the updates: the sites' fresh keys."""
TASK_OF = {TRAINING: TRAIN, EVALUATION: EVALUATE}

COHORT = "cohort"
"""The task that asks no model: an evaluation of that name brings none."""

AGREED = ("labels", "target", "encoder", "network", "mpp", "patch_px", "window_px", "max_patches")
"""Fields of a task that the protocol decides."""

OPTIONAL = ("mpp", "patch_px")
"""Fields of a protocol that may be left out: any will do then. So may ``max_patches``, for bags."""

RAW = "none"
"""Mechanism of an evaluation whose figures are told as they are, without noise and beside every budget."""

MOST_SITES = 10_000
MOST_ROUNDS = 1_000_000
LONGEST_ROUND_S = 30 * 86400
LONGEST_ANSWER_S = 86400
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
TABLES = {
    **{"task": "name", "strategy": "name", "transport": "name"},
    **{"privacy": "mechanism", "evaluation": "mechanism"},
}
"""Table of a job → which of its fields names the part."""


def check_tables(job: Mapping[str, Any], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Look at what two read files say, the fields of the parts apart; return the whole protocol.

    Raises:
        JobError: Something is missing, unknown or out of range (JOB_INVALID, PROTOCOL_INVALID).
    """
    problems = [f"{name}: not a variable of a job" for name in job if name not in (*_FIELDS, *TABLES)]
    problems += [f"{name}: missing" for name in _NEEDED if name not in job]
    problems += [
        f"{name}: {wanted}, not {job[name]!r}"
        for name, (fits, wanted) in _FIELDS.items()
        if name in job and not fits(job[name])
    ]
    problems += [
        f"[{table}]: a table with a {word}"
        for table, word in TABLES.items()
        if table in job and not (isinstance(job[table], Mapping) and _is_word(job[table].get(word)))
    ]
    if not problems and job["kind"] == EVALUATION:
        problems = [f"{name}: not of an evaluation" for name in _OF_TRAINING if name in job]
    if not problems and "evaluation" in job and job["kind"] == TRAINING and job.get("evaluate") is not True:
        problems = ["[evaluation]: goes with evaluate = true; nobody would be asked for anything"]
    if not problems and job.get("evaluation_only") and job.get("evaluate") is not True:
        problems = ["evaluation_only: goes with evaluate = true; these sites would be asked for nothing"]
    agreed = complete(protocol)
    if not problems and job["kind"] == TRAINING and job.get("start_round", 0) >= agreed["stop"]["rounds"]:
        problems = [f"start_round: below the protocol's rounds, not {job['start_round']}"]
    if not problems and _is_protected(job) and "answer_seconds" not in job:
        problems = ["answer_seconds: missing; what is protected is answered at a public time"]
    if not problems and "privacy" in job and "patience" in agreed["stop"]:
        problems = [
            "privacy: not with stop.patience in protocol.toml; a figure of every round is a release that "
            "nobody books"
        ]
    if not problems and job["round_seconds"] <= 2 * job.get("answer_seconds", 0):
        # In its first round a site reads its data for one such time, and trains for the next.
        problems = [
            f"round_seconds: more than twice answer_seconds ({job['answer_seconds']}), "
            f"not {job['round_seconds']}; no update would come in time"
        ]
    if problems:
        raise invalid(problems)
    return agreed


def _is_protected(job: Mapping[str, Any]) -> bool:
    """Return whether something of a job is booked: its rounds, or its evaluation."""
    return "privacy" in job or ("evaluation" in job and job["evaluation"]["mechanism"] != RAW)


def complete(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return a protocol as ``protocol.toml`` has it, with None for what it leaves open.

    Raises:
        JobError: It is not a protocol (PROTOCOL_INVALID).
    """
    optional = (*OPTIONAL, "max_patches") if "encoder" in protocol else OPTIONAL
    whole = {**dict.fromkeys(optional), **protocol}
    canonical_protocol(whole)
    stop = whole["stop"]
    rounds = stop.get("rounds") if isinstance(stop, Mapping) else None
    if not is_whole(rounds, 1, MOST_ROUNDS):
        raise JobError(
            f"{PROTOCOL_FILE}: stop.rounds: a whole number from 1 to {MOST_ROUNDS}, not {rounds!r}.",
            reason="PROTOCOL_INVALID",
        )
    unknown = sorted(set(stop) - {"rounds", "model", "patience"})
    patience = stop.get("patience", 1)
    if unknown or not is_whole(patience, 1, MOST_ROUNDS):
        what = f"no {', '.join(map(str, unknown))}" if unknown else f"not {patience!r}"
        raise JobError(
            f"{PROTOCOL_FILE}: stop: rounds, model and patience, a whole number from 1 to {MOST_ROUNDS}; "
            f"{what}.",
            reason="PROTOCOL_INVALID",
        )
    return whole


def invalid(problems: list[str]) -> JobError:
    """Return the error of a job with these faults."""
    return JobError(
        f"This job cannot be used; correct in {JOB_FILE}:{list_lines(problems)}", reason="JOB_INVALID"
    )


def _whole(least: int, most: int) -> tuple[Callable[[Any], bool], str]:
    return (
        lambda value: is_whole(value, least, most),
        f"a whole number from {least} to {most}",
    )


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and len(value) <= 100


def _are_names(value: Any) -> bool:
    """Return whether a value is a list of names that sites can have (``flare.kits.SITE_NAME``)."""
    return (
        isinstance(value, list)
        and len(value) <= MOST_SITES
        and all(isinstance(name, str) and _SITE_NAME.fullmatch(name) for name in value)
        and len(set(value)) == len(value)
    )


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": _whole(FORMAT, FORMAT),
    "kind": (lambda value: value in (TRAINING, EVALUATION), f"{TRAINING} or {EVALUATION}"),
    "purpose": (_is_word, "a short text"),
    "least_sites": _whole(1, MOST_SITES),
    "round_seconds": _whole(1, LONGEST_ROUND_S),
    "spare_rounds": _whole(0, MOST_ROUNDS),
    "answer_seconds": _whole(1, LONGEST_ANSWER_S),
    "seed": _whole(0, 2**53),
    "best_metric": (_is_word, "the name of a metric"),
    "run": (is_run_name, "the name of a run: 1 to 64 of A-Z, a-z, 0-9, '_', '.' and '-'"),
    "start_round": _whole(0, MOST_ROUNDS),
    "evaluate": (lambda value: type(value) is bool, "true or false"),
    "evaluation_only": (_are_names, "a list of names of sites, each once"),
}
"""Variable outside the tables → whether a value will do, and what will do in words."""

_NEEDED = ("format", "kind", "purpose", "least_sites", "round_seconds", "seed", "task", "strategy")
_OF_TRAINING = (
    *("best_metric", "start_round", "transport", "privacy", "evaluate", "evaluation_only"),
    "spare_rounds",
)

VARIABLES = (*_FIELDS, *TABLES, "rounds", "protocol")
"""First parts of the names that a variant of a job may change."""

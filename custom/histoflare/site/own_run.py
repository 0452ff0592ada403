"""A run as the site itself recorded it, in its notes, ledger and log, without the lead's report."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from histoflare.errors import HistoflareError, JobError
from histoflare.privacy.budget import Budget
from histoflare.privacy.ledger import Event, Ledger, RunHistory
from histoflare.privacy.ledger.rules import TRAIN
from histoflare.privacy.own_policy_file import POLICY_FILE, read_site_policy
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan, UpdateNoise
from histoflare.privacy.spend import Spend
from histoflare.report.own_run import LeftRow, OwnRun, RefusedRow, Spent
from histoflare.report.report_file import fill_missing
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.ledgers import audit_log_of, open_ledger
from histoflare.site.records import LOSS_FILE, RUN_FILE
from histoflare.site.run_name import is_run_name
from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule

PACE_FILE = "pace.json"
FALLBACK_EPSILON, FALLBACK_DELTA = 8.0, 1e-5
"""Where neither the notes nor a policy say δ; the ε decides nothing that is shown."""
PLANS: Mapping[str, type[Any]] = {
    "dp-sgd": DpSgd,
    "dp-sgd-shared": DpSgd,
    "update-noise": UpdateNoise,
    "update-noise-shared": UpdateNoise,
    "server-noise": UpdateNoise,
}
"""Mechanism → the plan that has it."""


@dataclass(frozen=True)
class Notes:
    """The content of a run's ``run.json``; None or a default for what is missing in it.

    Attributes:
        task, strategy: Their settings. plan: What protects the updates.
        split: The protocol's rule for a manifest without a split column.
        predicted: Slide or image → its row in the newest evaluation's notes.
    """

    task: dict[str, Any] | None
    strategy: dict[str, Any]
    plan: PrivacyPlan
    split: SplitRule
    predicted: Mapping[str, Mapping[str, str]]


def list_runs(configuration: SiteConfiguration) -> list[str]:
    """Return the runs that a site's log and ledger have, those in which something was done before the newest.

    The last one is that in which the site last let something out; a run that was only refused comes before.
    """
    done: dict[str, None] = {}
    refused: dict[str, None] = {}
    for event in audit_log_of(configuration).read():
        run = event.get("run")
        if isinstance(run, str) and is_run_name(run):
            names = refused if event.get("what") == "refused" else done
            names.pop(run, None)
            names[run] = None
    folders = [path.name for path in configuration.records.glob("*") if (path / RUN_FILE).is_file()]
    found = dict.fromkeys([name for name in sorted(folders) if name not in done])
    return list({**{name: None for name in refused if name not in done}, **found, **done})


def choose_run(configuration: SiteConfiguration, run: str | None) -> str:
    """Return a run that there is.

    Args:
        run: Its name; None takes the newest.

    Raises:
        JobError: There is no such run, or none at all (RUN_INVALID).
    """
    known = list_runs(configuration)
    if run is not None and run not in known:
        raise JobError(
            f"{run}: no run of this site; there are: {', '.join(known) or 'none'}.", reason="RUN_INVALID"
        )
    if not known:
        raise JobError(
            "This site's records, ledger and log have no run: it has taken part in no job yet.",
            reason="RUN_INVALID",
        )
    return known[-1] if run is None else run


def read_notes(configuration: SiteConfiguration, run: str) -> Notes:
    """Return what the site wrote down of a run.

    Raises:
        JobError: It is damaged (RECORDS_INVALID).
    """
    folder = configuration.records / run
    content: dict[str, Any] = _read_json(folder / RUN_FILE) or {}
    try:
        split = content.get("split")
        return Notes(
            task=content.get("task"),
            strategy=dict(content.get("strategy") or {}),
            plan=_plan_of(content.get("plan")),
            split=DEFAULT_SPLIT if split is None else SplitRule(**split),
            predicted=_read_predictions(folder),
        )
    except (TypeError, ValueError, KeyError, AttributeError, HistoflareError) as error:
        raise JobError(f"{folder / RUN_FILE}: cannot be used ({error}).", reason="RECORDS_INVALID") from None


def read_own_run(configuration: SiteConfiguration, run: str, local: Path, notes: Notes) -> OwnRun:
    """Return a run as the site itself knows it.

    Args:
        local: Folder with the site's policies, for the budget. notes: Of the run.

    Raises:
        LedgerError: The site names no ledger, or its ledger cannot be read.
    """
    ledger = open_ledger(configuration)
    history = ledger.history(run)
    reserved = [account.reservation.rounds for account in history.accounts]
    folder = configuration.records / run
    loss = _read_json(folder / LOSS_FILE) or {}
    return OwnRun(
        run=run,
        rounds=max(reserved, default=loss.get("rounds")),
        left=[_left_row(event) for event in history.events],
        refused=_refused(configuration, run),
        spent=_spent(ledger, history, local, notes.plan),
        curves=_read_curves(folder / "tensorboard"),
        longer_seconds=_read_json(folder / PACE_FILE) or {},
        evaluated=len(notes.predicted),
        others=[name for name in list_runs(configuration) if name != run],
    )


def own_report(own: OwnRun, notes: Notes, data: str) -> dict[str, Any]:
    """Return a site's own report, of the schema of ``report.report_file``: what it knows without a lead."""
    task = notes.task or {}
    report = {
        "job": own.run,
        "runtime": "federation",
        "strategy": notes.strategy,
        "task": task,
        "data": data,
        "encoder": task.get("encoder", task.get("network")),
        "seed": task.get("seed", 0),
        "rounds": own.rounds or 0,
        "privacy": "" if notes.task is None else notes.plan.describe(),
        "participation": [],
        "guarantee": {"mechanism": notes.plan.mechanism},
    }
    return fill_missing(report)


def _left_row(event: Event) -> LeftRow:
    return LeftRow(
        when=datetime.fromtimestamp(event.unix_time, UTC),
        what=event.what,
        round_number=None if event.round_index is None else event.round_index + 1,
        patients=event.patients,
        protected=event.is_protected,
        figures=event.figures,
    )


def _refused(configuration: SiteConfiguration, run: str) -> list[RefusedRow]:
    """Return what the site's log says of refusals in a run, by code."""
    found: dict[str, RefusedRow] = {}
    for event in audit_log_of(configuration).read():
        if event.get("what") != "refused" or run not in (event.get("run"), event.get("job")):
            continue
        code, at = str(event.get("reason")), datetime.fromisoformat(str(event["time"]))
        before = found.get(code)
        if before is None:
            found[code] = RefusedRow(code, str(event.get("detail", "")), 1, at, at, str(event.get("do", "")))
        else:
            found[code] = replace(before, times=before.times + 1, last=at)
    return list(found.values())


def _spent(ledger: Ledger, history: RunHistory, local: Path, plan: PrivacyPlan) -> Spent | None:
    """Return what the run cost a patient; with the policy of its scope also what there is of the budget.

    Whom it trained on and whom it asked about are other people: of the two the more exposed are shown.
    """
    if not history.accounts:
        return None
    from histoflare.privacy.accountant import epsilon

    reservations = [account.reservation for account in history.accounts]
    scope = reservations[-1].about.partition(":")[0]
    try:
        protection = read_site_policy(local / POLICY_FILE.format(scope), local).protection
    except HistoflareError:
        protection = None  # the run's own figures are there all the same
    delta = FALLBACK_DELTA if plan.delta is None else plan.delta
    budget = Budget(FALLBACK_EPSILON, delta) if protection is None else protection.budget()
    first, second = (
        {
            role: [each for account in accounts for each in account.charged(kept)]
            for role, accounts in history.by_role.items()
        }
        for kept in budget.filters()
    )

    def figure(events: Sequence[Spend], kept: Budget) -> float:
        """Return the ledger's figure; where no policy names a budget, that of RDP at its best order."""
        return epsilon(events, budget.delta) if protection is None else kept.spent(events)

    cost = {role: figure(events, budget) for role, events in first.items()}
    most = max(cost, key=lambda role: (cost[role], role == TRAIN))
    found = Spent(
        epsilon=cost[most],
        delta=budget.delta,
        booked=sum(each.booked for each in history.by_role[most]),
        reserved=sum(each.reservation.rounds for each in history.by_role[most]),
        trusts_server=any(each.trusts_server for each in reservations),
        repeatable=any("repeatable" in each.about for each in reservations),
        trusts_ca=any(each.trusts_ca for each in reservations),
    )
    if any(each.spend.honest > 1 for each in reservations):
        alone = max(figure(events, budget.if_all_collude) for events in second.values())
        found = replace(found, colluders=budget.colluders, if_all_collude=alone)
    if protection is None:
        return found
    summary = ledger.summary(budget)
    return replace(
        found,
        in_all=summary.epsilon,
        budget=protection.epsilon,
        in_all_if_all_collude=None if summary.if_all_collude is None else summary.if_all_collude.epsilon,
        budget_if_all_collude=budget.if_all_collude.epsilon,
    )


def _plan_of(content: Mapping[str, Any] | None) -> PrivacyPlan:
    if content is None:
        return Open()
    numbers = {name: value for name, value in content.items() if name != "mechanism"}
    plan: PrivacyPlan = PLANS[content["mechanism"]](**numbers)
    return plan


def _read_predictions(folder: Path) -> dict[str, dict[str, str]]:
    """Return slide or image → its row in the notes of the newest evaluation."""
    files = sorted(folder.glob("evaluation_*.csv"), key=lambda path: path.stat().st_mtime)
    if not files:
        return {}
    with files[-1].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {row.get("slide") or row["image"]: row for row in rows}


def _read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the curves in a TensorBoard folder: name → (round from 0, value)."""
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    found = {}
    for name in board.Tags()["scalars"]:
        latest = {event.step: float(event.value) for event in board.Scalars(name)}  # run again: the later one
        found[name] = [(step, value) for step, value in sorted(latest.items()) if math.isfinite(value)]
    return {name: points for name, points in found.items() if points}


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file of the site's notes; None if there is none.

    Raises:
        JobError: It is damaged (RECORDS_INVALID).
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        pass
    raise JobError(f"{path}: damaged; this site's notes cannot be read.", reason="RECORDS_INVALID")

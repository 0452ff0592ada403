"""The in-process runtime: a federation in one process, for experiments of hundreds of rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from histoflare.errors import HistoflareError, JobError
from histoflare.privacy.plan import Open, PrivacyPlan
from histoflare.rounds.patience import Patience, validate
from histoflare.rounds.round import server_round, site_round
from histoflare.rounds.sealing import check_honest, sealed
from histoflare.rounds.state import State, model_state, n_bytes
from histoflare.rounds.strategy import SiteOutcome, Strategy, join
from histoflare.rounds.task import Task
from histoflare.rounds.transport import Transport, check_readable
from histoflare.rounds.transports.float32 import PLAIN

OnRound = Callable[[int, int, float, Mapping[str, float]], None]
"""Called after each round: (index, total, seconds, site → mean training loss)."""

OnModel = Callable[[int, State, Mapping[str, State]], None]
"""Called after each round: (index, what a run that ended here would hand out, site → what is kept there)."""


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        initial, state: First and last global model.
        handed_out: What the run hands out, the last model or an ensemble (``Strategy.handed_out``).
        own: What the strategy keeps at the server after the last round.
        site_states: Site → what the strategy keeps there (personal layers, control variates).
        participation: For each round run, who trained.
        refused: For each round run, site → why it sent no update.
        notes: For each round run, what the strategy says of it (``strategy.ServerOutcome.notes``).
        losses: For each round run, site → mean training loss.
        seconds: Of each round run.
        patience: As it was given, with what it heard.
        bytes_up, bytes_down: Of the updates sent to aggregators and of the states sent by them, tensors only.
    """

    initial: State
    state: State
    handed_out: State
    own: State
    site_states: dict[str, State]
    participation: tuple[tuple[str, ...], ...]
    refused: tuple[dict[str, HistoflareError], ...]
    notes: tuple[dict[str, Any], ...]
    losses: tuple[dict[str, float], ...]
    seconds: tuple[float, ...]
    bytes_up: int
    bytes_down: int
    patience: Patience | None = None


def run_in_process(
    task: Task,
    sites: Mapping[str, Any],
    strategy: Strategy,
    rounds: int,
    seed: int,
    plan: PrivacyPlan | None = None,
    on_round: OnRound | None = None,
    *,
    on_model: OnModel | None = None,
    transport: Transport = PLAIN,
    device: str = "cpu",
    start_round: int = 0,
    initial_state: State | None = None,
    initial_own: State | None = None,
    site_states: Mapping[str, State] | None = None,
    patience: Patience | None = None,
    least: int = 1,
) -> RunResult:
    """Run rounds ``start_round`` … ``rounds`` - 1 of a federation, in the strategy's topology.

    The same arguments give the same bytes; a run resumed at ``start_round`` with the earlier run's ``state``,
    ``own`` and ``site_states`` ends as if it had never stopped. A site that fails costs its own update of
    that round, as in FLARE's processes. Under a secure sum it ends the run, for here nothing is tried again.

    Args:
        sites: Site → its data; their order is the federation's site order.
        plan: What protects the updates, settled; None is :class:`histoflare.privacy.plan.Open`: nothing.
        on_model: May ask each round's model something; its time is not counted in ``seconds``.
        transport: How updates travel. Under a secure sum the sites' keys are made on the spot.
        device: Where the sites train; only on the CPU do the same bytes come out.
        patience: Ends the run before its last round; it counts from this call on.
        least: With how many updates a round may end; with fewer the run ends (a cycle goes on).

    Raises:
        JobError: The sites, the rounds or an update cannot be used, or a round had too few updates; a secure
            sum of too few sites (SUM_TOO_FEW_KNOWN), or one from which a site is missing (SUM_VOID).
        HistoflareError: No site had one; the error is the first site's.

    >>> from pathlib import Path
    >>> from histoflare import MODELS, BagTask, FedAvg, load_cohort, read_manifest, run_in_process
    >>> model = MODELS["mem"](memories=2, dim=4, hidden=8)
    >>> task = BagTask(("glandular", "solid"), "densenet121-random:v1", model, patch_px=224)
    >>> cohorts = {}
    >>> for site in ("clinic-a", "clinic-b"):
    ...     manifest = read_manifest(Path(site, "manifest.csv"), check_files=False)
    ...     cohorts[site] = load_cohort(site, manifest, Path(site, "bags"), task.target, task.encoder)
    >>> run = run_in_process(task, cohorts, FedAvg(), rounds=2, seed=1)
    >>> run.participation
    (('clinic-a', 'clinic-b'), ('clinic-a', 'clinic-b'))
    """
    strategy = strategy.of_task(task)
    strategy.check_sites(list(sites))
    if not 0 <= start_round <= rounds:
        raise JobError(
            f"Round {start_round} of {rounds} cannot be the first: use 0 <= start_round <= rounds."
        )
    plan = plan or Open()
    check_readable(strategy, transport)
    initial = initial_state if initial_state is not None else model_state(task.build_model())
    state = initial
    own = initial_own if initial_own is not None else strategy.begin(initial)
    kept = {site: dict((site_states or {}).get(site, {})) for site in sites}
    participation, refused, losses, seconds, bytes_up, bytes_down = [], [], [], [], 0, 0
    notes: list[dict[str, Any]] = []
    topology = strategy.topology
    holder = topology.plan(
        start_round, list(sites), seed
    ).aggregator  # the first begins with what all can make
    for index in range(start_round, rounds):
        started = time.perf_counter()
        turn = topology.plan(index, list(sites), seed)
        if not transport.readable:
            check_honest(len(turn.trainers), plan)
        outcomes: dict[str, SiteOutcome] = {}
        failed: dict[str, HistoflareError] = {}
        figures: dict[str, float | None] = {}
        downlink = strategy.downlink(own)
        sent, asked = join(state, downlink), strategy.handed_out(state, downlink)
        for site in turn.trainers:
            try:
                if patience is not None:
                    figures[site] = validate(
                        task, strategy, asked, kept[site], sites[site], patience.metric, device
                    )
                outcomes[site] = site_round(
                    task,
                    strategy,
                    sent,
                    sites[site],
                    site=site,
                    site_state=kept[site],
                    round_index=index,
                    total_rounds=rounds,
                    seed=seed,
                    plan=plan,
                    transport=transport,
                    device=device,
                )
            except HistoflareError as error:
                failed[site] = error
        if not outcomes and not topology.skips_sites:
            raise failed[turn.trainers[0]]
        if not transport.readable:
            if failed:
                raise _void(index, failed)
            told = {"task": task.to_json(), "strategy": strategy.name, "transport": transport.name}
            updates = [outcome.update for outcome in outcomes.values()]
            for update in sealed(updates, plan, index, sent, told):
                outcomes[update.site] = replace(outcomes[update.site], update=update)
        if len(outcomes) < least and not topology.skips_sites:
            why = "".join(f"\n  {site}: {error}" for site, error in failed.items())
            raise JobError(
                f"round {index + 1}: {len(outcomes)} of at least {least} updates came{why}",
                reason="JOB_FAILED",
            )
        # what a site hands to itself is not sent; a new aggregator gets all that the strategy keeps
        bytes_down += n_bytes(sent) * sum(each not in (turn.aggregator, holder) for each in turn.receivers)
        bytes_down += n_bytes(join(state, own)) * (turn.aggregator != holder)
        bytes_up += sum(n_bytes(o.update.tensors) for site, o in outcomes.items() if site != turn.aggregator)
        holder = turn.aggregator
        notes.append({})
        if outcomes:
            made = server_round(
                strategy,
                state,
                [outcome.update for outcome in outcomes.values()],
                list(sites),
                plan,
                own=own,
                transport=transport,
                listed=turn.trainers,
                round_index=index,
                total_rounds=rounds,
                seed=seed,
            )
            state, own = made.model, made.own
            notes[-1] = made.notes()
        kept.update({site: outcome.site_state for site, outcome in outcomes.items()})
        participation.append(tuple(outcomes))
        refused.append(failed)
        losses.append({site: outcome.training.mean_loss for site, outcome in outcomes.items()})
        seconds.append(time.perf_counter() - started)
        if on_model is not None:
            on_model(index, strategy.handed_out(state, own), kept)
        if on_round is not None:
            on_round(index, rounds, seconds[-1], losses[-1])
        if patience is not None:
            patience.hear(index, [figures[site] for site in outcomes])
            if patience.is_over:
                break
    return RunResult(
        initial,
        state,
        strategy.handed_out(state, own),
        own,
        kept,
        tuple(participation),
        tuple(refused),
        tuple(notes),
        tuple(losses),
        tuple(seconds),
        bytes_up,
        bytes_down,
        patience,
    )


def _void(index: int, failed: Mapping[str, HistoflareError]) -> JobError:
    why = "".join(f"\n  {site}: {error}" for site, error in failed.items())
    return JobError(
        f"round {index + 1}: the secure sum cannot open, for not all sites sent their part{why}",
        reason="SUM_VOID",
    )

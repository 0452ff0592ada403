"""The two halves of a round, which every runtime runs: in process, in FLARE's simulator, at real sites.

A round is :func:`site_round` at each trainer, then :func:`server_round` at the aggregator, be it a server or
a site (``rounds.topology``). Both are functions of what they are given: the same arguments give the same
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from histoflare.errors import JobError
from histoflare.privacy.plan import Open, PrivacyPlan
from histoflare.rounds.local import one_thread
from histoflare.rounds.state import State, check_tensors, without_negative_variances
from histoflare.rounds.strategy import (
    SUM,
    ServerOutcome,
    ServerRound,
    SiteOutcome,
    SiteRound,
    Strategy,
    Update,
    split,
)
from histoflare.rounds.task import Task
from histoflare.rounds.transport import Transport
from histoflare.rounds.transports.float32 import PLAIN


def site_round(
    task: Task,
    strategy: Strategy,
    received: State,
    data: Any,
    *,
    site: str,
    site_state: State,
    round_index: int,
    total_rounds: int,
    seed: int,
    plan: PrivacyPlan,
    transport: Transport = PLAIN,
    device: str = "cpu",
    steps: int | None = None,
) -> SiteOutcome:
    """Run a site's half of a round: train by the strategy, protect by the privacy plan, pack the update.

    Training runs on ``device``; what it gives is on the CPU, and so is the release, on one thread.

    Args:
        received: The global model as it came, with what the strategy sent beside it (``strategy.join``).

    Raises:
        JobError: The privacy plan does not admit these parts, training failed, or what would leave has not
            the names and shapes the strategy sends.
        HistoflareError: The privacy plan lets nothing leave.
    """
    strategy = strategy.of_task(task)
    plan.admits(strategy, task, transport)
    model, downlink = split(received)
    ctx = SiteRound(
        task, data, site, model, downlink, site_state, round_index, total_rounds, seed, plan, device, steps
    )
    outcome = strategy.local_round(ctx)
    with one_thread():
        released = plan.release(outcome.update.tensors, plan.noise_source(site, round_index, "update"))
        update = replace(outcome.update, tensors=released)
        # Before it is packed: a transport may hide what is not finite.
        _check_made(strategy, model, update, transport)
        packed = transport.pack(released, update.weight, plan.sum_step)
        # What is part of a sum has its weight in it.
        update = replace(update, tensors=packed, weight=update.weight if transport.readable else 1.0)
    return replace(outcome, update=update)


@one_thread()
def server_round(
    strategy: Strategy,
    model: State,
    updates: Sequence[Update],
    sites: Sequence[str],
    plan: PrivacyPlan | None = None,
    *,
    own: State | None = None,
    transport: Transport = PLAIN,
    listed: Sequence[str] | None = None,
    round_index: int = 0,
    total_rounds: int = 1,
    seed: int = 0,
) -> ServerOutcome:
    """Run the aggregator's half of a round: check every update, order them by ``sites``, combine them.

    The order of arrival does not matter, to the last bit.

    Args:
        model: The global model that the sites began with.
        updates: As they came.
        sites: All sites of the federation, in its fixed order; not all need to have sent an update.
        plan: The job's; one whose noise is added at the server has its part here.
        own: What the strategy keeps at the server; None: what it begins with.
        transport: How the updates travelled. Where the server cannot read them, the strategy gets one update
            in the name of ``strategy.SUM``: their weighted mean, with the sum of the weights.
        listed: The sites whose vectors make the sum, where the server sees nothing else; None: ``sites``.

    Raises:
        JobError: A secure sum did not open, for a site is missing or its vector is of another round
            (SUM_VOID).
        JobError: Fewer updates than the strategy needs; one from an unknown site or two from one; an update
            with missing, unknown, wrongly shaped or non-finite tensors or a bad weight; a result that is not
            finite or of another form.
    """
    own = strategy.begin(model) if own is None else own
    plan = plan or Open()
    _check_senders(strategy, updates, sites)
    like = strategy.sent(model)
    for update in updates:
        check_update(strategy, model, update, transport)
    if transport.readable:
        place = {site: index for index, site in enumerate(sites)}
        ordered = [
            replace(update, tensors=transport.unpack(update.tensors, like))
            for update in sorted(updates, key=lambda update: place[update.site])
        ]
        protected = plan.at_server([update.tensors for update in ordered])
        ordered = [replace(each, tensors=tensors) for each, tensors in zip(ordered, protected, strict=True)]
    else:
        ordered = [_opened_sum(transport, plan, updates, sites if listed is None else listed)]
    made = strategy.combine(ServerRound(model, own, ordered, sites, round_index, total_rounds, seed))
    sent = {update.site: update.numbers for update in ordered if update.numbers}
    made = replace(made, model=without_negative_variances(made.model), numbers=sent)
    check_tensors(made.model, model, whose=f"The global model that {strategy.name} made")
    check_tensors(made.own, own, whose=f"What {strategy.name} keeps at the server")
    return made


def _opened_sum(
    transport: Transport, plan: PrivacyPlan, updates: Sequence[Update], listed: Sequence[str]
) -> Update:
    """Return the mean of a round's updates, of which nothing but the sum can be read."""
    missing = set(listed) - {update.site for update in updates}
    if missing or len(updates) != len(listed):
        raise JobError(
            f"The secure sum of this round cannot open: it is of {len(listed)} sites, and {len(updates)} of "
            "them sent their part. The round is void.",
            reason="SUM_VOID",
        )
    total, weight = transport.open([update.tensors for update in updates], plan.sum_step)
    if not weight > 0:
        raise JobError(
            f"The weights of the sites in this sum add up to {weight}; it must be more than 0.",
            reason="WEIGHTS_INVALID",
        )
    return Update(SUM, plan.of_sum(total, weight), weight)


def _check_made(strategy: Strategy, model: State, update: Update, transport: Transport) -> None:
    """Check an update before it is packed; as a term of a sum it may be float64, on the grid of its noise."""
    like = strategy.sent(model)
    if not transport.readable and {tensor.dtype for tensor in update.tensors.values()} == {torch.float64}:
        like = {n: torch.empty(t.shape, dtype=torch.float64, device="meta") for n, t in like.items()}
    _check_update(strategy, like, update)


def _check_senders(strategy: Strategy, updates: Sequence[Update], sites: Sequence[str]) -> None:
    arrived = [update.site for update in updates]
    unknown = sorted(set(arrived) - set(sites))
    doubled = sorted({site for site in arrived if arrived.count(site) > 1})
    if len(arrived) < strategy.least_updates or unknown or doubled:
        what = f"{len(arrived)}, and {strategy.name} needs at least {strategy.least_updates}"
        if unknown or doubled:
            what = f"from unknown sites {unknown}" if unknown else f"more than once from {doubled}"
        raise JobError(
            f"The updates of this round cannot be combined: {what}; the sites are {list(sites)}.",
            reason="UPDATES_INVALID",
        )


def check_update(
    strategy: Strategy, model: Mapping[str, Tensor], update: Update, transport: Transport = PLAIN
) -> None:
    """Raise :class:`JobError` unless ``update`` has the tensors and numbers that its strategy sends.

    And a weight that is a number of at least 0.

    Args:
        model: The global model. update: As it travels. transport: How it is written.
    """
    _check_update(strategy, transport.form(strategy.sent(model)), update)


def _check_update(strategy: Strategy, like: Mapping[str, Tensor], update: Update) -> None:
    check_tensors(update.tensors, like, whose=f"The update of {update.site}")
    if not (math.isfinite(update.weight) and update.weight >= 0):
        raise JobError(
            f"The update of {update.site} has weight {update.weight}; it must be a number of at least 0.",
            reason="WEIGHTS_INVALID",
        )
    check_numbers(strategy, update.numbers, whose=f"The update of {update.site}")


def check_numbers(strategy: Strategy, numbers: Mapping[str, float], *, whose: str) -> None:
    """Raise :class:`JobError` unless these are the numbers that ``strategy`` declares, each a finite float.

    Args:
        whose: Subject of the error's sentence.
    """
    if set(numbers) != set(strategy.numbers):
        listed = ", ".join(strategy.numbers) or "none"
        raise JobError(
            f"{whose} has not the numbers that the strategy {strategy.name} declares ({listed}).",
            reason="NUMBER_NOT_ALLOWED",
        )
    if not all(type(value) is float and math.isfinite(value) for value in numbers.values()):
        raise JobError(f"{whose} has a number that is NaN, infinite or none at all.", reason="NOT_FINITE")


def count_sent(strategy: Strategy, model: Mapping[str, Tensor]) -> int:
    """Return how many numbers a site sends in a round, those of the strategy itself included."""
    return sum(tensor.numel() for tensor in strategy.sent(model).values())


def count_sent_by_job(strategy: Strategy, task: Task) -> int:
    """Return the same for a task's model, which is made for its shapes alone, without memory or numbers."""
    strategy = strategy.of_task(task)
    with torch.device("meta"), _RealRanges():
        return count_sent(strategy, dict(task.build_model().state_dict()))


class _RealRanges(TorchFunctionMode):
    """Makes ``torch.linspace`` give numbers on the meta device too: networks read rates from them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        fixed = {"device": torch.device("cpu")} if func is torch.linspace else {}
        return func(*args, **{**(kwargs or {}), **fixed})

"""What a run guaranteed to each patient: ε derived from the events of the rounds, never stored beforehand.

A site's gate stamps each update with what one patient spent in it (``privacy.spend.Spend``); where nobody
stamps, in one process, it is the plan's event. The events are counted, site by site and round by round. What
they come to is one figure, that of the budget's filter (``filter``): a site's ledger has the same one, where
the site's budget is the job's. For those who want to know more two accountants stand beside it, for events
that were fixed beforehand: Rényi DP at its best order (``rdp``), and privacy loss distributions (``pld``), or
the exact Gaussian curve (``gaussian``) where nothing is sampled.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from histoflare.errors import JobError
from histoflare.privacy import words
from histoflare.privacy.budget import Budget
from histoflare.privacy.sampler import sampler_delta
from histoflare.privacy.spend import ADD_OR_REMOVE_ONE, UNIT, Spend
from histoflare.report.guarantee_words import say_published
from histoflare.report.participation import SiteRounds, update_left

Events = Counter[Spend]

UNPROTECTED = Spend(noise_multiplier=0.0)


def state_epsilon(value: float) -> dict[str, Any]:
    """Return ε as JSON, which has no infinity."""
    infinite = math.isinf(value)
    return {"epsilon": None if infinite else value, "epsilon_is_infinite": infinite}


def build_guarantee(
    mechanism: str,
    plan: Mapping[str, Any] | None,
    spend: Mapping[str, Any] | None,
    rounds: int,
    rows: Sequence[Mapping[str, Any]],
    sites: Sequence[SiteRounds],
    evaluations: int = 0,
    numbers: int | None = None,
    spare_rounds: int = 0,
) -> dict[str, Any]:
    """Return what a run guaranteed, as plain JSON.

    ``epsilon`` is the bottom line: the most that any site's patient spent of the ``budget``, by its filter;
    infinite where nothing protects or the noise can be repeated. ``against_server`` is the same for the
    server itself. Where sites share their noise it is against the server and all sites but those on whose
    shares the job counts, ``against`` says so in words, and ``if_all_collude`` is the figure should all other
    sites collude, by RDP at its best order and not below the first one: of the federation, and of what was
    reserved. Attempts at a sum that did not open are counted.

    Args:
        mechanism: What protected the updates; ``"open"``: nothing, and all else is left out.
        plan: The settled plan (``PrivacyPlan.to_json``). spend: Its event of one round (``Spend.to_json``).
        rounds: Of the job.
        rows: The report's rows of ``participation``.
        sites: What each site did in them.
        evaluations: How many sites let figures of the last model out.
        numbers: See ``RunFacts``; ``sampler_delta``, of all rounds at their ε, follows from it.
        spare_rounds: Reserved beside the job's rounds.

    Raises:
        JobError: A mechanism without its plan (PRIVACY_INVALID).
    """
    if mechanism == "open":
        return {"mechanism": "open", **state_epsilon(math.inf)}
    if plan is None or spend is None:
        raise JobError(
            f"A run under {mechanism} without its plan: its ε cannot be said.", reason="PRIVACY_INVALID"
        )
    own = Spend.from_json(spend)
    events = {each.site: _events(rows, each, own) for each in sites}
    seeded = {each.site: _seeded(rows, each, plan) for each in sites}
    used = [own, *(event for per_round in events.values() for round_ in per_round for event in round_)]
    rounds += spare_rounds
    budget = Budget(plan["budget_epsilon"], plan["delta"])
    accounts = _Accounts(budget, "gaussian" if all(e.sample_rate == 1 for e in used) else "pld")
    per_site = {
        site: _site(per_round, [row["round"] for row in rows], accounts) | {"seeded_noise": seeded[site]}
        for site, per_round in events.items()
    }
    reserved = accounts.all(Counter({own: rounds}))
    federation = {name: _most(per_site.values(), name) for name in accounts.names}
    void = any(seeded.values()) or plan.get("noise_seed") is not None
    bottom = state_epsilon(math.inf) if void else dict(federation["filter"])
    trusted = plan.get("noise_location") == "server"
    return {
        "mechanism": mechanism,
        **bottom,
        "against_server": state_epsilon(math.inf) if trusted else dict(bottom),
        "unit": UNIT,
        "neighbouring_relation": ADD_OR_REMOVE_ONE,
        **_state_sharing(own, rows, events, rounds, budget),
        "delta": plan["delta"],
        "budget": _state_budget(budget, budget.cost(own.times(rounds))),
        "sampler_delta": None if numbers is None else _sampler_delta(reserved["filter"], numbers),
        "accountants": list(accounts.names),
        "seeded_noise": void,
        "noise_location": plan.get("noise_location", "client"),
        "plan": dict(plan),
        "spend": dict(spend),
        "federation": federation,
        "holds_if": "no patient is at two sites",
        "sites": per_site,
        "reserved": {"rounds": rounds, **reserved},
        "published_epsilon": plan.get("published_epsilon"),
        "published_note": say_published(plan.get("published_epsilon"), reserved, rounds, plan["delta"]),
        "not_covered": {
            "evaluations": evaluations,
            "metrics_of_rounds": sum(
                bool(of_site) for row in rows for of_site in (row.get("metrics") or {}).values()
            ),
        },
    }


def _state_budget(budget: Budget, cost: float) -> dict[str, Any]:
    """Return the budget, and how many more jobs like this one (``further``; None: any number) fit in it."""
    share = budget.share_of(cost)
    return {
        "epsilon": budget.epsilon,
        "delta": budget.delta,
        "order": budget.order,
        "share": share if math.isfinite(share) else None,
        "further": budget.room_for(cost, cost),
    }


def _sampler_delta(reserved: Mapping[str, Any], numbers: int) -> float:
    return sampler_delta(math.inf if reserved["epsilon_is_infinite"] else reserved["epsilon"], numbers)


@dataclass
class _Accounts:
    """ε of counted events; equal ones are computed once, whichever site they are of."""

    budget: Budget
    tight: str
    known: dict[tuple[str, frozenset[tuple[Spend, int]]], dict[str, Any]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, str, str]:
        return ("filter", "rdp", self.tight)

    def figure(self, accountant: str, events: Events) -> dict[str, Any]:
        """Return ε by one accountant."""
        from histoflare.privacy.accountant import epsilon  # its library takes its time

        key = (accountant, frozenset(events.items()))
        if key not in self.known:
            spends = [spend.times(count) for spend, count in events.items()]
            by_filter = accountant == "filter"
            self.known[key] = state_epsilon(
                self.budget.spent(spends) if by_filter else epsilon(spends, self.budget.delta, accountant)
            )
        return dict(self.known[key])

    def all(self, events: Events) -> dict[str, Any]:
        return {name: self.figure(name, events) for name in self.names}


def epsilon_if_all_collude(budget: Budget, spends: Sequence[Spend]) -> float:
    """Return ε of events should all other sites collude, where no policy says which budget there is for that.

    By RDP at its best order; and not below what they cost by the budget's filter against fewer sites.
    """
    from histoflare.privacy.accountant import epsilon  # its library takes its time

    return max(epsilon([spend.alone() for spend in spends], budget.delta), budget.spent(spends))


def _state_sharing(
    own: Spend,
    rows: Sequence[Mapping[str, Any]],
    events: Mapping[str, Sequence[Sequence[Spend]]],
    rounds: int,
    budget: Budget,
) -> dict[str, Any]:
    """Return against whom the figures of shared noise are, and the one should all other sites collude."""
    if own.honest == 1:
        return {"against": None, "if_all_collude": None, "trusts_ca": False}
    counts = [Counter(event for here in per_round for event in here) for per_round in events.values()]
    spent = [
        epsilon_if_all_collude(budget, [event.times(count) for event, count in found])
        for found in {tuple(each.items()) for each in counts}
    ]
    sums = [len(row["taking_part"]) for row in rows if row["taking_part"]]
    for void in (void for row in rows for void in row.get("voids") or ()):
        if set(void["sites"]) - set(void.get("refused", ())):  # what they sent has the noise of so many
            sums.append(len(void["sites"]))
    least = min(sums, default=None)
    stamps = [stamp for row in rows for stamp in (row.get("stamps") or {}).values()]
    return {
        "against": words.say_against(own.honest, least),
        "if_all_collude": {
            "federation": state_epsilon(max(spent, default=0.0)),
            "reserved": state_epsilon(epsilon_if_all_collude(budget, [own.times(rounds)])),
        },
        "trusts_ca": any(stamp.get("trusts_ca", False) for stamp in stamps),
    }


def _events(rows: Sequence[Mapping[str, Any]], site: SiteRounds, own: Spend) -> list[list[Spend]]:
    """Return what one patient of a site spent in each round: nothing where no update left.

    What a site sent to a sum that did not open is spent as well.
    """
    spent: list[list[Spend]] = []
    for row, status in zip(rows, site.statuses, strict=True):
        stamp = (row.get("stamps") or {}).get(site.site)
        here = [own for void in row.get("voids") or () if site.site in void["sites"]]
        if update_left(row, site.site, status):
            if stamp is None:
                here.append(own)
            else:
                here.append(UNPROTECTED if stamp["spend"] is None else Spend.from_json(stamp["spend"]))
        spent.append(here)
    return spent


def _seeded(rows: Sequence[Mapping[str, Any]], site: SiteRounds, plan: Mapping[str, Any]) -> bool:
    stamps = [(row.get("stamps") or {}).get(site.site) for row in rows]
    return plan.get("noise_seed") is not None or any(stamp and stamp["seeded_noise"] for stamp in stamps)


def _site(per_round: Sequence[list[Spend]], numbers: Sequence[int], accounts: _Accounts) -> dict[str, Any]:
    """Return a site's figures after each round and after the last.

    The figures of the other accountants stand after the last of them only.
    """
    events: Events = Counter()
    after = []
    for number, here in zip(numbers, per_round, strict=True):
        events.update(here)
        count = events.total()
        row = {"round": number, "updates": count, "filter": accounts.figure("filter", events)}
        after.append(row)
    total = events.total()
    return {"updates": total, **accounts.all(events), "after_round": after}


def _most(sites: Iterable[Mapping[str, Any]], accountant: str) -> dict[str, Any]:
    """Return the greatest of the sites' figures."""
    figures = [site[accountant] for site in sites]
    if any(figure["epsilon_is_infinite"] for figure in figures):
        return state_epsilon(math.inf)
    return state_epsilon(max((figure["epsilon"] for figure in figures), default=0.0))

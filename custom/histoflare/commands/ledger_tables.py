"""What ``histoflare ledger show`` prints: whose the ledger is, what was spent, what left unprotected."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from histoflare.commands.console import make_table, out, tell
from histoflare.privacy.sampler import NUMBERS_EVER, sampler_delta
from histoflare.privacy.words import ALL_COLLUDE, IF_CA_IS_HONEST, say_cost, say_delta, say_epsilon

if TYPE_CHECKING:
    from collections.abc import Sequence

    from histoflare.privacy.budget import Budget
    from histoflare.privacy.ledger import Identity
    from histoflare.privacy.ledger.remaining import PatientsLeft
    from histoflare.privacy.ledger.summary import DisclosureSummary, RunSummary, Spent, Summary


def show_identity(identity: Identity, kit_of: str | None = None) -> None:
    """Print whose a ledger is, and where it is bound to.

    Args:
        kit_of: The site of the kit that it was found from; None if it was in none.
    """
    place = identity.place
    owner = "" if identity.owner == "steward" else ", made on a workstation: for trying out, no site takes it"
    say_plainly(f"The ledger of '{identity.site}'{owner}. Entries: {identity.entries}.")
    state = "bound there"
    if identity.is_away:
        state = f"closed there, {f'to go on as {identity.went_to}' if identity.went_to else 'to be moved'}"
    elif not identity.is_here:
        state = "bound there, not here"
    if kit_of not in (None, identity.site):
        state += f". This is the kit of '{kit_of}': name that site's own ledger in local/histoflare.toml"
    elif not identity.is_here and not identity.is_away:
        state += " (histoflare ledger move, if nothing is booked there any more)"
    say_plainly(f"{place.ledger} on {place.host}, key {place.key}: {state}.")


def show_unprotected(disclosures: Sequence[DisclosureSummary]) -> None:
    """Print what left without protection."""
    if not disclosures:
        say_plainly("Nothing left without protection.")
        return
    table = make_table("run", "what left", "times", "patients", title="left without protection: no ε")
    table.show_lines = True
    for each in disclosures:
        first, last = say_date(each.first_unix_time), say_date(each.last_unix_time)
        when = first if first == last else f"{first} to\n{last}"
        figures = f"\n{', '.join(each.figures)}" if each.figures else ""
        table.add_row(each.run, f"{each.what}, {when}{figures}", str(each.times), str(each.patients))
    out.print(table, markup=False)


def show_summary(summary: Summary, scopes: Sequence[str], how: bool) -> None:
    """Print what was spent of a budget, the one of ``scopes``; with ``how`` also how it was computed."""
    of = f" ({', '.join(scopes)})" if scopes else ""
    spent = say_cost(summary.epsilon, summary.budget_epsilon)
    second = summary.if_all_collude
    whom = ""
    if second is not None:
        sites = f"any {summary.colluders} other site{'s' if summary.colluders > 1 else ''}"
        whom = f", against the server and {sites}"
        if summary.sites_per_patient > 1:
            whom += f", for a patient of up to {summary.sites_per_patient} sites"
        if any(run.trusts_ca for run in summary.runs):
            whom += f", {IF_CA_IS_HONEST}"
    say_plainly(
        f"Spent of the lifetime budget{of}: ε = {spent} at δ = {say_delta(summary.delta)}{whom}, by the most "
        f"exposed of {summary.patients} patients; {_say_left(summary)}"
    )
    if second is not None:
        cost = say_cost(second.epsilon, second.budget_epsilon)
        say_plainly(
            f"Spent {ALL_COLLUDE}: ε = {cost}; {_say_left(second)} Where sites share their noise, each adds "
            "a part of it; this is what a patient's own site adds by itself. A job must fit both budgets."
        )
    columns = ("ε",) if second is None else ("ε", "ε, if all\nothers collude")
    table = make_table(
        "run", "patients", "rounds", *columns, title="each run by itself; ε do not add up, see --how"
    )
    table.show_lines = True
    for run in summary.runs:
        more = [] if second is None else [say_epsilon(run.epsilon_if_all_collude)]
        table.add_row(*_row(run), *more)
    if summary.runs:
        out.print(table, markup=False)
    if any(run.is_open and run.booked < run.rounds for run in summary.runs):
        say_plainly(
            "What an open run has reserved counts as spent, also what is not booked. Of a run that has "
            "ended, or that came to nothing, 'histoflare ledger close RUN' gives back what is not booked."
        )
    say_plainly(
        f"Evaluations let out: {summary.disclosures}; no patient had part in more than "
        f"{summary.most_disclosures}. They have no ε."
    )
    if how:
        _show_how(summary)


def show_left(
    groups: Sequence[PatientsLeft], budget: Budget, named: Sequence[str], *, is_shared: bool
) -> None:
    """Print how many patients have how much of a budget left, those with the least first.

    Args:
        named: Who was asked about by name; nobody: the table has no names.
        is_shared: Whether noise was shared, so that the two filters differ.
    """
    kept = budget.filters()
    columns = ["left"] if not is_shared else [f"left, of ε = {each.budget.epsilon:g}" for each in kept]
    if is_shared:
        columns[1] += "\nif all others collude"
    table = make_table(
        "patients", "role", *columns, *(["who"] if named else []), title="what each patient has left"
    )
    table.show_lines = True
    unknown = len(set(named)) - sum(len(each.names) for each in groups)
    for each in groups:
        shares = [f"{100 * share:.1f} %" for share in each.left[: len(columns)]]
        nameless = each.patients - len(each.names)
        who = [*each.names, *([f"{nameless} not in the manifests"] if nameless else [])]
        table.add_row(str(each.patients), each.role, *shares, *(["\n".join(who)] if named else []))
    if groups:
        out.print(table, markup=False)
    else:
        say_plainly("The ledger has met no patient yet: each has all of the budget.")
    if unknown:
        say_plainly(f"{unknown} patients of the manifests are in no booked job yet: they have all of it.")


def _say_left(spent: Spent) -> str:
    """Return how much is left: never more than there is."""
    left = math.floor(1000 * spent.remaining) / 10
    return f"{left:g} % of it is left." if left > 0 else "nothing is left."


def _show_how(summary: Summary) -> None:
    taken = sampler_delta(summary.budget_epsilon, NUMBERS_EVER)
    say_plainly(
        f"ε is that of ρ = {summary.rho:.4g} of {summary.allowance:.4g} at the one Rényi order of this "
        "budget, by which jobs are admitted. Shares of ρ add up from job to job, and ε does not: the first "
        "job of all costs most. Another budget has another order, and other figures."
    )
    say_plainly(
        f"The same events, had they been fixed beforehand: ε = {say_epsilon(summary.epsilon_rdp)} by RDP, "
        f"{say_epsilon(summary.epsilon_pld)} by PLD. Nothing is admitted by these."
    )
    say_plainly(f"Of δ the sampler of the noise takes at most {taken:.1g}, over all jobs there can ever be.")
    for run in summary.runs:
        spend = run.spend
        sampled = f", rate {spend.sample_rate:.4g}" if spend.sample_rate < 1 else ""
        steps = f"{spend.steps} steps" if spend.steps != 1 else "one step"
        shared = ""
        if spend.honest > 1:
            shared = (
                f", of {spend.honest} sites together; this one adds {spend.alone().noise_multiplier:.4g}. "
                "Each attempt of a round is booked, whether its sum opened or not"
            )
        say_plainly(
            f"{run.run}: {run.about}; {steps} a round, noise {spend.noise_multiplier:.4g}{sampled}{shared}."
        )


def _row(run: RunSummary) -> list[str]:
    rounds = [
        f"{run.rounds} reserved",
        f"{run.booked} booked",
        f"{run.released} released",
        f"{run.failed} failed",
    ]
    return [
        f"{run.run}\n({_state(run)})\n{run.about}",
        str(run.patients),
        "\n".join(rounds),
        say_epsilon(run.epsilon),
    ]


def _state(run: RunSummary) -> str:
    if not run.is_open:
        return "closed"
    return "open" if run.released < run.rounds else "complete"


def say_date(unix_time: int) -> str:
    """Return a time in UTC."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(unix_time, UTC).strftime("%Y-%m-%d %H:%M UTC")


def say_plainly(text: str) -> None:
    """Print a result as it is: never cut or coloured."""
    tell(text)

"""``histoflare ledger``: make a site's privacy ledger, move it, look at it, check it, close runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histoflare.commands.console import console, make_table, out, print_json
from histoflare.errors import JobError, LedgerError
from histoflare.privacy.sampler import NUMBERS_EVER, sampler_delta
from histoflare.storage import real_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from histoflare.privacy.budget import Budget
    from histoflare.privacy.ledger import Identity, Ledger
    from histoflare.privacy.ledger.summary import DisclosureSummary, RunSummary, Summary

app = typer.Typer(no_args_is_help=True)

SiteFile = Annotated[
    Path | None, typer.Option("--site", help="The site's own file, e.g. local/histoflare.toml.")
]
LedgerFile = Annotated[Path | None, typer.Option("--ledger", help="The ledger; instead of --site.")]
KeyFile = Annotated[Path | None, typer.Option("--key", help="The ledger's key; with --ledger.")]


@app.callback()
def _group() -> None:
    """A site's privacy ledger: make it once, move it, look at it, check it, close runs."""


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The site's name in the consortium, e.g. hospital-a.")],
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="Where it is to be: outside the kit, on a local disk.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", help="Where its key is to be: another folder, another backup.")
    ] = None,
    site: Annotated[
        Path | None, typer.Option("--site", help="The site's own file, in which the two are then named.")
    ] = None,
) -> None:
    """Make a site's ledger and its key: once, for all jobs and all kits. No job ever makes one.

    Run it as the user, and in the container if there is one, in which the site's client runs.

    Example: histoflare ledger create hospital-a --ledger /srv/histoflare/ledger.sqlite
    --key /srv/histoflare-key/ledger.key --site local/histoflare.toml
    """
    from histoflare.privacy.ledger import Ledger
    from histoflare.site.configuration import name_ledger, named_ledger
    from histoflare.site.ledgers import refuse_kit

    named = named_ledger(site) if site is not None else None
    if ledger is None and key is None and named is not None:
        ledger, key = named
    if ledger is None or key is None:
        raise typer.BadParameter("say where the ledger and its key are to be: --ledger and --key")
    ledger, key = real_path(ledger), real_path(key)
    if named is not None and tuple(map(real_path, named)) != (ledger, key):
        raise JobError(
            f"{site}: names a ledger already, {named[0]}. A site has one for all jobs and kits: use that "
            "one, or take the two lines out if there has never been one.",
            reason="SITE_NOT_CONFIGURED",
        )
    refuse_kit(ledger, key)
    made = Ledger.create(ledger, key, name)
    _say(f"{made.path}: made for '{name}'. Its key: {key}. Keep copies of both, in different places.")
    if site is not None:
        name_ledger(site, ledger, key)
        _say(f"{site}: names them now.")
    else:
        _say(f"For local/histoflare.toml:\nledger = {_toml(ledger)}\nledger_key = {_toml(key)}")


@app.command()
def move(
    site: SiteFile = None,
    ledger: LedgerFile = None,
    key: KeyFile = None,
    away: Annotated[
        bool, typer.Option("--away", help="Close it here, before it is copied to another machine.")
    ] = False,
    name: Annotated[
        str | None, typer.Option("--name", help="The site's name from now on, if it has another one.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Nothing will be booked in the old place any more; do not ask.")
    ] = False,
) -> None:
    """Bind a ledger to the place where it is now, after it was moved or restored. The old one is closed.

    Copy the ledger, the key and the head beside the key; on another machine after 'move --away' here. With
    --site, --ledger and --key the site's file names the new place afterwards.

    Example: histoflare ledger move --site local/histoflare.toml
    """
    from histoflare.site.configuration import name_ledger
    from histoflare.site.ledgers import refuse_kit

    both = site is not None and ledger is not None and key is not None
    opened = _open(None if both else site, ledger, key)
    if away:
        if both or name is not None:
            raise typer.BadParameter("--away closes it where it is: give --site, or --ledger and --key")
        opened.depart()
        _say(
            f"{opened.path}: closed; nothing more is booked here. Copy it, its key and the head beside the "
            "key, and run in the new place: histoflare ledger move."
        )
        return
    refuse_kit(opened.path, opened.key_path)
    try:
        moved = opened.move(old_is_gone=yes, site=name)
    except LedgerError as error:
        if error.reason != "LEDGER_MOVED":
            raise
        _say(str(error))
        typer.confirm("Is the old one gone, or will it never be used again?", abort=True)
        moved = opened.move(old_is_gone=True, site=name)
    place = opened.identity().place
    _say(
        f"{'bound to' if moved else 'was already bound to'} {place.ledger}, key {place.key}, on {place.host}"
    )
    if both and site is not None and name_ledger(site, opened.path, real_path(opened.key_path)):
        _say(f"{site}: names it now.")


@app.command()
def show(
    site: SiteFile = None,
    ledger: LedgerFile = None,
    key: KeyFile = None,
    policy: Annotated[
        Path | None, typer.Option(help="The scope's signed policy; the site's own may lower it.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="The budget's ε instead; with --delta.")] = None,
    delta: Annotated[float | None, typer.Option(help="The budget's δ; with --epsilon.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show whose it is and where, what was reserved, booked, let out or failed, and what is left.

    Without a budget (--policy, or --epsilon and --delta) only what left unprotected. No patient is named.

    Example: histoflare ledger show --site local/histoflare.toml --policy local/policy_dp-patient.toml
    """
    opened = _open(site, ledger, key)
    budget = _budget(site, policy, epsilon, delta)
    identity, disclosures = opened.identity(), opened.disclosures()
    summary = None if budget is None else opened.summary(budget)
    if as_json:
        facts = {"ledger": identity.to_json(), "unprotected": [asdict(each) for each in disclosures]}
        print_json(facts | ({} if summary is None else summary.to_json()))
        return
    _show_identity(identity)
    if summary is not None:
        _show(summary)
    _show_unprotected(disclosures)


@app.command()
def verify(site: SiteFile = None, ledger: LedgerFile = None, key: KeyFile = None) -> None:
    """Check every entry, every patient and every cohort of the ledger. The exit code is 1 if it is damaged.

    Example: histoflare ledger verify --site local/histoflare.toml
    """
    opened = _open(site, ledger, key)
    found = opened.verify()
    ahead = f" ({found.ahead} of them after a crash; the next job catches up)" if found.ahead else ""
    _say(
        f"{opened.path}: whole. {found.entries} entries{ahead} from {_date(found.first_unix_time)} to "
        f"{_date(found.last_unix_time)}, {found.patients} patients, {found.cohorts} cohorts: every link of "
        "the chain, every hash and the head are as they were written."
    )


@app.command()
def export(
    file: Annotated[Path, typer.Option("--out", help="JSON lines; must not be there yet.")],
    site: SiteFile = None,
    ledger: LedgerFile = None,
    key: KeyFile = None,
) -> None:
    """Write all entries, verified, as JSON lines. Patients are codes; who has the key can check the chain.

    Example: histoflare ledger export --site local/histoflare.toml --out ledger.jsonl
    """
    from histoflare.storage import write_text

    if file.exists():
        raise JobError(f"{file}: exists already; give another name.")
    opened = _open(site, ledger, key)
    lines = [json.dumps(event) for event in opened.events()]
    write_text(file, "".join(f"{line}\n" for line in lines))
    console.print(f"{len(lines)} entries: {file}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def close(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    site: SiteFile = None,
    ledger: LedgerFile = None,
    key: KeyFile = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Give back what a run reserved and did not book. It then goes on only if its job is admitted anew.

    Example: histoflare ledger close 20261125-mem --site local/histoflare.toml
    """
    opened = _open(site, ledger, key)
    runs = sorted(opened.open_runs())
    if run not in runs:
        raise JobError(
            f"{run}: no open run of this ledger; open are: {', '.join(runs) or 'none'}.", reason="RUN_INVALID"
        )
    if not yes:
        typer.confirm(f"Close {run}? Its rounds that are not booked yet will not be trained.", abort=True)
    closed = opened.close(run)
    rounds = sum(reservation.rounds for reservation in closed)
    _say(f"{run}: closed. Of {rounds} reserved rounds those that were booked stay charged, and no others.")


def _open(site: Path | None, ledger: Path | None, key: Path | None) -> Ledger:
    from histoflare.privacy.ledger import Ledger
    from histoflare.site.configuration import read_site_file

    if site is not None and ledger is None and key is None:
        configuration = read_site_file(site)
        if configuration.ledger is None or configuration.ledger_key is None:
            raise LedgerError(
                f"{site}: names no ledger; make one (histoflare ledger create), or say where the one is that "
                "this site has.",
                reason="LEDGER_MISSING",
            )
        return Ledger(configuration.ledger, configuration.ledger_key)
    if site is None and ledger is not None and key is not None:
        return Ledger(ledger, key)
    raise typer.BadParameter("give the site's own file with --site, or --ledger and --key")


def _budget(
    site: Path | None, policy_file: Path | None, epsilon: float | None, delta: float | None
) -> Budget | None:
    from histoflare.privacy.budget import Budget
    from histoflare.privacy.own_policy_file import read_site_policy

    if policy_file is not None and epsilon is None and delta is None:
        protection = read_site_policy(policy_file, site and real_path(site).parent).protection
        if protection is None:
            return None
        return protection.budget()
    if policy_file is None and epsilon is None and delta is None:
        return None
    if policy_file is not None or epsilon is None or delta is None:
        raise typer.BadParameter("give a budget with --policy, or with --epsilon and --delta")
    return Budget(epsilon, delta)


def _show_identity(identity: Identity) -> None:
    place = identity.place
    owner = "" if identity.owner == "steward" else ", made on a workstation: for trying out, no site takes it"
    _say(f"The ledger of '{identity.site}'{owner}. {identity.entries} entries.")
    state = "bound there"
    if identity.is_away:
        state = f"closed there, {f'to go on as {identity.went_to}' if identity.went_to else 'to be moved'}"
    elif not identity.is_here:
        state = "bound there, not here (histoflare ledger move)"
    _say(f"{place.ledger} on {place.host}, key {place.key}: {state}.")


def _show_unprotected(disclosures: Sequence[DisclosureSummary]) -> None:
    if not disclosures:
        _say("Nothing left without protection.")
        return
    table = make_table(
        *("run", "what", "times", "patients", "figures", "when"), title="left without protection: no ε"
    )
    for each in disclosures:
        first, last = _date(each.first_unix_time), _date(each.last_unix_time)
        table.add_row(
            each.run,
            each.what,
            str(each.times),
            str(each.patients),
            ", ".join(each.figures),
            first if first == last else f"{first}\n{last}",
        )
    out.print(table, markup=False)


def _show(summary: Summary) -> None:
    table = make_table(
        *("run", "about", "patients", "rounds", "a round", "ε alone"),
        title=f"{summary.patients} patients, {summary.disclosures} evaluations let out",
    )
    table.show_lines = True
    table.columns[0].no_wrap = True  # to be copied
    for run in summary.runs:
        table.add_row(*_row(run))
    out.print(table, markup=False)
    at = f"at δ = {summary.delta:g}"
    taken = sampler_delta(summary.budget_epsilon, NUMBERS_EVER)
    _say(
        f"Budget of each patient: ε = {summary.budget_epsilon:g} {at}. Of δ the sampler of the noise "
        f"takes at most {taken:.1g}, over all jobs there can ever be."
    )
    _say(
        f"The most exposed patient: ε = {summary.epsilon:.4g} as jobs are admitted by, "
        f"{100 * summary.remaining:.1f} % of the budget left "
        f"(ρ = {summary.rho:.4g} of {summary.allowance:.4g})."
    )
    _say(
        f"The same events, had they been fixed beforehand: ε = {summary.epsilon_rdp:.4g} by RDP, "
        f"{summary.epsilon_pld:.4g} by PLD."
    )
    _say(f"Evaluations that one patient had part in: at most {summary.most_disclosures}. They have no ε.")


def _row(run: RunSummary) -> list[str]:
    spend = run.spend
    rounds = [
        f"{run.rounds} reserved",
        f"{run.booked} booked",
        f"{run.released} released",
        f"{run.failed} failed",
    ]
    sampled = f", rate {spend.sample_rate:.4g}" if spend.sample_rate < 1 else ""
    steps = f"{spend.steps} steps, " if spend.steps != 1 else ""
    return [
        f"{run.run}\n({_state(run)})",
        run.about,
        str(run.patients),
        "\n".join(rounds),
        f"{steps}noise {spend.noise_multiplier:.4g}{sampled}",
        f"{run.epsilon:.4g}",
    ]


def _state(run: RunSummary) -> str:
    if not run.is_open:
        return "closed"
    return "open" if run.released < run.rounds else "complete"


def _toml(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def _date(unix_time: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(unix_time, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _say(text: str) -> None:
    out.print(text, soft_wrap=True, highlight=False, markup=False)

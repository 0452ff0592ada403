"""``histoflare ledger``: make a site's privacy ledger, move it, look at it, check it, close runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histoflare.commands.console import print_json, say
from histoflare.commands.ledger_tables import (
    say_date,
    say_plainly,
    show_identity,
    show_left,
    show_summary,
    show_unprotected,
)
from histoflare.commands.options import AsJson, How, SiteOption
from histoflare.errors import JobError, LedgerError
from histoflare.storage import real_path

if TYPE_CHECKING:
    from histoflare.privacy.budget import Budget
    from histoflare.privacy.ledger import Ledger

app = typer.Typer(no_args_is_help=True)

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
    site: SiteOption = None,
) -> None:
    """Make a site's ledger and its key: once, for all jobs and all kits. No job ever makes one.

    The site's own file then names the two; outside a kit, and without --site, what to write there is shown.
    Run it as the user, and in the container if there is one, in which the site's client runs.

    Example: histoflare ledger create hospital-a --ledger /srv/histoflare/ledger.sqlite
    --key /srv/histoflare-key/ledger.key --site local/histoflare.toml
    """
    from histoflare.privacy.ledger import Ledger
    from histoflare.site.ledgers import refuse_kit
    from histoflare.site.site_file import name_ledger, named_ledger

    site = _site(site)
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
    _refuse_foreign(site, name)
    made = Ledger.create(ledger, key, name)
    say_plainly(f"{made.path}: made for '{name}'. Its key: {key}. Keep copies of both, in different places.")
    if site is not None:
        name_ledger(site, ledger, key)
        say_plainly(f"{site}: names them now.")
    else:
        say_plainly(f"For local/histoflare.toml:\nledger = {_toml(ledger)}\nledger_key = {_toml(key)}")


@app.command()
def move(
    site: SiteOption = None,
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

    One that was left behind is not bound again while the one that it went on to is there: copy that one back.

    Copy the ledger, the key and the head beside the key; on another machine after 'move --away' here. With
    --site, --ledger and --key the site's file names the new place afterwards.

    Example: histoflare ledger move --site /srv/kit
    """
    from histoflare.site.ledgers import refuse_kit
    from histoflare.site.site_file import name_ledger

    site = _site(site) if site is not None or ledger is None else None
    both = site is not None and ledger is not None and key is not None
    opened = _open(None if both else site, ledger, key)
    if not away:
        refuse_kit(opened.path, opened.key_path)
    _refuse_foreign(site, name or opened.identity().site)
    if away:
        if both or name is not None:
            raise typer.BadParameter("--away closes it where it is: give --site, or --ledger and --key")
        opened.depart()
        say_plainly(
            f"{opened.path}: closed; nothing more is booked here. Copy it, its key and the head beside the "
            "key, and run in the new place: histoflare ledger move."
        )
        return
    try:
        moved = opened.move(old_is_gone=yes, site=name)
    except LedgerError as error:
        if error.reason != "LEDGER_MOVED":
            raise
        say_plainly(str(error))
        typer.confirm("Is the old one gone, or will it never be used again?", abort=True)
        moved = opened.move(old_is_gone=True, site=name)
    place = opened.identity().place
    say_plainly(
        f"{'bound to' if moved else 'was already bound to'} {place.ledger}, key {place.key}, on {place.host}"
    )
    if both and site is not None and name_ledger(site, opened.path, real_path(opened.key_path)):
        say_plainly(f"{site}: names it now.")


@app.command()
def show(
    site: SiteOption = None,
    ledger: LedgerFile = None,
    key: KeyFile = None,
    policy: Annotated[
        Path | None, typer.Option(help="The scope's signed policy; the site's own may lower it.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="The budget's ε instead; with --delta.")] = None,
    delta: Annotated[float | None, typer.Option(help="The budget's δ; with --epsilon.")] = None,
    patients: Annotated[
        bool, typer.Option("--patients", help="How many patients have how much left, the least first.")
    ] = False,
    names: Annotated[
        bool, typer.Option("--names", help="Who they are, by the site's manifests; with --patients.")
    ] = False,
    how: How = False,
    as_json: AsJson = False,
) -> None:
    """Show whose it is and where, what was reserved, booked, let out or failed, and what is left.

    The budgets are those of the kit's policies and the site's own; with --ledger and --key, or outside a kit,
    those that are given, if any. No patient is named but by --names. What is shown is for the hospital alone.

    Example: histoflare ledger show

    Example: histoflare ledger show --site /srv/kit --how

    Example: histoflare ledger show --patients
    """
    from histoflare.flare.kit_signature import site_around

    opened = _open(site, ledger, key)
    found = None if ledger is not None else _site(site)
    budgets = _budgets(found, policy, epsilon, delta)
    identity, disclosures = opened.identity(), opened.disclosures()
    summaries = {budget: opened.summary(budget) for budget in budgets}
    if names and not patients:
        raise typer.BadParameter("--names goes with --patients")
    if patients and not budgets:
        raise typer.BadParameter("what is left is left of a budget: give --policy, or --epsilon and --delta")
    named = _patients_of(found) if names else ()
    left = {budget: opened.remaining(budget, named) for budget in budgets} if patients else {}
    if as_json:
        facts = {"ledger": identity.to_json(), "unprotected": [asdict(each) for each in disclosures]}
        spent = [summaries[budget].to_json() | {"scopes": scopes} for budget, scopes in budgets.items()]
        for entry, groups in zip(spent, left.values(), strict=False):
            entry["patients_left"] = [asdict(each) for each in groups]
        print_json(facts | {"budgets": spent})
        return
    show_identity(identity, None if found is None else site_around(found))
    for budget, scopes in budgets.items():
        show_summary(summaries[budget], scopes, how)
        if patients:
            show_left(left[budget], budget, named, is_shared=summaries[budget].if_all_collude is not None)
    show_unprotected(disclosures)


@app.command()
def verify(site: SiteOption = None, ledger: LedgerFile = None, key: KeyFile = None) -> None:
    """Check every entry, every patient and every cohort of the ledger. The exit code is 1 if it is damaged.

    Example: histoflare ledger verify --site /srv/kit
    """
    opened = _open(site, ledger, key)
    found = opened.verify()
    ahead = f" ({found.ahead} of them after a crash; the next job catches up)" if found.ahead else ""
    say_plainly(
        f"{opened.path}: whole. {found.entries} entries{ahead} from {say_date(found.first_unix_time)} to "
        f"{say_date(found.last_unix_time)}, {found.patients} patients, {found.cohorts} "
        f"{'cohort' if found.cohorts == 1 else 'cohorts'}: every link "
        "of the chain, every hash and the head are as they were written."
    )


@app.command()
def export(
    file: Annotated[Path, typer.Option("--out", help="JSON lines; must not be there yet.")],
    site: SiteOption = None,
    ledger: LedgerFile = None,
    key: KeyFile = None,
) -> None:
    """Write all entries, verified, as JSON lines. Patients are codes; who has the key can check the chain.

    Example: histoflare ledger export --out ledger.jsonl
    """
    from histoflare.storage import write_text

    if file.exists():
        raise JobError(f"{file}: exists already; give another name.")
    opened = _open(site, ledger, key)
    lines = [json.dumps(event) for event in opened.events()]
    write_text(file, "".join(f"{line}\n" for line in lines))
    say(f"{len(lines)} entries: {file}")


@app.command()
def close(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    site: SiteOption = None,
    ledger: LedgerFile = None,
    key: KeyFile = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Give back what a run reserved and did not book. It then goes on only if its job is admitted anew.

    Example: histoflare ledger close 20261125-mem
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
    say_plainly(
        f"{run}: closed. Of {rounds} reserved rounds those that were booked stay charged, and no others."
    )


def _open(site: Path | None, ledger: Path | None, key: Path | None) -> Ledger:
    from histoflare.privacy.ledger import Ledger
    from histoflare.site.places import find_site_of
    from histoflare.site.site_file import read_site_file

    if ledger is None and key is None:
        site = find_site_of(site)
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
    raise typer.BadParameter("give the site's kit or file with --site, or --ledger and --key")


def _refuse_foreign(site: Path | None, name: str) -> None:
    """Refuse a ledger of ``name`` in another hospital's kit: to bind it there would close that of its owner.

    Raises:
        LedgerError: The kit around the site's file is another hospital's (LEDGER_FOREIGN).
    """
    from histoflare.flare.kit_signature import site_around

    own = None if site is None else site_around(site)
    if own not in (None, name):
        raise LedgerError(
            f"{site}: this is the kit of '{own}', and the ledger is one of '{name}'. Give the ledger this "
            "kit's name, or name this site's own ledger.",
            reason="LEDGER_FOREIGN",
        )


def _site(given: Path | None) -> Path | None:
    """Return a site's file; None outside a kit, if none was given."""
    from histoflare.site.places import find_site_of

    try:
        return find_site_of(given)
    except JobError:
        if given is not None:
            raise
        return None


def _patients_of(site: Path | None) -> tuple[str, ...]:
    """Return the patients of a site's manifests, for whoever asks for their names."""
    from histoflare.site.kinds import KINDS
    from histoflare.site.site_file import read_site_file

    if site is None:
        raise typer.BadParameter("the ledger knows no names: --names needs the site's manifests (--site)")
    configuration = read_site_file(site)
    found: set[str] = set()
    for kind in KINDS.values():
        if kind.is_named(configuration):
            found |= {entry.patient for entry in kind.entries(configuration)}
    return tuple(sorted(found))


def _budgets(
    site: Path | None, policy_file: Path | None, epsilon: float | None, delta: float | None
) -> dict[Budget, list[str]]:
    """Return the budgets to show, and the scopes that have them; of a kit all of its scopes'."""
    from histoflare.privacy.budget import Budget
    from histoflare.privacy.own_policy import narrowed
    from histoflare.privacy.own_policy_file import read_layers, read_site_policy

    if (policy_file is None) == (epsilon is None and delta is None) and (policy_file or epsilon or delta):
        raise typer.BadParameter("give a budget with --policy, or with --epsilon and --delta")
    if policy_file is not None:
        holds = [read_site_policy(policy_file, site and real_path(site).parent)]
    elif epsilon is not None or delta is not None:
        if epsilon is None or delta is None:
            raise typer.BadParameter("give both --epsilon and --delta")
        return {Budget(epsilon, delta): []}
    elif site is not None and any(site.parent.glob("policy_*.toml")):
        signed, own = read_layers(real_path(site).parent)
        holds = [narrowed(policy, own) for name, policy in signed.items() if own.takes_part(name)]
    else:
        return {}
    found: dict[Budget, list[str]] = {}
    for policy in holds:
        if policy.protection is not None:
            found.setdefault(policy.protection.budget(), []).append(policy.name)
    return found


def _toml(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)

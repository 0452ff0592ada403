"""``histoflare ledger``: look at a site's privacy ledger, check it, and give back what a run will not use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histoflare.commands.console import console, make_table, out, print_json
from histoflare.errors import JobError

if TYPE_CHECKING:
    from histoflare.privacy.budget import Budget
    from histoflare.privacy.ledger import Ledger
    from histoflare.privacy.ledger.summary import RunSummary, Summary
    from histoflare.site.configuration import SiteConfiguration

app = typer.Typer(no_args_is_help=True)

SiteFile = Annotated[
    Path | None, typer.Option("--site", help="The site's own file, e.g. local/histoflare.toml.")
]
LedgerFile = Annotated[Path | None, typer.Option("--ledger", help="The ledger; instead of --site.")]
KeyFile = Annotated[Path | None, typer.Option("--key", help="The ledger's key; with --ledger.")]


@app.callback()
def _group() -> None:
    """Look at a site's privacy ledger, check it, and give back what a run will not use."""


@app.command()
def show(
    site: SiteFile = None,
    ledger: LedgerFile = None,
    key: KeyFile = None,
    policy: Annotated[Path | None, typer.Option(help="The policy whose budget counts.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="The budget's ε instead; with --delta.")] = None,
    delta: Annotated[float | None, typer.Option(help="The budget's δ; with --epsilon.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what was reserved, booked, let out or failed, and what is left of the budget. No patient is named.

    Example: histoflare ledger show --site local/histoflare.toml --policy local/policy_dp-patient.toml
    """
    opened, configuration = _open(site, ledger, key)
    summary = opened.summary(_budget(configuration, policy, epsilon, delta))
    if as_json:
        print_json(summary.to_json())
    else:
        _show(summary)


@app.command()
def verify(site: SiteFile = None, ledger: LedgerFile = None, key: KeyFile = None) -> None:
    """Check every entry, every patient and every cohort of the ledger. The exit code is 1 if it is damaged.

    Example: histoflare ledger verify --site local/histoflare.toml
    """
    opened, _ = _open(site, ledger, key)
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
    opened, _ = _open(site, ledger, key)
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
    opened, _ = _open(site, ledger, key)
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


def _open(
    site: Path | None, ledger: Path | None, key: Path | None
) -> tuple[Ledger, SiteConfiguration | None]:
    from histoflare.privacy.ledger import Ledger
    from histoflare.site.configuration import read_site_file

    if site is not None and ledger is None and key is None:
        configuration = read_site_file(site)
        return Ledger(configuration.ledger, configuration.ledger_key), configuration
    if site is None and ledger is not None and key is not None:
        return Ledger(ledger, key), None
    raise typer.BadParameter("give the site's own file with --site, or --ledger and --key")


def _budget(
    configuration: SiteConfiguration | None,
    policy_file: Path | None,
    epsilon: float | None,
    delta: float | None,
) -> Budget:
    from histoflare.privacy.budget import Budget
    from histoflare.privacy.policy import read_policy
    from histoflare.site.ledgers import budget_of

    if policy_file is not None and epsilon is None and delta is None:
        protection = read_policy(policy_file).protection
        if protection is None:
            raise JobError(f"{policy_file}: has no budget: nothing is booked under it.")
        if configuration is not None:
            return budget_of(protection, configuration)
        return Budget(protection.epsilon, protection.delta)
    if policy_file is not None or epsilon is None or delta is None:
        raise typer.BadParameter("give a budget with --policy, or with --epsilon and --delta")
    return Budget(epsilon, delta)


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
    _say(f"Budget of each patient: ε = {summary.budget_epsilon:g} {at}.")
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


def _date(unix_time: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(unix_time, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _say(text: str) -> None:
    out.print(text, soft_wrap=True, highlight=False, markup=False)

"""``histoflare job`` and ``histoflare resume``: look at a job, make a variant, go on after a lost server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import console, make_table, out, print_json
from histoflare.commands.options import Preset
from histoflare.errors import HistoflareError, JobError

if TYPE_CHECKING:
    from histoflare.flare.admin import Admin
    from histoflare.flare.job import Job

app = typer.Typer(no_args_is_help=True, help="Look at a job folder, or make a variant of one to submit.")


@app.command()
def show(
    job: Annotated[Path, typer.Argument(help="A job folder, e.g. jobs/mem_fedavg.")],
    preset: Preset = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what a job asks of the sites: purpose, scope, protocol with its hash, and every variable.

    Example: histoflare job show jobs/mem_fedavg

    Example: histoflare job show jobs/mem_dpsgd --preset per-site
    """
    from rich.table import Column, Table

    from histoflare.flare.job_choice import choose_job
    from histoflare.privacy.protocol import digest

    read = choose_job(job, preset).job
    facts: dict[str, Any] = {
        "job": read.name,
        "kind": read.kind,
        "purpose": read.purpose,
        "scope": read.scope,
        "strategy": read.strategy.name,
        "privacy": read.asked.to_json(),
        "protocol_sha256": digest(read.protocol),
        "protocol": read.protocol,
        "task": read.task.to_json(),
    }
    more = (
        "rounds",
        "start_round",
        "least_sites",
        "round_seconds",
        "answer_seconds",
        "seed",
        "best_metric",
        "run",
    )
    facts |= {name: getattr(read, name) for name in more}
    spends = _say_cost(read)
    if as_json:
        print_json(facts)
        return
    table = Table("name", Column("value", overflow="fold"), title=f"{job}", show_header=False)
    for name, value in _lines(facts):
        table.add_row(name, str(value))
    out.print(table)
    if spends:
        out.print(spends, highlight=False, markup=False, soft_wrap=True)


@app.command()
def make(
    job: Annotated[Path, typer.Argument(help="The job folder to start from.")],
    target: Annotated[Path, typer.Option("--out", help="Folder for the new job; must not exist.")],
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Change a variable of the job, e.g. least_sites=3.")
    ] = None,
    preset: Preset = None,
    scope: Annotated[str | None, typer.Option(help="Ask for another privacy scope.")] = None,
    sites: Annotated[str, typer.Option(help="Sites to deploy it to, separated by commas; none: all.")] = "",
    model: Annotated[
        Path | None, typer.Option(help="Model the job starts from or asks about; a run's folder will do.")
    ] = None,
) -> None:
    """Make a variant of a job: other figures, some of the sites, a model to start from.

    A variable that the protocol decides (rounds, labels, encoder, resolution) changes the protocol, and with
    it its hash: sites refuse it until they have agreed.

    A model goes to the server alone, so a job with one names its sites.

    Example: histoflare job make jobs/mem_evaluate --model demo-run/model.safetensors --sites a,b --out ask
    """
    from histoflare.flare.job import read_job
    from histoflare.flare.job_choice import choose_job
    from histoflare.flare.job_variant import write_variant
    from histoflare.flare.persistor import read_state
    from histoflare.model_file import read_model_header
    from histoflare.rounds.state import model_state

    before = None
    if model is not None:
        header = read_model_header(model)
        header.check_data(read_job(job).task.data)
        model = header.path
        before = {f"task.{name}": value for name, value in header.task.items() if name != "seed"}
    choice = choose_job(job, preset, setting or [], before=before)
    made = choice.job
    names = _site_names(sites) if sites else None
    if model is not None:
        read_state(model, like=made.strategy.begin(model_state(made.task.build_model())))
    if names is not None and len(names) < made.least_sites:
        raise JobError(
            f"--sites names {len(names)}, and the job needs updates of {made.least_sites} (--set "
            "least_sites=…)."
        )
    write_variant(job, target, choice.changes, sites=names, scope=scope or choice.scope, start_model=model)
    console.print(f"job: {target}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def submit(
    job: Annotated[Path, typer.Argument(help="A job folder, e.g. jobs/mem_fedavg.")],
    kit: Annotated[Path, typer.Option(help="The startup kit of whoever submits it.")],
    preset: Preset = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end, and say how it ended.")] = False,
) -> None:
    """Submit a job to the server of a kit, print its id, and with --wait show its state until it has ended.

    Whatever lies in or below the current folder is not looked at; FLARE's own command would take code from
    there.

    Example: histoflare job submit jobs/mem_dpsgd --kit kits/histoflare/prod_00/lead@consortium.example --wait
    """
    from histoflare.flare.admin import Admin, read_administrator
    from histoflare.flare.job_choice import choose_job
    from histoflare.flare.job_variant import write_variant
    from histoflare.flare.poc import COMPLETED

    choice = choose_job(job, preset)
    admin = Admin(read_administrator(kit), kit)
    refusals = ""
    try:
        with TemporaryDirectory(prefix="histoflare-") as scratch:
            submitted = job
            if preset is not None:
                place = Path(scratch) / job.resolve().name
                submitted = write_variant(job, place, choice.changes, scope=choice.scope)
            job_id = admin.submit(submitted)
        out.print(job_id, highlight=False, soft_wrap=True)
        if not wait:
            return
        with console.status("submitted") as shown:
            status = admin.wait(job_id, choice.job.longest_seconds, shown.update)
        if status != COMPLETED:
            refusals = _say_refusals(admin, job_id)
    finally:
        admin.disconnect()
    table = make_table("job", "name", "status")
    table.add_row(job_id, job.resolve().name, status)
    out.print(table)
    if status != COMPLETED:
        raise JobError(f"The job {job_id} ended with {status}.{refusals}", reason="JOB_FAILED")


def _say_cost(job: Job) -> str:
    """Return what a job spends of the budget that it is made for; nothing where nothing protects."""
    from histoflare.privacy.plan import Noisy
    from histoflare.privacy.words import say_cost, say_delta, say_room

    if not isinstance(job.plan, Noisy):
        return ""
    budget = job.plan.budget()
    cost = budget.cost(job.plan.spend().times(job.rounds))
    spent = say_cost(budget.epsilon_of(cost), budget.epsilon)
    return f"This job spends ε = {spent} at δ = {say_delta(budget.delta)}; {say_room(budget, cost, cost)}."


def _say_refusals(admin: Admin, job_id: str) -> str:
    """Return which sites refused a job that failed, why, and what a lead can do about it."""
    from histoflare.flare.result import read_result
    from histoflare.report.reasons import advise, explain

    with TemporaryDirectory(prefix="histoflare-") as scratch:
        try:
            refused = read_result(admin.download(job_id, Path(scratch)) / "workspace").refused
        except (HistoflareError, OSError, ValueError):
            return ""  # how it ended is known all the same
    lines = [f"{site}: {code}: {explain(code)}" for site, code in sorted(refused.items())]
    lines += sorted({advice for code in refused.values() if (advice := advise(code))})
    return "".join(f"\n  {line}" for line in lines)


def resume(
    run: Annotated[Path, typer.Argument(help="The server's folder of the job, or what a download brought.")],
    target: Annotated[Path, typer.Option("--out", help="Folder for the new job; must not exist.")],
    sites: Annotated[
        str, typer.Option(help="Sites to deploy it to, separated by commas; none: those of the run.")
    ] = "",
) -> None:
    """Make a job that goes on after one that was lost: from its last global model and round.

    FLARE itself cannot go on after the loss of its server. Submit the new job as any other; the sites find
    what they kept of the run by its name.

    Example: histoflare resume server/4c1f…/ --out resumed && nvflare job submit -j resumed
    """
    from histoflare.flare.resume import read_run, write_resumed

    if target.exists():
        raise JobError(f"{target}: exists already; give a folder that does not.")
    stopped = read_run(run)
    if sites:
        stopped = replace(stopped, sites=tuple(_site_names(sites)))
    write_resumed(stopped, target)
    console.print(
        f"job: {target} (run {stopped.run}, from round {stopped.next_round} on)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _site_names(text: str) -> list[str]:
    from histoflare.flare.kits import SERVER, SITE_NAME

    names = [name.strip() for name in text.split(",")]
    wrong = [name for name in names if not SITE_NAME.fullmatch(name) or name == SERVER]
    if wrong or len(set(names)) < len(names):
        raise JobError(
            f"--sites takes names of sites separated by commas, each once, not '{text}'; without --sites the "
            "job is for all."
        )
    return names


def _lines(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        rows += _lines(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows

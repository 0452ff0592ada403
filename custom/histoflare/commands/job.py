"""``histoflare job`` and ``histoflare resume``: look at a job, make a variant, go on after a lost server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from histoflare.commands.console import console, make_table, out, print_json
from histoflare.errors import JobError

app = typer.Typer(no_args_is_help=True, help="Look at a job folder, or make a variant of one to submit.")


@app.command()
def show(
    job: Annotated[Path, typer.Argument(help="A job folder, e.g. jobs/mem_fedavg.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what a job asks of the sites: purpose, scope, protocol with its hash, and every variable.

    Example: histoflare job show jobs/mem_fedavg
    """
    from rich.table import Column, Table

    from histoflare.flare.job import read_job
    from histoflare.privacy.protocol import digest

    read = read_job(job)
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
    if as_json:
        print_json(facts)
        return
    table = Table("name", Column("value", overflow="fold"), title=f"{job}", show_header=False)
    for name, value in _lines(facts):
        table.add_row(name, str(value))
    out.print(table)


@app.command()
def make(
    job: Annotated[Path, typer.Argument(help="The job folder to start from.")],
    target: Annotated[Path, typer.Option("--out", help="Folder for the new job; must not exist.")],
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Change a variable of the job, e.g. least_sites=3.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Take the figures of a preset of the job (its folder presets/).")
    ] = None,
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
    from histoflare.flare.job_variant import parse_settings, read_preset, try_variant, write_variant
    from histoflare.flare.persistor import read_state
    from histoflare.model_file import find_model_file
    from histoflare.rounds.state import model_state

    read_job(job)
    chosen = read_preset(job, preset) if preset else None
    changes = (chosen.changes if chosen else {}) | parse_settings(setting or [])
    scope = scope or (chosen.scope if chosen else None)
    if model is not None:
        model = find_model_file(model)
        changes = model_task(model) | changes
    names = _site_names(sites) if sites else None
    made = try_variant(job, changes)
    if model is not None:
        read_state(model, like=made.strategy.begin(model_state(made.task.build_model())))
    if names is not None and len(names) < made.least_sites:
        raise JobError(
            f"--sites names {len(names)}, and the job needs updates of {made.least_sites} (--set "
            "least_sites=…)."
        )
    write_variant(job, target, changes, sites=names, scope=scope, start_model=model)
    console.print(f"job: {target}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def submit(
    job: Annotated[Path, typer.Argument(help="A job folder, e.g. jobs/mem_fedavg.")],
    kit: Annotated[Path, typer.Option(help="The startup kit of whoever submits it.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end, and say how it ended.")] = False,
) -> None:
    """Submit a job to the server of a kit, print its id, and with --wait show its state until it has ended.

    Whatever lies in or below the current folder is not looked at; FLARE's own command would take code from
    there.

    Example: histoflare job submit jobs/mem_dpsgd --kit kits/histoflare/prod_00/lead@consortium.example --wait
    """
    from histoflare.flare.admin import Admin, read_administrator
    from histoflare.flare.job import read_job
    from histoflare.flare.poc import COMPLETED

    read = read_job(job)
    admin = Admin(read_administrator(kit), kit)
    try:
        job_id = admin.submit(job)
        out.print(job_id, highlight=False, soft_wrap=True)
        if not wait:
            return
        with console.status("submitted") as shown:
            status = admin.wait(job_id, read.longest_seconds, shown.update)
    finally:
        admin.disconnect()
    table = make_table("job", "name", "status")
    table.add_row(job_id, job.resolve().name, status)
    out.print(table)
    if status != COMPLETED:
        raise JobError(f"The job {job_id} ended with {status}.", reason="JOB_FAILED")


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


def model_task(model: Path) -> dict[str, Any]:
    """Return the changes that give a job the task a model was trained for.

    Raises:
        JobError: The file is missing or does not say its task.
    """
    from histoflare.model_file import read_model_header

    task = read_model_header(model).task
    return {f"task.{name}": value for name, value in task.items() if name != "seed"}


def _lines(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        rows += _lines(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows

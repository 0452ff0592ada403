"""``histoflare job`` and ``histoflare resume``: look at a job, make a variant, go on after a lost server."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import make_table, out, print_json, progress, say, tell
from histoflare.commands.options import JOB_HELP, Preset
from histoflare.commands.result import show_result
from histoflare.errors import HistoflareError, JobError, list_lines
from histoflare.shipped import find_job

if TYPE_CHECKING:
    from histoflare.flare.admin import Admin

app = typer.Typer(
    no_args_is_help=True, help="Look at a job, make a variant of one, submit it, see what came back."
)
app.command("result")(show_result)


@app.command()
def show(
    job: Annotated[Path, typer.Argument(help=JOB_HELP)],
    preset: Preset = None,
    policies: Annotated[
        Path | None,
        typer.Option(help="Say what these policies allow: a kit, a folder of kits, provisioning, a policy."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what a job asks of the sites: purpose, scope, protocol with its hash, start, cost, every variable.

    Example: histoflare job show mem_fedavg

    Example: histoflare job show mem_dpsgd --preset per-site --policies provisioning
    """
    from rich.table import Column, Table

    from histoflare.flare.job_choice import choose_job
    from histoflare.flare.job_variant import flatten
    from histoflare.lab.job_facts import (
        find_allowances,
        find_cost,
        find_evaluation_cost,
        say_allowance,
        say_cost,
        say_evaluation,
        say_start,
    )
    from histoflare.privacy.protocol import hash_protocol

    job = find_job(job)
    read = choose_job(job, preset).job
    facts: dict[str, Any] = {
        "job": read.name,
        "kind": read.kind,
        "purpose": read.purpose,
        "scope": read.scope,
        "strategy": _settings(read.strategy),
        "transport": _settings(read.transport),
        "privacy": read.asked.to_json(),
        "protocol_sha256": hash_protocol(read.protocol),
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
        "evaluate",
        "run",
    )
    facts |= {name: getattr(read, name) for name in more}
    facts["evaluation_only"] = list(read.evaluation_only)
    facts |= {"starts": say_start(read), "cost": find_cost(read)}
    if read.tally is not None:
        facts["evaluation_cost"] = find_evaluation_cost(read)
    allowed = None if policies is None else find_allowances(read, policies)
    if as_json:
        print_json(facts | ({} if allowed is None else {"allowed": allowed}))
        return
    facts["cost"] = say_cost(read, facts["cost"])
    if read.tally is not None:
        facts["evaluation_cost"] = say_evaluation(read)
    table = Table("name", Column("value", overflow="fold"), title=read.name, show_header=False)
    for name, value in flatten(facts).items():
        table.add_row(name, str(value))
    out.print(table)
    for each in allowed or ():
        tell(say_allowance(each))


@app.command()
def make(
    job: Annotated[Path, typer.Argument(help=f"Where to start from. {JOB_HELP}")],
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
    it its hash: sites refuse it until they have agreed. The command says so, and what to agree on.

    A model goes to the server alone, so a job with one names its sites. An evaluation has the protocol that
    the model was trained under, where the job lies beside it as in a download, and asks about its run.

    Example: histoflare job make mem_evaluate --model result/JOB_ID --sites a,b --out ask
    """
    from histoflare.flare.job import read_job
    from histoflare.flare.job_choice import choose_job
    from histoflare.flare.job_schema import EVALUATION
    from histoflare.flare.job_variant import write_variant
    from histoflare.flare.persistor import read_handed_out, read_state
    from histoflare.flare.result import find_protocol
    from histoflare.lab.job_facts import say_protocol_change
    from histoflare.model_file import read_model_header
    from histoflare.privacy.policy import POLICIES
    from histoflare.privacy.protocol import hash_protocol
    from histoflare.rounds.state import model_state

    job = find_job(job)
    before = header = None
    if model is not None:
        header = read_model_header(model)
        header.check_data(read_job(job).task.data)
        model = header.path
        before = {f"task.{name}": value for name, value in header.task.items() if name != "seed"}
        if read_job(job).kind == EVALUATION:
            protocol = find_protocol(model, header.protocol_sha256 or "") or {}
            before |= {f"protocol.{name}": value for name, value in protocol.items()} | {"run": header.run}
    choice = choose_job(job, preset, setting or [], before=before)
    made = choice.job
    names = _site_names(sites) if sites else None
    if model is not None:
        if made.kind == EVALUATION:
            read_handed_out(model, made.task)
        else:
            read_state(model, like=model_state(made.task.build_model()))
    if names is not None and len(names) < made.least_sites:
        raise JobError(
            f"--sites names {len(names)}, and the job needs updates of {made.least_sites} (--set "
            "least_sites=…)."
        )
    write_variant(job, target, choice.changes, sites=names, scope=scope or choice.scope, start_model=model)
    if header is not None and header.protocol_sha256 not in (None, hash_protocol(made.protocol)):
        say(
            "The model was trained under another protocol than this job has; sites that agreed to that alone "
            "refuse it (PROTOCOL_MISMATCH). Give the whole download as --model, or set protocol.… so.",
            style="yellow",
        )
    known = sorted(path.stem for path in POLICIES.glob("*.toml"))
    if scope is not None and scope not in known:
        say(
            f"No policy '{scope}' comes with histoflare ({', '.join(known)} do): a site whose kit has none "
            "of this name refuses the job (SCOPE_UNKNOWN).",
            style="yellow",
        )
    say(f"job: {target}")
    of_the_model = header is not None and header.protocol_sha256 == hash_protocol(made.protocol)
    if not of_the_model and (said := say_protocol_change(read_job(job).protocol, made.protocol, target)):
        say(said, style="yellow")


@app.command()
def submit(
    job: Annotated[Path, typer.Argument(help=JOB_HELP)],
    kit: Annotated[Path, typer.Option(help="The startup kit of whoever submits it.")],
    preset: Preset = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end, and say how it ended.")] = False,
) -> None:
    """Submit a job to the server of a kit, print its id, and with --wait show its state until it has ended.

    Whatever lies in or below the current folder is not looked at; FLARE's own command would take code from
    there.

    Example: histoflare job submit mem_dpsgd --kit kits/histoflare/prod_00/lead@consortium.example --wait
    """
    from histoflare.flare.admin import Admin, read_administrator
    from histoflare.flare.job_choice import choose_job
    from histoflare.flare.job_variant import write_variant
    from histoflare.flare.poc import COMPLETED

    job = find_job(job)
    choice = choose_job(job, preset)
    admin = Admin(read_administrator(kit), kit)
    sites = ""
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
        with progress() as bars:
            bar = bars.add_task("the job", total=None)

            def show(status: str) -> None:
                bars.update(bar, description=f"the job: {status}")

            status = admin.wait(job_id, choice.job.longest_seconds, show)
            bars.update(bar, total=1, completed=1)
        sites = _say_sites(admin, job_id, choice.job.rounds)
    finally:
        admin.disconnect()
    table = make_table("job", "name", "status")
    table.add_row(job_id, job.resolve().name, status)
    out.print(table)
    if status != COMPLETED:
        raise JobError(f"The job {job_id} ended with {status}.{sites}", reason="JOB_FAILED")
    say(sites.lstrip("\n"))


def _say_sites(admin: Admin, job_id: str, rounds: int) -> str:
    """Return how each site fared in a job that has ended, and what a lead can do about it."""
    from histoflare.flare.result import read_result
    from histoflare.report.outcomes import list_codes, say_sites
    from histoflare.report.participation import say_advice

    with TemporaryDirectory(prefix="histoflare-") as scratch:
        try:
            deployment = admin.deployment(job_id)
            result = read_result(admin.download(job_id, Path(scratch)) / "workspace")
        except (HistoflareError, OSError, ValueError):
            return ""  # how it ended is known all the same
    outcomes = result.outcomes(deployment)
    lines = [f"Given up: {result.given_up}."] if result.given_up else []
    codes = list_codes(outcomes)
    lines += [*say_sites(outcomes, rounds), *say_advice(codes)]
    if codes:
        lines.append("More than its code leaves no site: what its own people can do stands in its log.txt.")
    return list_lines(lines)


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
    say(f"job: {target} (run {stopped.run}, from round {stopped.next_round + 1} on)")


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


def _settings(part: Any) -> dict[str, Any]:
    """Return the name and the fields of a strategy or a transport, which are dataclasses."""
    return {"name": part.name, **asdict(part)}

"""``histoflare poc``: a federation of real FLARE processes on this machine, for work with the console."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import console, make_table, out, print_json, progress, say, say_fitted
from histoflare.commands.options import DEFAULT_JOB, JOB_HELP, AsJson, Preset
from histoflare.errors import HistoflareError, JobError
from histoflare.shipped import JOBS, find_job

if TYPE_CHECKING:
    from histoflare.flare.poc import Federation
    from histoflare.site.configuration import SiteConfiguration

app = typer.Typer(no_args_is_help=True)

Workspace = Annotated[Path, typer.Option("--workspace", help="Folder for the kits and logs.")]

DEFAULT_WORKSPACE = Path("poc-run")
MADE_UP_SLIDES, MADE_UP_PATIENTS = 4, 16
"""Of each made-up site. Half of the patients test, so that policies let its figures of each class out."""
MADE_UP_PATCHES = 4


@app.callback()
def _group() -> None:
    """A federation of real FLARE processes on this machine."""


@app.command()
def start(
    workspace: Workspace = DEFAULT_WORKSPACE,
    sites: Annotated[
        Path | None,
        typer.Option(
            help="Folder with one <site>/manifest.csv (or <site>.csv) per site; none: made-up sites."
        ),
    ] = None,
    bags: Annotated[
        Path | None, typer.Option(help="Folder with one <site>/ of bags each; none: <site>/bags in --sites.")
    ] = None,
    job: Annotated[Path, typer.Option(help=f"Whose protocol the sites agree to. {JOB_HELP}")] = DEFAULT_JOB,
    preset: Preset = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Sites make missing or stale bags before their first round.")
    ] = False,
    project: Annotated[
        Path | None, typer.Option(help="Project file whose builders and administrators are used.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prepare and start a server and one client per site, and leave them up until 'histoflare poc stop'.

    The sites agree to the protocol of a job that fits their bags or images: the one that is then to be
    submitted is in the workspace, and its command is shown.

    Example: histoflare poc start --sites demo-run/slides --bags demo-run/bags

    Example: histoflare poc start --sites my-sites --prepare
    """
    from histoflare.flare.job_choice import choose_job
    from histoflare.flare.kits import Agreement
    from histoflare.flare.poc import Federation, refuse_running

    refuse_running(workspace)
    job = find_job(job)
    task = choose_job(job, preset).job.task
    chosen = (
        _configure(sites, bags, task.data, prepare)
        if sites is not None
        else _made_up(workspace / "sites", job, task)
    )
    from histoflare.lab.fitted_job import JOBS_FOLDER, write_fitted  # FLARE and PyTorch: seconds
    from histoflare.lab.sites import with_ledgers
    from histoflare.lab.watch import Watch

    chosen = with_ledgers(chosen, workspace)
    jobs, watch = workspace / JOBS_FOLDER, Watch(on_warning=lambda text: say(text, style="yellow"))
    agreed = write_fitted(job, preset, chosen, task.data, jobs, watch, say_fitted)
    with console.status("kits"):
        federation = Federation.prepare(workspace, chosen, Agreement(agreed, project=project))
    with console.status(f"starting the server and {len(chosen)} sites"):
        federation.start(detached=True)
    _show(federation, as_json)


@app.command()
def status(workspace: Workspace = DEFAULT_WORKSPACE, as_json: AsJson = False) -> None:
    """Show who is up, the server's jobs, and how to connect a console.

    After a restart of the machine nobody is up; it says how to go on.

    Example: histoflare poc status --workspace poc-run
    """
    from histoflare.flare.poc import Federation

    _show(Federation.open(workspace), as_json)


@app.command()
def stop(workspace: Workspace = DEFAULT_WORKSPACE) -> None:
    """End all processes of a federation, those too that a kit's own script started; kits, logs and jobs stay.

    Example: histoflare poc stop --workspace poc-run
    """
    from histoflare.flare.poc import Federation

    federation = Federation.open(workspace)
    with console.status("stopping"):
        federation.stop()
    console.print("stopped", highlight=False)


def _configure(
    folder: Path, bags: Path | None, data: str, prepare: bool = False
) -> dict[str, SiteConfiguration]:
    """Return the sites of a folder; an external cohort only evaluates."""
    from histoflare.lab.sites import find_sites
    from histoflare.site.kinds import kind_of

    kind = kind_of(data)
    training, external = find_sites(folder, kind).configure(kind, bags, prepare=prepare)
    chosen = training | external
    gone = [path for site in chosen.values() for path in kind.paths(site) if not path.exists()]
    if gone and not prepare:
        raise JobError(
            f"There is no {gone[0]}. Make the bags (histoflare prepare), give --bags, or let the sites make "
            "them (--prepare)."
        )
    return chosen


def _made_up(folder: Path, job: Path, task: Any) -> dict[str, SiteConfiguration]:
    """Return made-up sites with the bags that a job's task wants; those that are there are kept."""
    from histoflare.bags.encoder import load_encoder_of
    from histoflare.site.kinds import BAGS
    from histoflare.synthetic.bags import FieldParameters, make_bags
    from histoflare.synthetic.slides import SyntheticCohort

    BAGS.expect(task, f"{job}: trains on {task.data}; give your own with --sites.")
    cohort = SyntheticCohort(
        slides_per_hospital=MADE_UP_SLIDES,
        slides_external=MADE_UP_SLIDES,
        more_patients=MADE_UP_PATIENTS,
        more_external=MADE_UP_PATIENTS // 2,
    )
    field = FieldParameters(MADE_UP_PATCHES, task.patch_px, task.mpp)
    encoder = load_encoder_of(task.encoder)
    with progress() as bars:
        bar = bars.add_task("made-up bags", total=None)
        make_bags(
            folder, encoder, cohort, field, lambda done, total: bars.update(bar, completed=done, total=total)
        )
    return _configure(folder, None, task.data)


def _show(federation: Federation, as_json: bool) -> None:
    facts = _facts(federation)
    if as_json:
        print_json(facts)
        return
    table = make_table("participant", "process", "registered")
    for name, row in facts["participants"].items():
        registered = {True: "yes", False: "no", None: ""}[row["registered"]]
        table.add_row(name, "up" if row["up"] else "down", registered)
    out.print(table)
    if facts["jobs"]:
        jobs = make_table("job", "name", "status")
        for one in facts["jobs"]:
            jobs.add_row(one["job_id"], one["job_name"], one["status"])
        out.print(jobs)
    if not any(row["up"] for row in facts["participants"].values()):
        say(
            "Nobody is up: the processes were ended, or the machine was restarted. 'histoflare poc start' "
            "begins anew, with new kits and the ledgers that are there. To keep kits and jobs, run "
            "startup/start.sh of the server's kit, then of each site's; 'histoflare poc stop' ends them.",
            style="yellow",
        )
    for what, command in {"kits": facts["kits"], "logs": facts["logs"], **facts["commands"]}.items():
        say(f"{what}:\n  {command}")


def _facts(federation: Federation) -> dict[str, Any]:
    from histoflare.lab.fitted_job import JOBS_FOLDER

    kits = federation.kits
    up = federation.up()
    registered: list[str] | None = None
    jobs: list[dict[str, Any]] = []
    if kits.server in up:
        try:
            registered, jobs = federation.admin.registered(), federation.admin.jobs()
        except HistoflareError as error:
            say(str(error), style="yellow")
        finally:
            federation.admin.disconnect()
    participants = {
        name: {
            "up": name in up,
            "registered": None if name == kits.server else name in (registered or []),
        }
        for name in (kits.server, *kits.sites)
    }
    programs = Path(sys.executable).parent
    histoflare = f"{programs}/histoflare"
    kit = kits.kit(kits.lead)
    agreed = Path(kits.protocol or "JOB")
    given = agreed.name if agreed.parent == JOBS else agreed
    fitted = next(iter(sorted((federation.workspace / JOBS_FOLDER).glob("*"))), given)
    return {
        "workspace": str(federation.workspace),
        "kits": kits.folder,
        "logs": str(federation.workspace / "logs"),
        "port": kits.port,
        "participants": participants,
        "jobs": [{name: one[name] for name in ("job_id", "job_name", "status")} for one in jobs],
        "commands": {
            "console": f"PATH={shlex.quote(str(programs))}:$PATH {shlex.quote(f'{kit}/startup/fl_admin.sh')}",
            "submit a job": shlex.join([histoflare, "job", "submit", str(fitted), "--kit", str(kit)]),
            "stop": shlex.join([histoflare, "poc", "stop", "--workspace", str(federation.workspace)]),
        },
    }

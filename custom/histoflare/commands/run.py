"""``histoflare run``: a job over prepared bags, for one seed or several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import out, print_json, progress, say, say_fitted, say_refused, watch_on
from histoflare.commands.options import (
    DEFAULT_JOB,
    DEVICE_HELP,
    EPSILONS_HELP,
    JOB_HELP,
    RUNTIME_HELP,
    Preset,
    Settings,
    read_device,
    read_epsilons,
    read_seeds,
)
from histoflare.errors import JobError
from histoflare.lab.experiment import Runtime
from histoflare.shipped import find_job

if TYPE_CHECKING:
    from rich.table import Table


SUMMARY_FILE = "summary.json"


def run(
    sites: Annotated[
        Path,
        typer.Option(
            help="Folder with one <site>/manifest.csv, for images <site>/images.csv (or <site>.csv) per site."
        ),
    ],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the reports and models.")],
    bags: Annotated[
        Path | None,
        typer.Option(
            help="Folder with one <site>/ of bags each (histoflare prepare); none: beside manifests."
        ),
    ] = None,
    job: Annotated[Path, typer.Option(help=JOB_HELP)] = DEFAULT_JOB,
    runtime: Annotated[Runtime, typer.Option(help=RUNTIME_HELP)] = Runtime.INPROCESS,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "1",
    preset: Preset = None,
    setting: Settings = None,
    epsilons: Annotated[str, typer.Option(help=EPSILONS_HELP)] = "",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run a job on prepared bags or on images: federated, every site alone, all pooled; compare them.

    Labels, encoder, width, side and resolution of the patches are those of the bags and manifests that are
    there, unless --set says otherwise. A site whose data do not fit is left out with its reason; the exit
    code is then 3. A run that was stopped begins its rounds anew.

    Example: histoflare run --sites my-sites --bags my-run/bags --out my-run/seeds --seeds 1,2,3

    Example: histoflare run --sites my-sites --bags my-run/bags --out run --set rounds=50

    Example: histoflare run --job dhunet_fedavg --sites my-images --out run --set rounds=20
    """
    from histoflare.flare.job import read_job
    from histoflare.flare.job_choice import choose_job, facts_of
    from histoflare.flare.job_variant import parse_settings
    from histoflare.lab.earlier_run import claim_output
    from histoflare.lab.experiment import Experiment
    from histoflare.lab.fitted_job import JOBS_FOLDER, refuse_written, write_chosen
    from histoflare.lab.pages import write_site_pages
    from histoflare.lab.run import REPORT_FILE, run_watched
    from histoflare.lab.sites import find_sites
    from histoflare.lab.summary import summarise
    from histoflare.report.headline import closing_words
    from histoflare.site.kinds import kind_of
    from histoflare.storage import write_json

    job = find_job(job)
    kind = kind_of(read_job(job).task.data)
    found = find_sites(sites, kind)
    if "seed" in parse_settings(setting or []):
        raise JobError("--set seed=…: seeds are given with --seeds.")
    budgets, where = read_epsilons(epsilons), read_device(device)
    choice = choose_job(job, preset, setting or [], kind.find(found.configure(kind, bags)[0]))
    say_fitted(choice)
    numbers = read_seeds(seeds)
    of_bags = None if bags is None else str(bags.resolve())
    claim_output(out_dir, {"sites": found.to_json(), "bags": of_bags, "job": facts_of(choice.job)})
    reports = []
    refused: dict[str, str] = {}
    with progress() as bars:
        for seed in numbers:
            if len(numbers) > 1:
                say(f"seed {seed}:")
            folder = out_dir / f"seed-{seed}"
            refuse_written(job, folder / JOBS_FOLDER)
            seeded = replace(choice, changes=choice.changes | {"seed": seed})
            made = write_chosen(seeded, folder / JOBS_FOLDER)
            experiment = Experiment(made, *found.configure(kind, bags, folder, device=where), runtime, where)
            watch = watch_on(bars)
            outcome = run_watched(experiment, folder, watch, budgets)
            write_site_pages(experiment, outcome, folder, watch)
            reports.append(outcome.report)
            refused |= outcome.refused
    summary = summarise(reports)
    write_json(out_dir / SUMMARY_FILE, summary, public=True)
    if as_json:
        print_json(summary)
    else:
        out.print(show_summary(summary))
        if words := closing_words(reports):
            out.print(words, highlight=False, markup=False)
        written = (out_dir / f"seed-{seed}" / REPORT_FILE for seed in summary["seeds"])
        say(f"reports: {', '.join(map(str, written))}; beside each, report.html and every site's page")
    say_refused(refused)
    raise typer.Exit(3 if refused else 0)


def show_summary(summary: dict[str, Any]) -> Table:
    """Return the summary as a table."""
    from rich.markup import escape
    from rich.table import Table

    from histoflare.report.figures import kind_of

    kind = kind_of(summary)
    shown = [figure for figure in kind.names if figure in kind.charted]  # more do not fit in 80 columns
    seeds = ", ".join(str(seed) for seed in summary["seeds"])
    title = f"{summary['job']}: {_say_rounds(summary)}, seeds {seeds} (mean ± sd over seeds)"
    table = Table(title=title)
    table.add_column("test patients")
    table.add_column("model")
    for figure in shown:
        table.add_column(kind.names[figure], justify="right")
    captions = ["local: the mean of the sites' own models"]
    if "pooled_unprotected" in next(iter(summary["cohorts"].values())):
        captions.append("unprotected: the same steps and clip without noise (ε = ∞)")
    table.caption = "\n".join([*captions, *map(escape, summary["missing"])])
    for cohort, models in summary["cohorts"].items():
        for model, figures in models.items():
            table.add_row(cohort, model.replace("_", ", "), *(_cell(figures[figure]) for figure in shown))
        table.add_section()
    return table


def _say_rounds(summary: dict[str, Any]) -> str:
    planned, run = summary["rounds"], summary["rounds_run"]
    if set(run) == {planned}:
        return f"{planned} rounds"
    ends = str(run[0]) if len(set(run)) == 1 else f"{min(run)} to {max(run)}"
    return f"{ends} of {planned} rounds"


def _cell(spread: dict[str, float | None]) -> str:
    if spread["mean"] is None:
        return "–"
    return f"{spread['mean']:.3f}" + (f" ± {spread['sd']:.3f}" if spread["sd"] is not None else "")

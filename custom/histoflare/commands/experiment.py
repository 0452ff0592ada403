"""``histoflare experiment``: questions that a researcher asks of sites on one workstation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import out, print_json, progress, say, say_fitted, watch_on
from histoflare.commands.options import (
    DEFAULT_JOB,
    DEVICE_HELP,
    JOB_HELP,
    Preset,
    Settings,
    read_device,
    read_seeds,
)
from histoflare.errors import JobError
from histoflare.shipped import find_job

if TYPE_CHECKING:
    from rich.table import Table

    from histoflare.flare.job import Job
    from histoflare.lab.strategy_comparison import Setup

app = typer.Typer(no_args_is_help=True, help="Compare ways to work together, on one workstation.")

STRATEGIES_FILE, STRATEGIES_PAGE = "strategies.json", "strategies.html"
CONTRIBUTIONS_FILE = "contributions.json"


@app.callback()
def _group() -> None:
    """Compare ways to work together, on one workstation."""


@app.command()
def strategies(
    sites: Annotated[
        list[Path],
        typer.Option(help="One <site>/manifest.csv (or images.csv) per site; may be given again."),
    ],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the figures and the page.")],
    bags: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with one <site>/ of bags each, for each --sites; none: beside manifests."),
    ] = None,
    job: Annotated[Path, typer.Option(help=JOB_HELP)] = DEFAULT_JOB,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="A strategy with its fields, and the task's as task.…, e.g. 'fedprox mu=0.1 "
            "task.learning_rate=0.01'; may be given again. None: all of them."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "1,2,3",
    figure: Annotated[str, typer.Option(help="Which figure; none: balanced accuracy, or Dice.")] = "",
    preset: Preset = None,
    setting: Settings = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Try strategies beside one another: mean over the sites, the worst one, how soon, and what is sent.

    Every strategy trains the job's model with the job's steps, in this process, on the same patients. What a
    strategy is worth depends on how the sites differ: make other splits of the same patients with manifest
    partition, and give each as --sites. Fields other than the defaults decide as much as the strategy does:
    give one several times with other fields.

    Example: histoflare experiment strategies --sites my-sites --bags my-run/bags --out compared

    Example: histoflare experiment strategies --sites even --sites uneven --strategy fedavg
    --strategy 'fedprox mu=0.1' --out compared
    """
    from histoflare.lab.strategy_comparison import compare_strategies, main_figure, parse_strategy
    from histoflare.report.strategies_page import write_strategies
    from histoflare.rounds.strategies import STRATEGIES
    from histoflare.storage import write_json

    if bags and len(bags) != len(sites):
        raise JobError(
            f"--bags: {len(bags)} folders for {len(sites)} of --sites; give one for each, in order."
        )
    where = read_device(device)
    with progress() as bars:
        watch = watch_on(bars)
        splits = _load(find_job(job), preset, setting or [], read_seeds(seeds), sites, bags, watch, where)
        for first, *_ in splits.values():
            for text in strategy or []:
                parse_strategy(text, list(first.sites))  # what a person names is there, or it is an error
        found = compare_strategies(
            splits,
            strategy or list(STRATEGIES),
            figure or main_figure(first.job.task.data),
            device=where,
            watch=watch,
        )
    write_json(out_dir / STRATEGIES_FILE, found, public=True)
    write_strategies(found, out_dir / STRATEGIES_PAGE)
    if as_json:
        print_json(found)
        return
    for split in found["splits"]:
        out.print(_show(found, split))
    say(f"page: {out_dir / STRATEGIES_PAGE}; figures: {out_dir / STRATEGIES_FILE}")


@app.command()
def contribution(
    sites: Annotated[Path, typer.Option(help="One <site>/manifest.csv (or images.csv) per site.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the figures.")],
    bags: Annotated[
        Path | None, typer.Option(help="Folder with one <site>/ of bags each; none: beside manifests.")
    ] = None,
    job: Annotated[Path, typer.Option(help=JOB_HELP)] = DEFAULT_JOB,
    seed: Annotated[int, typer.Option(help="Of the trainings, and of orders that are drawn.")] = 1,
    orders: Annotated[int, typer.Option(min=4, help="Orders of joining drawn of more than 6 sites.")] = 24,
    figure: Annotated[str, typer.Option(help="Which figure; none: balanced accuracy, or Dice.")] = "",
    preset: Preset = None,
    setting: Settings = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Say what each site adds to the model: Shapley values, and what is lost without it.

    The job is trained by every coalition of up to 6 sites (63 trainings), of more by those of drawn orders of
    joining, with an interval. Models are asked about the external cohort; where there is none, about the
    test patients of all sites together.

    Example: histoflare experiment contribution --sites my-sites --bags my-run/bags --out worth
    """
    from histoflare.lab.contributions import find_contributions
    from histoflare.lab.strategy_comparison import main_figure
    from histoflare.storage import write_json

    where = read_device(device)
    with progress() as bars:
        watch = watch_on(bars)
        beside = None if bags is None else [bags]
        loaded = _load(find_job(job), preset, setting or [], [seed], [sites], beside, watch, where)
        (setup,) = next(iter(loaded.values()))
        chosen = figure or main_figure(setup.job.task.data)
        found = find_contributions(setup, chosen, orders=orders, device=where, watch=watch)
    write_json(out_dir / CONTRIBUTIONS_FILE, found, public=True)
    if as_json:
        print_json(found)
        return
    out.print(_show_contributions(found))
    say(f"figures: {out_dir / CONTRIBUTIONS_FILE}")


def _load(
    job: Path,
    preset: str | None,
    settings: list[str],
    seeds: list[int],
    folders: list[Path],
    bags: list[Path] | None,
    watch: Any,
    device: str,
) -> dict[str, list[Setup]]:
    """Return folder → its data, and the job that fits the first folder's, for each seed."""
    from histoflare.flare.job import read_job
    from histoflare.flare.job_choice import choose_job
    from histoflare.lab.experiment import Experiment
    from histoflare.lab.loading import load_experiment
    from histoflare.lab.sites import EXTERNAL, find_sites
    from histoflare.lab.strategy_comparison import Setup
    from histoflare.rounds.bounds import POOLED
    from histoflare.site.kinds import kind_of

    kind = kind_of(read_job(job).task.data)
    beside: list[Path | None] = [*bags] if bags else [None] * len(folders)
    names = [path.resolve().name for path in folders]
    if len(set(names)) < len(names):
        names = [str(path) for path in folders]
    jobs: list[Job] = []
    splits = {}
    for name, folder, of_bags in zip(names, folders, beside, strict=True):
        training, outside = find_sites(folder, kind).configure(kind, of_bags, device=device)
        if not jobs:
            found = kind.find(training)
            say_fitted(choose_job(job, preset, settings, found))
            jobs = [choose_job(job, preset, [*settings, f"seed={seed}"], found).job for seed in seeds]
        loaded = load_experiment(Experiment(jobs[0], training, outside, device=device), watch)
        external = kind.pool(list(loaded.outside.values()), EXTERNAL) if loaded.outside else None
        pooled = kind.pool(list(loaded.cohorts.values()), POOLED)
        splits[name] = [Setup(job, loaded.cohorts, pooled, external) for job in jobs]
    return splits


def _show(found: dict[str, Any], split: dict[str, Any]) -> Table:
    """Return a split's rows as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from histoflare.report.figures import NAMES

    seeds = len(found["seeds"])
    title = f"{escape(split['name'])}: {NAMES[found['figure']]}, {found['rounds']} rounds, {seeds} seeds"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("strategy", overflow="fold")
    for heading in ("mean ± sd", "worst", "spread", "rounds", "s", "MB up", "MB down"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.caption = (
        f"mean, worst and spread of the {len(split['sites'])} sites' own test patients; rounds and seconds "
        f"until {100 * found['near']:.0f} % of what the best strategy ended with (in how many seeds, if not "
        "in all); MB: what all sites together send and are sent in a round"
    )
    for row in split["rows"]:
        if "refused" in row:
            table.add_row(escape(row["strategy"]), row["refused"]["reason"] or "–", *["–"] * 6)
            continue
        sd = "" if row["mean_sd"] is None else f" ± {row['mean_sd']:.3f}"
        cost = ["–"] * 4
        if "course" in row:
            near, some = row["near_rounds"], f" ({row['near_seeds']})" if row["near_seeds"] < seeds else ""
            cost = [
                "never" if near is None else f"{near:.3g}{some}",
                "–" if near is None else f"{row['near_seconds']:.2g}",
                f"{row['bytes_up'] / 1e6:.3g}",
                f"{row['bytes_down'] / 1e6:.3g}",
            ]
        served = (f"{row['mean']:.3f}{sd}", f"{row['worst']:.3f}", f"{row['spread']:.3f}")
        table.add_row(escape(row["strategy"]), *served, *cost)
    return table


def _show_contributions(found: dict[str, Any]) -> Table:
    """Return what each site adds, as a table."""
    from rich.markup import escape
    from rich.table import Table

    from histoflare.report.figures import NAMES

    asked = "external cohort" if found["asked"] == "external" else "test patients of all sites"
    table = Table(title=f"{NAMES[found['figure']]} of the {asked}: {found['coalitions']} coalitions trained")
    table.add_column("site", overflow="fold")
    table.add_column("Shapley value", justify="right")
    table.add_column("lost without it", justify="right")
    for site, each in found["sites"].items():
        interval = "" if found["exact"] else f" ({each['low']:+.3f} to {each['high']:+.3f})"
        table.add_row(escape(site), f"{each['shapley']:+.3f}{interval}", f"{each['left_out']:+.3f}")
    table.caption = (
        f"Shapley values add up to {found['all']:.3f} (all sites) less {found['nobody']:.3f} (the model that "
        "training begins with)."
    )
    return table

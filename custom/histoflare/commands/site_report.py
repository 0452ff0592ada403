"""``histoflare report site``: a hospital's own page, from its own notes, ledger and log."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import progress, say
from histoflare.commands.options import SiteOption
from histoflare.commands.outputs import refuse_overwriting
from histoflare.errors import HistoflareError, JobError

if TYPE_CHECKING:
    from histoflare.report.site_page import SitePage
    from histoflare.site.configuration import SiteConfiguration
    from histoflare.slides.splits import SplitRule


def make_site_page(
    site: SiteOption = None,
    run: Annotated[
        str | None, typer.Option(help="The run; none: the newest in which the site did something.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="The run's model or its folder, for what it sees in each slide.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="The consortium's report.json, in place of the site's own records.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The site's name in the federation; none: the one in its ledger.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The page; site-<name>.html by default.")] = None,
    pictures: Annotated[
        int, typer.Option(min=0, help="Slides or images that get pictures; those for testing first.")
    ] = 24,
    threads: Annotated[int, typer.Option(min=1, help="Slides read at once.")] = 2,
) -> None:
    """Write a site's own page: what left when, the ε spent, its slides, what the model says. It stays there.

    It takes nothing but the site's own records, ledger and log. A site keeps no global model: without --model
    the page has what the model said when the site was asked about it, and no pictures of where it looks.

    Example: histoflare report site

    Example: histoflare report site --site kits/histoflare/prod_00/hospital-a
    """
    from histoflare.report.report_file import of_a_report, read_report, sites_of
    from histoflare.report.site_page import write_site_page
    from histoflare.site.own_run import choose_run, own_report, read_notes, read_own_run
    from histoflare.site.places import find_site_of
    from histoflare.site.site_file import read_site_file

    if run is not None and report is not None:
        raise typer.BadParameter("--run is a run of the site's own records; --report is of one run")
    site = find_site_of(site)
    configuration = read_site_file(site)
    name = name or _name_of(configuration)
    target = out or Path(f"site-{name}.html")
    refuse_overwriting(target, site, *(path for path in (report, model) if path is not None))
    own, notes, alias = None, None, ""
    if report is None:
        chosen = choose_run(configuration, run)
        notes = read_notes(configuration, chosen)
        own = read_own_run(configuration, chosen, site.absolute().parent, notes)
        content = own_report(own, notes, _kind_of_data(notes.task, configuration))
        split = notes.split
    else:
        content = read_report(report)
        with of_a_report(report):
            known = sites_of(content)
        if not {name, configuration.pseudonym} & known:
            raise JobError(f"{name}: not in the report; it has {', '.join(sorted(known))}.")
        alias = configuration.pseudonym if configuration.pseudonym in known else ""
        split = _split_of(content)
    if model is not None:
        _refuse_other_kind(content, model, report or site)
    try:
        made = _build(name, configuration, model, content, split, alias or "", pictures, threads)
    except HistoflareError as error:
        if own is None:
            raise
        made = _without_data(name, content, f"Slides and images are not shown ({error.reason}): {error}")
    if notes is not None and model is None:
        said = notes.predicted
        rows = [row.with_notes(said.get(row.slide, {})) for row in made.slides]
        made = replace(made, slides=rows)
    with nullcontext() if report is None else of_a_report(report):
        write_site_page(replace(made, own=own), target)
    say(f"page: {target}")


def _name_of(configuration: SiteConfiguration) -> str:
    from histoflare.site.ledgers import open_ledger

    try:
        return open_ledger(configuration).identity().site
    except HistoflareError as error:
        raise JobError(
            f"The site's name is not known, as its ledger cannot be read ({error.reason}: {error}). Give it "
            "with --name.",
            reason=error.reason,
        ) from None


def _kind_of_data(task: Mapping[str, Any] | None, configuration: SiteConfiguration) -> str:
    """Return on what a run's task trains; without the task, what the site has."""
    from histoflare.site.kinds import KINDS

    of_task = [kind.name for kind in KINDS.values() if kind.task_field in (task or {})]
    return (of_task or [kind.name for kind in KINDS.values() if kind.is_named(configuration)])[0]


def _refuse_other_kind(content: Mapping[str, Any], model: Path, whose: Path) -> None:
    """Raise :class:`JobError` if run and model are on different kinds of data."""
    from histoflare.model_file import read_model_header
    from histoflare.site.kinds import kind_of

    of_run, of_model = kind_of(content["data"]), kind_of(read_model_header(model).data)
    if of_run is not of_model:
        raise JobError(
            f"{model} is the model of {of_model.learned}, the run of {whose} is {of_run.learned}: give the "
            "model of that run."
        )


def _build(
    name: str,
    configuration: SiteConfiguration,
    model: Path | None,
    content: Mapping[str, Any],
    split: SplitRule,
    alias: str,
    pictures: int,
    threads: int,
) -> SitePage:
    """Return the page with the site's slides or images, as the run's task has them."""
    from histoflare.model_file import read_model_file
    from histoflare.site.data import device_of
    from histoflare.site.kinds import kind_of
    from histoflare.site.kinds.kind import PageParts

    kind = kind_of(content["data"])
    task, network = None, None
    if model is not None:
        loaded = read_model_file(model, kind.task_type())
        task, network = loaded.task, loaded.build_model().to(device_of(configuration))
    elif content["task"]:
        task = kind.task_type().from_json(content["task"])
    if task is None:
        return _without_data(name, content)
    cohort = kind.load(name, task, configuration, split, is_over=True)
    with progress() as bars:
        bar = bars.add_task(f"{kind.item}s", total=None)
        parts = PageParts(
            name,
            configuration,
            cohort,
            task,
            network,
            content,
            alias=alias,
            most_pictures=pictures,
            threads=threads,
            on_item=lambda done, total: bars.update(bar, completed=done, total=total),
        )
        return kind.build_page(parts)


def _without_data(name: str, content: Mapping[str, Any], *warnings: str) -> SitePage:
    from histoflare.report.site_page import SitePage

    return SitePage(site=name, report=content, slides=[], left_out=(), sent=(), warnings=warnings)


def _split_of(content: Mapping[str, Any]) -> SplitRule:
    """Return the run's rule for manifests without a split column."""
    from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule

    said = (content["protocol"] or {}).get("split")
    return DEFAULT_SPLIT if said is None else SplitRule.of_protocol(said)

"""``histoflare report site``: a hospital's own page, from its own notes, ledger and log."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import console, progress
from histoflare.commands.outputs import refuse_overwriting
from histoflare.errors import HistoflareError, JobError

if TYPE_CHECKING:
    from histoflare.report.site_page import SitePage
    from histoflare.site.configuration import SiteConfiguration
    from histoflare.site.own_run import Notes
    from histoflare.slides.splits import SplitRule

BAGS, IMAGES = "bags", "images"


def make_site_page(
    site: Annotated[Path, typer.Option(help="The site's own file, e.g. local/histoflare.toml.")],
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

    Example: histoflare report site --site local/histoflare.toml
    """
    from histoflare.report.report_file import of_a_report, read_report, sites_of
    from histoflare.report.site_page import write_site_page
    from histoflare.site.configuration import read_site_file
    from histoflare.site.own_run import choose_run, own_report, read_notes, read_own_run

    if run is not None and report is not None:
        raise typer.BadParameter("--run is a run of the site's own records; --report is of one run")
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
        made = _with_notes(made, notes)
    with nullcontext() if report is None else of_a_report(report):
        write_site_page(replace(made, own=own), target)
    console.print(f"page: {target}", highlight=False, markup=False, soft_wrap=True)


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
    if task is not None:
        return IMAGES if "network" in task else BAGS
    return IMAGES if configuration.bags is None else BAGS


def _refuse_other_kind(content: Mapping[str, Any], model: Path, whose: Path) -> None:
    """Raise :class:`JobError` if one of run and model is of a segmentation and the other is not."""
    from histoflare.model_file import read_model_header

    kinds = ["a segmentation" if each else "a classification" for each in (True, False)]
    of_run, of_model = content["data"] == IMAGES, read_model_header(model).data == IMAGES
    if of_run != of_model:
        raise JobError(
            f"{model} is the model of {kinds[not of_model]}, the run of {whose} is {kinds[not of_run]}: give "
            "the model of that run."
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
    from histoflare.bags.task import BagTask
    from histoflare.masks.task import MaskTask
    from histoflare.model_file import read_model_file
    from histoflare.site.data import device_of, load_site_cohort, load_site_data

    kind: Any = MaskTask if content["data"] == IMAGES else BagTask
    task, network = None, None
    if model is not None:
        loaded = read_model_file(model, kind)
        task, network = loaded.task, loaded.build_model().to(device_of(configuration))
    elif content["task"]:
        task = kind.from_json(content["task"])
    if task is None:
        return _without_data(name, content)
    known: dict[str, Any] = {"alias": alias, "most_pictures": pictures}
    if content["data"] == IMAGES:
        from histoflare.site.image_pictures import build_image_site_page

        cohort: Any = load_site_data(name, task, configuration, split)
        with progress() as bars:
            bar = bars.add_task("images", total=None)
            known["on_image"] = lambda done, total: bars.update(bar, completed=done, total=total)
            return build_image_site_page(name, cohort, task, network, content, **known)
    from histoflare.site.pictures import build_site_page

    cohort = load_site_cohort(name, task, configuration, split, refuse_changed_slides=False)
    return build_site_page(name, configuration, cohort, task, network, content, threads=threads, **known)


def _without_data(name: str, content: Mapping[str, Any], *warnings: str) -> SitePage:
    from histoflare.report.site_page import SitePage

    return SitePage(site=name, report=content, slides=[], left_out=(), sent=(), warnings=warnings)


def _with_notes(page: SitePage, notes: Notes) -> SitePage:
    """Return the page with what the model said when the site was asked about it, by the site's own notes."""
    from histoflare.report.site_page import ImageRow, SlideRow

    rows: list[Any] = []
    for row in page.slides:
        said = notes.predicted.get(row.slide, {})
        if isinstance(row, SlideRow):
            shares = {key.removeprefix("p_"): float(said[key]) for key in said if key.startswith("p_")}
            rows.append(replace(row, predicted=said.get("predicted", ""), probabilities=shares))
        elif isinstance(row, ImageRow):
            dice = {key.removeprefix("dice_"): said[key] for key in said if key.startswith("dice_")}
            known = {label: float(value) if value else None for label, value in dice.items()}
            rows.append(replace(row, dice=known))
    return replace(page, slides=rows)


def _split_of(content: Mapping[str, Any]) -> SplitRule:
    """Return the run's rule for manifests without a split column."""
    from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule

    said = (content["protocol"] or {}).get("split")
    return DEFAULT_SPLIT if said is None else SplitRule.of_protocol(said)

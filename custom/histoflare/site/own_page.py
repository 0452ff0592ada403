"""Makes a site's own page, of a run in the site's records or of one in a consortium's report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from histoflare.errors import HistoflareError, JobError
from histoflare.model_file import read_model_file, read_model_header
from histoflare.report.own_run import OwnRun
from histoflare.report.report_file import of_a_report, read_report, sites_of
from histoflare.report.site_page import SitePage
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import device_of
from histoflare.site.kinds import KINDS, kind_of
from histoflare.site.kinds.kind import PageParts
from histoflare.site.ledgers import open_ledger
from histoflare.site.own_run import Notes, choose_run, own_report, read_notes, read_own_run
from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule


@dataclass(frozen=True)
class PageOf:
    """What a site's page is about.

    Attributes:
        content: The report: the consortium's, or what the site itself knows of the run.
        split: The run's rule for manifests without a split column.
        alias: The site's name in the consortium's report, where that is its pseudonym; else empty.
        own: The run by the site's own records; None with a consortium's report.
        notes: What the site wrote down of the run; None with a consortium's report.
    """

    content: Mapping[str, Any]
    split: SplitRule
    alias: str = ""
    own: OwnRun | None = None
    notes: Notes | None = None


def name_in_ledger(configuration: SiteConfiguration) -> str:
    """Return the site's name in its ledger; JobError if that cannot be read."""
    try:
        return open_ledger(configuration).identity().site
    except HistoflareError as error:
        raise JobError(
            f"The site's name is not known, as its ledger cannot be read ({error.reason}: {error}). Give it "
            "with --name.",
            reason=error.reason,
        ) from None


def of_own_run(configuration: SiteConfiguration, run: str | None, local: Path) -> PageOf:
    """Return what the site's records, ledger and log say of a run.

    Args:
        configuration: The site's own file.
        run: Name of the run; None takes the newest.
        local: Folder with the site's policies.

    Raises:
        HistoflareError: There is no such run, or the records or the ledger cannot be read.
    """
    chosen = choose_run(configuration, run)
    notes = read_notes(configuration, chosen)
    own = read_own_run(configuration, chosen, local, notes)
    content = own_report(own, notes, _data_of(notes.task, configuration))
    return PageOf(content, notes.split, own=own, notes=notes)


def of_report(configuration: SiteConfiguration, path: Path, name: str) -> PageOf:
    """Return what a consortium's report says of the site ``name``; JobError if the site is not in it."""
    content = read_report(path)
    with of_a_report(path):
        known = sites_of(content)
    pseudonym = configuration.pseudonym
    if not {name, pseudonym} & known:
        raise JobError(f"{name}: not in the report; it has {', '.join(sorted(known))}.")
    said = (content["protocol"] or {}).get("split")
    split = DEFAULT_SPLIT if said is None else SplitRule.of_protocol(said)
    return PageOf(content, split, (pseudonym or "") if pseudonym in known else "")


def build_page(
    of: PageOf,
    name: str,
    configuration: SiteConfiguration,
    model: Path | None,
    pictures: int,
    threads: int,
    on_item: Callable[[int, int], None],
) -> SitePage:
    """Return the page with the site's slides or images, as the run's task has them.

    Args:
        of: What it is about.
        name: The site's name.
        configuration: The site's own file.
        model: The run's model, for what it sees; None: what the site's notes of an evaluation say is shown.
        pictures: Slides or images that get pictures; those for testing first.
        threads: Slides read at once.
        on_item: Told how many slides or images are done, and of how many.

    Raises:
        HistoflareError: The model is of another kind of data or cannot be read; or the site's data cannot be
            used, with a consortium's report (without one, the page says so).
    """
    kind = kind_of(of.content["data"])
    if model is not None and kind_of(read_model_header(model).data) is not kind:
        other = kind_of(read_model_header(model).data)
        raise JobError(
            f"{model} is the model of {other.learned}, and the run is {kind.learned}: give the model of that "
            "run."
        )
    try:
        task, network = None, None
        if model is not None:
            loaded = read_model_file(model, kind.task_type())
            task, network = loaded.task, loaded.build_model().to(device_of(configuration))
        elif of.content["task"]:
            task = kind.task_type().from_json(of.content["task"])
        if task is None:
            return _without_data(of, name)
        cohort = kind.load(name, task, configuration, of.split, is_over=True)
        parts = PageParts(
            name,
            configuration,
            cohort,
            task,
            network,
            of.content,
            alias=of.alias,
            most_pictures=pictures,
            threads=threads,
            on_item=on_item,
        )
        page = replace(kind.build_page(parts), own=of.own)
    except HistoflareError as error:
        if of.own is None:
            raise
        return _without_data(of, name, f"Slides and images are not shown ({error.reason}): {error}")
    if of.notes is None or model is not None:
        return page
    said = of.notes.predicted
    return replace(page, slides=[row.with_notes(said.get(row.slide, {})) for row in page.slides])


def _data_of(task: Mapping[str, Any] | None, configuration: SiteConfiguration) -> str:
    """Return on what a run's task trains; without the task, what the site has."""
    of_task = [kind.name for kind in KINDS.values() if kind.task_field in (task or {})]
    return (of_task or [kind.name for kind in KINDS.values() if kind.is_named(configuration)])[0]


def _without_data(of: PageOf, name: str, *warnings: str) -> SitePage:
    return SitePage(
        site=name, report=of.content, slides=[], left_out=(), sent=(), warnings=warnings, own=of.own
    )

"""``histoflare report site``: a hospital's own page, from its own notes, ledger and log."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from histoflare.commands.console import progress, say
from histoflare.commands.options import SiteOption
from histoflare.commands.outputs import refuse_overwriting


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
    from histoflare.report.report_file import of_a_report
    from histoflare.report.site_page import write_site_page
    from histoflare.site.own_page import build_page, name_in_ledger, of_own_run, of_report
    from histoflare.site.places import find_site_of
    from histoflare.site.site_file import read_site_file

    if run is not None and report is not None:
        raise typer.BadParameter("--run is a run of the site's own records; --report is of one run")
    site = find_site_of(site)
    configuration = read_site_file(site)
    name = name or name_in_ledger(configuration)
    target = out or Path(f"site-{name}.html")
    refuse_overwriting(target, site, *(path for path in (report, model) if path is not None))
    if report is None:
        about = of_own_run(configuration, run, site.absolute().parent)
    else:
        about = of_report(configuration, report, name)
    with progress() as bars:
        bar = bars.add_task("slides or images", total=None)
        made = build_page(
            about,
            name,
            configuration,
            model,
            pictures,
            threads,
            lambda done, total: bars.update(bar, completed=done, total=total),
        )
    with nullcontext() if report is None else of_a_report(report):
        write_site_page(made, target)
    say(f"page: {target}")

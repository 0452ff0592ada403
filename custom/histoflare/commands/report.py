"""``histoflare report``: pages for people, made of what a run left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from histoflare.commands.console import say
from histoflare.commands.outputs import refuse_overwriting
from histoflare.commands.site_report import make_site_page

app = typer.Typer(no_args_is_help=True)
app.command("site")(make_site_page)


@app.callback()
def _group() -> None:
    """Make pages for people out of a run's figures."""


@app.command()
def page(
    report: Annotated[Path, typer.Argument(help="A run's report.json.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; report.html beside the report by default.")
    ] = None,
) -> None:
    """Write the consortium's page: figures only, no pictures, no paths, no patients.

    Example: histoflare report page demo-run/report.json --out report.html
    """
    from histoflare.report.page import write_page
    from histoflare.report.report_file import of_a_report, read_report

    target = out or report.with_name("report.html")
    content = read_report(report)
    refuse_overwriting(target, report)
    with of_a_report(report):
        write_page(content, target)
    say(f"page: {target}")

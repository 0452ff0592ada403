"""``histoflare job result``: what came back of a job, for its lead."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import console, out, print_json
from histoflare.errors import JobError

if TYPE_CHECKING:
    from histoflare.flare.download import Download

REPORT_FILE, PAGE_FILE = "report.json", "report.html"


def show_result(
    result: Annotated[Path, typer.Argument(help="The folder that a training job's download made.")],
    evaluation: Annotated[
        Path | None,
        typer.Argument(
            help="The folder of the job that then asked the sites about its model, if there is one."
        ),
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--out", help="Folder for report.html and report.json; RESULT by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say what happened in a job: who took part, who refused and why, who was late, the ε spent, how good it is.

    Writes report.html and report.json, for the consortium: figures, no patient; sites by their pseudonyms.

    Example: histoflare job result result/4c1f… result/9a02…
    """
    from histoflare.flare.download import build_download_report, read_download
    from histoflare.report.page import write_page
    from histoflare.report.report_file import fill_missing
    from histoflare.report.returned import sites_table, write_returned_headline
    from histoflare.storage import write_json

    folder = target or result
    if folder.exists() and not folder.is_dir():
        raise JobError(f"{folder}: a file; give a folder with --out.")
    download = read_download(result)
    report = build_download_report(download, None if evaluation is None else read_download(evaluation))
    whole = fill_missing(report)
    write_page(whole, folder / PAGE_FILE)
    write_json(folder / REPORT_FILE, report, public=True)
    if as_json:
        print_json(report)
    else:
        out.print(sites_table(whole))
        headline = write_returned_headline(whole)
        for sentence in (headline.verdict, headline.result, headline.privacy, *headline.cautions):
            if sentence:
                _say(sentence)
        if whole["evaluated_at_sites"] is None and download.result.state is not None:
            _say(_hint(download, whole))
    console.print(f"report: {folder / PAGE_FILE}", highlight=False, markup=False, soft_wrap=True)


def _hint(download: Download, report: dict[str, Any]) -> str:
    """Return how to ask the sites how good the model is."""
    job = {"bags": "jobs/mem_evaluate", "images": "jobs/dhunet_evaluate"}[report["data"]]
    sites, settings = ",".join(download.sites), ""
    if download.job.answer_seconds is not None:
        settings = f" --set answer_seconds={download.job.answer_seconds}"
    scope = f" --scope {download.job.scope}"
    return (
        f"Ask the sites how good the model is:\n  histoflare job make {job} --model {download.folder} --sites "
        f"{sites}{scope}{settings} --out ask\n  histoflare job submit ask --kit KIT --wait\nand, when that is "
        f"downloaded too:\n  histoflare job result {download.folder} EVALUATION"
    )


def _say(text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)

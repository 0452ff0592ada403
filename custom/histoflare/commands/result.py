"""``histoflare job result``: what came back of a job, for its lead."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histoflare.commands.console import out, print_json, say, tell
from histoflare.errors import JobError

if TYPE_CHECKING:
    from histoflare.flare.download import Download

REPORT_FILE, PAGE_FILE = "report.json", "report.html"


def show_result(
    result: Annotated[Path, typer.Argument(help="The folder that a training job's download made.")],
    evaluation: Annotated[
        Path | None,
        typer.Argument(help="The folder of the job that asked the sites about its model afterwards."),
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--out", help="Folder for report.html and report.json; RESULT by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    least: Annotated[
        int | None, typer.Option(min=1, help="Of a job on cohorts: how many patients of a label are needed.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Of a job on cohorts: the ε that a training may spend.")
    ] = None,
) -> None:
    """Say what came back of a job: who took part, refused and why, or was late; the ε spent; how good it is.

    Writes report.html and report.json, for the consortium: figures, no patient; sites by their pseudonyms.

    Of a job cohort_statistics it prints the counts, with intervals for their noise, and writes nothing.

    Example: histoflare job result result/4c1f… result/9a02…
    """
    from histoflare.flare.download import build_download_report, read_download
    from histoflare.reasons import explain
    from histoflare.report.page import write_page
    from histoflare.report.report_file import fill_missing
    from histoflare.report.returned import say_withheld, sites_table, write_returned_headline
    from histoflare.rounds.tally import asks_model
    from histoflare.storage import write_json

    folder = target or result
    if folder.exists() and not folder.is_dir():
        raise JobError(f"{folder}: a file; give a folder with --out.")
    download = read_download(result)
    if not asks_model(download.job.task):
        _show_counts(download, least, epsilon, as_json)
        return
    report = build_download_report(download, None if evaluation is None else read_download(evaluation))
    whole = fill_missing(report)
    write_page(whole, folder / PAGE_FILE)
    write_json(folder / REPORT_FILE, report, public=True)
    if as_json:
        print_json(report)
    else:
        out.print(sites_table(whole))
        headline = write_returned_headline(whole)
        said = (headline.verdict, headline.result, headline.privacy, *headline.cautions)
        for sentence in (say_withheld(whole), *said):
            if sentence:
                tell(sentence)
        for site, code in sorted(download.result.best_evaluation_refused.items()):
            name = download.result.pseudonyms.get(site, site)
            tell(f"Best model: {name} did not evaluate it: {code}: {explain(code)}")
        if whole["evaluated_at_sites"] is None and download.result.state is not None:
            tell(_hint(download))
    say(f"report: {folder / PAGE_FILE}")


def _show_counts(download: Download, least: int | None, epsilon: float | None, as_json: bool) -> None:
    """Print what sites said of their cohorts, by their pseudonyms."""
    from histoflare.commands.console import make_table
    from histoflare.flare.result import evaluation_noise_of
    from histoflare.privacy.budget import Budget
    from histoflare.reasons import explain
    from histoflare.report.cohort_counts import list_counts, part_left, say_count, say_enough
    from histoflare.report.evaluation_noise import say_evaluation_noise

    result, job = download.result, download.job
    named = {result.pseudonyms.get(site, site): said for site, said in result.evaluation.items()}
    rows = list_counts(job.task.tally_form, named, result.evaluation_total)
    if as_json:
        print_json([{"block": row.block, "cell": row.cell, "counts": dict(row.counts)} for row in rows])
        return
    table = make_table("", "patients", *rows[0].counts)
    for row in rows:
        table.add_row(row.block, row.cell, *(say_count(count) for count in row.counts.values()))
    out.print(table)
    for site, code in sorted(result.refused.items()):
        tell(f"{result.pseudonyms.get(site, site)} said nothing: {code}: {explain(code)}")
    if said := say_evaluation_noise(evaluation_noise_of(job, result.evaluation_total, None)):
        tell(said)
    labels = tuple(job.task.labels)
    for sentence in say_enough(rows, labels, least) if least else ():
        tell(sentence)
    if epsilon is not None:
        budget = Budget(epsilon, 1e-5 if job.tally is None else job.tally.delta)
        part = part_left(rows, labels, len(named), budget)
        tell(
            f"Feasible at ε = {epsilon:g}? Not known, for a count did not leave."
            if part is None
            else f"At ε = {epsilon:g} about {part[0]:.0%} to {part[1]:.0%} of what training without noise "
            "gains would be left, with as many training patients as were counted (histoflare privacy advise)."
        )


def _hint(download: Download) -> str:
    """Return the commands that ask the sites how good the model is, under the protocol of its job."""
    from histoflare.site.kinds import kind_of

    job = download.job
    words = [
        "histoflare job make",
        kind_of(job.task.data).evaluation_job,
        "--model",
        shlex.quote(str(download.folder)),
    ]
    words += ["--sites", ",".join(download.sites), "--scope", job.scope]
    words += [f"--set {shlex.quote(setting)}" for setting in _settings(download)]
    return (
        f"Ask the sites how good the model is:\n  {' '.join(words)} --out ask\n"
        "  histoflare job submit ask --kit KIT --wait\nand, when that is downloaded too:\n"
        f"  histoflare job result {shlex.quote(str(download.folder))} EVALUATION"
    )


def _settings(download: Download) -> list[str]:
    """Return what an evaluation says otherwise than the shipped job, so that sites know its protocol."""
    from histoflare.flare.job import read_job
    from histoflare.flare.job_schema import AGREED
    from histoflare.flare.job_variant import flatten
    from histoflare.shipped import find_job
    from histoflare.site.kinds import kind_of

    job = download.job
    shipped = read_job(find_job(Path(kind_of(job.task.data).evaluation_job)))
    said = flatten(job.protocol, "protocol.")
    known = flatten(shipped.protocol, "protocol.")
    taken = {f"protocol.{name}" for name in AGREED}  # from the model's header
    found = {name: value for name, value in said.items() if name not in taken and known.get(name) != value}
    if job.answer_seconds is not None:
        found["answer_seconds"] = job.answer_seconds
    if getattr(job.strategy, "share", None) or getattr(job.strategy, "batch_norm", "shared") != "shared":
        found["run"] = download.run  # under which the sites keep what is theirs of the model
    return [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in found.items()]

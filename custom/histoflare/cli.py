"""The console script ``histoflare``: gathers the commands; turns errors into one message and an exit code.

Exit codes: 0 success; 1 an error that the message explains; 2 wrong usage; 3 done, but some slides or
sites were left out (each is listed); 130 stopped by Ctrl-C. ``histoflare --debug …`` shows the traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from histoflare import __version__
from histoflare.commands import (
    bags,
    classify,
    demo,
    experiment,
    job,
    kit,
    ledger,
    manifest,
    masks,
    mosaic,
    poc,
    policy,
    prepare,
    privacy,
    report,
    run,
    segment,
    site,
    slide,
    synthetic,
)
from histoflare.commands.console import console
from histoflare.commands.help_text import fill_help
from histoflare.errors import HistoflareError
from histoflare.extras import describe_missing

STOPPED = 130
"""Exit code of a command that Ctrl-C ended; Typer makes it of KeyboardInterrupt."""

AFTER_STOP = {
    "bags": "the same command goes on; what is made stays",
    "classify": "with --out FILE.csv the same command goes on after the last slide that was done",
    "demo": "the same command keeps slides, images and bags, and begins the rounds anew",
    "job": "a job that was submitted goes on at its server and its sites",
    "poc": "'histoflare poc status' shows what is up",
    "prepare": "the same command goes on; bags that are made stay",
    "run": "the same command begins the rounds anew, of each seed",
    "segment": "the same command goes on where it was",
}
"""What Ctrl-C leaves of a command that may take long, and what the same one does again."""

app = typer.Typer(
    name="histoflare",
    help="Federated learning on whole-slide images that never leave their hospital.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"histoflare {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    if not debug:
        warnings.filterwarnings("ignore")
        logging.getLogger().setLevel(logging.ERROR)
        logging.getLogger("nvflare").addHandler(logging.NullHandler())  # else its errors are bare lines


app.add_typer(slide.app, name="slide", help="Look at one slide.")
app.command("mosaic")(mosaic.mosaic)
app.add_typer(manifest.app, name="manifest", help="Make and check manifests (one CSV per hospital).")
app.command("prepare")(prepare.prepare)
app.add_typer(bags.app, name="bags", help="Look at bags, or take over features made elsewhere.")
app.add_typer(masks.app, name="masks", help="Images with masks: what segmentation is trained on.")
app.add_typer(synthetic.app, name="synthetic", help="Make slides and bags for demos, tests and experiments.")
app.command("run")(run.run)
app.add_typer(experiment.app, name="experiment")
app.command("demo")(demo.demo)
app.add_typer(poc.app, name="poc", help="A federation of real FLARE processes on this machine.")
app.command("classify")(classify.classify)
app.command("segment")(segment.segment)
app.add_typer(report.app, name="report", help="Make pages for people out of a run's figures.")
app.add_typer(privacy.app, name="privacy")
app.add_typer(
    ledger.app, name="ledger", help="A site's privacy ledger: make, move, show, check, export, close runs."
)
app.add_typer(policy.app, name="policy")
app.add_typer(site.app, name="site", help="Where a site keeps what.")
app.add_typer(kit.app, name="kit", help="Startup kits and their signature.")
app.add_typer(job.app, name="job", help="Look at a job folder, or make a variant of one to submit.")
app.command("resume")(job.resume)
fill_help(app)


def main() -> None:
    """Run the command line and exit with its code."""
    debug = "--debug" in sys.argv[1:]
    code: int | str | None = 0
    try:
        try:
            app()
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()  # here and not while Python ends: a full disk must not look like success
    except KeyboardInterrupt:
        code = STOPPED
    except BrokenPipeError:  # e.g. "| head": whoever reads has enough
        code = 1
    except Exception as error:
        if debug:
            raise
        _say(f"error: {_describe(error)}")
        code = 1
    if code == STOPPED:
        _say(_describe_stop(sys.argv[1:]))
    _end_output()
    sys.exit(code)


def _end_output() -> None:
    """Discard output that stdout does not accept: Python would try again at exit and print an error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _describe_stop(arguments: Sequence[str]) -> str:
    """Return what Ctrl-C ended, and what is left of it."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    return f"stopped; {AFTER_STOP[command]}" if command in AFTER_STOP else "stopped"


def _describe(error: Exception) -> str:
    """Return the one message that a person sees."""
    if isinstance(error, HistoflareError):
        return str(error)
    if isinstance(error, OSError):
        what = error.strerror or str(error)
        return (
            f"{error.filename}: {what}. Check the path and its permissions, or make room."
            if error.filename
            else what
        )
    if isinstance(error, ModuleNotFoundError) and (missing := describe_missing(error)):
        return missing
    if isinstance(error, MemoryError):
        return "there is not enough memory for this; make it smaller, or use a machine with more"
    return (
        f"unexpected {type(error).__name__}: {error}. 'histoflare --debug …' shows where; please report it."
    )


def _say(message: str) -> None:
    console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)

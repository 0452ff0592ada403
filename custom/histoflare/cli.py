"""The console script ``histoflare``: gathers the commands; turns errors into one message and an exit code.

Exit codes: 0 success; 1 an error that the message explains; 2 wrong usage; 3 done, but some slides were left
out (each is listed); 130 stopped by Ctrl-C. ``histoflare --debug …`` shows the traceback.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Annotated

import click
import typer

from histoflare import __version__
from histoflare.commands import bags, demo, manifest, mosaic, predict, prepare, run, slide, synthetic
from histoflare.commands.console import console
from histoflare.errors import HistoflareError

app = typer.Typer(
    name="histoflare",
    help="Federated learning on whole-slide images that never leave their hospital.",
    no_args_is_help=True,
    add_completion=False,
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


app.add_typer(slide.app, name="slide", help="Look at one slide.")
app.command("mosaic")(mosaic.mosaic)
app.add_typer(manifest.app, name="manifest", help="Make and check manifests (one CSV per hospital).")
app.command("prepare")(prepare.prepare)
app.add_typer(bags.app, name="bags", help="Look at bags, or take over features made elsewhere.")
app.add_typer(synthetic.app, name="synthetic", help="Make slides and bags for demos, tests and experiments.")
app.command("run")(run.run)
app.command("demo")(demo.demo)
app.command("predict")(predict.predict)


def main() -> None:
    """Run the command line and exit with its code."""
    debug = "--debug" in sys.argv[1:]
    try:
        code = app(standalone_mode=False)
    except HistoflareError as error:
        if debug:
            raise
        _say(str(error))
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _say("stopped; run the same command again to go on")
        sys.exit(130)
    except OSError as error:
        if debug:
            raise
        _say(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _say(message: str) -> None:
    console.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)

"""``histoflare report``: pages for people, made of what a run left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import UndefinedError

from histoflare.commands.console import console
from histoflare.errors import JobError

app = typer.Typer(no_args_is_help=True)


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

    target = out or report.with_name("report.html")
    content = _read_report(report)
    _refuse_overwriting(target, report)
    with _of_a_report(report):
        write_page(content, target)
    console.print(f"page: {target}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def site(
    site_file: Annotated[Path, typer.Argument(help="The site's own file, e.g. local/histoflare.toml.")],
    report: Annotated[Path, typer.Option(help="The run's report.json.")],
    model: Annotated[Path, typer.Option(help="The run's model file.")],
    name: Annotated[str, typer.Option(help="The site's name in the federation.")],
    out: Annotated[Path | None, typer.Option(help="The page; site-<name>.html by default.")] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Slides that get pictures; test slides first.")] = 24,
    threads: Annotated[int, typer.Option(min=1, help="Slides read at once.")] = 2,
) -> None:
    """Write a site's own page: its slides, where the model looks, what left the site. It stays there.

    Example: histoflare report site local/histoflare.toml --name hospital-1 --report run/report.json
    --model run/model.safetensors
    """
    from histoflare.bags.model_file import load_model
    from histoflare.report.site_page import write_site_page
    from histoflare.site.configuration import read_site_file
    from histoflare.site.data import load_site_cohort
    from histoflare.site.pictures import build_site_page

    content = _read_report(report)
    configuration = read_site_file(site_file)
    known = _sites_of(content)
    if not {name, configuration.pseudonym} & known:
        raise JobError(f"{name}: not in the report; it has {', '.join(sorted(known))}.")
    target = out or Path(f"site-{name}.html")
    _refuse_overwriting(target, report, site_file, model)
    loaded = load_model(model)
    cohort = load_site_cohort(name, loaded.task, configuration)
    pseudonym = configuration.pseudonym or ""
    made = build_site_page(
        name,
        configuration,
        cohort,
        loaded.task,
        loaded.build_model(),
        content,
        alias=pseudonym if pseudonym in known else "",
        most_pictures=pictures,
        threads=threads,
    )
    with _of_a_report(report):
        write_site_page(made, target)
    console.print(f"page: {target}", highlight=False, markup=False, soft_wrap=True)


def _sites_of(content: dict[str, Any]) -> set[str]:
    """Return every site that a report speaks of."""
    try:
        found = {*content["sites"], *(content.get("evaluated_at_sites") or {})}
        found |= set(content.get("evaluation_refused") or {})
        for row in content["participation"]:
            found |= {*(row.get("sites") or []), *row["taking_part"]}
    except (TypeError, KeyError, AttributeError):
        return set()
    return found


def _refuse_overwriting(target: Path, *inputs: Path) -> None:
    if target.is_dir() or any(target.resolve() == path.resolve() for path in inputs):
        raise JobError(f"{target}: a folder, or a file that is read here; give another one with --out.")


@contextmanager
def _of_a_report(path: Path) -> Iterator[None]:
    """Turn what a damaged report does to the page's code into one message."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, ValueError, IndexError, UndefinedError):
        raise JobError(
            f"{path}: damaged: its figures are not built as a run writes them. Make it again with the run."
        ) from None


def _read_report(path: Path) -> dict[str, Any]:
    import json

    from histoflare.report.consortium import NEEDED

    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (FileNotFoundError, IsADirectoryError):
        raise JobError(f"{path}: not a file. A run writes its report.json into its folder.") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise JobError(f"{path}: not JSON: {error}") from None
    missing = sorted(NEEDED - set(content)) if isinstance(content, dict) else sorted(NEEDED)
    if missing:
        raise JobError(
            f"{path}: not a report of histoflare: it lacks {', '.join(missing)}. Give the report.json that a "
            "run wrote."
        )
    found: dict[str, Any] = content
    return found


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no figure")

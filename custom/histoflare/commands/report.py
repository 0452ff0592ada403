"""``histoflare report``: pages for people, made of what a run left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
    write_page(_read_report(report), target)
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
    from histoflare.site.pictures import build_site_page
    from histoflare.site.work import load_site_cohort

    content = _read_report(report)
    configuration = read_site_file(site_file)
    loaded = load_model(model)
    cohort = load_site_cohort(name, loaded.task, configuration)
    target = out or Path(f"site-{name}.html")
    pseudonym = configuration.pseudonym or ""
    made = build_site_page(
        name,
        configuration,
        cohort,
        loaded.task,
        loaded.build_model(),
        content,
        alias=pseudonym if pseudonym in content["sites"] else "",
        most_pictures=pictures,
        threads=threads,
    )
    write_site_page(made, target)
    console.print(f"page: {target}", highlight=False, markup=False, soft_wrap=True)


def _read_report(path: Path) -> dict[str, Any]:
    import json

    from histoflare.report.consortium import NEEDED

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JobError(f"{path}: not found. A run writes its report.json into its folder.") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise JobError(f"{path}: not JSON: {error}") from None
    missing = sorted(NEEDED - set(content)) if isinstance(content, dict) else sorted(NEEDED)
    if missing:
        raise JobError(
            f"{path}: not a report of histoflare: it lacks {', '.join(missing)}. Give the report.json that a "
            "run wrote."
        )
    found: dict[str, Any] = content
    return found

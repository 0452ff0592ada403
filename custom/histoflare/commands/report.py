"""``histoflare report``: pages for people, made of what a run left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from jinja2 import UndefinedError

from histoflare.commands.console import console
from histoflare.errors import JobError

if TYPE_CHECKING:
    from histoflare.report.site_page import SitePage
    from histoflare.site.configuration import SiteConfiguration
    from histoflare.slides.splits import SplitRule

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
    pictures: Annotated[
        int, typer.Option(min=0, help="Slides or images that get pictures; those for testing first.")
    ] = 24,
    threads: Annotated[int, typer.Option(min=1, help="Slides read at once.")] = 2,
) -> None:
    """Write a site's own page: its slides or images, what the model sees in them, what left. It stays there.

    Example: histoflare report site local/histoflare.toml --name hospital-1 --report run/report.json
    --model run/model.safetensors
    """
    from histoflare.report.site_page import write_site_page
    from histoflare.site.configuration import read_site_file

    content = _read_report(report)
    configuration = read_site_file(site_file)
    known = _sites_of(content)
    if not {name, configuration.pseudonym} & known:
        raise JobError(f"{name}: not in the report; it has {', '.join(sorted(known))}.")
    target = out or Path(f"site-{name}.html")
    _refuse_overwriting(target, report, site_file, model)
    pseudonym = configuration.pseudonym or ""
    alias = pseudonym if pseudonym in known else ""
    _refuse_other_kind(content, model)
    if content.get("data") == "images":
        made = _build_of_images(name, configuration, model, content, alias, pictures)
    else:
        made = _build_of_slides(name, configuration, model, content, alias, pictures, threads)
    with _of_a_report(report):
        write_site_page(made, target)
    console.print(f"page: {target}", highlight=False, markup=False, soft_wrap=True)


def _refuse_other_kind(content: dict[str, Any], model: Path) -> None:
    """Raise :class:`JobError` if one of report and model is of a segmentation and the other is not."""
    from histoflare.model_file import read_model_header

    kinds = ["a segmentation" if each else "a classification" for each in (True, False)]
    of_report, of_model = content.get("data") == "images", read_model_header(model).data == "images"
    if of_report != of_model:
        raise JobError(
            f"{model} is the model of {kinds[not of_model]}, the report is of {kinds[not of_report]}: give "
            "the two that one run wrote."
        )


def _build_of_slides(
    name: str,
    configuration: SiteConfiguration,
    model: Path,
    content: dict[str, Any],
    alias: str,
    pictures: int,
    threads: int,
) -> SitePage:
    from histoflare.bags.task import MemTask
    from histoflare.model_file import read_model_file
    from histoflare.site.data import device_of, load_site_cohort
    from histoflare.site.pictures import build_site_page

    loaded = read_model_file(model, MemTask)
    return build_site_page(
        name,
        configuration,
        load_site_cohort(name, loaded.task, configuration, _split_of(content), refuse_changed_slides=False),
        loaded.task,
        loaded.build_model().to(device_of(configuration)),
        content,
        alias=alias,
        most_pictures=pictures,
        threads=threads,
    )


def _build_of_images(
    name: str,
    configuration: SiteConfiguration,
    model: Path,
    content: dict[str, Any],
    alias: str,
    pictures: int,
) -> SitePage:
    from histoflare.commands.console import progress
    from histoflare.masks.images import ImageCohort
    from histoflare.masks.task import MaskTask
    from histoflare.model_file import read_model_file
    from histoflare.site.data import device_of, load_site_data
    from histoflare.site.image_pictures import build_image_site_page

    loaded = read_model_file(model, MaskTask)
    cohort = load_site_data(name, loaded.task, configuration, _split_of(content))
    assert isinstance(cohort, ImageCohort)
    network = loaded.build_model().to(device_of(configuration))
    with progress() as bars:
        bar = bars.add_task("images", total=None)
        return build_image_site_page(
            name,
            cohort,
            loaded.task,
            network,
            content,
            alias=alias,
            most_pictures=pictures,
            on_image=lambda done, total: bars.update(bar, completed=done, total=total),
        )


def _split_of(content: dict[str, Any]) -> SplitRule:
    """Return the run's rule for manifests without a split column."""
    from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule

    said = (content.get("protocol") or {}).get("split")
    return DEFAULT_SPLIT if said is None else SplitRule.of_protocol(said)


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

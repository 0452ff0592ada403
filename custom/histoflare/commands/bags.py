"""``histoflare bags``: look at bags, and take over features made elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from histoflare.commands.prepare import follow, show_report

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at bags, or take over features made elsewhere."""


@app.command("import")
def import_(
    h5_dir: Annotated[Path, typer.Argument(help="Folder of .h5 files from TRIDENT, CLAM or STAMP.")],
    manifest: Annotated[Path, typer.Option(help="CSV of the slides: slide, patient, label, …")],
    out: Annotated[Path, typer.Option(help="Folder for the bags.")],
    encoder: Annotated[str, typer.Option(help="What the features were made with, e.g. uni2.")],
    labels: Annotated[
        str | None, typer.Option(help="Labels that may occur, with commas; without it any.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Make bags of features a site has already: H5 files with features or feats (n x d) and coords (n x 2).

    A file belongs to the slide of its name. One that cannot be used is listed and costs no other; the exit
    code is then 3.

    Example: histoflare bags import features_uni2 --manifest manifest.csv --out bags --encoder uni2
    """
    from histoflare.bags.imported import import_features
    from histoflare.commands.console import print_json
    from histoflare.slides.manifest import read_manifest

    known = [label.strip() for label in labels.split(",")] if labels is not None else None
    rows = read_manifest(manifest, labels=known, check_files=False)
    report = follow(rows, lambda on_row, _: import_features(h5_dir, rows, out, encoder, on_row=on_row))
    if as_json:
        print_json(report.to_json())
    else:
        show_report(report, out)
    raise typer.Exit(report.exit_code)


@app.command()
def show(
    bag: Annotated[Path, typer.Argument(help="A bag, or a folder of bags.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a bag was made of and with, or list a folder of bags; every bag is read and checked.

    The exit code is 3 if a bag of the folder cannot be read.

    Example: histoflare bags show bags --json
    """
    from histoflare.commands.console import print_json, tell

    if not bag.is_dir():
        about = _describe(bag)
        if as_json:
            print_json(about)
            return
        for name, value in about.items():
            tell(f"{name:<16} {value}")
        return
    bags, damaged = _describe_folder(bag)
    if as_json:
        print_json({"bags": bags, "damaged": damaged})
    else:
        _show_folder(bags, damaged)
    raise typer.Exit(3 if damaged else 0)


def _describe(path: Path) -> dict[str, Any]:
    from histoflare.bags.bag import read_bag

    bag = read_bag(path)
    mean = float(bag.features.mean()) if bag.features.size else None
    std = float(bag.features.std()) if bag.features.size else None
    return {"bag": path.name, "patches": len(bag), **bag.header.to_json(), "mean": mean, "std": std}


def _describe_folder(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    from histoflare.errors import BagError

    bags, damaged = [], []
    for path in sorted(folder.glob("*.h5")):
        try:
            bags.append(_describe(path))
        except BagError as error:
            damaged.append({"bag": path.name, "reason": error.reason, "message": str(error)})
    if not bags and not damaged:
        raise BagError(f"{folder}: no bags there; make some with 'histoflare prepare'", reason="BAG_MISSING")
    return bags, damaged


def _show_folder(bags: list[dict[str, Any]], damaged: list[dict[str, str]]) -> None:
    from rich.table import Table

    from histoflare.commands.console import out, tell

    table = Table()
    for name in ("bag", "patches", "features", "encoder", "µm/px", "px", "source"):
        table.add_column(name, overflow="fold")
    for bag in bags:
        cells = (bag[name] for name in ("patches", "features", "encoder", "patch_mpp", "patch_px", "source"))
        table.add_row(bag["bag"], *("?" if cell is None else str(cell) for cell in cells))
    out.print(table, markup=False)
    for bag in damaged:
        tell(bag["message"], style="red")

"""``histoflare manifest``: make and check the lists of slides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.options import JOB_PATCH_MPP, JOB_PATCH_PX, PATCH_MPP_HELP, PATCH_PX_HELP
from histoflare.commands.partition import partition

if TYPE_CHECKING:
    from histoflare.slides.manifest import Manifest, ManifestRow
    from histoflare.slides.survey import Finding
    from histoflare.slides.tcga import SlideCounts

app = typer.Typer(no_args_is_help=True)
app.command()(partition)


@app.callback()
def _group() -> None:
    """Make and check manifests (one CSV per hospital)."""


@app.command()
def check(
    manifest: Annotated[Path, typer.Argument(help="CSV with slide, patient, label and optional columns.")],
    labels: Annotated[
        list[str] | None, typer.Option("--label", help="A label that may occur; repeat it for each.")
    ] = None,
    files: Annotated[
        bool, typer.Option("--files/--no-files", help="Whether the slides must exist, and are opened.")
    ] = True,
    patch_mpp: Annotated[float, typer.Option(help=PATCH_MPP_HELP)] = JOB_PATCH_MPP,
    patch_px: Annotated[int, typer.Option(help=PATCH_PX_HELP)] = JOB_PATCH_PX,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a manifest as a whole; every fault is listed with its line number.

    It also says who is for training and for testing, and of which label there is nobody. The slides are
    opened: one that cannot be read, whose resolution is not known or too coarse, or that is smaller than a
    patch is listed with what to do, and the exit code is then 3. Whether there is tissue on it, and whether
    every part of it can be read, 'histoflare prepare' says.

    Example: histoflare manifest check hospital.csv --label LUAD --label LUSC
    """
    from histoflare.commands.console import print_json, say, say_warnings, show_left_out
    from histoflare.slides.manifest import assign_splits, read_manifest, role_warnings

    checked = read_manifest(manifest, labels or None, check_files=files)
    given = checked.rows[0].split is not None
    checked = assign_splits(checked)
    warnings = role_warnings(checked.rows, labels or checked.labels)
    findings = _survey(checked, patch_mpp, patch_px) if files else []
    if as_json:
        found = [asdict(each) | {"usable": each.usable} for each in findings]
        slides = {"slides_to_look_at": found} if files else {}
        print_json({**_counts(checked.rows), "split_column": given, "warnings": warnings, **slides})
    else:
        _print_table([(manifest.name, checked.rows)])
        if not given:
            say("no split column: each patient is for training or testing by a hash of the patient")
        say_warnings(warnings)
        say_warnings([f"line {each.line}: {each.message}" for each in findings if each.usable])
        left_out = [each for each in findings if not each.usable]
        show_left_out(
            (
                (
                    f"line {each.line}: {each.slide} ({each.reason})",
                    each.message.removeprefix(f"{each.slide}: "),
                )
                for each in left_out
            ),
            "'histoflare prepare' would leave out:",
        )
    if not all(finding.usable for finding in findings):
        raise typer.Exit(3)


@app.command()
def tcga(
    gdc_manifest: Annotated[Path, typer.Argument(help="Manifest of the slides from the GDC portal (TSV).")],
    slides: Annotated[Path, typer.Option(help="Folder with the slides, as <id>/<filename> or flat.")],
    out: Annotated[Path, typer.Option(help="Folder for the manifests, one per hospital.")],
    frozen: Annotated[
        bool, typer.Option("--frozen", help="Frozen sections too, not only diagnostic ones.")
    ] = False,
    test_fraction: Annotated[float, typer.Option(help="Share of patients for testing.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Decides which patients those are.")] = 0,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave out slides that are not there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write one manifest per hospital for lung slides of The Cancer Genome Atlas, split by patient.

    Hospital and label follow from the slides' names. External hospitals (for testing only) go to external/.

    Example: histoflare manifest tcga gdc_manifest.txt --slides slides --out manifests
    """
    from dataclasses import asdict

    from histoflare.commands.console import console, print_json, say
    from histoflare.slides.tcga import write_tcga_manifests

    result = write_tcga_manifests(
        gdc_manifest,
        slides,
        out,
        frozen=frozen,
        test_fraction=test_fraction,
        seed=seed,
        allow_missing=allow_missing,
    )
    for fault in result.missing:
        say(f"left out: {fault}")
    if as_json:
        print_json(
            {
                "manifests": {
                    name: {"path": str(each.path), **_counts(each.rows)}
                    for name, each in result.manifests.items()
                },
                "left_out": result.left_out,
                "missing": len(result.missing),
                "table_2": {name: asdict(counts) for name, counts in result.counts.items()},
            }
        )
        return
    _print_table([(str(each.path), each.rows) for each in result.manifests.values()])
    for reason, count in sorted(result.left_out.items()):
        console.print(f"left out: {count} {reason}", markup=False, highlight=False)
    _print_table_2(result.counts, frozen)


def _survey(manifest: Manifest, patch_mpp: float, patch_px: int) -> list[Finding]:
    """Open every slide, under a progress bar (stderr)."""
    from histoflare.commands.console import progress
    from histoflare.slides.mosaic import MosaicParameters
    from histoflare.slides.survey import survey_slides

    with progress() as bar:
        task = bar.add_task("slides", total=len(manifest.rows))
        parameters = MosaicParameters(mpp=patch_mpp, patch_px=patch_px)
        return survey_slides(manifest, parameters, lambda: bar.advance(task))


def _counts(rows: tuple[ManifestRow, ...]) -> dict[str, Any]:
    """Return how many slides, patients and, by label and split, slides the rows hold."""
    return {
        "slides": len(rows),
        "patients": len({row.patient for row in rows}),
        "labels": dict(sorted(Counter(row.label for row in rows).items())),
        "splits": dict(sorted(Counter(row.split or "none" for row in rows).items())),
    }


def _listed(counts: dict[str, int]) -> str:
    """Return the counts in a line, or one a line where they are many: a table has 80 columns."""
    parts = [f"{name} {count}" for name, count in counts.items()]
    return ", ".join(parts) if len(parts) < 3 else "\n".join(parts)


def _print_table(manifests: list[tuple[str, tuple[ManifestRow, ...]]]) -> None:
    from histoflare.commands.console import make_table, out

    table = make_table("manifest", "slides", "patients", "slides by label", "slides by split")
    for name, rows in manifests:
        counts = _counts(rows)
        table.add_row(
            name,
            str(counts["slides"]),
            str(counts["patients"]),
            _listed(counts["labels"]),
            _listed(counts["splits"]),
        )
    out.print(table, markup=False)


def _print_table_2(counts: Mapping[str, SlideCounts], frozen: bool) -> None:
    """Print the paper's numbers of slides beside those of the GDC manifest, by section."""
    from histoflare.commands.console import make_table, out, say

    def cell(of: Mapping[str, int]) -> str:
        return " + ".join(str(count) for count in of.values())

    table = make_table("LUAD + LUSC", "Adnan 2022, Table 2", "diagnostic (DX)", "frozen")
    for hospital, of in counts.items():
        table.add_row(hospital, cell(of.published), cell(of.diagnostic), cell(of.frozen))
    totals = [
        sum(sum(getattr(of, section).values()) for of in counts.values())
        for section in ("published", "diagnostic", "frozen")
    ]
    table.add_section()
    table.add_row("all", *map(str, totals))
    out.print(table, markup=False)
    taken = (
        "are taken too"
        if frozen
        else f"are left out: {totals[1]} of {totals[1] + totals[2]} tumour slides stay"
    )
    say(
        f"The paper counts {totals[0]} slides and does not say of which sections. Of these hospitals the GDC "
        f"manifest lists {totals[1]} diagnostic and {totals[2]} frozen ones; frozen sections {taken}."
    )

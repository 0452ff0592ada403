"""``histoflare prepare``: a manifest's slides become bags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histoflare.commands.mosaic import Selection
from histoflare.commands.options import JOB_PATCH_MPP, JOB_PATCH_PX, PATCH_MPP_HELP, PATCH_PX_HELP
from histoflare.errors import ManifestError

if TYPE_CHECKING:
    from histoflare.bags.folder import PrepareReport, RowResult, Status
    from histoflare.slides.manifest import Manifest, ManifestRow


def prepare(
    manifest: Annotated[Path | None, typer.Argument(help="CSV of slides: slide, patient, label, …")] = None,
    *,
    out: Annotated[
        Path, typer.Option(help="Folder for the bags, one .h5 a slide; with --sites, a folder a site in it.")
    ],
    sites: Annotated[
        Path | None,
        typer.Option(help="Folder with a manifest per site (<site>/manifest.csv or <site>.csv), as run has."),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="efficientnet-lite0 (ImageNet weights; taken where none is named and the extra demo is "
            "installed), densenet121 or torchscript:<name> (with --weights; FILE.toml beside TorchScript "
            "says its mean, std and input_px), or densenet121-random for trying out."
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="The encoder's weight file.")] = None,
    weights_sha256: Annotated[
        str | None, typer.Option(help="SHA-256 of the weight file that the sites agreed on.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (CUDA when there is one), cpu or cuda.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Threads that read patches; one a processor if not given.", min=1)
    ] = None,
    mpp: Annotated[
        float | None,
        typer.Option(help="Finest level's µm/px, for slides that state none and have none in the manifest."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Labels that may occur, with commas; without it any.")
    ] = None,
    patch_mpp: Annotated[float, typer.Option(help=PATCH_MPP_HELP)] = JOB_PATCH_MPP,
    patch_px: Annotated[int, typer.Option(help=PATCH_PX_HELP)] = JOB_PATCH_PX,
    tissue_fraction: Annotated[float, typer.Option(help="Smallest share of tissue in a patch.")] = 0.7,
    clusters: Annotated[int, typer.Option(help="Number of colour clusters.")] = 9,
    fraction: Annotated[float, typer.Option(help="Share of each cluster that is chosen.")] = 0.10,
    selection: Annotated[Selection, typer.Option(help="How to choose in a cluster.")] = Selection.RANDOM,
    cluster_mpp: Annotated[float, typer.Option(help="Resolution of the colours in µm/px.")] = 2.0,
    max_patches: Annotated[int | None, typer.Option(help="Most patches to choose.")] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Make a bag of every slide: choose its patches, encode them, write one file.

    Run it again to go on after a stop, or after slides came in: only what is missing or changed is made. A
    slide that cannot be used is listed at the end and costs no other; the exit code is then 3. With --sites,
    the bags of each site lie where 'histoflare run --sites DIR --bags OUT' looks for them.

    Example: histoflare prepare manifest.csv --out bags --encoder densenet121 --weights densenet121.pth
    --weights-sha256 a639ec97…
    """
    from histoflare.bags.encoder_names import check_encoder, choose_encoder
    from histoflare.commands.console import console, print_json, say, say_warnings
    from histoflare.slides.manifest import assign_splits, read_manifest, role_warnings
    from histoflare.slides.mosaic import MosaicParameters
    from histoflare.slides.resolution import check_given_mpp

    parameters = MosaicParameters(
        mpp=patch_mpp,
        patch_px=patch_px,
        tissue_fraction=tissue_fraction,
        clusters=clusters,
        fraction=fraction,
        selection=selection.value,
        cluster_mpp=cluster_mpp,
        max_patches=max_patches,
        seed=seed,
    )
    check_given_mpp(mpp, "--mpp")
    spec = choose_encoder(weights) if encoder is None else encoder
    check_encoder(spec, weights, weights_sha256)
    known = [label.strip() for label in labels.split(",")] if labels is not None else None
    # A missing slide is one row's fault and must not cost the others.
    manifests = {
        name: read_manifest(path, labels=known, check_files=False)
        for name, path in _manifest_files(manifest, sites).items()
    }
    roles = {name: assign_splits(rows) for name, rows in manifests.items()}

    from histoflare.bags.encoder import RANDOM_ID, load_encoder  # torch: seconds, after the cheap faults
    from histoflare.bags.prepare import prepare as make_bags

    loaded = load_encoder(spec, weights, weights_sha256, device, probe_px=patch_px)
    if encoder is None:
        say(f"encoder: {loaded.id}, for none was named; a job takes the bags of one encoder only")
    if loaded.id == RANDOM_ID:
        say_warnings(["random weights, for trying out; --encoder efficientnet-lite0 has ImageNet's"])
    reports: dict[str, PrepareReport] = {}
    for name, rows in manifests.items():
        folder = out / name
        if name and not as_json:
            console.print(f"{name}:", highlight=False, markup=False)
        reports[name] = follow(
            rows,
            lambda on_row, on_patches, rows=rows, folder=folder: make_bags(  # type: ignore[misc]
                rows,
                folder,
                loaded,
                parameters,
                workers,
                default_mpp=mpp,
                on_row=on_row,
                on_patches=on_patches,
            ),
        )
        if not as_json:
            show_report(reports[name], folder)
        say_warnings(role_warnings(roles[name].rows, known or rows.labels))
    if as_json:
        shown = {name: report.to_json() for name, report in reports.items()}
        print_json({**({"sites": shown} if sites else shown[""]), "mosaic": parameters.to_json()})
    raise typer.Exit(max(report.exit_code for report in reports.values()))


def _manifest_files(manifest: Path | None, sites: Path | None) -> dict[str, Path]:
    """Return the manifests to prepare, by the name of their folder of bags; "" for a single one.

    Raises:
        ManifestError: Both or neither are given, or the folder is not one of sites.
    """
    if (manifest is None) == (sites is None):
        raise ManifestError("Give one manifest, or a folder of sites with --sites.")
    if sites is None:
        assert manifest is not None
        return {"": manifest}
    from histoflare.lab.sites import find_sites

    found = find_sites(sites)
    return {**found.sites, **found.external}


STATUS_NAMES: dict[Status, str] = {
    "made": "made",
    "kept": "up to date",
    "skipped": "skipped",
    "failed": "failed",
}
OnRow = Callable[["RowResult"], None]
OnPatches = Callable[["ManifestRow", int, int], None]


def follow(manifest: Manifest, work: Callable[[OnRow, OnPatches], PrepareReport]) -> PrepareReport:
    """Do ``work`` under a progress bar (stderr): slides done, their rate, the time left."""
    from histoflare.commands.console import progress

    with progress() as bar:
        total = len(manifest.rows)
        task = bar.add_task("slides", total=total)
        done = kept = 0

        def on_row(result: RowResult) -> None:
            nonlocal done, kept
            done, kept = done + 1, kept + (result.status == "kept")
            if done == kept < total:  # bags of an earlier run say nothing about the time that is left
                bar.reset(task, completed=done)
            else:
                bar.update(task, advance=1, description="slides")

        def on_patches(row: ManifestRow, done: int, total: int) -> None:
            bar.update(task, description=f"slides ({row.slide.name}: patch {done} of {total})")

        return work(on_row, on_patches)


def show_report(report: PrepareReport, folder: Path) -> None:
    """Print what was made, and what was left out and why."""
    from histoflare.commands.console import show_left_out, tell

    patches = sum(row.patches for row in report.rows)
    counts = ", ".join(f"{report.count(status)} {STATUS_NAMES[status]}" for status in STATUS_NAMES)
    tell(f"bags: {counts}; {patches} patches in {folder}, encoder {report.encoder}, {report.seconds:.1f} s")
    show_left_out(
        (
            f"line {row.line}: {row.slide}, {row.status} ({row.reason})",
            row.message.removeprefix(f"{row.slide}: "),
        )
        for row in report.left_out
    )
    if report.not_in_manifest:
        listed = ", ".join(report.not_in_manifest[:5])
        more = len(report.not_in_manifest) - 5
        tell(f"not in the manifest, left alone: {listed}" + (f" and {more} more" if more > 0 else ""))

"""``histoflare synthetic``: make slides, bags and images for demos, tests and experiments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True)

Out = Annotated[Path, typer.Option("--out", help="Folder; gets <site>/manifest.csv for each site.")]
Seed = Annotated[int, typer.Option(help="The same seed makes the same files.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
External = Annotated[bool, typer.Option("--external/--no-external", help="A further site, for testing only.")]
Hospitals = Annotated[int, typer.Option(min=1, help="Number of hospitals.")]


@app.callback()
def _group() -> None:
    """Make slides, bags and images for demos, tests and experiments."""


@app.command()
def slides(
    out: Out,
    hospitals: Hospitals = 4,
    slides_per_hospital: Annotated[int, typer.Option(min=2, help="Slides of each hospital.")] = 12,
    external: External = True,
    slides_external: Annotated[int, typer.Option(min=2, help="Slides of the external site.")] = 8,
    um_field: Annotated[float, typer.Option(help="Side of the square slides, in um.")] = 896.0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Draw small H&E-like slides of two growth patterns, glandular and solid.

    Nothing in them comes from a patient. Hospitals differ in stain, blur and resolution.

    Example: histoflare synthetic slides --out slides --hospitals 4 --slides-per-hospital 12
    """
    from histoflare.synthetic.slides import SyntheticCohort, make_slides

    cohort = SyntheticCohort(
        hospitals, external, slides_per_hospital, slides_external, um_field=um_field, seed=seed
    )
    _show(_with_bar("slides", lambda tick: make_slides(out, cohort, tick)), as_json)


@app.command()
def bags(
    out: Out,
    count: Annotated[
        int, typer.Option(min=4, help="Bags in all; without an external site, rounded down to equal shares.")
    ] = 2000,
    hospitals: Hospitals = 4,
    external: External = True,
    encoder: Annotated[
        str, typer.Option(help="Encoder, as for 'histoflare prepare'.")
    ] = "densenet121-random",
    weights: Annotated[Path | None, typer.Option(help="The encoder's weight file.")] = None,
    weights_sha256: Annotated[str | None, typer.Option(help="SHA-256 of the weight file.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    patches: Annotated[int, typer.Option(min=1, help="Patches in a bag.")] = 9,
    patch_px: Annotated[int, typer.Option(min=32, help="Side of a patch.")] = 224,
    mpp: Annotated[float, typer.Option(help="Resolution of the patches, in um/px.")] = 0.5,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Make bags of generated tissue without writing the slides; run again to go on after a stop.

    They fit mem_fedavg and the other jobs on bags that come with histoflare, unless options say otherwise.

    Example: histoflare synthetic bags --out bags --count 2000
    """
    from histoflare.bags.encoder_names import check_encoder

    check_encoder(encoder, weights, weights_sha256)
    from histoflare.bags.encoder import load_encoder  # PyTorch: seconds, after the cheap faults
    from histoflare.synthetic.bags import FieldParameters, make_bags
    from histoflare.synthetic.slides import SyntheticCohort

    each, more = divmod(count, hospitals + external)
    cohort = SyntheticCohort(hospitals, external, each, each + more, seed=seed)
    field = FieldParameters(patches, patch_px, mpp)
    network = load_encoder(encoder, weights, weights_sha256, device, probe_px=patch_px)
    _show(_with_bar("bags", lambda tick: make_bags(out, network, cohort, field, tick)), as_json)


@app.command()
def images(
    out: Annotated[Path, typer.Option("--out", help="Folder; gets <site>/images.csv for each site.")],
    sites: Annotated[int, typer.Option(min=1, help="Sites; one more, 'external', is for testing only.")] = 4,
    patients: Annotated[int, typer.Option(min=3, help="Patients of each site.")] = 12,
    images_per_patient: Annotated[int, typer.Option(min=1, help="Images of each patient.")] = 2,
    side_px: Annotated[int, typer.Option(min=32, max=4096, help="Side of the square images.")] = 256,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Draw small H&E-like images with masks of their nuclei, at 0.5 um/px: segmentation without data.

    Nothing in them comes from a patient. Sites differ in stain and blur. A mask is 0 (background) or
    1 (nucleus), so the job's labels are these two, and its windows are no larger than the images.

    Example: histoflare synthetic images --out made --sites 4 --patients 12

    Example: histoflare run --job dhunet_fedavg --sites made --out run --set rounds=8
    --set task.labels='["background","nucleus"]' --set task.width=24 --set task.window_px=128
    --set task.stride_px=128 --set task.patch_px=64 --set task.batch_size=8 --set task.learning_rate=0.05
    """
    from histoflare.synthetic.image_files import make_images
    from histoflare.synthetic.images import SyntheticImages

    made = SyntheticImages(sites, patients, images_per_patient, side_px, seed)
    _show_images(_with_bar("images", lambda tick: make_images(out, made, tick)), as_json)


@app.command()
def assemble(
    index: Annotated[
        Path, typer.Argument(help="CSV with the columns file, label and, if known, patient and source_tile.")
    ],
    out: Out,
    labels: Annotated[
        list[str] | None,
        typer.Option("--label", help="TILE_LABEL=SLIDE_LABEL; repeat it. Other tiles are left out."),
    ] = None,
    tiles_per_slide: Annotated[tuple[int, int], typer.Option(help="Fewest and most.")] = (3, 4),
    slides_per_patient: Annotated[tuple[int, int], typer.Option(help="Fewest and most.")] = (1, 2),
    sites: Annotated[int, typer.Option(min=1, help="Number of hospitals.")] = 4,
    external_share: Annotated[
        float, typer.Option(help="Share of the patients at a further site, for testing only; 0 for none.")
    ] = 0.2,
    iid: Annotated[bool, typer.Option("--iid", help="The same mix of labels at every site.")] = False,
    mpp: Annotated[float, typer.Option(help="Resolution to write, in um/px.")] = 0.5,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Lay labelled tiles side by side as slides at made-up hospitals.

    With a column patient, no slide has tiles of two patients, and a patient is at one hospital and in one
    split; without it patients are made up.

    Without --label: lung_aca=LUAD and lung_scc=LUSC. Which tile went where is written to assembly.json.

    Example: histoflare synthetic assemble tiles/index.csv --out slides --label aca=LUAD --label scc=LUSC
    """
    from histoflare.slides.assemble import LUNG_LABELS as LUNG
    from histoflare.slides.assemble import AssemblyParameters, assemble

    parameters = AssemblyParameters(
        tiles_per_slide, slides_per_patient, sites, external_share, iid, mpp=mpp, seed=seed
    )
    label_map = _read_label_map(labels) if labels else LUNG
    made = _with_bar("slides", lambda tick: assemble(index, out, parameters, label_map, tick))
    _show(made, as_json, labels=sorted({*label_map.values()}))


def _read_label_map(pairs: list[str]) -> dict[str, str]:
    split = [pair.partition("=") for pair in pairs]
    if wrong := [pair for pair, (old, _, new) in zip(pairs, split, strict=True) if not old or not new]:
        raise typer.BadParameter(f"{wrong[0]} is not TILE_LABEL=SLIDE_LABEL", param_hint="--label")
    if len({new for _, _, new in split}) < 2:
        raise typer.BadParameter("slides need two labels at least; repeat it", param_hint="--label")
    return {old: new for old, _, new in split}


def _with_bar(
    what: str, make: Callable[[Callable[[int, int], None]], Mapping[str, Path]]
) -> Mapping[str, Path]:
    """Run ``make`` with a progress bar on stderr and return the manifests it made."""
    from histoflare.commands.console import progress

    with progress() as bars:
        bar = bars.add_task(what, total=None)

        def tick(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total)

        return make(tick)


def _show(manifests: Mapping[str, Path], as_json: bool, labels: Sequence[str] | None = None) -> None:
    """Print per site the manifest and how many slides, patients and, by label, slides it has.

    With ``labels`` it is also said of which of them a site has nobody to train or to test on.
    """
    from collections import Counter

    from histoflare.commands.console import make_table, out, print_json, say_warnings
    from histoflare.slides.manifest import read_manifest, role_warnings

    found: dict[str, dict[str, Any]] = {}
    for site, path in manifests.items():
        rows = read_manifest(path, labels, check_files=False).rows
        warnings = role_warnings(rows, labels) if labels is not None and site != "external" else []
        say_warnings([f"{site}: {warning}" for warning in warnings])
        found[site] = {
            "manifest": str(path),
            "slides": len(rows),
            "patients": len({row.patient for row in rows}),
            "test_patients": len({row.patient for row in rows if row.split == "test"}),
            "labels": dict(sorted(Counter(row.label for row in rows).items())),
        }
    if as_json:
        print_json({"sites": found})
        return
    table = make_table("site", "slides", "patients", "for testing", "slides by label")
    for site, of in found.items():
        labels = ", ".join(f"{label} {count}" for label, count in of["labels"].items())
        cells = (of["slides"], of["patients"], of["test_patients"], labels)
        table.add_row(site, *map(str, cells))
    out.print(table, markup=False)
    _say_where(manifests)


def _show_images(manifests: Mapping[str, Path], as_json: bool) -> None:
    """Print per site the manifest and how many images, patients and patients for testing it has."""
    from histoflare.commands.console import make_table, out, print_json
    from histoflare.masks.image_manifest import read_image_manifest
    from histoflare.synthetic.image_files import LABELS

    found: dict[str, dict[str, Any]] = {}
    for site, path in manifests.items():
        rows = read_image_manifest(path, check_files=False).rows
        found[site] = {
            "manifest": str(path),
            "images": len(rows),
            "patients": len({row.patient for row in rows}),
            "test_patients": len({row.patient for row in rows if row.split == "test"}),
        }
    if as_json:
        print_json({"labels": list(LABELS), "sites": found})
        return
    table = make_table("site", "images", "patients", "for testing")
    for site, of in found.items():
        table.add_row(site, *map(str, (of["images"], of["patients"], of["test_patients"])))
    out.print(table, markup=False)
    _say_where(manifests)


def _say_where(manifests: Mapping[str, Path]) -> None:
    """Print where the manifests are: on a line of its own, as a path is wider than a column of a table."""
    from histoflare.commands.console import tell

    path = next(iter(manifests.values()))
    text = f"manifests: {path.parent.parent}/<site>/{path.name}"
    tell(text)

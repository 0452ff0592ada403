"""``histoflare masks import``: what a site has becomes images, masks and their manifest."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histoflare.commands.mask_options import AS_JSON, LABELS, follow, split_labels
from histoflare.commands.options import PlaneName
from histoflare.errors import JobError

if TYPE_CHECKING:
    from histoflare.masks.importers import ImportReport

app = typer.Typer(no_args_is_help=True)


class Polarity(StrEnum):
    """What a background mask is above 0 for."""

    AUTO = "auto"
    BACKGROUND = "background"
    TISSUE = "tissue"


OUT = Annotated[Path, typer.Option(help="Folder for the manifest, the masks and what else is made.")]
MPP = Annotated[float | None, typer.Option(help="Resolution of the images in µm/px, if it is known.")]


@app.callback()
def _import_group() -> None:
    """Make a manifest of images and masks from what there is; run it again after a stop."""


@app.command()
def wsss4luad(
    folder: Annotated[Path, typer.Argument(help="Holds 2.validation and 3.testing, perhaps 1.training.")],
    out: OUT,
    smallest_px: Annotated[int, typer.Option(help="Leave out images with a shorter side.", min=1)] = 1000,
    polarity: Annotated[
        Polarity, typer.Option(help="What background masks are above 0 for; auto finds out, or refuses.")
    ] = Polarity.AUTO,
    mpp: MPP = None,
    as_json: AS_JSON = False,
) -> None:
    """Take over WSSS4LUAD as the challenge gives it: tumour, stroma, normal, background.

    Images stay where they are. Their patients are not known: each image counts as one of its own.

    Example: histoflare masks import wsss4luad WSSS4LUAD --out wsss4luad
    """
    from histoflare.masks.importers.wsss4luad import import_wsss4luad

    def work(on_image: Callable[[int, int], None]) -> ImportReport:
        return import_wsss4luad(
            folder, out, smallest_px=smallest_px, polarity=polarity.value, mpp=mpp, on_image=on_image
        )

    _show(follow("images", work), as_json)


FOLDER = Annotated[Path, typer.Argument(help="Holds images, masks and perhaps index.csv.")]
IMAGES = Annotated[
    str | None, typer.Option(help="Folder of the images in it; else images, or MoNuSeg's 'Tissue Images'.")
]
MASKS = Annotated[
    str | None, typer.Option(help="Folder of their masks in it; else masks, or MoNuSeg's Annotations.")
]
LAYERS = Annotated[
    list[str] | None,
    typer.Option("--layer", help="Layer of an XML that holds the class (repeatable); others: not annotated."),
]


@app.command()
def nuclei(
    folder: FOLDER,
    out: OUT,
    images: IMAGES = None,
    masks: MASKS = None,
    layer: LAYERS = None,
    mpp: MPP = None,
    as_json: AS_JSON = False,
) -> None:
    """Take over images with masks of nuclei: classes background and nucleus. As 'binary' with that label.

    Example: histoflare masks import nuclei tnbc --out tnbc-masks
    """
    _import_binary(folder, images, masks, layer, out, "nucleus", "background", mpp, as_json)


@app.command()
def binary(
    folder: FOLDER,
    out: OUT,
    label: Annotated[str, typer.Option(help="Name of the class: what is above 0 in a mask.")],
    background: Annotated[str, typer.Option(help="Name of the class of the rest.")] = "background",
    images: IMAGES = None,
    masks: MASKS = None,
    layer: LAYERS = None,
    mpp: MPP = None,
    as_json: AS_JSON = False,
) -> None:
    """Take over images with masks of one class: 0 and 255, a number an object, or XMLs of Aperio ImageScope.

    Images stay where they are; a mask has the name of its image, perhaps with an ending such as _mask. An
    index.csv (column name) may give patient, split, site, sex, age_band, scanner and mpp.

    Example: histoflare masks import binary glands --label gland --images img --masks mask --out glands-masks
    """
    _import_binary(folder, images, masks, layer, out, label, background, mpp, as_json)


def _import_binary(
    folder: Path,
    images: str | None,
    masks: str | None,
    layers: list[str] | None,
    out: Path,
    label: str,
    background: str,
    mpp: float | None,
    as_json: bool,
) -> None:
    from histoflare.masks.importers.binary import Source, import_binary

    source = Source(folder, images, masks, tuple(layers or ()))

    def work(on_image: Callable[[int, int], None]) -> ImportReport:
        return import_binary(source, out, label, background=background, mpp=mpp, on_image=on_image)

    _show(follow("images", work), as_json)


@app.command()
def geojson(
    slide: Annotated[Path, typer.Argument(help="The slide that was annotated.")],
    annotations: Annotated[Path, typer.Argument(help="Its annotations, exported from QuPath as GeoJSON.")],
    out: OUT,
    labels: LABELS,
    mpp: Annotated[float, typer.Option(help="Resolution of the images to make, in µm/px.")],
    patient: Annotated[str, typer.Option(help="Whose slide it is.")],
    slide_mpp: Annotated[
        float | None, typer.Option(help="Resolution of the slide's finest level, if it states none.")
    ] = None,
    region_px: Annotated[int, typer.Option(help="Cut larger regions to this side.", min=2)] = 4096,
    smallest_px: Annotated[int, typer.Option(help="Let no side of a region be shorter.", min=1)] = 1000,
    margin_px: Annotated[int, typer.Option(help="Keep this much around annotations.", min=0)] = 0,
    plane: Annotated[
        PlaneName | None,
        typer.Option(
            help="Where the file counts pixels from: bounds, the scanned area, as QuPath does; level0, the "
            "whole slide, as ASAP and HALO do. If not said: as the file says, else bounds.",
            show_default=False,
        ),
    ] = None,
    offset: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="Instead of --plane: x and y that make the file's coordinates level-0 pixels, where QuPath "
            "opened one of several scanned areas by itself, say."
        ),
    ] = None,
    ignore_unknown: Annotated[
        bool,
        typer.Option(
            "--ignore-unknown", help="Count features of other classes or of none as not annotated (255)."
        ),
    ] = False,
    as_json: AS_JSON = False,
) -> None:
    """Cut the annotated regions of a slide out as images and masks; more slides can follow into one folder.

    Small features lie over large ones; what none covers is not annotated and not trained on, and so are
    features of classes whose names end in * (QuPath's Ignore* and Region*). Lines and points are left out.

    Example: histoflare masks import geojson a.svs a.geojson --labels tumour,stroma --mpp 0.5 --patient p1
    --out regions
    """
    from histoflare.masks.importers.geojson import import_annotations
    from histoflare.slides.reader import Slide

    if plane is not None and offset is not None:
        raise JobError("--offset takes the place of --plane: give one of them.")
    with Slide(slide, mpp=slide_mpp, mpp_place="with --slide-mpp") as opened:
        report = follow(
            "regions",
            lambda on_image: import_annotations(
                opened,
                annotations,
                split_labels(labels),
                mpp,
                out,
                patient=patient,
                region_px=region_px,
                smallest_px=smallest_px,
                margin_px=margin_px,
                ignore_unknown=ignore_unknown,
                plane=None if plane is None else plane.value,
                l0_offset=offset,
                on_image=on_image,
            ),
        )
    _show(report, as_json)


def _show(report: ImportReport, as_json: bool) -> None:
    from histoflare.commands.console import print_json, say, tell

    rows = report.manifest.rows
    patients = len({row.patient for row in rows})
    notes = list(report.notes)
    if unsaid := sum(row.mpp is None for row in rows):
        notes.append(
            f"{unsaid} of {len(rows)} images do not say their resolution, so that nothing holds them to that "
            "of other sites and of slides: give --mpp if you know it (µm/px; 40x is about 0.25, 20x 0.5)"
        )
    for note in notes:
        say(f"note: {note}")
    if as_json:
        print_json(
            {
                "manifest": str(report.manifest.path),
                "labels": list(report.labels),
                "images": len(rows),
                "patients": patients,
                "notes": notes,
            }
        )
        return
    tell(
        f"{report.manifest.path}: {len(rows)} images of {patients} patients; labels {','.join(report.labels)}"
    )

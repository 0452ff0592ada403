"""``histoflare mosaic``: the patches that stand for one slide, as JSON and as a picture."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from histoflare.commands.options import JOB_PATCH_MPP, JOB_PATCH_PX, PATCH_MPP_HELP, PATCH_PX_HELP
from histoflare.commands.slide import MPP_HELP


class Selection(StrEnum):
    """How patches are chosen within a colour cluster."""

    RANDOM = "random"
    SPATIAL = "spatial"


def mosaic(
    slide: Annotated[Path, typer.Argument(help="Slide file, or the folder of a DICOM series.")],
    out: Annotated[Path, typer.Option(help="Folder for <slide>.mosaic.json and <slide>.overlay.png.")],
    mpp: Annotated[float | None, typer.Option(help=MPP_HELP)] = None,
    patch_mpp: Annotated[float, typer.Option(help=PATCH_MPP_HELP)] = JOB_PATCH_MPP,
    patch_px: Annotated[int, typer.Option(help=PATCH_PX_HELP)] = JOB_PATCH_PX,
    tissue_fraction: Annotated[float, typer.Option(help="Smallest share of tissue in a patch.")] = 0.7,
    clusters: Annotated[int, typer.Option(help="Number of colour clusters.")] = 9,
    fraction: Annotated[float, typer.Option(help="Share of each cluster that is chosen.")] = 0.10,
    selection: Annotated[Selection, typer.Option(help="How to choose in a cluster.")] = Selection.RANDOM,
    cluster_mpp: Annotated[float, typer.Option(help="Resolution of the colours in µm/px.")] = 2.0,
    max_patches: Annotated[int | None, typer.Option(help="Most patches to choose.")] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads that read; the result is the same.", min=1)] = 1,
) -> None:
    """Choose the patches that stand for a slide: tissue, colour clusters, a share of each.

    The patches are by default those of the shipped jobs mem_*; everything else is as in the papers (Kalra et
    al. 2020, Adnan et al. 2022, whose patches have 1000 px). Parts of the method are
    patented: US10628736B2, US20200176102A1.

    Example: histoflare mosaic a.svs --out mosaics
    """
    from histoflare import storage
    from histoflare.commands.console import tell
    from histoflare.slides.mosaic import MosaicParameters, find_mosaic
    from histoflare.slides.overlay import draw_overlay
    from histoflare.slides.reader import Slide

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
    with Slide(slide, mpp=mpp) as opened:
        built, tissue = find_mosaic(opened, parameters, threads)
        picture = draw_overlay(opened, built, tissue)
        info = opened.info
    json_path = out / f"{slide.stem}.mosaic.json"
    picture_path = out / f"{slide.stem}.overlay.png"
    storage.write_json(json_path, {**built.to_json(), "slide": info.to_json()})
    with storage.atomic_path(picture_path) as partial:
        picture.save(partial, "PNG")
    tell(f"{len(built.chosen)} of {len(built.candidates)} patches: {json_path}, {picture_path}")

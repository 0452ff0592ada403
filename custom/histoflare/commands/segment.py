"""``histoflare segment``: slides or images, from their files to masks of classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import console, make_table, out, print_json, progress, say, tell
from histoflare.commands.options import MODEL_HELP, PLANE_HELP, PlaneName
from histoflare.commands.outputs import check_output_folders, check_outputs
from histoflare.commands.several import follow_table, show_table
from histoflare.commands.slide import MPP_HELP
from histoflare.errors import JobError

if TYPE_CHECKING:
    from histoflare.masks.segmenter import SegmentedSlide
    from histoflare.masks.task_model import TaskModel
    from histoflare.model_file import ModelHeader
    from histoflare.slides.reader import Slide


def segment(
    slide: Annotated[
        Path,
        typer.Argument(
            help="Slide file, or the folder of a DICOM series; or of many: a folder of slides or images, a "
            "manifest (CSV) of which the column slide or image is enough."
        ),
    ],
    model: Annotated[Path, typer.Option(help=MODEL_HELP)],
    mask: Annotated[
        Path,
        typer.Option(
            "--out",
            help="The mask: a pyramidal TIFF of class indices. Of many: a folder for masks and results.csv; "
            "--geojson and --overlay, of slides only, are folders too.",
        ),
    ],
    geojson: Annotated[Path | None, typer.Option(help="Outlines of the classes for QuPath.")] = None,
    overlay: Annotated[Path | None, typer.Option(help="Picture of the slide and its classes (PNG).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    plane: Annotated[PlaneName, typer.Option(help=PLANE_HELP)] = PlaneName.BOUNDS,
    mpp: Annotated[
        float | None, typer.Option(help=MPP_HELP + " Of many: of those that do not say it.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows given to the network at once.", min=1)] = 8,
    threads: Annotated[int, typer.Option(help="Threads that read windows.", min=1)] = 1,
    again: Annotated[bool, typer.Option("--again", help="Forget an unfinished mask; begin anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Give every pixel of a slide's tissue a class.

    Overlapping windows are blended. The mask opens in OpenSlide and QuPath; mask and outlines say in which
    plane of the slide they lie. Where there is no tissue the mask has the model's background class, else 255.
    A command that was stopped goes on where it was.

    Many slides have a mask each in the folder --out, named after the slide and a hash of its path, and a row
    in results.csv there. One that cannot be used has the reason in its row and costs no other; the exit code
    is then 3. Of images (PNG, JPEG, TIFF) every pixel gets a class, and the mask is a PNG.

    A research model's answer is not a diagnosis.

    Example: histoflare segment a.svs --model nuclei/seed-1 --out a.mask.tiff --geojson a.geojson
    --overlay a.png

    Example: histoflare segment slides --model nuclei/seed-1 --out masks --geojson outlines
    """
    from histoflare.model_file import read_model_header
    from histoflare.site.kinds import IMAGES
    from histoflare.slides.files import fingerprint
    from histoflare.slides.reader import Slide
    from histoflare.slides.resolution import check_given_mpp

    header = read_model_header(model)
    header.check_data(IMAGES.name)
    check_given_mpp(mpp, "--mpp")
    many = is_many(slide, mask)
    if many:
        check_output_folders([mask, geojson, overlay], [slide, header.path])
    else:
        check_outputs([mask, geojson, overlay], [slide, header.path])
    if header.mpp is None:
        say(
            "note: the model does not say its resolution; the slide is taken as its finest level is", "yellow"
        )
    if many:
        options = {"plane": plane.value, "batch": batch, "threads": threads, "again": again}
        raise typer.Exit(_segment_many(slide, header, mask, geojson, overlay, device, mpp, options, as_json))
    with Slide(slide, mpp=mpp) as opened, progress() as bar:
        # Loading PyTorch and the network takes seconds: what may be wrong with the slide comes before.
        _check_slide(opened, header.mpp)
        loaded = _load(header.path, device)
        from histoflare.masks.segmenter import segment_slide
        from histoflare.masks.slide_files import MaskFiles, write_mask_files

        windows = bar.add_task("windows", total=None)
        begun = False

        def on_windows(done: int, total: int) -> None:
            nonlocal begun
            if begun or done == total:
                bar.update(windows, completed=done, total=total)
            else:  # those of an earlier run say nothing about the time that is left
                bar.reset(windows, completed=done, total=total)
            begun = True

        files = MaskFiles(geojson, overlay)
        result = segment_slide(
            opened,
            loaded,
            mask,
            model_id=fingerprint(header.path).sha256,
            batch=batch,
            threads=threads,
            plane=plane.value,
            again=again,
            on_progress=on_windows,
            also=[lambda result: write_mask_files(files, opened, result, loaded.background)],
        )
    _show(result, [path for path in (mask, geojson, overlay) if path is not None], as_json=as_json)


def is_many(path: Path, out_path: Path) -> bool:
    """Tell whether many are meant: by a manifest, or by a folder whose masks do not go to one TIFF."""
    if path.suffix.lower() == ".csv":
        return True
    return path.is_dir() and out_path.suffix.lower() not in (".tif", ".tiff")


def _segment_many(
    path: Path,
    header: ModelHeader,
    folder: Path,
    geojson: Path | None,
    overlay: Path | None,
    device: str,
    mpp: float | None,
    options: dict[str, Any],
    as_json: bool,
) -> int:
    """Make the masks and the table of results; return the exit code."""
    from histoflare.slides.files import fingerprint
    from histoflare.slides.sources import find_sources

    sources = find_sources(path, images=True)
    if (geojson or overlay) and any(source.kind == "image" for source in sources):
        raise JobError(f"{path}: holds images; --geojson and --overlay are of slides. Leave them out.")
    from histoflare.masks.segment_slides import TABLE_FILE, segment_slides
    from histoflare.masks.slide_files import MaskFiles

    report = follow_table(
        lambda on_start, on_row, on_part: segment_slides(
            lambda: _load(header.path, device),
            header.labels,
            sources,
            folder,
            model_sha256=fingerprint(header.path).sha256,
            folders=MaskFiles(geojson, overlay),
            default_mpp=mpp,
            on_start=on_start,
            on_row=on_row,
            on_windows=lambda source, done, total: on_part(f"{source.path.name}: window {done} of {total}"),
            **options,
        )
    )
    show_table(report, folder / TABLE_FILE, as_json=as_json)
    return report.exit_code


def _load(path: Path, device: str) -> TaskModel:
    """Return the model in a file, on its device."""
    from histoflare.bags.encoder import choose_device
    from histoflare.masks.task_model import load_task_model

    return load_task_model(path, choose_device(device))


def _check_slide(slide: Slide, mpp: float | None) -> None:
    """Raise :class:`SlideError` if the slide has no resolution, not that of the model, or no tissue."""
    from histoflare.slides.tissue import COARSEST_MASK_MPP, MASK_PX_PER_PATCH, find_tissue

    slide.l0_per_px(slide.mpp if mpp is None else mpp)
    find_tissue(slide, um_patch=COARSEST_MASK_MPP * MASK_PX_PER_PATCH)


def _show(result: SegmentedSlide, files: Sequence[Path], *, as_json: bool) -> None:
    """Say what was found."""
    indices = range(len(result.labels))
    if as_json:
        print_json(
            {
                "files": [str(path) for path in files],
                "size_px": list(result.size_px),
                "mpp": result.mpp,
                **result.plane.to_json(),
                "outside": result.outside,
                "windows": result.windows,
                "windows_in_grid": result.grid_windows,
                "classes": {
                    result.labels[index]: {
                        "value": index,
                        "area_mm2": result.area_mm2(index),
                        "share_of_tissue": result.share(index),
                    }
                    for index in indices
                },
            }
        )
        return
    table = make_table("value", "class", "area (mm²)", "share of tissue")
    for index in indices:
        table.add_row(
            str(index), result.labels[index], f"{result.area_mm2(index):.4g}", f"{result.share(index):.1%}"
        )
    out.print(table)
    width, height = result.size_px
    earlier = f", {result.windows_before} of them before" if result.windows_before else ""
    console.print(
        f"{result.windows} of {result.grid_windows} windows hold tissue{earlier} · "
        f"mask {width} x {height} px at {result.mpp:.4g} µm/px, plane {result.plane.name} "
        f"(corner at {result.plane.l0_xy[0]}, {result.plane.l0_xy[1]} of level 0)",
        highlight=False,
        markup=False,
    )
    tell(", ".join(map(str, files)))

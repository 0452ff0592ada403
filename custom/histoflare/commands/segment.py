"""``histoflare segment``: one slide, from its file to a mask of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histoflare.commands.console import console, make_table, out, print_json, progress
from histoflare.commands.options import MODEL_HELP, PLANE_HELP, PlaneName
from histoflare.commands.outputs import check_outputs
from histoflare.commands.slide import MPP_HELP

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from histoflare.masks.segmenter import SegmentedSlide
    from histoflare.masks.task import MaskTask
    from histoflare.slides.reader import Slide


@dataclass(frozen=True)
class TaskModel:
    """A task and its trained network as a model of windows (``masks.segmenter.WindowModel``)."""

    task: MaskTask
    network: torch.nn.Module

    @property
    def labels(self) -> Sequence[str]:
        """Names of the classes."""
        return self.task.labels

    @property
    def background(self) -> str | None:
        """The class of what is no tissue."""
        return self.task.background

    @property
    def mpp(self) -> float | None:
        """Resolution of the windows in µm/px."""
        return self.task.mpp

    @property
    def window_px(self) -> int:
        """Side of a window."""
        return self.task.window_px

    @property
    def stride_px(self) -> int:
        """Distance of windows."""
        return self.task.stride_px

    @property
    def patch_px(self) -> int:
        """Side of a window's probabilities."""
        return self.task.patch_px

    def probabilities(self, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the class probabilities (b, k, p, p) of ``windows`` (b, w, w, 3)."""
        return self.task.window_probabilities(self.network, windows)


def segment(
    slide: Annotated[Path, typer.Argument(help="Slide file, or the folder of a DICOM series.")],
    model: Annotated[Path, typer.Option(help=MODEL_HELP)],
    mask: Annotated[Path, typer.Option("--out", help="The mask: a pyramidal TIFF of class indices.")],
    geojson: Annotated[Path | None, typer.Option(help="Outlines of the classes for QuPath.")] = None,
    overlay: Annotated[Path | None, typer.Option(help="Picture of the slide and its classes (PNG).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    plane: Annotated[PlaneName, typer.Option(help=PLANE_HELP)] = PlaneName.BOUNDS,
    mpp: Annotated[float | None, typer.Option(help=MPP_HELP)] = None,
    batch: Annotated[int, typer.Option(help="Windows given to the network at once.", min=1)] = 8,
    threads: Annotated[int, typer.Option(help="Threads that read windows.", min=1)] = 1,
    again: Annotated[bool, typer.Option("--again", help="Forget an unfinished mask; begin anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Give every pixel of a slide's tissue a class.

    Overlapping windows are blended. The mask opens in OpenSlide and QuPath; mask and outlines say in which
    plane of the slide they lie. Where there is no tissue the mask has the model's background class, else 255.
    A command that was stopped goes on where it was.

    A research model's answer is not a diagnosis.

    Example: histoflare segment a.svs --model demo-run --out a.mask.tiff --geojson a.geojson --overlay a.png
    """
    from histoflare.model_file import read_model_header
    from histoflare.slides.files import fingerprint
    from histoflare.slides.reader import Slide

    header = read_model_header(model)
    header.check_data("images")
    check_outputs([mask, geojson, overlay], [slide, header.path])
    if header.mpp is None:
        console.print(
            "note: the model does not say its resolution; the slide is taken as its finest level is",
            style="yellow",
            highlight=False,
        )
    with Slide(slide, mpp=mpp) as opened, progress() as bar:
        # Loading PyTorch and the network takes seconds: what may be wrong with the slide comes before.
        _check_slide(opened, header.mpp)
        loaded = _load(header.path, device)
        from histoflare.masks.segmenter import segment_slide

        windows = bar.add_task("windows", total=None)

        def write_extras(result: SegmentedSlide) -> None:
            if geojson is not None:
                write_geojson(geojson, result, loaded.task.background)
            if overlay is not None:
                write_overlay(overlay, opened, result, loaded.task.background)

        result = segment_slide(
            opened,
            loaded,
            mask,
            model_id=fingerprint(header.path).sha256,
            batch=batch,
            threads=threads,
            plane=plane.value,
            again=again,
            on_progress=lambda done, total: bar.update(windows, completed=done, total=total),
            also=[write_extras],
        )
    _show(result, [path for path in (mask, geojson, overlay) if path is not None], as_json=as_json)


def _load(path: Path, device: str) -> TaskModel:
    """Return the model in a file, on its device."""
    from histoflare.bags.encoder import choose_device
    from histoflare.masks.task import MaskTask
    from histoflare.model_file import read_model_file

    loaded = read_model_file(path, MaskTask)
    return TaskModel(loaded.task, loaded.build_model().to(choose_device(device)))


def _check_slide(slide: Slide, mpp: float | None) -> None:
    """Raise :class:`SlideError` if the slide has no resolution, not that of the model, or no tissue."""
    from histoflare.slides.tissue import COARSEST_MASK_MPP, MASK_PX_PER_PATCH, find_tissue

    slide.l0_per_px(slide.mpp if mpp is None else mpp)
    find_tissue(slide, um_patch=COARSEST_MASK_MPP * MASK_PX_PER_PATCH)


def write_geojson(path: Path, result: SegmentedSlide, background: str | None) -> None:
    """Write the outlines of the classes other than ``background``."""
    from histoflare.masks.outlines import write_outlines
    from histoflare.slides.mask_overlay import class_colours
    from histoflare.slides.mask_pyramid import MaskPyramid

    with MaskPyramid(result.path) as opened:
        write_outlines(
            path,
            opened,
            result.labels,
            class_colours(len(result.labels)),
            l0_per_px=result.l0_per_px,
            without=[] if background is None else [background],
        )


def write_overlay(path: Path, slide: Slide, result: SegmentedSlide, background: str | None) -> None:
    """Write a picture of the slide with the classes other than ``background`` in colour."""
    from histoflare.slides.mask_overlay import draw_classes
    from histoflare.slides.mask_pyramid import MaskPyramid
    from histoflare.slides.overlay import read_picture
    from histoflare.storage import atomic_path

    notes = [
        f"{result.area_mm2(index):.3g} mm2, {result.share(index):.1%}" for index in range(len(result.labels))
    ]
    with MaskPyramid(result.path) as opened:
        picture = draw_classes(
            read_picture(slide),
            opened,
            result.l0_per_px,
            result.labels,
            notes,
            mpp=slide.mpp,
            without=[] if background is None else [background],
        )
    with atomic_path(path) as partial:
        picture.save(partial, "PNG")


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
    out.print(", ".join(map(str, files)), soft_wrap=True, highlight=False, markup=False)

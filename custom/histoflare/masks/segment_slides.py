"""Many slides or images and one segmentation model: masks in a folder, and a CSV (``slides.results``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from histoflare.masks.image_files import decode_image, read_file
from histoflare.masks.importers import write_mask
from histoflare.masks.resolution import is_same_mpp
from histoflare.masks.segmenter import segment_slide
from histoflare.masks.slide_files import MaskFiles, write_mask_files
from histoflare.masks.task_model import TaskModel
from histoflare.slides.planes import PlaneName
from histoflare.slides.reader import open_with_default
from histoflare.slides.results import Table, TableReport, fill_table, say_given
from histoflare.slides.sources import Source

TABLE_FILE = "results.csv"


def segment_slides(
    load: Callable[[], TaskModel],
    labels: Sequence[str],
    sources: Sequence[Source],
    folder: Path,
    *,
    model_sha256: str,
    folders: MaskFiles,
    plane: PlaneName = "bounds",
    default_mpp: float | None = None,
    batch: int = 8,
    threads: int = 1,
    again: bool = False,
    on_start: Callable[[int, int], None] = lambda *_: None,
    on_row: Callable[[], None] = lambda: None,
    on_windows: Callable[[Source, int, int], None] = lambda *_: None,
) -> TableReport:
    """Segment every slide or image; return the rows of the table ``results.csv`` in ``folder``.

    A slide's mask is ``<id>.tiff``, an image's ``<id>.png``, ``<id>`` being :attr:`Source.file_id`. Columns
    ``share_<class>`` are shares of the tissue, or of an image's pixels. ``mm2_<class>`` are areas: of an
    image that does not say its resolution at the model's, and none where that says none either. A slide that
    was stopped in its middle goes on there.

    Args:
        load: Loads the model; called once, if a slide is to be done at all.
        labels: Its classes.
        model_sha256: Of the model file; rows of another model are made anew.
        folders: Where each slide's outlines and picture go.
        plane: Of slides' masks.
        default_mpp: Resolution in µm/px of what has none in the manifest and states none.
        batch, threads, again: As of :func:`segment_slide`.
        on_start, on_row: As of :func:`fill_table`.
        on_windows: Told how many windows of a slide are done, and of how many.

    Raises:
        JobError, OSError: As :func:`fill_table`.
    """
    table = Table(
        folder / TABLE_FILE,
        ["mask", *(f"share_{label}" for label in labels), *(f"mm2_{label}" for label in labels)],
        {"model_sha256": model_sha256, "given_mpp": "", "plane": plane},
    )
    model: list[TaskModel] = []

    def start(kept: int, wanted: int) -> None:
        if wanted:  # what is wrong with the model is no fault of a slide
            model.append(load())
        on_start(kept, wanted)

    def segment(source: Source) -> Mapping[str, Any]:
        if source.kind == "image":
            return _segment_image(model[0], source, mask_of(source), default_mpp, batch)
        files = folders.of(source.file_id)
        with open_with_default(source.path, source.mpp, default_mpp) as slide:
            result = segment_slide(
                slide,
                model[0],
                mask_of(source),
                model_id=model_sha256,
                batch=batch,
                threads=threads,
                plane=plane,
                again=again,
                on_progress=lambda done, total: on_windows(source, done, total),
                also=[lambda result: write_mask_files(files, slide, result, model[0].background)],
            )
        indices = range(len(labels))
        return {
            "mask": result.path.name,
            **{f"share_{labels[index]}": f"{result.share(index):.6f}" for index in indices},
            **{f"mm2_{labels[index]}": f"{result.area_mm2(index):.6g}" for index in indices},
        }

    def mask_of(source: Source) -> Path:
        return folder / f"{source.file_id}{'.png' if source.kind == 'image' else '.tiff'}"

    def files_of(source: Source) -> list[Path]:
        beside = [] if source.kind == "image" else folders.of(source.file_id).wanted
        return [mask_of(source), *beside]

    return fill_table(
        table,
        sources,
        segment,
        files=files_of,
        own_settings=lambda source: {"given_mpp": say_given(source.mpp, default_mpp)},
        on_start=start,
        on_row=on_row,
    )


def _segment_image(
    model: TaskModel, source: Source, path: Path, default_mpp: float | None, batch: int
) -> dict[str, Any]:
    """Write the mask of an image as a PNG of class indices; return its row's cells."""
    mpp = default_mpp if source.mpp is None else source.mpp
    image = decode_image(read_file(source.path, "IMAGE"), source.path)
    mask = model.segment_image(image, mpp, batch)
    write_mask(path, mask)
    warnings = ""
    if mpp is None and model.mpp is not None:
        warnings = f"the image does not say its resolution; it is taken for the model's {model.mpp:g} µm/px"
    elif mpp is not None and model.mpp is not None and not is_same_mpp(mpp, model.mpp):
        warnings = f"at {mpp:g} µm/px, and brought to the model's {model.mpp:g}"
    counts = np.bincount(mask.ravel(), minlength=len(model.labels))
    known = model.mpp if mpp is None else mpp
    return {
        "mask": path.name,
        "warnings": warnings,
        **{f"share_{label}": f"{counts[k] / mask.size:.6f}" for k, label in enumerate(model.labels)},
        **{
            f"mm2_{label}": "" if known is None else f"{counts[k] * known**2 / 1e6:.6g}"
            for k, label in enumerate(model.labels)
        },
    }

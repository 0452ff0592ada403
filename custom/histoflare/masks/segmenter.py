"""A segmentation network over a whole slide, into a pyramidal TIFF of class indices.

Windows (see ``slide_grid``) that hold any tissue are read ahead in threads while the network works, and
stitched (``stitcher``) in another. Memory holds a few batches of windows and the tissue's mask (a bit for
8 x 8 µm), not the slide. What is finished is on disk, row of windows by row: after a crash, Ctrl-C or SIGKILL
the same call goes on from there and gives the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from monai.data.utils import compute_importance_map
from numpy.typing import NDArray

from histoflare.errors import JobError
from histoflare.masks.mask_scratch import CellStore, rows_done, scratch_for
from histoflare.masks.slide_grid import SlideGrid, TissueMap, plan_grid, read_windows
from histoflare.masks.stitcher import Stitcher
from histoflare.masks.windows import IGNORE
from histoflare.slides.mask_pyramid import write_mask_pyramid
from histoflare.slides.planes import Plane, PlaneName
from histoflare.slides.reader import Slide, fingerprint, slide_files

OUTSIDE = IGNORE
"""Of the mask where there is no tissue and the model has no background class."""

SIGMA_SCALE = 0.125
"""Standard deviation of the Gaussian weight as a share of a window's side; MONAI's default."""

VERSION = 2
AHEAD = 2

Blend = Literal["gaussian", "constant"]
Batch = tuple[int, NDArray[np.int64], bool]  # row, columns, whether it is the row's last


class WindowModel(Protocol):
    """A network that gives class probabilities to windows."""

    @property
    def labels(self) -> Sequence[str]:
        """Names of the k classes, at most 255."""
        ...

    @property
    def background(self) -> str | None:
        """The class of what is no tissue; None if there is none."""
        ...

    @property
    def mpp(self) -> float | None:
        """Resolution of the windows in µm/px; None takes level 0 as it is."""
        ...

    @property
    def window_px(self) -> int:
        """Side w of a window at ``mpp``."""
        ...

    @property
    def stride_px(self) -> int:
        """Wanted distance of windows at ``mpp``, at most w."""
        ...

    @property
    def patch_px(self) -> int:
        """Side p of a window's probabilities."""
        ...

    def probabilities(self, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the class probabilities (b, k, p, p) of RGB ``windows`` (b, w, w, 3)."""
        ...


@dataclass(frozen=True)
class SegmentedSlide:
    """What was made of a slide.

    Attributes:
        path: The mask.
        labels: Names of the classes 0, 1, …
        outside: Value of the pixels without tissue: the background class, or :data:`OUTSIDE`.
        size_px, mpp: (width, height) of the mask, and its resolution in µm/px.
        l0_per_px: Level-0 pixels of the slide that a pixel of the mask spans along a side.
        plane: The part of the slide that the mask covers.
        tissue_px: How many pixels of tissue each class has.
        windows, grid_windows: Windows with tissue, and all.
        windows_before: How many of ``windows`` an earlier, interrupted run had done.
    """

    path: Path
    labels: tuple[str, ...]
    outside: int
    size_px: tuple[int, int]
    mpp: float
    l0_per_px: float
    plane: Plane
    tissue_px: tuple[int, ...]
    windows: int
    grid_windows: int
    windows_before: int

    def area_mm2(self, index: int) -> float:
        """Return the area of a class in the tissue, in mm²."""
        return self.tissue_px[index] * self.mpp**2 / 1e6

    def share(self, index: int) -> float:
        """Return the share of the tissue that a class has; 0 if there is no tissue."""
        return self.tissue_px[index] / max(1, sum(self.tissue_px))


def segment_slide(
    slide: Slide,
    model: WindowModel,
    out: Path,
    *,
    model_id: str,
    batch: int = 8,
    threads: int = 1,
    blend: Blend = "gaussian",
    plane: PlaneName = "bounds",
    again: bool = False,
    on_progress: Callable[[int, int], None] = lambda *_: None,
    also: Sequence[Callable[[SegmentedSlide], None]] = (),
) -> SegmentedSlide:
    """Write the mask of ``slide``: a pixel is the index of its class.

    Only tissue (:func:`find_tissue`) gets a class. Everything else is the model's background class if it has
    one, else the value 255 (:data:`OUTSIDE`), which is then no class. A pixel of the mask that touches any
    tissue is tissue. The mask's resolution is the model's mpp times ``window_px / patch_px``; where the slide
    can give that mpp within 2 % without resampling, the slide's own takes its place (0.499 for 0.5), so mask
    and slide lie on each other.

    Args:
        slide: Closed by whoever opened it.
        model: The network.
        out: The TIFF, whole or not there. Beside it ``<out>.partial/`` is on disk meanwhile.
        model_id: SHA-256 of the model file, or what else tells it from every other model.
        batch: Windows given to the model at once, of one row; changes speed, memory and roundings only.
        threads: That read.
        blend: How overlapping windows are averaged: by a Gaussian around the window's middle (MONAI's, at
            least 0.001 of its largest value), or evenly.
        plane: The part of the slide that the mask covers; ``bounds`` is what QuPath shows.
        again: Start anew, whatever an interrupted run left.
        on_progress: Called with (windows done, windows in all); windows without tissue do not count.
        also: Called with the result once ``out`` is there; if one fails, the same call again only repeats the
            writing, not the network.

    Raises:
        SlideError: No tissue, no mpp, too coarse for the model, or unreadable.
        MaskError: Another process makes ``out`` (SEGMENTATION_BUSY), or ``<out>.partial`` is of another
            slide, model or setting (SEGMENTATION_CHANGED).
        JobError: ``out`` is a file of the slide, or the model's probabilities are not finite numbers
            (NOT_FINITE).
        OSError: The disk is full or cannot be written; the same call goes on once it can.
    """
    if out.resolve() in {file.resolve() for file in slide_files(slide.path)}:
        raise JobError(f"{out}: is the slide itself; give another file for its mask.")
    grid = plan_grid(
        slide,
        window_px=model.window_px,
        stride_px=model.stride_px,
        patch_px=model.patch_px,
        mpp=model.mpp,
        plane=plane,
    )
    if not 1 <= len(model.labels) <= OUTSIDE or batch < 1:
        raise ValueError(f"{len(model.labels)} classes and batches of {batch} are out of range")
    outside = OUTSIDE if model.background is None else list(model.labels).index(model.background)
    identity = _identity(slide, model, model_id, blend, grid.plane)
    tissue = TissueMap(slide, grid)
    columns = [tissue.columns(row) for row in range(len(grid.ys))]
    with scratch_for(out, identity, again=again) as folder:
        done = rows_done(folder)
        before = sum(map(len, columns[:done]))
        if done < len(columns):
            weight = _weight(grid.patch_px, blend)
            stitcher = Stitcher(grid, tissue, len(model.labels), outside, weight, folder)
            batches = _batches(columns, done, batch)
            _run(slide, model, grid, stitcher, batches, threads, before, sum(map(len, columns)), on_progress)
        cells = CellStore(
            folder, grid.edges(grid.xs), grid.edges(grid.ys), grid.size_px, len(model.labels), outside
        )
        write_mask_pyramid(
            folder / "mask.tiff", cells.read, grid.size_px, grid.out_mpp, plane=grid.plane, scratch=folder
        )
        (folder / "mask.tiff").replace(out)
        result = SegmentedSlide(
            path=out,
            labels=tuple(model.labels),
            outside=outside,
            size_px=grid.size_px,
            mpp=grid.out_mpp,
            l0_per_px=grid.l0_per_px,
            plane=grid.plane,
            tissue_px=tuple(int(count) for count in cells.tissue_px()),
            windows=sum(map(len, columns)),
            grid_windows=len(grid.xs) * len(grid.ys),
            windows_before=before,
        )
        for each in also:
            each(result)
    return result


def _identity(
    slide: Slide, model: WindowModel, model_id: str, blend: Blend, plane: Plane
) -> Mapping[str, Any]:
    """Return what the mask depends on, up to roundings."""
    return {
        "version": VERSION,
        "slide": fingerprint(slide.path).sha256,
        "slide_mpp": slide.mpp,
        "model": model_id,
        "labels": list(model.labels),
        "background": model.background,
        "mpp": model.mpp,
        "window_px": model.window_px,
        "stride_px": model.stride_px,
        "patch_px": model.patch_px,
        "blend": blend,
        **plane.to_json(),
    }


def _weight(side: int, blend: Blend) -> NDArray[np.float32]:
    """Return the weight (side, side) of a window's pixels, > 0."""
    weight = compute_importance_map((side, side), mode=blend, sigma_scale=SIGMA_SCALE)
    array: NDArray[np.float32] = weight.numpy().astype(np.float32)
    return array


def _batches(columns: Sequence[NDArray[np.int64]], first_row: int, batch: int) -> Iterator[Batch]:
    """Yield the batches of windows, at least one (maybe empty) a row: a row's do not depend on the others."""
    for row in range(first_row, len(columns)):
        starts = range(0, max(1, len(columns[row])), batch)
        for start in starts:
            yield row, columns[row][start : start + batch], start == starts[-1]


def _run(
    slide: Slide,
    model: WindowModel,
    grid: SlideGrid,
    stitcher: Stitcher,
    batches: Iterator[Batch],
    threads: int,
    done: int,
    total: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Give every batch to the model and on to ``stitcher``, which has its own thread."""
    expected = (len(model.labels), grid.patch_px, grid.patch_px)
    stitching: Future[None] | None = None
    on_progress(done, total)
    with (
        closing(_read_ahead(slide, grid, batches, threads)) as read,
        ThreadPoolExecutor(1, thread_name_prefix="stitch") as pool,
    ):
        try:
            for (row, columns, last), windows in read:
                probabilities = None
                if windows is not None:
                    probabilities = model.probabilities(windows)
                    _check(probabilities, (len(columns), *expected))
                if stitching is not None:
                    stitching.result()
                stitching = pool.submit(stitcher.add, row, columns.tolist(), probabilities, last=last)
                done += len(columns)
                on_progress(done, total)
            if stitching is not None:
                stitching.result()
        except BaseException:
            pool.shutdown(wait=True)
            stitcher.abandon()
            raise


def _check(probabilities: NDArray[np.float32], expected: tuple[int, ...]) -> None:
    if probabilities.shape != expected:
        raise ValueError(f"the model gave {probabilities.shape}, not {expected}")
    if not np.isfinite(probabilities).all():
        raise JobError(
            "The model gives NaN or infinity on this slide: its training diverged, or it is damaged.",
            reason="NOT_FINITE",
        )


def _read_ahead(
    slide: Slide, grid: SlideGrid, batches: Iterator[Batch], threads: int
) -> Generator[tuple[Batch, NDArray[np.uint8] | None], None, None]:
    """Yield every batch with its windows (None for an empty one), read while the caller is at work."""
    waiting: deque[tuple[Batch, Future[NDArray[np.uint8]] | None]] = deque()
    pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="windows")
    try:
        for batch in batches:
            row, columns, _ = batch
            future = pool.submit(read_windows, slide, grid, row, columns) if len(columns) else None
            waiting.append((batch, future))
            if sum(each is not None for _, each in waiting) > AHEAD * threads or len(waiting) > 64:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _first(
    waiting: deque[tuple[Batch, Future[NDArray[np.uint8]] | None]],
) -> tuple[Batch, NDArray[np.uint8] | None]:
    batch, future = waiting.popleft()
    return batch, None if future is None else future.result()

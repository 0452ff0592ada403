"""Whole-slide images, read by resolution.

Planes: ``l0_`` is a pixel of level 0 (the finest), ``lv_`` a pixel of the level that is read; sizes without a
plane are pixels of the wanted resolution. Resolution is always mpp, micrometres per pixel; a level is chosen
by its mpp and never by its index.

Only what :class:`SlideInfo` lists is taken from a slide's properties. Label, macro and thumbnail images are
never opened, and no other property (barcode, date, DICOM patient tag) is read.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from histoflare.errors import SlideError
from histoflare.slides.files import SlideFingerprint, fingerprint, opening_file, slide_files
from histoflare.slides.formats import describe_refused, describe_unknown, ome_fault
from histoflare.slides.pixels import Block, extend_edges, resample
from histoflare.slides.resolution import (
    LevelInfo,
    SlideInfo,
    check_given_mpp,
    choose_level,
    is_mpp,
    slide_info,
)

__all__ = ["LevelInfo", "Slide", "SlideFingerprint", "SlideInfo", "fingerprint", "is_mpp", "slide_files"]

BLOCK_PX = 4096
"""Side of the largest region read at once for a thumbnail: bounds memory on slides without a pyramid."""

SMALL_BLOCK_PX = 1024

BLOCK_ROWS = 3
"""Rows of small blocks that are read together: a column of them has 13 x 5 tiles of 256 px, half a cache."""

CACHE_BYTES = 1 << 25
"""Of decoded tiles that OpenSlide keeps of a slide: its own default."""

MPP_PLACE = "in the manifest's 'mpp' column, or with --mpp"
"""Where most commands take a slide's resolution from, if it states none."""


class Slide:
    """An open slide. Use it as a context manager; reads may come from several threads at once.

    Args:
        path: A file OpenSlide can open; for a DICOM series any of its files, or the folder that holds them.
        mpp: Resolution of level 0 in µm/px. Wins over what the slide says of itself, and that wins over its
            objective power (10 / power).
        mpp_place: Where the person can state that resolution, for the error if there is none.

    Attributes:
        info: What may be known of the slide.
        mpp_problem: In words, what is wrong with the slide's resolution; "" if nothing is. With ``mpp``, also
            that the slide says something else.

    Raises:
        SlideError: No such file (``SLIDE_MISSING``), a format OpenSlide does not know
            (``SLIDE_UNSUPPORTED``), damaged (``SLIDE_OPEN_FAILED``), several series in one folder
            (``SLIDE_AMBIGUOUS``), or ``mpp`` is no resolution (``SLIDE_MPP_INVALID``).

    >>> from pathlib import Path
    >>> from histoflare import Slide
    >>> with Slide(Path("slide.tif")) as slide:
    ...     print(slide.mpp, slide.thumbnail(mpp=8.0).shape[-1])
    0.5 3
    """

    def __init__(self, path: Path, *, mpp: float | None = None, mpp_place: str = MPP_PLACE) -> None:
        self.path = Path(path)
        self._mpp_place = mpp_place
        check_given_mpp(mpp, f"{self.path}: mpp")
        self._handle = _open(self.path)
        self._failure: Exception | None = None
        self._reads = 0
        self._changed = threading.Condition()
        self._plans: dict[float, tuple[int, float]] = {}
        try:
            self.info, self.mpp_problem = slide_info(
                self._handle.properties, self._handle.level_dimensions, self._handle.level_downsamples, mpp
            )
        except openslide.OpenSlideError as error:
            self._handle.close()
            raise _read_failed(self.path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the slide, once the reads that have begun are done; later ones fail.

        A thread may still read after Ctrl-C, and OpenSlide ends the whole process if that is not waited for.
        """
        with self._changed:
            self._failure = self._failure or ValueError("it was closed")
            self._changed.wait_for(lambda: not self._reads)
            self._handle.close()

    @property
    def content_id(self) -> str:
        """16 hex digits that tell slides apart: of OpenSlide's hash of the content, or else of the path."""
        known = self._handle.properties.get("openslide.quickhash-1") or str(self.path.resolve())
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    @property
    def mpp(self) -> float:
        """Resolution of level 0 in µm/px.

        Raises:
            SlideError: It is not known (``SLIDE_MPP_MISSING``).
        """
        if self.info.mpp is None:
            raise SlideError(
                f"{self.path}: {self.mpp_problem}. Give its resolution in micrometres per pixel: "
                f"{self._mpp_place} (0.25 for most 40x scans, 0.5 for 20x).",
                reason="SLIDE_MPP_MISSING",
            )
        return self.info.mpp

    def l0_per_px(self, mpp: float) -> float:
        """Return how many level-0 pixels one pixel at ``mpp`` spans along a side.

        Close (2 %) to a level, or to a whole multiple of one, that level or multiple is meant, so that reads
        need no or exact resampling and neighbouring patches touch.

        Raises:
            SlideError: As :meth:`read` for an ``mpp`` that cannot be had.
        """
        level, lv_per_px = self._plan(mpp)
        return self.info.levels[level].downsample * lv_per_px

    def read(self, l0_xy: tuple[int, int], size_px: tuple[int, int], mpp: float) -> NDArray[np.uint8]:
        """Return the region whose upper left corner is ``l0_xy``, at ``mpp``.

        Args:
            l0_xy: (x, y) in level-0 pixels; may lie outside the slide.
            size_px: (width, height) of the result, each >= 1.
            mpp: Wanted resolution in µm/px. Read from the coarsest level that is at least this fine.

        Returns:
            uint8 (height, width, 3), not to be written to (copy it first). Transparent parts and parts
            outside the slide are white; a pixel that lies partly outside shows the part of it inside.

        Raises:
            SlideError: The slide is too coarse for ``mpp`` (``SLIDE_TOO_COARSE``), has no mpp
                (``SLIDE_MPP_MISSING``), or fails to read (``SLIDE_READ_FAILED``; every later read then
                fails too).
        """
        return resample(self._read_pixels(l0_xy, size_px, mpp), size_px, self._plan(mpp)[1])

    def read_each(
        self, l0_corners: Sequence[tuple[int, int]], size_px: tuple[int, int], mpp: float
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield what :meth:`read` returns for each of ``l0_corners``, which lie close together.

        Read in one piece, the rectangle around them, where all corners are whole pixels of the level. Where
        they are not (a level's factor is seldom whole), each is blended from its own neighbours, and read
        on its own.

        Args:
            l0_corners: As of :meth:`read`; one or more.
            size_px: As of :meth:`read`.
            mpp: As of :meth:`read`.

        Raises:
            SlideError: As :meth:`read`.
        """
        level, lv_per_px = self._plan(mpp)
        lv_xy = np.array(l0_corners) / self.info.levels[level].downsample  # (n, 2)
        if (lv_xy % 1).any():
            for corner in l0_corners:
                yield self.read(corner, size_px, mpp)
            return
        lv_low = lv_xy.min(axis=0)
        lv_size = np.ceil(np.array(size_px) * lv_per_px)
        lv_width, lv_height = (lv_xy.max(axis=0) - lv_low + lv_size).astype(int).tolist()
        l0_x, l0_y = np.array(l0_corners).min(axis=0).tolist()
        piece = self._read_level((l0_x, l0_y), level, (lv_width, lv_height))
        level_info, places = self.info.levels[level], lv_xy - lv_low
        if lv_per_px.is_integer() and not (places % lv_per_px).any():  # averages of the same pixels
            piece = extend_edges(piece, (l0_x, l0_y), level_info, lv_per_px)
            whole_px = (lv_width // int(lv_per_px), lv_height // int(lv_per_px))
            pixels = resample(piece, whole_px, lv_per_px)
            for x, y in (places / lv_per_px).astype(int):
                yield pixels[y : y + size_px[1], x : x + size_px[0]]
            return
        for corner, (left, top) in zip(l0_corners, places, strict=True):
            image = piece.crop((int(left), int(top), int(left + lv_size[0]), int(top + lv_size[1])))
            yield resample(extend_edges(image, corner, level_info, lv_per_px), size_px, lv_per_px)

    def thumbnail(self, mpp: float) -> NDArray[np.uint8]:
        """Return the whole slide at ``mpp`` (at its own resolution if that is coarser): uint8 (h, w, 3).

        One pixel spans ``l0_per_px(max(mpp, self.mpp))`` level-0 pixels.

        Raises:
            SlideError: As :meth:`read`.
        """
        width_px, height_px = self.thumbnail_size_px(mpp)
        thumbnail = np.empty((height_px, width_px, 3), np.uint8)

        def show(block: Block) -> None:
            thumbnail[block.place] = block.pixels()

        self.each_block(mpp, show)
        return thumbnail

    def thumbnail_size_px(self, mpp: float) -> tuple[int, int]:
        """Return (width, height) of what :meth:`thumbnail` returns.

        Raises:
            SlideError: As :meth:`read` for an ``mpp`` that cannot be had.
        """
        level, lv_per_px = self._plan(max(mpp, self.mpp))
        # half a pixel of the level at least: corners are rounded to whole level-0 pixels
        sides = self.info.levels[level].lv_size_px
        width_px, height_px = (max(1, math.ceil((side - 0.5) / lv_per_px)) for side in sides)
        return width_px, height_px

    def each_block(self, mpp: float, use: Callable[[Block], None], threads: int = 1) -> None:
        """Call ``use`` with every block of what :meth:`thumbnail` returns, read once each.

        Memory holds a block for each thread, also on a slide without a pyramid.

        Args:
            mpp: As of :meth:`thumbnail`.
            use: Called from ``threads`` threads, so in no fixed order.
            threads: Threads that read, >= 1.

        Raises:
            SlideError: As :meth:`read`; or what ``use`` raises.
        """
        mpp = max(mpp, self.mpp)
        l0_per_px = self.l0_per_px(mpp)
        width_px, height_px = self.thumbnail_size_px(mpp)
        # where blocks begin at whole pixels of level 0 they can be small without a change of the result
        side_px = SMALL_BLOCK_PX if l0_per_px.is_integer() else BLOCK_PX
        level, lv_per_px = self._plan(mpp)
        downsample = self.info.levels[level].downsample
        step_px = _whole_step(max(1, int(side_px / lv_per_px)), lv_per_px)

        def read(px_xy: tuple[int, int]) -> None:
            x, y = px_xy
            size_px = (min(step_px, width_px - x), min(step_px, height_px - y))
            corner = round(x * l0_per_px), round(y * l0_per_px)
            image = self._read_pixels(corner, size_px, mpp)
            lv_xy = corner[0] / downsample, corner[1] / downsample
            use(Block(px_xy, size_px, level, lv_per_px, lv_xy, image))

        # a few rows at once, column by column: a tile of the file that two blocks share is still in the cache
        rows_px = BLOCK_ROWS * step_px
        corners = (
            (x, y)
            for top in range(0, height_px, rows_px)
            for x in range(0, width_px, step_px)
            for y in range(top, min(top + rows_px, height_px), step_px)
        )
        with ThreadPoolExecutor(max(1, threads), thread_name_prefix="blocks") as pool:
            list(pool.map(read, corners))

    def drop_cache(self) -> None:
        """Let go of the tiles that OpenSlide keeps of what was read; for a change from one level to another.

        Tiles of the old level would otherwise leave one by one, and the holes would stay in the heap.

        Raises:
            SlideError: The slide is closed, or failed before (``SLIDE_READ_FAILED``).
        """
        with self._reading():
            self._handle.set_cache(openslide.OpenSlideCache(CACHE_BYTES))

    def probe(self) -> None:
        """Read one pixel in the middle of every level: a slide that opens may still be unreadable.

        Raises:
            SlideError: A level cannot be read (``SLIDE_READ_FAILED``).
        """
        width, height = self.info.l0_size_px
        for level in range(len(self.info.levels)):
            self._read_level((width // 2, height // 2), level, (1, 1))

    def _plan(self, mpp: float) -> tuple[int, float]:
        """Return the level to read for ``mpp`` and how many of its pixels one wanted pixel spans."""
        plan = self._plans.get(mpp)
        if plan is None:
            try:
                plan = choose_level(self.info, self.mpp, mpp)
            except SlideError as error:
                if error.reason != "SLIDE_TOO_COARSE":
                    raise
                raise SlideError(f"{self.path}: {error}", reason=error.reason) from error
            self._plans[mpp] = plan
        return plan

    def _read_pixels(self, l0_xy: tuple[int, int], size_px: tuple[int, int], mpp: float) -> Image.Image:
        """Return the RGBA pixels of the level that :meth:`read` makes its result of."""
        level, lv_per_px = self._plan(mpp)
        width, height = (math.ceil(side * lv_per_px) for side in size_px)
        image = self._read_level(l0_xy, level, (width, height))
        return extend_edges(image, l0_xy, self.info.levels[level], lv_per_px)

    def _read_level(self, l0_xy: tuple[int, int], level: int, lv_size_px: tuple[int, int]) -> Image.Image:
        """Return a region of ``level`` as an RGBA image."""
        with self._reading():
            return self._handle.read_region(l0_xy, level, lv_size_px)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Make :meth:`close` wait for the block; raise :class:`SlideError` if the slide cannot be read."""
        with self._changed:
            if self._failure is not None:
                raise _read_failed(self.path, self._failure)
            self._reads += 1
        try:
            yield
        except openslide.OpenSlideError as error:
            self._failure = error  # OpenSlide's handle is dead from here on
            raise _read_failed(self.path, error) from error
        finally:
            with self._changed:
                self._reads -= 1
                self._changed.notify_all()


def _whole_step(longest_px: int, lv_per_px: float) -> int:
    """Return the longest step up to ``longest_px`` that is whole pixels of the level; that, if none is.

    OpenSlide blends neighbours where a region begins between two pixels, and takes four times as long.
    """
    whole = (
        step
        for step in range(longest_px, longest_px // 2, -1)
        if abs(step * lv_per_px - round(step * lv_per_px)) < 1e-9
    )
    return next(whole, longest_px)


def open_with_default(path: Path, mpp: float | None, default_mpp: float | None) -> Slide:
    """Return the slide opened at ``mpp``, or at ``default_mpp`` if that is None and the slide states none.

    Raises:
        SlideError: As :class:`Slide`.
    """
    slide = Slide(path, mpp=mpp)
    if slide.info.mpp is not None or default_mpp is None:
        return slide
    slide.close()
    return Slide(path, mpp=default_mpp)


def _open(path: Path) -> openslide.OpenSlide:
    file = opening_file(path)
    try:
        handle = openslide.OpenSlide(file)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(f"{path}: {describe_unknown(file)}.", reason="SLIDE_UNSUPPORTED") from error
    except (openslide.OpenSlideError, OSError) as error:
        message = describe_refused(str(error))
        raise SlideError(f"{path}: {message}.", reason="SLIDE_OPEN_FAILED") from error
    fault = ome_fault(handle.properties.get("openslide.comment", ""), handle.dimensions)
    if fault:
        handle.close()
        raise SlideError(
            f"{path}: {fault}. Export the one that is meant as a TIFF of its own.", reason="SLIDE_UNSUPPORTED"
        )
    return handle


def _read_failed(path: Path, error: Exception) -> SlideError:
    return SlideError(
        f"{path}: the slide opened but cannot be read ({error}). It is damaged: copy it again from its "
        "source, or leave it out.",
        reason="SLIDE_READ_FAILED",
    )

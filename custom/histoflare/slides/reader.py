"""Whole-slide images, read by resolution.

Planes: ``l0_`` is a pixel of level 0 (the finest), ``lv_`` a pixel of the level that is read; sizes without a
plane are pixels of the wanted resolution. Resolution is always mpp, micrometres per pixel; a level is chosen
by its mpp and never by its index.

Only what :class:`SlideInfo` lists is taken from a slide's properties. Label, macro and thumbnail images are
never opened, and no other property (barcode, date, DICOM patient tag) is read.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from histoflare.errors import SlideError
from histoflare.slides.files import SlideFingerprint, fingerprint, opening_file, slide_files
from histoflare.slides.resolution import (
    LevelInfo,
    SlideInfo,
    choose_level,
    given_mpp_fault,
    is_mpp,
    slide_info,
)

__all__ = ["LevelInfo", "Slide", "SlideFingerprint", "SlideInfo", "fingerprint", "is_mpp", "slide_files"]

BLOCK_PX = 4096
"""Side of the largest region read at once for a thumbnail: bounds memory on slides without a pyramid."""

SMALL_BLOCK_PX = 1024

CACHE_BYTES = 1 << 25
"""Of decoded tiles that OpenSlide keeps of a slide: its own default."""


class Slide:
    """An open slide. Use it as a context manager; reads may come from several threads at once.

    Args:
        path: A file OpenSlide can open; for a DICOM series any of its files, or the folder that holds them.
        mpp: Resolution of level 0 in µm/px. Wins over what the slide says of itself, and that wins over its
            objective power (10 / power).

    Attributes:
        info: What may be known of the slide.
        mpp_problem: In words, what is wrong with the slide's resolution; "" if nothing is. With ``mpp``, also
            that the slide says something else.

    Raises:
        SlideError: No such file (``SLIDE_MISSING``), a format OpenSlide does not know
            (``SLIDE_UNSUPPORTED``), damaged (``SLIDE_OPEN_FAILED``), several series in one folder
            (``SLIDE_AMBIGUOUS``), or ``mpp`` is no resolution (``SLIDE_MPP_INVALID``).
    """

    def __init__(self, path: Path, *, mpp: float | None = None) -> None:
        self.path = Path(path)
        if mpp is not None and (fault := given_mpp_fault(mpp)):
            raise SlideError(f"{self.path}: mpp {mpp:g} {fault}.", reason="SLIDE_MPP_INVALID")
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
    def mpp(self) -> float:
        """Resolution of level 0 in µm/px.

        Raises:
            SlideError: It is not known (``SLIDE_MPP_MISSING``).
        """
        if self.info.mpp is None:
            raise SlideError(
                f"{self.path}: {self.mpp_problem}. Give its resolution in micrometres per pixel: "
                "in the manifest's 'mpp' column, or with --mpp (0.25 for most 40x scans, 0.5 for 20x).",
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
        return _resample(self._read_pixels(l0_xy, size_px, mpp), size_px, self._plan(mpp)[1])

    def thumbnail(self, mpp: float) -> NDArray[np.uint8]:
        """Return the whole slide at ``mpp`` (at its own resolution if that is coarser): uint8 (h, w, 3).

        One pixel spans ``l0_per_px(max(mpp, self.mpp))`` level-0 pixels.

        Raises:
            SlideError: As :meth:`read`.
        """
        width_px, height_px = self.thumbnail_size_px(mpp)
        thumbnail = np.empty((height_px, width_px, 3), np.uint8)
        top = 0
        for rows, _ in self.thumbnail_rows(mpp):
            thumbnail[top : top + len(rows)] = rows
            top += len(rows)
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

    def thumbnail_rows(self, mpp: float) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
        """Yield what :meth:`thumbnail` returns from top to bottom, some whole rows at a time.

        Read in blocks, so memory stays bounded on a slide without a pyramid.

        Yields:
            The pixels, uint8 (h, w, 3), and which of them were scanned, bool (h, w): the others are
            transparent in the slide, and white here.

        Raises:
            SlideError: As :meth:`read`.
        """
        mpp = max(mpp, self.mpp)
        l0_per_px = self.l0_per_px(mpp)
        width_px, height_px = self.thumbnail_size_px(mpp)
        # where blocks begin at whole pixels of level 0 they can be small without a change of the result
        side_px = SMALL_BLOCK_PX if l0_per_px.is_integer() else BLOCK_PX
        lv_per_px = self._plan(mpp)[1]
        step_px = max(1, int(side_px / lv_per_px))
        for y in range(0, height_px, step_px):
            rows = np.empty((min(step_px, height_px - y), width_px, 3), np.uint8)
            scanned = np.empty(rows.shape[:2], np.bool_)
            for x in range(0, width_px, step_px):
                size_px = (min(step_px, width_px - x), len(rows))
                corner = round(x * l0_per_px), round(y * l0_per_px)
                image = self._read_pixels(corner, size_px, mpp)
                rows[:, x : x + size_px[0]] = _resample(image, size_px, lv_per_px)
                scanned[:, x : x + size_px[0]] = _scanned(image, size_px)
            yield rows, scanned

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
        columns, rows = (
            _Edges.of(corner / self.info.levels[level].downsample, count, end, lv_per_px)
            for corner, count, end in zip(
                l0_xy, (width, height), self.info.levels[level].lv_size_px, strict=True
            )
        )
        return image if columns.inside and rows.inside else _extend(image, columns, rows)

    def _read_level(self, l0_xy: tuple[int, int], level: int, lv_size_px: tuple[int, int]) -> Image.Image:
        """Return a region of ``level`` as an RGBA image."""
        with self._reading():
            return self._handle.read_region(l0_xy, level, lv_size_px)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Have :meth:`close` wait for the block; raise :class:`SlideError` if the slide cannot be read."""
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


@dataclass(frozen=True)
class _Edges:
    """Where along a side a region of a level crosses the slide's edge, in pixels of the region.

    ``low`` to ``high`` lie in the slide; the pixels of the result that are made of any of these take up
    ``first`` to ``last``. ``low`` = ``high`` where nothing lies in the slide.
    """

    low: int
    high: int
    first: int
    last: int
    inside: bool

    @classmethod
    def of(cls, lv_start: float, count: int, lv_end: int, lv_per_px: float) -> Self:
        """Return the edges of ``count`` pixels from ``lv_start`` on, on a level of ``lv_end`` pixels."""
        if lv_start >= -1e-6 and lv_start + count <= lv_end + 1e-6:
            return cls(0, count, 0, count, True)

        def within(place: float) -> int:
            return min(max(math.floor(place), 0), count)

        # a pixel that the edge cuts is taken as it is only if there is no whole one
        low, high = within(1 - 1e-6 - lv_start), within(lv_end - lv_start + 1e-6)
        if low >= high:
            low, high = within(-lv_start), within(lv_end - lv_start + 1 - 1e-6)
        first = within(math.floor(low / lv_per_px + 1e-6) * lv_per_px)
        last = within(math.ceil(high / lv_per_px - 1e-6) * lv_per_px + 1 - 1e-6)
        return cls(low, high, first, last, False)


def _extend(image: Image.Image, columns: _Edges, rows: _Edges) -> Image.Image:
    """Return an RGBA image with the slide's edge repeated into the pixels that lie partly outside."""
    if columns.low >= columns.high or rows.low >= rows.high:
        return image
    pixels = np.asarray(image).copy()  # (h, w, 4)
    for start, stop, edge in (
        (columns.first, columns.low, columns.low),
        (columns.high, columns.last, columns.high - 1),
    ):
        pixels[:, start:stop] = pixels[:, edge : edge + 1]
    for start, stop, edge in ((rows.first, rows.low, rows.low), (rows.high, rows.last, rows.high - 1)):
        pixels[start:stop] = pixels[edge : edge + 1]
    return Image.fromarray(pixels)


def _resample(image: Image.Image, size_px: tuple[int, int], lv_per_px: float) -> NDArray[np.uint8]:
    """Return an RGBA image of a level on white, at ``size_px`` (width, height): uint8 (h, w, 3)."""
    if lv_per_px == 1.0:
        return _rgb_array(image)
    if lv_per_px.is_integer():
        return np.asarray(_rgb_image(image).reduce(int(lv_per_px)))
    box = (0.0, 0.0, size_px[0] * lv_per_px, size_px[1] * lv_per_px)
    return np.asarray(_rgb_image(image).resize(size_px, Image.Resampling.BILINEAR, box=box))


def _scanned(image: Image.Image, size_px: tuple[int, int]) -> NDArray[np.bool_] | bool:
    """Return which pixels (h, w) of the result are not wholly transparent in an RGBA image of a level."""
    if _is_opaque(image):
        return True
    return np.asarray(image.getchannel("A").resize(size_px, Image.Resampling.BOX)) > 0


def _is_opaque(image: Image.Image) -> bool:
    """Tell whether no pixel of an RGBA image is transparent; cheaper than looking at its alpha band."""
    pixels = np.asarray(image).view(np.uint32)
    return bool(np.bitwise_and.reduce(pixels, axis=None).tobytes()[3] == 255)


def _rgb_image(image: Image.Image) -> Image.Image:
    """Return an RGBA image on white."""
    if _is_opaque(image):
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _rgb_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return an RGBA image on white as an array (h, w, 3)."""
    if not _is_opaque(image):
        return np.asarray(_rgb_image(image))
    packed = image.tobytes("raw", "RGB")  # a third of the time of convert and asarray
    return np.frombuffer(packed, np.uint8).reshape(image.height, image.width, 3)


def _open(path: Path) -> openslide.OpenSlide:
    file = opening_file(path)
    try:
        return openslide.OpenSlide(file)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(
            f"{path}: not a slide format OpenSlide knows, or the file is damaged. Whole-slide formats such "
            "as svs, ndpi, mrxs, scn, bif, tiled tiff and DICOM are read.",
            reason="SLIDE_UNSUPPORTED",
        ) from error
    except (openslide.OpenSlideError, OSError) as error:
        raise SlideError(
            f"{path}: the slide cannot be opened ({error}). Copy it again from its source, or leave it out.",
            reason="SLIDE_OPEN_FAILED",
        ) from error


def _read_failed(path: Path, error: Exception) -> SlideError:
    return SlideError(
        f"{path}: the slide opened but cannot be read ({error}). It is damaged: copy it again from its "
        "source, or leave it out.",
        reason="SLIDE_READ_FAILED",
    )

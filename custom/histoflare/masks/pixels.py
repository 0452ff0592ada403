"""Pixels of images and masks: read from files, checked, and as many kept in memory as a site allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histoflare.errors import MaskError
from histoflare.masks.image_files import content_hash, decode_image, decode_mask, decode_tissue, read_file
from histoflare.masks.windows import read_window

Files = tuple[Path, Path, Path | None]
Corner = tuple[int, int]
Patch = tuple[NDArray[np.uint8], NDArray[np.uint8]]


@dataclass(frozen=True)
class ImageRecord:
    """One image and its mask. ``split`` is train, validation or test."""

    slide_id: str
    patient: str
    split: str
    image: Path
    mask: Path
    tissue: Path | None = None
    mpp: float | None = None
    subgroups: Mapping[str, str] = field(default_factory=dict)
    content_sha256: str = ""


@dataclass(frozen=True)
class ReadImage:
    """Pixels: image uint8 (h, w, 3), mask uint8 (h, w), tissue bool (h, w) if known; not to be written to."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    tissue: NDArray[np.bool_] | None

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height)."""
        return self.image.shape[1], self.image.shape[0]

    @property
    def size_bytes(self) -> int:
        """Memory the pixels take."""
        return self.image.nbytes + self.mask.nbytes + (0 if self.tissue is None else self.tissue.nbytes)


@dataclass
class PixelCache:
    """Pixels that were read, up to ``limit_bytes`` of them; what does not fit is read again each time.

    Windows that are resized take a fraction of their image's memory: they are kept instead of it, and go
    before images that were kept earlier.
    """

    limit_bytes: int
    images: dict[Files, ReadImage] = field(default_factory=dict)
    patches: dict[tuple[Files, int, int], dict[Corner, Patch]] = field(default_factory=dict)
    grids: dict[tuple[str | int | None, ...], list[tuple[ImageRecord, Corner]]] = field(default_factory=dict)
    held_bytes: int = 0

    def held(self, record: ImageRecord) -> ReadImage | None:
        """Return the pixels of the record if they are kept."""
        return self.images.get(_files(record))

    def read(self, record: ImageRecord, labels: Sequence[str], keep: bool = True) -> ReadImage:
        """Return the pixels of the record, whose files must be those the cohort was loaded with."""
        held = self.held(record)
        if held is not None:
            return held
        pixels, content_sha256 = read_record(record.image, record.mask, record.tissue, labels)
        if record.content_sha256 not in ("", content_sha256):
            raise _changed(record.image)
        if keep and self.held_bytes + pixels.size_bytes <= self.limit_bytes:
            self.hold(record, pixels)
        return pixels

    def hold(self, record: ImageRecord, pixels: ReadImage) -> None:
        """Keep the pixels of the record, whether or not there is room."""
        self.images[_files(record)] = pixels
        self.held_bytes += pixels.size_bytes

    def read_patch(
        self,
        record: ImageRecord,
        xy: Corner,
        labels: Sequence[str],
        window_px: int,
        patch_px: int,
        wanted: Sequence[Corner],
    ) -> Patch:
        """Return a window, resized; ``wanted`` are all windows of the image that will be asked for.

        An image is decoded once for all of them.
        """
        if patch_px >= window_px:
            pixels = self.read(record, labels)
            return read_window(pixels.image, pixels.mask, xy, window_px, patch_px)
        key = (_files(record), window_px, patch_px)
        held = self.patches.get(key)
        if held is not None and xy in held:
            return held[xy]
        pixels = self.read(record, labels, keep=False)
        size_bytes = len(wanted) * patch_px * patch_px * 4
        if self._make_room(size_bytes):
            made = {
                each: _copy(read_window(pixels.image, pixels.mask, each, window_px, patch_px))
                for each in wanted
            }
            self.held_bytes += size_bytes
            self.patches.setdefault(key, {}).update(made)
            if xy in made:
                return made[xy]
        return read_window(pixels.image, pixels.mask, xy, window_px, patch_px)

    def _make_room(self, size_bytes: int) -> bool:
        """Forget images until ``size_bytes`` more fit; tell whether they do."""
        patches_bytes = self.held_bytes - sum(each.size_bytes for each in self.images.values())
        if patches_bytes + size_bytes > self.limit_bytes:
            return False
        while self.held_bytes + size_bytes > self.limit_bytes:
            self.held_bytes -= self.images.pop(next(iter(self.images))).size_bytes
        return True


def _files(record: ImageRecord) -> Files:
    return record.image, record.mask, record.tissue


def _copy(patch: Patch) -> Patch:
    """Return arrays of their own, so that they do not keep the image's memory."""
    image, mask = patch
    return np.ascontiguousarray(image), np.ascontiguousarray(mask)


def read_record(image: Path, mask: Path, tissue: Path | None, labels: Sequence[str]) -> tuple[ReadImage, str]:
    """Return the pixels of an image with its mask and tissue, and one SHA-256 of their files' bytes.

    Raises:
        MaskError: ``IMAGE_MISSING``, ``IMAGE_UNREADABLE``, ``MASK_MISSING``, ``MASK_UNREADABLE``,
            ``MASK_CLASS``, ``MASK_EMPTY``, or mask or tissue has another size than the image
            (``MASK_SIZE``).
    """
    image_bytes, mask_bytes = read_file(image, "IMAGE"), read_file(mask, "MASK")
    tissue_bytes = None if tissue is None else read_file(tissue, "MASK")
    pixels = decode_image(image_bytes, image)
    classes = decode_mask(mask_bytes, mask, labels)
    _check_size(mask, "mask", classes.shape, pixels.shape)
    inside = None
    if tissue is not None and tissue_bytes is not None:
        inside = decode_tissue(tissue_bytes, tissue)
        _check_size(tissue, "tissue image", inside.shape, pixels.shape)
    return ReadImage(pixels, classes, inside), content_hash(image_bytes, mask_bytes, tissue_bytes)


def _check_size(path: Path, what: str, shape: tuple[int, ...], image_shape: tuple[int, ...]) -> None:
    turned = ": is one of them turned, or has an EXIF orientation that the other lacks?"
    if shape[:2] != image_shape[:2]:
        raise MaskError(
            f"{path}: the {what} has {shape[1]} x {shape[0]} px and its image {image_shape[1]} x "
            f"{image_shape[0]} px" + (turned if shape[::-1] == image_shape[:2] else ""),
            reason="MASK_SIZE",
        )


def _changed(path: Path) -> MaskError:
    return MaskError(
        f"{path}: the image or its mask was changed while it was in use; start again", reason="MASK_UNUSABLE"
    )

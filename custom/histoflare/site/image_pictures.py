"""A site's own page of a segmentation: its images, the given outlines and the model's. It stays there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import nn

from histoflare.errors import MaskError
from histoflare.masks.images import ImageCohort, ImageRecord
from histoflare.masks.metrics import confusion
from histoflare.masks.outlines import trace_polygons
from histoflare.masks.predict import predict_image
from histoflare.masks.task import MaskTask
from histoflare.masks.windows import IGNORE
from histoflare.reasons import explain
from histoflare.report.site_page import (
    ClassKey,
    ImagePictures,
    ImageRow,
    SitePage,
    encode_flat,
    encode_picture,
    sent_rows,
)
from histoflare.rounds.local import one_thread
from histoflare.slides.mask_overlay import class_colours

PICTURE_PX = 720
"""Longer side of an image's pictures."""

MOST_PICTURES = 24
ORDER = {"test": 0, "validation": 1, "train": 2}

BACKGROUND_COLOUR = (24, 27, 31)
LINE_PX = 2
DASH_PX = 7
GAP_COLOUR = (0, 0, 0)
PALE = 0.65
"""How much of the colour of the model's dashes is white; the rest is that of the class."""

VEIL = 0.6
"""How much of what nobody annotated is white, on the picture with the outlines."""

Classes = NDArray[np.uint8]
Colour = tuple[int, int, int]


def build_image_site_page(
    site: str,
    cohort: ImageCohort,
    task: MaskTask,
    model: nn.Module | None,
    report: Mapping[str, Any],
    *,
    alone: nn.Module | None = None,
    alias: str = "",
    update_bytes: int | None = None,
    most_pictures: int = MOST_PICTURES,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> SitePage:
    """Return the page of ``site``, its pictures drawn and every image asked of the model.

    An image that cannot be read any more, or was changed, is noted and costs no other. Memory holds one image
    and the finished pictures, at most 60 kB each: the image, its outlines, and a mask for each model.

    Args:
        cohort: The site's images (``site.data.load_site_data``).
        model: The federated model as this site uses it, in evaluation mode and on its device; None leaves out
            what it says.
        report: The consortium's report.
        alone: The model that the site's own images alone gave, likewise, where there is one.
        alias: The site's name in the report, where that is another.
        update_bytes: Size of one update's tensors.
        most_pictures: Images that get pictures; test images first.
        on_image: Told how many images are done, and of how many.
    """
    records = sorted(cohort.records, key=lambda record: (ORDER[record.split], record.slide_id))
    rows = []
    with one_thread():  # as where the report's figures come from
        for number, record in enumerate(records):
            rows.append(_make_row(record, cohort, task, model, alone, draw=number < most_pictures))
            on_image(number + 1, len(records))
    return SitePage(
        site=site,
        report=report,
        slides=rows,
        left_out=(),
        sent=sent_rows(report, alias or site, update_bytes),
        alias="" if alias == site else alias,
        classes=_class_keys(task),
        warnings=cohort.warnings,
    )


def draw_outlines(
    image: NDArray[np.uint8], given: Classes, predicted: Classes | None, shown: list[int], classes: int
) -> Image.Image:
    """Return the image with the given mask's outlines as whole lines and the model's as dashed ones on top.

    The former have the colours of their classes, the latter paler ones, with black between the dashes.

    Args:
        image: uint8 (h, w, 3).
        given: uint8 (h, w); what nobody annotated is pale in the picture.
        predicted: uint8 (h, w); None: only the given mask's outlines.
        shown: Indices of the classes that are outlined.
        classes: How many there are.
    """
    picture = _scaled(image)
    pixels = np.array(picture)
    unknown = _member(given, IGNORE, picture.size)
    pixels[unknown] = ((1 - VEIL) * pixels[unknown] + VEIL * 255).round().astype(np.uint8)
    colours = class_colours(classes)
    for index in shown:
        pixels[_line(_member(given, index, picture.size))] = colours[index]
    for index in shown if predicted is not None else []:
        assert predicted is not None
        member = _member(predicted, index, picture.size)
        pixels[_line(member)] = GAP_COLOUR
        pixels[_line(member, dashed=True)] = _pale(colours[index])
    return Image.fromarray(pixels)


def _make_row(
    record: ImageRecord,
    cohort: ImageCohort,
    task: MaskTask,
    model: nn.Module | None,
    alone: nn.Module | None,
    *,
    draw: bool,
) -> ImageRow:
    row = ImageRow(record.slide_id, record.patient, record.split)
    try:
        read = cohort.read(record, keep=False)
    except MaskError as error:
        note = f"Not shown to the model ({error.reason}): {explain(error.reason)}"
        return replace(row, pictures=ImagePictures(notes=(note,)))
    predicted = None
    if model is not None:
        predicted = predict_mask(model, task, read.image)
        row = replace(row, dice=dice_of(task, confusion(read.mask, predicted, len(task.labels))))
    if not draw:
        return row
    outlines = draw_outlines(read.image, read.mask, predicted, _foreground(task), len(task.labels))
    known = float(np.mean(read.mask != IGNORE))
    masks = [("Given mask", read.mask)]
    if predicted is not None:
        masks.append(("Federated model's mask", predicted))
    if alone is not None:
        masks.append(("Mask of the model of this site alone", predict_mask(alone, task, read.image)))
    drawn = [(caption, draw_mask(mask, task)) for caption, mask in masks]
    pictures = ImagePictures(draw_image(read.image), encode_picture(outlines), known, masks=drawn)
    return replace(row, pictures=pictures)


def predict_mask(model: nn.Module, task: MaskTask, image: NDArray[np.uint8]) -> Classes:
    """Return the model's mask (h, w) of an image (h, w, 3)."""
    return predict_image(
        model,
        image,
        window_px=task.window_px,
        stride_px=task.stride_px,
        patch_px=task.patch_px,
        batch_size=task.batch_size,
        fallback=0 if task.background is None else task.labels.index(task.background),
    )


def draw_image(image: NDArray[np.uint8]) -> str:
    """Return an image as a data URI, its longer side :data:`PICTURE_PX`."""
    return encode_picture(_scaled(image))


def draw_mask(mask: Classes, task: MaskTask) -> str:
    """Return a mask as a data URI: classes in their colours, background dark, not annotated white."""
    if max(mask.shape) > PICTURE_PX:
        width, height = _scaled_size(mask.shape[1], mask.shape[0])
        mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    palette = np.full((256, 3), 255, np.uint8)
    palette[: len(task.labels)] = BACKGROUND_COLOUR
    colours = class_colours(len(task.labels))
    for index in _foreground(task):
        palette[index] = colours[index]
    picture = Image.fromarray(mask, "P")
    picture.putpalette(palette.tobytes())
    return encode_flat(picture)


def dice_of(task: MaskTask, matrix: NDArray[np.int64]) -> dict[str, float | None]:
    """Return the Dice of each class of an image's confusion (k, k); None: the class is in neither mask."""
    found: dict[str, float | None] = {}
    for index in _foreground(task):
        both = int(matrix[index].sum() + matrix[:, index].sum())
        found[task.labels[index]] = 2 * int(matrix[index, index]) / both if both else None
    return found


def _class_keys(task: MaskTask) -> list[ClassKey]:
    colours = class_colours(len(task.labels))
    return [
        ClassKey(task.labels[index], _css(colours[index]), _css(_pale(colours[index])), _css(GAP_COLOUR))
        for index in _foreground(task)
    ]


def _pale(colour: Colour) -> Colour:
    red, green, blue = (round((1 - PALE) * channel + PALE * 255) for channel in colour)
    return red, green, blue


def _css(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _foreground(task: MaskTask) -> list[int]:
    return [index for index, label in enumerate(task.labels) if label != task.background]


def _scaled(image: NDArray[np.uint8]) -> Image.Image:
    """Return the image with a longer side of :data:`PICTURE_PX`."""
    return Image.fromarray(image).resize(
        _scaled_size(image.shape[1], image.shape[0]), Image.Resampling.BICUBIC
    )


def _scaled_size(width: int, height: int) -> tuple[int, int]:
    scale = PICTURE_PX / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _member(mask: Classes, index: int, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return where in a picture of ``size`` (width, height) most of what a pixel shows is of the class."""
    inside = Image.fromarray((mask == index).astype(np.uint8) * np.uint8(255))
    return np.asarray(inside.resize(size, Image.Resampling.BILINEAR)) > 127


def _line(member: NDArray[np.bool_], dashed: bool = False) -> NDArray[np.bool_]:
    """Return the pixels (h, w) of the outlines of ``member``, but not along the border of the picture."""
    height, width = member.shape
    line = np.zeros((height, width), np.bool_)
    for ring in (ring for polygon in trace_polygons(member) for ring in polygon):
        corners = np.array([*ring, ring[0]])
        steps = np.abs(np.diff(corners, axis=0)).sum(axis=1)  # edges go along rows and columns
        length = np.concatenate([[0], np.cumsum(steps)])
        at = np.arange(length[-1])
        x, y = (np.interp(at, length, corners[:, axis]).round().astype(np.int64) for axis in (0, 1))
        drawn = (x > 0) & (x < width) & (y > 0) & (y < height)
        if dashed:
            drawn &= at // DASH_PX % 2 == 0
        line[y[drawn], x[drawn]] = True
    found: NDArray[np.bool_] = ndimage.binary_dilation(line, np.ones((LINE_PX, LINE_PX), np.bool_))
    return found

"""Pictures of a slide with a mask or a heat map on it, and what the colours mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from histoflare.slides.mask_pyramid import MaskPyramid
from histoflare.slides.overlay import (
    FONT_PX,
    MARGIN_PX,
    ROW_PX,
    SMALLEST_LEGEND_PX,
    SlidePicture,
    attention_colours,
    draw_scale_bar,
)

CLASS_COLOURS = (
    (0, 90, 181),
    (0, 160, 90),
    (245, 190, 0),
    (0, 185, 230),
    (120, 75, 20),
    (20, 20, 20),
    (130, 190, 20),
    (255, 110, 0),
)
"""Unlike haematoxylin and eosin, the first ones most."""

CLASS_OPACITY = 0.45
BAR_PX = 360
"""Length of the colour bar."""


def class_colours(classes: int) -> tuple[tuple[int, int, int], ...]:
    """Return the colours of the classes 0, 1, …; from the ninth on they repeat."""
    return tuple(CLASS_COLOURS[index % len(CLASS_COLOURS)] for index in range(classes))


def draw_classes(
    base: SlidePicture,
    mask: MaskPyramid,
    l0_per_px: float,
    labels: Sequence[str],
    notes: Sequence[str],
    *,
    mpp: float,
    without: Sequence[str] = (),
) -> Image.Image:
    """Return the slide with the classes of ``mask`` in their colours, and a legend below.

    Args:
        base: The slide's picture.
        mask: Values are indices into ``labels``; others are left as they are.
        l0_per_px: Level-0 pixels of the slide that a pixel of the mask spans along a side.
        labels: Names of the classes.
        notes: What the legend says after each name.
        mpp: Resolution of the slide's level 0, µm/px.
        without: Classes that are not coloured.
    """
    values = _values(base, mask, l0_per_px)
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(labels)] = class_colours(len(labels))
    shown = [index for index, label in enumerate(labels) if label not in without]
    coloured = np.isin(values, shown)
    pixels = np.array(base.image.convert("RGB"))
    mixed = (1 - CLASS_OPACITY) * pixels[coloured] + CLASS_OPACITY * palette[values[coloured]]
    pixels[coloured] = mixed.round().astype(np.uint8)
    texts = [f"{labels[index]}: {notes[index]}" for index in shown]
    return _on_sheet(
        Image.fromarray(pixels),
        lambda width: _class_legend(
            width, texts, [class_colours(len(labels))[index] for index in shown], base.px_per_l0 / mpp
        ),
    )


def add_attention_legend(
    picture: Image.Image, limit: float, px_per_um: float, title: str = "attention"
) -> Image.Image:
    """Return ``picture`` with the colours of the attention explained below.

    Args:
        limit: The colours end at 1/limit and at limit times the average.
        px_per_um: Pixels of the picture that a µm takes.
        title: The text beside the colours.
    """
    return _on_sheet(picture, lambda width: _attention_legend(width, limit, px_per_um, title))


def _values(base: SlidePicture, mask: MaskPyramid, l0_per_px: float) -> NDArray[np.uint8]:
    """Return the mask's value under each pixel of the picture (h, w), from the smallest level that serves.

    Outside the mask's plane it is 255, which is no class.
    """
    needed = [side * base.px_per_l0 for side in mask.plane.l0_size_px]
    level = max(
        (index for index, size in enumerate(mask.sizes_px) if size[0] >= needed[0] and size[1] >= needed[1]),
        default=0,
    )
    values = mask.read(level, 0, 0, *mask.sizes_px[level])
    found = np.full((base.image.height, base.image.width), 255, np.uint8)
    places = []
    for axis in (1, 0):  # rows (y), then columns (x)
        l0_places = (np.arange(base.image.size[axis]) + 0.5) / base.px_per_l0 - mask.plane.l0_xy[axis]
        (inside,) = np.nonzero((l0_places >= 0) & (l0_places < mask.plane.l0_size_px[axis]))
        cells = (l0_places[inside] / (l0_per_px * 2**level)).astype(np.int64)
        places.append((inside, np.minimum(cells, values.shape[1 - axis] - 1)))
    (rows, from_rows), (columns, from_columns) = places
    found[np.ix_(rows, columns)] = values[np.ix_(from_rows, from_columns)]
    return found


def _on_sheet(picture: Image.Image, legend: Callable[[int], Image.Image]) -> Image.Image:
    below = legend(max(picture.width, SMALLEST_LEGEND_PX))
    sheet = Image.new("RGB", (below.width, picture.height + below.height), "white")
    sheet.paste(picture, ((sheet.width - picture.width) // 2, 0))
    sheet.paste(below, (0, picture.height))
    return sheet


def _class_legend(
    width: int, texts: Sequence[str], colours: Sequence[tuple[int, int, int]], px_per_um: float
) -> Image.Image:
    font = ImageFont.load_default(FONT_PX)
    column_px = 44 + max((int(font.getlength(text)) for text in texts), default=0) + MARGIN_PX
    columns = max(1, (width - 2 * MARGIN_PX) // column_px)
    rows = -(-len(texts) // columns)
    legend = Image.new("RGB", (width, 2 * MARGIN_PX + (rows + 1) * ROW_PX), "white")
    draw = ImageDraw.Draw(legend)
    for index, (text, colour) in enumerate(zip(texts, colours, strict=True)):
        x, y = MARGIN_PX + index % columns * column_px, MARGIN_PX + index // columns * ROW_PX
        tint = tuple(round(255 * (1 - CLASS_OPACITY) + CLASS_OPACITY * channel) for channel in colour)
        draw.rectangle((x, y + 2, x + 30, y + 22), fill=tint, outline=colour, width=2)
        draw.text((x + 40, y), text, fill="black", font=font)
    draw_scale_bar(draw, MARGIN_PX + rows * ROW_PX, width, px_per_um, font)
    return legend


def _attention_legend(width: int, limit: float, px_per_um: float, title: str) -> Image.Image:
    font = ImageFont.load_default(FONT_PX)
    legend = Image.new("RGB", (width, 2 * MARGIN_PX + 3 * ROW_PX), "white")
    draw = ImageDraw.Draw(legend)
    for x, colour in enumerate(attention_colours(np.linspace(0.0, 1.0, BAR_PX))):
        draw.line((MARGIN_PX + x, MARGIN_PX, MARGIN_PX + x, MARGIN_PX + 22), fill=tuple(colour))
    draw.text((MARGIN_PX + BAR_PX + 10, MARGIN_PX), title, fill="black", font=font)
    y = MARGIN_PX + ROW_PX
    draw.text((MARGIN_PX, y), f"1/{limit:.3g}", fill="black", font=font)
    draw.text((MARGIN_PX + BAR_PX // 2, y), "average", fill="black", font=font, anchor="ma")
    draw.text((MARGIN_PX + BAR_PX, y), f"{limit:.3g}x", fill="black", font=font, anchor="ra")
    draw_scale_bar(draw, y + ROW_PX, width, px_per_um, font)
    return legend

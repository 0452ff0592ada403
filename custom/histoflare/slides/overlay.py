"""Pictures of patches on their slide, for people to look at: the mosaic, and where a model attends."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from histoflare.slides.mosaic import Mosaic
from histoflare.slides.reader import Slide
from histoflare.slides.tissue import Tissue

PICTURE_PX = 1400
"""Longer side of the slide in the picture."""

SMALLEST_LEGEND_PX = 760
FONT_PX = 20
MARGIN_PX = 16
ROW_PX = 32

COLOURS = (
    (0, 90, 181),
    (220, 50, 32),
    (0, 135, 90),
    (230, 159, 0),
    (117, 60, 178),
    (86, 180, 233),
    (140, 90, 30),
    (240, 90, 180),
    (110, 170, 20),
)
"""Of the clusters; told apart on pink and violet, from the tenth on they repeat."""

TINT = 0.35
MASK_COLOUR = (20, 20, 20)


VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
"""Colour map of the attention: equal steps look equally large, also without colour vision, and grow lighter.

Nine of the 256 colours of viridis (Smith and van der Walt, 2015); between them it is linear."""

ATTENTION_OPACITY = 0.75


@dataclass(frozen=True)
class SlidePicture:
    """A whole slide as a picture, and how many of its pixels a level-0 pixel spans."""

    image: Image.Image
    px_per_l0: float


def read_picture(slide: Slide, longer_px: int = PICTURE_PX) -> SlidePicture:
    """Return the slide with a longer side of ``longer_px``.

    Raises:
        SlideError: What :meth:`Slide.read` raises.
    """
    l0_longer = max(slide.info.l0_size_px)
    pixels = slide.thumbnail(slide.mpp * max(1.0, l0_longer / longer_px))
    scale = longer_px / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    return SlidePicture(image, size[0] / slide.info.l0_size_px[0])


def draw_overlay(
    slide: Slide,
    mosaic: Mosaic,
    tissue: Tissue,
    base: SlidePicture | None = None,
    *,
    legend: bool = True,
) -> Image.Image:
    """Return the slide with the outline of its tissue, its patches by cluster and the chosen ones framed.

    Args:
        slide: The slide.
        mosaic, tissue: What :func:`~histoflare.slides.mosaic.find_mosaic` found on it.
        base: The slide's picture, if it was read already.
        legend: Whether to draw one below the picture.

    Raises:
        SlideError: What :meth:`Slide.read` raises.
    """
    base = base or read_picture(slide)
    picture, px_per_l0, size = base.image, base.px_per_l0, base.image.size
    # the mask's last row and column may reach beyond the slide
    mask_width, mask_height = (side / tissue.l0_per_px for side in slide.info.l0_size_px)
    box = (0.0, 0.0, mask_width, mask_height)
    mask = Image.fromarray(tissue.mask).resize(size, Image.Resampling.NEAREST, box=box)
    picture = _tint(picture, mosaic, px_per_l0)
    picture.paste(MASK_COLOUR, mask=Image.fromarray(_outline(np.array(mask))))
    _frame_chosen(picture, mosaic, px_per_l0)
    if not legend:
        return picture
    below = _draw_legend(max(size[0], SMALLEST_LEGEND_PX), mosaic, px_per_l0 / slide.mpp)
    sheet = Image.new("RGB", (below.width, size[1] + below.height), "white")
    sheet.paste(picture, ((sheet.width - size[0]) // 2, 0))
    sheet.paste(below, (0, size[1]))
    return sheet


def draw_attention(
    base: SlidePicture, l0_coords: NDArray[np.int64], l0_patch_px: int, levels: NDArray[np.floating]
) -> Image.Image:
    """Return the slide in grey with each patch in the colour of its level.

    Args:
        base: The slide's picture.
        l0_coords: Corners (top left) of the patches (n, 2) in level-0 pixels.
        l0_patch_px: Side of a patch in level-0 pixels.
        levels: How much is attended to each patch (n,), from 0 to 1; beyond that, as the end it is next to.

    Raises:
        ValueError: There is not one level a patch, or one is not a number.
    """
    if len(l0_coords) != len(levels) or not np.isfinite(levels).all():
        raise ValueError(f"{len(l0_coords)} patches do not go with these {len(levels)} levels")
    grey = base.image.convert("L").convert("RGB")
    tinted = grey.copy()
    draw = ImageDraw.Draw(tinted)
    for (x, y), colour in zip(l0_coords, attention_colours(levels), strict=True):
        square = _square(int(x), int(y), l0_patch_px, base.px_per_l0)
        draw.rectangle(square, fill=tuple(colour), outline="white")
    return Image.blend(grey, tinted, ATTENTION_OPACITY)


def attention_colours(levels: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the colours (n, 3) of ``levels`` (n,), 0 to 1."""
    stops = np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in VIRIDIS])  # (9, 3)
    places = np.linspace(0.0, 1.0, len(stops))
    channels = [np.interp(levels, places, stops[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def _colour(cluster: int) -> tuple[int, int, int]:
    return COLOURS[cluster % len(COLOURS)]


def _square(x: int, y: int, l0_patch_px: int, px_per_l0: float) -> tuple[int, int, int, int]:
    """Return the corners in the picture of the patch at (x, y) on level 0; the far ones lie inside it."""
    near = (round(x * px_per_l0), round(y * px_per_l0))
    far = (round((x + l0_patch_px) * px_per_l0) - 1, round((y + l0_patch_px) * px_per_l0) - 1)
    return *near, max(far[0], near[0]), max(far[1], near[1])


def _tint(picture: Image.Image, mosaic: Mosaic, px_per_l0: float) -> Image.Image:
    """Return the picture with every candidate patch tinted in its cluster's colour."""
    tinted = picture.copy()
    draw = ImageDraw.Draw(tinted)
    for patch in mosaic.candidates:
        square = _square(patch.l0_x_px, patch.l0_y_px, mosaic.l0_patch_px, px_per_l0)
        draw.rectangle(square, fill=_colour(patch.cluster), outline="white")
    return Image.blend(picture, tinted, TINT)


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the inner border (two pixels) of the mask (h, w)."""
    inside: NDArray[np.bool_] = ndimage.binary_erosion(mask, iterations=2, border_value=1)
    return mask & ~inside


def _frame_chosen(picture: Image.Image, mosaic: Mosaic, px_per_l0: float) -> None:
    """Frame the chosen patches in their cluster's colour between two black lines."""
    draw = ImageDraw.Draw(picture)
    bold = max(2, round(mosaic.l0_patch_px * px_per_l0 / 16))
    for patch in mosaic.patches:
        x0, y0, x1, y1 = _square(patch.l0_x_px, patch.l0_y_px, mosaic.l0_patch_px, px_per_l0)
        draw.rectangle((x0, y0, x1, y1), outline="black", width=bold + 2)
        if x1 - x0 > 2 * bold:
            draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=_colour(patch.cluster), width=bold)


def _draw_legend(width: int, mosaic: Mosaic, px_per_um: float) -> Image.Image:
    """Return the legend: what was asked for, the clusters with their counts, the signs, a scale bar."""
    font = ImageFont.load_default(FONT_PX)
    counts = Counter(patch.cluster for patch in mosaic.candidates)
    chosen = Counter(patch.cluster for patch in mosaic.patches)
    texts = [f"cluster {each}: {chosen[each]} of {counts[each]}" for each in sorted(counts)]
    column_px = 44 + max(int(font.getlength(text)) for text in texts) + MARGIN_PX
    columns = max(1, (width - 2 * MARGIN_PX) // column_px)
    rows = -(-len(texts) // columns)
    legend = Image.new("RGB", (width, 2 * MARGIN_PX + (rows + 3) * ROW_PX), "white")
    draw = ImageDraw.Draw(legend)
    asked = mosaic.parameters
    title = (
        f"{len(mosaic.chosen)} of {len(mosaic.candidates)} patches chosen "
        f"({asked.patch_px} px at {asked.mpp:g} um/px, {asked.selection} in each colour cluster)"
    )
    y = MARGIN_PX
    draw.text((MARGIN_PX, y), title, fill="black", font=font)
    for index, (cluster, text) in enumerate(zip(sorted(counts), texts, strict=True)):
        x, y = MARGIN_PX + index % columns * column_px, MARGIN_PX + (1 + index // columns) * ROW_PX
        draw.rectangle((x, y + 2, x + 30, y + 22), fill=_colour(cluster), outline="black")
        draw.text((x + 40, y), text, fill="black", font=font)
    y += ROW_PX
    draw.rectangle((MARGIN_PX, y + 2, MARGIN_PX + 30, y + 22), outline="black", width=5)
    draw.text((MARGIN_PX + 40, y), "chosen patch", fill="black", font=font)
    x = MARGIN_PX + 60 + int(font.getlength("chosen patch"))
    draw.line((x, y + 12, x + 30, y + 12), fill=MASK_COLOUR, width=2)
    draw.text((x + 40, y), "border of the tissue", fill="black", font=font)
    draw_scale_bar(draw, y + ROW_PX, width, px_per_um, font)
    return legend


def draw_scale_bar(
    draw: ImageDraw.ImageDraw,
    y: int,
    width: int,
    px_per_um: float,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    """Draw the largest bar of 1, 2 or 5 times a power of ten that takes at most a quarter of the width."""
    longest_um = width / 4 / px_per_um
    power = 10.0 ** np.floor(np.log10(longest_um))
    um = max(step * power for step in (1, 2, 5) if step * power <= longest_um)
    bar_px = round(um * px_per_um)
    draw.rectangle((MARGIN_PX, y + 8, MARGIN_PX + bar_px, y + 15), fill="black")
    text = f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} um"  # the font has no µ
    draw.text((MARGIN_PX + bar_px + 10, y), text, fill="black", font=font)

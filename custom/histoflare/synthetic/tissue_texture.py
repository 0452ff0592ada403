"""From a tissue layout to stain densities and from those to colours.

Densities mix as in Ruifrok & Johnston (2001): the optical density of a pixel is the sum over stains of
concentration times the stain's OD vector, and the light that comes through is background * 10**(-OD).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter, map_coordinates

from histoflare.synthetic.tissue_layout import HARMONICS, Layout, Nuclei

Plane = NDArray[np.float32]

UM_GRID = 2.0  # of fields that change slowly
UM_FIBRE_GRID = 1.0
STAMPS_AT_ONCE = 512


@dataclass(frozen=True)
class Stain:
    """Colours of one laboratory and scanner.

    Attributes:
        hematoxylin_od: OD vector (r, g, b) of unit length.
        eosin_od: OD vector (r, g, b) of unit length.
        hematoxylin: Factor on the concentration.
        eosin: Factor on the concentration.
        background: What empty glass looks like, (r, g, b) in 0..255.
        um_blur: Standard deviation of the optical blur.
        noise: Standard deviation of the sensor noise, in grey values.
    """

    hematoxylin_od: tuple[float, float, float]
    eosin_od: tuple[float, float, float]
    hematoxylin: float
    eosin: float
    background: tuple[float, float, float]
    um_blur: float
    noise: float


@dataclass(frozen=True)
class Densities:
    """Concentrations of the two stains, float32 (h, w), 0 on glass; ``nuclei`` is the covered part, 0..1."""

    hematoxylin: Plane
    eosin: Plane
    nuclei: Plane
    lumens: Plane


def smooth_noise(rng: np.random.Generator, size_px: tuple[int, int], cell_px: tuple[float, float]) -> Plane:
    """Return noise (h, w) of mean 0 and standard deviation about 0.7 that changes over ``cell_px`` (x, y)."""
    width, height = (max(2, round(side / cell)) for side, cell in zip(size_px, cell_px, strict=True))
    coarse = rng.standard_normal((height, width), dtype=np.float32)
    return enlarge(coarse, size_px)


def enlarge(plane: Plane, size_px: tuple[int, int]) -> Plane:
    """Return ``plane`` brought to (width, height) = ``size_px`` by bicubic interpolation."""
    return np.asarray(Image.fromarray(plane).resize(size_px, Image.Resampling.BICUBIC))


def render_densities(
    layout: Layout, size_px: tuple[int, int], mpp: float, rng: np.random.Generator, cover: Plane | None = None
) -> Densities:
    """Draw the stain densities of a field.

    Args:
        layout: What lies where; its field must be ``size_px * mpp``.
        size_px: (width, height).
        mpp: Resolution in um/px.
        rng: Source of every random choice.
        cover: How much of each pixel is tissue, float32 (h, w) in 0..1; by default all of it.
    """
    nuclei, chromatin = _draw_nuclei(layout.nuclei, size_px, mpp, rng)
    lumens = _draw_lumens(layout, size_px, mpp)
    cytoplasm = _cytoplasm(layout, size_px)
    texture = _stroma(size_px, mpp, rng)
    grain = smooth_noise(rng, size_px, (1.4 / mpp, 1.4 / mpp))

    eosin = 0.25 + 0.07 * texture + 0.03 * grain + (0.06 - 0.05 * texture) * cytoplasm
    hematoxylin = 0.035 + 0.10 * cytoplasm + 0.012 * grain * (1 + cytoplasm)
    present = 1 - 0.985 * lumens
    if cover is not None:
        present *= cover
    eosin = np.maximum(eosin, 0.03) * (1 - 0.45 * nuclei) * present
    hematoxylin = np.maximum(hematoxylin, 0) * (1 - nuclei) + chromatin * (1 + 0.22 * grain)
    return Densities(np.maximum(hematoxylin, 0) * present, eosin, nuclei * present, lumens)


def stain_rgb(densities: Densities, stain: Stain, mpp: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return what a scanner shows of ``densities``: uint8 (h, w, 3), blurred and with sensor noise."""
    rgb = np.empty((*densities.eosin.shape, 3), np.float32)
    for channel in range(3):
        per_hematoxylin = stain.hematoxylin * stain.hematoxylin_od[channel]
        per_eosin = stain.eosin * stain.eosin_od[channel]
        od = per_hematoxylin * densities.hematoxylin + per_eosin * densities.eosin
        rgb[..., channel] = stain.background[channel] * np.exp(np.float32(-np.log(10)) * od)
    sharp = Image.fromarray((rgb + 0.5).clip(0, 255).astype(np.uint8))
    blurred = np.asarray(sharp.filter(ImageFilter.GaussianBlur(stain.um_blur / mpp)), np.float32)
    grain = rng.standard_normal(blurred.shape[:2], dtype=np.float32)[..., None] * np.float32(stain.noise)
    shown: NDArray[np.uint8] = (blurred + grain + 0.5).clip(0, 255).astype(np.uint8)
    return shown


def _stroma(size_px: tuple[int, int], mpp: float, rng: np.random.Generator) -> Plane:
    """Return eosin variation (h, w), about -2..2: slow clouds and wavy fibres."""
    um_size = (size_px[0] * mpp, size_px[1] * mpp)
    grid = (max(2, round(um_size[0] / UM_FIBRE_GRID)), max(2, round(um_size[1] / UM_FIBRE_GRID)))
    clouds = smooth_noise(rng, grid, (70 / UM_FIBRE_GRID, 70 / UM_FIBRE_GRID))
    patches = smooth_noise(rng, grid, (14 / UM_FIBRE_GRID, 14 / UM_FIBRE_GRID))
    bend = smooth_noise(rng, grid, (60 / UM_FIBRE_GRID, 60 / UM_FIBRE_GRID))
    um_y, um_x = np.mgrid[: grid[1], : grid[0]].astype(np.float32) * np.float32(UM_FIBRE_GRID)
    turn = rng.uniform(0, np.pi)
    along = um_x * np.float32(np.cos(turn)) + um_y * np.float32(np.sin(turn))
    across = um_y * np.float32(np.cos(turn)) - um_x * np.float32(np.sin(turn)) + 22 * bend
    strands = rng.standard_normal((256, 256), dtype=np.float32)  # repeats only after 256 fibres
    fibres = map_coordinates(strands, [across / 3.0, along / 34.0], order=1, mode="grid-wrap")
    return enlarge(np.asarray(0.7 * clouds + 0.45 * patches + 0.75 * fibres, np.float32), size_px)


def _cytoplasm(layout: Layout, size_px: tuple[int, int]) -> Plane:
    """Return how much of each pixel belongs to cells rather than stroma, float32 (h, w) in 0..1."""
    grid = [max(2, round(side / UM_GRID)) for side in layout.um_size]
    tumour = layout.nuclei.um_short > 0.45 * layout.nuclei.um_long
    counts, _, _ = np.histogram2d(
        layout.nuclei.um_y[tumour],
        layout.nuclei.um_x[tumour],
        bins=(grid[1], grid[0]),
        range=((0, layout.um_size[1]), (0, layout.um_size[0])),
    )
    um_reach = 4.5
    per_um2 = gaussian_filter(counts / UM_GRID**2, um_reach / UM_GRID)
    return enlarge((1 - np.exp(-130 * per_um2)).astype(np.float32), size_px).clip(0, 1)


def _draw_lumens(layout: Layout, size_px: tuple[int, int], mpp: float) -> Plane:
    """Return the part of each pixel that lies in a lumen, float32 (h, w) in 0..1."""
    canvas = np.zeros((size_px[1], size_px[0]), np.float32)
    lumens = layout.lumens
    for index in range(len(lumens.um_x)):
        x, y = lumens.um_x[index] / mpp, lumens.um_y[index] / mpp
        reach = 1.35 * lumens.um_radius[index] / mpp + 2
        x0, x1 = max(0, int(x - reach)), min(size_px[0], int(x + reach) + 1)
        y0, y1 = max(0, int(y - reach)), min(size_px[1], int(y + reach) + 1)
        if x0 >= x1 or y0 >= y1:
            continue
        dx, dy = np.meshgrid(np.arange(x0, x1) + 0.5 - x, np.arange(y0, y1) + 0.5 - y)
        angle = np.arctan2(dy, dx)
        waves = sum(
            lumens.amplitude[index, k] * np.cos(harmonic * angle + lumens.phase[index, k])
            for k, harmonic in enumerate(HARMONICS)
        )
        outline = lumens.um_radius[index] / mpp * (1 + waves)
        covered = np.clip(outline - np.hypot(dx, dy) + 0.5, 0, 1)
        np.maximum(canvas[y0:y1, x0:x1], covered, out=canvas[y0:y1, x0:x1], casting="same_kind")
    return canvas


def _draw_nuclei(
    nuclei: Nuclei, size_px: tuple[int, int], mpp: float, rng: np.random.Generator
) -> tuple[Plane, Plane]:
    """Return how much of each pixel lies in a nucleus (0..1) and its hematoxylin: float32 (h, w) each."""
    reach = int(np.ceil(0.62 * nuclei.um_long.max(initial=4) / mpp)) + 1
    covered = np.zeros((size_px[1] + 2 * reach + 1, size_px[0] + 2 * reach + 1), np.float32)
    chromatin = np.zeros_like(covered)
    x, y = nuclei.um_x / mpp, nuclei.um_y / mpp
    near = (x > -reach) & (x < size_px[0] + reach) & (y > -reach) & (y < size_px[1] + reach)
    nuclei = nuclei.take(near)
    order = np.argsort(nuclei.um_long, kind="stable")  # similar sizes share a stamp size
    warps = rng.normal(0, 0.07, (len(order), 2)).astype(np.float32)
    nucleoli = rng.uniform(-0.35, 0.35, (len(order), 2)).astype(np.float32)
    for start in range(0, len(order), STAMPS_AT_ONCE):
        chunk = order[start : start + STAMPS_AT_ONCE]
        x, y = nuclei.um_x[chunk] / mpp, nuclei.um_y[chunk] / mpp
        half = int(np.ceil(0.62 * nuclei.um_long[chunk].max() / mpp)) + 1
        left, top = np.floor(x).astype(int), np.floor(y).astype(int)
        cover, stain = _stamps(nuclei, chunk, (x - left, y - top), half, mpp, warps[chunk], nucleoli[chunk])
        for index, (px, py) in enumerate(zip(left + reach - half, top + reach - half, strict=True)):
            if px < 0 or py < 0:
                continue
            window = np.s_[py : py + 2 * half + 1, px : px + 2 * half + 1]
            h, w = covered[window].shape
            np.maximum(covered[window], cover[index, :h, :w], out=covered[window])
            np.maximum(chromatin[window], stain[index, :h, :w], out=chromatin[window])
    shown = np.s_[reach : reach + size_px[1], reach : reach + size_px[0]]
    return covered[shown], chromatin[shown]


def _stamps(
    nuclei: Nuclei,
    chunk: NDArray[np.intp],
    centre_px: tuple[NDArray[np.float64], NDArray[np.float64]],
    half: int,
    mpp: float,
    warps: Plane,
    nucleoli: Plane,
) -> tuple[Plane, Plane]:
    """Return cover and hematoxylin of the nuclei ``chunk``, float32 (n, 2 * half + 1, 2 * half + 1) each."""

    def column(values: NDArray[np.float64]) -> Plane:
        return values.astype(np.float32)[:, None, None]

    offset = np.arange(-half, half + 1, dtype=np.float32) + np.float32(0.5)
    dx = offset[None, None, :] - column(centre_px[0])
    dy = offset[None, :, None] - column(centre_px[1])
    cos, sin = column(np.cos(nuclei.angle[chunk])), column(np.sin(nuclei.angle[chunk]))
    long_px, short_px = column(nuclei.um_long[chunk] / 2 / mpp), column(nuclei.um_short[chunk] / 2 / mpp)
    u, v = (dx * cos + dy * sin) / long_px, (dy * cos - dx * sin) / short_px  # (n, s, s)
    rho = np.sqrt(u * u + v * v)
    # angle-only waves (of 2 and 3 periods) make it less of an ellipse
    rho *= 1 + warps[:, 0, None, None] * 2 * u * v / (rho**2 + 1e-6)
    rho *= 1 + warps[:, 1, None, None] * (u * u - 3 * v * v) * u / (rho**3 + 1e-6)
    cover = np.clip((1 - rho) * np.sqrt(long_px * short_px) + 0.5, 0, 1)
    vesicular = column(nuclei.vesicular[chunk])
    rim = np.exp(-(((rho - 0.88) / 0.16) ** 2))
    nu, nv = nucleoli[:, 0, None, None], nucleoli[:, 1, None, None]
    nucleolus = np.exp(-(((u - nu) ** 2 + (v - nv) ** 2) / 0.035))
    stain = column(nuclei.stain[chunk]) * (0.72 + vesicular * (0.3 * rim + 0.45 * nucleolus - 0.28))
    return cover, (stain * cover).astype(np.float32)

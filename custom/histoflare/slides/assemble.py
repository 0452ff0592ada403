"""Labelled slides from labelled tiles: for experiments with real histology where whole slides cannot be had.

A few tiles of one label are laid side by side and written as a pyramid that OpenSlide reads. What is made up:
that these tiles belong together, the patients (one or two such slides each), the hospitals, and the
resolution, if the tiles' own is not known. What is real: the pixels and the labels, and the patients if the
index names them: then no slide has tiles of two, and each is at one site and in one split.

Every tile is used once at most, and of tiles that name the same source only the first: copies of a tile on
two sides of a split would test what was trained on.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from histoflare.errors import JobError, ManifestError, SlideError
from histoflare.seeds import derive_seed
from histoflare.slides.image_file import UnreadableImageError, open_image, rgb_on_white
from histoflare.slides.manifest import Manifest, ManifestRow, stratify_splits, write_manifest
from histoflare.slides.names import find_path
from histoflare.slides.partition import deal_evenly, draw_unevenly
from histoflare.slides.pyramid import write_pyramid
from histoflare.slides.resolution import is_mpp
from histoflare.slides.table import read_index
from histoflare.storage import write_json

LUNG_LABELS = {"lung_aca": "LUAD", "lung_scc": "LUSC"}
PATIENTS_PER_LABEL = 2  # at each site at least: one to train on and one to test
EXTERNAL = "external"
GLASS = 255

T = TypeVar("T")


@dataclass(frozen=True)
class AssemblyParameters:
    """How tiles become slides and sites.

    Attributes:
        tiles_per_slide: Fewest and most tiles of a slide.
        slides_per_patient: Fewest and most slides of a made-up patient; a patient that the index names has
            as many as the tiles make.
        sites: Hospitals ``hospital-1`` and on.
        external_share: Share of each label's patients that the site ``external`` gets, all for testing;
            0 makes no such site.
        iid: False draws sites from random shares of each label, True deals evenly by label
            (:mod:`histoflare.slides.partition`, after Adnan 2022).
        test_fraction: Share of each site's patients that are for testing.
        mpp: Resolution written into the slides, in um/px.
        seed: Of every random choice.
    """

    tiles_per_slide: tuple[int, int] = (3, 4)
    slides_per_patient: tuple[int, int] = (1, 2)
    sites: int = 4
    external_share: float = 0.2
    iid: bool = False
    test_fraction: float = 0.2
    mpp: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tiles_per_slide", "slides_per_patient"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise JobError(f"{name} must be two numbers, the first at least 1 and at most the second")
        if self.sites < 1:
            raise JobError(f"there must be at least one site, not {self.sites}")
        if not 0 <= self.external_share < 1:
            raise JobError(f"external_share must be at least 0 and less than 1, not {self.external_share}")
        if not is_mpp(self.mpp):
            raise JobError(f"mpp must be micrometres per pixel, such as 0.5, and not {self.mpp}")


@dataclass(frozen=True)
class Tile:
    """One labelled picture; ``name`` is its path as the index has it, ``patient`` None if that says none."""

    path: Path
    name: str
    label: str
    patient: str | None = None


@dataclass(frozen=True)
class AssembledSlide:
    """One slide to be: its patient, its site, and the tiles in it."""

    slide_id: str
    patient: str
    site: str
    label: str
    tiles: tuple[Tile, ...]


def read_tiles(index_csv: Path, label_map: Mapping[str, str] = LUNG_LABELS) -> list[Tile]:
    """Read the tiles of ``index_csv`` whose label is in ``label_map``, under their new labels.

    Args:
        index_csv: Columns ``file`` (relative to the CSV) and ``label``; optionally ``source_tile`` and
            ``patient``, which then every tile needs.
        label_map: The index's label to the slides' label; tiles of other labels are left out.

    Raises:
        ManifestError: The file cannot be read (``MANIFEST_UNREADABLE``); columns or tiles are missing, or a
            tile is there twice, each with its line.
    """
    columns, rows = read_index(index_csv, ("file", "label", "source_tile", "patient"))
    if missing := [name for name in ("file", "label") if name not in columns]:
        raise ManifestError(f"{index_csv}: line 1 has no column {' and no column '.join(missing)}")
    tiles: list[Tile] = []
    problems: list[str] = []
    seen: set[str] = set()
    sources: set[str] = set()
    for line, row in rows:
        name, label, source = row["file"], row["label"], row.get("source_tile", "")
        if label not in label_map:
            continue
        patient = unicodedata.normalize("NFC", row["patient"]) if "patient" in columns else None
        path = find_path(index_csv.parent, name)
        if name in seen:
            problems.append(f"line {line}: tile {name} is there already")
        elif not name or not path.is_file():
            problems.append(f"line {line}: no such tile: {path}")
        elif patient == "":
            problems.append(f"line {line}: no patient")
        elif not source or source not in sources:
            tiles.append(Tile(path, name, label_map[label], patient))
        seen.add(name)
        sources.add(source)
    if problems:
        raise ManifestError(f"{index_csv}: {len(problems)} of {len(rows)} rows are wrong.", problems=problems)
    if not tiles:
        found = ", ".join(sorted({row["label"] for _, row in rows})) or "none"
        raise ManifestError(
            f"{index_csv}: no tile has one of the labels {', '.join(label_map)}; the index has: {found}"
        )
    return tiles


def plan_assembly(tiles: Sequence[Tile], parameters: AssemblyParameters) -> list[AssembledSlide]:
    """Return which tiles go to which slide, patient and site.

    Under ``iid = False`` a site may get few patients of a label, or none: nothing is moved to fill it up.
    Where a patient has tiles of several labels, sites are drawn for all patients at once, whatever the label.

    Raises:
        JobError: There are not tiles enough for two patients of each label at each site, on average.
    """
    labels_of: dict[str | None, set[str]] = {}
    for tile in tiles:
        labels_of.setdefault(tile.patient, set()).add(tile.label)
    mixed = any(len(labels) > 1 for patient, labels in labels_of.items() if patient is not None)
    patients_of: dict[str, list[list[list[Tile]]]] = {}
    for group in ["patient"] if mixed else sorted({tile.label for tile in tiles}):
        rng = np.random.default_rng(derive_seed(parameters.seed, "assemble", group))
        of_group = [tile for tile in tiles if mixed or tile.label == group]
        patients_of[group] = _patients(of_group, parameters, rng)
    sites = _sites_of({group: len(patients) for group, patients in patients_of.items()}, parameters)
    planned = [
        AssembledSlide(
            f"{name}-{index}", of_slide[0].patient or name, sites[name], of_slide[0].label, tuple(of_slide)
        )
        for group, patients in patients_of.items()
        for name, slides in zip(_names(group, len(patients)), patients, strict=True)
        for index, of_slide in enumerate(slides, start=1)
    ]
    return sorted(planned, key=lambda slide: (slide.site == EXTERNAL, slide.site, slide.slide_id))


def assemble(
    index_csv: Path,
    out_dir: Path,
    parameters: AssemblyParameters | None = None,
    label_map: Mapping[str, str] = LUNG_LABELS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Path]:
    """Make slides of the tiles in ``index_csv``.

    Args:
        index_csv: See :func:`read_tiles`.
        out_dir: Gets ``<site>/manifest.csv``, ``<site>/slides/*.tif`` and ``assembly.json``, which says which
            tile went where.
        parameters: How.
        label_map: See :func:`read_tiles`.
        progress: Called with (slides made, slides in all) after each.

    Returns:
        The manifest of each site.

    Raises:
        ManifestError, JobError, SlideError: The index, the parameters or a tile cannot be used.
    """
    parameters = parameters or AssemblyParameters()
    planned = plan_assembly(read_tiles(index_csv, label_map), parameters)
    rows: dict[str, list[ManifestRow]] = {}
    for done, slide in enumerate(planned, start=1):
        path = out_dir / slide.site / "slides" / f"{slide.slide_id}.tif"
        write_pyramid(path, lay_tiles(slide, parameters), parameters.mpp, jpeg_quality=95)
        row = ManifestRow(line=0, slide=path, patient=slide.patient, label=slide.label, site=slide.site)
        rows.setdefault(slide.site, []).append(row)
        if progress is not None:
            progress(done, len(planned))
    manifests = {}
    for site, of_site in rows.items():
        path = out_dir / site / "manifest.csv"
        test_fraction = 1.0 if site == EXTERNAL else parameters.test_fraction
        manifests[site] = write_manifest(
            path, _with_splits(path, of_site, test_fraction, parameters.seed)
        ).path
    described = [
        {"slide": s.slide_id, "site": s.site, "label": s.label, "tiles": [tile.name for tile in s.tiles]}
        for s in planned
    ]
    write_json(out_dir / "assembly.json", {"parameters": asdict(parameters), "slides": described})
    return manifests


def lay_tiles(slide: AssembledSlide, parameters: AssemblyParameters) -> NDArray[np.uint8]:
    """Return the tiles of ``slide`` on a square grid, uint8 (h, w, 3); cells left over are glass.

    Raises:
        SlideError: A tile is no picture (``SLIDE_READ_FAILED``).
    """
    pictures = [_read_tile(tile) for tile in slide.tiles]
    side = math.ceil(math.sqrt(parameters.tiles_per_slide[1]))
    cell_h, cell_w = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    canvas = np.full((side * cell_h, side * cell_w, 3), GLASS, np.uint8)
    rng = np.random.default_rng(derive_seed(parameters.seed, "cells", slide.slide_id))
    for cell, picture in zip(rng.permutation(side * side), pictures, strict=False):
        y, x = cell // side * cell_h, cell % side * cell_w
        canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return canvas


def _read_tile(tile: Tile) -> NDArray[np.uint8]:
    try:
        return rgb_on_white(open_image(tile.path.read_bytes()))
    except (OSError, UnreadableImageError) as error:
        raise SlideError(
            f"{tile.path}: this tile cannot be read ({error}); take its row out of the index",
            reason="SLIDE_READ_FAILED",
        ) from error


def _patients(
    tiles: Sequence[Tile], parameters: AssemblyParameters, rng: np.random.Generator
) -> list[list[list[Tile]]]:
    """Return the tiles of each slide of each patient, in random order."""
    if tiles[0].patient is None:
        slides = _split_up(tiles, parameters.tiles_per_slide, rng)
        return _split_up(slides, parameters.slides_per_patient, rng, keep_rest=True)
    own: dict[str, dict[str, list[Tile]]] = {}
    for tile in sorted(tiles, key=lambda tile: (str(tile.patient), tile.label)):
        own.setdefault(str(tile.patient), {}).setdefault(tile.label, []).append(tile)
    patients = [
        # too few for a slide are one all the same: nobody's tiles are given to another, or lost
        [
            slide
            for of_label in by_label.values()
            for slide in _split_up(of_label, parameters.tiles_per_slide, rng) or [of_label]
        ]
        for by_label in own.values()
    ]
    return [patients[index] for index in rng.permutation(len(patients))]


def _split_up(
    items: Sequence[T], sizes: tuple[int, int], rng: np.random.Generator, *, keep_rest: bool = False
) -> list[list[T]]:
    """Return the items, shuffled, in groups of sizes[0] to sizes[1]; a smaller rest only if ``keep_rest``."""
    shuffled = [items[index] for index in rng.permutation(len(items))]
    groups = []
    while len(shuffled) >= sizes[0] or (keep_rest and shuffled):
        size = int(rng.integers(sizes[0], sizes[1] + 1))
        groups.append(shuffled[:size])
        shuffled = shuffled[size:]
    return groups


def _names(label: str, patients: int) -> list[str]:
    return [f"{label}-p{number:03d}" for number in range(1, patients + 1)]


def _sites_of(patients: Mapping[str, int], parameters: AssemblyParameters) -> dict[str, str]:
    """Return patient → site, for so many patients of each label: the first are external, the others dealt."""
    label_of: dict[str, str] = {}
    outside: list[str] = []
    for label, count in patients.items():
        external = max(PATIENTS_PER_LABEL, round(parameters.external_share * count))
        external = external if parameters.external_share > 0 else 0
        needed = PATIENTS_PER_LABEL * parameters.sites + external
        if count < needed:
            raise JobError(
                f"the tiles of label {label} make {count} patients, but {parameters.sites} sites"
                f"{' and an external one' if external else ''} need {needed}: use fewer sites or tiles per "
                "slide"
            )
        outside += _names(label, count)[:external]
        label_of |= dict.fromkeys(_names(label, count)[external:], label)
    deal = deal_evenly if parameters.iid else draw_unevenly
    dealt = deal(label_of, parameters.sites, parameters.seed)
    return dict.fromkeys(outside, EXTERNAL) | {
        patient: f"hospital-{number + 1}" for patient, number in dealt.items()
    }


def _with_splits(
    path: Path, rows: Sequence[ManifestRow], test_fraction: float, seed: int
) -> tuple[ManifestRow, ...]:
    if test_fraction == 1.0:
        return tuple(ManifestRow(**{**vars(row), "split": "test"}) for row in rows)
    return stratify_splits(Manifest(path, tuple(rows)), test_fraction, seed).rows

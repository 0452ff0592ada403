"""A site's own page, made of its slides, its bags and the federated model. It stays at the site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from histoflare.bags.bag import Bag, read_bag
from histoflare.bags.cohort import BagRecord, Cohort
from histoflare.bags.folder import bag_path, read_left_out
from histoflare.bags.heatmap import attention_levels, attention_limit, is_even, relative_attention
from histoflare.bags.task import BagTask
from histoflare.errors import BagError, SlideError
from histoflare.reasons import explain
from histoflare.report.site_page import (
    AttentionScale,
    LeftOutRow,
    SitePage,
    SlidePictures,
    SlideRow,
    encode_picture,
    sent_rows,
)
from histoflare.slides.manifest import Manifest, ManifestRow
from histoflare.slides.mosaic import MosaicParameters, find_mosaic
from histoflare.slides.overlay import VIRIDIS, draw_attention, draw_overlay, read_picture
from histoflare.slides.reader import Slide

PICTURE_PX = 720
"""Longer side of a slide's pictures."""

MOST_PICTURES = 24
THREADS = 2
ORDER = {"test": 0, "validation": 1, "train": 2}


@dataclass(frozen=True)
class _Plan:
    """A slide to be drawn; ``relative``: attention to each patch (n,), the average being 1."""

    row: ManifestRow
    record: BagRecord
    relative: NDArray[np.float64] | None


def build_site_page(
    site: str,
    manifest: Manifest,
    bags: Path,
    cohort: Cohort,
    task: BagTask,
    model: nn.Module | None,
    report: Mapping[str, Any],
    *,
    alias: str = "",
    update_bytes: int | None = None,
    most_pictures: int = MOST_PICTURES,
    threads: int = THREADS,
    on_slide: Callable[[int, int], None] = lambda done, total: None,
) -> SitePage:
    """Return the page of ``site``, its pictures drawn.

    A slide that cannot be drawn (moved away since its bag was made, damaged) is noted and costs no other.
    Memory holds ``threads`` open slides and the finished pictures, at most 60 kB each, three a slide.

    Args:
        manifest: The site's slides. bags: The folder of their bags. cohort: The bags, loaded.
        model: The federated model as this site uses it, in evaluation mode; None leaves out what it says.
        report: The consortium's report.
        alias: The site's name in the report, where that is another.
        update_bytes: Size of one update's tensors.
        most_pictures: Slides that get pictures; test slides first.
        threads: Slides read at once.
        on_slide: Told how many slides are drawn, and of how many.

    Raises:
        BagError: A bag is damaged or was changed.
    """
    by_id = {manifest.row_id(row): row for row in manifest.rows}
    there = {name for name, row in by_id.items() if row.slide.exists()}  # they get the pictures
    records = sorted(
        cohort.records,
        key=lambda record: (record.slide_id not in there, ORDER[record.split], record.slide_id),
    )
    rows, plans = [], []
    for number, record in enumerate(records):
        features = cohort.features(record)
        row = SlideRow(record.slide_id, record.patient, task.target.say(record.label), record.split)
        if model is not None:
            with torch.inference_mode():
                said = task.answer(model, features)
            row = replace(row, predicted=said.predicted, probabilities=said.probabilities)
        rows.append(row)
        if number < most_pictures and record.slide_id in by_id:
            relative = None if model is None else relative_attention(model, features)
            plans.append(_Plan(by_id[record.slide_id], record, relative))
    limit = attention_limit([plan.relative for plan in plans if plan.relative is not None])
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="pictures") as pool:
        pictures = []
        for each in pool.map(lambda plan: _draw(plan, limit), plans):
            pictures.append(each)
            on_slide(len(pictures), len(plans))
    drawn = {plan.record.slide_id: each for plan, each in zip(plans, pictures, strict=True)}
    scale = AttentionScale(limit, VIRIDIS, is_even(limit))
    return SitePage(
        site=site,
        report=report,
        slides=[replace(row, pictures=drawn.get(row.slide)) for row in rows],
        left_out=_left_out(manifest, bags),
        sent=sent_rows(report, alias or site, update_bytes),
        alias="" if alias == site else alias,
        scale=scale if any(each.attention for each in pictures) else None,
        warnings=[warning for warning in cohort.warnings if "left out" not in warning],
    )


def _draw(plan: _Plan, limit: float) -> SlidePictures:
    """Return a slide's pictures; what cannot be had is noted."""
    try:
        bag = read_bag(plan.record.path)
        with Slide(plan.row.slide, mpp=plan.row.mpp or bag.header.given_mpp) as slide:
            return _draw_open(slide, plan, bag, limit)
    except (SlideError, BagError) as error:
        return SlidePictures(notes=(f"No pictures ({error.reason}): {explain(error.reason)}",))
    except OSError:
        reason = "SLIDE_READ_FAILED"
        return SlidePictures(notes=(f"No pictures ({reason}): {explain(reason)}",))


def _draw_open(slide: Slide, plan: _Plan, bag: Bag, limit: float) -> SlidePictures:
    base = read_picture(slide, PICTURE_PX)
    pictures = SlidePictures(thumbnail=encode_picture(base.image))
    notes = []
    if bag.header.mosaic is None:
        notes.append("No mosaic: the features of this slide were imported.")
    else:
        mosaic, tissue = find_mosaic(slide, MosaicParameters.from_json(bag.header.mosaic))
        corners = np.array([(patch.l0_x_px, patch.l0_y_px) for patch in mosaic.patches], dtype=np.int64)
        if np.array_equal(corners, bag.l0_coords):
            pictures = replace(
                pictures,
                mosaic=encode_picture(draw_overlay(slide, mosaic, tissue, base, legend=False)),
                chosen=len(mosaic.chosen),
                candidates=len(mosaic.candidates),
            )
        else:
            notes.append("No mosaic: the slide is not as it was when its bag was made. Prepare it again.")
    if plan.relative is not None:
        if bag.header.l0_patch_px is None:
            notes.append("No attention picture: the imported features do not say how large a patch is.")
        else:
            levels = attention_levels(plan.relative, limit)
            image = draw_attention(base, bag.l0_coords, bag.header.l0_patch_px, levels)
            ends = (float(plan.relative.min()), float(plan.relative.max()))
            pictures = replace(pictures, attention=encode_picture(image), attention_range=ends)
    return replace(pictures, notes=tuple(notes))


def _left_out(manifest: Manifest, bags: Path) -> list[LeftOutRow]:
    """Return the manifest's slides without a bag, with the reason that ``prepare`` noted."""
    noted = read_left_out(bags)
    names = [manifest.row_id(row) for row in manifest.rows]
    return [
        LeftOutRow(name, noted.get(name, {}).get("reason", "BAG_MISSING"))
        for name in sorted(names)
        if not bag_path(bags, name).is_file()
    ]

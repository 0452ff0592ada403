"""One site's own page: its slides or images, what the model makes of them, what left. It stays at the site.

It is handed prepared pictures and rows; :mod:`histoflare.site.pictures` makes those of slides and
:mod:`histoflare.site.image_pictures` those of images.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from histoflare.report.beside_updates import say_also_left
from histoflare.report.bounds import models_of, name_model
from histoflare.report.figures import kind_of
from histoflare.report.guarantee_words import say_site
from histoflare.report.headline import say_late, say_privacy_plainly, say_threshold
from histoflare.report.own_run import OwnRun, make_own_privacy, say_spent
from histoflare.report.page import RUNTIMES, UNTESTED, Group, Row
from histoflare.report.participation import REFUSED_AT_SERVER, say_rounds, site_rounds
from histoflare.report.privacy_section import make_privacy_section
from histoflare.report.rendering import write_template
from histoflare.report.report_file import fill_missing

LARGEST_PICTURE_BYTES = 60_000

QUALITIES = (85, 75, 65, 50, 35)
SMALLEST_PX = 64


@dataclass(frozen=True)
class SlidePictures:
    """A slide's pictures as data URIs; what could not be drawn is empty, and ``notes`` says why.

    Attributes:
        chosen, candidates: Patches of the mosaic, and patches with enough tissue; None if unknown.
        attention_range: Least and greatest attention to a patch, as a multiple of the average.
    """

    thumbnail: str = ""
    mosaic: str = ""
    attention: str = ""
    chosen: int | None = None
    candidates: int | None = None
    attention_range: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_any(self) -> bool:
        """Whether there is a picture at all."""
        return bool(self.thumbnail or self.mosaic or self.attention)


@dataclass(frozen=True)
class SlideRow:
    """One slide.

    Attributes:
        label: What the manifest says.
        predicted: What the federated model says; empty without one.
        probabilities: Class → the model's; empty without one, and where it tells no classes.
    """

    slide: str
    patient: str
    label: str
    split: str
    predicted: str = ""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    pictures: SlidePictures | None = None

    def with_notes(self, said: Mapping[str, str]) -> SlideRow:
        """Return the row with what the model said of the slide in a row of the site's notes."""
        shares = {key.removeprefix("p_"): float(said[key]) for key in said if key.startswith("p_")}
        return replace(self, predicted=said.get("predicted", ""), probabilities=shares)


@dataclass(frozen=True)
class ImagePictures:
    """An image's pictures as data URIs; what could not be drawn is empty, and ``notes`` says why.

    Attributes:
        image: As it is. outlines: With the outlines of both masks.
        masks: (caption, picture): the given mask, and those of models, classes in their colours.
        annotated: The share of its pixels that somebody annotated.
    """

    image: str = ""
    outlines: str = ""
    annotated: float = 1.0
    notes: tuple[str, ...] = ()
    masks: Sequence[tuple[str, str]] = ()

    @property
    def is_any(self) -> bool:
        """Whether there is a picture at all."""
        return bool(self.image or self.outlines or self.masks)


@dataclass(frozen=True)
class ImageRow:
    """One image with a mask.

    ``dice``: class → Dice of the federated model's mask, None if the class is in neither mask; empty without
    a model.
    """

    slide: str
    patient: str
    split: str
    dice: Mapping[str, float | None] = field(default_factory=dict)
    pictures: ImagePictures | None = None

    def with_notes(self, said: Mapping[str, str]) -> ImageRow:
        """Return the row with the Dice of the model's mask in a row of the site's notes."""
        dice = {key.removeprefix("dice_"): said[key] for key in said if key.startswith("dice_")}
        return replace(self, dice={label: float(value) if value else None for label, value in dice.items()})


@dataclass(frozen=True)
class LeftOutRow:
    """A slide of the manifest that no model saw, and the reason code."""

    slide: str
    reason: str


@dataclass(frozen=True)
class SentRow:
    """What left the site in one round (from 1), one of ``report.charts.STATUSES``, or ``absent``.

    An absent site was sent no task; one that is ``silent`` was, and answered late or not at all.

    ``size_bytes`` is that of the tensors; None if nothing left or it was not counted.
    """

    round_number: int
    status: str
    reason: str = ""
    size_bytes: int | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    when: datetime | None = None


@dataclass(frozen=True)
class AttentionScale:
    """Colours (CSS) from the least to the greatest attention: 1/limit to limit times the average.

    ``is_even``: nearly all patches of nearly all slides lie between these two, so that none stands out.
    """

    limit: float
    colours: Sequence[str]
    is_even: bool = False


@dataclass(frozen=True)
class ClassKey:
    """A class and the colours (CSS) of its outlines: the given mask's, the model's dashes and its gaps."""

    label: str
    given: str
    dash: str
    gap: str


@dataclass(frozen=True)
class SitePage:
    """All that a site's page says.

    Attributes:
        site: The site's own name. alias: Its name in the consortium's report; empty if the same.
        report: The consortium's report, for the site's figures, privacy and settings.
        slides: Every slide, or every image of a segmentation; those with pictures are shown first.
        left_out: Slides that were left out.
        sent: What left in each round.
        scale: Of the attention pictures; None if there are none.
        classes: Those with outlines and figures, of a segmentation.
        warnings: What is odd about the data.
        own: The run by the site's own ledger, log and notes; None: ``report`` says what left.
    """

    site: str
    report: Mapping[str, Any]
    slides: Sequence[SlideRow | ImageRow]
    left_out: Sequence[LeftOutRow]
    sent: Sequence[SentRow]
    alias: str = ""
    scale: AttentionScale | None = None
    classes: Sequence[ClassKey] = ()
    warnings: Sequence[str] = ()
    own: OwnRun | None = None


def sent_rows(report: Mapping[str, Any], name: str, update_bytes: int | None = None) -> list[SentRow]:
    """Return what the site called ``name`` in ``report`` sent in each round.

    Args:
        update_bytes: Size of one update's tensors, where known.
    """
    mine = next((each for each in site_rounds(report) if each.site == name), None)
    if mine is None:
        return []
    rows = []
    for status, row in zip(mine.statuses, report["participation"], strict=True):
        reason = row.get("refused", {}).get(name, "")
        shown = "unused" if reason == REFUSED_AT_SERVER else status
        if status == "silent" and name in row.get("absent", []):
            shown = "absent"
        left = shown in ("took", "unused")
        rows.append(
            SentRow(
                round_number=row["round"] + 1,
                status=shown,
                reason=reason,
                size_bytes=update_bytes if left else None,
                metrics=(row.get("metrics") or {}).get(name, {}),
                when=datetime.fromtimestamp(row["unix_time"], UTC) if row.get("unix_time") else None,
            )
        )
    return rows


def write_site_page(page: SitePage, path: Path) -> None:
    """Write a site's page, whole or not at all.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    name = page.alias or page.site
    report = fill_missing(page.report)
    kind = kind_of(report)
    figures = report["sites"].get(name)
    groups = []
    if figures:
        missing = [] if figures["n_test"] else [UNTESTED]
        note = kind.say_sizes(figures["n_train"], figures["n_test"])
        rows = [
            Row(name_model(report, model), figures[model], model, *missing) for model in models_of(report)
        ]
        groups.append(Group("This site's test patients", note, rows))
    privacy = make_privacy_section(report) if page.own is None else make_own_privacy(page.own)
    mine = [each for each in site_rounds(report) if each.site == name]
    test_rows = [row for row in page.slides if row.split == "test"]
    tested = [row for row in test_rows if isinstance(row, SlideRow) and row.probabilities]
    tested_images = [row for row in test_rows if isinstance(row, ImageRow) and row.dice]
    write_template(
        "site.html",
        path,
        page=page,
        report=report,
        groups=groups,
        kind=kind,
        metrics=list(kind.shown),
        splits=Counter(slide.split for slide in page.slides),
        pictured=[slide for slide in page.slides if slide.pictures and slide.pictures.is_any],
        undrawn=Counter(
            note
            for slide in page.slides
            if slide.pictures and not slide.pictures.is_any
            for note in slide.pictures.notes
        ),
        also_left=[] if page.own else say_also_left(report, name),
        tested=tested,
        right=sum(slide.predicted == slide.label for slide in tested),
        tested_images=tested_images,
        mean_dice=mean_dice(tested_images),
        sent_bytes=sum(row.size_bytes or 0 for row in page.sent),
        sent_rounds=sum(row.status in ("took", "unused") for row in page.sent),
        counted=any(row.size_bytes is not None for row in page.sent),
        runtime=RUNTIMES.get(report["runtime"], report["runtime"]),
        late=page.own.late if page.own else "".join(say_late(each, report, "This site") for each in mine),
        rounds="" if page.own else say_rounds(report),
        plain_privacy="" if page.own else say_privacy_plainly(report["guarantee"]),
        threshold=say_threshold(
            (figures or {}).get("federated"),
            report.get("task", {}).get("labels", ()),
            "on this site's test patients",
        ),
        timed=any(row.when for row in page.sent),
        metrics_sent=any(row.metrics for row in page.sent),
        privacy=privacy,
        own_spending=say_spent(page.own.spent) if page.own else say_site(report["guarantee"], name),
    )


def mean_dice(images: Sequence[ImageRow]) -> float | None:
    """Return the mean over images, then over classes, as the report's ``dice``; None: there is no class."""
    known: dict[str, list[float]] = {}
    for image in images:
        for label, value in image.dice.items():
            if value is not None:
                known.setdefault(label, []).append(value)
    return fmean(fmean(values) for values in known.values()) if known else None


def encode_picture(image: Image.Image, largest_bytes: int = LARGEST_PICTURE_BYTES) -> str:
    """Return ``image`` as a JPEG data URI of at most ``largest_bytes`` (before base64).

    The quality is lowered first and then the size, down to :data:`SMALLEST_PX` at the longer side.
    """
    image = image.convert("RGB")
    while True:
        for quality in QUALITIES:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, optimize=True)
            if buffer.tell() <= largest_bytes:
                return _data_uri(buffer)
        if max(image.size) <= SMALLEST_PX:
            return _data_uri(buffer)
        smaller = (max(1, round(image.width * 0.75)), max(1, round(image.height * 0.75)))
        image = image.resize(smaller, Image.Resampling.LANCZOS)


def encode_flat(image: Image.Image) -> str:
    """Return a picture of few colours as a PNG data URI, with each pixel as it is."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return _data_uri(buffer, "png")


def _data_uri(buffer: io.BytesIO, kind: str = "jpeg") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

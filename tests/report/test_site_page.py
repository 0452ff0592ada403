"""A site's own page: its slides, what left, and nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from histoflare.report.beside_updates import say_also_left
from histoflare.report.site_page import (
    AttentionScale,
    ClassKey,
    ImagePictures,
    ImageRow,
    LeftOutRow,
    SentRow,
    SitePage,
    SlidePictures,
    SlideRow,
    encode_picture,
    mean_dice,
    sent_rows,
    write_site_page,
)
from tests.report.made import HOSTILE, full_report, row
from tests.report.made_masks import segmentation_facts
from tests.report.parsed import Parsed, assert_loads_nothing, parse


def page(**changes: Any) -> SitePage:
    picture = encode_picture(Image.new("RGB", (40, 30), (200, 100, 150)))
    drawn = SlidePictures(picture, picture, picture, 9, 87, (0.91, 1.24))
    slides = [
        SlideRow("s1", "p1", "solid", "test", "solid", {"glandular": 0.3, "solid": 0.7}, drawn),
        SlideRow(HOSTILE, "p<2>", "glandular", "test", "solid", {"glandular": 0.25, "solid": 0.75}, drawn),
        SlideRow("s3", "p3", "solid", "train", "solid", {"glandular": 0.1, "solid": 0.9}),
    ]
    report = full_report()
    rows: dict[str, Any] = {
        "site": "nijmegen",
        "report": report,
        "slides": slides,
        "left_out": [LeftOutRow("s4", "SLIDE_NO_TISSUE")],
        "sent": sent_rows(report, "nijmegen", 1_234_567),
        "scale": AttentionScale(1.25, ("#440154", "#fde725")),
        "warnings": ["line 3: odd"],
    }
    return SitePage(**rows | changes)


def image_page(**changes: Any) -> SitePage:
    """The page of a segmentation."""
    picture = encode_picture(Image.new("RGB", (40, 30), (200, 100, 150)))
    drawn = ImagePictures(picture, picture)
    images = [
        ImageRow("i1", "p1", "test", {"nuclei": 0.5, "stroma": None}, drawn),
        ImageRow(HOSTILE, "p<2>", "test", {"nuclei": 0.75, "stroma": 0.125}, drawn),
        ImageRow("i3", "p3", "train", {"nuclei": 0.9375, "stroma": 0.25}),
    ]
    keys = [ClassKey(label, "#dc3220", "#f3b7b1", "#000000") for label in ("nuclei", "stroma")]
    report = full_report(**segmentation_facts())
    rows: dict[str, Any] = {
        "site": "tnbc-1",
        "report": report,
        "slides": images,
        "left_out": (),
        "sent": sent_rows(report, "tnbc-1", 1_234_567),
        "classes": keys,
    }
    return SitePage(**rows | changes)


def written(made: SitePage, folder: Path) -> Parsed:
    write_site_page(made, folder / "site.html")
    assert_loads_nothing(folder / "site.html")
    return parse(folder / "site.html")


def test_slides_answers_and_what_was_left_out(tmp_path: Path) -> None:
    parsed = written(page(), tmp_path)
    assert len(parsed.named("img")) == 6
    assert all(image["alt"] for image in parsed.named("img"))
    assert "the right label for 1 of 2 test slides, too few to judge it by" in parsed.text
    assert "✗ the model says solid" in parsed.text
    assert "9 of 87 patches chosen" in parsed.text
    assert "0.91 to 1.24 × average" in parsed.text
    assert "0.80 × average or less" in parsed.text
    assert "1.25 × average or more" in parsed.text
    assert HOSTILE in parsed.text
    assert "p<2>" in parsed.text
    assert "SLIDE_NO_TISSUE" in parsed.text
    assert "No tissue was found on the slide." in parsed.text
    assert "line 3: odd" in parsed.text
    assert "s3" in parsed.text, "slides without pictures are in the table"
    assert "ε = ∞" in parsed.text


def test_even_attention_is_explained(tmp_path: Path) -> None:
    texts = []
    for is_even in (True, False):
        path = tmp_path / f"{is_even}.html"
        write_site_page(page(scale=AttentionScale(1.25, ("#440154", "#fde725"), is_even)), path)
        texts.append(path.read_text())
    assert ["point to no region" in text for text in texts] == [True, False]


def test_what_left_and_what_did_not(tmp_path: Path) -> None:
    parsed = written(page(), tmp_path)
    assert "TRAINER_DIED" in parsed.text
    assert parsed.text.count("refused: nothing left") == 4
    assert parsed.text.count("update sent") == 26
    assert "Updates left the site in 26 of 30 rounds: 32.1 MB (32 098 742 bytes)" in parsed.text
    assert "validation/balanced_accuracy 0.410" in parsed.text


def test_figures_and_an_unprotected_chapter_left_too(tmp_path: Path) -> None:
    """The list of updates is not all: what was let out about the model, and what an earlier chapter sent."""
    said = {"nijmegen": {"auc": 0.9}, "bonn": {"accuracy": 0.8}}
    second = full_report(evaluated_at_sites=said, runtime="poc")
    both = second | {"unprotected_run": full_report(job="free", runtime="poc", evaluated_at_sites={})}
    assert say_also_left(full_report(evaluated_at_sites={}, runtime="poc"), "nijmegen") == []
    figures, updates = say_also_left(both, "nijmegen")
    assert "AUC" in figures and "accuracy" not in figures
    assert "job free" in updates and " 26 updates " in updates
    (external,) = say_also_left(both, "bonn")
    assert "accuracy" in external, "a site in no round let figures out"
    assert say_also_left(both | {"runtime": "inprocess"}, "nijmegen") == []
    parsed = written(page(report=both), tmp_path)
    assert figures in parsed.text and updates in parsed.text


def test_slides_without_a_picture_are_counted_and_not_shown_one_by_one(tmp_path: Path) -> None:
    lost = SlidePictures(notes=("No pictures (SLIDE_MISSING): gone.",))
    rows = [SlideRow(f"lost-{i}", "p", "solid", "test", pictures=lost) for i in range(3)]
    parsed = written(page(slides=[*page().slides, *rows]), tmp_path)
    assert "3 slides: No pictures (SLIDE_MISSING): gone." in parsed.text
    assert parsed.text.count("lost-1") == 1, "in the table alone"


def test_rows_of_what_left() -> None:
    report = full_report(
        participation=[
            row(0, ["a", "b"], unix_time=1_700_000_000.0),
            row(1, ["a", "b"], taking_part=["a"], no_answer=["b"]),
            row(2, ["a", "b"], taking_part=["a"]),
            row(3, ["a", "b"], asked=["a"], taking_part=["a"]),
            row(4, ["a", "b"], taking_part=["a"], refused={"b": "TOO_FEW_PATIENTS"}),
            row(5, ["a", "b"], taking_part=["a"], refused={"b": "UPDATES_INVALID"}),
            row(6, ["a", "b"], taking_part=["a"], no_answer=["b"], absent=["b"]),
        ]
    )
    rows = sent_rows(report, "b", 10)
    statuses = ["took", "silent", "unused", "unasked", "refused", "unused", "absent"]
    assert [each.status for each in rows] == statuses
    assert [each.size_bytes for each in rows] == [10, None, 10, None, None, 10, None], (
        "an update that the server refused had left"
    )
    assert rows[0].when is not None
    assert rows[0].when.isoformat() == "2023-11-14T22:13:20+00:00"
    assert sent_rows(report, "a stranger") == []


def test_a_site_that_was_not_there_was_not_late(tmp_path: Path) -> None:
    rows = [row(0, ["a", "b"]), row(1, ["a", "b"], taking_part=["a"], no_answer=["b"], absent=["b"])]
    report = full_report(participation=rows, rounds=2)
    parsed = written(page(site="b", report=report, sent=sent_rows(report, "b", 10)), tmp_path)
    assert "not there: no task was sent" in parsed.text
    assert "late" not in parsed.text.lower()


def test_the_rounds_stand_behind_the_slides_and_pictures_enlarge(tmp_path: Path) -> None:
    parsed = written(page(), tmp_path)
    assert parsed.text.index("All slides") < parsed.text.index("What left the site")
    enlarged = [each for each in parsed.named("details") if each.get("class", "").startswith("enlarge")]
    assert len(enlarged) == len(parsed.named("img")) > 0


def test_a_column_without_an_entry_is_not_there(tmp_path: Path) -> None:
    full = written(page(), tmp_path).text
    bare = [SentRow(1, "took"), SentRow(2, "refused", "STOPPED")]
    empty = written(page(sent=bare), tmp_path).text
    for heading in ("size of tensors", "metrics sent"):
        assert heading in full and heading not in empty
    assert "ended (UTC)" not in empty


@pytest.mark.parametrize(("site", "is_late"), [("graz", True), ("amsterdam", False)])
def test_the_rounds_that_a_site_was_late_in_are_in_its_head(tmp_path: Path, site: str, is_late: bool) -> None:
    parsed = written(page(site=site, report=full_report()), tmp_path)
    assert ("This site was late in rounds 13–14: no update came in time." in parsed.text) == is_late


def test_a_site_with_nothing_to_show(tmp_path: Path) -> None:
    empty = page(slides=[], left_out=[], sent=[], scale=None, warnings=[], site="bonn")
    parsed = written(empty, tmp_path)
    assert "This site has no slides that a model can use." in parsed.text
    assert "No update: this site is in no round of the run." in parsed.text
    assert not parsed.named("img")
    bare = [SlideRow("s1", "p1", "solid", "test", pictures=SlidePictures(notes=("No pictures (X)",)))]
    parsed = written(page(slides=bare, scale=None), tmp_path)
    assert "No pictures (X)" in parsed.text
    assert "No test slide was shown to the federated model." in parsed.text
    assert "average or less" not in parsed.text


def test_an_alias_finds_the_sites_figures(tmp_path: Path) -> None:
    parsed = written(page(site="Radboud", alias="nijmegen"), tmp_path)
    assert "other sites see it as nijmegen" in parsed.text
    assert "0.640" in parsed.text, "nijmegen's local balanced accuracy"


@pytest.mark.parametrize("side", [40, 700, 3000])
def test_pictures_are_kept_small(side: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (side, side // 2, 3), dtype=np.uint8)
    uri = encode_picture(Image.fromarray(noise), largest_bytes=20_000)
    kind, _, content = uri.partition(",")
    decoded = base64.b64decode(content)
    assert kind == "data:image/jpeg;base64"
    assert len(decoded) <= 20_000
    width, height = Image.open(io.BytesIO(decoded)).size
    assert height / width == pytest.approx(2, rel=0.03)
    assert (height == side) == (side == 40), "noise this large has to shrink"


# a segmentation


def test_images_their_dice_and_the_legend(tmp_path: Path) -> None:
    parsed = written(image_page(), tmp_path)
    assert len(parsed.named("img")) == 4
    assert all(image["alt"] for image in parsed.named("img"))
    # nuclei (0.5 + 0.75) / 2, stroma 0.125: their mean is 0.375
    assert (
        "masks of 2 test images have a mean Dice of 0.375; so few images are not enough to judge it by"
        in parsed.text
    )
    assert "2 images of 3, test images first" in parsed.text
    assert "nuclei: Dice 0.500 · stroma: in neither mask" in parsed.text
    assert "nuclei: Dice 0.750 · stroma: Dice 0.125" in parsed.text
    for legend in ("nuclei, given", "nuclei, the model's", "stroma, given", "stroma, the model's"):
        assert legend in parsed.text
    assert "2 test images, 1 train image." in parsed.text
    assert "i3 p3 train 0.938 0.250" in parsed.text, "images without pictures are in the table"
    assert HOSTILE in parsed.text
    assert "No image and no mask is ever sent." in parsed.text
    assert "It shows images and names patients" in parsed.text
    assert "network dhunet" in parsed.text
    assert "Pale" not in parsed.text


@pytest.mark.parametrize("rows", [[], None])
def test_a_page_of_images_speaks_of_no_slides(rows: list[ImageRow] | None, tmp_path: Path) -> None:
    parsed = written(image_page(**({} if rows is None else {"slides": rows})), tmp_path)
    assert "slide" not in parsed.text.lower()
    if rows == []:
        assert "This site has no images that a model can use." in parsed.text


def test_unannotated_parts_and_notes_are_said(tmp_path: Path) -> None:
    picture = encode_picture(Image.new("RGB", (40, 30)))
    images = [
        ImageRow("i1", "p1", "test", {}, ImagePictures(picture, picture, 0.42)),
        ImageRow("i2", "p2", "test", {}, ImagePictures(notes=("Not shown (X)",))),
    ]
    parsed = written(image_page(slides=images), tmp_path)
    assert "Outlines: given; 42 % annotated" in parsed.text
    assert "Pale: not annotated" in parsed.text
    assert "Not shown (X)" in parsed.text
    assert "No test image was shown to the federated model." in parsed.text


def test_mean_dice_is_over_images_and_then_over_classes() -> None:
    rows = [
        ImageRow("a", "p", "test", {"x": 1.0, "y": None}),
        ImageRow("b", "p", "test", {"x": 0.5, "y": 0.25}),
        ImageRow("c", "p", "test", {"x": 0.0, "y": None, "z": None}),
    ]
    assert mean_dice(rows) == pytest.approx((0.5 + 0.25) / 2)
    assert mean_dice([ImageRow("a", "p", "test", {"x": None})]) is None
    assert mean_dice([]) is None

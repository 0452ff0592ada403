"""A site's own page: its slides, what left, and nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from histoflare.report.site_page import (
    AttentionScale,
    LeftOutRow,
    SitePage,
    SlidePictures,
    SlideRow,
    encode_picture,
    sent_rows,
    write_site_page,
)
from tests.report.made import HOSTILE, full_report, row
from tests.report.parsed import Parsed, assert_loads_nothing, parse


def page(**changes: Any) -> SitePage:
    picture = encode_picture(Image.new("RGB", (40, 30), (200, 100, 150)))
    drawn = SlidePictures(picture, picture, picture, 9, 87, (0.91, 1.24))
    slides = [
        SlideRow("s1", "p1", "solid", "test", {"glandular": 0.3, "solid": 0.7}, drawn),
        SlideRow(HOSTILE, "p<2>", "glandular", "test", {"glandular": 0.25, "solid": 0.75}, drawn),
        SlideRow("s3", "p3", "solid", "train", {"glandular": 0.1, "solid": 0.9}),
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


def test_what_left_and_what_did_not(tmp_path: Path) -> None:
    parsed = written(page(), tmp_path)
    assert "TRAINER_DIED" in parsed.text
    assert parsed.text.count("refused: nothing left") == 4
    assert parsed.text.count("update sent") == 26
    assert "Updates left the site in 26 of 30 rounds: 32.1 MB (32 098 742 bytes)" in parsed.text
    assert "validation/balanced_accuracy 0.410" in parsed.text


def test_rows_of_what_left() -> None:
    report = full_report(
        participation=[
            row(0, ["a", "b"], unix_time=1_700_000_000.0),
            row(1, ["a", "b"], taking_part=["a"], no_answer=["b"]),
            row(2, ["a", "b"], taking_part=["a"]),
            row(3, ["a", "b"], asked=["a"], taking_part=["a"]),
            row(4, ["a", "b"], taking_part=["a"], refused={"b": "TOO_FEW_PATIENTS"}),
            row(5, ["a", "b"], taking_part=["a"], refused={"b": "UPDATES_INVALID"}),
        ]
    )
    rows = sent_rows(report, "b", 10)
    assert [each.status for each in rows] == ["took", "silent", "unused", "unasked", "refused", "unused"]
    assert [each.size_bytes for each in rows] == [10, None, 10, None, None, 10], (
        "an update that the server refused had left"
    )
    assert rows[0].when is not None
    assert rows[0].when.isoformat() == "2023-11-14T22:13:20+00:00"
    assert sent_rows(report, "a stranger") == []


def test_a_site_with_nothing_to_show(tmp_path: Path) -> None:
    empty = page(slides=[], left_out=[], sent=[], scale=None, warnings=[], site="bonn")
    parsed = written(empty, tmp_path)
    assert "This site has no slides that a model can use." in parsed.text
    assert "Nothing: this site is in no round of the run." in parsed.text
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

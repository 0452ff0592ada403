"""What is said of a manifest's slides before bags are made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from histoflare.errors import SlideError
from histoflare.slides.manifest import read_manifest
from histoflare.slides.mosaic import MosaicParameters
from histoflare.slides.pyramid import write_pyramid
from histoflare.slides.reader import Slide
from histoflare.slides.survey import survey_slides


def test_slides_that_would_be_left_out_are_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, side, mpp in (("fine", 128, 0.5), ("small", 60, 0.5), ("coarse", 128, 4.0), ("dead", 128, 0.5)):
        write_pyramid(tmp_path / f"{name}.tif", np.full((side, side, 3), 200, np.uint8), mpp)
    (tmp_path / "text.tif").write_text("not a slide")
    rows = [f"{name}.tif,{name},a" for name in ("fine", "small", "coarse", "dead", "text")]
    (tmp_path / "m.csv").write_text("\n".join(["slide,patient,label", *rows]))
    probe = Slide.probe

    def unreadable(slide: Slide) -> None:
        if slide.path.name == "dead.tif":
            raise SlideError("damaged", reason="SLIDE_READ_FAILED")
        probe(slide)

    monkeypatch.setattr(Slide, "probe", unreadable)
    manifest, seen = read_manifest(tmp_path / "m.csv"), []
    parameters = MosaicParameters(mpp=0.5, patch_px=64)
    found = survey_slides(manifest, parameters, lambda: seen.append(1))
    assert [(each.line, each.slide, each.reason) for each in found] == [
        (3, "small.tif", "SLIDE_TOO_SMALL"),
        (4, "coarse.tif", "SLIDE_TOO_COARSE"),
        (5, "dead.tif", "SLIDE_READ_FAILED"),
        (6, "text.tif", "SLIDE_UNSUPPORTED"),
    ]
    assert "--patch-px" in found[0].message and not any(each.usable for each in found)
    assert len(seen) == len(manifest.rows)

"""A site makes its bags before the first round."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from histoflare.bags.bag import read_bag, read_header
from histoflare.bags.encoder import RANDOM_ID
from histoflare.errors import HistoflareError
from histoflare.site import preparation
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.kinds import BAGS
from histoflare.site.trainer import Trainer
from histoflare.site.work import SiteWork
from histoflare.slides.manifest import read_manifest
from histoflare.slides.pyramid import write_pyramid
from tests.refusals import raises_reason

from ..bags.conftest import MeanColour, paint_slide, write_rows
from ..mem import make_mem_task
from .tasks import first_state, setup_of

TASK = make_mem_task(
    labels=("a", "b"),
    encoder="mean-colour:v1",
    mpp=0.5,
    patch_px=64,
    features=3,
    memories=2,
    dim=4,
    hidden=4,
)


class Loading:
    """Stands in for ``load_encoder``: notes what was asked, gives mean colours."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.encoder = MeanColour()
        self.encoder.id = "mean-colour:v1"

    def __call__(self, spec: str, weights: Any, sha256: Any, device: str, probe_px: int) -> MeanColour:
        self.asked.append((spec, weights, sha256, device, probe_px))
        return self.encoder


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Loading:
    stand_in = Loading()
    monkeypatch.setattr("histoflare.bags.encoder.load_encoder", stand_in)
    return stand_in


@pytest.fixture
def site(tmp_path: Path) -> SiteConfiguration:
    """Four slides at 0.5 µm/px, one blank and one missing, without bags."""
    rows = []
    for index in range(6):
        written = f"slides/s{index}.tif"
        if index < 5:
            write_pyramid(tmp_path / written, paint_slide(index, (320, 256), tissue=index < 4), 0.5)
        split = "test" if index in (2, 3) else "train"
        rows.append({"slide": written, "patient": f"p{index}", "label": "ab"[index % 2], "split": split})
    write_rows(tmp_path / "manifest.csv", rows)
    return SiteConfiguration({"manifest": tmp_path / "manifest.csv", "bags": tmp_path / "bags"}, prepare=True)


def made(site: SiteConfiguration) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in site.files["bags"].glob("*.h5")}


def test_missing_bags_are_made_and_unusable_slides_said(site: SiteConfiguration, loading: Loading) -> None:
    weights = site.files["manifest"].with_name("w.pth")
    site = replace(site, encoder_weights=weights, encoder_sha256="0" * 64)
    lines: list[str] = []
    work = SiteWork(setup_of(site, TASK), lines.append)
    assert work.train(first_state(TASK), 0, 2, []).patients == 2
    manifest = read_manifest(site.files["manifest"], check_files=False)
    ids = [manifest.row_id(row) for row in manifest.rows]
    assert sorted(made(site)) == sorted(ids[:4])
    header = read_header(site.files["bags"] / f"{ids[0]}.h5")
    assert (header.encoder, header.patch_px, header.patch_mpp) == ("mean-colour:v1", 64, 0.5)
    assert loading.asked == [("mean-colour", weights, "0" * 64, "cpu", 64)], "on the site's device"
    for written in ("slides/s4.tif", "slides/s5.tif"):
        assert any(f"{written} left out" in line for line in lines)
    assert any("4 made, 0 up to date, 2 left out" in line for line in lines)


def test_only_stale_bags_are_made_again_and_once(site: SiteConfiguration, loading: Loading) -> None:
    setup = setup_of(site, TASK)
    work = SiteWork(setup, lambda _: None)
    work.train(first_state(TASK), 0, 3, [])
    first, encoded = made(site), loading.encoder.encoded
    work.train(first_state(TASK), 1, 3, [])
    lines: list[str] = []
    SiteWork(setup, lines.append).train(first_state(TASK), 2, 3, [])  # a new process
    assert made(site) == first and loading.encoder.encoded == encoded
    assert len(loading.asked) == 1, "an encoder that is not needed is not loaded"
    assert any("0 made, 4 up to date, 2 left out" in line for line in lines)
    manifest = read_manifest(site.files["manifest"], check_files=False)
    write_pyramid(manifest.rows[1].slide, paint_slide(99, (320, 256)), 0.5)
    SiteWork(setup, lambda _: None).train(first_state(TASK), 2, 3, [])
    changed = {name for name, when in made(site).items() if when != first[name]}
    assert changed == {manifest.row_id(manifest.rows[1])}


def test_another_encoder_is_refused_and_makes_no_bag(site: SiteConfiguration, loading: Loading) -> None:
    loading.encoder.id = "mean-colour:v2"
    with raises_reason("ENCODER_MISMATCH", "mean-colour:v1", "mean-colour:v2", "encoder_weights"):
        SiteWork(setup_of(site, TASK), lambda _: None).train(first_state(TASK), 0, 1, [])
    assert not made(site)


def test_progress_has_counts_and_the_time_left(
    site: SiteConfiguration, loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "PROGRESS_SECONDS", 0.0)
    lines: list[str] = []
    BAGS.prepare("a", TASK, site, lines.append)
    assert any(re.search(r"slide 1 of 6, patch \d+ of \d+$", line) for line in lines)
    assert any(re.search(r": 2 of 6 slides, about \d+ (s|min) left$", line) for line in lines)
    assert any(re.search(r": 6 of 6 slides$", line) for line in lines)


def test_preparing_leaves_the_threads_as_they_were(site: SiteConfiguration, loading: Loading) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        BAGS.prepare("a", TASK, site, lambda _: None)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_without_prepare_nothing_is_made(site: SiteConfiguration, loading: Loading) -> None:
    with pytest.raises(HistoflareError) as caught:
        SiteWork(setup_of(replace(site, prepare=False), TASK), lambda _: None).train(
            first_state(TASK), 0, 1, []
        )
    assert caught.value.reason == "COHORT_INVALID"
    assert not site.files["bags"].exists() and not loading.asked


def test_a_task_that_takes_any_patches_gets_the_default_ones(
    site: SiteConfiguration, loading: Loading
) -> None:
    task = replace(TASK, mpp=None, patch_px=None)
    big = site.files["manifest"].with_name("big")
    write_pyramid(big / "s.tif", paint_slide(1, (2400, 2400)), 0.5)
    write_rows(big / "manifest.csv", [{"slide": "s.tif", "patient": "p", "label": "a"}])
    files = {"manifest": big / "manifest.csv", "bags": big / "bags"}
    BAGS.prepare("a", task, SiteConfiguration(files, prepare=True), lambda _: None)
    (bag,) = (read_bag(path) for path in (big / "bags").glob("*.h5"))
    assert (bag.header.patch_px, bag.header.patch_mpp) == (1000, 0.5)


@pytest.mark.slow
def test_a_trainers_process_makes_bags_with_the_real_encoder(site: SiteConfiguration) -> None:
    task = replace(TASK, encoder=RANDOM_ID, features=1024)
    lines: list[str] = []
    trainer = Trainer(setup_of(site, task), lines.append)
    try:
        assert trainer.train(first_state(task), 0, 1).patients == 2
    finally:
        trainer.close()
    headers = [read_header(path) for path in site.files["bags"].glob("*.h5")]
    assert [(header.encoder, header.features, header.patch_px) for header in headers] == [
        (RANDOM_ID, 1024, 64)
    ] * 4
    assert any("4 made, 0 up to date, 2 left out" in line for line in lines)
    assert any("slides/s5.tif left out" in line for line in lines)

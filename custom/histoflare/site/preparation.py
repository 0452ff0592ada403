"""Makes the bags that a site lacks, or that were not made as the job wants them, before the first round."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from histoflare.bags.encoder import load_encoder_of
from histoflare.bags.folder import RowResult
from histoflare.bags.network_encoder import Encoder
from histoflare.bags.prepare import prepare
from histoflare.bags.preprocessing import Preprocessing
from histoflare.bags.task import BagTask
from histoflare.errors import EncoderError
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.kinds.kind import Say
from histoflare.slides.manifest import Manifest, ManifestRow
from histoflare.slides.mosaic import MosaicParameters

PROGRESS_SECONDS = 10.0


def prepare_site(
    site: str, task: BagTask, manifest: Manifest, bags: Path, configuration: SiteConfiguration, say: Say
) -> None:
    """Make the bags that are missing or were not made as the task wants them.

    A slide that cannot be used is said and costs no other. The encoder is loaded only if there is a bag to
    make. A task that takes any resolution or size of patches gets the mosaics' own defaults.

    Args:
        manifest: The site's slides. bags: The folder of their bags.

    Raises:
        BagError: Another process writes there (BAGS_BUSY), or the disk is full (BAG_NOT_WRITTEN).
        EncoderError: The site's encoder cannot be loaded, or is not the task's (ENCODER_MISMATCH).
    """
    wanted: dict[str, Any] = {"mpp": task.mpp, "patch_px": task.patch_px}
    parameters = MosaicParameters(**{name: value for name, value in wanted.items() if value is not None})
    progress = _Progress(site, len(manifest.rows), say)
    with _all_threads():
        report = prepare(
            manifest,
            bags,
            _TaskEncoder(task, configuration, say),
            parameters,
            on_row=progress.row,
            on_patches=progress.patches,
        )
    counts = (f"{report.count('made')} made", f"{report.count('kept')} up to date")
    say(f"{site}: bags: {', '.join(counts)}, {len(report.left_out)} left out, {report.seconds:.0f} s")


class _TaskEncoder:
    """The task's encoder, loaded when the first patch is to be encoded."""

    def __init__(self, task: BagTask, configuration: SiteConfiguration, say: Say) -> None:
        self.id = task.encoder
        self.features = task.features
        self._configuration = configuration
        self._probe_px = task.patch_px or MosaicParameters().patch_px
        self._say = say
        self._loaded: Encoder | None = None

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What the loaded encoder does to a patch; None before the first one."""
        return None if self._loaded is None else self._loaded.preprocessing

    def encode(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the features of ``patches``; :class:`EncoderError` if the site has another encoder."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded.encode(patches)

    def _load(self) -> Encoder:
        self._say(f"loading encoder {self.id}")
        weights, sha256 = self._configuration.encoder_weights, self._configuration.encoder_sha256
        device = self._configuration.device
        try:
            encoder = load_encoder_of(self.id, weights, sha256, device, self._probe_px)
        except EncoderError as error:
            if error.reason != "ENCODER_MISMATCH":
                raise
            raise EncoderError(
                f"This site's encoder (encoder_weights in its file) is not the job's: {error}.",
                reason=error.reason,
            ) from None
        if encoder.features != self.features:
            raise EncoderError(
                f"This site's encoder {encoder.id} gives {encoder.features} features, the job's has "
                f"{self.features}.",
                reason="ENCODER_MISMATCH",
            )
        return encoder


class _Progress:
    """Reports progress at intervals, and each slide that is left out at once."""

    def __init__(self, site: str, total: int, say: Say) -> None:
        self._site = site
        self._total = total
        self._say = say
        self._done = 0
        self._encoded: list[float] = []
        self._last = time.monotonic()

    def row(self, result: RowResult) -> None:
        """Count a slide."""
        self._done += 1
        if result.status != "kept":
            self._encoded.append(result.seconds)
        if result.status in ("skipped", "failed"):
            self._say(f"{self._site}: {result.slide} left out: {result.message}")
        self._now_and_then(f"{self._done} of {self._total} slides")

    def patches(self, row: ManifestRow, done: int, total: int) -> None:
        """Note patches of the slide that is being encoded."""
        self._now_and_then(f"slide {self._done + 1} of {self._total}, patch {done} of {total}")

    def _now_and_then(self, where: str) -> None:
        now = time.monotonic()
        if now - self._last < PROGRESS_SECONDS and self._done < self._total:
            return
        self._last = now
        left = ""
        if self._encoded and self._done < self._total:
            seconds = sum(self._encoded) / len(self._encoded) * (self._total - self._done)
            left = (
                f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"
            )
        self._say(f"{self._site}: preparing bags: {where}{left}")


@contextmanager
def _all_threads() -> Iterator[None]:
    """Give torch every processor: training takes one, encoding gains by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)

"""Slides to bags: for every row of a manifest its mosaic, encoded, in one file.

While a slide's patches are encoded the next ones are read, and the next slide's mosaic is built. Memory holds
one slide's features and a few batches of patches, however many slides there are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histoflare.bags.bag import BAG_VERSION, Bag, BagHeader, read_bag, read_header_and_count
from histoflare.bags.folder import (
    PrepareReport,
    RowResult,
    bag_path,
    save_bag,
    save_left_out,
    strangers,
    writing_to,
)
from histoflare.bags.network_encoder import Encoder
from histoflare.bags.patches import MosaicPatchDataset, iterate_batches
from histoflare.errors import BagError, EncoderError, SlideError
from histoflare.slides.files import SlideFingerprint, fingerprint, fingerprint_if_same
from histoflare.slides.left_out import say_left_out
from histoflare.slides.manifest import Manifest, ManifestRow
from histoflare.slides.mosaic import Mosaic, MosaicParameters, build_mosaic
from histoflare.slides.reader import Slide, open_with_default
from histoflare.slides.resolution import check_given_mpp

# Pixels of a batch of patches in memory (3 bytes each), and patches at most.
BATCH_PX = 1 << 23
BATCH_PATCHES = 64


@dataclass(frozen=True)
class Planned:
    """An open slide, what it is, and its mosaic."""

    slide: Slide
    fingerprint: SlideFingerprint
    mosaic: Mosaic
    seconds: float


@dataclass(frozen=True)
class Preparation:
    """What every row of one run has in common."""

    manifest: Manifest
    folder: Path
    encoder: Encoder
    parameters: MosaicParameters
    workers: int
    default_mpp: float | None
    on_patches: Callable[[ManifestRow, int, int], None]


def prepare(
    manifest: Manifest,
    out_dir: Path,
    encoder: Encoder,
    parameters: MosaicParameters,
    workers: int | None = None,
    *,
    default_mpp: float | None = None,
    on_row: Callable[[RowResult], None] = lambda _: None,
    on_patches: Callable[[ManifestRow, int, int], None] = lambda *_: None,
) -> PrepareReport:
    """Make the bags of ``manifest`` that are missing or out of date.

    A bag is up to date if it was made of the same slide (same size and time of change, else same SHA-256),
    at the same given mpp, with the same mosaic parameters and encoder. A slide that cannot be used costs no
    other; the report names it.

    Args:
        manifest: The slides.
        out_dir: Gets ``<row id>.h5`` for each row.
        encoder: Makes the features.
        parameters: Of the mosaics.
        workers: Threads that read patches; by default one a processor.
        default_mpp: Resolution of level 0 in µm/px for slides without one in the manifest that state none,
            or one that cannot be taken.
        on_row: Called after each row.
        on_patches: Called with (row, patches done, patches in all) after each batch.

    Raises:
        SlideError: ``default_mpp`` is no resolution (SLIDE_MPP_INVALID).
        BagError: Another process writes there (BAGS_BUSY), or the disk is full (BAG_NOT_WRITTEN).
        EncoderError: The encoder does not take these patches.
    """
    check_given_mpp(default_mpp, "--mpp")
    started = time.monotonic()
    run = Preparation(
        manifest,
        out_dir,
        encoder,
        parameters,
        workers or len(os.sched_getaffinity(0)),
        default_mpp,
        on_patches,
    )
    results = []
    with writing_to(out_dir), _planned_ahead(run) as plans:
        for row, plan in zip(manifest.rows, plans, strict=True):
            result = plan if isinstance(plan, RowResult) else _make(run, row, plan)
            results.append(result)
            on_row(result)
        save_left_out(out_dir, results)
    unknown = strangers(out_dir, (result.row_id for result in results))
    return PrepareReport(encoder.id, tuple(results), unknown, time.monotonic() - started)


@contextmanager
def _planned_ahead(run: Preparation) -> Iterator[Iterator[Planned | RowResult]]:
    """Yield an iterator over the rows' plans, worked out one row ahead; close what was opened in vain."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="mosaic")
    upcoming: list[Future[Planned | RowResult]] = []

    def plans() -> Iterator[Planned | RowResult]:
        for row in run.manifest.rows:
            upcoming.append(pool.submit(_plan, run, row))
            if len(upcoming) > 1:  # one is being encoded, one planned
                yield first()
        while upcoming:
            yield first()

    def first() -> Planned | RowResult:
        plan = upcoming[0].result()
        del upcoming[0]
        return plan

    try:
        yield plans()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for future in upcoming:
            if not future.cancelled() and future.exception() is None:
                plan = future.result()
                if isinstance(plan, Planned):
                    plan.slide.close()


def _plan(run: Preparation, row: ManifestRow) -> Planned | RowResult:
    """Return the row's open slide and mosaic, or what became of the row if there is nothing to encode."""
    started = time.monotonic()
    try:
        patches = _patches_up_to_date(run, row)
        if patches is not None:
            return _result(run, row, "kept", started, patches=patches)
        identity = fingerprint(row.slide)
        slide = open_with_default(row.slide, row.mpp, run.default_mpp)
        try:
            mosaic = build_mosaic(slide, run.parameters, threads=run.workers)
            if not mosaic.chosen:
                raise SlideError(f"{row.slide}: the mosaic has no patches", reason="BAG_EMPTY")
        except BaseException:
            slide.close()
            raise
    except BagError:
        raise
    except Exception as error:
        return _left_out(run, row, started, error)
    return Planned(slide, identity, mosaic, time.monotonic() - started)


def _make(run: Preparation, row: ManifestRow, plan: Planned) -> RowResult:
    """Encode the mosaic and write its bag."""
    started = time.monotonic() - plan.seconds
    try:
        with plan.slide:
            features = _encode(run, row, plan)
    except EncoderError as error:
        if error.reason != "ENCODER_NOT_FINITE":  # one odd slide may cause that, the others not
            raise
        return _left_out(run, row, started, error)
    except Exception as error:
        return _left_out(run, row, started, error)
    l0_coords = np.array([(patch.l0_x_px, patch.l0_y_px) for patch in plan.mosaic.patches], dtype=np.int64)
    header = BagHeader(
        version=BAG_VERSION,
        slide_sha256=plan.fingerprint.sha256,
        slide_size_bytes=plan.fingerprint.size_bytes,
        slide_mtime_ns=plan.fingerprint.mtime_ns,
        mosaic=run.parameters.to_json(),
        encoder=run.encoder.id,
        features=run.encoder.features,
        preprocessing=None if run.encoder.preprocessing is None else run.encoder.preprocessing.to_json(),
        given_mpp=plan.slide.mpp if plan.slide.info.mpp_source == "given" else None,
        patch_mpp=run.parameters.mpp,
        patch_px=run.parameters.patch_px,
        l0_patch_px=plan.mosaic.l0_patch_px,
    )
    save_bag(bag_path(run.folder, run.manifest.row_id(row)), Bag(header, features, l0_coords))
    return _result(run, row, "made", started, patches=len(features))


def _encode(run: Preparation, row: ManifestRow, plan: Planned) -> NDArray[np.float32]:
    """Return the features (n, f) of the mosaic's patches."""
    dataset = MosaicPatchDataset(plan.slide, plan.mosaic)
    features = np.empty((len(dataset), run.encoder.features), dtype=np.float32)
    batch_size = max(1, min(BATCH_PATCHES, BATCH_PX // run.parameters.patch_px**2))
    done = 0
    with closing(iterate_batches(dataset, batch_size, run.workers)) as batches:
        for patches in batches:
            features[done : done + len(patches)] = run.encoder.encode(patches).numpy()
            done += len(patches)
            run.on_patches(row, done, len(dataset))
    return features


def _patches_up_to_date(run: Preparation, row: ManifestRow) -> int | None:
    """Return the number of patches of the row's bag if it need not be made, else None."""
    path = bag_path(run.folder, run.manifest.row_id(row))
    try:
        header, patches = read_header_and_count(path)
    except BagError:
        return None
    if (header.mosaic, header.encoder) != (run.parameters.to_json(), run.encoder.id):
        return None
    # None: the slide's own was used, which the same file still has.
    if header.given_mpp not in ([None, run.default_mpp] if row.mpp is None else [row.mpp]):
        return None
    if header.slide_sha256 is None:  # a bag that was made without a slide
        return None
    known = SlideFingerprint(header.slide_sha256, header.slide_size_bytes, header.slide_mtime_ns)
    same = fingerprint_if_same(row.slide, known)
    if same is None:
        return None
    if same != known:
        try:
            bag = read_bag(path)
        except BagError:
            return None
        # A copied or touched slide: note its new time, so that the next run need not hash it again.
        save_bag(path, replace(bag, header=replace(header, slide_mtime_ns=same.mtime_ns)))
    return patches


def _left_out(run: Preparation, row: ManifestRow, started: float, error: Exception) -> RowResult:
    """Return the result of a row that ``error`` left without a bag."""
    status, reason, message = say_left_out(row.slide, error)
    if bag_path(run.folder, run.manifest.row_id(row)).exists():
        message += " Its earlier bag was left as it is."
    return _result(run, row, status, started, reason=reason, message=message)


def _result(
    run: Preparation,
    row: ManifestRow,
    status: str,
    started: float,
    *,
    patches: int = 0,
    reason: str = "",
    message: str = "",
) -> RowResult:
    return RowResult(
        run.manifest.row_id(row),
        row.line,
        row.written or str(row.slide),
        status,  # type: ignore[arg-type]
        patches,
        time.monotonic() - started,
        reason,
        message,
    )

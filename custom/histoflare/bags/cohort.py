"""A cohort: a site's bags with their labels, patients and splits, checked as a whole before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from histoflare.bags.bag import BagHeader, read_bag, read_header_and_count, read_rows
from histoflare.bags.folder import bag_path, read_left_out
from histoflare.bags.targets.target import Target
from histoflare.errors import BagError
from histoflare.slides.cohort import SplitCohort, fingerprint, list_problems, pool
from histoflare.slides.manifest import SUBGROUPS, Manifest, ManifestRow, assign_splits, role_warnings
from histoflare.slides.resolution import SAME_MPP
from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule

CACHE_BYTES = 1 << 30

ONE_FILE = (".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif")
"""Suffixes of slides that are one file, whose size is known at no cost."""


@dataclass(frozen=True)
class BagRecord:
    """One slide's bag of ``patches``.

    ``label`` is the value that the target makes of the manifest's label (of classes the index), ``split`` is
    train, validation or test. ``l0_mpp`` is the slide's own resolution in µm/px, where the bag says it.
    """

    slide_id: str
    patient: str
    label: Any
    split: str
    path: Path
    subgroups: Mapping[str, str] = field(default_factory=dict)
    content_sha256: str = ""
    patches: int = 0
    size_bytes: int = 0
    l0_mpp: float | None = None


@dataclass
class FeatureCache:
    """Features that were read, up to ``limit_bytes`` of them; what does not fit is read again each time.

    Of a bag for which there is no room, only the rows that are asked for are read.
    """

    limit_bytes: int
    held: dict[Path, torch.Tensor] = field(default_factory=dict)
    held_bytes: int = 0

    def read(self, record: BagRecord, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Return the record's bag, or ``rows`` of it; it must be the one the cohort was loaded with."""
        if record.path not in self.held and rows is not None and not self._has_room(record.size_bytes):
            header, found = read_rows(record.path, rows)
            _check_same(record, header)
            return torch.from_numpy(found)  # (len(rows), f)
        features = self._whole(record)
        return features if rows is None else features[list(rows)]

    def _whole(self, record: BagRecord) -> torch.Tensor:
        if record.path in self.held:
            return self.held[record.path]
        bag = read_bag(record.path)
        _check_same(record, bag.header)
        features = torch.from_numpy(bag.features)  # (n, f)
        if self._has_room(features.nbytes):
            self.held[record.path] = features
            self.held_bytes += features.nbytes
        return features

    def _has_room(self, size_bytes: int) -> bool:
        return self.held_bytes + size_bytes <= self.limit_bytes


def _check_same(record: BagRecord, header: BagHeader) -> None:
    if record.content_sha256 not in ("", header.content_sha256):
        raise BagError(
            f"{record.path}: the bag was changed while it was in use; start again", reason="BAG_CHANGED"
        )


@dataclass(frozen=True)
class Cohort(SplitCohort[BagRecord]):
    """The bags of one site (or of several, pooled), in the order of their slide ids.

    Attributes:
        name: The site.
        labels: Names of what a model on them tells.
        encoder: Id of the encoder of every bag.
        records: The bags.
        warnings: What is odd but not wrong, for the site's own eyes.
        left_out: How many patients it is without, as they have no budget left.
    """

    name: str
    labels: tuple[str, ...]
    encoder: str
    records: tuple[BagRecord, ...]
    warnings: tuple[str, ...] = ()
    cache: FeatureCache = field(default_factory=lambda: FeatureCache(CACHE_BYTES), repr=False, compare=False)
    left_out: int = 0

    def features(self, record: BagRecord, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Return the features float32 (n, f) of the record's bag, or ``rows`` of them; do not write to them.

        Raises:
            BagError: The bag is gone, damaged or was changed since the cohort was loaded.
        """
        return self.cache.read(record, rows)

    def read_ahead(self) -> None:
        """Read every training bag once, whole: what is wrong is known then, and what fits stays in memory.

        From then on, a step that takes some rows of a bag takes no longer because the bag is long.

        Raises:
            BagError: A bag is gone, damaged or was changed since the cohort was loaded.
        """
        for record in self.train:
            self.features(record)

    def read_all(self) -> None:
        """Read every bag again from its disk, and keep nothing of it in memory.

        Raises:
            BagError: A bag is gone, damaged or was changed since the cohort was loaded.
        """
        for record in self.records:
            _check_same(record, read_bag(record.path).header)

    def fingerprint(self) -> str:
        """Return a SHA-256 that changes when a bag, a label, a split or the grouping by patient does.

        Patients enter by their order of appearance and not by name.
        """
        return fingerprint([self.labels, self.encoder], self.records, lambda record: record.label)


def load_cohort(
    name: str,
    manifest: Manifest,
    bags_dir: Path,
    target: Target,
    encoder: str | None,
    mpp: float | None = None,
    patch_px: int | None = None,
    *,
    features: int | None = None,
    split: SplitRule = DEFAULT_SPLIT,
    refuse_changed_slides: bool = True,
    cache_bytes: int = CACHE_BYTES,
) -> Cohort:
    """Return the cohort of ``manifest``, every bag's header checked; features are read when asked for.

    Slides that ``histoflare prepare`` said it had to leave out, because there is nothing on them or they are
    damaged, are left out here too, with a warning; a bag that is missing without its word is a problem.
    A manifest without a split column is split by :func:`assign_splits`; one without training rows (an
    external cohort) can be tested on only.

    Args:
        name: The site's name.
        manifest: Its rows.
        bags_dir: Where their bags are.
        target: The job's, which reads the manifest's labels.
        encoder: Id the bags must have; None takes any, but the same for all.
        mpp, patch_px: Resolution and side the patches must have; None takes any. Imported features that do
            not say theirs are taken with a warning.
        features: Numbers a patch that the bags must have; None takes any.
        split: The job's rule, for a manifest without a split column.
        refuse_changed_slides: Whether a bag that was made of a slide file of another size is a fault, or a
            warning: for pages on a run that is over.
        cache_bytes: Features kept in memory.

    Raises:
        BagError: Something is wrong (COHORT_INVALID); everything that is, is in its text.

    >>> from pathlib import Path
    >>> from histoflare import TARGETS, load_cohort, read_manifest
    >>> manifest = read_manifest(Path("clinic-a/manifest.csv"), check_files=False)
    >>> target = TARGETS["classes"](labels=("glandular", "solid"))
    >>> cohort = load_cohort("clinic-a", manifest, Path("clinic-a/bags"), target, encoder=None)
    >>> cohort.features(cohort.train[0]).shape[1]
    1024
    """
    manifest = assign_splits(manifest, split)
    findings = _Findings([], [])
    found = _collect(manifest, bags_dir, target, findings, refuse_changed_slides)
    common = encoder or (found[0][1].encoder if found else "")
    findings.problems.extend(_by_bag(found, lambda header: _misfits(header, common, mpp, patch_px, features)))
    findings.problems.extend(_mixed(found))
    findings.warnings.extend(_by_bag(found, lambda header: _unsaid(header, mpp, patch_px)))
    if findings.problems:
        raise BagError(
            f"{name}: the bags in {bags_dir} do not fit the manifest and the job:"
            + list_problems(findings.problems),
            reason="COHORT_INVALID",
        )
    records = tuple(record for record, _ in found)
    return Cohort(name, target.labels, common, records, tuple(findings.warnings), FeatureCache(cache_bytes))


def pooled(cohorts: Sequence[Cohort], name: str = "pooled") -> Cohort:
    """Return all bags of ``cohorts`` as one cohort, for the pooled bound; a federation never does that.

    Slides and patients get their site's name in front, so equal names of two sites stay apart.

    Raises:
        BagError: There are none, two have one name, or labels or encoders differ (COHORT_INVALID).
    """
    contracts = {(cohort.labels, cohort.encoder) for cohort in cohorts}
    if len(contracts) != 1 or len({cohort.name for cohort in cohorts}) != len(cohorts):
        raise BagError(
            "cohorts can be pooled if there is one at least, each has its own name, and all have the same "
            "labels and encoder",
            reason="COHORT_INVALID",
        )
    ((labels, encoder),) = contracts
    records, warnings = pool(cohorts)
    limit = max(cohort.cache.limit_bytes for cohort in cohorts)
    return Cohort(name, labels, encoder, records, warnings, FeatureCache(limit))


@dataclass(frozen=True)
class _Findings:
    """What is wrong, and what is odd."""

    problems: list[str]
    warnings: list[str]


def _collect(
    manifest: Manifest,
    bags_dir: Path,
    target: Target,
    findings: _Findings,
    refuse_changed_slides: bool,
) -> list[tuple[BagRecord, BagHeader]]:
    """Return the record and header of every row that has a usable bag, by slide id."""
    left_out = read_left_out(bags_dir)
    found = []
    counted: list[ManifestRow] = []
    for row in sorted(manifest.rows, key=manifest.row_id):
        row_id = manifest.row_id(row)
        where = f"line {row.line} ({row.written or row.slide})"
        path = bag_path(bags_dir, row_id)
        note = left_out.get(row_id, {})
        if not path.is_file() and note:
            findings.warnings.append(f"{where}: left out, 'prepare' could not use it ({note.get('reason')})")
            continue
        counted.append(row)
        try:
            label = target.value_of(row.label)
            header, patches = read_header_and_count(path)
        except BagError as error:
            findings.problems.append(f"{where}: {error}")
            continue
        if patches == 0:
            findings.problems.append(f"{where}: its bag has no patches; take the row out of the manifest")
            continue
        if _is_of_another_file(row.slide, header):
            stale = (
                f"{where}: its bag was made of a file of another size (bags of another run?): prepare again"
            )
            if refuse_changed_slides:
                findings.problems.append(stale)
                continue
            findings.warnings.append(stale)
        subgroups = {name: value for name in SUBGROUPS if (value := getattr(row, name)) is not None}
        record = BagRecord(
            row_id,
            row.patient,
            label,
            str(row.split),
            path,
            subgroups,
            header.content_sha256,
            patches,
            4 * patches * header.features,
            _l0_mpp(header),
        )
        found.append((record, header))
    _check_splits(counted, target.manifest_labels or (), findings)
    return found


def _l0_mpp(header: BagHeader) -> float | None:
    """Return a slide's own resolution in µm/px: as the manifest gave it, or as its patches lie on it."""
    if header.given_mpp is not None:
        return header.given_mpp
    if not (header.patch_mpp and header.patch_px and header.l0_patch_px):
        return None
    return header.patch_mpp * header.patch_px / header.l0_patch_px


def _is_of_another_file(slide: Path, header: BagHeader) -> bool:
    """Return whether a bag cannot be of the slide; one that is gone, or is several files, says nothing."""
    if not header.slide_size_bytes or slide.suffix.lower() not in ONE_FILE:
        return False
    try:
        return slide.stat().st_size != header.slide_size_bytes
    except OSError:
        return False


def _by_bag(
    found: Sequence[tuple[BagRecord, BagHeader]], look: Callable[[BagHeader], Iterable[str]]
) -> list[str]:
    """Return what ``look`` says of the headers, each thing once, with the first bag that it is true of."""
    bags: dict[str, list[str]] = {}
    for record, header in found:
        for text in look(header):
            bags.setdefault(text, []).append(record.path.name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {text}"
        for text, names in bags.items()
    ]


def _misfits(
    header: BagHeader, encoder: str, mpp: float | None, patch_px: int | None, features: int | None
) -> Iterator[str]:
    """Yield in what a bag differs from the job, and which setting of the job says so."""
    if header.encoder != encoder:
        yield (
            f"made by encoder {header.encoder}, the job's is {encoder} (protocol.encoder): prepare with that "
            "one, or make the job for these"
        )
    elif features is not None and header.features != features:
        yield (
            f"{header.features} features a patch, the job's have {features} (task.features): make the job "
            f"for these with --set task.features={header.features}, or bring bags of that width"
        )
    if mpp is not None and header.patch_mpp is not None and abs(header.patch_mpp - mpp) > SAME_MPP * mpp:
        yield (
            f"patches at {header.patch_mpp:g} µm/px, the job's are at {mpp:g} (protocol.mpp): prepare again, "
            "or make the job for these, or for any resolution (--set protocol.mpp=null)"
        )
    if patch_px is not None and header.patch_px not in (None, patch_px):
        yield (
            f"patches of {header.patch_px} px, the job's have {patch_px} (protocol.patch_px): prepare again, "
            "or make the job for these"
        )


def _unsaid(header: BagHeader, mpp: float | None, patch_px: int | None) -> Iterator[str]:
    """Yield what a bag does not say and the job asks for."""
    if (mpp is not None and header.patch_mpp is None) or (patch_px is not None and header.patch_px is None):
        yield "imported features that do not say the size or resolution of their patches"


def _mixed(found: Sequence[tuple[BagRecord, BagHeader]]) -> list[str]:
    """Return a problem if bags were made with different settings: a manifest half prepared again."""
    if len({header.features for _, header in found}) > 1:
        return ["the bags have different numbers of features a patch: prepare or import all of them again"]
    # A bag that was not cut from a slide (imported, generated) has no mosaic to differ in.
    mosaics = {json.dumps(header.mosaic, sort_keys=True) for _, header in found if header.mosaic is not None}
    if len(mosaics) > 1:
        return [
            "the bags were made with different mosaic parameters: run 'histoflare prepare' on all of them"
        ]
    return []


def _check_splits(rows: Sequence[ManifestRow], labels: Sequence[str], findings: _Findings) -> None:
    if not rows:
        findings.problems.append("there is nothing on any slide of the manifest to make a bag of")
    findings.warnings.extend(role_warnings(rows, labels))

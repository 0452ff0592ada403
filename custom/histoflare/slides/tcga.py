"""Manifests for the hospitals of The Cancer Genome Atlas, from the names of its slides.

A slide is called ``TCGA-<TSS>-<patient>-<sample>-<portion>-<section>.<UUID>.svs``. The tissue source site
(TSS) names the hospital and, for lung, the sub-type too: a hospital has one code for adenocarcinoma (LUAD)
and another for squamous cell carcinoma (LUSC). Hospitals, and which of them are external, follow Adnan et al.
2022 (Scientific Reports 12:1953).
"""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from histoflare.errors import ManifestError
from histoflare.slides.manifest import Manifest, ManifestRow, stratify_splits, write_manifest

LABELS = ("LUAD", "LUSC")
TUMOUR_SAMPLES = ("01", "02")
NORMAL_SAMPLE = "11"
FROZEN_SECTIONS = ("TS", "BS", "MS")

NAME = re.compile(
    r"TCGA-(?P<site>[A-Z0-9]{2})-(?P<patient>[A-Z0-9]{4})-(?P<sample>\d{2})[A-Z]?"
    r"-\d{2}[A-Z]?-(?P<section>[A-Z]{2})\w*\.",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Hospital:
    """A tissue source: its codes by label; ``external`` ones take no part in training.

    ``published`` is how many images of each label Adnan et al. 2022 had of it (Table 2).
    """

    name: str
    codes: dict[str, str]
    published: dict[str, int]
    external: bool = False

    @property
    def file_name(self) -> str:
        """The manifest's name, e.g. ``johns-hopkins.csv``, below ``external/`` for an external hospital."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower())
        return f"external/{slug}.csv" if self.external else f"{slug}.csv"


HOSPITALS = (
    Hospital("International Genomics Consortium", {"55": "LUAD", "56": "LUSC"}, {"LUAD": 189, "LUSC": 78}),
    Hospital("Indivumed", {"05": "LUAD", "66": "LUSC"}, {"LUAD": 94, "LUSC": 117}),
    Hospital("Asterand", {"86": "LUAD", "85": "LUSC"}, {"LUAD": 90, "LUSC": 117}),
    Hospital("Johns Hopkins", {"49": "LUAD", "33": "LUSC"}, {"LUAD": 121, "LUSC": 78}),
    Hospital("Christiana Healthcare", {"44": "LUAD", "43": "LUSC"}, {"LUAD": 169, "LUSC": 54}, external=True),
    Hospital("Roswell Park", {"73": "LUAD", "60": "LUSC"}, {"LUAD": 35, "LUSC": 75}, external=True),
    Hospital("Princess Margaret", {"18": "LUSC"}, {"LUAD": 0, "LUSC": 52}, external=True),
)

HOSPITAL_OF_CODE = {code: hospital for hospital in HOSPITALS for code in hospital.codes}


@dataclass(frozen=True)
class Barcode:
    """What the name of a slide says: ``site`` (TSS code, a string: "05"), patient, sample, section."""

    site: str
    patient: str
    sample: str
    section: str

    @property
    def frozen(self) -> bool:
        """Whether it is a frozen section (top, bottom, middle) rather than a diagnostic one (DX, FFPE)."""
        return self.section in FROZEN_SECTIONS


@dataclass(frozen=True)
class TcgaResult:
    """What was written and what was not.

    Attributes:
        manifests: Those written, by hospital.
        left_out: Reason → how many slides.
        missing: Slides that are not there.
        counts: What the GDC manifest has of each hospital, and Table 2 of the paper (:class:`SlideCounts`).
    """

    manifests: dict[str, Manifest]
    left_out: dict[str, int]
    missing: tuple[str, ...]
    counts: dict[str, SlideCounts]


@dataclass(frozen=True)
class SlideCounts:
    """Label → number of tumour slides of a hospital, downloaded or not.

    Attributes:
        published: In Adnan et al. 2022, Table 2, which does not say what sections they are.
        diagnostic: Here, in paraffin (DX). frozen: Here, frozen (TS, BS, MS).
    """

    published: dict[str, int]
    diagnostic: dict[str, int]
    frozen: dict[str, int]


@dataclass(frozen=True)
class _Entry:
    line: int
    id: str
    filename: str
    size_bytes: int | None


def parse_barcode(filename: str) -> Barcode | None:
    """Return what the slide's name says, None if it is not the name of a TCGA slide."""
    match = NAME.match(filename)
    if match is None:
        return None
    site, patient, sample, section = (part.upper() for part in match.groups())
    return Barcode(site, f"TCGA-{site}-{patient}", sample, section)


def write_tcga_manifests(
    gdc_manifest: Path,
    slides: Path,
    out: Path,
    *,
    frozen: bool = False,
    test_fraction: float = 0.2,
    seed: int = 0,
    allow_missing: bool = False,
) -> TcgaResult:
    """Write one manifest per hospital below ``out``; patients of external hospitals are all for testing.

    Args:
        gdc_manifest: What the GDC portal gives for a cart of slides (TSV: id, filename, md5, size, state).
        slides: Folder into which they were downloaded, as ``<id>/<filename>`` or flat.
        out: Folder to write to; external hospitals' manifests go to ``external/`` in it.
        frozen: Take frozen sections too, and not only the diagnostic ones.
        test_fraction: Share of each hospital's patients, of each label, that are for testing.
        seed: Decides which patients those are.
        allow_missing: Leave out slides that are not (wholly) there, instead of refusing.

    Raises:
        ManifestError: The GDC manifest is wrong, a slide of it is missing or cut short (all are named), or
            none of its slides is of one of the hospitals. Nothing is written then.
    """
    rows: dict[str, list[ManifestRow]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    missing: list[str] = []
    seen: Counter[tuple[str, bool]] = Counter()
    for entry in _read_gdc(gdc_manifest):
        barcode = parse_barcode(entry.filename)
        if barcode is not None and not _why_left_out(barcode, frozen=True):
            seen[barcode.site, barcode.frozen] += 1
        reason = _why_left_out(barcode, frozen)
        if barcode is None or reason:
            left_out[reason] += 1
            continue
        file, fault = _find_slide(slides, entry)
        if fault:
            missing.append(f"line {entry.line}: {fault}")
            continue
        hospital = HOSPITAL_OF_CODE[barcode.site]
        label = hospital.codes[barcode.site]
        row = ManifestRow(entry.line, file, barcode.patient, label, site=hospital.name)
        rows[hospital.name].append(replace(row, split="test") if hospital.external else row)
    if missing and not allow_missing:
        raise ManifestError(
            f"{gdc_manifest}: {len(missing)} of its slides are not whole in {slides}. Download them, or "
            "leave them out with --allow-missing.",
            problems=missing,
        )
    if not rows:
        reasons = "; ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        raise ManifestError(
            f"{gdc_manifest}: no slide of a known hospital is left ({reasons or 'all missing'})."
        )
    manifests = {}
    for hospital in HOSPITALS:
        if hospital.name in rows:
            path = out / hospital.file_name
            unsplit = Manifest(path, tuple(sorted(rows[hospital.name], key=lambda row: row.slide.name)))
            manifests[hospital.name] = write_manifest(
                path, stratify_splits(unsplit, test_fraction, seed).rows
            )
    return TcgaResult(manifests, dict(left_out), tuple(missing), _count(seen))


def _count(seen: Mapping[tuple[str, bool], int]) -> dict[str, SlideCounts]:
    """Return the counts of each hospital from those of (site code, whether frozen)."""

    def of(hospital: Hospital, frozen: bool) -> dict[str, int]:
        code_of = {label: code for code, label in hospital.codes.items()}
        return {label: seen.get((code_of.get(label, ""), frozen), 0) for label in LABELS}

    return {each.name: SlideCounts(each.published, of(each, False), of(each, True)) for each in HOSPITALS}


def _why_left_out(barcode: Barcode | None, frozen: bool) -> str:
    """Return why a slide is not for a manifest, empty if it is."""
    if barcode is None:
        return "not named as a TCGA slide"
    if barcode.site not in HOSPITAL_OF_CODE:
        return f"of another tissue source site ({barcode.site})"
    if barcode.sample == NORMAL_SAMPLE:
        return "normal tissue (sample 11)"
    if barcode.sample not in TUMOUR_SAMPLES:
        return f"neither primary nor recurrent tumour (sample {barcode.sample})"
    if barcode.section != "DX" and not barcode.frozen:
        return f"of an unknown section ({barcode.section})"
    return "frozen sections (--frozen takes them)" if barcode.frozen and not frozen else ""


def _read_gdc(path: Path) -> Iterator[_Entry]:
    """Yield the rows of a GDC manifest."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read ({error}).", reason="MANIFEST_UNREADABLE") from error
    header = [name.strip() for name in lines[0].split("\t")] if lines else []
    if "id" not in header or "filename" not in header:
        raise ManifestError(
            f"{path}: not a GDC manifest (tab-separated, with id, filename, md5, size, state). Download it "
            "from the cart of the GDC portal.",
            reason="MANIFEST_UNREADABLE",
        )
    problems: list[str] = []
    entries: dict[str, _Entry] = {}
    reader = csv.DictReader(lines, header, delimiter="\t", quoting=csv.QUOTE_NONE)
    next(reader)
    for row in reader:
        line = reader.line_num
        identifier, filename = (row["id"] or "").strip(), (row["filename"] or "").strip()
        size = (row.get("size") or "").strip()
        if not identifier or not filename:
            problems.append(f"line {line}: no id or no filename")
        elif Path(identifier).name != identifier or Path(filename).name != filename:
            problems.append(f"line {line}: id and filename may not be paths")
        elif size and not size.isdigit():
            problems.append(f"line {line}: size '{size}' is not a number of bytes")
        elif filename in entries:
            problems.append(f"line {line}: {filename} is already in line {entries[filename].line}")
        else:
            entries[filename] = _Entry(line, identifier, filename, int(size) if size else None)
    if problems:
        raise ManifestError(f"{path}: the GDC manifest is wrong; nothing was read.", problems=problems)
    yield from entries.values()


def _find_slide(folder: Path, entry: _Entry) -> tuple[Path, str]:
    """Return where the slide lies, and what is wrong with it (empty if nothing is)."""
    for file in (folder / entry.id / entry.filename, folder / entry.filename):
        if file.is_file():
            size = file.stat().st_size
            if entry.size_bytes is not None and size != entry.size_bytes:
                return file, f"{file} has {size} of {entry.size_bytes} bytes; download it again"
            return file, ""
    return folder / entry.filename, f"no {entry.filename}"

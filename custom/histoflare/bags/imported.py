"""Features that a site has already, from TRIDENT, CLAM or STAMP, become bags.

None of the three says which weights made its features, so the user names the encoder, and bags of differently
named encoders never meet in a cohort.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from histoflare.bags.bag import Bag, content_hash, read_header
from histoflare.bags.folder import PrepareReport, RowResult, bag_path, save_bag, save_left_out, writing_to
from histoflare.bags.toolkits import Kind, read_features, read_kind
from histoflare.errors import BagError, HistoflareError
from histoflare.slides.manifest import Manifest, ManifestRow


def import_features(
    h5_dir: Path,
    manifest: Manifest,
    out_dir: Path,
    encoder_name: str,
    *,
    on_row: Callable[[RowResult], None] = lambda _: None,
) -> PrepareReport:
    """Make bags of the HDF5 files below ``h5_dir``, one for each row of ``manifest``.

    A file belongs to the row whose slide has its stem. Most files decide what is imported: one with another
    number of features, or made by another encoder, is an error of its own and costs no other.

    Args:
        h5_dir: Searched with its sub-folders.
        manifest: The slides. Those without ``mpp`` in it are opened, for features in µm and of TRIDENT.
        out_dir: Gets ``<row id>.h5`` for each row.
        encoder_name: What the features were made with, e.g. ``uni2``; the bags' encoder is
            ``imported:<name>``.
        on_row: Called after each row.

    Raises:
        BagError: No HDF5 file there (FEATURES_MISSING), a name that is none (ENCODER_NAME), or the folder
            cannot be written (BAGS_BUSY, BAG_NOT_WRITTEN).
    """
    started = time.monotonic()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", encoder_name):
        raise BagError(
            f"'{encoder_name}' cannot name an encoder: use letters, digits and . _ + -, such as uni2",
            reason="ENCODER_NAME",
        )
    files = _files_by_stem(h5_dir, out_dir)
    if not files:
        raise BagError(
            f"{h5_dir}: no .h5 files there or below; name the folder TRIDENT, CLAM or STAMP wrote to",
            reason="FEATURES_MISSING",
        )
    of_row = {row.line: _files_of(row, files) for row in manifest.rows}
    kind = _common_kind(found[0] for found in of_row.values() if len(found) == 1)
    results = []
    with writing_to(out_dir):
        for row in manifest.rows:
            results.append(_import_row(row, of_row[row.line], manifest, out_dir, encoder_name, kind))
            on_row(results[-1])
        save_left_out(out_dir, results)
    used = {path for found in of_row.values() for path in found}
    unused = [path for found in files.values() for path in found if path not in used]
    unknown = sorted(str(path.relative_to(h5_dir)) for path in unused)
    return PrepareReport(
        f"imported:{encoder_name}", tuple(results), tuple(unknown), time.monotonic() - started
    )


def _files_by_stem(h5_dir: Path, out_dir: Path) -> dict[str, list[Path]]:
    files = defaultdict(list)
    for path in sorted(h5_dir.rglob("*.h5")):
        if out_dir not in path.parents:
            files[path.stem].append(path)
    return files


def _files_of(row: ManifestRow, files: Mapping[str, list[Path]]) -> list[Path]:
    # TRIDENT takes .ome.tif off as a whole, CLAM and STAMP only .tif
    stem = row.slide.stem
    return files.get(stem) or files.get(stem.removesuffix(".ome")) or []


def _common_kind(paths: Iterable[Path]) -> Kind | None:
    """Return the kind most files are of (the first such in a draw); None if no file can be read."""
    kinds: Counter[Kind] = Counter()
    for path in paths:
        try:
            kinds[read_kind(path)] += 1
        except BagError:
            continue  # it gets its own message when its row's turn comes
    return kinds.most_common(1)[0][0] if kinds else None


def _import_row(
    row: ManifestRow,
    found: list[Path],
    manifest: Manifest,
    out_dir: Path,
    encoder_name: str,
    kind: Kind | None,
) -> RowResult:
    started = time.monotonic()
    row_id = manifest.row_id(row)
    written = row.written or str(row.slide)

    def result(status: Any, patches: int = 0, reason: str = "", message: str = "") -> RowResult:
        seconds = time.monotonic() - started
        return RowResult(row_id, row.line, written, status, patches, seconds, reason, message)

    try:
        path = _one_file(row, found, manifest)
        bag = read_features(path, row, f"imported:{encoder_name}")
        found_kind = read_kind(path)
        if found_kind != kind:
            raise BagError(
                f"{path}: has {found_kind}, most files have {kind}; import each encoder's features into a "
                "folder of their own",
                reason="FEATURES_ENCODER",
            )
    except HistoflareError as error:
        return result("failed", 0, error.reason, str(error))
    target = bag_path(out_dir, row_id)
    if _is_there(target, bag):
        return result("kept", len(bag))
    save_bag(target, bag)
    return result("made", len(bag))


def _one_file(row: ManifestRow, found: list[Path], manifest: Manifest) -> Path:
    twins = [other for other in manifest.rows if other.slide.stem == row.slide.stem]
    if len(twins) > 1:
        raise BagError(
            f"{row.written}: {len(twins)} slides of the manifest are called {row.slide.stem}: it is not "
            "clear whose the features are; rename slides and features, or import them with a manifest each",
            reason="FEATURES_AMBIGUOUS",
        )
    if len(found) > 1:
        listed = ", ".join(str(path) for path in found[:3])
        raise BagError(
            f"{row.written}: {len(found)} files have its name ({listed}): name the folder of one encoder",
            reason="FEATURES_AMBIGUOUS",
        )
    if not found:
        raise BagError(
            f"{row.written}: no {row.slide.stem}.h5; make its features, or take the row out of the manifest",
            reason="FEATURES_MISSING",
        )
    return found[0]


def _is_there(target: Path, bag: Bag) -> bool:
    try:
        header = read_header(target)
    except BagError:
        return False
    content = content_hash(bag.features, bag.l0_coords)
    return header.to_json() == {**bag.header.to_json(), "content_sha256": content}

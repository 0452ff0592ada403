"""Bags under another manifest's names: links to where they lie, and no copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from histoflare.bags.folder import RowResult, Status, bag_path, read_left_out, save_left_out, writing_to
from histoflare.errors import BagError, list_lines
from histoflare.slides.manifest import Manifest


@dataclass(frozen=True)
class LyingBag:
    """Where the bag of a slide lies: ``folder``/``row_id``.h5, under the manifest it was made for."""

    folder: Path
    row_id: str

    @property
    def path(self) -> Path:
        """The bag's file."""
        return bag_path(self.folder, self.row_id)


def find_bags(manifests: Iterable[tuple[Manifest, Path]]) -> dict[Path, LyingBag]:
    """Return slide → its bag, for manifests and the folder that the bags of each were made into.

    Raises:
        BagError: A slide has no bag, and is not one that ``prepare`` had to leave out (BAG_MISSING).
    """
    found: dict[Path, LyingBag] = {}
    missing = []
    for manifest, folder in manifests:
        left_out = read_left_out(folder)
        for row in manifest.rows:
            bag = LyingBag(folder.resolve(), manifest.row_id(row))
            found[row.slide] = bag
            if not bag.path.is_file() and bag.row_id not in left_out:
                missing.append(f"{manifest.path}, line {row.line}: no {bag.path}")
    if missing:
        more = [f"… and {len(missing) - 10} more"] if len(missing) > 10 else []
        raise BagError(
            f"{len(missing)} slides have no bag; make them first ('histoflare prepare'):"
            f"{list_lines([*missing[:10], *more])}",
            reason="BAG_MISSING",
        )
    return found


def link_bags(manifest: Manifest, bags: Mapping[Path, LyingBag], out: Path) -> None:
    """Link the bags of ``manifest`` into the new folder ``out``, under its names; also what was left out.

    Raises:
        BagError: The folder cannot be written.
    """
    notes = []
    with writing_to(out):
        for row in manifest.rows:
            row_id, bag = manifest.row_id(row), bags[row.slide]
            if bag.path.is_file():
                bag_path(out, row_id).symlink_to(bag.path)
            else:
                note = read_left_out(bag.folder)[bag.row_id]
                status: Status = "failed" if note.get("status") == "failed" else "skipped"
                notes.append(RowResult(row_id, row.line, row.written, status, reason=note.get("reason", "")))
        save_left_out(out, notes)

"""``histoflare manifest partition``: deal the patients of what there is out to several sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.errors import JobError, ManifestError

if TYPE_CHECKING:
    from histoflare.masks.image_manifest import ImageManifest, ImageRow
    from histoflare.slides.manifest import Manifest, ManifestRow


def partition(
    manifests: Annotated[
        list[Path],
        typer.Argument(
            help="CSVs of slides, or of images with masks; or a folder with a manifest per site, as run has."
        ),
    ],
    sites: Annotated[int, typer.Option(min=1, help="Number of sites: hospital-1 and on.")],
    out: Annotated[Path, typer.Option(help="New folder; gets <site>/manifest.csv (or images.csv).")],
    non_iid: Annotated[
        bool,
        typer.Option(
            "--non-iid", help="Draw sites from random shares of each class; else deal evenly by class."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Decides who goes where, and who is for testing.")] = 0,
    test_fraction: Annotated[
        float, typer.Option(help="Share of each site's patients of each class for testing.")
    ] = 0.2,
    split: Annotated[
        bool,
        typer.Option(
            "--split/--no-split",
            help="Keep the split column, or write one where there is none; or write none: the job's protocol "
            "decides then (folds, 70:30).",
        ),
    ] = True,
    bags: Annotated[
        list[Path] | None,
        typer.Option(
            help="Bags made of a manifest, or of a folder of sites (prepare --sites); one for each, in "
            "order. They are linked, not copied."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Deal the patients of one collection out to N sites, as Adnan et al. 2022 do (experiment series 1).

    A patient's slides stay together. Images with masks have no class of their own and count as of one. A site
    with nobody to test or train on is named; nothing is moved to fill it up.

    Of a folder of sites, external cohorts stay out.

    Example: histoflare manifest partition all.csv --sites 8 --non-iid --bags bags --out eight

    Example: histoflare manifest partition my-sites --sites 8 --bags my-run/bags --out eight
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise JobError(
            f"{out}: there is something already, whose sites would be mixed with these: give a new one."
        )
    if bags and len(bags) != len(manifests):
        raise JobError(
            f"--bags: {len(bags)} folders for {len(manifests)} manifests; give one for each, in order."
        )
    manifests, bags = _in_folders(manifests, bags)
    options: dict[str, Any] = {
        "iid": not non_iid,
        "seed": seed,
        "test_fraction": test_fraction if split else None,
    }
    of_images = [_is_of_images(path) for path in manifests]
    if any(of_images) and (bags or not all(of_images)):
        raise JobError("Manifests of images with masks have no bags, and do not go with manifests of slides.")
    deal = _deal_images if any(of_images) else _deal_slides
    _show(deal(manifests, out, sites, bags or [], split, options), as_json)


def _in_folders(given: Sequence[Path], bags: Sequence[Path] | None) -> tuple[list[Path], list[Path] | None]:
    """Return the manifests, with those of a folder of sites in its place, and the folder of bags of each."""
    from histoflare.commands.console import say

    manifests: list[Path] = []
    folders: list[Path] = []
    for number, path in enumerate(given):
        if not path.is_dir():
            manifests.append(path)
            folders += [bags[number]] if bags else []
            continue
        from histoflare.lab.sites import find_sites  # FLARE: seconds
        from histoflare.site.kinds import BAGS, IMAGES

        of_images = any(path.glob(f"*/{IMAGES.manifest}"))
        found = find_sites(path, IMAGES if of_images else BAGS)
        if found.external:
            say(f"note: {', '.join(found.external)}: an external cohort stays out")
        manifests += found.sites.values()
        folders += [bags[number] / name for name in found.sites] if bags else []
    return manifests, folders or None


def _is_of_images(path: Path) -> bool:
    from histoflare.slides.table import read_header

    try:
        return "image" in read_header(path, ["image"])
    except ManifestError:
        return False  # whoever reads it as a manifest says what is wrong


def _deal_slides(
    manifests: Sequence[Path],
    out: Path,
    sites: int,
    bags: Sequence[Path],
    split: bool,
    options: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Write the manifests of slides, link their bags, and return what each site got."""
    from dataclasses import replace

    from histoflare.bags.links import find_bags, link_bags
    from histoflare.slides.manifest import label_of_patients, missing_roles, read_manifest, write_manifest
    from histoflare.slides.partition import partition

    read = [read_manifest(path, check_files=False) for path in manifests]
    _refuse_doubles([(one.path, row.line, row.slide) for one in read for row in one.rows])
    _say_shared([{row.patient for row in one.rows} for one in read])
    rows: list[ManifestRow] = [row for one in read for row in one.rows]
    if not split:
        rows = [replace(row, split=None) for row in rows]
    label_of = label_of_patients(rows)
    dealt = partition(_called(manifests), rows, label_of, sites, places=_places(read), **options)
    lying = find_bags(zip(read, bags, strict=True)) if bags else {}
    found = {}
    for site, own in dealt.items():
        labels = Counter(row.label for row in own)
        entry = _entry(own) | {"labels": dict(sorted(labels.items()))}
        there = {(row.split, row.label) for row in own}
        if own:
            written = write_manifest(out / site / "manifest.csv", own)
            entry["path"] = str(written.path)
            if lying:
                link_bags(written, lying, out / site / "bags")
        known = sorted(set(label_of.values()))
        if split:
            entry["warnings"] = missing_roles(there, known)
        else:
            entry["warnings"] = [f"no patient of class '{label}'" for label in known if label not in labels]
        found[site] = entry
    return found


def _deal_images(
    manifests: Sequence[Path],
    out: Path,
    sites: int,
    bags: Sequence[Path],
    split: bool,
    options: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Write the manifests of images, and return what each site got."""
    from dataclasses import replace

    from histoflare.masks.image_manifest import read_image_manifest, write_image_manifest
    from histoflare.slides.manifest import missing_roles
    from histoflare.slides.partition import partition

    read = [read_image_manifest(path) for path in manifests]
    _refuse_doubles([(one.path, row.line, row.image) for one in read for row in one.rows])
    _say_shared([{row.patient for row in one.rows} for one in read])
    rows: list[ImageRow] = [row for one in read for row in one.rows]
    if not split:
        rows = [replace(row, split=None) for row in rows]
    class_of = dict.fromkeys((row.patient for row in rows), "")
    dealt = partition(_called(manifests), rows, class_of, sites, places=_places(read), **options)
    found = {}
    for site, own in dealt.items():
        entry = _entry(own)
        if own:
            entry["path"] = str(write_image_manifest(out / site / "images.csv", own).path)
        entry["warnings"] = missing_roles({(row.split, "") for row in own}, ()) if split else []
        found[site] = entry
    return found


def _called(manifests: Sequence[Path]) -> Path | str:
    return manifests[0] if len(manifests) == 1 else "The manifests"


def _places(read: Sequence[Manifest] | Sequence[ImageManifest]) -> list[str] | None:
    """Return where each row stands, by file and line; None of one manifest, where the line says it."""
    if len(read) == 1:
        return None
    return [f"{one.path}, line {row.line}" for one in read for row in one.rows]


def _entry(rows: Sequence[ManifestRow] | Sequence[ImageRow]) -> dict[str, Any]:
    return {
        "path": None,
        "rows": len(rows),
        "patients": len({row.patient for row in rows}),
        "splits": dict(sorted(Counter(row.split or "none" for row in rows).items())),
    }


def _refuse_doubles(files: Sequence[tuple[Path, int, Path]]) -> None:
    """Refuse a slide that two manifests have: it would be at two sites, or train and test."""
    first: dict[Path, tuple[Path, int]] = {}
    problems = []
    for path, line, file in files:
        before = first.get(file.resolve())
        first[file.resolve()] = (path, line)
        if before is not None:
            problems.append(f"{path}, line {line}: {file} is in line {before[1]} of {before[0]} already")
    if problems:
        raise ManifestError("The manifests have files in common; nothing was written.", problems=problems)


def _say_shared(patients: Sequence[set[str]]) -> None:
    from histoflare.commands.console import say

    shared = sum(count > 1 for count in Counter(name for each in patients for name in each).values())
    if shared:
        say(f"note: {shared} names of patients are in several manifests, and are taken for the same people")


def _show(found: dict[str, dict[str, Any]], as_json: bool) -> None:
    from histoflare.commands.console import make_table, out, print_json, say_warnings

    for site, entry in found.items():
        if entry["path"] is None:
            entry["warnings"] = [
                "no patient fell to it, so it has no manifest: take fewer sites or another seed"
            ]
        say_warnings([f"{site}: {warning}" for warning in entry["warnings"]])
    if as_json:
        print_json({"sites": found})
        return
    table = make_table("site", "rows", "patients", "by class", "by split")
    for site, entry in found.items():
        counts = (entry.get("labels", {}), entry["splits"])
        words = [", ".join(f"{name} {count}" for name, count in of.items()) for of in counts]
        table.add_row(site, str(entry["rows"]), str(entry["patients"]), *words)
    out.print(table, markup=False)

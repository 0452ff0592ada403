"""Sites with bags of numbers on disk: what a FLARE test needs, without slides or an encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from histoflare.bags.bag import BAG_VERSION, Bag, BagHeader, write_bag
from histoflare.site.configuration import SiteConfiguration
from histoflare.slides.manifest import Manifest, ManifestRow, write_manifest

LABELS = ("glandular", "solid")
ENCODER = "densenet121-random:v1"
FEATURES = 1024


def write_site(
    root: Path,
    site: str,
    slides: int = 10,
    encoder: str = ENCODER,
    features: int = FEATURES,
    validation: bool = False,
    longer: int = 1,
    mark: str = "",
) -> SiteConfiguration:
    """Write a manifest and bags of 3 to 6 patches for ``slides`` slides, two in five for testing.

    With ``validation``, one in five is for that. Bags have ``longer`` times as many patches. ``mark`` stands
    in the names of slides, bags and patients.
    """
    splits = ("train", "train", "validation" if validation else "train", "test", "test")
    rng = np.random.default_rng(sum(site.encode()))
    rows = [
        ManifestRow(
            line=index + 2,
            slide=root / site / "slides" / f"{mark}s{index}.tif",
            patient=f"{site}-{mark}p{index}",
            label=LABELS[index % 2],
            split=splits[index % 5],
        )
        for index in range(slides)
    ]
    manifest = write_manifest(root / site / "manifest.csv", rows)
    write_bags(manifest, root / site / "bags", rng, encoder, features, longer)
    return SiteConfiguration({"manifest": root / site / "manifest.csv", "bags": root / site / "bags"})


def write_bags(
    manifest: Manifest,
    folder: Path,
    rng: np.random.Generator,
    encoder: str = ENCODER,
    features: int = FEATURES,
    longer: int = 1,
) -> None:
    """Write a bag of 3 to 6 patches, or ``longer`` times as many, for each slide of a manifest."""
    for row in manifest.rows:
        n = longer * int(rng.integers(3, 7))
        values = rng.normal(0.0, 1.0, (n, features)).astype(np.float32)
        values[:, :100] += 0.5 if row.label == "solid" else -0.5
        header = BagHeader(
            version=BAG_VERSION,
            slide_sha256=None,
            slide_size_bytes=0,
            slide_mtime_ns=0,
            mosaic=None,
            encoder=encoder,
            features=features,
            patch_mpp=0.5,
            patch_px=224,
        )
        coords = np.zeros((n, 2), dtype=np.int64)
        write_bag(folder / f"{manifest.row_id(row)}.h5", Bag(header, values, coords))


def relabel(site: SiteConfiguration, *labels: str, column: str = "label") -> SiteConfiguration:
    """Give the slides of a site other labels (or values of another column), in turn."""
    header, *rows = site.files["manifest"].read_text().splitlines()
    place = header.split(",").index(column)
    cells = [row.split(",") for row in rows]
    for index, row in enumerate(cells):
        row[place] = labels[index % len(labels)]
    site.files["manifest"].write_text("\n".join([header, *map(",".join, cells)]) + "\n")
    return site

"""What TRIDENT, CLAM and STAMP write: one HDF5 file of features a slide.

- TRIDENT: ``features`` (n, f) or (1, n, f), ``coords`` (n, 2) in level-0 pixels with the attributes
  ``patch_size``, ``patch_size_level0`` and ``target_magnification``.
- CLAM: ``features`` (n, f), ``coords`` (n, 2) in level-0 pixels.
- STAMP: ``feats`` (n, f), mostly float16, ``coords`` (n, 2) in µm (attribute ``unit`` or ``tile_size_um``);
  its first version in units of 256 µm / 224. µm become level-0 pixels by the slide's mpp.

Their other attributes (paths, names of people) are not taken over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from histoflare.bags.bag import BAG_VERSION, DAMAGE, Bag, BagHeader
from histoflare.errors import BagError, SlideError
from histoflare.slides.manifest import ManifestRow
from histoflare.slides.reader import Slide

# STAMP 1 wrote coordinates as if tiles of 256 µm were 224 px apart.
OLD_STAMP_TILE_PX, OLD_STAMP_TILE_UM = 224, 256.0


@dataclass(frozen=True)
class Kind:
    """What all files of one import must share: number of features, and the encoder the file itself names."""

    features: int
    encoder: str

    def __str__(self) -> str:
        return f"{self.features} features a patch" + (f" of '{self.encoder}'" if self.encoder else "")


@dataclass(frozen=True)
class Geometry:
    """Where the patches lie and how large they are; None where the file does not say."""

    source: str
    l0_coords: NDArray[np.int64]
    patch_mpp: float | None = None
    patch_px: int | None = None
    l0_patch_px: int | None = None


def read_kind(path: Path) -> Kind:
    """Return the kind of the file at ``path``, without its features. Raises as :func:`read_features`."""
    with _opened(path) as file:
        return _kind(file)


def read_features(path: Path, row: ManifestRow, encoder: str) -> Bag:
    """Return the bag that the file at ``path`` makes for the slide of ``row``.

    Raises:
        BagError: The file is damaged or no HDF5 (FEATURES_DAMAGED), lacks a dataset or has one of another
            shape (FEATURES_SHAPE), has no patches (BAG_EMPTY), NaN or infinity (BAG_NOT_FINITE), or
            coordinates in an unknown unit (FEATURES_UNIT, SLIDE_MPP_MISSING, …).
    """
    with _opened(path) as file:
        kind = _kind(file)
        features = _table(file[_features_name(file)][()])
        if "coords" not in file:
            raise BagError("no 'coords' in it: make the features again", reason="FEATURES_SHAPE")
        coords = _table(file["coords"][()])
        _check(features, coords)
        geometry = _geometry(file, coords, row)
    header = BagHeader(
        version=BAG_VERSION,
        slide_sha256=None,
        slide_size_bytes=0,
        slide_mtime_ns=0,
        mosaic=None,
        encoder=encoder,
        features=kind.features,
        given_mpp=row.mpp,
        source=geometry.source,
        patch_mpp=geometry.patch_mpp,
        patch_px=geometry.patch_px,
        l0_patch_px=geometry.l0_patch_px,
    )
    return Bag(header, features.astype(np.float32), geometry.l0_coords)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Yield the open file; whatever goes wrong with it becomes a :class:`BagError` that names it."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except DAMAGE as error:
        raise BagError(
            f"{path}: the file is damaged or no HDF5 ({error}); make or copy it again",
            reason="FEATURES_DAMAGED",
        ) from error
    except BagError as error:
        raise BagError(f"{path}: {error}", reason=error.reason) from error


def _features_name(file: Any) -> str:
    for name in ("features", "feats"):
        if name in file:
            return name
    raise BagError("neither 'features' nor 'feats' in it: not a feature file", reason="FEATURES_SHAPE")


def _kind(file: Any) -> Kind:
    dataset = file[_features_name(file)]
    if len(dataset.shape) < 2 or dataset.dtype.kind != "f":
        raise BagError(
            f"features of shape {dataset.shape} and type {dataset.dtype} are not n x d numbers: one row a "
            "patch is needed, not a slide-level embedding",
            reason="FEATURES_SHAPE",
        )
    own = dataset.attrs.get("encoder", file.attrs.get("encoder", file.attrs.get("extractor", "")))
    return Kind(int(dataset.shape[-1]), own.decode() if isinstance(own, bytes) else str(own))


def _table(values: Any) -> NDArray[Any]:
    """Return (n, d) of (n, d) or (1, n, d)."""
    array = np.asarray(values)
    return array[0] if array.ndim == 3 and len(array) == 1 else array


def _check(features: NDArray[Any], coords: NDArray[Any]) -> None:
    n = len(features)
    if features.ndim != 2 or coords.shape != (n, 2):
        raise BagError(
            f"features {features.shape} and coords {coords.shape} do not fit each other as n x d and n x 2; "
            "make the features again",
            reason="FEATURES_SHAPE",
        )
    if n == 0:
        raise BagError(
            "it has no patches; take the row out of the manifest, or look at the slide's tissue mask",
            reason="BAG_EMPTY",
        )
    bad = int(np.count_nonzero(~np.isfinite(features).all(axis=1)))
    if bad or not np.isfinite(coords).all():
        where = f"the features of {bad} of {n} patches" if bad else "the coords"
        raise BagError(f"{where} hold NaN or infinity; make them again", reason="BAG_NOT_FINITE")


def _geometry(file: Any, coords: NDArray[Any], row: ManifestRow) -> Geometry:
    """Return where the patches lie in level-0 pixels, from what each toolkit writes."""
    attributes = {**file.attrs, **file["coords"].attrs}
    tile_um = _number(attributes, "tile_size_um")
    if _features_name(file) == "features" and attributes.get("unit") != "um" and tile_um is None:
        trident = _number(attributes, "target_magnification") is not None
        return Geometry(
            "trident" if trident else "clam",
            np.rint(coords).astype(np.int64),
            _trident_mpp(attributes, row) if trident else None,
            _whole(_number(attributes, "patch_size")),
            _whole(_number(attributes, "patch_size_level0")),
        )
    um_coords, tile_um, tile_px = _stamp_micrometres(attributes, coords, tile_um)
    mpp = _slide_mpp(row)
    return Geometry(
        "stamp",
        np.rint(um_coords / mpp).astype(np.int64),
        tile_um / tile_px if tile_um and tile_px else None,
        _whole(tile_px),
        _whole(tile_um / mpp if tile_um else None),
    )


def _trident_mpp(attributes: Mapping[str, Any], row: ManifestRow) -> float | None:
    """Return the resolution of the patches in µm/px.

    TRIDENT takes a slide for 40x or 20x by rounding, and cuts at a whole factor: its patches are as fine as
    the slide's own pixels say, and as the target magnification says only where those are not known.
    """
    side_px, l0_side_px = _number(attributes, "patch_size"), _number(attributes, "patch_size_level0")
    magnification = _number(attributes, "target_magnification")
    if side_px is not None and l0_side_px is not None:
        try:
            return _slide_mpp(row) * l0_side_px / side_px
        except BagError:
            pass  # features may have come without their slides
    return None if magnification is None else 10.0 / magnification


def _stamp_micrometres(
    attributes: Mapping[str, Any], coords: NDArray[Any], tile_um: float | None
) -> tuple[NDArray[np.float64], float | None, float | None]:
    """Return the coordinates in µm, and the side of a tile in µm and in pixels."""
    um_coords = coords.astype(np.float64)
    unit, tile_px = attributes.get("unit"), _number(attributes, "tile_size_px")
    if unit == "mm":
        return um_coords * 1000, tile_um, tile_px
    if tile_um is not None or unit == "um":
        return um_coords, tile_um or _number(attributes, "tile_size"), tile_px
    if round(_number(attributes, "tile_size") or _stride(um_coords)) == OLD_STAMP_TILE_PX:
        return um_coords / OLD_STAMP_TILE_PX * OLD_STAMP_TILE_UM, OLD_STAMP_TILE_UM, OLD_STAMP_TILE_PX
    raise BagError(
        "the unit of its coords is not said (attribute 'unit' or 'tile_size_um'): make the features again "
        "with a newer STAMP",
        reason="FEATURES_UNIT",
    )


def _stride(coords: NDArray[np.float64]) -> float:
    """Return the smallest distance between two columns or rows of tiles, 0 if there is one tile."""
    steps = np.concatenate([np.diff(np.unique(coords[:, axis])) for axis in (0, 1)])
    return float(steps.min()) if len(steps) else 0.0


def _slide_mpp(row: ManifestRow) -> float:
    """Return the resolution of the slide's level 0 in µm/px."""
    if row.mpp is not None:
        return row.mpp
    try:
        with Slide(row.slide, mpp_place="in the manifest's 'mpp' column") as slide:
            return slide.mpp
    except SlideError as error:
        raise BagError(
            f"its coords are in µm, and the slide's resolution is not known ({error}); fill 'mpp' in the "
            "manifest",
            reason=error.reason,
        ) from error


def _number(attributes: Mapping[str, Any], name: str) -> float | None:
    """Return a positive number, or None if there is none."""
    try:
        value = float(np.asarray(attributes[name]).reshape(()))
    except (KeyError, ValueError, TypeError):
        return None
    return value if np.isfinite(value) and value > 0 else None


def _whole(value: float | None) -> int | None:
    return None if value is None else max(1, round(value))

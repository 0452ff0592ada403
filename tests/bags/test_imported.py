from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from histoflare.bags.bag import read_bag
from histoflare.bags.folder import PrepareReport
from histoflare.bags.imported import import_features
from histoflare.errors import BagError
from histoflare.slides.manifest import Manifest
from histoflare.slides.pyramid import write_pyramid

from .conftest import paint_slide, write_rows

N, F = 6, 5
FEATURES = np.random.default_rng(0).normal(size=(N, F)).astype(np.float32)
L0_COORDS = np.arange(2 * N).reshape(N, 2) * 512


def write_h5(
    path: Path, datasets: dict[str, Any], root: dict[str, Any], **attributes: dict[str, Any]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
        file.attrs.update(root)
        for name, values in attributes.items():
            file[name].attrs.update(values)


def write_clam(path: Path, features: np.ndarray = FEATURES, coords: np.ndarray = L0_COORDS) -> None:
    write_h5(path, {"features": features, "coords": coords}, {})


def write_trident(
    path: Path, features: np.ndarray = FEATURES, encoder: str = "uni_v2", l0_side_px: int = 512
) -> None:
    coords = {
        "patch_size": 256,
        "patch_size_level0": l0_side_px,
        "target_magnification": 20,
        "savetodir": "/home/someone/study",
        "name": "Patient-Known",
    }
    write_h5(
        path,
        {"features": features[None], "coords": L0_COORDS[None]},
        {},
        features={"encoder": encoder, "name": "Patient-Known"},
        coords=coords,
    )


def write_stamp(path: Path, um_coords: np.ndarray, attributes: dict[str, Any]) -> None:
    write_h5(path, {"feats": FEATURES.astype(np.float16), "coords": um_coords}, attributes)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Three slides, none of which exists: features may have come without them."""
    rows = [
        {"slide": f"slides/s{index}.svs", "patient": f"p{index}", "label": "ab"[index % 2], "mpp": "0.25"}
        for index in range(3)
    ]
    return write_rows(tmp_path / "m.csv", rows)


def bring_in(tmp_path: Path, manifest: Manifest, encoder: str = "uni2") -> PrepareReport:
    return import_features(tmp_path / "h5", manifest, tmp_path / "bags", encoder)


def bag_of(tmp_path: Path, manifest: Manifest, index: int) -> Any:
    return read_bag(tmp_path / "bags" / f"{manifest.row_id(manifest.rows[index])}.h5")


def test_the_three_toolkits_come_in(tmp_path: Path, manifest: Manifest) -> None:
    write_clam(tmp_path / "h5" / "s0.h5")
    write_trident(tmp_path / "h5" / "nested" / "s1.h5", encoder="")
    um_coords = L0_COORDS * 0.25  # the manifest says 0.25 µm/px
    attributes = {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "stamp_version": "2.1"}
    write_stamp(tmp_path / "h5" / "s2.h5", um_coords, attributes)
    report = bring_in(tmp_path, manifest)
    assert [row.status for row in report.rows] == ["made"] * 3, report
    clam, trident, stamp = (bag_of(tmp_path, manifest, index) for index in range(3))
    for bag, source in ((clam, "clam"), (trident, "trident"), (stamp, "stamp")):
        assert (bag.header.source, bag.header.encoder) == (source, "imported:uni2")
        assert bag.features.dtype == np.float32 and bag.header.mosaic is None
        np.testing.assert_array_equal(bag.l0_coords, L0_COORDS)
    np.testing.assert_array_equal(clam.features, FEATURES)
    np.testing.assert_array_equal(trident.features, FEATURES)
    np.testing.assert_array_equal(stamp.features, FEATURES.astype(np.float16).astype(np.float32))
    assert (clam.header.patch_mpp, clam.header.patch_px) == (None, None)
    assert (trident.header.patch_mpp, trident.header.patch_px, trident.header.l0_patch_px) == (0.5, 256, 512)
    assert stamp.header.patch_mpp == pytest.approx(256 / 224)
    assert (stamp.header.patch_px, stamp.header.l0_patch_px) == (224, 1024)


def test_nothing_else_of_the_files_is_taken(tmp_path: Path, manifest: Manifest) -> None:
    for index in range(3):
        write_trident(tmp_path / "h5" / f"s{index}.h5")
    bring_in(tmp_path, manifest)
    for path in (tmp_path / "bags").glob("*.h5"):
        assert b"Patient-Known" not in path.read_bytes() and b"someone" not in path.read_bytes()


@pytest.mark.parametrize(
    ("attributes", "um_per_unit"),
    [
        ({"unit": "um", "tile_size": 256.0}, 1.0),
        ({"tile_size_um": 256.0}, 1.0),
        ({"unit": "mm", "tile_size_um": 256.0}, 1000.0),
        ({"tile_size": 224}, 256 / 224),
        ({"unit": "px", "tile_size": 224}, 256 / 224),
        ({"extractor": "ctranspath"}, 256 / 224),
    ],
)
def test_every_stamps_unit(
    tmp_path: Path, manifest: Manifest, attributes: dict[str, Any], um_per_unit: float
) -> None:
    um_coords = np.stack([np.arange(N), np.full(N, 3)], axis=1) * 256.0
    for index in range(3):
        write_stamp(tmp_path / "h5" / f"s{index}.h5", um_coords / um_per_unit, attributes)
    assert bring_in(tmp_path, manifest).exit_code == 0
    np.testing.assert_array_equal(bag_of(tmp_path, manifest, 0).l0_coords, um_coords / 0.25)


def test_micrometres_take_the_slides_own_mpp(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "s0.tif", paint_slide(0), 0.5)
    rows = [{"slide": name, "patient": name, "label": "a"} for name in ("s0.tif", "gone.tif")]
    manifest = write_rows(tmp_path / "m.csv", rows)
    for name in ("s0", "gone"):
        write_stamp(tmp_path / "h5" / f"{name}.h5", L0_COORDS * 0.5, {"unit": "um"})
    report = bring_in(tmp_path, manifest)
    assert [row.status for row in report.rows] == ["made", "failed"]
    np.testing.assert_array_equal(bag_of(tmp_path, manifest, 0).l0_coords, L0_COORDS)
    assert "'mpp' in the manifest" in report.rows[1].message


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no patches": ({"features": FEATURES[:0], "coords": L0_COORDS[:0]}, "BAG_EMPTY"),
    "nan": ({"features": FEATURES * np.nan, "coords": L0_COORDS}, "BAG_NOT_FINITE"),
    "inf": ({"features": np.full((N, F), np.inf), "coords": L0_COORDS}, "BAG_NOT_FINITE"),
    "no features": ({"embedding": FEATURES, "coords": L0_COORDS}, "FEATURES_SHAPE"),
    "no coords": ({"features": FEATURES}, "FEATURES_SHAPE"),
    "lengths": ({"features": FEATURES, "coords": L0_COORDS[:-1]}, "FEATURES_SHAPE"),
    "one vector": ({"features": FEATURES[0], "coords": L0_COORDS[:1]}, "FEATURES_SHAPE"),
    "whole numbers": ({"features": L0_COORDS, "coords": L0_COORDS}, "FEATURES_SHAPE"),
    "another width": ({"features": FEATURES[:, :3], "coords": L0_COORDS}, "FEATURES_ENCODER"),
    "unknown unit": ({"feats": FEATURES, "coords": L0_COORDS}, "FEATURES_UNIT"),
}


@pytest.mark.parametrize("fault", BAD)
def test_each_fault_is_one_error_and_costs_no_other(tmp_path: Path, manifest: Manifest, fault: str) -> None:
    datasets, reason = BAD[fault]
    write_clam(tmp_path / "h5" / "s0.h5")
    write_h5(tmp_path / "h5" / "s1.h5", datasets, {})
    write_clam(tmp_path / "h5" / "s2.h5")
    report = bring_in(tmp_path, manifest)
    assert [row.status for row in report.rows] == ["made", "failed", "made"]
    assert report.rows[1].reason == reason and report.exit_code == 3
    assert report.rows[1].message.count(str(tmp_path / "h5" / "s1.h5")) == 1


def test_damaged_missing_and_unknown_files(tmp_path: Path, manifest: Manifest) -> None:
    write_clam(tmp_path / "h5" / "s0.h5")
    (tmp_path / "h5" / "s1.h5").write_bytes((tmp_path / "h5" / "s0.h5").read_bytes()[:1500])
    write_clam(tmp_path / "h5" / "sub" / "stranger.h5")
    report = bring_in(tmp_path, manifest)
    assert [row.reason for row in report.rows] == ["", "FEATURES_DAMAGED", "FEATURES_MISSING"]
    assert report.not_in_manifest == ("sub/stranger.h5",)


def test_features_of_two_encoders_do_not_mix(tmp_path: Path, manifest: Manifest) -> None:
    for index, own in enumerate(("uni_v2", "conch_v1", "uni_v2")):
        write_trident(tmp_path / "h5" / f"s{index}.h5", encoder=own)
    report = bring_in(tmp_path, manifest)
    assert [row.reason for row in report.rows] == ["", "FEATURES_ENCODER", ""]
    assert "conch_v1" in report.rows[1].message and "uni_v2" in report.rows[1].message


def test_unclear_names_are_refused(tmp_path: Path) -> None:
    rows = [{"slide": name, "patient": name, "label": "a"} for name in ("x/s0.svs", "y/s0.svs", "s1.svs")]
    manifest = write_rows(tmp_path / "m.csv", rows)
    for name in ("s0", "one/s1", "two/s1"):
        write_clam(tmp_path / "h5" / f"{name}.h5")
    report = bring_in(tmp_path, manifest)
    assert [row.reason for row in report.rows] == ["FEATURES_AMBIGUOUS"] * 3


def test_again_does_nothing_unless_features_changed(tmp_path: Path, manifest: Manifest) -> None:
    for index in range(3):
        write_clam(tmp_path / "h5" / f"s{index}.h5")
    bring_in(tmp_path, manifest)
    write_clam(tmp_path / "h5" / "s1.h5", FEATURES + 1)
    assert [row.status for row in bring_in(tmp_path, manifest).rows] == ["kept", "made", "kept"]
    assert [row.status for row in bring_in(tmp_path, manifest, "other").rows] == ["made"] * 3


def test_bags_may_lie_below_the_features(tmp_path: Path, manifest: Manifest) -> None:
    for index in range(3):
        write_clam(tmp_path / "h5" / f"s{index}.h5")
    for _ in range(2):
        report = import_features(tmp_path / "h5", manifest, tmp_path / "h5" / "bags", "uni2")
        assert report.exit_code == 0 and report.not_in_manifest == ()


def test_ome_tiffs_are_found_under_both_names(tmp_path: Path) -> None:
    rows = [{"slide": f"{name}.ome.tif", "patient": name, "label": "a"} for name in ("s0", "s1")]
    manifest = write_rows(tmp_path / "m.csv", rows)
    write_clam(tmp_path / "h5" / "s0.h5")
    write_clam(tmp_path / "h5" / "s1.ome.h5")
    assert bring_in(tmp_path, manifest).exit_code == 0


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "uni:2"])
def test_an_encoder_needs_a_name(tmp_path: Path, manifest: Manifest, name: str) -> None:
    with pytest.raises(BagError) as error:
        bring_in(tmp_path, manifest, name)
    assert error.value.reason == "ENCODER_NAME"


def test_an_empty_folder_is_one_error(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(BagError) as error:
        bring_in(tmp_path, manifest)
    assert error.value.reason == "FEATURES_MISSING"


@pytest.mark.parametrize(("l0_mpp", "l0_side_px"), [("0.265", 512), ("0.25", 512), ("0.1766", 768)])
def test_the_resolution_of_tridents_patches_is_that_of_the_slides_pixels(
    tmp_path: Path, l0_mpp: str, l0_side_px: int
) -> None:
    """Its target magnification is nominal: a slide of 0.265 µm/px read at half of it has 0.53, not 0.5."""
    row = {"slide": "s.svs", "patient": "p", "label": "a", "mpp": l0_mpp}
    manifest = write_rows(tmp_path / "m.csv", [row])
    write_trident(tmp_path / "h5" / "s.h5", l0_side_px=l0_side_px)
    bring_in(tmp_path, manifest)
    expected = float(l0_mpp) * l0_side_px / 256
    assert bag_of(tmp_path, manifest, 0).header.patch_mpp == pytest.approx(expected)


def test_the_resolution_of_tridents_patches_without_one_in_the_manifest(tmp_path: Path) -> None:
    """The slide's own, if it is there; else what TRIDENT aimed at."""
    write_pyramid(tmp_path / "there.tif", paint_slide(1), 0.265)
    rows = [{"slide": f"{name}.tif", "patient": name, "label": "a"} for name in ("there", "gone")]
    manifest = write_rows(tmp_path / "m.csv", rows)
    for name in ("there", "gone"):
        write_trident(tmp_path / "h5" / f"{name}.h5")
    bring_in(tmp_path, manifest)
    found = [bag_of(tmp_path, manifest, index).header.patch_mpp for index in range(2)]
    assert found == [pytest.approx(0.53), 0.5]

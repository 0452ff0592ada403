"""Cohorts of images: everything checked up front, every fault listed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histoflare.errors import MaskError
from histoflare.masks import image_files
from histoflare.masks.image_files import decode_image, read_file
from histoflare.masks.images import load_image_cohort, pooled_images
from histoflare.masks.importers import write_mask
from histoflare.masks.pixels import read_record
from histoflare.masks.windows import IGNORE
from histoflare.slides.cohort import LISTED_PROBLEMS
from histoflare.slides.splits import SplitRule
from tests.refusals import raises_reason

from .image_folders import rgb, save, save_palette, write_cohort

LABELS = ["a", "b"]


def refusal(manifest: Path, **options: object) -> str:
    with pytest.raises(MaskError) as caught:
        load_image_cohort("site", manifest, LABELS, **options)  # type: ignore[arg-type]
    assert caught.value.reason == "COHORT_INVALID"
    return str(caught.value)


def test_a_cohort_is_its_manifest_with_pixels(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    cohort = load_image_cohort(
        "site", write_cohort(tmp_path), LABELS, window_px=48, on_image=lambda *done: seen.append(done)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [len(part) for part in (cohort.records, cohort.train, cohort.validation, cohort.test)] == [
        4,
        3,
        0,
        1,
    ]
    (unsaid,) = cohort.warnings
    assert (
        "no image states its resolution" in unsaid and cohort.name == "site" and cohort.labels == ("a", "b")
    )
    (record,) = cohort.test
    assert record.patient == "p3" and record.subgroups == {"sex": "M"}
    read = cohort.read(record)
    np.testing.assert_array_equal(read.image, rgb(48, 48, 3))
    np.testing.assert_array_equal(read.mask, np.asarray(Image.open(tmp_path / "m3.png")))
    np.testing.assert_array_equal(cohort.read_mask(record), read.mask)
    assert read.tissue is None and read.size_px == (48, 48)


def test_every_fault_is_said_at_once(tmp_path: Path) -> None:
    path = write_cohort(tmp_path, count=8)
    save(tmp_path / "m0.png", np.zeros((48, 47), np.uint8))
    save(tmp_path / "m1.png", np.full((48, 48), 2, np.uint8))
    save(tmp_path / "m2.png", np.full((48, 48), IGNORE, np.uint8))
    content = (tmp_path / "i3.png").read_bytes()
    (tmp_path / "i3.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "m4.png").unlink()
    save(tmp_path / "m5.png", rgb(48, 48))
    save(tmp_path / "i6.png", rgb(40, 48))
    save(tmp_path / "m6.png", np.zeros((40, 48), np.uint8))
    (tmp_path / "i7.png").write_text("no image")
    message = refusal(path, window_px=48)
    for line, part in {
        2: "47 x 48 px and its image 48 x 48",
        3: "class index 2 in the mask; the job has 2 labels",
        4: "not one pixel of the mask is annotated",
        5: "damaged",
        6: "no such mask",
        7: "mode RGB",
        8: "48 x 40 px is smaller than the job's windows of 48 px",
        9: "not an image that can be read",
    }.items():
        (found,) = [each for each in message.splitlines() if each.startswith(f"  line {line} ")]
        assert part in found


@pytest.mark.parametrize("column", ["i0.png", "m0.png"])
def test_a_path_of_windows_is_named_as_such(tmp_path: Path, column: str) -> None:
    path = write_cohort(tmp_path)
    path.write_text(path.read_text().replace(column, rf"D:\study\{column}", 1))
    assert "(a path of Windows; write it" in refusal(path)


def reason_of(image: Path, mask: Path, tissue: Path | None = None) -> str:
    with pytest.raises(MaskError) as caught:
        read_record(image, mask, tissue, LABELS)
    return caught.value.reason


def test_each_fault_has_its_reason(tmp_path: Path) -> None:
    image, mask = save(tmp_path / "i.png", rgb(9, 9)), save(tmp_path / "m.png", np.zeros((9, 9), np.uint8))
    other = save(tmp_path / "other.png", np.zeros((9, 8), np.uint8))
    half = tmp_path / "half.png"
    half.write_bytes(mask.read_bytes()[:50])
    gone = tmp_path / "gone.png"
    assert reason_of(gone, mask) == "IMAGE_MISSING"
    assert reason_of(image, gone) == "MASK_MISSING"
    assert reason_of(tmp_path, mask) == "IMAGE_UNREADABLE"
    assert reason_of(half, mask) == "IMAGE_UNREADABLE"
    assert reason_of(mask, mask) == "IMAGE_UNREADABLE"  # gray
    assert reason_of(image, half) == "MASK_UNREADABLE"
    assert reason_of(image, image) == "MASK_UNREADABLE"  # colours
    assert reason_of(image, other) == "MASK_SIZE"
    assert reason_of(image, mask, other) == "MASK_SIZE"
    assert reason_of(image, save(tmp_path / "c.png", np.full((9, 9), 254, np.uint8))) == "MASK_CLASS"
    assert reason_of(image, save(tmp_path / "e.png", np.full((9, 9), IGNORE, np.uint8))) == "MASK_EMPTY"


def test_a_mask_that_lies_across_its_image_is_named_as_such(tmp_path: Path) -> None:
    image, mask = save(tmp_path / "i.png", rgb(9, 6)), save(tmp_path / "m.png", np.zeros((6, 9), np.uint8))
    with raises_reason("MASK_SIZE", "9 x 6", "6 x 9"):
        read_record(image, mask, None, LABELS)


def test_a_png_cut_anywhere_is_one_clear_error(tmp_path: Path) -> None:
    content = save(tmp_path / "i.png", np.zeros((8, 8, 3), np.uint8)).read_bytes()
    for kept in range(len(content) - 12):  # the last chunk, IEND, is 12 bytes
        with raises_reason("IMAGE_UNREADABLE", "i.png"):
            decode_image(content[:kept], tmp_path / "i.png")


def test_a_flipped_bit_in_a_png_is_an_error(tmp_path: Path) -> None:
    content = save(tmp_path / "m.png", np.ones((64, 64), np.uint8)).read_bytes()
    start = content.index(b"IDAT") + 4
    for place in range(start, len(content) - 16):
        damaged = bytearray(content)
        damaged[place] ^= 1
        with pytest.raises(MaskError):
            image_files.decode_mask(bytes(damaged), tmp_path / "m.png", LABELS)


def test_long_lists_are_cut(tmp_path: Path) -> None:
    count = LISTED_PROBLEMS + 3
    path = write_cohort(tmp_path, count=count)
    for index in range(count):
        (tmp_path / f"m{index}.png").unlink()
    message = refusal(path)
    assert message.count("no such mask") == LISTED_PROBLEMS and "and 3 more" in message


def test_background_only_is_fine_and_palettes_hold_indices(tmp_path: Path) -> None:
    path = write_cohort(tmp_path)
    save(tmp_path / "m0.png", np.zeros((48, 48), np.uint8))
    indices = np.random.default_rng(0).integers(0, 2, (48, 48), np.uint8)
    save_palette(tmp_path / "m1.png", indices, {0: (255, 255, 255), 1: (0, 64, 128)})
    cohort = load_image_cohort("site", path, LABELS)
    by_patient = {record.patient: record for record in cohort.records}
    np.testing.assert_array_equal(cohort.read(by_patient["p1"]).mask, indices)
    assert not cohort.read(by_patient["p0"]).mask.any()


def test_masks_of_many_kinds_hold_the_same_indices(tmp_path: Path) -> None:
    indices = np.array([[0, 1, 255], [1, 1, 0]], np.uint8)
    opaque = np.full_like(indices, 255)
    kinds = {
        "gray.png": indices,
        "wide.png": indices.astype(np.uint16),
        "big-endian.tif": indices.astype(">u2"),
        "number.tif": indices.astype(np.int32),
        "rgb.png": np.dstack([indices] * 3),
        "rgba.png": np.dstack([*[indices] * 3, opaque]),
        "alpha.png": np.dstack([indices, opaque]),
    }
    for name, pixels in kinds.items():
        path = save(tmp_path / name, pixels)
        np.testing.assert_array_equal(image_files.decode_mask(path.read_bytes(), path, LABELS), indices, name)


def test_masks_that_hold_no_indices_say_what_they_are(tmp_path: Path) -> None:
    indices = np.array([[0, 1, 255], [1, 1, 0]], np.uint8)
    kinds = {
        "mode RGB, in colours": np.dstack([indices, indices, indices * 0]),
        "partly transparent": np.dstack([indices, indices]),
        "numbers up to 300": np.array([[0, 1, 300], [1, 1, 0]], np.uint16),
        "mode F.": indices.astype(np.float32),
    }
    for number, (part, pixels) in enumerate(kinds.items()):
        path = save(tmp_path / f"{number}{'.tif' if pixels.dtype == np.float32 else '.png'}", pixels)
        with pytest.raises(MaskError) as caught:
            image_files.decode_mask(path.read_bytes(), path, LABELS)
        assert part in str(caught.value) and caught.value.reason == "MASK_UNREADABLE"


@pytest.mark.parametrize("right", [0, 1])
def test_binary_masks_are_named_in_every_case(tmp_path: Path, right: int) -> None:
    """Whether no mask of the site or one is right."""
    path = write_cohort(tmp_path)
    binary = np.zeros((48, 48), np.uint8)
    binary[8:20, 8:20] = IGNORE
    for index in range(right, 4):
        save(tmp_path / f"m{index}.png", binary)
    warnings = load_image_cohort("site", path, LABELS).warnings
    (found,) = [warning for warning in warnings if "only 0 and 255" in warning]
    assert ("line 2 (m0.png)" in found) == (right == 0) and "line 5 (m3.png)" in found
    assert "masks import binary" in found


def test_masks_without_the_other_classes_are_not_called_binary(tmp_path: Path) -> None:
    """An importer's mask in which only the first class was drawn has 0 and 255 too, and its own palette."""
    path = write_cohort(tmp_path)
    drawn = np.zeros((48, 48), np.uint8)
    drawn[8:20] = IGNORE
    write_mask(tmp_path / "m0.png", drawn)
    save(tmp_path / "m1.png", np.zeros((48, 48), np.uint8))
    Image.fromarray(drawn > 0).save(tmp_path / "m2.png")  # one bit a pixel: 0 and 1
    assert len(load_image_cohort("site", path, LABELS).warnings) == 1, "of the resolution alone"


def test_images_of_many_kinds_are_rgb(tmp_path: Path) -> None:
    pixels = rgb(16, 16)
    for name in ("a.tif", "a.png", "a.bmp"):
        path = save(tmp_path / name, pixels)
        np.testing.assert_array_equal(decode_image(read_file(path, "IMAGE"), path), pixels)
    smooth = np.full((16, 16, 3), (200, 120, 180), np.uint8)
    jpeg = save(tmp_path / "a.jpg", smooth)
    assert np.abs(decode_image(jpeg.read_bytes(), jpeg).astype(int) - smooth).max() <= 2
    clear = np.dstack([pixels, np.repeat([[255], [0]], 8, axis=0).repeat(16, axis=1).astype(np.uint8)])
    shown = decode_image(save(tmp_path / "t.png", clear).read_bytes(), tmp_path / "t.png")
    np.testing.assert_array_equal(shown[:8], pixels[:8])
    assert (shown[8:] == 255).all()


def test_tissue_is_what_is_above_zero(tmp_path: Path) -> None:
    tissue = np.random.default_rng(0).integers(0, 3, (20, 20), np.uint8)
    save(tmp_path / "i.png", rgb(20, 20))
    save(tmp_path / "m.png", np.zeros((20, 20), np.uint8))
    save(tmp_path / "t.png", tissue)
    (tmp_path / "m.csv").write_text("image,mask,patient,tissue,split\ni.png,m.png,p,t.png,test\n")
    cohort = load_image_cohort("site", tmp_path / "m.csv", LABELS)
    np.testing.assert_array_equal(cohort.read(cohort.records[0]).tissue, tissue > 0)
    assert cohort.warnings[1:] == (
        "no training images: this cohort can only be tested on",
        "no pixel of a test mask is 'b'",
    )


def test_resolution_must_be_the_jobs(tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / f"i{index}.png", rgb(8, 8, index))
        save(tmp_path / f"m{index}.png", np.ones((8, 8), np.uint8))
    path = tmp_path / "m.csv"
    rows = ["i0.png,m0.png,p0,0.5,train", "i1.png,m1.png,p1,0.504,test", "i2.png,m2.png,p2,,train"]
    path.write_text("image,mask,patient,mpp,split\n" + "\n".join(rows))
    cohort = load_image_cohort("site", path, LABELS, mpp=0.5)
    assert any("i2.png" in warning and "resolution" in warning for warning in cohort.warnings)
    assert "no pixel of a training mask is 'a'" in cohort.warnings
    (unnamed, *others) = load_image_cohort("site", path, LABELS, mpp=None).warnings
    assert "mpp = 0.5" in unnamed and tuple(others) == cohort.warnings[1:]
    path.write_text(path.read_text().replace("0.504", "0.52"))
    assert "line 3 (i1.png): at 0.52 µm/px, the job's images are at 0.5" in refusal(path, mpp=0.5)


def test_without_the_job_s_resolution_images_have_one_of_their_own(tmp_path: Path) -> None:
    for index in range(2):
        save(tmp_path / f"i{index}.png", rgb(8, 8, index))
        save(tmp_path / f"m{index}.png", np.ones((8, 8), np.uint8))
    path = tmp_path / "m.csv"
    path.write_text("image,mask,patient,mpp\ni0.png,m0.png,p0,0.25\ni1.png,m1.png,p1,0.25\n")
    assert any("mpp = 0.25" in warning for warning in load_image_cohort("site", path, LABELS).warnings)
    assert not any("mpp" in warning for warning in load_image_cohort("site", path, LABELS, mpp=0.25).warnings)
    path.write_text(path.read_text().replace("p1,0.25", "p1,0.5"))
    assert "several resolutions (µm/px; site: 0.25, 0.5)" in refusal(path, mpp=None)
    path.write_text("image,mask,patient\ni0.png,m0.png,p0\ni1.png,m1.png,p1\n")
    warnings = load_image_cohort("site", path, LABELS).warnings
    assert any("no image states its resolution" in warning for warning in warnings)


def test_without_splits_patients_are_split(tmp_path: Path) -> None:
    cohort = load_image_cohort("site", write_cohort(tmp_path, count=5, split=False), LABELS)
    assert {record.patient: record.split for record in cohort.records} == {
        record.patient: SplitRule().role_of(record.patient) for record in cohort.records
    }
    assert cohort.train and cohort.test


@pytest.mark.parametrize("changed", ["i0.png", "m0.png"])
def test_a_change_during_use_is_noticed(tmp_path: Path, changed: str) -> None:
    cohort = load_image_cohort("site", write_cohort(tmp_path), LABELS, cache_bytes=0)
    (record,) = [record for record in cohort.records if record.patient == "p0"]
    cohort.read(record)
    content = rgb(48, 48, 9) if changed.startswith("i") else np.zeros((48, 48), np.uint8)
    save(tmp_path / changed, content)
    with raises_reason("MASK_UNUSABLE", tmp_path / "i0.png"):
        cohort.read(record)
    (tmp_path / changed).unlink()
    with raises_reason("IMAGE_MISSING" if changed.startswith("i") else "MASK_MISSING", tmp_path / changed):
        cohort.read(record)


def test_pixels_are_kept_up_to_the_limit(tmp_path: Path) -> None:
    each = 48 * 48 * 4
    cohort = load_image_cohort("site", write_cohort(tmp_path), LABELS, cache_bytes=2 * each + 1)
    reads = [cohort.read(record) for record in cohort.records]
    again = [cohort.read(record) for record in cohort.records]
    assert [first is second for first, second in zip(reads, again, strict=True)] == [True, True, False, False]
    assert cohort.cache.held_bytes == 2 * each
    assert load_image_cohort("site", tmp_path / "images.csv", LABELS).cache.held_bytes == 0


def test_fingerprints_follow_content_and_not_names(tmp_path: Path) -> None:
    path = write_cohort(tmp_path)
    before = load_image_cohort("site", path, LABELS).fingerprint()
    text = path.read_text()
    path.write_text(text.replace("p0", "somebody"))
    assert load_image_cohort("other", path, LABELS).fingerprint() == before
    path.write_text(text.replace("p1", "p0"))
    assert load_image_cohort("site", path, LABELS).fingerprint() != before
    path.write_text(text.replace(",train", ",validation", 1))
    assert load_image_cohort("site", path, LABELS).fingerprint() != before
    path.write_text(text)
    save(tmp_path / "m2.png", np.zeros((48, 48), np.uint8))
    assert load_image_cohort("site", path, LABELS).fingerprint() != before


def test_pooled_sites_stay_apart(tmp_path: Path) -> None:
    cohorts = [load_image_cohort(name, write_cohort(tmp_path / name), LABELS) for name in ("north", "south")]
    pool = pooled_images(cohorts)
    assert len(pool.records) == 8 and len({record.patient for record in pool.records}) == 8
    assert [record.slide_id for record in pool.records] == sorted(record.slide_id for record in pool.records)
    (record,) = [record for record in pool.records if record.patient == "south/p1"]
    np.testing.assert_array_equal(pool.read(record).image, rgb(48, 48, 1))
    for wrong in ([], [cohorts[0], cohorts[0]]):
        with pytest.raises(MaskError):
            pooled_images(wrong)
    with pytest.raises(MaskError):
        pooled_images([cohorts[0], load_image_cohort("x", tmp_path / "north" / "images.csv", ["b", "a"])])


def test_a_bomb_is_refused_and_a_large_image_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = tmp_path / "large.png"
    Image.new("P", (5000, 5000)).save(large)
    assert image_files.decode(large.read_bytes(), large, "MASK").size == (5000, 5000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000 * 5000 - 1)
    for limit in (5000 * 5000 - 1, 5000 * 2000):  # Pillow warns above the limit, and fails above twice
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with raises_reason("MASK_UNREADABLE", large, limit):
            image_files.decode(large.read_bytes(), large, "MASK")


def test_real_images_are_a_cohort(test_data: Path, tmp_path: Path) -> None:
    from histoflare.masks.importers.binary import Source, import_binary

    report = import_binary(Source(test_data / "seg_tnbc"), tmp_path, "nucleus")
    cohort = load_image_cohort("tnbc", report.manifest.path, report.labels, window_px=256)
    assert len(cohort.records) == 50 and len({record.patient for record in cohort.records}) == 11
    assert {record.patient for record in cohort.train}.isdisjoint(record.patient for record in cohort.test)
    by_name = {record.image.stem: record for record in cohort.records}
    # index.csv of the data set: the share of nucleus pixels
    for line in (test_data / "seg_tnbc" / "index.csv").read_text().splitlines()[1:6]:
        name, patient, share = line.split(",")
        assert by_name[name].patient == patient
        assert cohort.read(by_name[name]).mask.mean() == pytest.approx(float(share), abs=5e-5)

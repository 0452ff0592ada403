from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from histoflare.bags import cohort as cohort_module
from histoflare.bags.bag import BAG_VERSION, Bag, BagHeader, write_bag
from histoflare.bags.cohort import load_cohort, pooled
from histoflare.bags.folder import LEFT_OUT
from histoflare.bags.targets.classes import Classes
from histoflare.errors import BagError
from histoflare.slides.cohort import LISTED_PROBLEMS
from histoflare.slides.manifest import Manifest
from histoflare.slides.splits import SplitRule
from tests.refusals import raises_reason

from .conftest import write_rows

LABELS = ("a", "b")
TARGET = Classes(LABELS)
HEADER = BagHeader(
    BAG_VERSION, None, 0, 0, {"mpp": 0.5, "patch_px": 64}, "enc:1", 4, patch_mpp=0.5, patch_px=64
)


def put_bag(manifest: Manifest, folder: Path, index: int, n: int = 5, **changes: object) -> Path:
    header = replace(HEADER, **changes)
    features = np.random.default_rng(index).normal(size=(n, header.features)).astype(np.float32)
    path = folder / f"{manifest.row_id(manifest.rows[index])}.h5"
    write_bag(path, Bag(header, features, np.zeros((n, 2), np.int64)))
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Six slides: four to train on, two to test on."""
    rows = [
        {
            "slide": f"{'fedcba'[index]}.svs",
            "patient": f"p{index}",
            "label": LABELS[index % 2],
            "split": "train" if index < 4 else "test",
            "sex": "FM"[index % 2],
        }
        for index in range(6)
    ]
    return write_rows(tmp_path / "m.csv", rows)


@pytest.fixture
def bags(tmp_path: Path, manifest: Manifest) -> Path:
    for index in range(6):
        put_bag(manifest, tmp_path / "bags", index)
    return tmp_path / "bags"


def refusal(manifest: Manifest, bags: Path, **options: object) -> str:
    arguments = {"target": TARGET, "encoder": "enc:1", "mpp": 0.5, "patch_px": 64} | options
    with pytest.raises(BagError) as error:
        load_cohort("site", manifest, bags, **arguments)  # type: ignore[arg-type]
    assert error.value.reason == "COHORT_INVALID"
    return str(error.value)


def test_a_cohort_is_its_manifest_with_bags(manifest: Manifest, bags: Path) -> None:
    cohort = load_cohort("site", manifest, bags, TARGET, "enc:1", 0.5, 64)
    assert [len(part) for part in (cohort.records, cohort.train, cohort.test, cohort.validation)] == [
        6,
        4,
        2,
        0,
    ]
    assert [record.slide_id for record in cohort.records] == sorted(map(manifest.row_id, manifest.rows))
    by_patient = {record.patient: record for record in cohort.records}
    assert [by_patient[f"p{index}"].label for index in range(6)] == [0, 1, 0, 1, 0, 1]
    assert by_patient["p1"].subgroups == {"sex": "M"}
    features = cohort.features(by_patient["p3"])
    expected = np.random.default_rng(3).normal(size=(5, 4)).astype(np.float32)
    np.testing.assert_array_equal(features.numpy(), expected)
    assert cohort.warnings == ()


def test_labels_follow_the_jobs_order(manifest: Manifest, bags: Path) -> None:
    cohort = load_cohort("site", manifest, bags, Classes(("b", "c", "a")), "enc:1")
    assert {record.patient: record.label for record in cohort.records}["p0"] == 2


def test_everything_wrong_is_said_at_once(manifest: Manifest, bags: Path) -> None:
    ids = [manifest.row_id(row) for row in manifest.rows]
    (bags / f"{ids[0]}.h5").unlink()
    (bags / f"{ids[1]}.h5").write_bytes(b"x")
    put_bag(manifest, bags, 2, encoder="enc:2")
    put_bag(manifest, bags, 3, n=0)
    put_bag(manifest, bags, 4, patch_mpp=0.25)
    put_bag(manifest, bags, 5, patch_px=224)
    text = refusal(manifest, bags)
    assert text.count("\n  ") == 6
    for words in ("no such bag", "damaged", "enc:2", "no patches", "0.25 µm/px", "224 px"):
        assert text.count(words) == 1, words
    assert str(bags) in text and "site" in text


def test_labels_that_the_job_does_not_know(manifest: Manifest, bags: Path) -> None:
    changed = replace(manifest, rows=tuple(replace(row, label="c") for row in manifest.rows))
    assert "unknown label 'c'; the job's labels (protocol.labels) are a, b" in refusal(changed, bags)


def test_a_site_of_one_class_takes_part(manifest: Manifest, bags: Path) -> None:
    """Label skew: cross-entropy needs no second class at a site."""
    changed = replace(manifest, rows=tuple(replace(row, label="a") for row in manifest.rows))
    cohort = load_cohort("site", changed, bags, TARGET, "enc:1")
    assert {record.label for record in cohort.train} == {0}
    assert "no training patient of class 'b'" in cohort.warnings


def test_one_fault_of_many_bags_is_said_once_with_the_setting_that_cures_it(
    manifest: Manifest, bags: Path
) -> None:
    text = refusal(manifest, bags, patch_px=224)
    assert (
        text.count("\n  ") == 1
        and " and 5 more: patches of 64 px, the job's have 224 (protocol.patch_px)" in text
    )
    width = refusal(manifest, bags, features=7)
    assert width.count("\n  ") == 1 and "--set task.features=" in width and "encoder" not in width


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    rows = [{"slide": f"{i}.svs", "patient": f"p{i}", "label": LABELS[i % 2]} for i in range(50)]
    text = refusal(write_rows(tmp_path / "many.csv", rows), tmp_path)
    assert text.count("\n  ") == LISTED_PROBLEMS + 1
    assert f"… and {50 - LISTED_PROBLEMS} more" in text


def test_bags_of_different_settings_do_not_mix(manifest: Manifest, bags: Path) -> None:
    put_bag(manifest, bags, 0, mosaic={"mpp": 0.5, "patch_px": 64, "seed": 1})
    assert "different mosaic parameters" in refusal(manifest, bags)
    put_bag(manifest, bags, 0, features=3)
    assert "different numbers of features" in refusal(manifest, bags)


def test_bags_of_another_width_than_the_jobs_are_refused(manifest: Manifest, bags: Path) -> None:
    cohort = load_cohort("site", manifest, bags, TARGET, "enc:1")
    width = cohort.features(cohort.records[0]).shape[1]
    load_cohort("site", manifest, bags, TARGET, "enc:1", features=width)
    with raises_reason("COHORT_INVALID", width, width + 1, "task.features"):
        load_cohort("site", manifest, bags, TARGET, "enc:1", features=width + 1)


def test_any_encoder_is_still_one_encoder(manifest: Manifest, bags: Path) -> None:
    assert load_cohort("site", manifest, bags, TARGET, None).encoder == "enc:1"
    put_bag(manifest, bags, 5, encoder="enc:2")
    assert "enc:" in refusal(manifest, bags, encoder=None)


def test_slides_that_prepare_left_out_are_left_out_with_a_warning_and_others_missing_are_errors(
    manifest: Manifest, bags: Path
) -> None:
    ids = [manifest.row_id(row) for row in manifest.rows]
    for row_id in (*ids[:2], ids[3]):
        (bags / f"{row_id}.h5").unlink()
    notes = {
        ids[0]: {"status": "skipped", "reason": "SLIDE_NO_TISSUE"},
        ids[1]: {"status": "failed", "reason": "SLIDE_READ_FAILED"},
        ids[2]: {"status": "skipped", "reason": "SLIDE_NO_TISSUE"},  # has a bag by now
    }
    (bags / LEFT_OUT).write_text(json.dumps(notes))
    text = refusal(manifest, bags)
    assert text.count("\n  ") == 1 and ids[3] in text
    put_bag(manifest, bags, 3)
    cohort = load_cohort("site", manifest, bags, TARGET, "enc:1")
    assert len(cohort.records) == 4
    assert [any(code in warning for warning in cohort.warnings) for code in ("NO_TISSUE", "READ_FAILED")] == [
        True,
        True,
    ]


def test_without_splits_patients_are_split(manifest: Manifest, bags: Path) -> None:
    bare = replace(manifest, rows=tuple(replace(row, split=None) for row in manifest.rows))
    cohort = load_cohort("site", bare, bags, TARGET, "enc:1")
    assert {record.patient: record.split for record in cohort.records} == {
        f"p{index}": SplitRule().role_of(f"p{index}") for index in range(6)
    }
    assert {record.label for record in cohort.test} == {0}
    (warning,) = cohort.warnings
    assert "no test patient" in warning and "'b'" in warning


@pytest.mark.parametrize(("split", "words"), [("test", "only be tested on"), ("train", "no test patients")])
def test_one_sided_cohorts_are_warned_of(manifest: Manifest, bags: Path, split: str, words: str) -> None:
    rows = tuple(replace(row, split=split) for row in manifest.rows)
    cohort = load_cohort("site", replace(manifest, rows=rows), bags, TARGET, "enc:1")
    assert len(cohort.of_split(split)) == 6
    assert len(cohort.warnings) == 1 and words in cohort.warnings[0]


def test_imported_features_of_unknown_resolution_are_warned_of(manifest: Manifest, bags: Path) -> None:
    for index in range(6):
        put_bag(manifest, bags, index, mosaic=None, patch_mpp=None, patch_px=None)
    (warning,) = load_cohort("site", manifest, bags, TARGET, "enc:1", 0.5, 64).warnings
    assert " and 5 more: imported features that do not say" in warning
    for index in range(6):
        put_bag(manifest, bags, index, mosaic=None, patch_mpp=256 / 224, patch_px=224)
    assert load_cohort("site", manifest, bags, TARGET, "enc:1", 1.14, 224).warnings == ()


def test_features_stay_in_memory_up_to_the_limit(
    manifest: Manifest, bags: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 5 * 4 * 4
    for limit, kept in ((10 * size, 6), (2 * size, 2), (0, 0)):
        cohort = load_cohort("site", manifest, bags, TARGET, "enc:1", cache_bytes=limit)
        first = [cohort.features(record) for record in cohort.records]
        again = [cohort.features(record) for record in cohort.records]
        assert sum(one is other for one, other in zip(first, again, strict=True)) == kept
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_of_a_bag_without_room_in_memory_only_the_rows_asked_for_are_read(
    manifest: Manifest, bags: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long a step takes must not follow from how long a bag is."""
    cohort = load_cohort("site", manifest, bags, TARGET, "enc:1", cache_bytes=2 * 5 * 4 * 4)
    whole = {record.path: cohort.features(record) for record in cohort.records}
    cohort = load_cohort("site", manifest, bags, TARGET, "enc:1", cache_bytes=2 * 5 * 4 * 4)
    cohort.read_ahead()
    assert len(cohort.cache.held) == 2

    def not_again(path: Path) -> None:
        raise AssertionError(f"{path} was read whole")

    monkeypatch.setattr(cohort_module, "read_bag", not_again)
    for record in cohort.train:
        assert record.patches == 5
        assert torch.equal(cohort.features(record, [4, 1]), whole[record.path][[4, 1]])
    changed = next(record for record in cohort.train if record.path not in cohort.cache.held)
    changed.path.write_bytes(next(r.path for r in cohort.test).read_bytes())
    with pytest.raises(BagError) as error:
        cohort.features(changed, [0])
    assert error.value.reason == "BAG_CHANGED"


def test_reading_ahead_finds_a_damaged_bag(manifest: Manifest, bags: Path) -> None:
    cohort = load_cohort("site", manifest, bags, TARGET, "enc:1", cache_bytes=0)
    path = cohort.train[-1].path
    with h5py.File(path, "r+") as file:
        file["features"][0, 0] += 1.0
    with pytest.raises(BagError) as error:
        cohort.read_ahead()
    assert error.value.reason == "BAG_DAMAGED"


def test_reading_all_again_sees_what_memory_hides(manifest: Manifest, bags: Path) -> None:
    cohort = load_cohort("site", manifest, bags, TARGET, "enc:1")
    for record in cohort.records:
        cohort.features(record)
    held = dict(cohort.cache.held)
    cohort.read_all()
    assert cohort.cache.held == held
    cohort.test[0].path.unlink()
    with pytest.raises(BagError) as error:
        cohort.read_all()
    assert error.value.reason == "BAG_MISSING"


def test_a_bag_changed_under_way_is_an_error(manifest: Manifest, bags: Path) -> None:
    cohort = load_cohort("site", manifest, bags, TARGET, "enc:1")
    put_bag(manifest, bags, 0, n=6)
    changed = next(record for record in cohort.records if record.patient == "p0")
    with pytest.raises(BagError) as error:
        cohort.features(changed)
    assert error.value.reason == "BAG_CHANGED"


def test_the_fingerprint_sees_every_change(manifest: Manifest, bags: Path) -> None:
    def fingerprint(changed: Manifest = manifest, labels: tuple[str, ...] = LABELS) -> str:
        return load_cohort("site", changed, bags, Classes(tuple(labels)), "enc:1").fingerprint()

    def with_row(index: int, **changes: object) -> Manifest:
        rows = list(manifest.rows)
        rows[index] = replace(rows[index], **changes)
        return replace(manifest, rows=tuple(rows))

    base = fingerprint()
    renamed = replace(manifest, rows=tuple(replace(row, patient=f"x{row.patient}") for row in manifest.rows))
    shuffled = replace(manifest, rows=manifest.rows[::-1])
    assert base == fingerprint() == fingerprint(renamed) == fingerprint(shuffled)
    others = [
        fingerprint(labels=("b", "a")),
        fingerprint(with_row(0, label="b")),
        fingerprint(with_row(0, split="validation")),
        fingerprint(with_row(0, patient="p1")),
    ]
    put_bag(manifest, bags, 0, n=4)
    others.append(fingerprint())
    assert len({base, *others}) == 6


def test_pooled_cohorts_keep_their_sites_apart(manifest: Manifest, bags: Path) -> None:
    one = load_cohort("one", manifest, bags, TARGET, "enc:1")
    two = replace(one, name="two")
    both = pooled([two, one])
    assert len(both.train) == 8 and len(both.test) == 4
    assert len({record.patient for record in both.records}) == 12
    assert [record.slide_id for record in both.records] == sorted(record.slide_id for record in both.records)
    assert both.records == pooled([one, two]).records
    assert torch.equal(both.features(both.records[0]), one.features(one.records[0]))


def test_unlike_cohorts_are_not_pooled(manifest: Manifest, bags: Path) -> None:
    cohort = load_cohort("one", manifest, bags, TARGET, "enc:1")
    for others in ([], [cohort, cohort], [cohort, replace(cohort, name="two", encoder="enc:2")]):
        with pytest.raises(BagError):
            pooled(others)


def test_a_bag_of_another_run_s_slide_is_noticed(manifest: Manifest, bags: Path) -> None:
    """Two runs may have slides of one name; a bag knows the size of the file it was made of."""
    row = manifest.rows[0]
    put_bag(manifest, bags, 0, slide_size_bytes=10)
    load_cohort("site", manifest, bags, TARGET, "enc:1")  # the slide is not there: training needs none
    row.slide.write_bytes(bytes(10))
    load_cohort("site", manifest, bags, TARGET, "enc:1")
    row.slide.write_bytes(bytes(11))
    assert "f.svs): its bag was made of a file of another size" in refusal(manifest, bags)

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from histoflare.bags import bag as bag_module
from histoflare.bags.bag import (
    BAG_VERSION,
    Bag,
    BagHeader,
    encode_bag,
    read_bag,
    read_header,
    read_header_and_count,
    read_rows,
    write_bag,
)
from histoflare.bags.preprocessing import IMAGENET
from histoflare.errors import BagError
from tests.refusals import raises_reason

HEADER = BagHeader(BAG_VERSION, "ab" * 32, 12, 34, {"mpp": 0.5, "patch_px": 64}, "mean-colour", 3)


def make_bag(n: int = 4, seed: int = 0) -> Bag:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 10**6, (n, 2))
    return Bag(HEADER, rng.normal(size=(n, 3)).astype(np.float32), corners)


@given(
    features=hnp.arrays(
        np.float32,
        st.tuples(st.integers(0, 5), st.integers(1, 4)),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
    )
)
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, features: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("bag") / "a.h5"
    n, f = features.shape
    l0_coords = np.arange(2 * n, dtype=np.int64).reshape(n, 2) * 2**33
    write_bag(path, Bag(replace(HEADER, features=f), features, l0_coords))
    found = read_bag(path)
    np.testing.assert_array_equal(found.features, features)
    np.testing.assert_array_equal(found.l0_coords, l0_coords)
    assert (found.header.encoder, found.header.mosaic) == (HEADER.encoder, HEADER.mosaic)
    assert read_header_and_count(path) == (found.header, n)


@pytest.mark.parametrize("rows", [[], [0], [3, 1], [0, 1, 2, 3], [2, 2]])
def test_some_rows_are_those_of_the_whole_bag(tmp_path: Path, rows: list[int]) -> None:
    bag = make_bag(4)
    write_bag(tmp_path / "a.h5", bag)
    header, found = read_rows(tmp_path / "a.h5", rows)
    assert header == read_header(tmp_path / "a.h5")
    np.testing.assert_array_equal(found, bag.features[rows])


@pytest.mark.parametrize("rows", [[4], [-1], [0, 100]])
def test_rows_that_a_bag_has_not_are_an_error(tmp_path: Path, rows: list[int]) -> None:
    write_bag(tmp_path / "a.h5", make_bag(4))
    with pytest.raises(BagError) as caught:
        read_rows(tmp_path / "a.h5", rows)
    assert caught.value.reason == "BAG_DAMAGED"


def test_rows_of_a_bag_stored_otherwise_are_found_too(tmp_path: Path) -> None:
    bag = make_bag(6)
    write_bag(tmp_path / "a.h5", bag)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["features"]
        file.create_dataset("features", data=bag.features, chunks=(2, 3))
    np.testing.assert_array_equal(read_rows(tmp_path / "a.h5", [5, 0])[1], bag.features[[5, 0]])


def test_the_same_bag_gives_the_same_bytes_later() -> None:
    first = encode_bag(make_bag())
    time.sleep(1.1)  # HDF5 keeps times in seconds
    assert encode_bag(make_bag()) == first
    assert encode_bag(make_bag(seed=1)) != first


def test_other_tools_find_features_and_coords(tmp_path: Path) -> None:
    bag = make_bag()
    write_bag(tmp_path / "a.h5", bag)
    with h5py.File(tmp_path / "a.h5") as file:
        assert set(file) == {"features", "coords"}
        assert file["features"].dtype == np.float32
        np.testing.assert_array_equal(file["coords"][:], bag.l0_coords)
        assert set(file.attrs) == {"histoflare"}
        assert not file["features"].attrs and not file["coords"].attrs


def test_header_is_read_without_the_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bag(tmp_path / "a.h5", make_bag())

    def refuse(*_: object) -> None:
        raise AssertionError("features were read")

    monkeypatch.setattr(bag_module.h5py.Dataset, "__getitem__", refuse)
    assert read_header(tmp_path / "a.h5").features == 3
    with pytest.raises(AssertionError):
        read_bag(tmp_path / "a.h5")


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with raises_reason("BAG_MISSING", "prepare"):
        read_bag(tmp_path / "none.h5")
    write_bag(tmp_path / "s-1-0123abcd.h5", make_bag())
    with raises_reason("BAG_MISSING", "s-1-0123abcd.h5"):
        read_bag(tmp_path / "s-1-ffffffff.h5")
    with h5py.File(tmp_path / "clam.h5", "w") as file:
        file["features"] = np.zeros((2, 3))
    with raises_reason("BAG_FOREIGN"):
        read_header(tmp_path / "clam.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(BagError) as text:
        read_bag(tmp_path / "text.h5")
    assert text.value.reason == "BAG_DAMAGED"


@given(at=st.floats(0, 1, exclude_max=True), cut=st.booleans(), mask=st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_damage_is_found_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, at: float, cut: bool, mask: int
) -> None:
    """A cut or a changed byte is a BagError, or in the file's unused bytes and the bag is as it was."""
    path = tmp_path_factory.mktemp("bag") / "a.h5"
    whole = encode_bag(make_bag(50))
    position = int(at * len(whole))
    path.write_bytes(
        whole[:position]
        if cut
        else whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :]
    )
    try:
        found = read_bag(path)
    except BagError:
        return
    np.testing.assert_array_equal(found.features, make_bag(50).features)
    np.testing.assert_array_equal(found.l0_coords, make_bag(50).l0_coords)


def test_changed_features_do_not_pass(tmp_path: Path) -> None:
    write_bag(tmp_path / "a.h5", make_bag())
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["features"][0, 0] += 1
    with pytest.raises(BagError) as error:
        read_bag(tmp_path / "a.h5")
    assert error.value.reason == "BAG_DAMAGED"


@pytest.mark.parametrize(
    ("features", "l0_coords", "reason"),
    [
        (np.full((2, 3), np.nan), np.zeros((2, 2)), "BAG_NOT_FINITE"),
        (np.full((2, 3), np.inf), np.zeros((2, 2)), "BAG_NOT_FINITE"),
        (np.zeros((2, 4)), np.zeros((2, 2)), "BAG_SHAPE"),
        (np.zeros((2, 3)), np.zeros((3, 2)), "BAG_SHAPE"),
        (np.zeros((2, 3)), np.zeros((2, 3)), "BAG_SHAPE"),
    ],
)
def test_a_wrong_bag_is_not_written(
    tmp_path: Path, features: np.ndarray, l0_coords: np.ndarray, reason: str
) -> None:
    with pytest.raises(BagError) as error:
        write_bag(tmp_path / "a.h5", Bag(HEADER, features.astype(np.float32), l0_coords.astype(np.int64)))
    assert error.value.reason == reason
    assert not list(tmp_path.iterdir())


def test_another_version_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bag_module, "BAG_VERSION", 99)
    write_bag(tmp_path / "a.h5", make_bag())
    monkeypatch.undo()
    with raises_reason("BAG_VERSION", "99", "prepare"):
        read_header(tmp_path / "a.h5")


def test_the_header_says_the_preprocessing_and_an_earlier_bag_that_it_does_not(tmp_path: Path) -> None:
    bag = make_bag()
    said = IMAGENET.to_json()
    write_bag(tmp_path / "a.h5", replace(bag, header=replace(bag.header, preprocessing=said)))
    assert read_header(tmp_path / "a.h5").preprocessing == said
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        stored = json.loads(file.attrs[bag_module.HEADER_ATTRIBUTE])
        del stored["preprocessing"]
        file.attrs[bag_module.HEADER_ATTRIBUTE] = json.dumps(stored)
    assert read_bag(tmp_path / "a.h5").header.preprocessing is None

"""Released bytes: whole or lost, never other ones; room is made beforehand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from histoflare.errors import LedgerError
from histoflare.privacy.release_store import KEPT, MARGIN_BYTES, ReleaseStore
from tests.refusals import raises_reason

DTYPES = "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"


def arrays(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    dice = np.random.default_rng(seed)
    made: dict[str, np.ndarray[Any, Any]] = {
        dtype: (100 * dice.normal(size=(3, 5))).astype(dtype) for dtype in DTYPES.split()
    }
    made["scalar"] = np.array(2.5, dtype=np.float32)
    made["empty"] = np.zeros((0, 4), dtype=np.float32)
    made["transposed"] = np.arange(12, dtype=np.float32).reshape(3, 4).T
    made["big endian"] = np.arange(5, dtype=">f8")
    made["bits"] = np.array([np.nan, np.inf, -0.0], dtype=np.float32)
    return made


def n_bytes(some: dict[str, np.ndarray[Any, Any]]) -> int:
    return sum(array.nbytes for array in some.values())


@pytest.mark.parametrize("with_room", [True, False])
def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path, with_room: bool) -> None:
    store = ReleaseStore(tmp_path / "run")
    saved = arrays()
    if with_room:
        store.make_room(7, n_bytes(saved))
        (room,) = (tmp_path / "run").iterdir()
        assert room.stat().st_blocks * 512 >= n_bytes(saved) + MARGIN_BYTES
    store.save(7, saved, {"weight": 1.0, "words": "ä"})
    found = store.load(7)
    assert found is not None and found.extra == {"weight": 1.0, "words": "ä"}
    assert set(found.arrays) == set(saved)
    for name, array in saved.items():
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].dtype == array.dtype.newbyteorder("=")
        assert found.arrays[name].tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes()
    (path,) = (tmp_path / "run").iterdir()
    assert path.stat().st_size < n_bytes(saved) + 4000, "the margin is given back"


def test_the_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    saved = {name: array for name, array in arrays().items() if name != "big endian"}
    ReleaseStore(tmp_path).save(1, saved, {})
    (path,) = tmp_path.iterdir()
    read = safetensors.numpy.load_file(path)
    assert {name: array.tobytes() for name, array in read.items()} == {
        name: np.ascontiguousarray(array).tobytes() for name, array in saved.items()
    }


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    for booking in (3, 20, 100):
        store.save(booking, {"w": np.full(3, booking)}, {})
    assert [store.load(booking) is not None for booking in (3, 20, 100)] == [False, True, True]
    assert len(list(tmp_path.iterdir())) == KEPT


def test_what_is_lost_is_none(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    assert store.load(1) is None
    store.save(1, arrays(), {})
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for cut in [*range(0, 200, 7), *range(200, len(whole), 97)]:
        path.write_bytes(whole[:cut])
        assert store.load(1) is None
    dice = np.random.default_rng(0)
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ int(dice.integers(1, 256))]) + whole[at + 1 :])
        store.load(1)  # another content, which its digest shows, or None; never an exception
    path.write_bytes(whole)
    assert store.load(1) is not None


def test_saving_again_replaces_the_whole(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    store.make_room(1, 100_000)
    store.save(1, {"w": np.ones(20_000, np.float32)}, {"try": 1})
    store.make_room(1, 100)
    before = store.load(1)
    assert before is not None and before.extra == {"try": 1}, "room alone replaces nothing"
    store.save(1, {"w": np.zeros(2, np.float32)}, {"try": 2})
    found = store.load(1)
    assert found is not None and found.extra == {"try": 2}
    assert found.arrays["w"].tolist() == [0, 0]


def test_room_that_a_crash_left_is_given_back(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    store.make_room(1, 10_000)
    store.make_room(2, 10_000)
    assert len(list(tmp_path.iterdir())) == 1
    store.save(2, {}, {})
    found = store.load(2)
    assert found is not None and found.arrays == {}


def test_what_safetensors_does_not_have_is_refused(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    for array in (np.zeros(2, complex), np.array(["a"]), np.array([None])):
        with raises_reason("STATE_INVALID", "w: ", array.dtype):
            store.save(1, {"w": array}, {})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError) as caught:
        ReleaseStore(tmp_path / "file" / "run").make_room(1, 10)
    assert caught.value.reason == "LEDGER_UNUSABLE"


def test_what_the_disk_does_not_give_is_not_taken_for_lost(tmp_path: Path) -> None:
    (tmp_path / "release_000000000001.safetensors").mkdir()
    with pytest.raises(LedgerError) as caught:
        ReleaseStore(tmp_path).load(1)
    assert caught.value.reason == "LEDGER_UNUSABLE"


PEAK = """
import resource, sys
from pathlib import Path
import numpy as np
from histoflare.privacy.release_store import ReleaseStore
store = ReleaseStore(Path(sys.argv[1]))
arrays = {str(i): np.full(7_000_000, i, dtype=np.float32) for i in range(8)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store.make_room(1, 8 * 28_000_000)
store.save(1, arrays, {})
saved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
del arrays
found = store.load(1)
assert float(found.arrays["7"][-1]) == 7.0
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(saved - before, loaded - before)
"""


def test_a_large_update_is_not_copied(tmp_path: Path) -> None:
    """224 MB, as a DHUnet's update: saving takes no copy, loading one."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    saving_kib, loading_kib = map(int, done.stdout.split())
    assert saving_kib < 30_000
    assert loading_kib < 260_000, "the mapped file counts as memory too"


LIMITED = """
import json, resource, sys
from pathlib import Path
import numpy as np
from histoflare.errors import LedgerError
from histoflare.privacy.release_store import ReleaseStore
store = ReleaseStore(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
said = []
for act in (
    lambda: store.make_room(1, 3_000_000),
    lambda: store.save(1, {"w": np.zeros(3_000_000, np.uint8)}, {}),
    lambda: store.make_room(1, 500_000),
    lambda: store.save(1, {"w": np.zeros(500_000, np.uint8)}, {}),
):
    try:
        act()
        said.append("done")
    except LedgerError as error:
        said.append(error.reason)
print(json.dumps(said))
"""


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == ["LEDGER_FULL", "LEDGER_FULL", "done", "done"]
    assert [path.name for path in tmp_path.iterdir()] == ["release_000000000001.safetensors"]

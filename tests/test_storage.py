"""Files are whole or absent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from histoflare.errors import BagError
from histoflare.storage import (
    atomic_path,
    lock_file,
    make_folder,
    open_private,
    remove_partials,
    write_bytes,
    write_json,
)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.bin"]


def test_an_error_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"earlier")
    with pytest.raises(RuntimeError), atomic_path(path) as partial:
        partial.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_disk_names_the_file_that_was_to_be(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(OSError, match="No space left") as caught, atomic_path(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(path)
    other = str(tmp_path / "source.png")
    with pytest.raises(FileNotFoundError) as missing, atomic_path(path) as partial:
        partial.touch()
        Path(other).read_bytes()
    assert missing.value.filename == other


def test_nan_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"value": float("nan")})
    assert not list(tmp_path.iterdir())


def test_sigkill_leaves_whole_files_only(tmp_path: Path) -> None:
    """A writer that is killed while it writes over and over leaves one of its files, whole."""
    code = """
import sys
from pathlib import Path
from histoflare.storage import write_bytes
for number in range(10**6):
    write_bytes(Path(sys.argv[1]), bytes([number % 256]) * 2_000_000)
"""
    path = tmp_path / "a.bin"
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code, str(path)]) as writer:
            deadline = time.monotonic() + 30
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            os.kill(writer.pid, signal.SIGKILL)
        content = path.read_bytes()
        assert len(content) == 2_000_000
        assert len(set(content)) == 1
        path.unlink()
        remove_partials(tmp_path)
        assert not list(tmp_path.iterdir())


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_files_and_their_new_folders_are_for_one_user(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "new" / "newer" / "a.json"
    write_json(path, {})
    assert (mode(path), mode(path.parent), mode(path.parent.parent)) == (0o600, 0o700, 0o700)
    path.chmod(0o644)
    with atomic_path(path) as partial:
        assert mode(partial) == 0o600, "before anything is written"
        partial.unlink()
        partial.write_text("another file in its place")
    assert mode(path) == 0o600
    with os.fdopen(open_private(tmp_path / "log", os.O_WRONLY | os.O_APPEND), "a") as log:
        assert mode(tmp_path / "log") == 0o600
        log.write("a")
    (tmp_path / "log").chmod(0o644)
    os.close(open_private(tmp_path / "log", os.O_RDONLY))
    assert (mode(tmp_path / "log"), (tmp_path / "log").read_text()) == (0o600, "a")


def test_what_is_public_is_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "new" / "newer" / "a.json"
    write_json(path, {}, public=True)
    assert mode(path) == 0o666 & ~umask
    assert mode(path.parent) == mode(path.parent.parent) == 0o777 & ~umask


def test_a_folder_that_was_there_stays_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    make_folder(tmp_path)
    write_bytes(tmp_path / "a", b"")
    assert mode(tmp_path) == 0o750
    with pytest.raises(OSError):
        make_folder(tmp_path / "a")
    with pytest.raises(OSError):
        make_folder(tmp_path / "a" / "b")


def test_a_lock_keeps_others_out_until_its_block_is_left(tmp_path: Path) -> None:
    path, busy = tmp_path / ".lock", BagError("busy", reason="BAGS_BUSY")
    with lock_file(path, busy), pytest.raises(BagError) as refused, lock_file(path, busy):
        pass
    assert refused.value is busy
    with lock_file(path, busy):
        assert path.stat().st_mode & 0o777 == 0o600

"""What a site's process makes of a message's bytes: plain values, few types, in bounds, and no file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.drivers import socket_conn
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.fobs import fobs as inside
from nvflare.fuel.utils.fobs import lobs
from nvflare.private.admin_defs import Message

from histoflare.flare import capabilities, closed_messages
from histoflare.flare.closed_messages import MOST_FRAME_BYTES, MOST_VALUES, close_messages

from .hostile.objects import MAIN, PLANTED, file_of, objects, raw_messages, section, thing, too_large

OBJECTS = objects(Path("/x"), Path("/y"))
RAW = raw_messages(Path("/x"))
READABLE = ("depth",)
"""What means nothing and is bounded may be read."""


@pytest.fixture(autouse=True)
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FLARE's reader closed; modules that a careless one would import; a folder for what it would keep."""
    for module, name in (
        (inside, "deserialize"),
        (lobs, "deserialize"),
        (lobs, "get_datum_dir"),
        (socket_conn, "MAX_FRAME_SIZE"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    for name in PLANTED:
        path = tmp_path / "modules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\nclass Kind: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("NVFLARE_DATUM_DIR", str(tmp_path / "datums"))
    close_messages()
    close_messages()
    yield
    assert not (tmp_path / "mark").exists() and not (tmp_path / "datums").exists()
    assert not {"planted_for_fobs", "cma_decomposer"} & set(sys.modules)


def read(content: Any) -> Any:
    return fobs.loads(section(MAIN, msgpack.packb(content)))


@pytest.mark.parametrize("name", [name for name in OBJECTS if name not in READABLE])
@pytest.mark.parametrize("nested", [False, True])
def test_an_object_that_no_message_needs_is_not_made(name: str, nested: bool) -> None:
    each = OBJECTS[name]
    content = thing("nvflare.apis.shareable.Shareable", {"__headers__": {"x": [each]}}) if nested else each
    with pytest.raises((ValueError, RuntimeError)):
        read(content)


@pytest.mark.parametrize("name", RAW)
def test_nor_are_bytes_that_nobody_writes(name: str) -> None:
    with pytest.raises((ValueError, RuntimeError, AttributeError, OverflowError)):
        fobs.loads(RAW[name])


def test_what_a_job_needs_arrives_as_it_was() -> None:
    task = DXO(DataKind.WEIGHTS, data={"a": np.arange(5, dtype=np.float32)}).to_shareable()
    task.set_cookie_jar({"contribution_round": 3})
    context = FLContext()
    context.set_prop(ReservedKey.RUN_NUM, "job", private=False)
    task.set_header("context", context)
    came = fobs.loads(fobs.dumps(task))
    assert isinstance(came, Shareable) and came.get_cookie("contribution_round") == 3
    assert from_shareable(came).data["a"].tolist() == [0, 1, 2, 3, 4]
    assert came.get_header("context").get_prop(ReservedKey.RUN_NUM) == "job"
    command = Message("train.deploy", b"zip")
    command.set_header("meta", {JobMetaKey.JOB_ID: "x"})
    assert fobs.loads(fobs.dumps(command)).headers == {"meta": {JobMetaKey.JOB_ID: "x"}}


def test_a_large_text_comes_in_a_section_of_its_own() -> None:
    assert fobs.loads(fobs.dumps({"x": "y" * (11 << 20)}))["x"] == "y" * (11 << 20)


def test_what_comes_in_one_piece_is_bounded() -> None:
    assert len(too_large()) > socket_conn.MAX_FRAME_SIZE == MOST_FRAME_BYTES


def test_values_are_counted_over_the_whole_message() -> None:
    half = [0] * (MOST_VALUES // 2 - 10)
    assert len(read([half, half])) == 2
    with pytest.raises(ValueError, match="too many"):
        read([half, half, {str(n): 0 for n in range(30)}])


class TestCookies:
    """They go back to the server with the reply."""

    def test_as_flare_comes_one_takes_a_file_with_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else what follows shows nothing."""
        (tmp_path / "file").write_text("SECRET")
        monkeypatch.setattr(lobs, "deserialize", closed_messages._deserialize)
        reply = Shareable()
        reply.set_cookie_jar({"x": read(file_of(tmp_path / "file"))})
        assert b"SECRET" in fobs.dumps(reply)

    @pytest.mark.parametrize("jar", [None, {}, [], "x", 5, {"a": 1, "b": [1], "c": {"d": 1}, 5: "x"}])
    def test_of_them_words_and_numbers_do(self, jar: Any) -> None:
        task, context = Shareable(), FLContext()
        task.set_header("__cookie_jar__", jar)
        capabilities.keep_task(task, context)
        kept = capabilities.kept_task(context)
        assert kept is not None and kept.cookies == ({"a": 1} if jar and type(jar) is dict else {})

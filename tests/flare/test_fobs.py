"""What FLARE makes of a message's bytes: it names no class. The pinned version is held to it."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
from nvflare.app_common.decomposers.numpy_decomposers import NumpyArrayDecomposer
from nvflare.fuel.utils.fobs.datum import DatumManager
from nvflare.fuel.utils.fobs.fobs import FOBS_DATA, FOBS_DECOMPOSER, FOBS_TYPE, deserialize

import histoflare.flare.admission
import histoflare.flare.executor  # noqa: F401 (what a site's job process has registered)

PLANTED = "planted_for_fobs"
DATA_CLASS = "nvflare.fuel.utils.fobs.decomposer.DataClassDecomposer"
ENUM = "nvflare.fuel.utils.fobs.decomposer.EnumTypeDecomposer"
ARRAY = "nvflare.app_common.decomposers.numpy_decomposers.NumpyArrayDecomposer"


@pytest.fixture(autouse=True)
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that a careless reader would import, and that leaves a mark."""
    path = tmp_path / "mark"
    (tmp_path / f"{PLANTED}.py").write_text(
        f"open({str(path)!r}, 'w').close()\nclass Kind: ...\nclass Decomposer: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    assert not path.exists() and PLANTED not in sys.modules


@pytest.mark.parametrize(
    ("kind", "decomposer"),
    [
        (f"{PLANTED}.Kind", f"{PLANTED}.Decomposer"),
        (f"{PLANTED}.Kind", DATA_CLASS),
        (f"{PLANTED}.Kind", ENUM),
        (f"{PLANTED}.Kind", ARRAY),
        (f"{PLANTED}.Kind", None),
        ("numpy.int16", f"{PLANTED}.Decomposer"),
        ("subprocess.Popen", DATA_CLASS),
        ("builtins.eval", DATA_CLASS),
        ("histoflare.site.configuration.SiteConfiguration", DATA_CLASS),
        ("histoflare.privacy.ledger.Ledger", DATA_CLASS),
        ("pathlib.Path", DATA_CLASS),
        ("os.system", ENUM),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_message_names_no_class(kind: str, decomposer: str | None, nested: bool) -> None:
    content = {FOBS_TYPE: kind, FOBS_DATA: {"args": "true"}}
    if decomposer is not None:
        content[FOBS_DECOMPOSER] = decomposer
    with pytest.raises((ValueError, TypeError)):
        deserialize(msgpack.packb([{"a": content}] if nested else content), DatumManager())


def test_an_array_of_objects_is_none() -> None:
    """numpy would unpickle it."""
    stream = io.BytesIO()
    np.save(stream, np.array([Path("x")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"[Oo]bject|pickle"):
        NumpyArrayDecomposer().native_recompose(stream.getvalue())

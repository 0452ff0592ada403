"""A site answers with an update or with a fixed code, and with nothing else."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants

from histoflare.bags.task import MemTask
from histoflare.flare import executor as module
from histoflare.flare.executor import SiteExecutor
from histoflare.flare.headers import ASKED, NOT_ASKED, WEIGHT
from histoflare.site.configuration import SITE_FILE, SITES_VARIABLE, write_site_file
from histoflare.flare.tensors import to_arrays
from histoflare.rounds.fedavg import FedAvg
from histoflare.rounds.state import model_state

from .bags_on_disk import ENCODER, FEATURES, LABELS, write_site
from .stand_in import StandInEngine

TASK = MemTask(LABELS, ENCODER, patch_px=224, features=FEATURES, memories=2, dim=4, hidden=4, batch_size=4)
STRATEGY = FedAvg(share=["head"])


class Site:
    """``clinic-a`` with its bags, its file in the kit's local folder, and an executor."""

    def __init__(self, root: Path, **options: Any) -> None:
        write_site_file(root / "kit" / SITE_FILE, write_site(root, "clinic-a", **options))
        self.engine = StandInEngine(root / "kit", {"task": TASK, "strategy": STRATEGY})
        self.executor = SiteExecutor(seed=5)

    def train(self, index: int = 0, asked: tuple[str, ...] = ("clinic-a",), name: str = "train") -> Shareable:
        model = to_arrays(STRATEGY.begin(model_state(TASK.build_model())))
        task = DXO(DataKind.WEIGHTS, data=model).to_shareable()
        task.set_header(ASKED, list(asked))
        task.set_header(AppConstants.CURRENT_ROUND, index)
        task.set_header(AppConstants.NUM_ROUNDS, 3)
        return self.executor.execute(name, task, self.engine.context("clinic-a"), Signal())


@pytest.fixture(autouse=True)
def _own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SITES_VARIABLE, raising=False)


def test_an_update_and_its_weight_leave_and_nothing_else(tmp_path: Path) -> None:
    reply = Site(tmp_path).train()
    assert reply.get_return_code() == ReturnCode.OK
    update = from_shareable(reply)
    assert update.data_kind == DataKind.WEIGHT_DIFF
    assert set(update.data) == {"head.weight", "head.bias"}
    assert all(np.isfinite(array).all() and array.any() for array in update.data.values())
    assert update.meta == {WEIGHT: 6.0}  # 10 slides, two in five for testing
    text = repr({**reply, "DXO": None})
    assert "clinic-a" not in text and str(tmp_path) not in text


def test_a_site_that_is_not_asked_reads_and_sends_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    (tmp_path / "kit" / SITE_FILE).unlink()
    reply = site.train(asked=("clinic-b",))
    assert reply.get_return_code() == ReturnCode.OK and reply.get_header(NOT_ASKED)
    assert "DXO" not in reply


def test_another_task_is_not_answered(tmp_path: Path) -> None:
    assert Site(tmp_path).train(name="submit_model").get_return_code() == ReturnCode.TASK_UNKNOWN


def test_a_refusal_is_a_code_without_its_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = Site(tmp_path / "missing")
    (tmp_path / "missing" / "kit" / SITE_FILE).unlink()
    other = Site(tmp_path / "other", encoder="imported:other")
    for site, code in ((missing, "SITE_NOT_CONFIGURED"), (other, "COHORT_INVALID")):
        reply = site.train()
        assert reply.get_return_code() == f"REFUSED_{code}"
        assert str(tmp_path) not in repr(dict(reply))
    # The person at the site reads why; error logs would be streamed to the server.
    assert "imported:other" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not site.engine.events, "a fired log event can be carried to the server"


def test_a_crash_is_a_code_without_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise RuntimeError("patient Doe")

    site = Site(tmp_path)
    monkeypatch.setattr(module, "site_round", crash)
    reply = site.train()
    assert reply.get_return_code() == "REFUSED_TRAINING_FAILED"
    assert "Doe" not in repr(dict(reply))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_site_keeps_its_own_state_only_of_rounds_it_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    site_round = module.site_round

    def spy(*arguments: Any, **options: Any) -> Any:
        given.append(options["site_state"])
        return site_round(*arguments, **options)

    site = Site(tmp_path)
    monkeypatch.setattr(module, "site_round", spy)
    monkeypatch.setattr(module, "DXO", None)  # the reply cannot be made
    assert site.train(0).get_return_code() == "REFUSED_TRAINING_FAILED"
    monkeypatch.setattr(module, "DXO", DXO)
    site.train(1)
    site.train(2)
    assert given[:2] == [{}, {}]
    assert "personal/blocks.0.memory.weight" in given[2]

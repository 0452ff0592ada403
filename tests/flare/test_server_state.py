"""What a strategy keeps at the server, through FLARE's objects: saved with the model, never sent."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.app_common.abstract.model import ModelLearnableKey, make_model_learnable
from nvflare.app_common.app_constant import AppConstants

from histoflare.flare import aggregator, persistor, shareables
from histoflare.flare.header_names import NUMBERS, RELEASE, WEIGHT
from histoflare.flare.job_files import START_MODEL_FILE
from histoflare.flare.result import read_result
from histoflare.flare.tensors import as_arrays, as_state
from histoflare.model_file import GLOBAL_MODEL_FILE
from histoflare.privacy.plan import Open
from histoflare.rounds.round import site_round
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, hash_state
from histoflare.rounds.strategies import STRATEGIES
from histoflare.rounds.strategy import OWN, Strategy, split
from histoflare.site.messages import digest_of

from ..rounds.test_strategy_contract import make
from ..rounds.toy import ToyTask, toy_sites
from .stand_in import StandInEngine, come_from, job_of_engine

TASK = ToyTask(hidden=4, batch_norm=True)
DATA = toy_sites(3)
SAID = {"scope": "open", "mechanism": "open", "spend": Open().spend().to_json(), "seeded_noise": False}


class Federation:
    """The server's parts of FLARE's round, with sites that are functions."""

    def __init__(self, folder: Path, strategy: Strategy, start_round: int = 0) -> None:
        self.engine = StandInEngine(
            folder,
            tuple(DATA),
            strategy=strategy,
            plan=Open(),
            task=TASK,
            kind="training",
            start_round=start_round,
            protocol={},
            run="run",
            rounds=4,
            seed=1,
        )
        self.engine.job.folder = folder
        self.strategy = strategy
        self.persistor = persistor.SeededPersistor()
        self.generator = shareables.AskingShareableGenerator()
        self.aggregator = aggregator.SiteOrderAggregator()
        self.model = self.persistor.load_model(self._context(start_round))
        self.kept: dict[str, State] = {site: {} for site in DATA}
        self.received: list[State] = []

    def _context(self, index: int) -> Any:
        fl_ctx = self.engine.context("server")
        fl_ctx.set_prop(AppConstants.CURRENT_ROUND, index, private=True, sticky=False)
        if hasattr(self, "model"):
            fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, self.model, private=True, sticky=False)
        return fl_ctx

    def run(self, index: int) -> None:
        task = self.generator.learnable_to_shareable(self.model, self._context(index))
        received = as_state(from_shareable(task).data)
        self.received.append(received)
        self.aggregator.reset(self._context(index))
        asked = self.strategy.topology.plan(index, list(DATA), 1).trainers
        for site in reversed(asked):
            outcome = site_round(
                TASK,
                self.strategy,
                received,
                DATA[site],
                site=site,
                site_state=self.kept[site],
                round_index=index,
                total_rounds=4,
                seed=1,
                plan=Open(),
            )
            self.kept[site] = outcome.site_state
            dxo = DXO(
                DataKind.WEIGHT_DIFF,
                data=as_arrays(outcome.update.tensors),
                meta={WEIGHT: outcome.update.weight, NUMBERS: dict(outcome.update.numbers)},
            )
            dxo.set_meta_prop(RELEASE, {"digest": digest_of(dxo.data), **SAID})
            reply = dxo.to_shareable()
            reply.add_cookie(AppConstants.CONTRIBUTION_ROUND, index)
            assert self.aggregator.accept(reply, come_from(site, self._context(index)))
        made = self.aggregator.aggregate(self._context(index))
        self.model = make_model_learnable(from_shareable(made).data, {})
        self.persistor.save_model(self.model, self._context(index))

    @property
    def state(self) -> tuple[State, State]:
        return split(as_state(self.model[ModelLearnableKey.WEIGHTS]))


@pytest.fixture(autouse=True)
def _own_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (aggregator, persistor, shareables):
        monkeypatch.setattr(module, "job_of", job_of_engine)
    monkeypatch.setattr(persistor, "run_folder", lambda fl_ctx: fl_ctx.get_engine().folder)
    monkeypatch.setattr(persistor, "describe_model", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(persistor, "hash_protocol", lambda _: "")

    def write(path: Path, state: State, header: Any) -> None:
        from safetensors.torch import save_file

        save_file(state, path)

    monkeypatch.setattr(persistor, "write_model_file", write)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_the_same_bytes_as_in_process_also_after_a_loss(tmp_path: Path, name: str) -> None:
    strategy = make(name)
    expected = run_in_process(TASK, DATA, strategy, 4, 1)
    (tmp_path / "first").mkdir()
    first = Federation(tmp_path / "first", strategy)
    for index in (0, 1):
        first.run(index)
    # The server is lost; a new job brings what it had written.
    second_folder = tmp_path / "second"
    second_folder.mkdir()
    written = tmp_path / "first" / GLOBAL_MODEL_FILE
    (second_folder / START_MODEL_FILE).write_bytes(written.read_bytes())
    second = Federation(second_folder, strategy, start_round=2)
    second.kept = first.kept
    for index in (2, 3):
        second.run(index)
    model, own = second.state
    assert hash_state(model) == hash_state(expected.state)
    assert hash_state(own) == hash_state(expected.own)
    assert hash_state(read_result(second_folder).state or {}) == hash_state(expected.handed_out)


def test_momentum_is_never_sent(tmp_path: Path) -> None:
    federation = Federation(tmp_path, make("fedavgm"))
    for index in (0, 1):
        federation.run(index)
    assert federation.state[1]
    assert not any(name.startswith(OWN) for received in federation.received for name in received)


def test_what_a_strategy_declares_goes_down(tmp_path: Path) -> None:
    federation = Federation(tmp_path, make("scaffold"))
    federation.run(0)
    assert any(name.startswith(OWN) for name in federation.received[0])


def test_a_model_alone_begins_the_server_s_state_anew(tmp_path: Path) -> None:
    """A new run may start from another run's model, whatever that one's strategy kept beside it."""
    (tmp_path / "first").mkdir()
    first = Federation(tmp_path / "first", make("fedavgm"))
    first.run(0)
    (tmp_path / "second").mkdir()
    written = (tmp_path / "first" / GLOBAL_MODEL_FILE).read_bytes()
    (tmp_path / "second" / START_MODEL_FILE).write_bytes(written)
    model, own = Federation(tmp_path / "second", make("fedavgm", momentum=0.1)).state
    assert hash_state(model) == hash_state(first.state[0])
    assert own and all(bool((tensor == 0).all()) for tensor in own.values())

"""What a federation's server writes, as its users open it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nvflare.app_common.abstract.model import ModelLearnableKey, make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from safetensors.torch import save_file

from histoflare.bags.task import BagTask
from histoflare.ensemble import join_models, split_models
from histoflare.errors import JobError
from histoflare.flare import persistor as persistor_module
from histoflare.flare.job import Job, read_job
from histoflare.flare.job_files import START_MODEL_FILE
from histoflare.flare.job_schema import EVALUATION
from histoflare.flare.job_variant import try_variant
from histoflare.flare.persistor import BEST_MODEL_FILE, SeededPersistor, first_state, read_state
from histoflare.flare.tensors import as_arrays, as_state
from histoflare.masks.task import MaskTask
from histoflare.model_file import GLOBAL_MODEL_FILE, read_model_file, read_model_header
from histoflare.privacy.protocol import hash_protocol
from histoflare.rounds.state import State, hash_state, model_state
from histoflare.rounds.strategies.ensemble import Ensemble
from histoflare.rounds.strategy import join, split

TINY = {"mem_fedavg": {"task.model.memories": 2}, "dhunet_fedavg": {"task.width": 24, "task.mpp": 0.5}}


@pytest.fixture(params=list(TINY))
def job(request: pytest.FixtureRequest, repository: Path) -> Job:
    return try_variant(repository / "jobs" / request.param, TINY[request.param])


@pytest.fixture
def context(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(persistor_module, "job_of", lambda _: job)
    monkeypatch.setattr(persistor_module, "run_folder", lambda _: tmp_path)
    return SimpleNamespace(get_job_id=lambda: "4c1f", get_prop={AppConstants.CURRENT_ROUND: 3}.get)


def learnable(state: State) -> Any:
    return make_model_learnable(as_arrays(state), {})


def test_the_global_model_says_all_that_its_use_needs(job: Job, context: Any, tmp_path: Path) -> None:
    state = model_state(job.task.build_model())
    SeededPersistor().save_model(learnable(state), context)
    loaded = read_model_file(tmp_path, type(job.task))
    header = loaded.header
    assert loaded.task == job.task and hash_state(loaded.state) == hash_state(state)
    assert (header.run, header.round) == ("4c1f", 3)
    assert header.protocol_sha256 == hash_protocol(job.protocol)
    assert header.training == {"strategy": "fedavg", "rounds": job.rounds, "seed": job.seed}
    if isinstance(job.task, BagTask):
        assert header.mosaic == {"mpp": 0.5, "patch_px": 224}
    else:
        assert isinstance(job.task, MaskTask) and header.mosaic is None and header.mpp == 0.5
    assert hash_state(read_state(tmp_path / GLOBAL_MODEL_FILE, like=state)) == hash_state(state)


def test_the_best_model_says_what_made_it_the_best(job: Job, context: Any, tmp_path: Path) -> None:
    state = learnable(model_state(job.task.build_model()))
    SeededPersistor().save_best(state, 0.75, "auc", context)
    header = read_model_header(tmp_path / BEST_MODEL_FILE)
    assert header.round == 2, "of the model with which this round began"
    assert (header.training["metric"], header.training["value"]) == ("auc", 0.75)


def test_an_ensemble_is_written_beside_what_the_run_goes_on_from_and_asked_as_one(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = try_variant(repository / "jobs" / "mem_fedavg", TINY["mem_fedavg"])
    strategy = Ensemble(sites=["a", "b"])
    job = replace(read, strategy=strategy, folder=tmp_path)
    monkeypatch.setattr(persistor_module, "job_of", lambda _: job)
    monkeypatch.setattr(persistor_module, "run_folder", lambda _: tmp_path)
    context: Any = SimpleNamespace(get_job_id=lambda: "4c1f", get_prop={AppConstants.CURRENT_ROUND: 3}.get)
    model, own = split(first_state(strategy, job.task))
    own = {name: tensor + (0.5 if name.startswith("b/") else 0.25) for name, tensor in own.items()}
    SeededPersistor().save_model(learnable(join(model, own)), context)
    written = tmp_path / GLOBAL_MODEL_FILE
    loaded = read_model_file(written, type(job.task))
    assert loaded.header.models == 2
    expected = strategy.models(model, own)
    assert [hash_state(each) for each in split_models(loaded.state)] == [
        hash_state(expected[site]) for site in "ab"
    ]
    resumed = read_state(written, like=first_state(strategy, job.task))
    assert hash_state(resumed) == hash_state(join(model, own))
    # A question about the file is about the ensemble, whatever strategy the asking job names.
    written.rename(tmp_path / START_MODEL_FILE)
    job = replace(read, kind=EVALUATION, folder=tmp_path)
    asked = as_state(SeededPersistor().load_model(context)[ModelLearnableKey.WEIGHTS])
    assert hash_state(asked) == hash_state(join_models(expected))
    save_file({"head.bias": torch.zeros(2)}, tmp_path / START_MODEL_FILE)
    with pytest.raises(JobError) as caught:
        SeededPersistor().load_model(context)
    assert caught.value.reason == "STATE_INVALID"


def test_what_the_protocol_leaves_open_the_model_does_not_say(repository: Path) -> None:
    job = try_variant(repository / "jobs" / "mem_fedavg", {"task.mpp": None, "task.patch_px": None})
    assert job.task.mosaic is None
    assert read_job(repository / "jobs" / "mem_fedavg").task.mosaic == {"mpp": 0.5, "patch_px": 224}

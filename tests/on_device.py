"""What is to run on another device runs there: models, batches, losses, the norms of gradients.

There is no GPU to test with. :mod:`tests.stub_device` stands in; how things are on CUDA it cannot tell.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from histoflare.bags.heatmap import BagAttention, relative_attention
from histoflare.bags.models.mem import MemSettings
from histoflare.commands.console import progress, watch_on
from histoflare.commands.options import read_device
from histoflare.flare.job import read_job
from histoflare.lab.experiment import Experiment, Runtime
from histoflare.lab.pages import write_site_pages
from histoflare.lab.run import run_watched
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan, UpdateNoise
from histoflare.rounds.bounds import Bounds, plan_bounds, train_bounds, without_noise
from histoflare.rounds.comparison import compare
from histoflare.rounds.local import predict, reproducible
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import hash_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.site import trainer
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import load_site_data
from histoflare.site.likely_time import likely_seconds
from histoflare.site.messages import TrainerSetup
from histoflare.site.work import SiteWork
from tests.bags.stand_in import memory_bags
from tests.flare.bags_on_disk import write_site
from tests.masks.made import TASK as MASK_TASK
from tests.masks.made import make_site
from tests.stub_device import STUB, Watch, register

from .mem import make_mem, make_mem_task

PLANS = [
    Open(),
    DpSgd(noise_multiplier=0.5, sample_rate=0.5, batch_size=4, noise_seed=1),
    UpdateNoise(noise_multiplier=0.5, noise_seed=1),
]
SMALL_MEM = MemSettings(memories=2, dim=4, hidden=8)
MEM_TASK = make_mem_task(
    ["benign", "tumour"],
    "toy:1",
    features=6,
    memories=3,
    dim=4,
    hidden=8,
    optimizer="sgd",
    reconstruction=0.1,
    max_patches=8,
)


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The device, which has gradients off where others are in inference mode: it knows no such tensors."""
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    return register()


def one_federation(plan: PrivacyPlan, device: str) -> list[str]:
    """Return the digests of the models of a federation and of its bounds, with noise and without."""
    sites, pooled, strategy = (
        {"a": memory_bags(0), "b": memory_bags(1)},
        memory_bags(2),
        FedAvg(weighting="uniform"),
    )
    states = [run_in_process(MEM_TASK, sites, strategy, 1, 0, plan, device=device).state]
    courses = plan_bounds(MEM_TASK, sites, strategy, 1, 0, plan)
    for each in (courses, without_noise(courses, 0)):
        bounds = train_bounds(MEM_TASK, sites, pooled, each, strategy, 0, device=device)
        assert bounds.pooled is not None
        states += [*bounds.local.values(), bounds.pooled]
    return [hash_state(state) for state in states]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.mechanism)
def test_a_federation_and_its_bounds(plan: PrivacyPlan) -> None:
    """The stub computes on the CPU, so the bytes are the CPU's: nothing is lost on the way."""
    with Watch() as watch:
        found = one_federation(plan, STUB)
    assert not watch.on_cpu
    assert watch.on_stub["tanh"] > 10 and watch.on_stub["_log_softmax"] > 10
    assert (watch.on_stub["linalg_vector_norm"] > 0) == isinstance(plan, DpSgd)
    assert found == one_federation(plan, "cpu")


def test_a_comparison() -> None:
    data, state = memory_bags(0), MEM_TASK.build_model().state_dict()
    free = Bounds({"a": state}, state)
    with Watch() as watch:
        compare(
            MEM_TASK,
            FedAvg(),
            state,
            {"a": data},
            local={"a": state},
            pooled=state,
            unprotected=free,
            external=data,
            device=STUB,
        )
    assert not watch.on_cpu and watch.on_stub["tanh"] > 10


def test_segmentation(tmp_path: Path) -> None:
    made = SiteConfiguration({"images": make_site(tmp_path / "a", 1, patients=4, side_px=64)})
    task, data = replace(MASK_TASK, local_steps=1, augmentation=False), load_site_data("a", MASK_TASK, made)
    with Watch() as watch:
        state = run_in_process(task, {"a": data}, FedAvg(), 1, 0, device=STUB).state
        found = predict(task, state, data, "test", STUB)
    assert not watch.on_cpu
    assert watch.on_stub["convolution"] > 10 and watch.on_stub["convolution_backward"] > 10
    assert len(found.patients) == 1
    for name, tensor in run_in_process(task, {"a": data}, FedAvg(), 1, 0).state.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_seed_reaches_the_device(stub: Any) -> None:
    stub.seeds.clear()
    sites = {"a": memory_bags(0)}
    run_in_process(MEM_TASK, sites, FedAvg(), 1, 0, device=STUB)
    assert len(stub.seeds) == 1


def test_only_the_cpu_is_held_to_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert trainer._environment("cpu")["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in trainer._environment("cuda:1")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with reproducible(0, "cpu"):
            assert torch.get_num_threads() == 1
        with reproducible(0, STUB):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.mechanism)
def test_a_site_of_bags_follows_its_file(plan: PrivacyPlan, tmp_path: Path, repository: Path) -> None:
    job = read_job(repository / "jobs" / "mem_fedavg")
    task = replace(job.task, model=SMALL_MEM, max_patches=16)
    site = replace(write_site(tmp_path, "a", slides=12), device=STUB, records=tmp_path / "records")
    said: list[str] = []
    work = SiteWork(TrainerSetup("a", site, task, FedAvg(weighting="uniform"), 1, "run", plan), said.append)
    arrays = {name: tensor.numpy() for name, tensor in task.build_model().state_dict().items()}
    with Watch() as watch:
        work.train(arrays, 0, 1, ["validation/auc"])
        work.evaluate(arrays, "test")
        likely_seconds(task, plan, 3, 1, STUB)
    assert not watch.on_cpu and watch.on_stub["tanh"] > 3
    assert f"a: models run on {STUB}" in said


def test_the_command_run(tmp_path: Path, repository: Path) -> None:
    from histoflare.cli import app

    for site in ("a", "b"):
        write_site(tmp_path, site, slides=12)
    options = ["--set", "task.model.memories=2", "--set", "task.model.dim=4", "--set", "task.model.hidden=8"]
    options += ["--set", "rounds=1", "--job", str(repository / "jobs" / "mem_dpsgd"), "--epsilons", ""]
    with Watch() as watch:
        found = CliRunner().invoke(
            app,
            ["run", "--sites", str(tmp_path), "--out", str(tmp_path / "out"), "--device", STUB, *options],
            catch_exceptions=False,
        )
    assert found.exit_code == 0, found.output
    assert not watch.on_cpu and watch.on_stub["tanh"] > 50


def test_a_page_of_a_site(tmp_path: Path, repository: Path) -> None:
    job = read_job(repository / "jobs" / "mem_fedavg")
    job = replace(job, task=replace(job.task, model=SMALL_MEM), rounds=1)
    sites = {site: replace(write_site(tmp_path, site, slides=12), device=STUB) for site in ("a", "b")}
    experiment = Experiment(job, sites, {}, Runtime.INPROCESS, STUB)
    with progress() as bars, Watch() as watch:
        outcome = run_watched(experiment, tmp_path / "out", watch_on(bars), ())
        write_site_pages(experiment, outcome, tmp_path / "out", watch_on(bars))
    assert not watch.on_cpu and watch.on_stub["tanh"] > 10


def test_attention() -> None:
    model, features = make_mem(2, features=6, memories=2, dim=3, hidden=4).to(STUB).eval(), torch.randn(5, 6)
    with Watch() as watch:
        relative = relative_attention(model, features)
        attention = BagAttention(model, features)
        added = attention.added(torch.randn(2, 6))
    assert not watch.on_cpu and watch.on_stub["tanh"] == 4  # twice the bag, the bag to add to, the added
    assert (relative.shape, attention.bag.shape, added.shape) == ((5,), (5,), (2,))


@pytest.mark.parametrize("left", ["model", "batch"])
def test_what_is_left_on_the_cpu_is_seen(left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two alone makes a mix, which the device refuses; both together the watch sees."""
    if left == "model":
        monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)
        with Watch() as watch:
            run_in_process(MEM_TASK, {"a": memory_bags(0)}, FedAvg(), 1, 0, device=STUB)
        assert watch.on_cpu and not watch.on_stub
    else:
        monkeypatch.setattr("histoflare.bags.task.BagBatch.to", lambda self, device: self)
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            run_in_process(MEM_TASK, {"a": memory_bags(0)}, FedAvg(), 1, 0, device=STUB)


def test_a_device_that_is_not_there_is_one_clear_error() -> None:
    assert read_device("cpu") == "cpu"
    assert read_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    from histoflare.errors import HistoflareError

    for name in ("abacus", f"{STUB}:1", "mps", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(HistoflareError):
            read_device(name)

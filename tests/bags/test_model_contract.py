"""What every model on bags must do.

A new one is covered by being registered; those of ``throwaway_models`` are covered too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from histoflare.bags.heatmap import BagAttention
from histoflare.bags.models import MODELS, build_model
from histoflare.bags.models.model import Attended, BagModel, ModelSettings
from histoflare.bags.parts import read_part, say_part
from histoflare.bags.task import BagTask
from histoflare.errors import JobError
from histoflare.flare.job import read_job
from histoflare.flare.job_variant import write_variant
from histoflare.flare.site_policy import known_models
from histoflare.privacy.plan import DpSgd
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import hash_state, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.transports.float32 import PLAIN
from tests.refusals import raises_reason

from .asked import ask
from .stand_in import memory_bags
from .throwaway_models import THROWAWAY, GatedSettings

F_IN, OUTPUTS = 6, 3
PLAN = DpSgd(noise_multiplier=0.5, sample_rate=0.5, batch_size=8, steps=4, delta=1e-5, noise_seed=3)


@pytest.fixture(params=sorted({*MODELS, *THROWAWAY}))
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model, registered as any other."""
    for word, kind in THROWAWAY.items():
        monkeypatch.setitem(MODELS, word, kind)
    return str(request.param)


@pytest.fixture
def settings(name: str) -> ModelSettings:
    return MODELS[name]()


@pytest.fixture
def model(settings: ModelSettings) -> Iterator[BagModel]:
    made = build_model(settings, F_IN, OUTPUTS, seed=1).eval()
    with torch.no_grad():
        yield made


def task_of(settings: ModelSettings, **arguments: Any) -> BagTask:
    options = {"features": F_IN, "learning_rate": 0.05, "optimizer": "sgd", "batch_size": 4, **arguments}
    return BagTask(["benign", "tumour"], "toy:1", settings, **options)


def random_bags(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn((n, F_IN), generator=generator) for n in sizes]


def padded(bags: list[Tensor], filling: float) -> tuple[Tensor, Tensor]:
    longest = max(map(len, bags)) + 2
    x, mask = torch.full((len(bags), longest, F_IN), filling), torch.zeros((len(bags), longest)).bool()
    for index, bag in enumerate(bags):
        x[index, : len(bag)], mask[index, : len(bag)] = bag, True
    return x, mask


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_it_is_named_as_registered_and_its_settings_are_json(name: str, settings: ModelSettings) -> None:
    said = json.loads(json.dumps(say_part(settings)))
    assert said["name"] == name and name in known_models()
    assert read_part("model", said, MODELS) == settings
    assert settings.problems(F_IN) == []
    assert type(settings).sample_mixing in (True, False)


def test_a_setting_that_it_has_not_is_one_error_with_those_that_it_has(name: str) -> None:
    with pytest.raises(JobError) as caught:
        task_of({"name": name, "memorys": 1})  # type: ignore[arg-type]
    assert caught.value.reason == "JOB_INVALID" and "memorys" in str(caught.value)
    for field in fields(MODELS[name]):
        assert field.name in str(caught.value)


def test_a_setting_of_no_sense_is_named(name: str) -> None:
    for field in fields(MODELS[name]):
        with raises_reason("JOB_INVALID", f"model.{field.name}: "):
            task_of({"name": name, field.name: [None]})  # type: ignore[arg-type]


@pytest.mark.parametrize("lead", [(4,), (2, 2), (1, 4)], ids=str)
def test_shapes_whatever_the_leading_axes(model: BagModel, lead: tuple[int, ...]) -> None:
    x, mask = padded(random_bags(5, 1, 7, 3), 0.0)
    flat, seen = model.attend(x, mask), model.attend(x.view(*lead, 9, F_IN), mask.view(*lead, 9))
    assert seen.outputs.shape == (*lead, OUTPUTS)
    assert seen.attention.shape == (*lead, seen.attention.shape[-2], 9)
    close(seen.outputs.reshape(4, OUTPUTS), flat.outputs)
    close(seen.attention.reshape(flat.attention.shape), flat.attention)
    if seen.auxiliary is not None and flat.auxiliary is not None:
        assert seen.auxiliary.shape == lead
        close(seen.auxiliary.flatten(), flat.auxiliary)
    close(model(x, mask), flat.outputs)


@pytest.mark.parametrize("filling", [0.0, 1e6, float("nan")])
def test_padding_and_the_rest_of_the_batch_change_nothing(model: BagModel, filling: float) -> None:
    bags = random_bags(5, 1, 7)
    together = model.attend(*padded(bags, filling))
    for index, bag in enumerate(bags):
        alone = model.attend(bag[None])
        close(together.outputs[index], alone.outputs[0])
        close(together.attention[index, :, : len(bag)], alone.attention[0])
        assert bool((together.attention[index, :, len(bag) :] == 0).all())
        if alone.auxiliary is not None and together.auxiliary is not None:
            close(together.auxiliary[index], alone.auxiliary[0])


def test_the_order_of_the_patches_changes_no_answer(model: BagModel) -> None:
    (bag,), order = random_bags(8), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    before, after = model.attend(bag[None]), model.attend(bag[order][None])
    close(after.outputs, before.outputs)
    close(after.attention, before.attention[..., order])


def test_attention_is_shares_of_the_patches(model: BagModel) -> None:
    attention = model.attend(*padded(random_bags(5, 1, 7), 0.0)).attention
    assert bool((attention >= 0).all())
    close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))


def test_a_bag_without_a_patch_is_finite(settings: ModelSettings) -> None:
    model = build_model(settings, F_IN, OUTPUTS, seed=1)
    bags = random_bags(5, 0)
    seen = model.attend(*padded(bags, float("nan")))
    assert bool(seen.outputs.isfinite().all()) and bool((seen.attention[1] == 0).all())
    total = seen.outputs.sum() + (0 if seen.auxiliary is None else seen.auxiliary.sum())
    total.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all())


def test_one_seed_makes_the_same_bytes_and_leaves_the_global_state_alone(settings: ModelSettings) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, again, other = (model_state(task_of(settings, seed=seed).build_model()) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert hash_state(first) == hash_state(again) != hash_state(other)


def test_a_records_loss_depends_on_no_other_record(settings: ModelSettings) -> None:
    task, data = task_of(settings, max_patches=3), memory_bags(0)
    assert not task.sample_mixing
    model, records = task.build_model(), task.records(data, "patient", None)[:6]
    together = task.record_losses(model, task.record_batch(data, records, 4))
    for chosen in ([2], [1, 0, 5]):
        apart = task.record_losses(model, task.record_batch(data, [records[i] for i in chosen], 4))
        close(apart, together[chosen])


def test_the_heat_map_asks_what_the_model_would_say(model: BagModel) -> None:
    bag, others = random_bags(6, 3)
    seen = BagAttention(model, bag)
    assert seen.bag.mean() == pytest.approx(1.0, abs=1e-5)
    for other, said in zip(others, seen.added(others), strict=True):
        larger = model.attend(torch.cat([bag, other[None]])[None]).attention[0]
        assert said == pytest.approx(float(larger[:, -1].mean()) * 7, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("plan", [None, PLAN], ids=["FedAvg", "DP-SGD"])
def test_it_trains_in_a_federation(settings: ModelSettings, plan: DpSgd | None) -> None:
    task, sites = task_of(settings), {f"site_{i}": memory_bags(i) for i in range(2)}
    if plan is not None:
        plan.admits(FedAvg(weighting="uniform"), task, PLAIN)
    strategy = FedAvg(weighting="uniform")
    first, again = (run_in_process(task, sites, strategy, 6, 1, plan=plan) for _ in range(2))
    assert hash_state(first.state) == hash_state(again.state) != hash_state(first.initial)
    losses = [np.mean(list(of_round.values())) for of_round in first.losses]
    assert np.isfinite(losses).all()
    if plan is None:
        assert losses[-1] < losses[0]


def test_its_file_answers_and_shows_where_it_looks(
    settings: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = BagTask(["a", "b"], "mean-colour:v1", settings, features=3, patch_px=64)
    answer, table = ask(task, tmp_path, monkeypatch)
    assert answer["predicted"] in ("a", "b") and sum(answer["probabilities"].values()) == pytest.approx(1)
    assert "p_a" in table and answer["predicted"] in table


def test_a_job_names_it(name: str, tmp_path: Path, repository: Path) -> None:
    job = write_variant(repository / "jobs" / "mem_fedavg", tmp_path / "job", {"task.model": {"name": name}})
    read = read_job(job)
    assert (read.task.model, read.task.model_name) == (MODELS[name](), name)


def test_another_model_takes_no_setting_of_the_job_s_own(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "gated", GatedSettings)
    base = repository / "jobs" / "mem_fedavg"  # MEM with a setting ``hidden`` too
    changes = {"task.model.entropy": 0.5, "task.model.name": "gated"}
    assert read_job(write_variant(base, tmp_path / "other", changes)).task.model == GatedSettings(entropy=0.5)
    same = read_job(write_variant(base, tmp_path / "same", {"task.model.name": "mem", "task.model.dim": 3}))
    assert same.task.model == replace(read_job(base).task.model, dim=3)


@dataclass(frozen=True)
class Mixing(ModelSettings):
    """Declares nothing, as a model with BatchNorm may forget to."""

    name: ClassVar[str] = "mixing"

    def problems(self, features: int) -> list[str]:
        return []

    def build(self, features: int, outputs: int) -> BagModel:
        return Normed(features, outputs)


@dataclass(frozen=True)
class Declaring(Mixing):
    sample_mixing: ClassVar[bool] = True


@dataclass(frozen=True)
class Lying(Mixing):
    sample_mixing: ClassVar[bool] = False


class Normed(BagModel):
    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, outputs))

    def _attend(self, x: Tensor, mask: Tensor) -> Attended:
        return Attended(self.head(x.mean(dim=-2).flatten(end_dim=-2)), mask[..., None, :] / mask.sum())


@pytest.mark.parametrize("mixing", [Mixing(), Declaring()], ids=["undeclared", "declared"])
def test_a_model_that_mixes_samples_is_refused_under_dp_sgd(mixing: ModelSettings) -> None:
    with pytest.raises(JobError) as caught:
        PLAN.admits(FedAvg(weighting="uniform"), task_of(mixing), PLAIN)
    assert caught.value.reason == "MODEL_NOT_PRIVATE"


def test_a_model_that_says_it_mixes_none_and_does_is_refused_too() -> None:
    task = task_of(Lying())
    PLAN.admits(FedAvg(weighting="uniform"), task, PLAIN)
    with pytest.raises(JobError) as caught:
        run_in_process(task, {"a": memory_bags(0)}, FedAvg(weighting="uniform"), 1, 1, plan=PLAN)
    assert caught.value.reason == "MODEL_NOT_PRIVATE"

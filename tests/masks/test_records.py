"""Segmentation under DP-SGD: a patient's windows make one gradient, and nobody else has a part in it."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from histoflare.masks import networks
from histoflare.masks.images import ImageCohort, load_image_cohort
from histoflare.masks.losses import cross_entropy_and_dice
from histoflare.masks.networks import NETWORKS, TRAINED, NetworkKind
from histoflare.masks.task import MaskTask
from histoflare.masks.windows import IGNORE
from histoflare.model_file import read_model_file, save_model
from histoflare.optimizers import SGD
from histoflare.privacy.gradients import sum_one_by_one
from histoflare.privacy.noise import SeededNoise
from histoflare.privacy.plan import DpSgd, PrivacyPlan, UpdateNoise
from histoflare.privacy.requirements import check_model
from histoflare.rounds.bounds import plan_bounds, train_alone
from histoflare.rounds.local import one_thread, predict, train_locally
from histoflare.rounds.private import train_privately
from histoflare.rounds.round import count_sent, count_sent_by_job
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import hash_state, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategies.fedsgd import FedSgd
from histoflare.rounds.task import PartlyTrained, PerRecord
from histoflare.rounds.transports.float32 import PLAIN
from histoflare.site.likely_time import likely_seconds
from tests.refusals import raises_reason

from .made import LABELS, TASK, make_image, make_site

SMALL = replace(TASK, network="unet-monai-31m", norm="group", patch_px=32, windows_per_record=3)
IMAGES = (("p", 64), ("q", 160), ("r", 96), ("q", 64), ("s", 128))
"""Patient and side of each image, in px: of 1, 9 + 1, 4 and 4 windows."""
UNIFORM = FedAvg(weighting="uniform")


@dataclass(frozen=True)
class Plan:
    clip_norm: float = 1.0
    noise_multiplier: float | None = 0.0
    sample_rate: float = 1.0
    batch_size: float = 1.0
    steps: int = 1
    record: str = "patient"
    slides_per_patient: int | None = None


def write(folder: Path, images: Sequence[tuple[str, int]] = IMAGES) -> Path:
    """Write a site's images; return their CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "images.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "mask", "patient", "split"])
        for index, (patient, side_px) in enumerate(images):
            image, mask = make_image(index, side_px)
            Image.fromarray(image).save(folder / f"image{index}.png")
            Image.fromarray(mask).save(folder / f"mask{index}.png")
            table.writerow([f"image{index}.png", f"mask{index}.png", patient, "train"])
    return folder / "images.csv"


def load(folder: Path, **options: Any) -> ImageCohort:
    return load_image_cohort("a", write(folder, **options), LABELS, window_px=TASK.window_px)


@pytest.fixture
def cohort(tmp_path: Path) -> ImageCohort:
    return load(tmp_path)


def without(cohort: ImageCohort, patient: str) -> ImageCohort:
    rest = tuple(record for record in cohort.records if record.patient != patient)
    return ImageCohort("a", cohort.labels, rest)


def drawn(cohort: ImageCohort, seed: int = 7, task: MaskTask = SMALL) -> dict[str, bytes]:
    """Return what each patient shows in a step."""
    return {
        record[0].patient: task.record_batch(cohort, [record], seed).images.numpy().tobytes()
        for record in task.records(cohort, "patient", None)
    }


def move(task: MaskTask, cohort: ImageCohort, plan: Plan, state: dict[str, Tensor]) -> Any:
    return train_privately(task, state, cohort, plan=plan, noise=SeededNoise(0), seed=0)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in one))


def test_records_are_patients_or_images(cohort: ImageCohort) -> None:
    assert isinstance(SMALL, PerRecord) and isinstance(SMALL, PartlyTrained)
    names = ["".join(image.patient for image in record) for record in SMALL.records(cohort, "patient", None)]
    assert names == ["p", "qq", "r", "s"]
    assert len(SMALL.records(cohort, "slide", 1)) == 4


def test_every_patient_shows_as_many_windows(cohort: ImageCohort) -> None:
    task = replace(SMALL, windows_per_record=12, augmentation=False)
    for record, windows in zip(task.records(cohort, "patient", None), (1, 10, 4, 4), strict=True):
        batch = task.record_batch(cohort, [record], 3)
        assert batch.images.shape == (1, 12, 3, 32, 32) and batch.masks.shape == (1, 12, 32, 32)
        times: dict[bytes, int] = {}
        for image in batch.images[0]:
            key = image.numpy().tobytes()
            times[key] = times.get(key, 0) + 1
        assert len(times) == windows and max(times.values()) - min(times.values()) <= 1
    assert set(drawn(cohort, task=replace(task, windows_per_record=1))) == set("pqrs")


def test_draws_follow_the_seed_and_the_patient(cohort: ImageCohort) -> None:
    one, again, other = drawn(cohort), drawn(cohort), drawn(cohort, seed=8)
    assert one == again
    assert all(one[patient] != other[patient] for patient in one)
    twice = SMALL.record_batch(cohort, SMALL.records(cohort, "patient", None)[:1], 7).images[0]
    assert not torch.equal(twice[0], twice[1]), "the only window of p, augmented anew each time"


@pytest.mark.parametrize("patient", "pqrs")
def test_one_patient_more_moves_nobody_elses_windows(cohort: ImageCohort, patient: str) -> None:
    there = drawn(cohort)
    assert drawn(without(cohort, patient)) == {name: made for name, made in there.items() if name != patient}


def test_a_records_loss_is_that_of_its_own_windows(cohort: ImageCohort) -> None:
    model = SMALL.build_model()
    records = SMALL.records(cohort, "patient", None)
    batch = SMALL.record_batch(cohort, records, 1)
    losses = SMALL.record_losses(model, batch)
    for loss, images, masks in zip(losses, batch.images, batch.masks, strict=True):
        assert loss.item() == pytest.approx(cross_entropy_and_dice(model(images)[0], masks).item(), rel=1e-5)


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_a_records_gradient_is_the_same_bytes_beside_any_neighbours(
    cohort: ImageCohort, network: str
) -> None:
    task = replace(SMALL, network=network, train="decoder", patch_px=64)
    model = task.build_model().train()
    records = task.records(cohort, "patient", None)
    parameters = [each for each in model.parameters() if each.requires_grad]

    def gradient(sample: Sequence[int]) -> bytes:
        """Return the gradient of the sample's last record."""
        made = b""
        for index in sample:
            loss = task.record_losses(model, task.record_batch(cohort, [records[index]], 5))
            made = b"".join(each.numpy().tobytes() for each in torch.autograd.grad(loss.sum(), parameters))
        return made

    with one_thread():
        alone = gradient([2])
        assert gradient([0, 2]) == gradient([3, 1, 0, 2]) == alone != gradient([1])


def test_no_patient_moves_a_step_by_more_than_the_clip_norm(cohort: ImageCohort) -> None:
    for train in TRAINED:
        task = replace(SMALL, train=train, learning_rate=1.0, momentum=0.0, weight_decay=0.0)
        state, plan = model_state(task.build_model()), Plan(clip_norm=0.01)
        whole = move(task, cohort, plan, state).state
        for patient in "pq":
            rest = move(task, without(cohort, patient), plan, state).state
            # the state itself is rounded to float32
            assert 0.005 < distance(whole, rest) <= 0.01 * (1 + 1e-3), (train, patient)


@pytest.mark.parametrize("gone", ["image1.png", "mask1.png"])
def test_a_patient_whose_image_cannot_be_read_counts_zero(cohort: ImageCohort, gone: str) -> None:
    """And nothing is refused: that would tell that the patient was drawn."""
    task, plan = replace(SMALL, windows_per_record=12), Plan()
    state = model_state(task.build_model())
    expected = move(task, without(cohort, "q"), plan, state)
    image = next(record.image for record in cohort.records if record.image.name == "image1.png")
    (image.parent / gone).unlink()
    got = move(task, replace(cohort, cache=replace(cohort.cache, images={}, grids={})), plan, state)
    assert hash_state(got.state) == hash_state(expected.state)
    assert len(got.failures) == 1 and expected.failures == () and got.n_samples == 4


def test_a_patient_of_whom_nothing_is_annotated_counts_zero(tmp_path: Path) -> None:
    write(tmp_path)
    mask = np.full((64, 64), IGNORE, np.uint8)
    mask[0, 0] = 0  # at half the size nobody sees it
    Image.fromarray(mask).save(tmp_path / "mask0.png")
    cohort = load_image_cohort("a", tmp_path / "images.csv", LABELS, window_px=64)
    state = model_state(SMALL.build_model())
    got = move(SMALL, cohort, Plan(), state)
    assert hash_state(got.state) == hash_state(move(SMALL, without(cohort, "p"), Plan(), state).state)
    assert len(got.failures) == 1


@pytest.mark.parametrize("strategy", [UNIFORM, FedSgd(weighting="uniform")], ids=["fedavg", "fedsgd"])
@pytest.mark.parametrize("mechanism", [UpdateNoise, DpSgd])
def test_noise_leaves_where_a_mask_is_gone(tmp_path: Path, strategy: FedAvg, mechanism: Any) -> None:
    """That a file could not be read is no reason to refuse, whatever sends the update."""
    cohort = load(tmp_path)
    (tmp_path / "mask1.png").unlink()
    plan = mechanism(clip_norm=0.1, noise_multiplier=1.0, noise_seed=1)
    run = run_in_process(SMALL, {"a": cohort}, strategy, rounds=1, seed=1, plan=plan)
    assert run.participation == (("a",),)


def test_memory_holds_one_record_at_a_time(cohort: ImageCohort) -> None:
    seen = []

    class Watched(MaskTask):
        def record_losses(self, model: nn.Module, batch: Any) -> Tensor:
            seen.append(tuple(batch.images.shape[:2]))
            return super().record_losses(model, batch)

    move(Watched(**SMALL.to_json()), cohort, Plan(), model_state(SMALL.build_model()))
    assert seen == [(1, 3)] * 4


def test_the_rate_falls_over_all_rounds_under_protection_too(
    cohort: ImageCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    real = SGD.step

    def step(self: SGD, closure: Any = None) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return real(self, closure)

    monkeypatch.setattr(SGD, "step", step)
    plan = DpSgd(noise_multiplier=1.0, sample_rate=1e-9, batch_size=1, delta=1e-10, steps=2, noise_seed=1)
    run_in_process(SMALL, {"a": cohort}, UNIFORM, rounds=2, seed=1, plan=plan)
    assert rates == pytest.approx([0.05 * (1 - i / 4) ** 0.9 for i in range(4)])


@pytest.mark.parametrize("network", sorted(NETWORKS))
@pytest.mark.parametrize("train", TRAINED)
def test_what_is_trained_is_what_is_counted_and_sent(network: str, train: str) -> None:
    task = replace(SMALL, network=network, train=train)
    model = task.build_model()
    check_model(model)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    strategy, state = UNIFORM.of_task(task), model_state(model)
    assert set(strategy.sent(state)) == trained
    counted = sum(state[name].numel() for name in trained)
    assert count_sent(strategy, state) == count_sent_by_job(UNIFORM, task) == counted
    plan = DpSgd(noise_multiplier=1.0)
    assert plan.numbers(2, counted) < plan.numbers(2, count_sent(UNIFORM, state)) or train == "all"
    assert (len(trained) < len(list(model.parameters()))) == (train != "all")
    norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False)
    }
    assert train != "norm" or trained == norms
    if train in ("decoder", "head"):  # no weight of a part is noise alone
        losses = model(torch.randn(1, 3, 64, 64))
        sum(each.square().mean() for each in losses).backward()
        assert {name for name, each in model.named_parameters() if each.grad is not None} == trained


@pytest.mark.parametrize("train", [word for word in TRAINED if word != "all"])
def test_the_rest_is_neither_moved_nor_noised_nor_kept(cohort: ImageCohort, train: str) -> None:
    task = replace(SMALL, train=train, local_steps=1, windows_per_record=1)
    trained = {name for name, each in task.build_model().named_parameters() if each.requires_grad}
    by_record = DpSgd(noise_multiplier=1.0, noise_seed=1, sample_rate=1.0)
    runs: list[tuple[FedAvg, PrivacyPlan | None]] = [
        (UNIFORM, None),
        (UNIFORM, by_record),
        (UNIFORM, UpdateNoise(noise_multiplier=1.0, noise_seed=1)),
        (FedSgd(weighting="uniform", momentum=0.5), by_record),
    ]
    for strategy, plan in runs:
        run = run_in_process(task, {"a": cohort}, strategy, rounds=1, seed=1, plan=plan)
        assert run.site_states == {"a": {}}
        moved = {name for name, each in run.state.items() if not torch.equal(each, run.initial[name])}
        assert moved == trained
        assert run.bytes_up == 4 * sum(run.state[name].numel() for name in trained)
    courses = plan_bounds(task, {"a": cohort}, UNIFORM, 1, 1)
    alone = train_alone(task, cohort, courses.local["a"], UNIFORM, 1, name="a")
    assert {name for name, each in alone.items() if not torch.equal(each, run.initial[name])} == trained


def test_a_partly_trained_model_is_a_whole_one_in_its_file(cohort: ImageCohort, tmp_path: Path) -> None:
    task = replace(SMALL, train="head")
    state = train_locally(task, model_state(task.build_model()), cohort, seed=1).state
    save_model(tmp_path / "model.safetensors", state, task)
    loaded = read_model_file(tmp_path / "model.safetensors", MaskTask)
    assert loaded.task == task and hash_state(loaded.state) == hash_state(state)
    assert len(predict(task, state, cohort, "train").patients) == len(IMAGES)


def test_what_dp_sgd_refuses_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = DpSgd(noise_multiplier=1.0)
    plan.admits(UNIFORM, SMALL, PLAIN)
    with raises_reason("MODEL_NOT_PRIVATE", "unet-monai-31m"):
        plan.admits(UNIFORM, replace(SMALL, norm="batch"), PLAIN)
    undeclared = NetworkKind(NETWORKS["unet-monai-31m"].build, "one that declares nothing")
    monkeypatch.setitem(networks.NETWORKS, "undeclared", undeclared)
    with raises_reason("MODEL_NOT_PRIVATE", "undeclared"):
        plan.admits(UNIFORM, replace(SMALL, network="undeclared"), PLAIN)
    with raises_reason("JOB_INVALID", "undeclared", "decoder"):
        replace(SMALL, network="undeclared", train="decoder").build_model()


def test_what_is_shared_must_be_trained() -> None:
    task = replace(SMALL, train="head")
    strategy = FedAvg(share=["net.conv_0"]).of_task(task)
    with raises_reason("SHARE_INVALID"):
        strategy.sent(model_state(task.build_model()))


def test_one_clipped_sum_has_every_patient_once(cohort: ImageCohort) -> None:
    model = SMALL.build_model().train()

    def losses(model: nn.Module, record: Any) -> Tensor:
        return SMALL.record_losses(model, SMALL.record_batch(cohort, [record], 1))

    found = sum_one_by_one(model, losses, SMALL.records(cohort, "patient", None), 1.0)
    assert len(found.norms) == len(found.losses) == 4 and not found.failures
    assert bool(found.norms.isfinite().all()) and float(found.norms.min()) > 0


def test_how_long_a_round_takes_is_measured() -> None:
    plan = DpSgd(noise_multiplier=1.0, sample_rate=0.5)
    seconds = likely_seconds(SMALL, plan, 2, 2)
    assert seconds is not None and seconds > 0
    assert SMALL.n_train(SMALL.longest(2, 3)) == 6


def test_a_federation_of_patients_is_the_same_bytes_again(tmp_path: Path) -> None:
    sites = {
        name: load_image_cohort(name, make_site(tmp_path / name, seed), LABELS, window_px=TASK.window_px)
        for seed, name in enumerate("ab")
    }
    plan = DpSgd(noise_multiplier=0.1, noise_seed=3, sample_rate=0.7, batch_size=2, steps=2)
    runs = [run_in_process(SMALL, sites, UNIFORM, rounds=2, seed=1, plan=plan) for _ in range(2)]
    assert hash_state(runs[0].state) == hash_state(runs[1].state) != hash_state(runs[0].initial)
    assert runs[0].participation == (("a", "b"), ("a", "b"))

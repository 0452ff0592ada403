"""The segmentation task, as a round asks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from histoflare.masks.images import ImageCohort, load_image_cohort
from histoflare.masks.predict import predict_image
from histoflare.masks.task import MaskTask
from histoflare.model_file import read_model_file, save_model
from histoflare.optimizers import SGD
from histoflare.privacy.plan import Open, UpdateNoise
from histoflare.rounds.evaluation import evaluate, merge_predictions
from histoflare.rounds.local import predict, train_locally
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import hash_state, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import PERSONAL
from histoflare.rounds.transports.float16 import Float16
from histoflare.rounds.transports.float32 import Float32
from tests.refusals import raises_reason

from .made import LABELS, TASK, make_image, make_site

GROUP = replace(TASK, norm="group")


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageCohort]:
    root = tmp_path_factory.mktemp("sites")
    return {
        site: load_image_cohort(site, make_site(root / site, seed), LABELS, window_px=TASK.window_px)
        for seed, site in enumerate(("a", "b"))
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": ["one"]}, "labels: "),
        ({"background": "stroma"}, "background: "),
        ({"network": "fcn"}, "network: "),
        ({"norm": "layer"}, "norm: "),
        ({"train": "encoder", "norm": "group"}, "train: "),
        ({"train": "head"}, "norm: "),
        ({"windows_per_record": 0}, "windows_per_record: "),
        ({"windows_per_record": 10**6}, "windows_per_record: "),
        ({"width": 24_000}, "width: "),
        ({"window_px": 8, "stride_px": 8}, "patch_px: "),
        ({"stride_px": 7}, "stride_px: "),
        ({"local_steps": 10**9}, "local_steps: "),
        ({"width": 30}, "width: "),
        ({"patch_px": 100}, "patch_px: "),
        ({"stride_px": 65}, "stride_px: "),
        ({"local_epochs": 1}, "local_epochs or local_steps: "),
        ({"local_steps": None}, "local_epochs or local_steps: "),
        ({"momentum": 1.0}, "momentum: "),
        ({"learning_rate": float("nan")}, "learning_rate: "),
        ({"augmentation": 1}, "augmentation: "),
        ({"batch_size": 0}, "batch_size: "),
        ({"mpp": -0.5}, "mpp: "),
    ],
)
def test_what_is_no_task_is_one_error(change: dict[str, Any], says: str) -> None:
    with raises_reason("JOB_INVALID", says):
        replace(TASK, **change)


def test_a_task_is_plain_json() -> None:
    assert MaskTask.from_json(TASK.to_json()) == TASK
    with raises_reason("JOB_INVALID", "'spare'"):
        MaskTask.from_json(TASK.to_json() | {"spare": 1})


def test_the_same_seed_gives_the_same_batches(sites: dict[str, ImageCohort]) -> None:
    def batches(seed: int, draw: int) -> list[torch.Tensor]:
        torch.rand(draw)  # what else a process has drawn is no matter
        return [batch.images for batch in TASK.train_batches(sites["a"], seed)]

    first, again, other = batches(1, 0), batches(1, 3), batches(2, 0)
    assert len(first) == TASK.n_steps(sites["a"]) == 2
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_an_epoch_sees_every_window_once(sites: dict[str, ImageCohort]) -> None:
    task = replace(TASK, local_epochs=1, local_steps=None, augmentation=False)
    count = task.n_train(sites["a"])
    seen = torch.cat([batch.images for batch in task.train_batches(sites["a"], 5)])
    assert len(seen) == count == 3 * 4  # three training images of 96 px, windows of 64 at both ends
    assert len({tuple(image[0, :, 0].tolist()) for image in seen}) == count
    assert task.n_steps(sites["a"]) == 3


def test_the_rate_falls_over_all_rounds(
    sites: dict[str, ImageCohort], monkeypatch: pytest.MonkeyPatch
) -> None:
    """lr·(1 - i/(rounds·steps))^0.9 at step i of the whole run."""
    rates: list[float] = []
    real = SGD.step

    def step(self: SGD, closure: Callable[[], float] | None = None) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return real(self, closure)

    monkeypatch.setattr(SGD, "step", step)
    run_in_process(GROUP, {"a": sites["a"]}, FedAvg(), rounds=3, seed=1)
    assert rates == pytest.approx([0.05 * (1 - i / 6) ** 0.9 for i in range(6)])


def test_training_learns_and_evaluation_says_so(sites: dict[str, ImageCohort]) -> None:
    task = replace(GROUP, local_steps=25, network="unet-monai-31m")
    state = model_state(task.build_model())
    before = evaluate(predict(task, state, sites["a"], "test"), bootstraps=0)["dice"].value
    trained = train_locally(task, state, sites["a"], seed=1).state
    metrics = evaluate(predict(task, trained, sites["a"], "test"), bootstraps=50)
    assert metrics["dice"].value is not None and metrics["dice"].value > 0.8
    assert before is None or before < metrics["dice"].value
    assert (metrics.n_slides, metrics.n_patients) == (2, 2)
    header, rows = task.notes(predict(task, trained, sites["a"], "test"))
    assert header == ["image", "patient", "dice_nucleus"]
    assert [row[1] for row in rows] == ["p2", "p5"]


def test_tables_of_sites_are_joined(sites: dict[str, ImageCohort]) -> None:
    state = model_state(TASK.build_model())
    tables = {site: predict(TASK, state, data, "test") for site, data in sites.items()}
    merged = evaluate(merge_predictions(tables), bootstraps=0)
    assert (merged.n_slides, merged.n_patients) == (4, 4)
    total = sum(int(table.columns["confusion"].sum()) for table in tables.values())
    right = sum(int(np.einsum("nkk->", table.columns["confusion"])) for table in tables.values())
    assert merged["pixel_accuracy"].value == pytest.approx(right / total)


@pytest.mark.parametrize(
    ("batch_norm", "stays"),
    [
        ("shared", ()),
        ("local-statistics", ("running_mean", "running_var")),
        ("local", ("running_mean", "running_var", "weight", "bias")),
    ],
)
def test_what_stays_of_batch_norm(
    sites: dict[str, ImageCohort], batch_norm: str, stays: tuple[str, ...]
) -> None:
    strategy = FedAvg(weighting="uniform", batch_norm=batch_norm)
    run = run_in_process(TASK, sites, strategy, rounds=1, seed=1)
    model = TASK.build_model()
    layers = {name for name, part in model.named_modules() if isinstance(part, torch.nn.BatchNorm2d)}
    assert layers
    kept = {f"{PERSONAL}{layer}.{part}" for layer in layers for part in stays}
    for site in sites:
        assert set(run.site_states[site]) == kept
    initial = model_state(model)
    for name in kept:
        plain = name.removeprefix(PERSONAL)
        assert torch.equal(run.state[plain], initial[plain]), "the server's stay as they were"
    moved = next(iter(layers)) + ".running_mean"
    assert torch.equal(run.state[moved], initial[moved]) == (batch_norm != "shared")


def test_noise_leaves_no_negative_variance(sites: dict[str, ImageCohort]) -> None:
    plan = UpdateNoise(clip_norm=1.0, noise_multiplier=0.7, noise_seed=1)
    run = run_in_process(TASK, sites, FedAvg(weighting="uniform"), rounds=1, seed=1, plan=plan)
    variances = [tensor for name, tensor in run.state.items() if name.endswith("running_var")]
    assert min(float(each.min()) for each in variances) == 0.0, "some would be below"
    assert predict(TASK, run.state, sites["a"], "test").columns["confusion"].sum() == 2 * 96 * 96


def test_a_network_that_noise_has_broken_is_useless_and_no_error(sites: dict[str, ImageCohort]) -> None:
    plan = UpdateNoise(clip_norm=100.0, noise_multiplier=15.6, noise_seed=1)
    run = run_in_process(TASK, sites, FedAvg(weighting="uniform"), rounds=2, seed=1, plan=plan)
    confusion = predict(TASK, run.state, sites["a"], "test").columns["confusion"]
    assert confusion.sum() == 2 * 96 * 96
    with torch.no_grad():
        model = TASK.build_model()
        model.load_state_dict(run.state)
        windows = np.zeros((1, 64, 64, 3), np.uint8)
        with raises_reason("NOT_FINITE"):
            TASK.window_probabilities(model.eval(), windows)


def test_half_precision_comes_after_the_noise(sites: dict[str, ImageCohort]) -> None:
    """What is sent is the released update, rounded; half the bytes, and the state moves by the rounding."""
    plan = UpdateNoise(clip_norm=1.0, noise_multiplier=0.1, noise_seed=3)
    runs = {
        transport.name: run_in_process(
            GROUP, sites, FedAvg(weighting="uniform"), rounds=1, seed=1, plan=plan, transport=transport
        )
        for transport in (Float32(), Float16())
    }
    assert runs["float16"].bytes_up * 2 == runs["float32"].bytes_up
    for name, full in runs["float32"].state.items():
        if full.is_floating_point():
            change = (full - runs["float32"].initial[name]).abs().max()
            assert (runs["float16"].state[name] - full).abs().max() <= 2**-10 * (change + 1)
    assert hash_state(runs["float16"].state) != hash_state(runs["float32"].state)
    with raises_reason("PRIVACY_INVALID", "float16"):
        UpdateNoise(noise_multiplier=1.0, noise_location="server").admits(
            FedAvg(weighting="uniform"), GROUP, Float16()
        )


@pytest.mark.parametrize("side_px", [40, 64, 96, 130])
@pytest.mark.parametrize(("window_px", "stride_px"), [(64, 64), (64, 32), (96, 48)])
def test_an_image_gets_one_class_a_pixel(side_px: int, window_px: int, stride_px: int) -> None:
    class Dark(torch.nn.Module):
        """Class 1 where it is dark, pixel by pixel."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.shape[2:] == (64, 64)
            dark = -50 * (images.mean(dim=1, keepdim=True) - 0.0)
            return torch.cat([-dark, dark], dim=1) + self.weight

    image, mask = make_image(3, side_px, discs=3)
    found = predict_image(Dark(), image, window_px=window_px, stride_px=stride_px, patch_px=64, batch_size=3)
    assert found.shape == mask.shape and found.dtype == np.uint8
    agreed = (found == mask).mean()
    assert agreed == 1.0 if window_px == 64 else agreed > 0.95


def test_a_model_file_brings_the_same_network_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = model_state(TASK.build_model())
    save_model(path, state, TASK, training={"rounds": 1})
    loaded = read_model_file(path, MaskTask)
    assert loaded.task == TASK and loaded.header.training == {"rounds": 1}
    assert hash_state(model_state(loaded.build_model())) == hash_state(state)
    with raises_reason("MODEL_FILE_INVALID", path.name, ".norm."):
        save_model(path, state, replace(TASK, norm="group"))


def test_an_open_round_is_the_same_bytes_again(sites: dict[str, ImageCohort]) -> None:
    runs = [run_in_process(TASK, sites, FedAvg(), rounds=2, seed=4, plan=Open()) for _ in range(2)]
    assert hash_state(runs[0].state) == hash_state(runs[1].state)

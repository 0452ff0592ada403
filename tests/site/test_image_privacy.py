"""What a segmentation job could learn from a site beside its noised updates: nothing."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from histoflare.errors import JobError
from histoflare.masks.images import load_image_cohort
from histoflare.masks.metrics import MaskPredictions
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan, UpdateNoise
from histoflare.privacy.policy import POLICIES, Policy, read_policy
from histoflare.rounds.evaluation import evaluate, merge_predictions
from histoflare.rounds.round import count_sent_by_job
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, hash_state, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import PERSONAL
from histoflare.rounds.transports.float32 import PLAIN
from histoflare.site.bookkeeping import Bookkeeping
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import load_site_data, read_roles
from histoflare.site.ledgers import audit_log_of, on_workstation, open_ledger
from histoflare.site.messages import EvaluateAnswer, TrainerSetup, digest_of
from histoflare.site.records import RUN_FILE
from histoflare.site.work import SiteWork
from tests.refusals import raises_reason

from ..masks.made import LABELS, TASK, make_site
from ..mem import make_mem_task

PLAN = UpdateNoise(clip_norm=0.5, budget_epsilon=8.0, budget_share=1.0).settled(1, 10**6)
KEEPING = FedAvg(weighting="uniform", batch_norm="local-statistics")
SHIPPED = read_policy(POLICIES / "dp-update.toml")
assert SHIPPED.protection is not None
POLICY = replace(SHIPPED, minimum_patients=2, protection=replace(SHIPPED.protection, job_share=1.0))


def arrays(state: State) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in state.items()}


def bookkeeping(site: SiteConfiguration, plan: PrivacyPlan = PLAN, policy: Policy = POLICY) -> Bookkeeping:
    return Bookkeeping(
        site, policy, plan, rounds=1, weights=10**6, run="run", labels=list(LABELS), data="images"
    )


def work(site: SiteConfiguration, plan: PrivacyPlan, roles: dict[str, str] | None) -> SiteWork:
    return SiteWork(TrainerSetup("a", site, TASK, KEEPING, 1, "run", plan, roles), lambda _: None)


@pytest.mark.parametrize("scope", ["dp-update", "open"])
def test_what_a_protected_run_keeps_shows_in_no_evaluation(tmp_path: Path, scope: str) -> None:
    """The statistics that stay have no noise: two sites that kept others say the same of one model."""
    said = []
    first = model_state(TASK.build_model())
    for seed in (0, 1):
        site = on_workstation("a", SiteConfiguration({"images": make_site(tmp_path / str(seed), seed=0)}))
        if seed:  # other patients to train on, the same to test on
            for index in (0, 1, 3):
                other = make_site(tmp_path / "other", seed=7).parent / f"image{index}.png"
                (tmp_path / str(seed) / f"image{index}.png").write_bytes(other.read_bytes())
        of_job = bookkeeping(site)
        with raises_reason("NOT_ADMITTED"):
            of_job.check_reserved()
        of_job.reserve()
        of_job.check_reserved()
        trainer = work(site, PLAN, of_job.roles)
        of_job.train(arrays(first), 0, lambda trainer=trainer: trainer.train(arrays(first), 0, 1, []))
        kept = trainer._records.load_state()
        assert kept and all(name.startswith(PERSONAL) for name in kept)
        asking = work(site, Open() if scope == "open" else PLAN, None)
        said.append((hash_state(kept), digest_of(asking.evaluate(arrays(first), "test").metrics)))
    assert said[0][0] != said[1][0], "they kept something else"
    assert said[0][1] == said[1][1], "and nobody sees it"


def test_an_unprotected_run_is_asked_with_what_it_keeps(tmp_path: Path) -> None:
    site = SiteConfiguration({"images": make_site(tmp_path / "a")})
    first = model_state(TASK.build_model())
    trainer = work(site, Open(), None)
    before = trainer.evaluate(arrays(first), "test").metrics
    trainer.train(arrays(first), 0, 1, [])
    assert trainer.evaluate(arrays(first), "test").metrics != before


def test_dp_sgd_is_refused_before_anything_is_reserved() -> None:
    with pytest.raises(JobError) as refused:
        DpSgd(noise_multiplier=1.0).admits(FedAvg(), TASK, PLAIN)
    assert refused.value.reason == "MODEL_NOT_PRIVATE"
    DpSgd(noise_multiplier=1.0).admits(FedAvg(), make_mem_task(["a", "b"], "e:v1"), PLAIN)
    PLAN.admits(FedAvg(), TASK, PLAIN)


def test_dp_sgd_on_images_is_booked_patient_by_patient(tmp_path: Path) -> None:
    """What a round costs follows from the plan alone, and a patient who is gone is no refusal."""
    task = replace(TASK, norm="group", train="head", windows_per_record=1)
    signed = read_policy(POLICIES / "dp-patient.toml")
    assert signed.protection is not None
    policy = replace(signed, minimum_patients=2, protection=replace(signed.protection, job_share=1.0))
    weights = count_sent_by_job(FedAvg(), task)
    asked = DpSgd(budget_epsilon=8.0, budget_share=0.5, sample_rate=0.5, batch_size=2, steps=2)
    plan = asked.settled(1, weights)
    site = on_workstation("a", SiteConfiguration({"images": make_site(tmp_path / "a")}))
    of_job = Bookkeeping(
        site, policy, plan, rounds=1, weights=weights, run="run", labels=list(LABELS), data="images"
    )
    of_job.reserve()
    strategy = FedAvg(weighting="uniform").of_task(task)
    trainer = SiteWork(TrainerSetup("a", site, task, strategy, 1, "run", plan, of_job.roles), lambda _: None)
    trainer.prepare()
    (tmp_path / "a" / "mask1.png").unlink()
    first = arrays(model_state(task.build_model()))
    answer = of_job.train(first, 0, lambda: trainer.train(first, 0, 1, []))
    assert {name: each.size for name, each in answer.answer.tensors.items()} == {"head.weight": 24 * 2}
    assert weights == 24 * 2
    (run,) = open_ledger(site).summary(of_job.budget).runs
    assert (run.booked, run.released, run.patients, run.spend) == (1, 1, 3, plan.spend())
    assert 0 < run.epsilon < 8


def test_a_figure_that_rests_on_few_patients_stays(tmp_path: Path) -> None:
    """Five patients, the class in the images of one: her own Dice is no figure of a cohort."""
    confusion = np.zeros((5, 2, 2), np.int64)
    confusion[:, 0, 0] = 100
    confusion[3] = [[80, 5], [5, 10]]
    table = MaskPredictions(
        LABELS, "background", {"confusion": confusion}, [f"p{i}" for i in range(5)], {}, list("abcde")
    )
    found = evaluate(table, bootstraps=0)
    assert found["dice"].patients == found["jaccard_pooled"].patients == found["dice_authors"].patients == 1
    assert found["pixel_accuracy"].patients == found["accuracy_authors"].patients == 1
    everywhere = confusion.copy()
    everywhere[..., 1] += everywhere[..., 0]
    everywhere[..., 0] = 0
    told = evaluate(replace(table, columns={"confusion": everywhere}), bootstraps=0)
    share = 15 / 500
    assert told["pixel_accuracy"].value == pytest.approx(share), "a model that says one class counts it"
    assert {told[name].patients for name in ("pixel_accuracy", "dice", "dice_pooled")} == {1}
    confusion[:, 1, 1] += 10
    assert {figure.patients for figure in evaluate(table, bootstraps=0).figures.values()} == {5}
    confusion[:, 1, 1] -= 10
    merged = evaluate(merge_predictions({"a": table, "b": table}), bootstraps=0)
    assert merged["dice"].patients == 2
    site = on_workstation("a", SiteConfiguration({"images": make_site(tmp_path / "a")}))
    metrics = {"dice": 0.5, "dice_low": 0.5, "pixel_accuracy": 0.9, "n_patients": 2.0}
    behind = {"dice": 1, "dice_low": 1, "pixel_accuracy": 2}
    assert POLICY.protection is not None
    books = bookkeeping(site, policy=replace(POLICY, protection=replace(POLICY.protection, evaluations=1)))
    answer = books.evaluate(
        arrays(model_state(TASK.build_model())), "test", "q", lambda: EvaluateAnswer(metrics, 2, behind)
    )
    assert set(answer.metrics) == {"pixel_accuracy", "n_patients"}
    noted = [event for event in audit_log_of(site).read() if event["what"] == "evaluated"]
    assert noted[-1]["too_few_patients"] == ["dice", "dice_low"] and "dice" not in noted[-1]["not_listed"]


def test_nothing_to_learn_from_is_an_update_of_noise(tmp_path: Path) -> None:
    """That no window has an annotated pixel depends on the data: under a plan nobody is told."""
    manifest = make_site(tmp_path / "a")
    cohort = load_image_cohort("a", manifest, LABELS, window_px=TASK.window_px)
    cohort.cache.grids[("train", TASK.window_px, TASK.stride_px, TASK.patch_px)] = []
    with raises_reason("SITE_HAS_NO_TRAINING_DATA"):
        run_in_process(TASK, {"a": cohort}, FedAvg(weighting="uniform"), rounds=1, seed=1)
    run = run_in_process(TASK, {"a": cohort}, FedAvg(weighting="uniform"), rounds=1, seed=1, plan=PLAN)
    name = next(name for name, each in run.state.items() if each.is_floating_point() and each.numel() > 5000)
    noise = PLAN.noise_multiplier * PLAN.clip_norm  # type: ignore[operator]
    assert float((run.state[name] - run.initial[name]).std()) == pytest.approx(noise, rel=0.1)


def test_a_site_with_bags_and_images_says_one_role_for_each_patient(tmp_path: Path) -> None:
    images = make_site(tmp_path / "a")
    files = {"manifest": tmp_path / "slides.csv", "bags": tmp_path / "bags", "images": images}
    site = SiteConfiguration(files, ledger=tmp_path / "ledger.sqlite", ledger_key=tmp_path / "keys" / "key")

    def write(split: str | None) -> None:
        with (tmp_path / "slides.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["slide", "patient", "label"] + ([] if split is None else ["split"]))
            for patient, label in (("p0", "x"), ("q", "y")):
                rows.writerow([f"{patient}.svs", patient, label] + ([] if split is None else [split]))

    write("train")
    assert read_roles(site, list(LABELS), "images")["p0"] == "train"
    for split in ("test", None):  # by the rule p0 is for testing
        write(split)
        for ask in (
            lambda: read_roles(site, list(LABELS), "images"),
            lambda: read_roles(site, ["x", "y"], "bags"),
            lambda: load_site_data("a", TASK, site),
        ):
            with raises_reason("COHORT_INVALID", "images.csv, line 2"):
                ask()
    lines = [line.rsplit(",", 2)[0] for line in images.read_text().splitlines()]
    images.write_text("\n".join(lines) + "\n")  # neither has a split column
    assert read_roles(site, list(LABELS), "images")["p0"] == "test"
    assert read_roles(site, ["x", "y"], "bags")["p0"] == "test"


def test_the_same_image_in_two_splits_is_an_error(tmp_path: Path) -> None:
    manifest = make_site(tmp_path / "a")
    for what in ("image", "mask"):  # p0 trains, p2 is tested on
        (tmp_path / "a" / f"{what}2.png").write_bytes((tmp_path / "a" / f"{what}0.png").read_bytes())
    with raises_reason("COHORT_INVALID", "image0.png (train)", "image2.png (test)"):
        load_image_cohort("a", manifest, LABELS, window_px=64)


def test_notes_of_an_earlier_version_are_of_the_same_job(tmp_path: Path) -> None:
    site = SiteConfiguration({"images": make_site(tmp_path / "a")})
    setup = TrainerSetup("a", site, TASK, FedAvg(), 1, "run")
    SiteWork(setup, lambda _: None).prepare()
    path = site.records / "run" / RUN_FILE
    text = path.read_text()
    assert '"batch_norm"' in text
    content = json.loads(text)
    del content["strategy"]["batch_norm"], content["strategy"]["trains"]
    del content["task"]["train"], content["task"]["windows_per_record"]
    path.write_text(json.dumps(content))
    SiteWork(setup, lambda _: None).prepare()
    with raises_reason("RECORDS_INVALID", "histoflare resume"):
        SiteWork(replace(setup, strategy=KEEPING), lambda _: None).prepare()


def test_two_sites_with_one_image_and_other_masks_stay_apart(tmp_path: Path) -> None:
    """The pooled bound reads each site's own mask."""
    cohorts = [load_image_cohort(n, make_site(tmp_path / n), LABELS, window_px=64) for n in "ab"]
    records = [
        replace(cohorts[1].records[0], image=cohorts[0].records[0].image, content_sha256=""),
        cohorts[0].records[0],
    ]
    cache = cohorts[0].cache
    masks = [cache.read(record, LABELS).mask for record in records]
    assert masks[0] is not masks[1]
    assert torch.equal(*(torch.tensor(mask) for mask in masks)), "here the two are alike"

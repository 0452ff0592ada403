"""A site's data, as a task asks for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from histoflare.errors import JobError
from histoflare.masks.image_manifest import read_image_manifest, write_image_manifest
from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import hash_state, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import Strategy
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import device_of, load_site_data, read_roles
from histoflare.site.kinds import BAGS, IMAGES
from histoflare.site.ledgers import on_workstation
from histoflare.site.messages import TrainerSetup
from histoflare.site.site_file import read_site_file, write_site_file
from histoflare.site.work import SiteWork
from histoflare.slides.splits import SplitRule
from tests.refusals import raises_reason

from ..masks.made import LABELS, TASK, make_site
from ..mem import make_mem_task

SEED = 7


@pytest.fixture
def site(tmp_path: Path) -> SiteConfiguration:
    return SiteConfiguration({"images": make_site(tmp_path / "site")})


def work(site: SiteConfiguration, strategy: Strategy | None = None) -> SiteWork:
    setup = TrainerSetup("a", site, TASK, strategy or FedAvg(), SEED, "run-1")
    return SiteWork(setup, lambda _: None)


def test_a_site_with_images_only_has_its_notes_and_ledger_beside_them(site: SiteConfiguration) -> None:
    assert site.records == site.files["images"].parent / "images-records"
    assert site.ledger is None
    site = on_workstation("a", site)
    assert site.ledger == site.files["images"].parent / "images-ledger" / "ledger.sqlite"
    path = site.files["images"].with_name("histoflare.toml")
    write_site_file(path, site)
    assert read_site_file(path) == site


def test_a_site_without_the_job_s_kind_of_data_says_so(tmp_path: Path, site: SiteConfiguration) -> None:
    bags_only = SiteConfiguration({"manifest": tmp_path / "manifest.csv", "bags": tmp_path / "bags"})
    for task, where, names in (
        (TASK, bags_only, "images"),
        (make_mem_task(["a", "b"], "e:v1"), site, "manifest"),
    ):
        for ask in (load_site_data, lambda _, task, where: read_roles(where, list(task.labels), task.data)):
            with raises_reason("SITE_NOT_CONFIGURED", names):
                ask("a", task, where)


def test_images_that_state_their_resolution_want_a_task_that_names_one(site: SiteConfiguration) -> None:
    """Without one nobody compares the sites; images that state nothing are taken as they are."""
    assert TASK.mpp is None
    IMAGES.check_resolution_named(TASK, site)
    rows = read_image_manifest(site.files["images"]).rows
    write_image_manifest(site.files["images"], [replace(rows[0], mpp=0.25), *rows[1:]])
    for ask in (lambda: IMAGES.check_resolution_named(TASK, site), lambda: load_site_data("a", TASK, site)):
        with pytest.raises(JobError) as refused:
            ask()
        assert refused.value.reason == "RESOLUTION_NOT_NAMED"
        assert "0.25" in str(refused.value) and "protocol.mpp" in str(refused.value)
    named = replace(TASK, mpp=0.25)
    IMAGES.check_resolution_named(named, site)
    assert len(load_site_data("a", named, site).records) == len(rows)
    BAGS.check_resolution_named(make_mem_task(["a", "b"], "e:v1"), site)


def test_roles_are_the_manifest_s(site: SiteConfiguration) -> None:
    expected = {"p0": "train", "p1": "train", "p2": "test", "p3": "train", "p4": "validation", "p5": "test"}
    assert read_roles(site, list(LABELS), "images") == expected
    only = replace(site, evaluation_only=True)
    assert set(read_roles(only, list(LABELS), "images").values()) == {"test"}
    assert {record.patient: record.split for record in load_site_data("a", TASK, site).records} == expected


def test_without_a_split_column_roles_follow_the_job_s_rule(site: SiteConfiguration) -> None:
    manifest = read_image_manifest(site.files["images"])
    write_image_manifest(site.files["images"], [replace(row, split=None) for row in manifest.rows])
    for rule in (SplitRule(0.3), SplitRule(None, 2, 0), SplitRule(0.2, 2, 1)):
        expected = {row.patient: rule.role_of(row.patient) for row in manifest.rows}
        assert read_roles(site, list(LABELS), "images", rule) == expected
        cohort = load_site_data("a", TASK, site, rule)
        assert {record.patient: record.split for record in cohort.records} == expected
        trainer = SiteWork(TrainerSetup("a", site, TASK, FedAvg(), SEED, "run", split=rule), lambda _: None)
        assert {record.patient: record.split for record in trainer._data().records} == expected


def test_a_patient_in_two_splits_is_an_error(site: SiteConfiguration) -> None:
    site.files["images"].write_text(site.files["images"].read_text().replace("p2", "p0"))
    for ask in (lambda: read_roles(site, list(LABELS), "images"), lambda: load_site_data("a", TASK, site)):
        with raises_reason("MANIFEST_INVALID", "p0"):
            ask()


def test_the_trainer_s_work_is_the_in_process_round(site: SiteConfiguration) -> None:
    first = {name: tensor.numpy() for name, tensor in model_state(TASK.build_model()).items()}
    answer = work(site).train(first, 0, 1, ["validation/dice"])
    cohort = load_site_data("a", TASK, site)
    run = run_in_process(TASK, {"a": cohort}, FedAvg(), rounds=1, seed=SEED)
    sent = {name: torch.from_numpy(array) for name, array in answer.tensors.items()}
    moved = {name: run.state[name] - run.initial[name] for name in sent}
    assert all(torch.allclose(sent[name], moved[name], atol=1e-6) for name in sent)
    assert answer.patients == 3 and answer.metric_patients == 1
    oracle = evaluate(predict(TASK, run.initial, cohort, "validation"), bootstraps=0)
    assert answer.metrics == {"validation/dice": oracle["dice"].value}
    with raises_reason("JOB_INVALID", "'validation/auc'"):
        work(site).train(first, 0, 1, ["validation/auc"])


def test_an_evaluation_notes_each_image(site: SiteConfiguration) -> None:
    first = {name: tensor.numpy() for name, tensor in model_state(TASK.build_model()).items()}
    answer = work(site).evaluate(first, "test")
    assert answer.patients == 2 and answer.metrics["n_slides"] == 2
    notes = (site.records / "run-1" / "evaluation_test.csv").read_text().splitlines()
    assert notes[0] == "image,patient,dice_nucleus"
    assert [line.split(",")[1] for line in notes[1:]] == ["p2", "p5"]


def test_pooled_data_keep_sites_apart(tmp_path: Path) -> None:
    cohorts = [
        load_site_data(name, TASK, SiteConfiguration({"images": make_site(tmp_path / name, seed)}))
        for seed, name in enumerate(("a", "b"))
    ]
    pooled = IMAGES.pool(cohorts, "pooled")
    assert {record.patient for record in pooled.records} == {f"{s}/p{i}" for s in "ab" for i in range(6)}
    run = run_in_process(TASK, {"pooled": pooled}, FedAvg(), rounds=1, seed=1)
    assert hash_state(run.state) != hash_state(run.initial)


def test_a_gpu_that_is_not_there_is_one_clear_error(site: SiteConfiguration) -> None:
    missing = replace(site, device=f"cuda:{torch.cuda.device_count()}")
    with raises_reason("SITE_NOT_CONFIGURED", missing.device):
        device_of(missing)
    assert device_of(site) == "cpu"


def test_a_device_without_float64_cannot_train(site: SiteConfiguration) -> None:
    with raises_reason("SITE_NOT_CONFIGURED", "float64"):
        device_of(replace(site, device="mps"))

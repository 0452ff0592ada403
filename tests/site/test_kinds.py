"""What every kind of data owes, run on the shipped ones and on one that is registered by a line."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from histoflare.errors import HistoflareError, JobError
from histoflare.flare.job import read_job
from histoflare.lab.sites import find_sites
from histoflare.model_file import read_model_header, save_model
from histoflare.privacy.plan import UpdateNoise
from histoflare.privacy.policy import POLICIES, read_policy
from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, hash_state, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.shipped import find_job
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import load_site_data, read_roles
from histoflare.site.kinds import BAGS, IMAGES, KINDS, DataKind, kind_of
from histoflare.site.kinds.kind import PageParts
from histoflare.site.ledgers import on_workstation
from histoflare.site.messages import TrainerSetup
from histoflare.site.overlap import check_apart
from histoflare.site.places import list_places
from histoflare.site.preview import preview
from histoflare.site.site_file import read_site_file, write_site_file
from histoflare.site.work import SiteWork
from histoflare.slides.splits import SplitRule
from tests.refusals import raises_reason

from ..flare.bags_on_disk import write_site
from ..masks.made import TASK as MASK_TASK
from ..masks.made import make_site
from .tasks import TASK as BAG_TASK
from .vectors import VECTORS, VectorTask, write_vectors

WEIGHTS = 10_000
PLAN = UpdateNoise(clip_norm=0.5, budget_epsilon=8.0, budget_share=1.0).settled(1, WEIGHTS)


@dataclass(frozen=True)
class Case:
    """A kind, a small task on it, and (folder, site, seed) → a site in a folder of its own that fits it."""

    kind: DataKind
    task: Any
    write: Callable[[Path, str, int], SiteConfiguration]


CASES = {
    "bags": Case(BAGS, BAG_TASK, lambda folder, site, seed: write_site(folder, site, 12, validation=True)),
    "images": Case(
        IMAGES,
        MASK_TASK,
        lambda folder, site, seed: SiteConfiguration(
            {"images": make_site(folder / site, seed, mark=f"{site}-")}
        ),
    ),
    "vectors": Case(
        VECTORS,
        VectorTask(),
        lambda folder, site, seed: SiteConfiguration({"vectors": write_vectors(folder, site, seed)}),
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setitem(KINDS, "vectors", VECTORS)
    return CASES[request.param]


@pytest.fixture
def site(case: Case, tmp_path: Path) -> SiteConfiguration:
    return case.write(tmp_path, "a", 0)


def say_nothing(_: str) -> None:
    """Take a line."""


def roles_in_file(case: Case, site: SiteConfiguration) -> dict[str, str]:
    """Return patient → role, as the manifest's columns have them, read without the package."""
    with case.kind.paths(site)[0].open(newline="") as opened:
        return {row["patient"]: row["split"] for row in csv.DictReader(opened)}


def drop_splits(case: Case, site: SiteConfiguration) -> None:
    """Take the split column out of a site's manifest."""
    path = case.kind.paths(site)[0]
    with path.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    names = [name for name in rows[0] if name != "split"]
    with path.open("w", newline="") as opened:
        table = csv.DictWriter(opened, names, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def test_a_kind_is_found_by_its_name(case: Case) -> None:
    assert kind_of(case.kind.name) is KINDS[case.task.data] is case.kind
    assert isinstance(case.task, case.kind.task_type())
    assert case.kind.task_field in case.task.to_json()
    others = [each.task.to_json() for each in CASES.values() if each is not case]
    assert not any(case.kind.task_field in fields for fields in others)


def test_a_kind_that_nobody_has_is_refused() -> None:
    with raises_reason("JOB_INVALID", "'films'", "bags, images"):
        kind_of("films")


def test_no_two_kinds_have_one_key_or_one_manifest() -> None:
    kinds = [case.kind for case in CASES.values()]
    keys = [key for kind in kinds for key in kind.keys]
    assert len(keys) == len(set(keys))
    assert len({kind.manifest for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("kind", [BAGS, IMAGES], ids=lambda kind: kind.name)
def test_the_job_that_asks_about_a_model_is_shipped(kind: DataKind) -> None:
    job = read_job(find_job(Path(kind.evaluation_job)))
    assert (job.kind, job.task.data) == ("evaluation", kind.name)


def test_a_task_on_other_data_is_refused(case: Case) -> None:
    case.kind.expect(case.task, "not this one")
    for other in CASES.values():
        if other is not case:
            with raises_reason("JOB_INVALID", "not this one"):
                case.kind.expect(other.task, "not this one")


def test_the_site_s_file_names_what_a_kind_needs(case: Case, site: SiteConfiguration, tmp_path: Path) -> None:
    path = tmp_path / "histoflare.toml"
    write_site_file(path, site)
    assert read_site_file(path) == site and case.kind.is_named(site)
    assert case.kind.comment in path.read_text()
    assert {place.what: place.is_there for place in list_places(path)[0]}.items() >= dict.fromkeys(
        case.kind.keys, True
    ).items()
    for key in case.kind.keys:
        path.write_text("".join(f'{each} = "x"\n' for each in case.kind.keys if each != key))
        with raises_reason(
            "SITE_NOT_CONFIGURED", path, f"{key if len(case.kind.keys) > 1 else 'manifest'}: "
        ):
            read_site_file(path)
    path.write_text("".join(f"{each} = 1\n" for each in case.kind.keys))
    with raises_reason("SITE_NOT_CONFIGURED", *(f"{key}: " for key in case.kind.keys)):
        read_site_file(path)


def test_a_site_without_such_data_says_so(case: Case, tmp_path: Path) -> None:
    other = next(each for each in CASES.values() if each is not case).write(tmp_path, "b", 0)
    for ask in (
        lambda: load_site_data("b", case.task, other),
        lambda: read_roles(other, list(case.task.labels), case.task.data),
        lambda: list(case.kind.entries(other)),
    ):
        with pytest.raises(JobError) as refused:
            ask()
        assert refused.value.reason == "SITE_NOT_CONFIGURED"


def test_a_folder_of_sites_is_found_and_configured(case: Case, tmp_path: Path) -> None:
    written = {name: case.write(tmp_path, name, 0) for name in ("a", "b")}
    found = find_sites(tmp_path, case.kind)
    assert found.sites == {name: case.kind.paths(site)[0] for name, site in written.items()}
    made = {name: case.kind.configure(name, path, None) for name, path in found.sites.items()}
    assert made == written


def test_a_cohort_has_what_its_manifest_says(case: Case, site: SiteConfiguration) -> None:
    cohort = load_site_data("a", case.task, site)
    assert cohort.name == "a"
    assert {record.patient: record.split for record in cohort.records} == roles_in_file(case, site)
    assert len({record.slide_id for record in cohort.records}) == len(cohort.records)
    assert list(cohort.train) == [record for record in cohort.records if record.split == "train"]
    assert all(isinstance(warning, str) for warning in cohort.warnings)
    cohort.read_ahead()
    cohort.read_all()


def test_roles_are_those_of_the_cohort(case: Case, site: SiteConfiguration) -> None:
    labels = list(case.task.labels)
    assert read_roles(site, labels, case.task.data) == roles_in_file(case, site)
    only = replace(site, evaluation_only=True)
    assert set(read_roles(only, labels, case.task.data).values()) == {"test"}
    drop_splits(case, site)
    for rule in (SplitRule(0.3), SplitRule(None, 2, 0)):
        roles = read_roles(site, labels, case.task.data, rule)
        assert roles == {patient: rule.role_of(patient) for patient in roles}
        cohort = load_site_data("a", case.task, site, rule)
        assert {record.patient: record.split for record in cohort.records} == roles


def test_slides_of_a_patient_are_at_least_one(case: Case, site: SiteConfiguration) -> None:
    assert case.kind.slides_of_a_patient(site, case.task.labels) == 1, "each patient has one here"


def test_pooled_data_keep_sites_apart(case: Case, tmp_path: Path) -> None:
    cohorts = [
        load_site_data(name, case.task, case.write(tmp_path, name, seed)) for seed, name in enumerate("ab")
    ]
    pooled = case.kind.pool(cohorts, "both")
    assert pooled.name == "both"
    assert {record.patient for record in pooled.records} == {
        f"{cohort.name}/{record.patient}" for cohort in cohorts for record in cohort.records
    }
    assert len(pooled.train) == sum(len(cohort.train) for cohort in cohorts)
    for together in ([], [cohorts[0], cohorts[0]]):
        with pytest.raises(HistoflareError) as refused:
            case.kind.pool(together, "both")
        assert refused.value.reason == "COHORT_INVALID"


def test_a_task_trains_on_its_data(case: Case, tmp_path: Path) -> None:
    cohorts = {
        name: load_site_data(name, case.task, case.write(tmp_path, name, seed))
        for seed, name in enumerate("ab")
    }

    def run() -> State:
        return run_in_process(case.task, cohorts, FedAvg(), rounds=2, seed=1).state

    assert hash_state(run()) == hash_state(run()) != hash_state(model_state(case.task.build_model()))
    table = predict(case.task, run(), cohorts["a"], "test")
    tested = [record.patient for record in cohorts["a"].records if record.split == "test"]
    assert sorted(table.patients) == sorted(tested)
    assert evaluate(table, bootstraps=0).n_patients == len(tested)


def test_a_trainer_s_work_is_that_in_process(case: Case, site: SiteConfiguration) -> None:
    work = SiteWork(TrainerSetup("a", site, case.task, FedAvg(), 7, "run-1"), say_nothing)
    first = model_state(case.task.build_model())
    arrays = {name: tensor.numpy() for name, tensor in first.items()}
    answer = work.train(arrays, 0, 1, [])
    cohort = load_site_data("a", case.task, site)
    assert answer.patients == len({record.patient for record in cohort.train})
    run = run_in_process(case.task, {"a": cohort}, FedAvg(), rounds=1, seed=7)
    for name, update in answer.tensors.items():
        assert update == pytest.approx((run.state[name] - first[name]).numpy(), abs=1e-5), name
    assert work.evaluate(arrays, "test").patients == len(predict(case.task, first, cohort, "test").patients)


def test_a_job_is_previewed(case: Case, site: SiteConfiguration) -> None:
    shipped = read_policy(POLICIES / "dp-update.toml")
    assert shipped.protection is not None
    policy = replace(
        shipped, minimum_patients=2, protection=replace(shipped.protection, epsilon=8.0, job_share=1.0)
    )
    site = on_workstation("a", site)
    trained = sum(role == "train" for role in roles_in_file(case, site).values())
    found = preview(site, policy, PLAN, 1, WEIGHTS, case.task)
    assert (found.patients, found.refusal, found.before) == (trained, None, 0.0)
    damaged = case.kind.paths(site)[-1]
    damaged.rename(damaged.with_name("gone"))
    try:
        refusal = preview(site, policy, PLAN, 1, WEIGHTS, case.task).refusal
    except HistoflareError as error:  # what is gone is the manifest itself
        refusal = error
    assert refusal is not None and refusal.reason in ("COHORT_INVALID", "MANIFEST_UNREADABLE")


def test_two_sites_may_not_share_anything(case: Case, tmp_path: Path) -> None:
    sites = {name: case.write(tmp_path, name, seed) for seed, name in enumerate("ab")}
    entries = list(case.kind.entries(sites["a"]))
    assert [entry.patient for entry in entries] == list(roles_in_file(case, sites["a"]))
    assert check_apart(sites, case.task.data, protected=True) == []
    with raises_reason("COHORT_INVALID", "patient a-p0: a ", " and c "):
        check_apart(sites | {"c": sites["a"]}, case.task.data, protected=False)


def test_what_is_there_fits_a_job_to_it(case: Case, site: SiteConfiguration) -> None:
    found = case.kind.find({"a": site})
    assert set(found.labels) <= set(case.task.labels)
    assert case.kind.find({}).patches is None


def test_a_model_says_what_it_works_on(case: Case, tmp_path: Path) -> None:
    save_model(tmp_path / "m.safetensors", model_state(case.task.build_model()), case.task)
    header = read_model_header(tmp_path / "m.safetensors")
    header.check_data(case.kind.name)
    for other in CASES.values():
        if other is not case:
            with pytest.raises(JobError) as refused:
                header.check_data(other.kind.name)
            assert refused.value.reason == "MODEL_FILE_INVALID"


def test_a_site_has_a_page_without_a_model(case: Case, site: SiteConfiguration) -> None:
    cohort = case.kind.load("a", case.task, site, is_over=True)
    report = {"participation": [], "sites": {}}
    page = case.kind.build_page(PageParts("a", site, cohort, case.task, None, report, most_pictures=1))
    assert page.site == "a" and len(page.slides) in (0, len(cohort.records))

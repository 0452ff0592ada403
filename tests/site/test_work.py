"""What a trainer's process does, here without the process."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from histoflare.bags.task import BagTask
from histoflare.errors import HistoflareError, JobError
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan, UpdateNoise
from histoflare.privacy.policy import POLICIES, read_policy
from histoflare.privacy.tally import TALLY, Tally
from histoflare.rounds.comparison import compare
from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict
from histoflare.rounds.state import State, hash_state, model_state
from histoflare.rounds.strategies.ensemble import Ensemble
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategies.fedsgd import FedSgd
from histoflare.rounds.strategy import join
from histoflare.rounds.tally import tally_rows
from histoflare.site.bookkeeping import Bookkeeping
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import load_site_data
from histoflare.site.ledgers import on_workstation
from histoflare.site.records import RunRecords
from histoflare.site.work import SiteWork
from histoflare.slides.manifest import read_manifest, write_manifest
from tests.refusals import raises_reason

from ..flare.bags_on_disk import FEATURES, write_site
from ..mem import with_mem
from .tasks import SEED, SHARED_BODY, SMALL, TASK, first_state, in_process, same_bytes, setup_of


@pytest.fixture
def site(tmp_path: Path) -> SiteConfiguration:
    return write_site(tmp_path, "a", slides=20)


def tensors(arrays: Any) -> State:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def move_to_validation(site: SiteConfiguration, patients: set[str]) -> None:
    rows = [
        replace(row, split="validation") if row.patient in patients else row
        for row in read_manifest(site.files["manifest"], check_files=False).rows
    ]
    write_manifest(site.files["manifest"], rows)


def say_nothing(_: str) -> None:
    pass


@pytest.mark.parametrize(("few", "stays"), [(1, True), (2, False)])
def test_figures_over_few_patients_of_a_class_stay(tmp_path: Path, few: int, stays: bool) -> None:
    """Eight test patients are enough for the policy, and one of a class is not."""
    where = write_site(tmp_path, "a", slides=20)
    tested = [
        row for row in read_manifest(where.files["manifest"], check_files=False).rows if row.split == "test"
    ]
    moved = [row.patient for row in tested if row.label == "solid"][few:]
    rows = [
        replace(row, split="train") if row.patient in moved else row
        for row in read_manifest(where.files["manifest"], check_files=False).rows
    ]
    write_manifest(where.files["manifest"], rows)
    policy = replace(read_policy(POLICIES / "open.toml"), minimum_patients=2)
    bookkeeping = Bookkeeping(
        on_workstation("a", where),
        policy,
        Open(),
        rounds=1,
        weights=0,
        run="run-1",
        labels=list(TASK.labels),
        data="bags",
    )
    work = SiteWork(setup_of(where), say_nothing)
    answer = bookkeeping.evaluate(first_state(), "test", "q", lambda: work.evaluate(first_state(), "test"))
    figures = {
        f"{name}{end}" for name in ("accuracy", "balanced_accuracy", "auc") for end in ("", "_low", "_high")
    }
    assert figures & set(answer.metrics) == (set() if stays else figures)
    assert answer.patients == 4 + few


def test_the_cohort_is_the_tasks_and_its_memory_the_sites(site: SiteConfiguration) -> None:
    bag_bytes = 6 * FEATURES * 4  # the largest bag has 6 patches
    for cache_mb, most in ((0, 0), (2048, 20 * bag_bytes)):
        cohort = load_site_data("a", TASK, replace(site, cache_mb=cache_mb))
        for record in cohort.records:
            cohort.features(record)
        assert (cohort.name, cohort.labels, len(cohort.records)) == ("a", TASK.labels, 20)
        assert cohort.cache.held_bytes <= most
        assert len(cohort.cache.held) == (20 if cache_mb else 0)
    with pytest.raises(HistoflareError) as caught:
        load_site_data("a", replace(TASK, encoder="other:v1"), site)
    assert caught.value.reason == "COHORT_INVALID"


def test_a_round_gives_the_bytes_of_site_round(site: SiteConfiguration) -> None:
    lines: list[str] = []
    answer = SiteWork(setup_of(site), lines.append).train(first_state(), 2, 5, [])
    expected = in_process(site, model_state(TASK.build_model()), 2, {})
    assert same_bytes(answer.tensors, expected.update.tensors)
    assert (answer.weight, answer.patients, answer.metrics, answer.metric_patients) == (12.0, 12, {}, 0)
    assert any("round 3 of 5" in line for line in lines)


def test_under_a_ledger_a_damaged_bag_is_found_before_a_round(site: SiteConfiguration) -> None:
    """In a round it would fail, or be passed over, only if its patient was drawn."""
    rows = read_manifest(site.files["manifest"], check_files=False).rows
    roles = {row.patient: str(row.split) for row in rows}
    cohort = load_site_data("a", TASK, site)
    with h5py.File(cohort.train[-1].path, "r+") as file:
        file["features"][0, 0] += 1.0
    SiteWork(setup_of(site), say_nothing).prepare()
    with pytest.raises(HistoflareError) as caught:
        SiteWork(replace(setup_of(site), run="run-2", roles=roles), say_nothing).prepare()
    assert caught.value.reason == "BAG_DAMAGED"


def test_patients_are_counted_once(site: SiteConfiguration) -> None:
    rows = read_manifest(site.files["manifest"], check_files=False).rows
    train = [row for row in rows if row.split == "train"]
    both = {train[0].patient: "x", train[2].patient: "x"}
    write_manifest(
        site.files["manifest"], [replace(row, patient=both.get(row.patient, row.patient)) for row in rows]
    )
    answer = SiteWork(setup_of(site), say_nothing).train(first_state(), 0, 1, [])
    assert (answer.weight, answer.patients) == (12.0, 11)


def test_what_a_site_keeps_goes_from_round_to_round(site: SiteConfiguration) -> None:
    global_state = model_state(TASK.build_model())
    kept: State = {}
    for index in range(3):
        # A new process each time: it has the state from the disk.
        work = SiteWork(setup_of(site, strategy=SHARED_BODY), say_nothing)
        answer = work.train(first_state(), index, 3, [])
        expected = in_process(site, global_state, index, kept, SHARED_BODY)
        assert "head.weight" not in answer.tensors
        assert same_bytes(answer.tensors, expected.update.tensors)
        kept = expected.site_state
    assert hash_state(RunRecords(site.records, "run-1", "a").load_state()) == hash_state(kept)


@pytest.mark.parametrize("newest", [0, 1, 2])
def test_a_round_that_is_run_again_gives_the_same_bytes(site: SiteConfiguration, newest: int) -> None:
    setup = setup_of(site, strategy=SHARED_BODY)
    rounds = [*range(newest + 1), newest, newest]
    answers = [SiteWork(setup, say_nothing).train(first_state(), index, 3, []).tensors for index in rounds]
    assert same_bytes(answers[-1], tensors(answers[newest]))
    assert same_bytes(answers[-2], tensors(answers[newest]))
    assert newest == 0 or not same_bytes(answers[-1], tensors(answers[0]))


def test_metrics_are_of_the_model_as_it_came_and_of_validation_patients(site: SiteConfiguration) -> None:
    move_to_validation(site, {"a-p0", "a-p1", "a-p2", "a-p5"})
    asked = ["validation/balanced_accuracy", "validation/auc"]
    answer = SiteWork(setup_of(site), say_nothing).train(first_state(), 0, 1, asked)
    cohort = load_site_data("a", TASK, site)
    oracle = evaluate(predict(TASK, model_state(TASK.build_model()), cohort, "validation"))
    assert answer.metrics == {
        "validation/balanced_accuracy": oracle["balanced_accuracy"].value,
        "validation/auc": oracle["auc"].value,
    }
    assert (answer.metric_patients, answer.patients) == (2, 8), "two of each class"


def test_a_figure_that_does_not_exist_is_none(site: SiteConfiguration) -> None:
    asked = ["validation/auc", "validation/accuracy"]
    answer = SiteWork(setup_of(site), say_nothing).train(first_state(), 0, 1, asked)
    assert (answer.metrics, answer.metric_patients) == (dict.fromkeys(asked), 0)
    move_to_validation(site, {"a-p0", "a-p2"})  # both of one class
    answer = SiteWork(setup_of(site), say_nothing).train(first_state(), 0, 1, asked)
    assert answer.metrics["validation/auc"] is None and answer.metrics["validation/accuracy"] is not None
    assert answer.metric_patients == 2


@pytest.mark.parametrize("name", ["test/auc", "train/auc", "auc", "validation/loss", "validation/"])
def test_a_model_is_chosen_by_validation_patients_only(site: SiteConfiguration, name: str) -> None:
    with raises_reason("JOB_INVALID", repr(name)):
        SiteWork(setup_of(site), say_nothing).train(first_state(), 0, 1, [name])


def test_a_site_that_only_evaluates_does_not_train(site: SiteConfiguration) -> None:
    work = SiteWork(setup_of(replace(site, evaluation_only=True)), say_nothing)
    with pytest.raises(JobError) as caught:
        work.train(first_state(), 0, 1, [])
    assert caught.value.reason == "EVALUATION_ONLY"
    assert work.evaluate(first_state(), "all").patients == 20


def test_a_site_asks_an_ensemble_when_it_receives_its_round_and_at_the_end(site: SiteConfiguration) -> None:
    move_to_validation(site, {"a-p0", "a-p1", "a-p2", "a-p5"})
    strategy = Ensemble(sites=["a", "b"])
    model = model_state(TASK.build_model())
    other = {name: -4 * each if name.startswith("head") else each for name, each in model.items()}
    own = strategy.begin(model) | {f"b/{name}": other[name] - tensor for name, tensor in model.items()}
    handed_out = strategy.handed_out(model, own)
    cohort = load_site_data("a", TASK, site)
    expected = {
        split: evaluate(predict(TASK, handed_out, cohort, split), bootstraps=0)["auc"].value
        for split in ("validation", "test")
    }
    work = SiteWork(setup_of(site, strategy=strategy), say_nothing)
    received = {name: tensor.numpy() for name, tensor in join(model, own).items()}
    answer = work.train(received, 0, 1, ["validation/auc"])
    assert answer.metrics == {"validation/auc": expected["validation"]}
    asked = {name: tensor.numpy() for name, tensor in handed_out.items()}
    assert work.evaluate(asked, "test").metrics["auc"] == expected["test"]
    alone = {
        split: evaluate(predict(TASK, model, cohort, split), bootstraps=0)["auc"].value for split in expected
    }
    assert all(alone[split] != expected[split] for split in expected), "one model's figures are others"


def test_an_evaluation_has_the_figures_of_the_in_process_report(site: SiteConfiguration) -> None:
    answer = SiteWork(setup_of(site), say_nothing).evaluate(first_state(), "test")
    cohort = load_site_data("a", TASK, site)
    rows = compare(TASK, SHARED_BODY, model_state(TASK.build_model()), {"a": cohort}, seed=SEED).sites
    expected = rows["a"].federated
    assert expected is not None
    assert answer.metrics == {
        "n_slides": 8,
        "n_patients": 8,
        **{
            f"{name}{suffix}": getattr(expected[name], part)
            for name in ("accuracy", "balanced_accuracy", "auc")
            for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high"))
        },
    }
    assert answer.patients == 8


def test_an_evaluation_is_of_the_sites_own_model(site: SiteConfiguration) -> None:
    work = SiteWork(setup_of(site, strategy=SHARED_BODY), say_nothing)
    for index in range(3):
        work.train(first_state(), index, 3, [])
    answer = work.evaluate(first_state(), "train")
    kept = RunRecords(site.records, "run-1", "a").load_state()
    own = SHARED_BODY.personalize(model_state(TASK.build_model()), kept)
    table = predict(TASK, own, load_site_data("a", TASK, site), "train")
    assert answer.metrics["auc"] == evaluate(table)["auc"].value
    path = site.records / "run-1" / "evaluation_train.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["patient"] for row in rows] == list(table.patients)
    written = np.array([float(row["p_solid"]) for row in rows])
    np.testing.assert_allclose(written, table.probabilities[:, 1], atol=1e-6)


def test_counts_under_a_budget_are_not_of_what_a_site_keeps(site: SiteConfiguration) -> None:
    """It was learned without noise, under whatever scope: nobody has booked it on those it was learned of."""
    work = SiteWork(setup_of(site, strategy=SHARED_BODY), say_nothing)
    work.train(first_state(), 0, 3, [])
    tally = Tally(noise_multiplier=1.0, noise_seed=1)
    asked = SiteWork(replace(setup_of(site, strategy=SHARED_BODY), tally=tally), say_nothing)
    found = asked.tally(first_state(), "test").tensors[TALLY]
    rows = tally_rows(TASK, tensors(first_state()), load_site_data("a", TASK, site), "test")
    noise = tally.noise_source("a", TALLY, hash_state(tensors(first_state())))
    np.testing.assert_array_equal(found, tally.release_rows(rows, noise)[TALLY].numpy())


def test_predictions_that_cannot_be_written_cost_no_counts(site: SiteConfiguration) -> None:
    """They are booked by then, and a refusal could tell of what was to be written."""
    (site.records / "run-1" / "evaluation_test.csv").mkdir(parents=True)
    said: list[str] = []
    work = SiteWork(replace(setup_of(site), tally=Tally(noise_multiplier=1.0)), said.append)
    assert list(work.tally(first_state(), "test").tensors) == [TALLY]
    assert any("could not be written" in line for line in said)


def test_nothing_to_evaluate_is_a_code(site: SiteConfiguration) -> None:
    with pytest.raises(JobError) as caught:
        SiteWork(setup_of(site), say_nothing).evaluate(first_state(), "validation")
    assert caught.value.reason == "NOTHING_TO_EVALUATE"


def test_a_fault_that_was_put_right_costs_no_later_round(site: SiteConfiguration) -> None:
    work = SiteWork(setup_of(site), say_nothing)
    hidden = site.files["bags"].rename(site.files["bags"].with_name("elsewhere"))
    with pytest.raises(HistoflareError) as caught:
        work.train(first_state(), 0, 2, [])
    assert caught.value.reason == "COHORT_INVALID"
    hidden.rename(site.files["bags"])
    assert work.train(first_state(), 1, 2, []).patients == 12


@pytest.mark.parametrize(
    "plan", [DpSgd(noise_multiplier=1.0, sample_rate=1.0, steps=2), UpdateNoise(noise_multiplier=1.0)]
)
def test_a_bag_that_cannot_be_read_is_said_here_and_nowhere_else(
    site: SiteConfiguration, plan: PrivacyPlan
) -> None:
    said: list[str] = []
    setup = setup_of(replace(site, cache_mb=0), plan=plan)
    work = SiteWork(setup, said.append)
    whole = work.train(first_state(), 0, 2, [])
    assert not any("counted as nothing" in line for line in said)
    damaged = work._data().train[0]
    damaged.path.write_bytes(b"no bag any more")
    answer = work.train(first_state(), 1, 2, [])
    (line,) = [line for line in said if "counted as nothing" in line]
    assert damaged.path.name in line
    assert answer.tensors.keys() == whole.tensors.keys()
    assert (answer.weight, answer.patients, answer.metrics) == (whole.weight, whole.patients, whole.metrics)
    with pytest.raises(HistoflareError):
        SiteWork(replace(setup, plan=Open(), run="open"), say_nothing).train(first_state(), 0, 2, [])


def test_tensorboard_that_cannot_be_written_costs_no_round(site: SiteConfiguration) -> None:
    (site.records / "run-1").mkdir(parents=True)
    (site.records / "run-1" / "tensorboard").touch()
    lines: list[str] = []
    answer = SiteWork(setup_of(site), lines.append).train(first_state(), 0, 1, [])
    assert answer.patients == 12
    assert any("TensorBoard could not be written" in line for line in lines)


class CountingTask(BagTask):
    """Says how many optimizers it has made."""

    made = 0

    def build_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        type(self).made += 1
        return super().build_optimizer(model)


def test_what_a_first_step_imports_is_imported_before_a_round(site: SiteConfiguration) -> None:
    """A round's time is public, and what a first model and optimizer import can take seconds."""
    work = SiteWork(setup_of(site, CountingTask(**with_mem(SMALL))), say_nothing)
    work.prepare()
    assert CountingTask.made == 1
    work.prepare()
    assert CountingTask.made == 1, "once is enough: it is asked before every round"


NOISY = DpSgd(noise_multiplier=1.0, sample_rate=0.6, steps=2, noise_seed=3)


def roles_of(site: SiteConfiguration) -> dict[str, str]:
    rows = read_manifest(site.files["manifest"], check_files=False).rows
    return {row.patient: str(row.split) for row in rows}


def without_rows(site: SiteConfiguration, patients: set[str]) -> SiteConfiguration:
    """Return a site with the same bags and a manifest, beside the other, without these patients."""
    with site.files["manifest"].open(newline="") as file:
        header, *rows = csv.reader(file)
    path = site.files["manifest"].with_name("without.csv")
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *(row for row in rows if not patients & set(row))])
    records = site.records.with_name("records-without")
    return replace(site, files={**site.files, "manifest": path}, records=records)


@pytest.mark.parametrize("seed", range(4))
def test_who_is_left_out_is_as_if_not_there_bit_for_bit(site: SiteConfiguration, seed: int) -> None:
    """Any patients, for training and testing: the same update and the same counts under the same noise."""
    roles = roles_of(site)
    chosen = np.random.default_rng(seed).permutation(sorted(roles))[: 2 + seed]
    left_out = set(map(str, chosen))
    tally = Tally(noise_multiplier=1.0, noise_seed=1)
    setup = setup_of(site, plan=NOISY, tally=tally, roles=roles, strategy=FedAvg(weighting="uniform"))
    work = SiteWork(setup, say_nothing)
    work.prepare(left_out=left_out)
    gone = {name: role for name, role in roles.items() if name not in left_out}
    small = replace(setup, configuration=without_rows(site, left_out), roles=gone)
    other = SiteWork(small, say_nothing)
    for index in range(2):
        found = work.train(first_state(), index, 2, [], left_out)
        expected = other.train(first_state(), index, 2, [])
        assert same_bytes(found.tensors, tensors(expected.tensors))
        assert found.patients == sum(role == "train" for role in roles.values()), "by which the gate decides"
        assert (found.weight, found.metrics, found.numbers) == (1.0, {}, {})
    counts = work.tally(first_state(), "test", left_out)
    assert same_bytes(counts.tensors, tensors(other.tally(first_state(), "test").tensors))
    assert counts.patients == sum(role == "test" for role in roles.values())
    everybody = work.train(first_state(), 1, 2, [])
    assert not same_bytes(found.tensors, tensors(everybody.tensors)), "who takes part does matter"


def test_if_all_are_left_out_what_leaves_is_noise(site: SiteConfiguration) -> None:
    """An error would tell that nobody has any budget left; nor may a damaged bag of theirs be looked at."""
    said: list[str] = []
    roles = roles_of(site)
    tally = Tally(noise_multiplier=1.0, noise_seed=1)
    for strategy, plan in (
        (FedAvg(weighting="uniform"), NOISY),
        (FedSgd(weighting="uniform"), replace(NOISY, steps=1)),
    ):
        setup = setup_of(site, plan=plan, tally=tally, roles=roles, strategy=strategy, run=strategy.name)
        cohort = load_site_data("a", TASK, site)
        work = SiteWork(setup, said.append)
        work._data()
        kept = {record.path: record.path.read_bytes() for record in cohort.records}
        for path in kept:
            path.write_bytes(b"no bag any more")
        work.prepare(left_out=roles)
        found = work.train(first_state(), 0, 2, [], roles)
        counts = work.tally(first_state(), "test", roles)
        for path, content in kept.items():
            path.write_bytes(content)
        full = SiteWork(replace(setup, run=f"{strategy.name}-full"), said.append)
        shown = full.train(first_state(), 0, 2, [])
        assert {n: t.shape for n, t in found.tensors.items()} == {
            n: t.shape for n, t in shown.tensors.items()
        }
        assert (found.weight, found.patients, found.numbers) == (shown.weight, shown.patients, shown.numbers)
        assert all(np.isfinite(tensor).all() for tensor in found.tensors.values())
        noise = tally.noise_source("a", TALLY, hash_state(tensors(first_state())))
        nothing = tally.release_rows(np.zeros((0, len(counts.tensors[TALLY]))), noise)[TALLY].numpy()
        np.testing.assert_array_equal(counts.tensors[TALLY], nothing)
    assert not any("counted as nothing" in line for line in said)

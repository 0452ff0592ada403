"""The comparison asks the right model about the right patients."""

from __future__ import annotations

from dataclasses import replace

import pytest

from histoflare.rounds.bounds import Bounds, plan_bounds, train_bounds
from histoflare.rounds.comparison import compare
from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.seeds import derive_seed

from .toy import ToyTask, toy_table

TASK = ToyTask()
SITES = {"one": toy_table(1), "two": toy_table(2, n=24, shift=0.5)}
EXTERNAL = toy_table(3)


def test_every_model_is_asked_about_the_same_patients() -> None:
    federated = run_in_process(TASK, SITES, FedAvg(), 4, seed=0).state
    courses = plan_bounds(TASK, SITES, FedAvg(), 4, seed=0)
    bounds = train_bounds(TASK, SITES, SITES["one"], courses, FedAvg(), 0)
    local, pooled = bounds.local, bounds.pooled
    assert pooled is not None
    free = Bounds({"one": local["two"]}, federated)
    found = compare(
        TASK,
        FedAvg(),
        federated,
        SITES,
        local=local,
        pooled=pooled,
        unprotected=free,
        external=EXTERNAL,
        seed=5,
    )

    def score(state, data):
        return evaluate(predict(TASK, state, data, "test"), seed=derive_seed(5, "evaluate"))

    for site, data in SITES.items():
        row = found.sites[site]
        assert row.federated == score(federated, data)
        assert row.local == score(local[site], data)
        assert row.pooled == score(pooled, data)
        assert (row.n_train, row.n_test) == (len(data.y), len(data.y_test))
        assert row.pooled_unprotected == row.federated
    assert found.sites["one"].local_unprotected == score(local["two"], SITES["one"])
    assert found.sites["two"].local_unprotected is None
    assert found.pooled_unprotected == found.federated
    assert found.local_unprotected == {"one": found.local["two"]}
    three = {"federated", "pooled", "local/one", "local/two"}
    assert set(found.external) == {*three, "pooled_unprotected", "local_unprotected/one"}
    assert found.external["local/two"] == score(local["two"], EXTERNAL)
    right = sum(score(local["two"], data)["accuracy"].value * len(data.y_test) for data in SITES.values())
    assert found.local["two"]["accuracy"].value == pytest.approx(right / found.federated.n_slides)


def test_the_overall_accuracy_counts_every_slide_once() -> None:
    federated = run_in_process(TASK, SITES, FedAvg(), 4, seed=0).state
    found = compare(TASK, FedAvg(), federated, SITES)
    right = sum(row.federated["accuracy"].value * row.n_test for row in found.sites.values())
    total = sum(row.n_test for row in found.sites.values())
    assert found.federated.n_slides == total
    assert found.federated["accuracy"].value == pytest.approx(right / total)
    assert found.pooled is None
    assert found.external == {}


def test_personal_layers_are_the_sites_own() -> None:
    task = ToyTask(hidden=4)
    strategy = FedAvg(share=["body"])
    run = run_in_process(task, SITES, strategy, 4, seed=0)
    found = compare(task, strategy, run.state, SITES, site_states=run.site_states)
    own = strategy.personalize(run.state, run.site_states["two"])
    expected = evaluate(predict(task, own, SITES["two"], "test"), seed=derive_seed(0, "evaluate"))
    assert found.sites["two"].federated == expected


def test_a_site_without_test_patients_has_no_figures_and_spoils_no_others() -> None:
    empty = toy_table(1)
    sites = {**SITES, "none": replace(empty, x_test=empty.x_test[:0], y_test=empty.y_test[:0])}
    federated = run_in_process(TASK, sites, FedAvg(), 2, seed=0).state
    found = compare(TASK, FedAvg(), federated, sites)
    assert (found.sites["none"].n_test, found.sites["none"].federated) == (0, None)
    assert found.federated == compare(TASK, FedAvg(), federated, SITES).federated

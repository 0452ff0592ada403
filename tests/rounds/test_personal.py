"""FedRep, Ditto, APFL and fine-tuning: models of a site's own, against closed forms and plain training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from histoflare.privacy.plan import DpSgd, Open
from histoflare.rounds.local import predict, train_locally
from histoflare.rounds.round import server_round, site_round
from histoflare.rounds.runner import RunResult, run_in_process
from histoflare.rounds.state import State, hash_state, model_state
from histoflare.rounds.strategies.apfl import Apfl
from histoflare.rounds.strategies.ditto import Ditto
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategies.fedprox import FedProx
from histoflare.rounds.strategies.fedrep import FedRep
from histoflare.rounds.strategies.finetune import FineTune
from histoflare.rounds.strategies.own_model import MINE
from histoflare.rounds.strategy import Strategy
from histoflare.rounds.transports.float32 import PLAIN
from histoflare.seeds import derive_seed

from ..refusals import raises_reason
from .toy import RowTask, Table, ToyTask, toy_sites, toy_table

TASK = ToyTask(hidden=8, local_epochs=2)


def opposed() -> dict[str, Table]:
    """Return two sites that call the same rows by opposite labels."""
    mine = toy_table(7, n=120)
    return {"mine": mine, "theirs": Table(mine.x, 1 - mine.y, mine.x_test, 1 - mine.y_test)}


def own(strategy: Strategy, run: RunResult, site: str) -> State:
    return strategy.personalize(run.state, run.site_states[site])


def accuracies(strategy: Strategy, rounds: int = 25) -> list[float]:
    sites = opposed()
    run = run_in_process(TASK, sites, strategy, rounds, seed=0)
    tables = [predict(TASK, own(strategy, run, site), data, "test") for site, data in sites.items()]
    return [float((table.probabilities.argmax(axis=1) == table.labels).mean()) for table in tables]


@pytest.mark.parametrize(
    "strategy",
    [FedRep(share=["body"]), Ditto(pull=0.01), Apfl(alpha=0.9), FineTune()],
    ids=lambda each: each.name,
)
def test_where_no_model_serves_all_one_s_own_does(strategy: Strategy) -> None:
    assert sum(accuracies(FedAvg())) == pytest.approx(1.0)
    worst = min(accuracies(strategy))
    assert worst > (0.55 if strategy.name == "finetune" else 0.8)


def test_ditto_s_global_model_is_fedavg_s_and_its_own_is_held_near_it() -> None:
    sites = toy_sites(3)
    plain = run_in_process(TASK, sites, FedAvg(), 3, 0)

    def apart(pull: float) -> float:
        run = run_in_process(TASK, sites, Ditto(pull=pull), 3, 0)
        assert hash_state(run.state) == hash_state(plain.state)
        mine = own(Ditto(), run, "site_0")
        return sum(float((mine[name] - tensor).square().sum()) for name, tensor in run.state.items())

    assert apart(4.0) < 0.5 * apart(0.0)


def test_ditto_without_a_pull_learns_alone() -> None:
    """v_k is trained from round to round as a site by itself would be, with the same seeds."""
    site, data = "site_1", toy_sites(3)["site_1"]
    run = run_in_process(TASK, {"site_1": data}, Ditto(pull=0.0), 3, seed=5)
    alone = run.initial
    for index in range(3):
        seed = derive_seed(5, "train", site, index)
        alone = train_locally(TASK, alone, data, seed=seed, round_index=index, total_rounds=3).state
    for name, tensor in own(Ditto(), run, site).items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-5, atol=1e-6)


def test_ditto_s_first_own_model_is_fedprox_s() -> None:
    """In the first round v begins at W and is held near it: what FedProx trains with μ = λ."""
    sites = {"a": toy_table(3)}
    ditto = run_in_process(TASK, sites, Ditto(pull=0.6), 1, 0)
    prox = run_in_process(TASK, sites, FedProx(mu=0.6), 1, 0)
    for name, tensor in own(Ditto(), ditto, "a").items():
        torch.testing.assert_close(tensor, prox.state[name], rtol=1e-5, atol=1e-6)


def test_apfl_answers_with_the_mixture() -> None:
    sites, alpha = toy_sites(2), 0.3
    run = run_in_process(TASK, sites, Apfl(alpha=alpha), 2, 0)
    assert hash_state(run.state) == hash_state(run_in_process(TASK, sites, FedAvg(), 2, 0).state)
    mixed = own(Apfl(alpha=alpha), run, "site_0")
    for name, tensor in run.state.items():
        mine = run.site_states["site_0"][MINE + name]
        torch.testing.assert_close(mixed[name], alpha * mine + (1 - alpha) * tensor, rtol=1e-4, atol=1e-5)


def test_apfl_of_a_whole_part_learns_alone() -> None:
    data = {"a": toy_table(3)}
    whole = own(Apfl(alpha=1.0), run_in_process(TASK, data, Apfl(alpha=1.0), 3, 0), "a")
    alone = own(Ditto(pull=0), run_in_process(TASK, data, Ditto(pull=0), 3, 0), "a")
    for name, tensor in alone.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_fine_tuned_model_is_the_global_one_trained_further() -> None:
    data = toy_sites(2)
    run = run_in_process(TASK, data, FineTune(), 3, seed=2)
    before = run_in_process(TASK, data, FedAvg(), 2, seed=2).state
    for site, table in data.items():
        seed = derive_seed(2, "train", site, 2)
        tuned = train_locally(TASK, before, table, seed=seed, round_index=2, total_rounds=3).state
        assert hash_state(own(FineTune(), run, site)) == hash_state(tuned)
    assert hash_state(run.state) == hash_state(run_in_process(TASK, data, FedAvg(), 3, seed=2).state)


def test_fedrep_trains_the_head_and_then_the_body() -> None:
    data = toy_table(3)
    strategy = FedRep(share=["body"])
    run = run_in_process(TASK, {"a": data}, strategy, 1, seed=4)
    start, seed = run.initial, derive_seed(4, "train", "a", 0)

    def only(state: State, part: str) -> State:
        """Train one part by the gradient of that part alone: the other's weights want none."""

        class Partly(ToyTask):
            def build_model(self) -> Any:
                model = super().build_model()
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(name.startswith(part))
                return model

        task = Partly(**{**TASK.to_json()})
        return train_locally(task, state, data, seed=seed).state

    expected = only(only(start, "head"), "body")
    for name, tensor in own(strategy, run, "a").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert run.bytes_up == 4 * (5 * 8 + 8)  # the body's weights and biases


def test_several_tasks_share_one_body_and_keep_their_heads() -> None:
    """Two sites answer different questions about the same kind of rows: multi-task learning."""
    one, other = toy_table(7, n=200), toy_table(8, n=200)
    asked = (other.x[:, 0] + other.x[:, 1] > 0).long(), (other.x_test[:, 0] + other.x_test[:, 1] > 0).long()
    sites = {"one": one, "other": replace(other, y=asked[0], y_test=asked[1])}
    task = replace(TASK, hidden=16)

    def worst(strategy: Strategy) -> float:
        run = run_in_process(task, sites, strategy, 30, seed=1)
        said = [predict(task, own(strategy, run, site), data, "test") for site, data in sites.items()]
        return min(float((table.probabilities.argmax(1) == table.labels).mean()) for table in said)

    assert worst(FedRep(share=["body"])) > worst(FedAvg()) + 0.05


@pytest.mark.parametrize(
    "strategy", [FedRep(share=["body"]), Ditto(), Apfl(), FineTune()], ids=lambda s: s.name
)
def test_a_model_of_one_s_own_is_refused_under_dp_sgd(strategy: Strategy) -> None:
    with raises_reason("PRIVACY_INVALID"):
        DpSgd(noise_multiplier=1.0).admits(strategy, RowTask(), PLAIN)


def test_sites_with_different_label_sets_share_a_body_by_fedrep() -> None:
    """Multi-task: two classes at one site, three at the other, a head each; only the body is sent.

    A site that begins with a head of its own needs nothing else: the server never sees one.
    """
    two, three = replace(TASK, hidden=16), replace(TASK, hidden=16, classes=3, labels=("a", "b", "c"))
    table = toy_table(8, n=200)
    normal = torch.linspace(-1.0, 1.0, 5)
    thirds = [torch.bucketize(x @ normal, torch.tensor([-0.7, 0.7])) for x in (table.x, table.x_test)]
    parts = {
        "two": (two, toy_table(7, n=200)),
        "three": (three, replace(table, y=thirds[0], y_test=thirds[1])),
    }
    strategy, rounds = FedRep(share=["body"], weighting="uniform"), 30
    server = model_state(two.build_model())
    kept = {
        site: strategy.personal_state(model_state(task.build_model())) for site, (task, _) in parts.items()
    }
    for index in range(rounds):
        sent = []
        for site, (task, data) in parts.items():
            outcome = site_round(
                task,
                strategy,
                server,
                data,
                site=site,
                site_state=kept[site],
                round_index=index,
                total_rounds=rounds,
                seed=1,
                plan=Open(),
            )
            assert set(outcome.update.tensors) == {"body.weight", "body.bias"}
            kept[site] = outcome.site_state
            sent.append(outcome.update)
        before, server = server, server_round(strategy, server, sent, list(parts)).model
        assert torch.equal(server["head.weight"], before["head.weight"])
        mean = torch.stack([update.tensors["body.weight"] for update in sent]).double().mean(dim=0)
        torch.testing.assert_close(server["body.weight"].double(), before["body.weight"] + mean)
    for site, (task, data) in parts.items():
        model = strategy.personalize(server, kept[site])
        assert model["head.weight"].shape == (task.classes, 16)
        said = predict(task, model, data, "test")
        always = max(np.bincount(said.labels)) / len(said.labels)
        assert (said.probabilities.argmax(axis=1) == said.labels).mean() > always + 0.2

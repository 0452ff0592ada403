"""q-FedAvg, AFL and generalization adjustment: closed forms, and that the worst served are served better."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from histoflare.privacy.plan import UpdateNoise
from histoflare.rounds.local import predict, training_loss
from histoflare.rounds.round import server_round
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, hash_state
from histoflare.rounds.strategies.afl import WEIGHTS, Afl, on_simplex
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategies.feddg_ga import FedDgGa
from histoflare.rounds.strategies.qfedavg import QFedAvg
from histoflare.rounds.strategy import Strategy, Update
from histoflare.rounds.transports.float32 import PLAIN
from histoflare.seeds import derive_seed

from ..refusals import raises_reason
from .toy import RowTask, Table, ToyTask, toy_sites, toy_table

SITES = ["a", "b"]
STATE: State = {"w": torch.zeros(2).double()}


def sent(a: tuple[float, float], b: tuple[float, float], **numbers: tuple[float, float]) -> list[Update]:
    return [
        Update(site, {"w": torch.tensor(vector).double()}, 1.0, {name: v[i] for name, v in numbers.items()})
        for i, (site, vector) in enumerate(zip(SITES, (a, b), strict=True))
    ]


def test_q_fedavg_as_the_paper_has_it() -> None:
    q, rate = 2.0, 0.25
    losses, vectors = (3.0, 0.5), np.array([[1.0, 2.0], [-1.0, 0.5]])
    big_l = 1 / rate
    deltas = [-big_l * v for v in vectors]  # Δ_k = L (w - w_k)
    top = sum(loss**q * d for loss, d in zip(losses, deltas, strict=True))
    bottom = sum(
        q * loss ** (q - 1) * float(d @ d) + big_l * loss**q for loss, d in zip(losses, deltas, strict=True)
    )
    strategy = QFedAvg(q=q, learning_rate=rate)
    made = server_round(strategy, STATE, sent((1, 2), (-1, 0.5), loss_before=losses), SITES).model
    np.testing.assert_allclose(made["w"], -top / bottom, rtol=1e-12)


def test_afl_follows_the_losses_on_the_simplex() -> None:
    strategy = Afl(sites=SITES, rate=0.2)
    own = strategy.begin(STATE)
    made = server_round(strategy, STATE, sent((1, 0), (0, 1), loss_before=(2.0, 1.0)), SITES, own=own)
    np.testing.assert_allclose(made.model["w"], [0.5, 0.5])
    np.testing.assert_allclose(made.own[WEIGHTS], [0.6, 0.4])  # .5 + .4, .5 + .2, less .2 each
    again = server_round(strategy, STATE, sent((1, 0), (0, 1), loss_before=(9.0, 0.0)), SITES, own=made.own)
    np.testing.assert_allclose(again.model["w"], [0.6, 0.4])
    np.testing.assert_allclose(again.own[WEIGHTS], [1.0, 0.0])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.integers(0, 99))
def test_a_projection_on_the_simplex_is_the_nearest_point_there(point: list[float], seed: int) -> None:
    found = on_simplex(torch.tensor(point, dtype=torch.float64)).numpy()
    assert found.min() >= 0 and found.sum() == pytest.approx(1)
    others = np.random.default_rng(seed).dirichlet(np.ones(len(point)), size=50)
    distances = np.linalg.norm(others - np.array(point), axis=1)
    assert np.linalg.norm(found - np.array(point)) <= distances.min() + 1e-9


def test_generalization_adjustment_as_the_paper_has_it() -> None:
    strategy = FedDgGa(sites=SITES, step=0.2)
    own = strategy.begin(STATE)
    first = server_round(
        strategy,
        STATE,
        sent((1, 0), (0, 1), loss_before=(5.0, 5.0), loss_after=(1.0, 2.0)),
        SITES,
        own=own,
        total_rounds=10,
    )
    np.testing.assert_allclose(first.model["w"], [0.5, 0.5])  # no gap is known yet
    second = server_round(
        strategy,
        STATE,
        sent((1, 0), (0, 1), loss_before=(4.0, 3.0), loss_after=(1.0, 1.0)),
        SITES,
        own=first.own,
        round_index=1,
        total_rounds=10,
    )
    # gaps 3 and 1, mean 2, widest 1; the step of round 1 of 10 is .2 · .9
    np.testing.assert_allclose(second.model["w"], [0.68, 0.32])
    assert second.contribution == pytest.approx({"a": 0.68, "b": 0.32})


def test_what_a_site_says_is_the_loss_of_the_model_it_was_given() -> None:
    task, sites = ToyTask(hidden=4), toy_sites(2)
    run = run_in_process(task, sites, QFedAvg(), 1, seed=3)
    for site, data in sites.items():
        expected = training_loss(task, run.initial, data, derive_seed(3, "train", site, 0))
        assert run.notes[0]["numbers"][site]["loss_before"] == pytest.approx(expected)
        n_batches = task.n_steps(data)
        by_hand = [
            float(task.loss(task.build_model().eval(), batch).detach())
            for batch in task.train_batches(data, derive_seed(3, "train", site, 0))
        ]
        assert len(by_hand) == n_batches and expected == pytest.approx(sum(by_hand) / n_batches, rel=1e-6)


def outvoted() -> dict[str, Table]:
    """Return four sites that agree and one that is served badly by what they agree on."""
    sites = {f"s{index}": toy_table(index, n=80) for index in range(4)}
    other = toy_table(9, n=80)
    x, x_test = (torch.cat([-t[:, :2], t[:, 2:]], dim=1) for t in (other.x, other.x_test))
    return {**sites, "t": Table(x, other.y, x_test, other.y_test)}


def worst_loss(strategy: Strategy) -> float:
    task, sites = ToyTask(), outvoted()
    state = run_in_process(task, sites, strategy, 40, seed=0).state
    return max(training_loss(task, state, data, 0) for data in sites.values())


def test_the_worst_served_site_is_served_better() -> None:
    plain = worst_loss(FedAvg(weighting="uniform"))
    assert worst_loss(QFedAvg(q=5.0, learning_rate=0.1)) < plain
    assert worst_loss(Afl(sites=list(outvoted()), rate=0.1)) < plain - 0.02
    assert worst_loss(FedDgGa(sites=list(outvoted()), step=0.2)) < plain


def test_a_q_of_zero_is_the_plain_mean() -> None:
    sites = toy_sites(3)
    ours = run_in_process(ToyTask(), sites, QFedAvg(q=0.0), 3, 0).state
    for name, tensor in run_in_process(ToyTask(), sites, FedAvg(weighting="uniform"), 3, 0).state.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


def test_sites_that_are_not_named_are_refused_before_the_first_round() -> None:
    with raises_reason("JOB_INVALID", "site_2"):
        run_in_process(ToyTask(), toy_sites(3), Afl(sites=["site_0", "site_1"]), 1, 0)


@pytest.mark.parametrize(
    "strategy", [QFedAvg(), Afl(sites=SITES), FedDgGa(sites=SITES)], ids=lambda s: s.name
)
def test_a_loss_leaves_under_no_privacy_plan(strategy: Strategy) -> None:
    with raises_reason("PRIVACY_INVALID", "loss_before"):
        UpdateNoise(noise_multiplier=1.0).admits(strategy, RowTask(), PLAIN)


def test_an_ensemble_is_of_models_that_never_met() -> None:
    from histoflare.rounds.strategies.ensemble import Ensemble

    sites = toy_sites(2)
    strategy = Ensemble(sites=list(sites))
    run = run_in_process(ToyTask(), sites, strategy, 3, seed=0)
    for site, data in sites.items():
        alone = run_in_process(ToyTask(), {site: data}, FedAvg(), 3, seed=0).state
        for name, tensor in strategy.models(run.state, run.own)[site].items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-5, atol=1e-6)
    assert hash_state(run.state) == hash_state(run.initial)
    said = predict(ToyTask(), run.handed_out, sites["site_0"], "test").probabilities
    each = [
        predict(ToyTask(), model, sites["site_0"], "test").probabilities
        for model in strategy.models(run.state, run.own).values()
    ]
    np.testing.assert_allclose(said, np.mean(each, axis=0), atol=1e-6)

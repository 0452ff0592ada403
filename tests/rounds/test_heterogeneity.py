"""FedProx, FedNova, SCAFFOLD, FedDyn and MOON against closed forms and loops written out here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histoflare.privacy.plan import DpSgd
from histoflare.rounds.round import server_round
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, hash_state, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategies.feddyn import PULL, FedDyn
from histoflare.rounds.strategies.fednova import FedNova
from histoflare.rounds.strategies.fedprox import FedProx
from histoflare.rounds.strategies.moon import Moon, _Contrast, representation
from histoflare.rounds.strategies.scaffold import CONTROL, Scaffold
from histoflare.rounds.strategy import Update
from histoflare.rounds.transports.float32 import PLAIN

from ..refusals import raises_reason
from .toy import RowTask, Table, ToyTask, toy_sites, toy_table


@dataclass(frozen=True)
class Bowl(ToyTask):
    """F_k(w) = ½ c_k (w - m_k)²: a site's table is its curvature and its minimum, seen whole in each step."""

    steps: int = 1

    def build_model(self) -> nn.Module:
        model = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            model.weight.zero_()
        return model

    def train_batches(self, data: Table, seed: int) -> Iterator[Any]:
        for _ in range(self.steps * int(data.y[0])):
            yield data.x[0], data.x_test[0]

    def n_train(self, data: Table) -> int:
        return 1

    def n_steps(self, data: Table) -> int:
        return self.steps * int(data.y[0])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        curvature, minimum = batch
        return (0.5 * curvature * (model.weight.squeeze() - minimum) ** 2).sum()


def bowl(curvature: float, minimum: float, passes: int = 1) -> Table:
    """Return a site of :class:`Bowl` that takes ``passes`` times as many steps."""
    return Table(
        torch.tensor([curvature]), torch.tensor([passes]), torch.tensor([minimum]), torch.tensor([0])
    )


def weight_of(state: State) -> float:
    return float(state["weight"])


def test_fedprox_in_closed_form() -> None:
    """A step is w ← w - η (c (w - m) + μ (w - W))."""
    rate, c, m, mu = 0.1, 2.0, 3.0, 0.7
    got = run_in_process(
        Bowl(learning_rate=rate, steps=5), {"a": bowl(c, m)}, FedProx(mu=mu), rounds=2, seed=0
    ).state
    w = 0.0
    for _ in range(2):
        centre = w
        for _ in range(5):
            w -= rate * (c * (w - m) + mu * (w - centre))
    assert weight_of(got) == pytest.approx(w, rel=1e-5)


def test_fedprox_without_a_pull_is_fedavg_and_a_strong_one_holds_still() -> None:
    task, sites = ToyTask(hidden=4, local_epochs=3), toy_sites(3)
    plain = run_in_process(task, sites, FedAvg(), 2, 0)
    assert hash_state(run_in_process(task, sites, FedProx(mu=0), 2, 0).state) == hash_state(plain.state)

    def moved(strategy: FedAvg) -> float:
        run = run_in_process(task, sites, strategy, 1, 0)
        return sum(float((run.state[n] - t).abs().sum()) for n, t in run.initial.items())

    assert moved(FedProx(mu=5)) < 0.7 * moved(FedAvg())


def test_fedprox_takes_part_in_the_steps_of_dp_sgd() -> None:
    sites = {"a": toy_table(1)}
    plan = DpSgd(noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.2, batch_size=8, steps=6, noise_seed=1)
    strategies = (FedAvg(weighting="uniform"), FedProx(weighting="uniform", mu=3.0))
    plain, held = (run_in_process(RowTask(), sites, each, 1, 0, plan) for each in strategies)

    def moved(run: Any) -> float:
        return sum(float((run.state[n] - t).norm()) for n, t in run.initial.items())

    assert 0 < moved(held) < moved(plain)
    for each in strategies:
        plan.admits(each, RowTask(), PLAIN)


def test_fednova_finds_the_minimum_that_fedavg_misses() -> None:
    """Two sites of the same curvature, one with ten times as many steps: right is their mean."""
    sites = {"slow": bowl(1.0, -1.0, 1), "fast": bowl(1.0, 1.0, 10)}
    task = Bowl(learning_rate=0.01)

    def end(strategy: FedAvg) -> float:
        return weight_of(run_in_process(task, sites, strategy, rounds=400, seed=0).state)

    assert end(FedAvg()) > 0.7
    assert abs(end(FedNova())) < 0.05


def test_fednova_with_as_many_steps_everywhere_is_fedavg() -> None:
    sites = {name: toy_table(seed) for seed, name in enumerate("abc")}
    plain = run_in_process(ToyTask(), sites, FedAvg(), 3, 0).state
    for strategy in (FedNova(), FedNova(weighting="uniform"), FedNova(effective_steps=5.0)):
        for name, tensor in run_in_process(ToyTask(), sites, strategy, 3, 0).state.items():
            torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-6)


def test_scaffold_keeps_the_mean_of_the_sites_variates() -> None:
    sites = toy_sites(3)
    result = run_in_process(ToyTask(), sites, Scaffold(), rounds=5, seed=0)
    for name in result.state:
        mean = torch.stack([result.site_states[site][CONTROL + name] for site in sites]).mean(dim=0)
        torch.testing.assert_close(result.own[name], mean, rtol=1e-4, atol=1e-6)
        assert bool((mean != 0).any())
    alone = {"only": toy_table(3)}  # with one site the terms cancel: it is plain training
    ours = run_in_process(ToyTask(), alone, Scaffold(), rounds=3, seed=0).state
    plain = run_in_process(ToyTask(), alone, FedAvg(), rounds=3, seed=0).state
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-6)


def test_scaffold_as_the_paper_has_it_with_some_sites_a_round() -> None:
    """Algorithm 1, option II, as a loop over two numbers a site."""
    rate, steps = 0.05, 4
    bowls = {"a": (1.0, -2.0), "b": (3.0, 1.0), "c": (2.0, 4.0)}
    strategy = Scaffold(clients_per_round=2)
    sites = {name: bowl(*each) for name, each in bowls.items()}
    got = run_in_process(Bowl(learning_rate=rate, steps=steps), sites, strategy, rounds=6, seed=3)
    x, c, own = 0.0, 0.0, dict.fromkeys(bowls, 0.0)
    for taking_part in got.participation:
        ends, changes = [], []
        for site in taking_part:
            curvature, minimum = bowls[site]
            y = x
            for _ in range(steps):
                y -= rate * (curvature * (y - minimum) - own[site] + c)
            new = own[site] - c + (x - y) / (steps * rate)
            ends.append(y - x)
            changes.append(new - own[site])
            own[site] = new
        x += sum(ends) / len(ends)
        c += len(taking_part) / len(bowls) * sum(changes) / len(changes)
    assert weight_of(got.state) == pytest.approx(x, rel=1e-4)
    assert float(got.own["weight"]) == pytest.approx(c, rel=1e-4)


def test_scaffold_takes_plain_sgd_alone() -> None:
    class Adam(ToyTask):
        def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.Adam(model.parameters())

    class Falling(ToyTask):
        def decay(self, progress: float) -> float:
            return 1 - progress

    for task in (Adam(), Falling()):
        with raises_reason("JOB_INVALID", "sgd"):
            run_in_process(task, toy_sites(2), Scaffold(), 1, 0)


def test_feddyn_finds_the_minimum_of_all_that_fedavg_misses() -> None:
    """With different curvatures and many steps FedAvg ends between the sites' minima, not at Σ c m / Σ c."""
    bowls = {"a": (0.5, -2.0), "b": (4.0, 1.0)}
    sites = {name: bowl(*each) for name, each in bowls.items()}
    task = Bowl(learning_rate=0.1, steps=60)
    best = sum(c * m for c, m in bowls.values()) / sum(c for c, _ in bowls.values())
    plain = weight_of(run_in_process(task, sites, FedAvg(), 60, 0).state)
    ours = run_in_process(task, sites, FedDyn(alpha=1.0), 60, 0)
    assert abs(plain - best) > 0.5
    assert weight_of(ours.state) == pytest.approx(best, abs=1e-3)
    # at the end each site's own gradient is that of its loss at the common minimum, and they sum to 0
    for site, (c, m) in bowls.items():
        assert float(ours.site_states[site][PULL + "weight"]) == pytest.approx(c * (best - m), abs=1e-2)


def test_feddyn_as_the_paper_has_it_with_some_sites_a_round() -> None:
    rate, steps, alpha = 0.05, 3, 0.5
    bowls = {"a": (1.0, -2.0), "b": (3.0, 1.0), "c": (2.0, 4.0)}
    sites = {name: bowl(*each) for name, each in bowls.items()}
    strategy = FedDyn(alpha=alpha, clients_per_round=2)
    got = run_in_process(Bowl(learning_rate=rate, steps=steps), sites, strategy, 5, 3)
    x, h, own = 0.0, 0.0, dict.fromkeys(bowls, 0.0)
    for taking_part in got.participation:
        changes = []
        for site in taking_part:
            c, m = bowls[site]
            y = x
            for _ in range(steps):
                y -= rate * (c * (y - m) - own[site] + alpha * (y - x))
            own[site] -= alpha * (y - x)
            changes.append(y - x)
        h -= alpha * sum(changes) / len(bowls)
        x += sum(changes) / len(changes) - h / alpha
    assert weight_of(got.state) == pytest.approx(x, rel=1e-4)


def test_moon_s_term_as_the_paper_has_it() -> None:
    task = ToyTask(hidden=4)
    rows = toy_table(1)
    batch = (rows.x[:6], rows.y[:6])
    models = []
    for seed in range(3):
        model = ToyTask(hidden=4, seed=seed).build_model()
        models.append(model.eval())
    current, near, far = models
    z, z_g, z_l = (representation(task, each, batch) for each in models)
    assert z.shape == (6, 4)
    torch.testing.assert_close(z, current.act(current.body(batch[0])))
    mu, tau = 0.7, 0.3
    s_g, s_l = F.cosine_similarity(z, z_g) / tau, F.cosine_similarity(z, z_l) / tau
    expected = task.loss(current, batch) + mu * (-(s_g.exp() / (s_g.exp() + s_l.exp())).log()).mean()
    hook = _Contrast(task, model_state(near), model_state(far), mu, tau)
    torch.testing.assert_close(hook.loss(current, batch, task.loss(current, batch)), expected)


def test_moon_is_fedavg_in_a_site_s_first_round_and_not_in_its_second() -> None:
    task, sites = ToyTask(hidden=4, local_epochs=2), toy_sites(2)
    one, two = (run_in_process(task, sites, Moon(mu=2.0), rounds, 0).state for rounds in (1, 2))
    plain_one, plain_two = (run_in_process(task, sites, FedAvg(), rounds, 0).state for rounds in (1, 2))
    assert hash_state(one) == hash_state(plain_one)
    assert hash_state(two) != hash_state(plain_two)
    none = run_in_process(task, sites, Moon(mu=0.0), 2, 0).state
    for name, tensor in plain_two.items():
        torch.testing.assert_close(none[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", [Scaffold(), FedDyn(), Moon()], ids=lambda each: each.name)
def test_what_keeps_or_looks_is_refused_under_dp_sgd(strategy: Any) -> None:
    with raises_reason("PRIVACY_INVALID"):
        DpSgd(noise_multiplier=1.0).admits(strategy, RowTask(), PLAIN)


def test_fednova_combines_by_the_step() -> None:
    state = {"w": torch.zeros(1)}
    updates = [
        Update("a", {"w": torch.tensor([1.0])}, 1.0, {"steps": 2.0}),
        Update("b", {"w": torch.tensor([4.0])}, 3.0, {"steps": 6.0}),
    ]
    made = server_round(FedNova(), state, updates, ["a", "b"]).model
    # τ = (1·2 + 3·6)/4 = 5; mean step = (1·1 + 3·4)/4 = 13/4
    assert float(made["w"]) == pytest.approx(5 * 13 / 4)
    assert math.isclose(
        float(server_round(FedNova(effective_steps=2.0), state, updates, ["a", "b"]).model["w"]), 6.5
    )

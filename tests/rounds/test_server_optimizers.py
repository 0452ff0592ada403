"""FedAvgM, FedAdagrad, FedAdam and FedYogi against recurrences written out here, and against PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch

from histoflare.errors import JobError
from histoflare.rounds.round import server_round
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State
from histoflare.rounds.strategies import make_strategy
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategies.fedavgm import FedAvgM
from histoflare.rounds.strategies.fedopt import MEAN, SQUARE
from histoflare.rounds.strategy import Strategy, Update

from .toy import ToyTask, toy_sites

CHANGES = [(1.0, 3.0), (-2.0, 0.5), (0.0, 0.0), (4.0, -1.0)]
"""What sites a and b send, round by round, of one number; a counts 1 and b 3."""


def played(strategy: Strategy) -> tuple[float, State]:
    state: State = {"w": torch.zeros(1, dtype=torch.float64)}
    own = strategy.begin(state)
    for index, (a, b) in enumerate(CHANGES):
        sent = [
            Update("a", {"w": torch.tensor([a]).double()}, 1.0),
            Update("b", {"w": torch.tensor([b]).double()}, 3.0),
        ]
        made = server_round(strategy, state, sent, ["a", "b"], own=own, round_index=index)
        state, own = made.model, made.own
    return float(state["w"]), own


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam", "fedyogi"])
def test_an_adaptive_server_as_the_paper_has_it(name: str) -> None:
    eta, beta1, beta2, tau = 0.3, 0.8, 0.95, 0.01
    fields = {"learning_rate": eta, "beta1": beta1, "tau": tau}
    strategy = make_strategy(name, **fields, **({} if name == "fedadagrad" else {"beta2": beta2}))
    w, m, v = 0.0, 0.0, tau**2
    for a, b in CHANGES:
        delta = (a + 3 * b) / 4
        m = beta1 * m + (1 - beta1) * delta
        v = {
            "fedadagrad": v + delta**2,
            "fedadam": beta2 * v + (1 - beta2) * delta**2,
            "fedyogi": v - (1 - beta2) * delta**2 * math.copysign(1, v - delta**2) * (v != delta**2),
        }[name]
        w += eta * m / (math.sqrt(v) + tau)
    got, own = played(strategy)
    assert got == pytest.approx(w, rel=1e-12)
    assert float(own[MEAN + "w"]) == pytest.approx(m) and float(own[SQUARE + "w"]) == pytest.approx(v)


def test_momentum_is_pytorch_s() -> None:
    """Its SGD with momentum takes v ← β v + g; w ← w - v, and the mean update is minus a gradient."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.7)
    for a, b in CHANGES:
        weight.grad = torch.tensor([-(a + 3 * b) / 4]).double()
        optimizer.step()
    assert played(FedAvgM(momentum=0.7))[0] == pytest.approx(float(weight.detach()), rel=1e-12)
    assert played(FedAvgM(momentum=0.0))[0] == pytest.approx(played(FedAvg())[0], rel=1e-12)


@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_server_state_stays_at_the_server_and_running_statistics_are_averaged(name: str) -> None:
    task, sites = ToyTask(hidden=4, batch_norm=True), toy_sites(3)
    ours = run_in_process(task, sites, make_strategy(name), 1, 0)
    plain = run_in_process(task, sites, FedAvg(), 1, 0)
    assert ours.bytes_down == plain.bytes_down and ours.own and not any("running" in key for key in ours.own)
    for tensor in ("norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(ours.state[tensor], plain.state[tensor])


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("fedavgm", {"momentum": 1.0}),
        ("fedadam", {"beta2": 1.0}),
        ("fedadam", {"learning_rate": 0}),
        ("fedyogi", {"tau": 0.0}),
        ("fedadagrad", {"beta1": -0.1}),
        ("fedprox", {"mu": -1}),
        ("feddyn", {"alpha": 0}),
        ("fednova", {"effective_steps": 0}),
        ("moon", {"temperature": 0}),
        ("ditto", {"pull": -1}),
        ("apfl", {"alpha": 0}),
        ("trimmed_mean", {"trimmed": 0}),
        ("krum", {"faulty": -1}),
        ("krum", {"chosen": 0}),
        ("norm_bound", {"bound": 0.0}),
        ("geometric_median", {"smoothing": 0}),
        ("qfedavg", {"q": -1}),
        ("afl", {"sites": []}),
        ("afl", {"sites": ["a", "a"]}),
        ("afl", {"sites": "abc"}),
        ("feddg_ga", {"sites": ["a"], "step": 0}),
        ("screened", {"sites": ["a"], "most_ratio": 1}),
        ("fedrep", {}),
    ],
)
def test_fields_out_of_range_are_refused(name: str, fields: dict[str, object]) -> None:
    with pytest.raises(JobError, match=[*fields, "share"][max(0, len(fields) - 1)]):
        make_strategy(name, **fields)

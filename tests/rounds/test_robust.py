"""Robust rules against their definitions, and under attack by sites that send what they like."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from histoflare.privacy.plan import Open
from histoflare.rounds.local import predict
from histoflare.rounds.round import server_round, site_round
from histoflare.rounds.state import State, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategies.geometric_median import GeometricMedian
from histoflare.rounds.strategies.krum import Krum
from histoflare.rounds.strategies.median import Median
from histoflare.rounds.strategies.norm_bound import NormBound
from histoflare.rounds.strategies.screened import Screened
from histoflare.rounds.strategies.trimmed_mean import TrimmedMean
from histoflare.rounds.strategy import Strategy, Update, join

from ..refusals import raises_reason
from .toy import Table, ToyTask, toy_table


def combined(strategy: Strategy, vectors: Sequence[Sequence[float]]) -> Tensor:
    """Return what a strategy makes of one vector a site, cut into two tensors, from a model of zeros."""
    size = len(vectors[0])
    state: State = {"a": torch.zeros(size - 1).double(), "b": torch.zeros(1).double()}
    sites = [f"s{index:02}" for index in range(len(vectors))]
    sent = [
        Update(site, {"a": torch.tensor(v[:-1]).double(), "b": torch.tensor(v[-1:]).double()}, 1.0)
        for site, v in zip(sites, vectors, strict=True)
    ]
    made = server_round(strategy, state, sent, sites).model
    return torch.cat([made["a"], made["b"]])


VECTORS = st.integers(5, 8).flatmap(
    lambda n: st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=n, max_size=n)
)


@settings(max_examples=60, deadline=None)
@given(VECTORS)
def test_median_and_trimmed_mean_are_numpy_s_and_scipy_s(vectors: list[list[float]]) -> None:
    from scipy.stats import trim_mean

    x = np.array(vectors)
    np.testing.assert_allclose(combined(Median(), vectors), np.median(x, axis=0), atol=1e-9)
    cut = 2
    expected = trim_mean(x, cut / len(x) + 1e-9, axis=0)
    np.testing.assert_allclose(combined(TrimmedMean(trimmed=cut), vectors), expected, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(VECTORS)
def test_no_point_nearby_has_a_smaller_sum_of_distances(vectors: list[list[float]]) -> None:
    x = np.array(vectors)
    found = combined(GeometricMedian(iterations=300), vectors).numpy()

    def total(point: np.ndarray) -> float:
        return float(np.linalg.norm(x - point, axis=1).sum())

    steps = np.random.default_rng(0).normal(size=(40, 3)) * 0.05
    assert total(found) <= min(total(found + step) for step in steps) + 1e-3
    assert total(found) <= min(total(each) for each in x) + 1e-3


@settings(max_examples=40, deadline=None)
@given(VECTORS, st.integers(1, 2), st.integers(1, 3))
def test_krum_chooses_as_the_paper_says(vectors: list[list[float]], faulty: int, chosen: int) -> None:
    """By brute force: of each update the least sum over any n - f - 2 of the others."""
    if len(vectors) < 2 * faulty + 3:
        return
    x = np.array(vectors)
    near = len(x) - faulty - 2
    away = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    scores = [
        min(
            sum(away[i][list(group)])
            for group in itertools.combinations([j for j in range(len(x)) if j != i], near)
        )
        for i in range(len(x))
    ]
    got = combined(Krum(faulty=faulty, chosen=chosen), vectors).numpy()
    worst = sorted(scores)[chosen - 1]
    groups = [
        group
        for group in itertools.combinations(range(len(x)), chosen)
        if max(scores[i] for i in group) <= worst + 1e-6 * (1 + worst)
    ]
    assert any(np.allclose(got, x[list(group)].mean(axis=0), atol=1e-6) for group in groups)


def test_a_norm_bound_shortens_and_keeps_the_direction() -> None:
    vectors = [[3.0, 4.0, 0.0], [0.3, 0.4, 0.0], [0.0, 0.0, 2.0]]
    np.testing.assert_allclose(
        combined(NormBound(bound=1.0), vectors), [(0.6 + 0.3) / 3, (0.8 + 0.4) / 3, 1 / 3]
    )
    np.testing.assert_allclose(combined(NormBound(), vectors), [(1.2 + 0.3) / 3, (1.6 + 0.4) / 3, 2 / 3])
    np.testing.assert_allclose(combined(NormBound(bound=100.0), vectors), np.mean(vectors, axis=0))
    np.testing.assert_allclose(combined(NormBound(), [[0.0] * 3] * 3), [0.0] * 3)


ATTACKS: dict[str, Callable[[State, int], State]] = {
    "times 100": lambda sent, _: {name: 100 * t for name, t in sent.items()},
    "sign-flipped": lambda sent, _: {name: -10 * t for name, t in sent.items()},
    "noise": lambda sent, index: {
        name: 50 * torch.randn(t.shape, generator=torch.Generator().manual_seed(index))
        for name, t in sent.items()
    },
}


def honest_mean(updates: Sequence[Update], spreads: float = 0.0, times: float = 1.0) -> State:
    """Return the honest mean less ``spreads`` standard deviations a number, ``times`` as long."""
    found = {}
    for name in updates[0].tensors:
        each = torch.stack([update.tensors[name] for update in updates])
        found[name] = times * (each.mean(dim=0) - spreads * each.std(dim=0))
    return found


KNOWING: dict[str, Callable[[Sequence[Update]], State]] = {
    "inner product": lambda honest: honest_mean(honest, times=-10.0),  # Xie et al. 2019
    "a little is enough": lambda honest: honest_mean(honest, spreads=1.5),  # Baruch et al. 2019
}
"""Attacks by sites that know what the honest ones send, and all send the same."""


def federation(attack: str | None, strategy: Strategy, sites: int, bad: int, rounds: int = 12) -> float:
    """Return the accuracy after a run in which the last ``bad`` sites change what they send."""
    task = ToyTask(learning_rate=0.3)
    tables = {f"s{index}": toy_table(20 + index, n=64, shift=0.1 * index) for index in range(sites)}
    state = model_state(task.build_model())
    own = strategy.begin(state)
    for index in range(rounds):
        sent = []
        for place, (site, data) in enumerate(tables.items()):
            is_bad = place >= sites - bad
            if is_bad and attack == "label-flipped":
                data = Table(data.x, 1 - data.y, data.x_test, data.y_test)
            update = site_round(
                task,
                strategy,
                join(state, strategy.downlink(own)),
                data,
                site=site,
                site_state={},
                round_index=index,
                total_rounds=rounds,
                seed=1,
                plan=Open(),
            ).update
            if is_bad and attack in ATTACKS:
                update = Update(site, ATTACKS[attack](update.tensors, index), 1.0)
            if is_bad and attack in KNOWING:
                update = Update(site, KNOWING[attack](sent[: sites - bad]), 1.0)
            sent.append(update)
        made = server_round(strategy, state, sent, list(tables), own=own, round_index=index)
        state, own = made.model, made.own
    said = [predict(task, state, data, "test") for data in list(tables.values())[: sites - bad]]
    return float(np.mean([(t.probabilities.argmax(1) == t.labels).mean() for t in said]))


def rules(sites: int, bad: int) -> list[Strategy]:
    return [
        Median(),
        TrimmedMean(trimmed=bad),
        GeometricMedian(),
        *([Krum(faulty=bad, chosen=sites - bad)] if sites >= 2 * bad + 3 else []),
        Screened(sites=[f"s{index}" for index in range(sites)]),
    ]


@pytest.mark.parametrize(("sites", "bad"), [(5, 1), (8, 2)])
def test_where_averaging_loses_much_two_rules_lose_little(sites: int, bad: int) -> None:
    uniform = FedAvg(weighting="uniform")
    honest = federation(None, uniform, sites, bad)
    lost = {
        attack: honest - federation(attack, uniform, sites, bad)
        for attack in [*ATTACKS, *KNOWING, "label-flipped"]
    }
    hard = [attack for attack, figure in lost.items() if figure >= 0.10]
    assert {"sign-flipped", "noise", "inner product"} <= set(hard), lost
    for attack in hard:
        rest = {rule.name: honest - federation(attack, rule, sites, bad) for rule in rules(sites, bad)}
        assert sum(figure <= 0.03 for figure in rest.values()) >= 2, (attack, rest)


def test_the_site_that_lies_apart_is_named() -> None:
    sites = [f"s{index}" for index in range(5)]
    base = np.random.default_rng(1).normal(size=(5, 20)) * 0.3 + 1
    for attack in (-3.0, 40.0, 0.001):
        x = base.copy()
        x[3] *= attack
        strategy = Screened(sites=sites)
        state: State = {"w": torch.zeros(20).double()}
        sent = [Update(s, {"w": torch.tensor(v)}, 1.0) for s, v in zip(sites, x, strict=True)]
        made = server_round(strategy, state, sent, sites)
        assert made.rejected == {"s3": "OUTLYING"}
        np.testing.assert_allclose(made.model["w"], np.delete(x, 3, axis=0).mean(axis=0))


def test_one_odd_round_in_many_is_forgiven_by_a_detector_that_looks_over_rounds() -> None:
    sites = ["a", "b", "c", "d"]
    strategy = Screened(sites=sites)
    state: State = {"w": torch.zeros(6).double()}
    own = strategy.begin(state)
    rejected = []
    for index in range(6):
        vectors = {site: torch.ones(6).double() for site in sites}
        if index == 4:
            vectors["d"] = -vectors["d"]
        sent = [Update(site, {"w": v}, 1.0) for site, v in vectors.items()]
        made = server_round(strategy, state, sent, sites, own=own, round_index=index)
        own = made.own
        rejected.append(dict(made.rejected))
    assert rejected == [{}] * 6


@pytest.mark.parametrize(
    ("rule", "vectors"),
    [
        (Median(), [[1.0] * 3, [1.0] * 3, [-9.0] * 3, [-9.0] * 3, [-9.0] * 3]),
        (TrimmedMean(trimmed=1), [[1.0] * 3, [1.0] * 3, [1.0] * 3, [-90.0] * 3, [-90.0] * 3]),
        (GeometricMedian(), [[1.0] * 3, [1.0] * 3, [-9.0] * 3, [-9.0] * 3, [-9.0] * 3]),
        (Krum(faulty=1), [[1.0] * 3, [1.5] * 3, [2.0] * 3, [-9.0] * 3, [-9.0] * 3, [-9.0] * 3]),
        (NormBound(), [[1.0] * 3, [1.0] * 3, [-1.0] * 3, [-1.0] * 3, [-1.0] * 3]),
        (
            Screened(sites=[f"s{index:02}" for index in range(5)]),
            [[1.0, 0.0, 0.0]] * 4 + [[0.1, -4.8, 0.0]],  # across, and just not too long
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_each_rule_has_what_breaks_it(rule: Strategy, vectors: list[list[float]]) -> None:
    """More faulty sites than it is made for, two that agree, or one that stays within its limits."""
    assert float(combined(rule, vectors).mean()) < 0


@pytest.mark.parametrize("faulty", [1, 2])
def test_too_few_updates_for_a_rule_are_refused(faulty: int) -> None:
    for rule in (TrimmedMean(trimmed=faulty), Krum(faulty=faulty)):
        assert rule.least_updates == 2 * faulty + (1 if rule.name == "trimmed_mean" else 3)
        with raises_reason("UPDATES_INVALID"):
            combined(rule, [[1.0, 2.0]] * (rule.least_updates - 1))

"""The privacy filter: one order, fixed by (ε, δ) alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histoflare.errors import JobError
from histoflare.privacy.accountant import MOST_NOISE, calibrate, epsilon, rdp
from histoflare.privacy.budget import ORDERS, Budget
from histoflare.privacy.spend import Spend
from tests.refusals import raises_reason

BUDGETS = [Budget(0.01, 1e-5), Budget(1.0, 1e-5), Budget(8.0, 1e-5), Budget(2.9, 1e-4), Budget(3e4, 1e-5)]

every_budget = pytest.mark.parametrize("budget", BUDGETS, ids=str)


def conversion(rho: float, order: float, delta: float) -> float:
    """Canonne, Kamath & Steinke 2020, Proposition 12."""
    return rho + math.log((order - 1) / order) - (math.log(delta) + math.log(order)) / (order - 1)


@every_budget
def test_the_allowance_converts_to_epsilon(budget: Budget) -> None:
    assert conversion(budget.allowance, budget.order, budget.delta) == pytest.approx(budget.epsilon, rel=1e-9)
    assert budget.epsilon_of(budget.allowance) == pytest.approx(budget.epsilon, rel=1e-12)


@every_budget
def test_no_other_order_takes_more_gaussian_noise(budget: Budget) -> None:
    """ρ(α) = α r, so the best order has the largest r; tried on a finer grid than the budget's own."""
    best = budget.allowance / budget.order
    finer = [1.02 * 1.002**n for n in range(4800)]
    rates = [-conversion(-budget.epsilon, order, budget.delta) / order for order in finer]
    assert max(rates) <= best * (1 + 5e-3)


def test_the_order_knows_nothing_of_jobs() -> None:
    budget = Budget(8.0, 1e-5)
    before = budget.order
    budget.cost(Spend(1.0, 0.01, 1000))
    assert budget.order == before == Budget(8, 1e-5).order
    assert budget.order in ORDERS and list(ORDERS) == sorted(set(ORDERS))


def test_the_edges_of_what_is_spent() -> None:
    budget = Budget(8.0, 1e-5)
    assert budget.epsilon_of(0.0) == 0.0 and budget.admits(0.0)
    assert budget.epsilon_of(math.inf) == math.inf and not budget.admits(math.inf)
    assert not budget.admits(math.nan)
    assert budget.cost(Spend(0.0)) == math.inf and budget.cost(Spend(0.0, steps=0)) == 0.0
    assert budget.cost(Spend(2.0, 0.1, 7)) == rdp(Spend(2.0, 0.1, 7), budget.order)
    assert budget.admits(budget.allowance) and budget.admits(budget.allowance * (1 + 0.9e-9))
    assert not budget.admits(budget.allowance * (1 + 1.1e-9))
    assert Budget(0.5, 0.1).epsilon_of(1e-300) >= 0.0
    for rho in (-1e-9, math.nan):
        with raises_reason("PRIVACY_INVALID", "rho"):
            budget.epsilon_of(rho)


@every_budget
@pytest.mark.parametrize(("rate", "steps"), [(1.0, 1), (1.0, 150), (32 / 705, 3966)])
def test_a_calibrated_job_fits_once(budget: Budget, rate: float, steps: int) -> None:
    spend = Spend(budget.calibrate(rate, steps), rate, steps)
    assert budget.admits(budget.cost(spend))
    assert not budget.admits(2 * budget.cost(spend))
    assert not budget.admits(budget.cost(Spend(spend.noise_multiplier * (1 - 1e-3), rate, steps)))


def test_a_job_booked_round_by_round_fits_as_a_whole() -> None:
    budget = Budget(8.0, 1e-5)
    noise = budget.calibrate(1.0, 150)
    assert budget.admits(math.fsum(budget.cost(Spend(noise)) for _ in range(150)))
    assert budget.admits(sum(budget.cost(Spend(noise)) for _ in range(150)))


@settings(max_examples=20, deadline=None)
@given(
    target=st.floats(0.5, 20),
    delta=st.floats(1e-7, 1e-3),
    jobs=st.lists(
        st.builds(
            Spend, noise_multiplier=st.floats(1, 30), sample_rate=st.just(1.0), steps=st.integers(1, 50)
        ),
        min_size=1,
        max_size=20,
    ),
)
def test_whatever_is_let_in_costs_at_most_epsilon(target: float, delta: float, jobs: list[Spend]) -> None:
    """Against the exact figure of what the filter took."""
    budget = Budget(target, delta)
    taken: list[Spend] = []
    for job in jobs:
        if budget.admits(sum(map(budget.cost, [*taken, job]))):
            taken.append(job)
    exact = epsilon(taken, delta, "gaussian")
    assert exact <= budget.epsilon_of(sum(map(budget.cost, taken))) <= target * (1 + 1e-8)


def test_one_order_costs_little_where_nothing_is_sampled() -> None:
    """The best of many orders, known in advance, saves less than a hundredth of the noise."""
    for budget in (Budget(1.0, 1e-5), Budget(8.0, 1e-5)):
        free = calibrate(budget.epsilon, budget.delta, sample_rate=1.0, steps=150)
        assert free * 0.999 < budget.calibrate(1.0, 150) < free * 1.01


def test_calibration_has_ends() -> None:
    budget = Budget(8.0, 1e-5)
    assert budget.calibrate(0.5, 0) == 0.0
    with raises_reason("PRIVACY_INVALID", "epsilon 8 ", "1000000000000000 steps"):
        budget.calibrate(1.0, 10**15)
    with raises_reason("PRIVACY_INVALID", "sample_rate"):
        budget.calibrate(0.0, 1)
    assert 0 < Budget(1e-3, 1e-5).calibrate(1.0, 1) < MOST_NOISE


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, True, "8", None])
def test_an_epsilon_that_is_none_is_refused(value: Any) -> None:
    with raises_reason("PRIVACY_INVALID", "epsilon"):
        Budget(value, 1e-5)


@pytest.mark.parametrize("value", [0.0, -1e-5, 0.11, 1.0, math.inf, math.nan, True, "1e-5"])
def test_a_delta_that_is_none_is_refused(value: Any) -> None:
    with raises_reason("PRIVACY_INVALID", "delta", "0.1"):
        Budget(8.0, value)


def test_a_budget_that_allows_nothing_is_refused() -> None:
    with raises_reason("PRIVACY_INVALID", "epsilon 1e-06", "delta 1e-09"):
        Budget(1e-6, 1e-9)


@given(
    share=st.floats(0.01, 1.0),
    epsilon=st.sampled_from([0.5, 1.0, 3.0, 8.0]),
    rate=st.sampled_from([0.2, 1.0]),
)
@settings(max_examples=25, deadline=None)
def test_shares_add_up_and_are_never_exceeded(share: float, epsilon: float, rate: float) -> None:
    """Costs at one Rényi order add up (Mironov 2017, Proposition 1); ε of the sum is that of one long job."""
    budget = Budget(epsilon, 1e-5)
    spend = Spend(budget.calibrate(rate, 40, share), rate, 40)
    cost = budget.cost(spend)
    assert cost <= share * budget.allowance
    more = budget.room_for(cost, cost)
    assert more is not None and more >= math.floor(1 / share + 1e-9) - 1
    assert budget.admits((more + 1) * cost) and not budget.admits((more + 2) * cost)
    together = budget.spent([spend] * (more + 1))
    assert together == pytest.approx(budget.spent([spend.times(more + 1)]), rel=1e-9)
    assert together <= epsilon * (1 + 1e-9)


def test_room_for_what_costs_nothing_or_everything() -> None:
    budget = Budget(8.0, 1e-5)
    assert budget.room_for(0.0) is None
    assert budget.room_for(math.inf) == 0
    assert budget.room_for(budget.allowance / 4) == 4, "a rounding is no reason to lose one"
    assert budget.room_for(budget.allowance / 4, budget.allowance) == 0
    with pytest.raises(JobError):
        budget.room_for(-1.0)
    for share in (0.0, 1.01, math.nan):
        with raises_reason("PRIVACY_INVALID", "share"):
            budget.calibrate(1.0, 10, share)

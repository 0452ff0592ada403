"""The exact Gaussian and the grid: right, and bounded whatever a job asks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise

import pytest
from scipy import integrate
from scipy.special import log_ndtr, ndtr

from histoflare.privacy.accountant import epsilon
from histoflare.privacy.privacy_loss import (
    PLD_MOST_EVENTS,
    PLD_MOST_STEPS,
    gaussian_epsilon,
    pld_epsilon,
)
from histoflare.privacy.spend import Spend


def grid_epsilon(spend: Spend, delta: float = 1e-5) -> float:
    return pld_epsilon([spend], delta)


def hockey_stick(mu: float, epsilon: float) -> float:
    """δ(ε) by its definition, E[max(0, 1 - e^(ε - L))] with the Gaussian's loss L ~ N(μ²/2, μ²)."""

    def density(t: float) -> float:  # t = L - ε
        score = (epsilon + t - mu * mu / 2) / mu
        return -math.expm1(-t) * math.exp(-score * score / 2) / (mu * math.sqrt(2 * math.pi))

    mass, _ = integrate.quad(density, 0, 40 * mu, epsabs=0, epsrel=1e-10, limit=1000, points=[mu, 5 * mu])
    return mass


@pytest.mark.parametrize("delta", [0.05, 1e-5, 1e-12])
@pytest.mark.parametrize("mu", [0.02, 0.3, 1.0, 20.0, 447.0])
def test_the_exact_gaussian_is_the_hockey_stick(mu: float, delta: float) -> None:
    found = gaussian_epsilon([Spend(1 / mu)], delta)
    if found == 0:
        assert hockey_stick(mu, 0.0) <= delta
    else:
        # Of the last digit of ε, δ moves by 1e-16 ε/μ · ln δ, less than 1e-9 of itself here.
        assert hockey_stick(mu, found) == pytest.approx(delta, rel=1e-6)


def test_the_exact_gaussian_from_a_hundredth_to_a_hundred_thousand() -> None:
    small = gaussian_epsilon([Spend(300.0)], 1e-5)
    large = gaussian_epsilon([Spend(1 / 443.0)], 1e-5)
    assert 0.005 < small < 0.02 and 95_000 < large < 105_000
    assert hockey_stick(1 / 300, small) == pytest.approx(1e-5, rel=1e-6)
    assert hockey_stick(443.0, large) == pytest.approx(1e-5, rel=1e-6)


def test_the_exact_gaussian_is_monotone_over_all_floats() -> None:
    figures = [gaussian_epsilon([Spend(10.0**exponent)], 1e-5) for exponent in range(-300, 301, 3)]
    assert all(more >= less for more, less in pairwise(figures))
    assert (figures[0], figures[-1]) == (math.inf, 0.0)
    deltas = [gaussian_epsilon([Spend(1.0)], 10.0**-exponent) for exponent in range(1, 300, 5)]
    assert all(less < more for less, more in pairwise(deltas))


def test_gaussians_compose_to_one() -> None:
    """Noise 2, four times, and noise 1 are μ = √(4/4 + 1)."""
    together = gaussian_epsilon([Spend(2.0, steps=4), Spend(1.0)], 1e-5)
    assert together == pytest.approx(gaussian_epsilon([Spend(1 / math.sqrt(2))], 1e-5), rel=1e-12)


# ---- The grid


def sampled_hockey_stick(spend: Spend, epsilon: float) -> float:
    """δ(ε) of one sampled step, removing a patient: the likelihood ratio crosses e^ε at one point."""
    q, z = spend.sample_rate, spend.noise_multiplier
    crossing = z * z * math.log((math.expm1(epsilon) + q) / q) + 0.5
    outside = float(log_ndtr(-crossing / z))
    return q * float(ndtr((1 - crossing) / z)) + (1 - q) * math.exp(outside) - math.exp(epsilon + outside)


@pytest.mark.parametrize("noise", [0.1, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("rate", [1e-3, 0.045, 0.3, 0.99])
def test_one_sampled_step_is_its_closed_form(noise: float, rate: float) -> None:
    spend = Spend(noise, rate)
    found = grid_epsilon(spend)
    assert sampled_hockey_stick(spend, found + 1e-6) <= 1e-5, "an upper bound"
    tighter = found * (1 - 5e-3) - 1e-4
    assert tighter < 0 or sampled_hockey_stick(spend, tighter) > 1e-5, "and a tight one"


@pytest.mark.parametrize(("noise", "steps"), [(6.12, 150), (100.0, 10_000), (300.0, 100_000), (1.0, 30)])
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_many_steps_on_the_grid_are_the_exact_gaussian(noise: float, steps: int, delta: float) -> None:
    spend = Spend(noise, 1.0, steps)
    exact = gaussian_epsilon([spend], delta)
    assert exact * (1 - 1e-6) <= grid_epsilon(spend, delta) <= exact * (1 + 5e-3)


def test_what_is_not_worth_a_grid_falls_back_to_a_plainer_bound() -> None:
    hopeless = {
        "too wide": [Spend(0.0005, 0.5, 150)],
        "too much noise": [Spend(1e6, 0.5)],
        "too many steps": [Spend(4.0, 0.01, PLD_MOST_STEPS + 1)],
        "too many events": [Spend(4.0 + n, 0.01) for n in range(PLD_MOST_EVENTS + 1)],
    }
    for why, events in hopeless.items():
        plainer = min(epsilon(events, 1e-5, "rdp"), gaussian_epsilon(events, 1e-5))
        assert epsilon(events, 1e-5, "pld") == plainer, why
        assert pld_epsilon(events, 1e-5) == math.inf, why
    assert epsilon([Spend(4.0, 0.01)], 1e-11, "pld") == epsilon([Spend(4.0, 0.01)], 1e-11, "rdp")
    assert epsilon([Spend(4.0, 0.01)], 1e-9, "pld") < epsilon([Spend(4.0, 0.01)], 1e-9, "rdp")


WORST = """
import itertools, json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from histoflare.privacy.accountant import ACCOUNTANTS, calibrate, epsilon
from histoflare.privacy.budget import Budget
from histoflare.privacy.spend import Spend

budgets = Budget(8.0, 1e-5), Budget(0.01, 1e-5)
fine = True
for noise, rate, steps in itertools.product(
    (1e-200, 1e-9, 0.05, 0.15, 1.0, 1e3, 1e6, 1e200), (1.0, 0.5, 1e-3, 1e-12), (1, 150, 10**5, 10**9, 10**400)
):
    spend = Spend(noise, rate, steps)
    for accountant in ACCOUNTANTS:
        if rate == 1 or accountant != "gaussian":
            fine &= epsilon([spend], 1e-5, accountant) >= 0
    fine &= all(budget.cost(spend) >= 0 for budget in budgets)
for wide in (Spend(2.0, 0.5, 10**4), Spend(1.0, 0.99, 1000), Spend(0.5, 0.1, 1000)):
    fine &= epsilon([wide], 1e-5, "pld") > 0
fine &= epsilon([Spend(0.3 + n / 100, 0.3, 1000) for n in range(8)], 1e-5, "pld") > 0
calibrate(1e4, 1e-5, sample_rate=1e-12, steps=150, accountant="pld")
# Not ru_maxrss: a process begins with that of the one that started it.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([fine, int(peak.split()[1])]))
"""


@pytest.mark.slow
def test_no_request_decides_the_memory_or_the_time_of_the_process() -> None:
    """Noise 0.05 over 150 steps grew past 20 GiB with dp_accounting's own settings."""
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", WORST],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    fine, kib = json.loads(done.stdout)
    assert fine
    assert kib < 256 * 1024, "most of it is what is imported"

"""From events to ε: against theory, against papers, and with one contract for every accountant."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from itertools import pairwise
from typing import Any

import pytest
from dp_accounting import gaussian_mechanism
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from histoflare.privacy.accountant import ACCOUNTANTS, LEAST_NOISE, calibrate, count, epsilon, rdp
from histoflare.privacy.spend import Spend
from tests.refusals import raises_reason

COHORTS = {"IGC": 213, "Indivumed": 168, "Asterand": 165, "Johns Hopkins": 159}
"""Slides of the four hospitals of Adnan et al. 2022 (Scientific Reports 12:1953)."""

every_accountant = pytest.mark.parametrize("accountant", ACCOUNTANTS)


def adnan(n_slides: int, noise_multiplier: float = 4.0) -> Spend:
    """DP-SGD with expected batches of 32 for 180 epochs."""
    return Spend(noise_multiplier, 32 / n_slides, math.ceil(180 * n_slides / 32))


def event(accountant: str, noise_multiplier: float = 5.0, steps: int = 40) -> Spend:
    """An event that the accountant can count: a sampled one unless it is the exact Gaussian."""
    return Spend(noise_multiplier, 1.0 if accountant == "gaussian" else 0.2, steps)


# ---- Every accountant


@every_accountant
def test_nothing_costs_nothing_and_no_noise_costs_everything(accountant: str) -> None:
    assert epsilon([], 1e-5, accountant) == 0.0
    assert epsilon([Spend(0.0, steps=0), Spend(1.0, 0.5, 0)], 1e-5, accountant) == 0.0
    assert epsilon([Spend(0.0)], 1e-5, accountant) == math.inf
    assert epsilon([event(accountant), Spend(0.0)], 1e-5, accountant) == math.inf


@every_accountant
@pytest.mark.parametrize("delta", [0.0, 0.11, 1.0, -1e-5, 2.0, math.nan, math.inf])
def test_a_delta_that_is_none_is_refused(accountant: str, delta: float) -> None:
    with raises_reason("PRIVACY_INVALID", "delta", "0.1"):
        epsilon([], delta, accountant)


@every_accountant
def test_more_steps_cost_more_and_more_noise_and_a_larger_delta_cost_less(accountant: str) -> None:
    one = event(accountant)
    figures = [epsilon([one.times(n)], 1e-5, accountant) for n in (1, 2, 10)]
    assert 0 < figures[0] < figures[1] < figures[2] < math.inf
    assert epsilon([event(accountant, 6.0)], 1e-5, accountant) < figures[0]
    assert epsilon([one], 1e-4, accountant) < figures[0]


@every_accountant
def test_the_order_and_grouping_of_events_do_not_matter(accountant: str) -> None:
    first, second = event(accountant), event(accountant, 3.0, 10)
    together = epsilon([first, second], 1e-5, accountant)
    assert together > max(epsilon([first], 1e-5, accountant), epsilon([second], 1e-5, accountant))
    in_parts = [event(accountant, steps=30), second, event(accountant, steps=10)]
    assert epsilon(in_parts, 1e-5, accountant) == pytest.approx(together, rel=1e-9)


@every_accountant
@pytest.mark.parametrize("target", [0.3, 3.0, 30.0])
def test_calibrated_noise_fits_and_a_little_less_does_not(accountant: str, target: float) -> None:
    one = event(accountant)
    noise = calibrate(target, 1e-5, sample_rate=one.sample_rate, steps=one.steps, accountant=accountant)
    assert epsilon([Spend(noise, one.sample_rate, one.steps)], 1e-5, accountant) <= target
    assert epsilon([Spend(noise * (1 - 1e-3), one.sample_rate, one.steps)], 1e-5, accountant) > target


@every_accountant
def test_the_ends_of_calibration(accountant: str) -> None:
    def least(target: float, steps: int = 1, delta: float = 1e-5) -> float:
        return calibrate(target, delta, sample_rate=1.0, steps=steps, accountant=accountant)

    assert least(1.0, steps=0) == 0.0
    assert least(1e15) == LEAST_NOISE
    with raises_reason("PRIVACY_INVALID", "1e+06"):
        least(1e-3, steps=10**12)
    for target in (0.0, -1.0, math.inf, math.nan):
        with raises_reason("PRIVACY_INVALID", "target_epsilon"):
            least(target)
    with raises_reason("PRIVACY_INVALID", "steps"):
        least(1.0, steps=-1)


def test_an_unknown_accountant_is_refused() -> None:
    with raises_reason("PRIVACY_INVALID", "accountant", "'prv'"):
        epsilon([], 1e-5, "prv")


def test_the_exact_gaussian_is_not_for_sampled_events() -> None:
    for request in (
        lambda: epsilon([Spend(1.0), Spend(1.0, 0.5)], 1e-5, "gaussian"),
        lambda: calibrate(1.0, 1e-5, sample_rate=0.5, steps=1, accountant="gaussian"),
    ):
        with raises_reason("PRIVACY_INVALID", "sample_rate"):
            request()


# ---- Between them


@settings(max_examples=15, deadline=None)
@given(
    noise=st.floats(0.7, 30),
    rate=st.floats(0.01, 0.9),
    steps=st.integers(1, 2000),
    delta=st.floats(1e-7, 1e-3),
)
def test_sampling_and_tighter_accounting_only_ever_lower_the_figure(
    noise: float, rate: float, steps: int, delta: float
) -> None:
    sampled, whole = Spend(noise, rate, steps), Spend(noise, 1.0, steps)
    by_rdp, by_pld = epsilon([sampled], delta), epsilon([sampled], delta, "pld")
    exact = epsilon([whole], delta, "gaussian")
    assert by_pld <= min(by_rdp, exact), "a sampled event costs no more than an unsampled one"
    assert exact <= epsilon([whole], delta)
    assert by_rdp <= epsilon([Spend(noise, rate, steps + 1)], delta)
    assert by_rdp <= epsilon([Spend(noise, min(1.0, rate * 1.1), steps)], delta)
    assert epsilon([Spend(noise * 1.1, rate, steps)], delta) <= by_rdp


def powers_of_ten(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


def check_one_event(accountant: str, noise: float, rate: float, steps: int, factor: float) -> None:
    rate = 1.0 if accountant == "gaussian" else rate

    def figure(noise: float = noise, rate: float = rate, steps: int = steps) -> float:
        return epsilon([Spend(noise, rate, steps)], 1e-5, accountant)

    here, with_more_noise = figure(), figure(noise=noise * factor)
    most, least = here * (1 + 1e-6) + 1e-9, here * (1 - 1e-6) - 1e-9
    assert with_more_noise <= most  # it may fall steeply, where sampling begins to protect
    assert figure(steps=math.ceil(steps * factor)) >= least
    assert figure(rate=min(1.0, rate * factor)) >= least


def check_calibration(accountant: str, target: float, rate: float, steps: int) -> None:
    rate = 1.0 if accountant == "gaussian" else rate
    noise = calibrate(target, 1e-5, sample_rate=rate, steps=steps, accountant=accountant)
    assert epsilon([Spend(noise, rate, steps)], 1e-5, accountant) <= target
    assert epsilon([Spend(noise * (1 - 1e-3), rate, steps)], 1e-5, accountant) > target


one_event = given(
    noise=powers_of_ten(-2.0, 1.5),
    rate=powers_of_ten(-4.0, 0.0),
    steps=st.integers(1, 3000),
    factor=st.floats(1.005, 1.5),
)
one_target = given(target=powers_of_ten(-1.0, 4.0), rate=powers_of_ten(-3.0, 0.0), steps=st.integers(1, 1000))


@pytest.mark.parametrize("accountant", ["rdp", "gaussian"])
@settings(max_examples=20, deadline=None)
@one_event
def test_epsilon_falls_as_noise_grows_and_rises_with_steps_and_rate(
    accountant: str, noise: float, rate: float, steps: int, factor: float
) -> None:
    """Down to noise 0.01, where ε is in the millions: it jumped up there where it should have fallen."""
    check_one_event(accountant, noise, rate, steps, factor)


@settings(max_examples=4, deadline=None)
@one_event
def test_so_does_the_tight_one(noise: float, rate: float, steps: int, factor: float) -> None:
    check_one_event("pld", noise, rate, steps, factor)


@pytest.mark.parametrize("accountant", ["rdp", "gaussian"])
@settings(max_examples=10, deadline=None)
@one_target
def test_calibration_meets_its_target_from_below_with_the_least_noise(
    accountant: str, target: float, rate: float, steps: int
) -> None:
    check_calibration(accountant, target, rate, steps)


@settings(max_examples=2, deadline=None)
@one_target
def test_so_does_that_by_the_tight_one(target: float, rate: float, steps: int) -> None:
    check_calibration("pld", target, rate, steps)


@pytest.mark.parametrize("target", [300.0, 400.0])
def test_calibration_at_a_large_epsilon_answers_what_it_was_asked(target: float) -> None:
    """It answered 0.313 for both, which costs 271."""
    check_calibration("pld", target, 0.1, 500)


@pytest.mark.parametrize(("noise", "true"), [(0.30, 301.1), (0.31, 276.4), (0.32, 254.4)])
def test_pld_at_a_large_epsilon(noise: float, true: float) -> None:
    """dp_accounting's own figures at its finest grid."""
    assert count([Spend(noise, 0.1, 500)], 1e-5, "pld") == (pytest.approx(true, abs=0.1), "pld")


def test_whose_bound_it_is_is_said() -> None:
    assert count([Spend(4.0, 0.01)], 1e-5, "rdp")[1] == "rdp"
    assert count([Spend(4.0)], 1e-5, "pld")[1] == "gaussian"
    assert count([Spend(4.0, 0.1, 10**6)], 1e-5, "pld")[1] == "rdp", "too many steps"


def test_rdp_is_never_above_the_librarys_own() -> None:
    """Where we differ, it is by a better bound at orders between two whole ones."""
    for spend in (adnan(705), adnan(159), Spend(1.0, 0.01, 1000), Spend(0.6, 0.3, 20)):
        library = RdpAccountant().compose(poisson(spend), spend.steps).get_epsilon(1e-5)
        assert library * 0.97 < epsilon([spend], 1e-5) <= library * (1 + 1e-9)


def poisson(spend: Spend) -> Any:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    return PoissonSampledDpEvent(spend.sample_rate, GaussianDpEvent(spend.noise_multiplier))


def test_one_gaussian_is_the_librarys_closed_form() -> None:
    for noise in (0.3, 1.0, 5.0):
        library = gaussian_mechanism.get_epsilon_gaussian(noise, 1e-6)
        assert epsilon([Spend(noise)], 1e-6, "gaussian") == pytest.approx(library, rel=1e-6)


# ---- ρ at one order


def test_an_unsampled_event_has_the_papers_rho() -> None:
    """Mironov 2017, Proposition 7: α / (2 z²)."""
    assert rdp(Spend(4.0, steps=10), 3.5) == 10 * (3.5 / (2 * 4.0**2))
    assert rdp(Spend(0.5), 1.02) == 1.02 / (2 * 0.5**2)


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0, 1000.0])
@pytest.mark.parametrize("rate", [1e-6, 0.045, 0.5, 0.999])
@pytest.mark.parametrize("order", [2, 3, 11, 64, 256])
def test_a_sampled_step_has_the_papers_rho_at_whole_orders(noise: float, rate: float, order: int) -> None:
    """Mironov, Talwar & Zhang 2019, section 3.3, summed with 80 digits; the most that float64 rounds."""
    with localcontext() as context:
        context.prec = 80
        q, z = Decimal(rate), Decimal(noise)
        moment = sum(
            math.comb(order, i) * (1 - q) ** (order - i) * q**i * (Decimal(i * i - i) / (2 * z * z)).exp()
            for i in range(order + 1)
        )
        exact = float(moment.ln() / (order - 1))
    assert exact <= rdp(Spend(noise, rate), order) <= exact * (1 + 1e-12) + 3e-14


@pytest.mark.parametrize("noise", [0.8, 4.0, 30.0])
@pytest.mark.parametrize("rate", [0.045, 0.5, 0.9])
@pytest.mark.parametrize("order", [1.1, 1.5, 3.5, 6.2])
def test_between_whole_orders_rho_is_an_upper_bound(noise: float, rate: float, order: float) -> None:
    """The moment itself by quadrature: E[((1 - q) + q e^((2x - 1)/(2 z²)))^α], x ~ N(0, z²)."""

    def density(x: float) -> float:
        ratio = 1 - rate + rate * math.exp((2 * x - 1) / (2 * noise**2))
        return math.exp(-x * x / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi)) * (ratio**order - 1)

    reach = 12 * noise + order
    excess, _ = integrate.quad(density, -reach, reach, epsabs=1e-13, limit=500, points=[0, order])
    exact = math.log1p(excess) / (order - 1)
    bound = rdp(Spend(noise, rate), order)
    assert exact * (1 - 1e-6) - 1e-12 <= bound
    assert bound <= rdp(Spend(noise, rate), math.ceil(order)) * (1 + 1e-9)


def test_the_edges_of_rho() -> None:
    assert rdp(Spend(0.0, steps=0), 2.0) == 0.0
    assert rdp(Spend(0.0, 0.1), 2.0) == math.inf
    assert rdp(Spend(1e-200), 2.0) == rdp(Spend(1e-200, 0.1), 2.0) == math.inf
    assert rdp(Spend(1.0, 0.1, 10**400), 2.0) == math.inf
    assert 0 < rdp(Spend(1.0, 5e-324, 10**9), 2.5) < 1e-4
    for order in (1.0, 0.5, math.inf, math.nan):
        with raises_reason("PRIVACY_INVALID", "order"):
            rdp(Spend(1.0), order)


@pytest.mark.parametrize(
    ("noise", "rate", "order", "exact"),
    [
        (1.0, 0.5, 1.3, 0.193785702358555),  # where the library's series does not converge
        (0.3, 0.1, 1.1, 0.424875340832486),  # where the sum of its moduli is 3.5 times as much
        (0.3, 0.1, 3.5, 16.2208253142637),
        (0.05, 1e-3, 1.2, 198.553468326107),
        (0.02, 0.3, 1.1, 1361.75629915241),
        (4.0, 32 / 168, 2.5, 0.00293623039008469),
        (20.0, 1e-3, 1.1, 1.37671708050195e-9),
    ],
)
def test_between_whole_orders_rho_is_the_moment_itself(
    noise: float, rate: float, order: float, exact: float
) -> None:
    """The moment by mpmath's quadrature with 40 digits."""
    assert exact <= rdp(Spend(noise, rate), order) <= exact * (1 + 1e-11) + 1.1e-13


@pytest.mark.parametrize("order", [1.02, 1.1, 1.9, 2.5, 7.3, 10.9])
@pytest.mark.parametrize("rate", [0.5, 1e-3, 1e-9])
def test_where_noise_is_too_little_for_a_quadrature_rho_still_falls_as_it_grows(
    order: float, rate: float
) -> None:
    """Below a noise of about 0.01 20,000 points do not suffice, and a plainer bound stands in."""
    noises = [10 ** (-exponent / 20) for exponent in range(20, 80)]
    rhos = [rdp(Spend(noise, rate), order) for noise in noises]
    assert all(more >= less for less, more in pairwise(rhos))


# ---- What the papers' settings cost


def test_adnans_figure_is_that_of_the_pooled_slides() -> None:
    """Adnan et al. 2022, Table 3: ε = 2.90 at noise 4, δ = 1e-4; PRV by Opacus gives 2.636."""
    pooled = adnan(sum(COHORTS.values()))
    assert (pooled.sample_rate, pooled.steps) == (32 / 705, 3966)
    assert epsilon([pooled], 1e-4) == pytest.approx(2.897, abs=0.002)
    assert epsilon([pooled], 1e-4, "pld") == pytest.approx(2.626, abs=0.005)


@pytest.mark.parametrize(
    ("hospital", "by_rdp", "by_prv"),
    [
        ("IGC", 5.87, 5.36),
        ("Indivumed", 6.77, 6.19),
        ("Asterand", 6.84, 6.26),
        ("Johns Hopkins", 7.00, 6.41),
    ],
)
def test_a_hospital_alone_spends_more(hospital: str, by_rdp: float, by_prv: float) -> None:
    """By Opacus' accountants; at these noises its RDP is exact between whole orders, as ours is."""
    spend = adnan(COHORTS[hospital])
    assert epsilon([spend], 1e-4) == pytest.approx(by_rdp, abs=0.0051)
    assert epsilon([spend], 1e-4, "pld") == pytest.approx(by_prv, abs=0.02)


@pytest.mark.parametrize(("noise", "claimed", "true"), [(2.0, 10.01, 6.99), (6.0, 2.34, 1.80)])
def test_the_other_rows_of_adnans_table_are_not_reproduced(noise: float, claimed: float, true: float) -> None:
    """At the paper's 180 epochs. Its rows with another clip differ too, yet ε knows no clip."""
    figure = epsilon([adnan(705, noise)], 1e-4)
    assert figure == pytest.approx(true, abs=0.01)
    assert abs(figure - claimed) > 0.5
    assert "clip_norm" not in Spend.__dataclass_fields__


@pytest.mark.parametrize(
    ("noise", "rounds", "exact"),
    [
        (0.05, 150, 31_044),
        (0.025, 150, 122_088),  # sensitivity 2 C: one patient may turn a clipped update round
        (0.05, 1, 284.4),
        (0.15, 150, 3_681),
        (0.25, 150, 1_408),
        (0.35, 150, 761),
    ],
)
@pytest.mark.parametrize("accountant", ["gaussian", "pld"])
def test_what_feddps_settings_cost(noise: float, rounds: int, exact: float, accountant: str) -> None:
    """Exact Gaussian, every site in each of 150 rounds, δ = 1e-5."""
    assert epsilon([Spend(noise, steps=rounds)], 1e-5, accountant) == pytest.approx(exact, abs=0.5)


@pytest.mark.parametrize(("target", "noise"), [(10, 6.12), (8, 7.35), (3, 17.0), (1, 45.7)])
def test_what_feddp_would_need(target: float, noise: float) -> None:
    found = calibrate(target, 1e-5, sample_rate=1.0, steps=150, accountant="gaussian")
    assert found == pytest.approx(noise, rel=2e-3)
    if target == 8:
        assert 2 * found == pytest.approx(14.7, abs=0.05), "noise ÷ clip_norm, for a patient"

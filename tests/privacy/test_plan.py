"""What a job says of its protection: numbers that are public, and what they cost a patient."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from histoflare.errors import JobError
from histoflare.privacy import sampler
from histoflare.privacy.accountant import epsilon
from histoflare.privacy.budget import Budget
from histoflare.privacy.noise import SeededNoise, grid
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan, UpdateNoise
from histoflare.privacy.spend import Spend
from tests.refusals import raises_reason

STAR = SimpleNamespace(name="star", aggregates_at_server=True)
DECLARED = {
    "name": "some",
    "linear": True,
    "keeps": (),
    "equal_weights": True,
    "sees_data": False,
    "numbers": {},
    "topology": STAR,
}
TASK = SimpleNamespace(record_losses=None, sample_mixing=False)
EXACT = SimpleNamespace(name="exact", readable=True, exact=True)
ROUNDING = SimpleNamespace(name="rounding", readable=True, exact=False)


def declared(**changes: Any) -> SimpleNamespace:
    """Return what a strategy says of itself."""
    return SimpleNamespace(**{**DECLARED, **changes})


def test_open_protects_nothing_and_says_so() -> None:
    plan, tensors = Open(), {"w": torch.randn(3), "b": torch.randn(1)}
    released = plan.release(tensors, SeededNoise(0))
    assert list(released) == list(tensors)
    assert all(torch.equal(released[name], tensors[name]) for name in tensors)
    assert epsilon([plan.settled(3, 10).spend()], 1e-5) == math.inf
    assert plan.mechanism == "open"
    for words in ("no clipping", "no noise", "∞"):
        assert words in plan.describe()


def test_a_round_of_dp_sgd_is_its_steps_for_a_patient() -> None:
    plan = DpSgd(noise_multiplier=4.0, sample_rate=0.1, steps=5, batch_size=16)
    assert plan.spend() == Spend(4.0, 0.1, 5)


@pytest.mark.parametrize("k", [1, 2, 10])
def test_slides_clipped_one_by_one_cost_their_patient_more(k: int) -> None:
    # A patient with k slides is drawn with 1 - (1 - q)^k, and then moves the sum by at most k clip norms.
    plan = DpSgd(noise_multiplier=4.0, sample_rate=0.1, steps=5, record="slide", slides_per_patient=k)
    spend = plan.spend()
    assert spend.noise_multiplier == pytest.approx(4.0 / k)
    assert spend.sample_rate == pytest.approx(1 - 0.9**k)


def test_a_patient_can_turn_a_clipped_update_round() -> None:
    # Two updates of norm C differ by up to 2C, so that noise z·C is z/2 in units of what a patient can do.
    assert UpdateNoise(noise_multiplier=14.0, clip_norm=0.3).spend() == Spend(7.0, 1.0, 1)


@pytest.mark.parametrize(
    "plan",
    [
        DpSgd(budget_epsilon=3.0, budget_share=1.0, delta=1e-5, sample_rate=0.2, steps=3),
        DpSgd(
            budget_epsilon=3.0,
            budget_share=1.0,
            delta=1e-5,
            sample_rate=0.2,
            steps=3,
            record="slide",
            slides_per_patient=2,
        ),
        UpdateNoise(budget_epsilon=3.0, budget_share=1.0, delta=1e-5),
        UpdateNoise(budget_epsilon=3.0, budget_share=1.0, delta=1e-5, noise_location="server"),
    ],
)
def test_a_settled_job_fits_its_budget_and_hardly_less_noise_does(plan: Any) -> None:
    budget = Budget(3.0, 1e-5)
    settled = plan.settled(10, 10**6)
    assert settled.budget_share is None and settled.budget_epsilon == 3.0
    assert budget.admits(budget.cost(settled.spend().times(10)))
    less = replace(settled, noise_multiplier=settled.noise_multiplier * 0.999)
    assert not budget.admits(budget.cost(less.spend().times(10)))
    assert settled.settled(99, 1) == settled, "a noise that is stated does not follow the number of rounds"


def test_an_update_is_clipped_and_noised() -> None:
    plan = UpdateNoise(noise_multiplier=0.5, clip_norm=2.0)
    tensors = {"a": torch.full((40_000,), 1.0), "b": torch.full((10_000,), -1.0)}
    released = plan.release(tensors, SeededNoise(3))
    assert {name: value.shape for name, value in released.items()} == {
        name: value.shape for name, value in tensors.items()
    }
    flat = torch.cat([released["a"], released["b"]]).double()
    clipped = 2.0 / math.sqrt(50_000)
    assert float(flat[:40_000].mean()) == pytest.approx(clipped, abs=5 * 1.0 / math.sqrt(40_000))
    assert float(
        (flat - torch.cat([flat.new_full((40_000,), clipped), flat.new_full((10_000,), -clipped)])).std()
    ) == pytest.approx(1.0, rel=0.02)


def test_noise_at_the_server_is_added_once_to_the_sum() -> None:
    plan = UpdateNoise(noise_multiplier=3.0, clip_norm=2.0, noise_location="server", noise_seed=1)
    assert plan.mechanism == "server-noise"
    update = {"a": torch.full((30_000,), 1.0)}
    clipped = plan.release(update, SeededNoise(0))
    assert float(clipped["a"].double().norm()) <= 2.0, "nothing but the clipped update: no noise here"
    given = plan.at_server([clipped, clipped, clipped])
    assert torch.equal(given[1]["a"], clipped["a"]) and torch.equal(given[2]["a"], clipped["a"])
    assert float((given[0]["a"] - clipped["a"]).std()) == pytest.approx(6.0, rel=0.03)
    client = replace(plan, noise_location="client")
    assert client.mechanism == "update-noise"
    assert all(torch.equal(one["a"], clipped["a"]) for one in client.at_server([clipped]))


def test_noise_at_the_server_needs_equal_weights() -> None:
    plan = UpdateNoise(noise_multiplier=3.0, noise_location="server")
    plan.admits(declared(), TASK, EXACT)
    for other in (declared(equal_weights=False), declared(linear=False)):
        with raises_reason("PRIVACY_INVALID", "weighting = uniform"):
            plan.admits(other, TASK, EXACT)
        replace(plan, noise_location="client").admits(other, TASK, EXACT)
    with raises_reason("PRIVACY_INVALID", "transport rounding"):
        plan.admits(declared(), TASK, ROUNDING)
    replace(plan, noise_location="client").admits(declared(), TASK, ROUNDING)


def test_noise_at_the_server_needs_a_server_that_aggregates() -> None:
    plan = UpdateNoise(noise_multiplier=3.0, noise_location="server")
    ring = declared(topology=SimpleNamespace(name="ring", aggregates_at_server=False))
    with raises_reason("PRIVACY_INVALID", "ring"):
        plan.admits(ring, TASK, EXACT)
    replace(plan, noise_location="client").admits(ring, TASK, EXACT)
    for each in (Open(), DpSgd(noise_multiplier=1.0), plan):
        with raises_reason("PRIVACY_INVALID", "silent", "aggregates_at_server"):
            each.admits(declared(topology=SimpleNamespace(name="silent")), TASK, EXACT)


@pytest.mark.parametrize("plan", [DpSgd(noise_multiplier=2.0), UpdateNoise(noise_multiplier=1.0)])
def test_no_number_of_a_site_s_data_goes_beside_a_protected_update(plan: PrivacyPlan) -> None:
    plan.admits(declared(numbers={"planned_steps": False}), TASK, EXACT)
    for of_data in (True, None, "no"):
        with raises_reason("PRIVACY_INVALID", "some", "loss"):
            plan.admits(declared(numbers={"planned_steps": False, "loss": of_data}), TASK, EXACT)
    Open().admits(declared(numbers={"loss": True}), TASK, EXACT)


def test_dp_sgd_refuses_a_strategy_that_looks_at_data() -> None:
    with pytest.raises(JobError) as caught:
        DpSgd(noise_multiplier=2.0).admits(declared(sees_data=True), TASK, EXACT)
    assert caught.value.reason == "PRIVACY_INVALID"
    for plan in (Open(), UpdateNoise(noise_multiplier=1.0)):
        plan.admits(declared(sees_data=True), TASK, EXACT)


@pytest.mark.parametrize("plan", [Open(), DpSgd(noise_multiplier=2.0), UpdateNoise(noise_multiplier=1.0)])
@pytest.mark.parametrize("left_out", ["linear", "keeps", "equal_weights", "sees_data", "numbers"])
def test_a_strategy_that_does_not_declare_itself_is_refused(plan: PrivacyPlan, left_out: str) -> None:
    plan.admits(declared(), TASK, EXACT)
    with raises_reason("PRIVACY_INVALID", "some", left_out):
        plan.admits(SimpleNamespace(**{n: v for n, v in DECLARED.items() if n != left_out}), TASK, EXACT)


def test_a_tiny_sample_rate_is_not_rounded_away() -> None:
    plan = DpSgd(noise_multiplier=4.0, sample_rate=1e-15, record="slide", slides_per_patient=3)
    assert plan.spend().sample_rate == pytest.approx(3e-15, rel=1e-9)
    assert replace(plan, sample_rate=1.0).spend().sample_rate == 1.0


def test_no_layer_stays_at_the_site_under_dp_sgd() -> None:
    plan = DpSgd(noise_multiplier=4.0)
    plan.admits(declared(), TASK, EXACT)
    with raises_reason("PRIVACY_INVALID", "personal layers", "share", "batch_norm"):
        plan.admits(declared(keeps=("personal layers",)), TASK, EXACT)
    UpdateNoise(noise_multiplier=4.0).admits(declared(keeps=("personal layers",)), TASK, EXACT)


MANY = 1_600_000  # weights: of a MEM with 1,024 features, as in Adnan et al. 2022


def apart(monkeypatch: pytest.MonkeyPatch, distance: float) -> None:
    """Give the sampler a distance from the ideal one."""
    monkeypatch.setattr(sampler, "DISTANCE", distance)


def test_a_sampler_that_takes_more_than_a_tenth_of_delta_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = DpSgd(budget_epsilon=8.0, budget_share=1.0, delta=1e-5, sample_rate=1.0, steps=1)
    plan.settled(60, MANY)
    # (1 + e^8) 2^-50 · 1.6e6 · 60 = 2.5e-4
    apart(monkeypatch, 2.0**-50)
    with raises_reason("PRIVACY_INVALID", "sampler"):
        plan.settled(60, MANY)
    plan.settled(60, 300)
    UpdateNoise(budget_epsilon=2.0, budget_share=1.0, delta=1e-5).settled(60, MANY)


def test_an_epsilon_far_beyond_any_use_is_refused_for_the_sampler() -> None:
    with raises_reason("PRIVACY_INVALID", "sampler"):
        UpdateNoise(budget_epsilon=60.0, budget_share=1.0, delta=1e-5).settled(60, MANY)


@pytest.mark.parametrize("steps", [1, 4])
def test_noise_is_settled_for_what_the_sampler_leaves_of_delta(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    plan = DpSgd(budget_epsilon=3.0, budget_share=1.0, delta=1e-5, sample_rate=1.0, steps=steps)
    ideal = plan.settled(10, MANY).noise_multiplier
    apart(monkeypatch, 0.099e-5 / ((1 + math.exp(3)) * MANY * 10 * steps))
    settled = plan.settled(10, MANY).noise_multiplier
    assert ideal is not None and settled is not None and settled > ideal
    assert settled == Budget(3.0, 0.901e-5).calibrate(1.0, 10 * steps)


def test_what_a_plan_draws() -> None:
    assert Open().numbers(3, 100) == 0
    assert UpdateNoise(noise_multiplier=1.0).numbers(3, 100) == 300
    assert DpSgd(budget_epsilon=1.0, budget_share=1.0, sample_rate=1.0, steps=5).numbers(3, 100) == 1500
    # Where records are drawn each takes a uniform: of so many at most, for how many there are is secret.
    assert DpSgd(budget_epsilon=1.0, budget_share=1.0, sample_rate=0.1, steps=5).numbers(3, 100) == 15 * (
        100 + 2**20
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("location", ["client", "server"])
def test_an_update_that_is_not_finite_leaves_as_one_of_zeros(bad: float, location: str) -> None:
    """A refusal would tell of the data, and no noise would hide it."""
    plan = UpdateNoise(noise_multiplier=1.0, clip_norm=1.0, noise_location=location)
    zeros = {"a": torch.zeros(8), "b": torch.zeros(2)}
    broken = {"a": torch.ones(8), "b": torch.tensor([bad, 0.0])}
    released = plan.release(broken, SeededNoise(1))
    expected = plan.release(zeros, SeededNoise(1))
    assert all(torch.equal(released[name], expected[name]) for name in zeros)


def test_noise_is_secret_unless_a_seed_is_given() -> None:
    assert DpSgd(noise_multiplier=1.0).noise_source("a", 0).secure
    seeded = DpSgd(noise_multiplier=1.0, noise_seed=7)
    draws = [
        seeded.noise_source(site, index).normal((4,), 1.0)
        for site, index in (("a", 0), ("a", 0), ("a", 1), ("b", 0))
    ]
    assert not seeded.noise_source("a", 0).secure
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({}, "budget_share or noise_multiplier"),
        ({"noise_multiplier": 1.0, "budget_share": 1.0}, "budget_share or noise_multiplier"),
        ({"noise_multiplier": -1.0}, "noise_multiplier: "),
        ({"noise_multiplier": math.nan}, "noise_multiplier: "),
        ({"noise_multiplier": math.inf}, "noise_multiplier: "),
        ({"budget_share": 0}, "privacy.budget_share: "),
        ({"budget_share": 1.01}, "privacy.budget_share: "),
        ({"budget_share": 0.5, "budget_epsilon": 0}, "privacy.budget_epsilon: "),
        ({"noise_multiplier": 1.0, "clip_norm": 0.0}, "privacy.clip_norm: "),
        ({"noise_multiplier": 1.0, "clip_norm": math.inf}, "privacy.clip_norm: "),
        ({"noise_multiplier": 1.0, "delta": 0.0}, "privacy.delta: "),
        ({"noise_multiplier": 1.0, "delta": 0.5}, "privacy.delta: "),
        ({"noise_multiplier": 1.0, "delta": 0.02}, " = 80)"),
        ({"noise_multiplier": 1.0, "sample_rate": 0.0}, "privacy.sample_rate: "),
        ({"noise_multiplier": 1.0, "sample_rate": 1.01}, "privacy.sample_rate: "),
        ({"noise_multiplier": 1.0, "batch_size": 0}, "privacy.batch_size: "),
        ({"noise_multiplier": 1.0, "steps": 0}, "privacy.steps: "),
        ({"noise_multiplier": 1.0, "steps": 1.5}, "privacy.steps: "),
        ({"noise_multiplier": 1.0, "record": "patch"}, "privacy.record: "),
        ({"noise_multiplier": 1.0, "record": "slide"}, "privacy.slides_per_patient: "),
        ({"noise_multiplier": 1.0, "slides_per_patient": 3}, "privacy.slides_per_patient: "),
        ({"noise_multiplier": 1.0, "clip_norm": 1e-20}, "privacy.clip_norm: "),
        ({"noise_multiplier": 1e9}, "privacy.noise_multiplier: "),
        ({"noise_multiplier": 1.0, "noise_seed": "x"}, "privacy.noise_seed: "),
        ({"noise_multiplier": 1.0, "published_epsilon": -1}, "privacy.published_epsilon: "),
    ],
)
def test_what_is_wrong_with_the_numbers_is_said(numbers: dict[str, Any], says: str) -> None:
    with raises_reason("PRIVACY_INVALID", says):
        DpSgd(**numbers)


def test_a_place_for_the_noise_that_is_none_is_refused() -> None:
    with raises_reason("PRIVACY_INVALID", "noise_location"):
        UpdateNoise(noise_multiplier=1.0, noise_location="cloud")


@pytest.mark.parametrize(
    "plan", [Open(), DpSgd(noise_multiplier=2.0), UpdateNoise(budget_epsilon=1.0, budget_share=1.0)]
)
def test_a_plan_says_itself_as_plain_data(plan: PrivacyPlan) -> None:
    assert plan.to_json()["mechanism"] == plan.mechanism
    assert plan.describe()


def test_a_plan_that_is_not_settled_has_no_cost_yet() -> None:
    with raises_reason("PRIVACY_INVALID"):
        DpSgd(budget_epsilon=1.0, budget_share=1.0).spend()


HIDDEN = SimpleNamespace(name="sum", readable=False, exact=False)
SHARED = {"noise": "shared", "honest": 3, "noise_multiplier": 4.0}


@pytest.mark.parametrize("kind", [DpSgd, UpdateNoise])
def test_shared_noise_is_a_mechanism_of_its_own(kind: Any) -> None:
    plan = kind(**SHARED)
    assert plan.mechanism == f"{kind.mechanism}-shared" and plan.to_json()["mechanism"] == plan.mechanism
    assert plan.spend().honest == 3
    assert plan.sites_noise == pytest.approx(4 / math.sqrt(3))
    assert plan.sum_step == grid(plan.sites_noise * plan.clip_norm), "the share's grid, not that of the whole"
    assert kind(noise_multiplier=4.0).sum_step is None and kind(noise_multiplier=4.0).spend().honest == 1
    alone = plan.without_noise(seed=1)
    assert alone.mechanism == kind.mechanism and alone.sum_step is None, "a bound shares noise with nobody"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"noise": "shared"}, "honest"),
        ({"noise": "shared", "honest": 1}, "honest"),
        ({"noise": "shared", "honest": True}, "honest"),
        ({"honest": 2}, "honest"),
        ({"noise": "loud"}, "noise"),
        ({"noise": "shared", "honest": 2, "steps": 2}, "steps"),
    ],
)
def test_settings_of_shared_noise_that_do_not_go_together(settings: dict[str, Any], says: str) -> None:
    with raises_reason("PRIVACY_INVALID", f"privacy.{says}"):
        DpSgd(noise_multiplier=4.0, **settings)


def test_a_trusted_server_shares_no_noise() -> None:
    with raises_reason("PRIVACY_INVALID", "noise_location"):
        UpdateNoise(noise_multiplier=4.0, noise="shared", honest=2, noise_location="server")


@pytest.mark.parametrize("kind", [DpSgd, UpdateNoise])
def test_shared_noise_needs_a_sum_that_alone_is_seen(kind: Any) -> None:
    plan = kind(**SHARED)
    plan.admits(declared(one_step=True), TASK, HIDDEN)
    ring = SimpleNamespace(name="ring", aggregates_at_server=False)
    with raises_reason("PRIVACY_INVALID", "masked_sum", "exact"):
        plan.admits(declared(), TASK, EXACT)
    for other in ({"linear": False}, {"equal_weights": False}, {"topology": ring}):
        with raises_reason("PRIVACY_INVALID", "linear"):
            plan.admits(declared(**other), TASK, HIDDEN)


def test_a_share_of_dp_sgd_s_noise_is_that_of_one_step() -> None:
    with raises_reason("PRIVACY_INVALID", "fedsgd"):
        DpSgd(**SHARED).admits(declared(), TASK, HIDDEN)
    UpdateNoise(**SHARED).admits(declared(), TASK, HIDDEN)
    with raises_reason("PRIVACY_INVALID", "privacy.steps"):
        DpSgd(noise_multiplier=4.0, steps=2).admits(declared(one_step=True), TASK, EXACT)


def test_a_share_of_noise_is_on_the_grid_in_float64() -> None:
    plan = UpdateNoise(noise="shared", honest=4, noise_multiplier=2.0, clip_norm=3.0)
    released = plan.release({"w": torch.full((50_000,), 1.0)}, SeededNoise(5))["w"]
    assert released.dtype == torch.float64
    steps = released / plan.sum_step
    assert torch.equal(steps, steps.round())
    assert float(released.std()) == pytest.approx(3.0, rel=0.02), "z·C/√h, not z·C"
    others = [plan.release({"w": torch.zeros(50_000)}, SeededNoise(seed))["w"] for seed in (6, 7, 8)]
    assert float((released + sum(others)).std()) == pytest.approx(6.0, rel=0.02), "four shares are z·C"


def test_a_sum_is_divided_by_what_no_sites_data_decide() -> None:
    total = {"w": torch.full((2,), 96.0, dtype=torch.float64)}
    assert DpSgd(**SHARED, batch_size=32).of_sum(total, 4.0)["w"].tolist() == [3.0, 3.0]
    assert UpdateNoise(**SHARED).of_sum(total, 4.0)["w"].tolist() == [24.0, 24.0]
    assert Open().of_sum(total, 32.0)["w"].tolist() == [3.0, 3.0]


def test_no_step_at_a_site_is_protected_by_a_share() -> None:
    with raises_reason("PRIVACY_INVALID", "fedsgd"):
        DpSgd(**SHARED).train(SimpleNamespace(by_record=lambda plan: None))  # type: ignore[arg-type]


def test_every_honest_sites_draw_counts_for_the_sampler() -> None:
    local, shared = UpdateNoise(noise_multiplier=4.0), UpdateNoise(**SHARED)
    assert shared.numbers(10, 1000) == 3 * local.numbers(10, 1000)


def test_the_pool_of_shared_noise_has_the_same_sample_and_all_of_the_noise() -> None:
    plan = DpSgd(**SHARED, sample_rate=32 / 705, batch_size=32)
    pooled = plan.pooled(plan, sites=4, steps=9, weights=10)
    assert pooled.spend() == Spend(4.0, 32 / 705, 9)


def adnan(rounds: int = 3966) -> Spend:
    """Return Adnan et al. 2022 with noise that four hospitals share, three of whom are counted on."""
    plan = DpSgd(noise="shared", honest=3, noise_multiplier=4.0, sample_rate=32 / 705, batch_size=32)
    return plan.spend().times(rounds)


@pytest.mark.parametrize(
    ("who", "figure"),
    [
        (adnan(), 2.898),  # the server and one hospital
        (adnan(3965), 2.8974),  # the paper's number of steps
        (adnan().against(4), 2.444),  # outsiders, or the server alone
        (adnan().against(2), 3.704),  # the server and two
        (adnan().alone(), 5.755),  # all others
    ],
)
def test_what_shared_noise_costs_against_whom(who: Spend, figure: float) -> None:
    digits = len(str(figure).partition(".")[2])
    assert round(epsilon([who], 1e-4), digits) == figure


def test_with_other_shares_than_the_jobs_the_promise_would_not_hold() -> None:
    # A site's patients are protected by the others' shares. Were t, or the number of sites, each site's own:
    # A counts on two of four, the other three on all four; against the server and two, A's and one share.
    of_t = 4.0 * math.sqrt(1 / 2 + 1 / 4)
    # A counts on three of four, the others on five of six, two of whom do not exist; against server and one.
    of_n = 4.0 * math.sqrt(1 / 3 + 2 / 5)
    assert (round(of_t, 3), round(of_n, 3)) == (3.464, 3.425)
    figures = [round(epsilon([Spend(z, 32 / 705, 3966)], 1e-4), 3) for z in (of_t, of_n)]
    assert figures == [3.447, 3.494], "not the 2.898 that each site was promised"

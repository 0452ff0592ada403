"""The second layer of policy: it narrows or it is an error, and alone says what a site takes part in."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoflare.errors import JobError
from histoflare.privacy.budget import Filter
from histoflare.privacy.own_policy import (
    Narrowing,
    StewardPolicy,
    check_taking_part,
    faults,
    layers,
    narrowed,
)
from histoflare.privacy.policy import COUNTS, EXHAUSTED, REFUSE, Policy, Protection
from histoflare.privacy.spend import Spend
from histoflare.reasons import REASONS
from tests.refusals import raises_reason

METRICS = ("accuracy", "auc", "dice", "n_patients", "validation/auc")
NUMBERS = ("loss", "steps")
RECORDS = ("patient", "slide")
LISTS: dict[str, Any] = {"purposes": ("research",), "strategies": ("fedavg",), "models": ("mem",)}
DP = Policy(
    name="dp",
    mechanism="dp-sgd",
    metrics=("auc", "dice"),
    counts=False,
    minimum_patients=5,
    protection=Protection(
        8.0,
        1e-5,
        10,
        ("patient",),
        seeded_noise=False,
        colluders=2,
        all_collude_epsilon=20.0,
        sites_per_patient=2,
    ),
)
OPEN = Policy("open", "open", ("auc", "validation/auc"), counts=True, minimum_patients=2)


def some(names: tuple[str, ...], least: int = 0) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(names), unique=True, min_size=least).map(tuple)


budgets = {
    "epsilon": st.sampled_from([0.5, 1.0, 2.0, 7.9, 8.0, 30.0]) | st.floats(0.05, 50.0),
    "delta": st.sampled_from([1e-9, 1e-6, 1e-5, 1e-3]) | st.floats(1e-12, 0.01),
    "evaluations": st.integers(0, 20),
    "records": some(RECORDS, least=1),
    "seeded_noise": st.booleans(),
    "job_share": st.sampled_from([0.1, 0.5, 1.0]) | st.floats(0.01, 1.0),
    "colluders": st.integers(1, 5),
    "sites_per_patient": st.integers(1, 3),
    "all_collude_epsilon": st.none() | st.sampled_from([2.0, 20.0]) | st.floats(0.05, 50.0),
    "exhausted": st.sampled_from(EXHAUSTED),
}
outer = {
    "minimum_patients": st.integers(1, 20),
    "metrics": some(METRICS),
    "counts": st.booleans(),
    "numbers": some(NUMBERS),
}
protections = st.builds(Protection, **budgets).filter(
    lambda each: not (each.leaves_out and each.sites_per_patient > 1)  # no policy says so
)
policies = st.builds(
    Policy,
    name=st.sampled_from(["dp", "open"]),
    mechanism=st.just("dp-sgd"),
    protection=st.none() | protections,
    **outer,
)
narrowings = st.builds(Narrowing, **{name: st.none() | each for name, each in (outer | budgets).items()})
stewards = st.builds(
    StewardPolicy,
    purposes=some(("research", "teaching")),
    strategies=some(("fedavg", "cyclic")),
    models=some(("mem", "dhunet")),
    scopes=st.none() | some(("dp", "open")),
    everywhere=st.just(Narrowing()) | narrowings,
    scope=st.dictionaries(st.sampled_from(["dp", "open"]), narrowings),
    pins=st.dictionaries(st.sampled_from("ab"), st.just("8b" * 32)),
    trust_ca=st.booleans(),
)


def holds_within(inner: Policy, limit: Policy) -> None:
    """Hold every field of a policy to a limit; a field that this does not know fails."""
    known = {"name", "mechanism", "metrics", "counts", "minimum_patients", "numbers", "protection", *LISTS}
    known |= {"pins", "trust_ca"}  # of which no signed policy says anything
    assert {field.name for field in fields(Policy)} == known, "say here what narrower means"
    assert (inner.name, inner.mechanism) == (limit.name, limit.mechanism)
    assert set(inner.metrics) <= set(limit.metrics)
    assert set(inner.numbers) <= set(limit.numbers)
    assert limit.counts or not inner.counts
    assert inner.minimum_patients >= limit.minimum_patients
    assert (inner.protection is None) == (limit.protection is None)
    if inner.protection is None or limit.protection is None:
        return
    within, bound = inner.protection, limit.protection
    assert {field.name for field in fields(Protection)} == set(budgets), "say here what narrower means"
    assert within.epsilon <= bound.epsilon and within.delta <= bound.delta
    assert within.evaluations <= bound.evaluations
    assert set(within.records) <= set(bound.records) and within.records
    assert bound.seeded_noise or not within.seeded_noise
    assert within.job_share <= bound.job_share
    assert bound.leaves_out or not within.leaves_out, "a job is taken that was to be refused"
    assert not (within.leaves_out and within.sites_per_patient > 1), "left out here, and there at the other"
    assert within.colluders >= bound.colluders and within.sites_per_patient >= bound.sites_per_patient
    assert (within.all_collude_epsilon or within.epsilon) <= (bound.all_collude_epsilon or bound.epsilon)


@given(policy=policies, own=stewards)
def test_what_holds_is_never_wider_than_what_was_signed(policy: Policy, own: StewardPolicy) -> None:
    try:
        found = narrowed(policy, own)
    except JobError as error:
        assert error.reason in ("POLICY_INVALID", "SCOPE_NOT_ALLOWED")
        assert (error.reason == "SCOPE_NOT_ALLOWED") == (not own.takes_part(policy.name))
        assert bool(faults(policy, own)) == (error.reason == "POLICY_INVALID")
        return
    holds_within(found, policy)
    assert (found.purposes, found.strategies, found.models) == (own.purposes, own.strategies, own.models)
    assert (found.pins, found.trust_ca) == (own.pins, own.trust_ca)
    metrics = dict.fromkeys([*METRICS, *COUNTS], 0.5)
    assert set(found.allowed_metrics(metrics)) <= set(policy.allowed_metrics(metrics))


@st.composite
def within(draw: st.DrawFn, policy: Policy) -> Narrowing:
    """Return entries that the policy admits."""
    choices: dict[str, Any] = {
        "minimum_patients": st.integers(policy.minimum_patients, 40),
        "metrics": some(policy.metrics) if policy.metrics else st.just(()),
        "counts": st.just(False) | st.just(policy.counts),
        "numbers": some(policy.numbers) if policy.numbers else st.just(()),
    }
    if policy.protection is not None:
        bound = policy.protection
        together = bound.all_collude_epsilon or bound.epsilon
        choices |= {
            "epsilon": st.floats(bound.epsilon / 4, bound.epsilon),
            "delta": st.floats(bound.delta / 4, bound.delta),
            "evaluations": st.integers(0, bound.evaluations),
            "records": some(bound.records, least=1),
            "seeded_noise": st.just(False) | st.just(bound.seeded_noise),
            "colluders": st.integers(bound.colluders, 9),
            "sites_per_patient": st.just(1) if bound.leaves_out else st.integers(bound.sites_per_patient, 4),
            "exhausted": st.just(REFUSE) | st.just(bound.exhausted),
            "all_collude_epsilon": st.floats(together / 4, together),
        }
    return Narrowing(**{name: draw(st.none() | each) for name, each in choices.items()})


@given(data=st.data(), policy=policies)
def test_what_is_narrower_is_taken(data: st.DataObject, policy: Policy) -> None:
    own = StewardPolicy(everywhere=data.draw(within(policy)))
    try:
        found = narrowed(policy, own)
    except JobError as error:  # a budget so small that it is none
        assert policy.protection is not None
        assert "epsilon and delta: " in str(error)
        return
    holds_within(found, policy)
    for name, value in vars(own.everywhere).items():
        inside = name in budgets
        if inside and policy.protection is None:
            continue
        place, signed = (found.protection, policy.protection) if inside else (found, policy)
        assert getattr(place, name) == (getattr(signed, name) if value is None else value)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("minimum_patients", 4),
        ("metrics", ("auc", "loss")),
        ("metrics", ("validation/auc",)),
        ("counts", True),
        ("epsilon", 8.000001),
        ("delta", 1.1e-5),
        ("evaluations", 11),
        ("records", ("patient", "slide")),
        ("records", ("slide",)),
        ("seeded_noise", True),
        ("colluders", 1),
        ("sites_per_patient", 1),
        ("all_collude_epsilon", 20.5),
    ],
)
@pytest.mark.parametrize("place", ["everywhere", "scope"])
def test_to_widen_is_an_error_that_says_both_values(entry: str, value: object, place: str) -> None:
    entries: Any = Narrowing(**{entry: value})
    own = StewardPolicy(**LISTS, **{place: entries if place == "everywhere" else {"dp": entries}})
    with pytest.raises(JobError) as caught:
        narrowed(DP, own)
    assert caught.value.reason == "POLICY_INVALID"
    text = str(caught.value)
    signed = getattr(DP.protection if entry in budgets else DP, entry)
    for each in (value, signed):
        said = (
            str(each).lower()
            if isinstance(each, bool)
            else ", ".join(each)
            if isinstance(each, tuple)
            else str(each)
        )
        assert said in text
    assert entry in text


def test_a_scope_may_not_take_back_what_holds_everywhere() -> None:
    own = StewardPolicy(everywhere=Narrowing(epsilon=2.0), scope={"dp": Narrowing(epsilon=4.0)})
    with raises_reason("POLICY_INVALID", "[scope.dp] epsilon: ", 4.0, 2.0):
        narrowed(DP, own)
    further = StewardPolicy(everywhere=Narrowing(epsilon=4.0), scope={"dp": Narrowing(epsilon=2.0)})
    assert narrowed(DP, further).protection == replace(DP.protection, epsilon=2.0)  # type: ignore[type-var]


@pytest.mark.parametrize("entry", sorted(budgets))
def test_a_budget_for_all_scopes_is_none_for_one_without(entry: str) -> None:
    """The steward who writes it means every patient: an open scope must not stay behind unseen."""
    assert DP.protection is not None
    everywhere = Narrowing(**{entry: getattr(DP.protection, entry)})
    with raises_reason("POLICY_INVALID", "scope open", f"{entry}: "):
        narrowed(OPEN, StewardPolicy(everywhere=everywhere))
    assert not faults(OPEN, StewardPolicy(everywhere=everywhere, scopes=("dp",)))
    assert narrowed(OPEN, StewardPolicy(scope={"dp": everywhere})) == OPEN


def test_a_budget_that_allows_nothing_is_said_before_any_job() -> None:
    with raises_reason("POLICY_INVALID", "[scope.dp]", 1e-4, 1e-9):
        narrowed(DP, StewardPolicy(everywhere=Narrowing(epsilon=1e-4, delta=1e-9)))


def test_a_scope_that_is_not_listed_is_closed() -> None:
    with pytest.raises(JobError) as caught:
        narrowed(DP, StewardPolicy(scopes=("open",)))
    assert caught.value.reason == "SCOPE_NOT_ALLOWED"
    assert layers(DP, StewardPolicy(scopes=("open",)))["epsilon"] == (8.0, None, None)


def test_the_layers_side_by_side() -> None:
    own = StewardPolicy(everywhere=Narrowing(epsilon=4.0, counts=False), scope={"dp": Narrowing(epsilon=2.0)})
    found = layers(DP, own)
    assert found["epsilon"] == (8.0, 2.0, 2.0)
    assert found["counts"] == (False, False, False)
    assert found["evaluations"] == (10, None, 10)
    assert not set(layers(OPEN, StewardPolicy())) & set(budgets)


JOB: dict[str, Any] = {"purpose": "research", "strategy_name": "fedavg", "model_name": "mem"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"purpose": "marketing"}, "PURPOSE_NOT_ALLOWED"),
        ({"purpose": None}, "PURPOSE_NOT_ALLOWED"),
        ({"purpose": ["research"]}, "PURPOSE_NOT_ALLOWED"),
        ({"strategy_name": "cyclic"}, "STRATEGY_NOT_ALLOWED"),
        ({"strategy_name": "FedAvg"}, "STRATEGY_NOT_ALLOWED"),
        ({"model_name": "dhunet"}, "MODEL_NOT_ALLOWED"),
        ({"model_name": ""}, "MODEL_NOT_ALLOWED"),
    ],
)
def test_what_is_not_listed_is_refused(changes: dict[str, Any], reason: str) -> None:
    policy = narrowed(DP, StewardPolicy(**LISTS))
    check_taking_part(policy, **JOB)
    with pytest.raises(JobError) as caught:
        check_taking_part(policy, **JOB | changes)
    assert caught.value.reason == reason
    assert reason in REASONS


def test_a_signed_policy_by_itself_takes_part_in_nothing() -> None:
    with pytest.raises(JobError) as caught:
        check_taking_part(DP, **JOB)
    assert caught.value.reason == "PURPOSE_NOT_ALLOWED"


@given(
    bound=protections,
    lower=st.tuples(st.floats(0.2, 1.0), st.floats(0.01, 1.0)),
    noise=st.floats(0.4, 40.0),
    rate=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    steps=st.integers(1, 3000),
    honest=st.sampled_from([1, 2, 15]),
)
def test_a_lower_budget_admits_nothing_that_the_signed_one_would_not(
    bound: Protection, lower: tuple[float, float], noise: float, rate: float, steps: int, honest: int
) -> None:
    """Also across the two Rényi orders: what fits a smaller budget fits the greater."""
    own = Narrowing(epsilon=bound.epsilon * lower[0], delta=bound.delta * lower[1])
    try:
        inner = narrowed(replace(DP, protection=bound), StewardPolicy(everywhere=own)).protection
        signed = bound.budget()
    except JobError:
        return
    assert inner is not None and inner.budget() == replace(signed, epsilon=own.epsilon, delta=own.delta)
    spend = Spend(noise, rate, steps, honest)
    if all(has_room(kept, spend) for kept in inner.budget().filters()):
        assert all(has_room(kept, spend) for kept in signed.filters())


def has_room(kept: Filter, spend: Spend) -> bool:
    return kept.budget.admits(kept.cost([kept.price(spend)]))

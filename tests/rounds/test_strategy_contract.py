"""What every strategy must do, and apart from it what one owes that calls itself linear.

A new strategy is covered by being registered. The ones of ``throwaway`` are covered too: they use what no
shipped strategy does.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from histoflare.errors import JobError
from histoflare.privacy.plan import DpSgd, Open, UpdateNoise
from histoflare.rounds.local import predict
from histoflare.rounds.registry import find_class
from histoflare.rounds.round import count_sent, count_sent_by_job, server_round, site_round
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, add, hash_state, load_state, model_state
from histoflare.rounds.strategies import STRATEGIES, make_strategy
from histoflare.rounds.strategies.hub import NamedHub
from histoflare.rounds.strategy import ServerRound, SiteOutcome, Strategy, Update, join, split
from histoflare.rounds.transports.float32 import PLAIN
from histoflare.rounds.transports.masked_sum import MaskedSum

from ..refusals import raises_reason
from .throwaway import THROWAWAY
from .toy import RowTask, ToyTask, toy_sites

TASK = ToyTask(hidden=4, batch_norm=True)
DATA = toy_sites(3)
SITES = list(DATA)


FIELDS: dict[str, dict[str, Any]] = {
    "fedsgd": {"learning_rate": 1.0},
    "fednova": {"effective_steps": 1.0},
    "feddyn": {"alpha": 1.0},
    "fedrep": {"share": ["body", "head"]},
    "krum": {"faulty": 0},
    "moon": {"mu": 0.1},
    "qfedavg": {"q": 0.0},
}
"""Fields with which the next model is the last plus the mean of what was sent, where a strategy can do that;
and what it cannot be made without."""

OWN_STEP = {"feddyn", "fedadagrad", "fedadam", "fedyogi"}
"""Strategies whose server takes another step than the mean of what was sent."""


def make(name: str, **fields: Any) -> Strategy:
    """Return a registered or a throw-away strategy, for the sites of this file."""
    if name in THROWAWAY:
        return THROWAWAY[name](**fields)
    kind = find_class(STRATEGIES[name])
    named = {"sites": SITES} if issubclass(kind, NamedHub) else {}
    return make_strategy(name, **{**FIELDS.get(name, {}), **named, **fields})


def changed(strategy: Strategy, **fields: Any) -> Strategy:
    """Return it with other fields."""
    return make(strategy.name, **{**asdict(strategy), **fields})


def keeps_equal_weights(strategy: Strategy) -> Strategy:
    """Return it with equal weights where it has a choice."""
    return changed(strategy, weighting="uniform") if hasattr(strategy, "weighting") else strategy


@pytest.fixture(params=sorted({*STRATEGIES, *THROWAWAY}))
def strategy(request: pytest.FixtureRequest) -> Strategy:
    return make(request.param)


def start_model() -> State:
    return model_state(TASK.build_model())


def outcome_of(strategy: Strategy, site: str, model: State, site_state: State | None = None) -> SiteOutcome:
    return site_round(
        TASK,
        strategy,
        join(model, strategy.downlink(strategy.begin(model))),
        DATA[site],
        site=site,
        site_state=site_state or {},
        round_index=0,
        total_rounds=2,
        seed=1,
        plan=Open(),
    )


def good_updates(strategy: Strategy, model: State) -> list[Update]:
    """Return as many updates of a first round as the strategy needs, or one."""
    trainers = strategy.topology.plan(0, SITES, 1).trainers
    asked = trainers[: strategy.least_updates]
    return [outcome_of(strategy, site, model).update for site in asked]


def test_it_is_named_as_registered_and_its_fields_are_json(strategy: Strategy) -> None:
    assert type(make(strategy.name)) is type(strategy)
    assert make(strategy.name, **json.loads(json.dumps(asdict(strategy)))) == strategy


def test_a_site_sends_what_the_strategy_says_and_changes_nothing_it_was_given(strategy: Strategy) -> None:
    model = start_model()
    before = hash_state(model)
    update = outcome_of(strategy, SITES[0], model).update
    assert hash_state(model) == before
    assert {n: (t.shape, t.dtype) for n, t in update.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in strategy.sent(model).items()
    }
    assert all(tensor.is_floating_point() for tensor in update.tensors.values())
    assert math.isfinite(update.weight) and update.weight >= 0
    assert set(update.numbers) == set(strategy.numbers)
    assert all(type(value) is float and math.isfinite(value) for value in update.numbers.values())
    assert any(bool((tensor != 0).any()) for tensor in update.tensors.values())


def test_a_round_learns_and_keeps_the_form_of_the_state(strategy: Strategy) -> None:
    result = run_in_process(TASK, DATA, strategy, rounds=9, seed=1)
    assert list(result.state) == list(result.initial)
    assert result.state["norm.num_batches_tracked"].item() == 0  # never sent, never averaged
    for name, tensor in result.state.items():
        assert (tensor.shape, tensor.dtype) == (result.initial[name].shape, result.initial[name].dtype)
    assert sum(result.losses[-1].values()) / len(result.losses[-1]) < 0.9 * sum(
        result.losses[0].values()
    ) / len(result.losses[0])


def test_the_same_seed_gives_the_same_bytes(strategy: Strategy) -> None:
    first, again, other = (run_in_process(TASK, DATA, strategy, 4, seed) for seed in (1, 1, 2))
    assert hash_state(first.handed_out) == hash_state(again.handed_out) != hash_state(other.handed_out)
    assert hash_state(first.state) == hash_state(again.state)


def test_a_run_goes_on_from_what_server_and_sites_kept(strategy: Strategy) -> None:
    if strategy.name == "feddg_ga":
        return  # its step falls over all rounds of a run, so half a run is another run
    whole = run_in_process(TASK, DATA, strategy, 4, 1)
    half = run_in_process(TASK, DATA, strategy, 2, 1)
    rest = run_in_process(
        TASK,
        DATA,
        strategy,
        4,
        1,
        start_round=2,
        initial_state=half.state,
        initial_own=half.own,
        site_states=half.site_states,
    )
    assert hash_state(rest.state) == hash_state(whole.state)
    assert hash_state(rest.own) == hash_state(whole.own)


def test_the_server_keeps_the_form_of_what_it_began_with(strategy: Strategy) -> None:
    model = start_model()
    own = strategy.begin(model)
    made = server_round(strategy, model, good_updates(strategy, model), SITES, own=own)
    for after, before in ((made.model, model), (made.own, own)):
        assert {n: (t.shape, t.dtype) for n, t in after.items()} == {
            n: (t.shape, t.dtype) for n, t in before.items()
        }
    assert json.loads(json.dumps(made.notes())) == made.notes()


def test_what_goes_down_is_the_model_and_what_is_declared(strategy: Strategy) -> None:
    model = start_model()
    own = strategy.begin(model)
    assert set(strategy.downlink(own)) <= set(own)
    assert split(join(model, own)) == (model, own)


def test_what_a_job_hands_out_is_of_its_task_and_known_to_whoever_received_the_round(
    strategy: Strategy,
) -> None:
    run = run_in_process(TASK, DATA, strategy, 2, 1)
    models = strategy.models(run.state, run.own)
    assert models and not any("/" in name for name in models)
    for each in models.values():
        load_state(TASK.build_model(), each)
    assert hash_state(strategy.handed_out(run.state, run.own)) == hash_state(run.handed_out)
    assert hash_state(strategy.handed_out(run.state, strategy.downlink(run.own))) == hash_state(
        run.handed_out
    )
    said = [predict(TASK, each, DATA["site_0"], "test").probabilities for each in models.values()]
    together = predict(TASK, run.handed_out, DATA["site_0"], "test").probabilities
    np.testing.assert_allclose(together, np.mean(said, axis=0), atol=1e-6)


def test_an_update_of_zeros_changes_nothing(strategy: Strategy) -> None:
    model = start_model()
    zeros = [
        replace(update, tensors={name: torch.zeros_like(tensor) for name, tensor in update.tensors.items()})
        for update in good_updates(strategy, model)
    ]
    assert hash_state(server_round(strategy, model, zeros, SITES).model) == hash_state(model)


def test_one_participant_alone_gives_its_model(strategy: Strategy) -> None:
    """Or as many with the same update as are needed."""
    if strategy.name in OWN_STEP:
        return
    model = start_model()
    outcome = outcome_of(strategy, SITES[0], model)
    same = [replace(outcome.update, site=site) for site in SITES[: strategy.least_updates]]
    made = server_round(strategy, model, same, SITES)
    (combined,) = [
        each for name, each in strategy.models(made.model, made.own).items() if name in ("global", SITES[0])
    ]
    for name, expected in add(model, split(outcome.update.tensors)[0]).items():
        torch.testing.assert_close(combined[name], expected, rtol=1e-6, atol=1e-7)


def test_the_order_of_arrival_changes_no_bit(strategy: Strategy) -> None:
    """With numbers so far apart that a float64 sum depends on its order: (1e17 + 1) - 1e17 is not 1."""
    strategy = keeps_equal_weights(strategy)
    model = {name: torch.zeros_like(tensor) for name, tensor in start_model().items()}
    asked = strategy.topology.plan(0, SITES, 1).trainers
    like = strategy.sent(model)
    sent = [
        Update(
            site,
            {name: torch.full_like(tensor, value) for name, tensor in like.items()},
            1.0,
            dict.fromkeys(strategy.numbers, 1.0),
        )
        for site, value in zip(asked, (1.0, 1e17, -1e17), strict=False)
    ]
    first = server_round(strategy, model, sent, SITES)
    for arrived in (sent[::-1], sent[1:] + sent[:1]):
        again = server_round(strategy, model, arrived, SITES)
        assert hash_state(again.model) == hash_state(first.model)
        assert hash_state(again.own) == hash_state(first.own)


@pytest.mark.parametrize(
    "fault",
    [
        *(
            "nan",
            "inf",
            "shape",
            "missing",
            "unknown",
            "dtype",
            "weight",
            "site",
            "double",
            "none",
            "negative",
        ),
        "number",
    ],
)
def test_a_bad_update_is_refused_and_never_averaged(strategy: Strategy, fault: str) -> None:
    model = start_model()
    good, *others = good_updates(strategy, model)
    tensors = dict(good.tensors)
    name = next(iter(tensors))
    site, weight, numbers = good.site, 1.0, dict(good.numbers)
    match fault:
        case "number":
            numbers["patients"] = 17.0
        case "nan" | "inf":
            tensors[name] = torch.full_like(tensors[name], float(fault))
        case "shape":
            tensors[name] = tensors[name].flatten()[:-1]
        case "missing":
            del tensors[name]
        case "unknown":
            tensors["backdoor"] = torch.zeros(1)
        case "dtype":
            tensors[name] = tensors[name].double()
        case "weight":
            weight = float("nan")
        case "negative":
            weight = -1.0
        case "site":
            site = "stranger"
    updates = {"double": [good, good], "none": []}.get(
        fault, [Update(site, tensors, weight, numbers), *others]
    )
    with pytest.raises(JobError):
        server_round(strategy, model, updates, SITES)


@pytest.mark.parametrize("name", sorted(name for name in {*STRATEGIES, *THROWAWAY} if make(name).numbers))
@pytest.mark.parametrize("number", [math.nan, math.inf, "3", None])
def test_a_number_that_is_missing_or_none_is_refused(name: str, number: Any) -> None:
    model, strategy = start_model(), make(name)
    good, *others = good_updates(strategy, model)
    for numbers in ({}, dict.fromkeys(good.numbers, number)):
        with pytest.raises(JobError):
            server_round(strategy, model, [replace(good, numbers=numbers), *others], SITES)


def test_partial_sharing_keeps_the_rest_at_home(strategy: Strategy) -> None:
    partial = changed(strategy, share=["body"])
    model = start_model()
    outcome = outcome_of(partial, SITES[0], model)
    assert set(split(outcome.update.tensors)[0]) == {"body.weight", "body.bias"}
    combined = server_round(partial, model, good_updates(partial, model), SITES).model
    assert torch.equal(combined["head.weight"], model["head.weight"])
    personal = partial.personalize(combined, outcome.site_state)
    assert torch.equal(personal["body.weight"], combined["body.weight"]) != partial.own_models
    assert not torch.equal(personal["head.weight"], model["head.weight"])
    assert list(personal) == list(start_model())


def test_it_declares_what_a_privacy_plan_asks(strategy: Strategy) -> None:
    for name, kind in (("linear", bool), ("kept", tuple), ("sees_data", bool)):
        assert isinstance(vars(type(strategy))[name], kind), f"{name}: of its own, not inherited"
    assert all(type(of_data) is bool for of_data in strategy.numbers.values())
    Open().admits(strategy, TASK, PLAIN)
    if any(strategy.numbers.values()):
        with pytest.raises(JobError) as caught:
            UpdateNoise(noise_multiplier=1.0).admits(strategy, TASK, PLAIN)
        assert caught.value.reason == "PRIVACY_INVALID"
    else:
        UpdateNoise(noise_multiplier=1.0).admits(strategy, TASK, PLAIN)
    if strategy.keeps or strategy.sees_data or any(strategy.numbers.values()):
        with pytest.raises(JobError):
            DpSgd(noise_multiplier=1.0).admits(strategy, RowTask(), PLAIN)
    else:
        DpSgd(noise_multiplier=1.0).admits(strategy, RowTask(), PLAIN)


def test_what_stays_at_a_site_is_what_it_keeps(strategy: Strategy) -> None:
    for fields in ({}, {"share": ["body"]}, {"batch_norm": "local"}):
        other = changed(strategy, **fields)
        kept = outcome_of(other, SITES[0], start_model()).site_state
        assert bool(kept) == bool(other.keeps), "nothing is kept that is not declared"
        if fields:
            with pytest.raises(JobError):
                DpSgd(noise_multiplier=1.0).admits(other, RowTask(), PLAIN)


def test_a_job_noises_as_many_numbers_as_a_site_sends(strategy: Strategy) -> None:
    for share in (strategy.share, ["body"]):
        other, model = changed(strategy, share=share), start_model()
        sent = sum(t.numel() for t in outcome_of(other, SITES[0], model).update.tensors.values())
        assert count_sent(other, model) == count_sent_by_job(other, TASK) == sent


@pytest.fixture(params=sorted(name for name in {*STRATEGIES, *THROWAWAY} if make(name).linear))
def linear(request: pytest.FixtureRequest) -> Strategy:
    return keeps_equal_weights(make(request.param))


def test_the_next_state_of_a_linear_strategy_follows_from_the_sum_alone(linear: Strategy) -> None:
    """Noise in one of the updates is noise in their sum, and in nothing else."""
    assert linear.equal_weights
    model = start_model()
    own = linear.begin(model)
    made = [outcome_of(linear, site, model).update for site in linear.topology.plan(0, SITES, 1).trainers]
    generator = torch.Generator().manual_seed(0)
    shift = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in made[0].tensors.items()}

    def combined(updates: list[Update]) -> State:
        outcome = linear.combine(ServerRound(model, own, updates, SITES))
        return join(outcome.model, outcome.own)

    def shifted(index: int) -> State:
        moved = replace(made[index], tensors=add(made[index].tensors, shift))
        return combined([moved if i == index else update for i, update in enumerate(made)])

    first, plain = shifted(0), combined(made)
    for index in range(len(made)):
        for name, tensor in shifted(index).items():
            torch.testing.assert_close(tensor, first[name], rtol=1e-4, atol=1e-5)
    for name, moved in () if linear.name in OWN_STEP else shift.items():
        torch.testing.assert_close(
            first[name] - plain[name], moved / len(made), rtol=1e-4, atol=1e-5, check_dtype=False
        )


def test_a_linear_strategy_makes_the_same_of_a_secure_sum(linear: Strategy) -> None:
    if linear.numbers or linear.topology.skips_sites:
        with raises_reason("TRANSPORT_UNFIT"):
            run_in_process(TASK, DATA, linear, 1, 1, transport=MaskedSum())
        return
    plain = run_in_process(TASK, DATA, linear, 2, 1)
    summed = run_in_process(TASK, DATA, linear, 2, 1, transport=MaskedSum())
    for one, other in ((plain.state, summed.state), (plain.own, summed.own)):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6)


def test_a_strategy_that_is_not_linear_makes_nothing_of_a_secure_sum() -> None:
    for name in sorted({*STRATEGIES, *THROWAWAY}):
        if not make(name).linear:
            with raises_reason("TRANSPORT_UNFIT"):
                run_in_process(TASK, DATA, make(name), 1, 1, transport=MaskedSum())


def test_the_suite_sees_a_strategy_that_is_not_linear() -> None:
    """The median does not follow from the sum: were it declared linear, the test above would fail."""

    class Pretending(type(make("median"))):  # type: ignore[misc]
        linear = True

    with pytest.raises(AssertionError):
        test_the_next_state_of_a_linear_strategy_follows_from_the_sum_alone(Pretending())

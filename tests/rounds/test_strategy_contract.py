"""What every registered strategy must do; a new one is covered by being registered."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch

from histoflare.errors import JobError
from histoflare.privacy.plan import DpSgd, Open, UpdateNoise
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, add, digest, model_state
from histoflare.rounds.strategy import (
    STRATEGIES,
    SiteOutcome,
    Strategy,
    Update,
    count_sent,
    count_sent_by_job,
    make_strategy,
    server_round,
    site_round,
)

from .toy import ToyTask, toy_sites

TASK = ToyTask(hidden=4, batch_norm=True)
DATA = toy_sites(3)
SITES = list(DATA)


@pytest.fixture(params=sorted(STRATEGIES))
def strategy(request: pytest.FixtureRequest) -> Strategy:
    return make_strategy(request.param)


def start_state(strategy: Strategy) -> State:
    return strategy.begin(model_state(TASK.build_model()))


def outcome_of(strategy: Strategy, site: str, state: State, site_state: State | None = None) -> SiteOutcome:
    return site_round(
        TASK,
        strategy,
        state,
        DATA[site],
        site=site,
        site_state=site_state or {},
        round_index=0,
        total_rounds=2,
        seed=1,
        plan=Open(),
    )


def good_update(strategy: Strategy, state: State) -> Update:
    return outcome_of(strategy, strategy.participants(0, SITES, 1)[0], state).update


def test_it_is_named_as_registered_and_its_fields_are_json(strategy: Strategy) -> None:
    assert type(make_strategy(strategy.name)) is type(strategy)
    assert make_strategy(strategy.name, **json.loads(json.dumps(asdict(strategy)))) == strategy


def test_participants_are_sites_in_site_order_and_everybody_has_a_turn(strategy: Strategy) -> None:
    seen: set[str] = set()
    for index in range(20):
        chosen = strategy.participants(index, SITES, 1)
        assert chosen and list(chosen) == [site for site in SITES if site in chosen]
        assert chosen == strategy.participants(index, SITES, 1)
        seen |= set(chosen)
    assert seen == set(SITES)


def test_a_site_sends_what_the_strategy_says_and_changes_nothing_it_was_given(strategy: Strategy) -> None:
    state = start_state(strategy)
    before = digest(state)
    update = outcome_of(strategy, SITES[0], state).update
    assert digest(state) == before
    assert list(update.tensors) == strategy.sent_names(state)
    assert all(tensor.is_floating_point() for tensor in update.tensors.values())
    assert math.isfinite(update.weight) and update.weight >= 0
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
    assert digest(first.state) == digest(again.state) != digest(other.state)


def test_an_update_of_zeros_changes_nothing(strategy: Strategy) -> None:
    state = start_state(strategy)
    update = good_update(strategy, state)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in update.tensors.items()}
    assert digest(server_round(strategy, state, [Update(update.site, zeros, 1.0)], SITES)) == digest(state)


def test_one_participant_alone_gives_its_model(strategy: Strategy) -> None:
    state = start_state(strategy)
    outcome = outcome_of(strategy, SITES[0], state)
    combined = server_round(strategy, state, [outcome.update], SITES)
    for name, expected in add(state, outcome.update.tensors).items():
        torch.testing.assert_close(combined[name], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "fault",
    ["nan", "inf", "shape", "missing", "unknown", "dtype", "weight", "site", "double", "none", "zero"],
)
def test_a_bad_update_is_refused_and_never_averaged(strategy: Strategy, fault: str) -> None:
    state = start_state(strategy)
    good = good_update(strategy, state)
    tensors = dict(good.tensors)
    name = next(iter(tensors))
    site, weight = good.site, 1.0
    match fault:
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
        case "site":
            site = "stranger"
    updates = {"double": [good, good], "none": []}.get(fault, [Update(site, tensors, weight)])
    if fault == "zero":
        updates = [Update(good.site, tensors, -1.0)]
    with pytest.raises(JobError):
        server_round(strategy, state, updates, SITES)


def test_partial_sharing_keeps_the_rest_at_home(strategy: Strategy) -> None:
    partial = make_strategy(strategy.name, share=["body"])
    state = start_state(partial)
    outcome = outcome_of(partial, SITES[0], state)
    assert set(outcome.update.tensors) == {"body.weight", "body.bias"}
    combined = server_round(partial, state, [outcome.update], SITES)
    assert torch.equal(combined["head.weight"], state["head.weight"])
    personal = partial.personalize(combined, outcome.site_state)
    assert torch.equal(personal["body.weight"], combined["body.weight"])
    assert not torch.equal(personal["head.weight"], state["head.weight"])
    assert list(personal) == list(model_state(TASK.build_model()))


def test_it_declares_what_a_privacy_plan_asks(strategy: Strategy) -> None:
    assert isinstance(vars(type(strategy))["linear"], bool), "of its own, not inherited"
    assert isinstance(vars(type(strategy))["kept"], tuple)
    for plan in (Open(), UpdateNoise(noise_multiplier=1.0), DpSgd(noise_multiplier=1.0)):
        plan.check_strategy(strategy)


def test_what_it_declares_to_be_linear_and_equal_is(strategy: Strategy) -> None:
    """The next state follows from the sum of the updates alone: noise in one of them is noise in it."""
    if not strategy.equal_weights and strategy.name == "fedavg":
        strategy = make_strategy("fedavg", weighting="uniform")
    if not (strategy.linear and strategy.equal_weights):
        pytest.skip("it declares that it is not")
    state = start_state(strategy)
    sites = strategy.participants(0, SITES, 1)
    made = [outcome_of(strategy, site, state).update for site in sites]
    generator = torch.Generator().manual_seed(0)
    shift = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in made[0].tensors.items()}

    def shifted(index: int) -> State:
        moved = [
            Update(u.site, add(u.tensors, shift), u.weight) if i == index else u for i, u in enumerate(made)
        ]
        return strategy.combine(state, moved)

    first = shifted(0)
    plain = strategy.combine(state, made)
    for index in range(len(made)):
        for name, tensor in shifted(index).items():
            torch.testing.assert_close(tensor, first[name], rtol=1e-4, atol=1e-5)
    for name, moved in shift.items():
        torch.testing.assert_close(
            first[name] - plain[name], moved / len(made), rtol=1e-4, atol=1e-5, check_dtype=False
        )


def test_what_stays_at_a_site_is_what_it_keeps(strategy: Strategy) -> None:
    for changes in ({}, {"share": ["body"]}, {"batch_norm": "local"}):
        changed = make_strategy(strategy.name, **{**asdict(strategy), **changes})
        kept = outcome_of(changed, SITES[0], start_state(changed)).site_state
        assert bool(kept) == bool(changed.keeps), "nothing is kept that is not declared"
        if changes:
            with pytest.raises(JobError, match="keeps"):
                DpSgd(noise_multiplier=1.0).check_strategy(changed)


def test_a_job_noises_as_many_numbers_as_a_site_sends(strategy: Strategy) -> None:
    for share in (None, ["body"]):
        changed = make_strategy(strategy.name, **{**asdict(strategy), "share": share})
        state = start_state(changed)
        sent = sum(t.numel() for t in outcome_of(changed, SITES[0], state).update.tensors.values())
        assert count_sent(changed, state) == count_sent_by_job(changed, TASK) == sent

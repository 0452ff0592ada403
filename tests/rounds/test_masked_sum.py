"""A secure sum: the strategy makes of it what it makes of the updates, and it opens whole or not at all."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from histoflare.errors import BagError
from histoflare.privacy.plan import Open
from histoflare.rounds.round import server_round, site_round
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.sealing import sealed
from histoflare.rounds.state import State, hash_state, model_state, weighted_mean
from histoflare.rounds.strategies.cyclic import CyclicWeightTransfer
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import SUM, Update
from histoflare.rounds.transport import check_readable
from histoflare.rounds.transports.float32 import PLAIN
from histoflare.rounds.transports.masked_sum import CHECK, WEIGHT, MaskedSum

from ..refusals import raises_reason
from .throwaway import Paced
from .toy import Table, ToyTask, toy_sites

TASK = ToyTask(hidden=4, batch_norm=True)
DATA = toy_sites(4)
SITES = list(DATA)
WEIGHTS = {site: 0.1 * (index + 1) for index, site in enumerate(SITES)}
STRATEGIES = [
    FedAvg(weighting="samples"),
    FedAvg(weighting="uniform"),
    FedAvg(weighting="fixed", weights=WEIGHTS),
]


def model() -> State:
    return model_state(TASK.build_model())


def updates_of(strategy: FedAvg, transport: Any, attempt: str = "first") -> list[Update]:
    """Return what the sites send in a round, with pads if there are any."""
    sent = [
        site_round(
            TASK,
            strategy,
            model(),
            DATA[site],
            site=site,
            site_state={},
            round_index=0,
            total_rounds=1,
            seed=1,
            plan=Open(),
            transport=transport,
        ).update
        for site in SITES
    ]
    return sent if transport.readable else sealed(sent, Open(), 0, model(), {"attempt": attempt})


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.weighting)
def test_the_next_model_is_that_of_updates_in_the_open(strategy: FedAvg) -> None:
    plain = server_round(strategy, model(), updates_of(strategy, PLAIN), SITES).model
    summed = server_round(
        strategy, model(), updates_of(strategy, MaskedSum()), SITES, transport=MaskedSum()
    ).model
    assert hash_state(plain) != hash_state(model())
    for name, expected in plain.items():
        one_rounding = torch.finfo(torch.float32).eps * expected.double().abs()
        assert ((summed[name].double() - expected.double()).abs() <= 1e-9 + one_rounding).all()
        assert summed[name].dtype == expected.dtype


def test_pads_of_other_keys_and_any_order_of_arrival_change_no_bit() -> None:
    strategy, made = STRATEGIES[0], set()
    for arrived in itertools.permutations(updates_of(strategy, MaskedSum())):
        made.add(hash_state(server_round(strategy, model(), arrived, SITES, transport=MaskedSum()).model))
    again = updates_of(strategy, MaskedSum())
    made.add(hash_state(server_round(strategy, model(), again, SITES, transport=MaskedSum()).model))
    assert len(made) == 1


def test_a_run_is_that_of_the_open_transport() -> None:
    for strategy in STRATEGIES:
        plain = run_in_process(TASK, DATA, strategy, 3, 1)
        summed = run_in_process(TASK, DATA, strategy, 3, 1, transport=MaskedSum())
        for name, expected in plain.state.items():
            torch.testing.assert_close(summed.state[name], expected, rtol=0, atol=1e-6)
        assert summed.participation == plain.participation
        assert summed.bytes_up == 2 * plain.bytes_up + 3 * len(SITES) * 2 * 8


def test_nothing_of_a_site_is_in_what_it_sends() -> None:
    for strategy in STRATEGIES:
        for update in updates_of(strategy, MaskedSum()):
            assert update.weight == 1.0 and not update.numbers
            assert {tensor.dtype for tensor in update.tensors.values()} == {torch.int64}
            assert abs(update.tensors[CHECK].item()) > 2**32, "a 1 with a pad: below once in 2**31"
            assert abs(update.tensors[WEIGHT].item()) > 2**32


def test_the_strategy_gets_one_update_the_mean_with_the_sum_of_the_weights() -> None:
    seen: list[Update] = []

    class Looking(FedAvg):
        name = "looking"

        def combine(self, ctx: Any) -> Any:
            seen.extend(ctx.updates)
            return super().combine(ctx)

    server_round(Looking(), model(), updates_of(STRATEGIES[0], MaskedSum()), SITES, transport=MaskedSum())
    assert [update.site for update in seen] == [SUM]
    plain = updates_of(STRATEGIES[0], PLAIN)
    mean = weighted_mean([update.tensors for update in plain], [update.weight for update in plain])
    assert all((seen[0].tensors[name] - tensor).abs().max() <= 1e-12 for name, tensor in mean.items())
    assert seen[0].weight == sum(len(DATA[site].y) for site in SITES)
    assert {tensor.dtype for tensor in seen[0].tensors.values()} == {torch.float64}


def missing(sent: list[Update]) -> list[Update]:
    return sent[1:]


def of_another_attempt(sent: list[Update]) -> list[Update]:
    return [*sent[1:], updates_of(STRATEGIES[1], MaskedSum())[0]]


def without_pads(sent: list[Update]) -> list[Update]:
    packed = MaskedSum().pack({n: torch.zeros_like(t) for n, t in FedAvg().sent(model()).items()})
    return [replace(sent[0], tensors=packed), *sent[1:]]


def with_a_check_word_of_its_own(sent: list[Update]) -> list[Update]:
    tensors = {**sent[0].tensors, CHECK: sent[0].tensors[CHECK] + 1}
    return [replace(sent[0], tensors=tensors), *sent[1:]]


@pytest.mark.parametrize(
    "spoil",
    [missing, of_another_attempt, without_pads, with_a_check_word_of_its_own],
    ids=lambda f: f.__name__,
)
def test_a_sum_that_is_not_whole_is_void(spoil: Any) -> None:
    spoilt = spoil(updates_of(STRATEGIES[1], MaskedSum()))
    with raises_reason("SUM_VOID"):
        server_round(STRATEGIES[1], model(), spoilt, SITES, transport=MaskedSum())


def test_a_sum_of_some_sites_opens_if_these_were_listed() -> None:
    strategy = STRATEGIES[1]
    three = {site: DATA[site] for site in SITES[:3]}
    expected = run_in_process(TASK, three, strategy, 1, 1, transport=MaskedSum())
    sent = [
        site_round(
            *(TASK, strategy, model(), three[site]),
            site=site,
            site_state={},
            round_index=0,
            total_rounds=1,
            seed=1,
            plan=Open(),
            transport=MaskedSum(),
        ).update
        for site in three
    ]
    sent = sealed(sent, Open(), 0, model(), {})
    made = server_round(strategy, model(), sent, SITES, transport=MaskedSum(), listed=list(three))
    assert hash_state(made.model) == hash_state(expected.state)
    with raises_reason("SUM_VOID"):
        server_round(strategy, model(), sent, SITES, transport=MaskedSum(), listed=SITES)


@pytest.mark.parametrize("fault", ["dtype", "shape", "missing", "unknown"])
def test_a_vector_of_another_form_is_refused(fault: str) -> None:
    sent = updates_of(STRATEGIES[1], MaskedSum())
    tensors = dict(sent[0].tensors)
    match fault:
        case "dtype":
            tensors[CHECK] = tensors[CHECK].double()
        case "shape":
            tensors[CHECK] = torch.ones(2, dtype=torch.int64)
        case "missing":
            del tensors[WEIGHT]
        case "unknown":
            tensors["sum/more"] = tensors[CHECK]
    with raises_reason("STATE_INVALID"):
        server_round(
            *(STRATEGIES[1], model(), [replace(sent[0], tensors=tensors), *sent[1:]], SITES),
            transport=MaskedSum(),
        )


def test_weights_that_add_up_to_nothing_are_refused() -> None:
    strategy = STRATEGIES[1]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in strategy.sent(model()).items()}
    sent = [Update(site, MaskedSum().pack(zeros, 0.0), 1.0) for site in SITES]
    with raises_reason("WEIGHTS_INVALID"):
        server_round(strategy, model(), sealed(sent, Open(), 0, model(), {}), SITES, transport=MaskedSum())


def test_an_update_without_room_is_refused_at_the_site_and_the_round_is_void() -> None:
    class Exploding(FedAvg):
        name = "exploding"

        def local_round(self, ctx: Any) -> Any:
            outcome = super().local_round(ctx)
            tensors = {name: tensor + 2e5 for name, tensor in outcome.update.tensors.items()}
            return replace(outcome, update=replace(outcome.update, tensors=tensors))

    with raises_reason("UPDATE_OUT_OF_RANGE"):
        updates_of(Exploding(weighting="uniform"), MaskedSum())
    with raises_reason("UPDATE_OUT_OF_RANGE", "131072"):
        run_in_process(TASK, DATA, Exploding(weighting="uniform"), 1, 1, transport=MaskedSum())


def test_one_site_that_fails_voids_the_round() -> None:
    class Broken(ToyTask):
        def train_batches(self, data: Table, seed: int) -> Any:
            if data is DATA[SITES[2]]:
                raise BagError("a bag is gone")
            return super().train_batches(data, seed)

    broken = Broken(hidden=4)
    assert len(run_in_process(broken, DATA, FedAvg(), 1, 1).participation[0]) == 3
    with raises_reason("SUM_VOID", SITES[2]):
        run_in_process(broken, DATA, FedAvg(), 1, 1, transport=MaskedSum())


@pytest.mark.parametrize("count", [1, 2])
def test_of_two_sites_each_knows_the_other_s_part(count: int) -> None:
    few = {site: DATA[site] for site in SITES[:count]}
    with raises_reason("SUM_TOO_FEW_KNOWN"):
        run_in_process(TASK, few, FedAvg(), 1, 1, transport=MaskedSum())
    with raises_reason("SUM_TOO_FEW_KNOWN"):
        run_in_process(TASK, DATA, FedAvg(clients_per_round=count), 1, 1, transport=MaskedSum())


def test_a_cycle_has_one_site_a_round_and_so_no_sum() -> None:
    with raises_reason("TRANSPORT_UNFIT", "cyclic"):
        run_in_process(TASK, DATA, CyclicWeightTransfer(), 4, 1, transport=MaskedSum())


def test_a_strategy_that_sends_numbers_beside_its_update_is_refused() -> None:
    with raises_reason("TRANSPORT_UNFIT", "planned_steps"):
        check_readable(Paced(), MaskedSum())
    with raises_reason("TRANSPORT_UNFIT", "planned_steps"):
        run_in_process(TASK, DATA, Paced(), 1, 1, transport=MaskedSum())


def test_no_single_update_can_be_read() -> None:
    with raises_reason("TRANSPORT_UNFIT"):
        MaskedSum().unpack({}, {})


def test_no_site_can_have_the_name_of_the_sum() -> None:
    with raises_reason("JOB_INVALID", SUM):
        FedAvg().check_sites(["a", SUM])


def test_in_one_process_the_server_s_half_gets_vectors_with_pads() -> None:
    arrived: list[int] = []

    class Watching(MaskedSum):
        def open(self, packed: Any, step: float | None = None) -> tuple[State, float]:
            arrived.extend(int(each[CHECK]) for each in packed)
            return super().open(packed, step)

    run_in_process(TASK, DATA, STRATEGIES[1], 2, 1, transport=Watching())
    assert len(arrived) == 8 and all(abs(word) > 2**32 for word in arrived)
    assert len(set(arrived)) == 8, "fresh keys in each round"

"""Noise that sites share: each adds a part, and the opened sum has what was promised, on one grid."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from histoflare.errors import BagError
from histoflare.privacy.plan import DpSgd, UpdateNoise
from histoflare.rounds.local import predict
from histoflare.rounds.round import server_round, site_round
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.sealing import sealed
from histoflare.rounds.state import State, hash_state, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategies.fedsgd import FedSgd
from histoflare.rounds.strategy import Update
from histoflare.rounds.transports.float32 import PLAIN
from histoflare.rounds.transports.masked_sum import MaskedSum

from ..refusals import raises_reason
from .toy import RowTask, toy_sites

WIDE = RowTask(features=5000)
DATA = toy_sites(4, features=5000)
SITES = list(DATA)
STEP = DpSgd(
    clip_norm=0.5,
    noise_multiplier=4.0,
    sample_rate=1.0,
    batch_size=32.0,
    delta=1e-4,
    noise="shared",
    honest=3,
    noise_seed=7,
)
ONE_STEP = FedSgd(learning_rate=1.0, weighting="uniform")
UPDATE = UpdateNoise(clip_norm=0.5, noise_multiplier=4.0, noise="shared", honest=3, noise_seed=7)


def sent(plan: Any, strategy: FedAvg, task: RowTask = WIDE) -> list[Update]:
    """Return the sites' terms of the sum, without pads."""
    model = model_state(task.build_model())
    return [
        site_round(
            task,
            strategy,
            model,
            DATA[site],
            site=site,
            site_state={},
            round_index=0,
            total_rounds=1,
            seed=1,
            plan=plan,
            transport=MaskedSum(),
        ).update
        for site in SITES
    ]


def opened(terms: list[Update], plan: Any, strategy: FedAvg) -> torch.Tensor:
    """Return how far the round moved the model, all numbers in one row."""
    model = model_state(WIDE.build_model())
    made = server_round(
        strategy, model, terms, SITES, plan, transport=MaskedSum(), listed=[term.site for term in terms]
    ).model
    return torch.cat([(made[name].double() - model[name]).flatten() for name in made])


@pytest.mark.parametrize(
    ("plan", "strategy", "divisor"),
    [(STEP, ONE_STEP, 32.0), (UPDATE, FedAvg(weighting="uniform"), 4.0)],
    ids=["a step", "an update"],
)
def test_the_opened_sum_has_the_noise_of_all_four_shares(plan: Any, strategy: FedAvg, divisor: float) -> None:
    """σ² = n z²C²/h; a share that is missing is a quarter of it, and 7 standard deviations of this test."""
    quiet = replace(plan, noise_multiplier=0.0)
    known = opened(sent(quiet, strategy), quiet, strategy)
    noise = opened(sent(plan, strategy), plan, strategy) - known
    n, expected = len(noise), 4 * (4.0 * 0.5) ** 2 / 3 / divisor**2
    spread = math.sqrt(2 / n)
    assert abs(float(noise.square().mean()) / expected - 1) < 5 * spread
    assert 2 * 5 * spread < 0.25, "the test would see a site that leaves its share out"
    assert abs(float(noise.mean())) < 5 * math.sqrt(expected / n)


def test_a_site_adds_its_share_and_no_more() -> None:
    model = model_state(WIDE.build_model())
    (first, *_) = sent(STEP, ONE_STEP)
    (quiet, *_) = sent(replace(STEP, noise_multiplier=0.0), ONE_STEP)
    step = STEP.sum_step
    assert step is not None
    noise = first.tensors["head.weight"].double() * step - quiet.tensors["head.weight"].double() * 2.0**-40
    expected = (4.0 * 0.5) ** 2 / 3
    assert abs(float(noise.square().mean()) / expected - 1) < 5 * math.sqrt(2 / noise.numel())
    assert set(first.tensors) == {*model, "sum/weight", "sum/check"} and first.weight == 1.0


@pytest.mark.parametrize(
    ("plan", "strategy"), [(STEP, ONE_STEP), (UPDATE, FedAvg(weighting="uniform"))], ids=["step", "update"]
)
def test_what_is_noised_is_sent_without_another_rounding(plan: Any, strategy: FedAvg) -> None:
    seen: list[State] = []

    class Looking(MaskedSum):
        def pack(self, tensors: Any, weight: float = 1.0, step: float | None = None) -> State:
            packed = super().pack(tensors, weight, step)
            assert weight == 1.0 and step == plan.sum_step and step is not None
            for name, tensor in tensors.items():
                assert tensor.dtype == torch.float64
                assert torch.equal(packed[name].double() * step, tensor)
            odd = packed["head.weight"].bitwise_and(1).double().mean()
            assert 0.45 < odd < 0.55, "rounded to float32, large numbers would all be even"
            seen.append(packed)
            return packed

    run_in_process(WIDE, DATA, strategy, 1, 1, plan, transport=Looking())
    assert len(seen) == 4


def test_the_model_is_the_same_whatever_the_pads_and_the_order() -> None:
    model, terms = model_state(WIDE.build_model()), sent(STEP, ONE_STEP)
    copies = [[replace(t, tensors={n: x.clone() for n, x in t.tensors.items()}) for t in terms] for _ in "ab"]
    first, second = (sealed(each, STEP, 0, model, {}) for each in copies)
    assert not torch.equal(first[0].tensors["head.weight"], second[0].tensors["head.weight"])
    a, b, c = (opened(each, STEP, ONE_STEP) for each in (first, second[::-1], terms))
    assert torch.equal(a, b) and torch.equal(a, c)


def test_without_noise_and_with_all_records_it_is_one_step_on_the_data_of_all() -> None:
    """The clip off: the sum of all gradients ÷ the divisor, as if one site had them all."""
    quiet = replace(STEP, noise_multiplier=0.0, clip_norm=1e6)
    federated = run_in_process(WIDE, DATA, ONE_STEP, 1, 1, quiet, transport=MaskedSum())
    tables = list(DATA.values())
    together = type(tables[0])(
        *(torch.cat([getattr(t, name) for t in tables]) for name in ("x", "y", "x_test", "y_test"))
    )
    alone = replace(quiet, noise="local", honest=None)
    pooled = run_in_process(WIDE, {"pooled": together}, ONE_STEP, 1, 1, alone)
    for name, tensor in pooled.state.items():
        torch.testing.assert_close(federated.state[name], tensor, rtol=1e-5, atol=1e-6)


def test_it_learns_under_shared_noise() -> None:
    task, data = RowTask(), toy_sites(4)
    plan = replace(STEP, clip_norm=1.0, noise_multiplier=1.0, sample_rate=0.5, batch_size=70.0)
    run = run_in_process(
        task, data, FedSgd(learning_rate=2.0, weighting="uniform"), 20, 1, plan, transport=MaskedSum()
    )
    found = [predict(task, run.state, table, "test") for table in data.values()]
    right = [each.probabilities.argmax(1) == each.labels for each in found]
    assert np.concatenate(right).mean() > 0.8


def test_a_record_that_cannot_be_read_counts_as_zero_and_voids_nothing() -> None:
    class Broken(RowTask):
        def record_batch(self, data: Any, records: Any, seed: int) -> Any:
            if data is DATA[SITES[1]]:
                raise BagError("a bag is gone")
            return super().record_batch(data, records, seed)

    run = run_in_process(Broken(features=5000), DATA, ONE_STEP, 1, 1, STEP, transport=MaskedSum())
    assert run.participation == (tuple(SITES),)


def test_noise_too_small_for_the_grid_is_refused_by_public_numbers() -> None:
    """Later no number is refused: that would follow from the data. What has no room wraps around."""
    tiny = replace(STEP, noise_multiplier=1e-3)
    with raises_reason("PRIVACY_INVALID", "room"):
        run_in_process(WIDE, DATA, ONE_STEP, 1, 1, tiny, transport=MaskedSum())
    small = replace(UPDATE, noise_multiplier=1e-3)
    run_in_process(WIDE, DATA, FedAvg(weighting="uniform"), 1, 1, small, transport=MaskedSum())
    assert STEP.sum_step is not None
    packed = MaskedSum().pack({"w": torch.full((2,), 1e30, dtype=torch.float64)}, 1.0, STEP.sum_step)
    assert packed["w"].dtype == torch.int64


def test_all_sites_settle_on_the_same_noise_whatever_their_processors_last_digits() -> None:
    asked = replace(STEP, noise_multiplier=None, budget_share=0.25, sample_rate=0.1)
    settled = asked.settled(rounds=20, weights=1000)
    assert settled.noise_multiplier is not None
    assert (settled.noise_multiplier * 2**20).is_integer()
    exact = replace(asked, noise="local", honest=None).settled(rounds=20, weights=1000)
    assert exact.noise_multiplier is not None
    assert settled.noise_multiplier >= exact.noise_multiplier * (1 - 1e-12)
    assert settled.noise_multiplier <= exact.noise_multiplier * (1 + 1e-5)


def test_fewer_sites_than_the_noise_counts_on_make_no_sum() -> None:
    three = {site: DATA[site] for site in SITES[:3]}
    with raises_reason("SUM_TOO_FEW_KNOWN", 4):
        run_in_process(WIDE, three, ONE_STEP, 1, 1, STEP, transport=MaskedSum())


@pytest.mark.parametrize(
    ("strategy", "transport"),
    [
        (FedSgd(weighting="samples"), MaskedSum()),
        (FedAvg(weighting="uniform"), MaskedSum()),
        (ONE_STEP, PLAIN),
    ],
    ids=["weights by samples", "several steps", "updates in the open"],
)
def test_shared_noise_goes_with_equal_weights_one_step_and_a_sum(strategy: FedAvg, transport: Any) -> None:
    with raises_reason("PRIVACY_INVALID"):
        run_in_process(WIDE, DATA, strategy, 1, 1, STEP, transport=transport)


def test_noise_of_a_site_s_own_goes_through_a_sum_too() -> None:
    task, data = RowTask(), toy_sites(4)
    plan = DpSgd(noise_multiplier=1.0, sample_rate=0.5, batch_size=20.0, delta=1e-3, steps=2, noise_seed=1)
    plain = run_in_process(task, data, FedAvg(weighting="uniform"), 2, 1, plan)
    summed = run_in_process(task, data, FedAvg(weighting="uniform"), 2, 1, plan, transport=MaskedSum())
    for name, tensor in plain.state.items():
        torch.testing.assert_close(summed.state[name], tensor, rtol=0, atol=1e-6)
    assert hash_state(plain.state) != hash_state(plain.initial)

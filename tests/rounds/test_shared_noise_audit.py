"""What an opponent finds in an opened sum: the noise that was promised, and no more of a record than claimed.

The noise itself is looked at first: with all that the sites know, what is left of the opened sum is the noise
of all shares, and a share that is missing shows in its variance. Then records are looked for (canaries): how
well they are found bounds ε from below. A bound from below is far less sharp: of four sites, one without
noise leaves an ε that no number of canaries here tells from the claim. What it shows is a mechanism that has
no noise, or ten times too little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, chi2

from histoflare.privacy.noise import SeededNoise
from histoflare.privacy.plan import DpSgd
from histoflare.privacy.privacy_loss import gaussian_epsilon
from histoflare.rounds.round import site_round
from histoflare.rounds.sealing import sealed
from histoflare.rounds.state import model_state
from histoflare.rounds.strategies.fedsgd import FedSgd
from histoflare.rounds.strategy import Update
from histoflare.rounds.transports.masked_sum import MaskedSum
from histoflare.seeds import derive_seed

from .toy import RowTask, Table

CLIP, DELTA, LEVEL = 0.5, 1e-5, 0.01
ONE_STEP = FedSgd(learning_rate=1.0, weighting="uniform")


@dataclass(frozen=True)
class OwnDirection(RowTask):
    """Record i moves weight i of the head and no other: what it adds is seen apart from all others."""

    def record_losses(self, model: Any, batch: Any) -> torch.Tensor:
        (index,) = batch[1].tolist()
        return -100 * model.head.weight.view(-1)[index : index + 1]


class WeakNoise(SeededNoise):
    """A part of the noise that was asked for."""

    part = 0.0

    def normal(self, shape: Sequence[int], std: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return super().normal(shape, std * self.part, dtype)


class Silent(DpSgd):
    """The same plan at a site that leaves its noise out."""

    def noise_source(self, *parts: str | int) -> WeakNoise:
        return WeakNoise(derive_seed(5, *parts))


class Faint(Silent):
    """The same at one whose noise is ten times too little."""

    def noise_source(self, *parts: str | int) -> WeakNoise:
        noise = super().noise_source(*parts)
        noise.part = 0.1
        return noise


def plan_of(sites: int, kind: type[DpSgd] = DpSgd) -> DpSgd:
    """Return a job's plan that counts on all of the sites but one."""
    return kind(
        clip_norm=CLIP,
        noise_multiplier=1.0,
        sample_rate=1.0,
        batch_size=1.0,
        delta=DELTA,
        noise="shared",
        honest=sites - 1,
        noise_seed=5,
    )


def row(records: Sequence[int]) -> Table:
    """Return a site's training records."""
    return Table(torch.zeros((len(records), 1)), torch.tensor(records), torch.zeros(0), torch.zeros(0))


def term(task: RowTask, site: int, records: Sequence[int], plan: DpSgd) -> Update:
    """Return a site's vector, without pads."""
    return site_round(
        task,
        ONE_STEP,
        model_state(task.build_model()),
        row(records),
        site=f"site_{site}",
        site_state={},
        round_index=0,
        total_rounds=1,
        seed=1,
        plan=plan,
        transport=MaskedSum(),
    ).update


def weights(total: Any) -> np.ndarray:
    """Return the head's weights of an opened sum, in clip norms."""
    return total["head.weight"].flatten().numpy() / CLIP


def opened(task: RowTask, terms: Sequence[Update], plan: DpSgd) -> np.ndarray:
    """Return what the server sees: the sum of the vectors with their pads."""
    copies = [replace(t, tensors={n: x.clone() for n, x in t.tensors.items()}) for t in terms]
    vectors = sealed(copies, plan, 0, model_state(task.build_model()), {})
    return weights(MaskedSum().open([vector.tensors for vector in vectors], plan.sum_step)[0])


@pytest.mark.parametrize("sites", [4, 16])
@pytest.mark.parametrize("silent", [False, True], ids=["all add noise", "one does not"])
def test_what_is_left_of_the_opened_sum_is_the_noise_of_all_shares(sites: int, silent: bool) -> None:
    """Of 16 shares one is missed too: 20,000 weights tell a sixteenth of the variance at a level of 1 %."""
    task, plan, quiet = OwnDirection(features=10_000), plan_of(sites), plan_of(sites, Silent)
    plans = [quiet if silent and site == 2 else plan for site in range(sites)]
    terms = [term(task, site, [2 * site, 2 * site + 1], each) for site, each in enumerate(plans)]
    known = [term(task, site, [2 * site, 2 * site + 1], quiet) for site in range(sites)]
    noise = opened(task, terms, plan) - opened(task, known, plan)
    statistic = float(np.square(noise).sum() / (sites / (sites - 1)))
    below = float(chi2.cdf(statistic, len(noise)))
    assert len(noise) == 20_000
    assert (min(below, 1 - below) < LEVEL / 2) == silent


CANARIES = 4000
SITES = 4


def found(plan: DpSgd, colluders: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what the server and colluding sites see of each canary: of those that were there, and of others.

    The first site trained on half of the canaries. The opponents know all other sites' records, and of the
    colluding ones their whole vectors.
    """
    task = OwnDirection(features=CANARIES // 2)
    there = np.random.default_rng(3).permutation(CANARIES) < CANARIES // 2
    terms = [term(task, site, [0] if site else np.flatnonzero(there).tolist(), plan) for site in range(SITES)]
    seen = opened(task, terms, plan)
    step = plan.sum_step or 0.0
    for each in terms[SITES - colluders :]:
        seen -= weights({"head.weight": each.tensors["head.weight"].double() * step})
    return seen[1:][there[1:]], seen[1:][~there[1:]]  # without the record that all the others have


def least_epsilon(inside: np.ndarray, outside: np.ndarray) -> float:
    """Return what ε is at least, by the best of ten thresholds: Clopper and Pearson's bounds, 99 %."""
    thresholds = np.linspace(0.25, 2.5, 10)
    doubt = LEVEL / (2 * len(thresholds))
    bounds = []
    for threshold in thresholds:
        hits, errors = int((inside > threshold).sum()), int((outside > threshold).sum())
        hit = beta.ppf(doubt, hits, len(inside) - hits + 1) if hits else 0.0
        error = beta.ppf(1 - doubt, errors + 1, len(outside) - errors)
        bounds.append(math.log((hit - DELTA) / error) if hit > DELTA else 0.0)
    return max(bounds)


def claim(colluders: int) -> float:
    """Return the ε that is promised against the server and so many sites."""
    return gaussian_epsilon([plan_of(SITES).spend().against(SITES - colluders)], DELTA)


@pytest.mark.parametrize("colluders", [1, 2, 3])
def test_no_canary_tells_more_than_what_is_claimed_against_server_and_sites(colluders: int) -> None:
    bound = least_epsilon(*found(plan_of(SITES), colluders))
    assert 1 < bound < claim(colluders), "the canaries are seen, and no better than was said"


@pytest.mark.parametrize("kind", [Silent, Faint])
def test_canaries_tell_of_a_mechanism_without_noise_or_with_a_tenth_of_it(kind: type[DpSgd]) -> None:
    assert least_epsilon(*found(plan_of(SITES, kind), 1)) > claim(1)

"""What to expect of training under noise, from public numbers, before anybody spends anything.

In T steps of DP-SGD with one noised sum a step, a patient's gradient counts for C at most, and in a step
q·N of the N patients of all hospitals are drawn, of each of K classes a K-th. The noise of T steps adds up to
z·C·√T in each weight, with z·C the standard deviation in the sum of all hospitals. What a model says of a bag
moves with its weights along that bag's features alone: by as much as one number of noise for each output,
however many weights there are. The quotient

    r = z √K / (q N √T)

says how a run will go, and depends little on q and T: at one ε, z grows as q √T. (√K rather than K is what
was measured.) Of what training without noise gains over guessing, about 1 / (1 + SLOPE · r) was left in
``tests/benchmarks/bench_private.py``: SLOPE is fitted to six of its runs, and docs/measured.md says by how
much it was off in all others. It is a rule for a first look: how hard the question is, and how good the
features are, it does not know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from histoflare.errors import JobError
from histoflare.privacy.budget import Budget

SLOPE = 19.0
"""Fitted; see the module's text."""


MANY = 100
"""Patients to train on at a hospital from which on it is one of hundreds."""

PRESETS = ("private-small", "private")
"""Of ``jobs/linear_shared``: for hospitals of fewer patients, and of as many or more."""


def preset_for(sites: int, patients: int, colluders: int) -> str | None:
    """Return which preset is for a cohort; None where fewer than two hospitals are left to share noise.

    Args:
        sites: How many hospitals. patients: How many to train on at each.
        colluders: How many of them may tell the server all they know.
    """
    return None if sites - colluders < 2 else PRESETS[patients >= MANY]


@dataclass(frozen=True)
class Advice:
    """What to expect of one way to train.

    Attributes:
        outputs: K, how many numbers the model says of a bag.
        honest: On how many hospitals' shares of noise the job counts; 1: each adds all of its own.
        noise_multiplier: z of the budget, for one patient: noise ÷ clip that its guarantee rests on.
        total_noise: Noise ÷ clip in the sum of all hospitals.
        noise_to_signal: r, above 0.
    """

    outputs: int
    honest: int
    noise_multiplier: float
    total_noise: float
    noise_to_signal: float

    @property
    def part_left(self) -> float:
        """Of what training gains over guessing, the part to expect under this noise, between 0 and 1."""
        return 1 / (1 + SLOPE * self.noise_to_signal)


def advise(
    sites: int,
    patients: int,
    outputs: int,
    budget: Budget,
    *,
    colluders: int | None,
    share: float = 1.0,
    rounds: int = 60,
    sample_rate: float = 0.3,
) -> Advice:
    """Return what to expect of DP-SGD with one step a round (``fedsgd``).

    Args:
        sites: How many hospitals, at least 1.
        patients: How many to train on at each, at least 1.
        outputs: K, at least 1: of classes how many there are.
        budget: Of each patient.
        colluders: With shared noise, how many hospitals may tell the server all they know; None: each
            hospital adds all of its noise by itself.
        share: Of the budget's allowance that the job takes, in (0, 1].
        rounds: Of one step each. sample_rate: q, in (0, 1].

    Raises:
        JobError: A number is out of its range, or fewer than two hospitals are left to share noise
            (PRIVACY_INVALID).
    """
    honest = 1 if colluders is None else sites - colluders
    if min(sites, patients, outputs, rounds) < 1 or (colluders is not None and (colluders < 1 or honest < 2)):
        raise JobError(
            "There must be patients, outputs and rounds, and noise is shared by at least two hospitals "
            "beside those that collude.",
            reason="PRIVACY_INVALID",
        )
    noise = budget.calibrate(sample_rate, rounds, share)
    total = noise * math.sqrt(sites / honest)
    signal = sample_rate * sites * patients * math.sqrt(rounds)
    return Advice(outputs, honest, noise, total, total * math.sqrt(outputs) / signal)

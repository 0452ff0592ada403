"""The Gaussian mechanism on an evaluation: counts over test patients, added up and noised.

What is said of a model follows from a table of counts (``tally_form``): of each true class so many patients
in each predicted one. One patient is one row of numbers whose L2 norm is at most 1, so the sum of all rows
has sensitivity 1 for the unit *patient*, add or remove one, with all slides; whatever is computed from the
noised sum costs nothing more. It is booked on the patients who were asked about, not on those trained on.

Guarantee, for one call of :meth:`Tally.release_rows` with noise multiplier z and a secure noise source: a
Gaussian mechanism with standard deviation z and sensitivity at most 1, the event ``Spend(z)``. Each row is
put on the noise's grid before it is added: scaled so that rounding d numbers leaves its norm at most 1. Sums
of multiples of a step are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histoflare.errors import JobError
from histoflare.privacy.noise import NoiseSource, grid
from histoflare.privacy.plan import MOST_RECORDS, Noisy, PrivacyPlan
from histoflare.privacy.spend import Spend

TALLY = "tally"
"""Name of the one tensor that leaves: (length,) float64."""

LEAST_NOISE = 2.0**-4
"""With less the sum of :data:`~histoflare.privacy.plan.MOST_RECORDS` rows has no room on the noise's grid."""


@dataclass(frozen=True)
class Tally(Noisy):
    """How much noise an evaluation has. The fields are those of a plan; ``clip_norm`` is 1.

    >>> from histoflare.privacy.tally import Tally
    >>> asked = Tally(budget_epsilon=8.0, budget_share=0.25)
    >>> plan = asked.settled(rounds=1, weights=24)
    >>> plan.budget().share_of(plan.budget().cost(plan.spend())) <= 0.25
    True
    """

    mechanism: ClassVar[str] = "tally"
    most_terms: ClassVar[int] = MOST_RECORDS

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.clip_norm != 1:
            problems.append(f"evaluation.clip_norm: 1, the norm of a patient's row, not {self.clip_norm!r}")
        z = self.noise_multiplier
        if not problems and z is not None and z < LEAST_NOISE:
            problems.append(f"evaluation.noise_multiplier: at least {LEAST_NOISE:g}, not {z!r}")
        return problems

    def spend(self) -> Spend:
        """Return what one evaluation does with each patient who is asked about."""
        return Spend(self._settled_noise(), honest=self.honest or 1)

    def train(self, training: Any) -> Any:
        """Raise :class:`JobError`: an evaluation trains nothing (PRIVACY_INVALID)."""
        raise JobError("A tally protects an evaluation, and no training.", reason="PRIVACY_INVALID")

    def release_rows(self, rows: NDArray[np.float64], noise: NoiseSource) -> dict[str, Tensor]:
        """Return the noised sum of the patients' rows, by the name :data:`TALLY`: (length,) float64.

        Args:
            rows: (patients, length). A row longer than 1 is scaled to 1, and one that is not finite counts as
                zeros: an error would tell of its patient.
            noise: Secure, or there is no guarantee.

        Raises:
            JobError: The noise is so large that nothing of the rows would be left (PRIVACY_INVALID).
        """
        std = self.sites_noise
        total = torch.from_numpy(on_grid(rows, grid(std)).sum(axis=0))
        return {TALLY: total + noise.normal(total.shape, std)}

    def of_site(self, *, only_evaluates: bool) -> Tally:
        """Return the noise that a site adds: one that trains in no round adds all of it, and is in no sum."""
        return self.alone() if only_evaluates else self

    def describe(self) -> str:
        """Return one sentence for logs and reports."""
        if self.noise_multiplier is None:
            said = f"noise that takes {self.budget_share:.4g} of a budget of ε = {self.budget_epsilon:g}"
        else:
            said = f"noise multiplier {self.noise_multiplier:.4g}"
        return f"Evaluation under the budget: counts over the test patients, {said}, booked on them."


def on_grid(rows: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """Return rows whose numbers are multiples of ``step``, each of an L2 norm of at most 1.

    Args:
        rows: (patients, length).
        step: A power of two.

    Raises:
        JobError: ``step`` is so large that nothing would be left (PRIVACY_INVALID).
    """
    most = 1 - step / 2 * math.sqrt(rows.shape[1])
    if most <= 0:
        raise JobError(
            f"The noise of an evaluation is so large that nothing of {rows.shape[1]} numbers would be left.",
            reason="PRIVACY_INVALID",
        )
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(rows).all(axis=1, keepdims=True))
    kept = np.where(finite, rows, 0.0)
    with np.errstate(over="ignore"):  # an infinite norm scales its row to nothing
        norms = np.sqrt(np.square(kept).sum(axis=1))
    scale = np.minimum(1.0, most * (1 - 1e-12) / np.maximum(norms, 1e-300))
    placed: NDArray[np.float64] = np.round(kept * scale[:, None] / step) * step
    return placed


def like_training(plan: PrivacyPlan, rounds: int, evaluations: int, length: int) -> Tally | None:
    """Return the noise with which evaluations cost each test patient what training costs each trained one.

    Args:
        plan: The training's, settled.
        rounds: Of the training, with its spare ones.
        evaluations: How many the job asks for; at least 1.
        length: How many numbers leave in one.

    Returns:
        None where nothing protects the training.
    """
    budget = plan.budget()
    if budget is None or not isinstance(plan, Noisy):
        return None
    share = budget.share_of(budget.cost(plan.spend().times(rounds)))
    asked = Tally(
        delta=plan.delta,
        budget_epsilon=plan.budget_epsilon,
        budget_share=min(1.0, share),  # more than a whole budget is refused anyway, with the training
        noise_seed=plan.noise_seed,
        noise=plan.noise,
        honest=plan.honest,
    )
    return asked.settled(evaluations, length)

"""What a mechanism did, as data: the event that is booked in a ledger, and from which ε is derived.

An event is immutable and says nothing of ε: what it costs depends on δ, on the accountant, and on what else
was done with the same patients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from histoflare.checks import is_above_zero, is_number, is_whole
from histoflare.errors import JobError, list_lines

UNIT = "patient"
"""Whom an event protects: all slides of one patient."""

ADD_OR_REMOVE_ONE = "add or remove one"
"""The neighbouring relation: two cohorts differ by one patient, with all of that patient's slides."""

LEAST_HONEST = 2
"""Sites that must be honest for a sum to hide any of them: of two, one knows the other's part."""


@dataclass(frozen=True)
class Spend:
    """So many Gaussian mechanisms in a row, each on a Poisson sample of the patients.

    Attributes:
        noise_multiplier: Standard deviation of the noise ÷ the most that one patient can move the released
            sum (the sensitivity, in L2). At least 0; 0 protects nothing (ε = ∞).
        sample_rate: With which probability a patient is in a sample; in (0, 1]. 1: nothing is sampled.
        steps: How many; at least 0. 0 costs nothing.
        honest: h, on how many sites' shares of noise ``noise_multiplier`` counts: each adds
            ``noise_multiplier`` / √h, and only the sum of all is seen. 1: the site's own noise is all of it.

    Raises:
        JobError: A number is out of its range (PRIVACY_INVALID).
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1
    honest: int = 1

    def __post_init__(self) -> None:
        problems = []
        if not (is_number(self.noise_multiplier) and self.noise_multiplier >= 0):
            problems.append(f"noise_multiplier: a number of at least 0, not {self.noise_multiplier!r}")
        if not is_above_zero(self.sample_rate, 1):
            problems.append(f"sample_rate: a number above 0 and at most 1, not {self.sample_rate!r}")
        if not is_whole(self.steps, 0):
            problems.append(f"steps: a whole number of at least 0, not {self.steps!r}")
        if not is_whole(self.honest, 1):
            problems.append(f"honest: a whole number of at least 1, not {self.honest!r}")
        if problems:
            raise JobError(
                f"These are no numbers of a mechanism:{list_lines(problems)}", reason="PRIVACY_INVALID"
            )

    @property
    def least_honest(self) -> int:
        """How many sites of a secure sum must keep their updates and their noise to themselves."""
        return max(LEAST_HONEST, self.honest)

    def times(self, n: int) -> Spend:
        """Return ``n`` of these in a row as one."""
        return replace(self, steps=self.steps * n)

    def against(self, honest: int) -> Spend:
        """Return what the event is against whoever does not know the shares of noise of so many sites.

        The variances of their shares add up, so the noise is ``noise_multiplier`` · √(``honest`` / h). This
        site's own share is always there. Noise that is not shared is the same against everybody.

        Args:
            honest: How many sites, this one included, add their shares and keep them to themselves. Below 1
                counts as 1.

        >>> from histoflare.privacy.spend import Spend
        >>> Spend(4.0, honest=4).against(1)
        Spend(noise_multiplier=2.0, sample_rate=1.0, steps=1, honest=1)
        """
        if self.honest == 1:
            return self
        there = math.sqrt(max(1, honest) / self.honest)
        return replace(self, noise_multiplier=self.noise_multiplier * there, honest=1)

    def alone(self) -> Spend:
        """Return what the event is if all other sites collude: the site's own noise, or its share, alone."""
        return self.against(1)

    def together(self, k: int) -> Spend:
        """Return a bound of the event for ``k`` that may each be in the sample, and then move the sum by one.

        Their contribution never exceeds that of all ``k`` at once, whenever one of them is drawn: noise
        ``noise_multiplier`` / k on a sample of rate 1 - (1 - q)^k.
        """
        if k == 1:
            return self
        rate = self.sample_rate
        if rate < 1:
            rate = -math.expm1(k * math.log1p(-rate))  # also where q is tiny
        return replace(self, noise_multiplier=self.noise_multiplier / k, sample_rate=rate)

    def to_json(self) -> dict[str, Any]:
        """Return the event as plain JSON; ``honest`` is left out where the noise is not shared."""
        content = asdict(self)
        if self.honest == 1:
            del content["honest"]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Spend:
        """Return the event that :meth:`to_json` gave; :class:`JobError` for anything else."""
        try:
            return cls(**content)
        except TypeError as error:
            raise JobError(f"Not a mechanism's event: {error}", reason="PRIVACY_INVALID") from None

"""A site's part in the secure sums of a job: its hello, the list of all hellos, the pads of its vector."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from histoflare.errors import JobError
from histoflare.flare.job import Job
from histoflare.flare.site_keys import SimulatedKeys, SiteKeys
from histoflare.privacy.plan import PrivacyPlan
from histoflare.privacy.policy import Policy
from histoflare.privacy.secure_sum.hello import (
    MOST_SITES,
    Hello,
    RoundKeys,
    Transcript,
    check_hellos,
    countable,
)
from histoflare.privacy.secure_sum.pads import Pads
from histoflare.site.messages import TrainAnswer


@dataclass(frozen=True)
class Joined:
    """A sum that a site takes part in.

    Attributes:
        countable: How many sites of its list the site knows, itself included.
        transcript: Hash of all that the sum depends on.
        pads: What is added to the site's vector, once.
    """

    countable: int
    transcript: str
    pads: Pads

    def sealed(self, answer: TrainAnswer) -> TrainAnswer:
        """Return an answer with the pads added to its vector, in which its weight stands too."""
        vector = {name: torch.from_numpy(_whole(array)) for name, array in answer.tensors.items()}
        tensors = {name: tensor.numpy() for name, tensor in self.pads.add_to(vector).items()}
        return replace(answer, tensors=tensors, weight=1.0)


class SiteSum:
    """What a site keeps between its hello and the list: the secret of one attempt.

    Args:
        site: The site's name. keys: With which it signs.
        job: Of which it is. run: Its run's name.
    """

    def __init__(self, site: str, keys: SiteKeys | SimulatedKeys, job: Job, run: str) -> None:
        self._site = site
        self._keys = keys
        self._run = run
        self._job = hash_agreed(job)
        self._secret: RoundKeys | None = None

    def check_pins(self, policy: Policy, plan: PrivacyPlan) -> None:
        """Refuse before any hello if this site has pinned too few sites for whatever list may come.

        It would refuse the list too, and the others would have paid for a sum that cannot open.

        Args:
            policy: The site's, with its pins. plan: The job's.

        Raises:
            JobError: They are too few (SUM_TOO_FEW_KNOWN).
        """
        if not self._trusts_all(policy):
            check_known(count_pinned(self._site, policy.pins), policy, plan)

    def _trusts_all(self, policy: Policy) -> bool:
        return policy.trust_ca or not self._keys.vouches

    def hello(self, round_index: int, attempt: Any) -> dict[str, str]:
        """Return the hello of an attempt, with fresh keys; those of an attempt before are forgotten.

        Raises:
            JobError: ``attempt`` is no whole number of at least 0 and below 2**31 (ROUND_INVALID).
        """
        if type(attempt) is not int or not 0 <= attempt < 2**31:
            raise JobError("The server asked for an attempt that cannot be.", reason="ROUND_INVALID")
        self._secret = RoundKeys.new(self._site, self._run, round_index, attempt)
        return self._secret.hello(self._keys.certificate, self._keys.sign).to_json()

    def join(
        self, hellos: Any, round_index: int, attempt: Any, received: str, policy: Policy, plan: PrivacyPlan
    ) -> Joined:
        """Return the sum that a list of hellos is for, if this site takes part in it.

        Args:
            hellos: As they came: all sites' hellos, in order.
            round_index, attempt: What the server says they are for.
            received: Hash of everything that came with them and shapes the update.
            policy: The site's, with its pins. plan: The job's.

        Raises:
            JobError: The list is not one for this site's last hello, or cannot be believed
                (SUM_LIST_INVALID); or the site knows too few of the others (SUM_TOO_FEW_KNOWN).
        """
        secret, self._secret = self._secret, None  # a list serves once, whatever comes of it
        if secret is None or (secret.round_index, secret.attempt) != (round_index, attempt):
            raise JobError(
                "The list of a sum came without a hello of this site for it.", reason="SUM_LIST_INVALID"
            )
        listed = read_hellos(hellos)
        check_hellos(listed, secret, self._keys.verifier(policy.pins))
        known = countable(listed, policy.pins, self._trusts_all(policy), self._site)
        check_known(known, policy, plan)
        transcript = Transcript(self._job, self._run, round_index, attempt, received, listed)
        return Joined(known, transcript.sha256, secret.pads(transcript))


def count_pinned(site: str, pins: Mapping[str, str]) -> int:
    """Return how many sites a site knows by its pins, itself included: a certificate is one site's."""
    return 1 + len({pin.lower() for other, pin in pins.items() if other != site})


def check_known(known: int, policy: Policy, plan: PrivacyPlan) -> None:
    """Refuse a sum with too few sites that this site knows.

    Of those that it knows as many may collude with the server as the policy says (one, in a scope without a
    budget). The rest must be two at least, or a site would learn the one other's update as the difference of
    the sum and its own; and as many as the job counts on for their shares of the noise.

    Raises:
        JobError: There are fewer (SUM_TOO_FEW_KNOWN).
    """
    colluders = 1 if policy.protection is None else policy.protection.colluders
    honest = plan.spend().least_honest
    if known - colluders < honest:
        raise JobError(
            f"This site knows {known} of the sites in the sum, itself included. Its policy takes {colluders} "
            f"of them for colluders, and {honest} others are needed. Pin the certificates of more sites "
            "('histoflare policy pin').",
            reason="SUM_TOO_FEW_KNOWN",
        )


def read_hellos(content: Any) -> tuple[Hello, ...]:
    """Return a list of hellos as it came in a task.

    Raises:
        JobError: It is no such list (SUM_LIST_INVALID).
    """
    if not isinstance(content, Sequence) or isinstance(content, str) or len(content) > MOST_SITES:
        raise JobError(
            f"The task has no list of the sum's sites, of which there are {MOST_SITES} at most.",
            reason="SUM_LIST_INVALID",
        )
    return tuple(Hello.from_json(each) for each in content)


def hash_agreed(job: Job) -> str:
    """Return one hash over all of a job that decides what a site sends and how it is summed."""
    from histoflare import __version__

    agreed = {
        "version": __version__,
        "task": job.task.to_json(),
        "strategy": {"name": job.strategy.name, **vars(job.strategy)},
        "transport": {"name": job.transport.name, **vars(job.transport)},
        "plan": job.plan.to_json(),
        "rounds": job.rounds,
        "seed": job.seed,
        "protocol": job.protocol,
    }
    return sha256(json.dumps(agreed, sort_keys=True, default=str).encode()).hexdigest()


def _whole(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array that can be written to, with its numbers one after another."""
    return array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")

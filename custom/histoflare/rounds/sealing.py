"""A secure sum in one process: all sites say hello, check each other's, and add their pads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from histoflare.errors import JobError
from histoflare.privacy.plan import PrivacyPlan
from histoflare.privacy.secure_sum.hello import RoundKeys, Transcript, check_hellos
from histoflare.privacy.secure_sum.identity import Identity, verify
from histoflare.rounds.state import State, hash_state
from histoflare.rounds.strategy import Update


def check_honest(sites: int, plan: PrivacyPlan) -> None:
    """Raise :class:`JobError` (SUM_TOO_FEW_KNOWN) unless a sum has enough sites if one is curious.

    Args:
        sites: In the round.
        plan: Settled. With shared noise it says on how many honest sites it counts.
    """
    honest = plan.spend().least_honest
    if sites - 1 < honest:
        raise JobError(
            f"A secure sum of {sites} sites hides too little. If one of them is curious it needs {honest} "
            f"honest ones beside it: at least {honest + 1} sites.",
            reason="SUM_TOO_FEW_KNOWN",
        )


def sealed(
    updates: Sequence[Update], plan: PrivacyPlan, round_index: int, received: State, agreed: Mapping[str, Any]
) -> list[Update]:
    """Return the updates of a round with their pads, under keys made on the spot; the tensors are changed.

    Args:
        updates: Of all sites of the round, packed.
        plan: The job's. round_index: From 0.
        received: What the sites were sent.
        agreed: What else of the job decides how the sum is made, as plain JSON.
    """
    keys = [RoundKeys.new(update.site, "in process", round_index, 0) for update in updates]
    identities = [Identity() for _ in updates]
    hellos = tuple(key.hello(own.certificate, own.sign) for key, own in zip(keys, identities, strict=True))
    said = json.dumps({"plan": plan.to_json(), **agreed}, sort_keys=True, default=str)
    job = hashlib.sha256(said.encode()).hexdigest()
    transcript = Transcript(job, "in process", round_index, 0, hash_state(received), hellos)
    for key in keys:
        check_hellos(hellos, key, verify)
    return [
        replace(update, tensors=key.pads(transcript).add_to(update.tensors))
        for update, key in zip(updates, keys, strict=True)
    ]

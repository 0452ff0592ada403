"""How long a round is likely to take at a site at most, measured on made-up data of the public size."""

from __future__ import annotations

import time
from typing import Any

from histoflare.privacy.plan import PrivacyPlan
from histoflare.rounds.state import model_state

MEASURED_RECORDS = 16
"""At most so many are trained on; more take as much longer."""


def likely_seconds(
    task: Any, plan: PrivacyPlan, patients: int, slides: int, device: str = "cpu"
) -> float | None:
    """Return the seconds of the longest round that is likely: every bag as long as one can be.

    Args:
        task, plan: The job's, settled. patients: To train on. slides: The most that a patient has.
        device: Where the site trains.

    Returns:
        Seconds, reading from disk apart; None where the task does not say how large its data can get.
    """
    from histoflare.rounds.local import train_locally
    from histoflare.rounds.private import train_privately

    if not hasattr(task, "longest") or task.longest(1) is None:
        return None
    one_step: Any = plan.for_one_full_step()  # with steps of its own it has all that they need
    drawn = plan.most_drawn(patients)
    measured = max(1, min(drawn, MEASURED_RECORDS))
    state = model_state(task.build_model())

    def train(records: int) -> float:
        data, started = task.longest(records, slides), time.monotonic()
        if plan.own_steps is None:
            train_locally(task, state, data, seed=0, device=device)
        else:
            noise = plan.noise_source("measure")
            train_privately(task, state, data, plan=one_step, noise=noise, seed=0, device=device)
        return time.monotonic() - started

    train(1)  # the first of a process takes longer
    return train(measured) * max(1.0, drawn / measured) * (plan.own_steps or 1)

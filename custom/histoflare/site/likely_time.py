"""How long a round is likely to take at a site at most, measured on made-up data of the public size."""

from __future__ import annotations

import math
import time
from typing import Any

from histoflare.privacy.plan import DpSgd, PrivacyPlan
from histoflare.rounds.state import model_state

MEASURED_RECORDS = 16
"""At most so many are trained on; more take as much longer."""

DEVIATIONS = 6
"""A step draws more than so many standard deviations above the mean with a chance of some 1e-9."""


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
    drawn, steps = patients, 1
    if isinstance(plan, DpSgd):
        mean = patients * plan.sample_rate
        spread = math.sqrt(mean * (1 - plan.sample_rate))
        drawn, steps = min(patients, math.ceil(mean + DEVIATIONS * spread)), plan.steps
    measured = max(1, min(drawn, MEASURED_RECORDS))
    state = model_state(task.build_model())

    def train(records: int) -> float:
        data, started = task.longest(records, slides), time.monotonic()
        if isinstance(plan, DpSgd):
            one_step = _EveryRecordOnce(plan)
            noise = plan.noise_source("measure")
            train_privately(task, state, data, plan=one_step, noise=noise, seed=0, device=device)
        else:
            train_locally(task, state, data, seed=0, device=device)
        return time.monotonic() - started

    train(1)  # the first of a process takes longer
    return train(measured) * max(1.0, drawn / measured) * steps


class _EveryRecordOnce:
    """A plan's step in which every record is drawn."""

    def __init__(self, plan: DpSgd) -> None:
        self.clip_norm, self.noise_multiplier = plan.clip_norm, plan.noise_multiplier
        self.batch_size = plan.batch_size
        self.record, self.slides_per_patient = plan.record, plan.slides_per_patient
        self.sample_rate, self.steps = 1.0, 1

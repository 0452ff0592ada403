"""The bounds in a report: what each model was trained with, what that cost a patient, what it is called."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from histoflare.report.charts import MODELS, UNPROTECTED
from histoflare.report.guarantee import state_epsilon
from histoflare.report.guarantee_words import say_epsilon
from histoflare.rounds.bounds import Course, Courses

_NUMBERS = ("sample_rate", "batch_size", "clip_norm", "noise_multiplier", "delta")


def state_bounds(courses: Courses, unprotected: Courses | None, batch_size: int | None) -> dict[str, Any]:
    """Return model → what it was trained with, as plain JSON.

    ``steps`` are optimizer steps of all rounds, ``[least, most]`` of the sites for local models; the
    federation takes those of ``pooled``. ``epsilon`` is what a patient spends of the job's budget, the most
    of any site's for local models. ``batch_size`` is the divisor of DP-SGD, else that of the task.

    Args:
        courses, unprotected: See :mod:`histoflare.rounds.bounds`; None where nothing protects anyway.
        batch_size: The task's; None if it has none.
    """
    found = {}
    for end, each in (("", courses), ("_unprotected", unprotected)):
        if each is not None:
            found[f"local{end}"] = _state(list(each.local.values()), batch_size)
            found[f"pooled{end}"] = _state([each.pooled] if each.pooled else [], batch_size)
    return {name: stated for name, stated in found.items() if stated}


def _state(courses: Sequence[Course], batch_size: int | None) -> dict[str, Any]:
    if not courses:
        return {}
    steps = [course.total_steps for course in courses]
    plan = courses[0].plan
    said = plan.to_json()
    numbers = {name: said.get(name) for name in _NUMBERS}
    numbers["batch_size"] = said.get("batch_size", batch_size)
    spent = max(_spent(course) for course in courses)
    return {
        "mechanism": plan.mechanism,
        "steps": [min(steps), max(steps)],
        **numbers,
        **state_epsilon(spent),
        "seeded_noise": bool(said.get("noise_multiplier")) and plan.noise_seed is not None,
    }


def _spent(course: Course) -> float:
    """Return the ε of a course by the filter of the job's budget."""
    budget = course.plan.budget()
    if budget is None:
        return math.inf
    return budget.spent(spend.times(count) for spend, count in Counter(course.spends).items())


def models_of(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the models in a report: three, and beside a protected run the bounds without noise."""
    return MODELS + (UNPROTECTED if report.get("pooled_unprotected") else ())


def name_model(report: Mapping[str, Any], model: str) -> str:
    """Return a model's name: ``pooled (ε = 7.9)``, ``pooled, unprotected``; in an open run ``pooled``.

    The federated model's ε is said with the guarantee.
    """
    kind, _, unprotected = model.partition("_")
    if unprotected:
        return f"{kind}, {unprotected}"
    return f"{model}{say_epsilon_of(report, model)}"


def say_epsilon_of(report: Mapping[str, Any], model: str) -> str:
    """Return the ε at which a bound was trained, `` (ε = 7.9)``; nothing where it is not protected."""
    stated = report.get("bounds", {}).get(model)
    if stated is None or stated["epsilon"] is None:
        return ""
    return f" (ε = {say_epsilon(stated)}{', void' if stated['seeded_noise'] else ''})"


def say_steps(stated: Mapping[str, Any]) -> str:
    """Return how many steps a model took: ``60``, or ``48 to 60``."""
    least, most = stated["steps"]
    return f"{most:,}".replace(",", "\u202f") if least == most else f"{least} to {most}"

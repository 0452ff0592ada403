"""A report with something of everything, made by numbers and through the code that makes real ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from histoflare.privacy.plan import PrivacyPlan
from histoflare.report.consortium import RunFacts, build_report
from histoflare.rounds.comparison import Comparison, SiteComparison
from histoflare.rounds.evaluation import Figure, Metrics

HOSTILE = "<script>alert('x')</script>"


def metrics(
    centre: float, patients: int = 40, *, auc: bool = True, half: float = 0.06, **groups: Any
) -> Metrics:
    """Figures about ``centre``, each with an interval of ``half`` to both sides."""

    def figure(value: float) -> Figure:
        return Figure(value, max(0.0, value - half), min(1.0, value + half))

    figures = {
        "accuracy": figure(round(centre + 0.013, 3)),
        "balanced_accuracy": figure(centre),
        "auc": figure(round(centre + 0.041, 3))
        if auc
        else Figure(None, reason="all slides are of one class"),
    }
    return Metrics(patients * 2, patients, figures, dict(groups))


def row(index: int, sites: list[str], **changes: Any) -> dict[str, Any]:
    """A round as the server records it: everybody takes part."""
    return {
        "round": index,
        "sites": sites,
        "asked": sites,
        "taking_part": sites,
        "refused": {},
        "no_answer": [],
        "seconds": {
            site: {"training": 1.0 + number, "waiting": 3.0 - 0.5 * number, "idle": 0.25}
            for number, site in enumerate(sites)
        },
        "bytes_up": 1_000_000 * len(sites),
        "bytes_down": 1_200_000 * len(sites),
        "metrics": {
            site: {"validation/balanced_accuracy": 0.5 + 0.4 * (1 - 0.9**index) - 0.03 * number}
            for number, site in enumerate(sites)
        },
    } | changes


def some_absent(sites: list[str]) -> list[dict[str, Any]]:
    """Thirty rounds: the fourth site refuses in four of them, the second is silent in two."""
    rows = [row(index, sites) for index in range(30)]
    for index in (0, 1, 2, 7):
        rows[index] |= {"taking_part": sites[:3], "refused": {sites[3]: "TRAINER_DIED"}}
    for index in (12, 13):
        rows[index] |= {"taking_part": [sites[0], *sites[2:]], "no_answer": [sites[1]]}
    return rows


def full_report(**changes: Any) -> dict[str, Any]:
    """Four sites, one of which refuses now and then and one is silent twice; an external cohort."""
    sites = ["amsterdam", "graz", HOSTILE, "nijmegen"]
    rows = some_absent(sites)
    groups = {"sex": {"F": metrics(0.81, 20), "M": None}, "scanner": {"A<b>": metrics(0.74, 11)}}
    site_figures = {
        site: SiteComparison(
            60 + 11 * number,
            20 + number,
            metrics(0.70 - 0.02 * number, 10 + number, half=0.14),
            metrics(0.80 + 0.01 * number, 10 + number, half=0.12),
            metrics(0.83, 10 + number, half=0.11),
        )
        for number, site in enumerate(sites)
    }
    local = {site: metrics(0.62 + 0.01 * number, 46) for number, site in enumerate(sites)}
    external = {
        "federated": metrics(0.77, 31, **{"sex": {"F": metrics(0.7, 12)}}),
        "pooled": metrics(0.79, 31),
    }
    external |= {f"local/{site}": metrics(0.55 + 0.03 * number, 31) for number, site in enumerate(sites)}
    facts: dict[str, Any] = {
        "job": "mem_fedavg",
        "runtime": "poc",
        "strategy": {"name": "fedavg", "weighting": "samples", "clients_per_round": None},
        "task": {"labels": ["glandular", "solid"], "encoder": "densenet121-random:v1", "learning_rate": 0.01},
        "seed": 1,
        "rounds": 30,
        "participation": rows,
        "privacy": "Updates leave as they are: no clipping, no noise, nothing booked, ε = ∞.",
        "seconds": {"make slides": 42.5, "prepare bags": 95.25, "federated rounds": 151.0},
        "model_sha256": "5f" * 32,
        "protocol": {
            "metric": "balanced_accuracy",
            "split": {"unit": "patient", "test_fraction": 0.2, "seed": 0},
            "sha256": "ab" * 32,
        },
        "evaluated_at_sites": {
            "graz": {"auc": 0.871, "auc_low": 0.8, "auc_high": 0.93, "n_patients": 11, "n_slides": 21}
        },
        "evaluation_refused": {"nijmegen": "POLICY_INVALID"},
    }
    comparison = Comparison(
        changes.pop("site_figures", site_figures),
        changes.pop("federated", metrics(0.82, 46, **groups)),
        changes.pop("pooled", metrics(0.84, 46)),
        changes.pop("local", local),
        changes.pop("external", external),
        changes.pop("pooled_unprotected", None),
        changes.pop("local_unprotected", {}),
    )
    return build_report(RunFacts(**facts | changes), comparison)


def protected_report(plan: PrivacyPlan, *, stamped: bool = True, **changes: Any) -> dict[str, Any]:
    """The four sites under a settled plan: their gates stamp what one patient spends."""
    sites = ["amsterdam", "graz", HOSTILE, "nijmegen"]
    rows = changes.pop("participation", None) or some_absent(sites)
    if stamped:
        for each in rows:
            each["stamps"] = {site: stamp(plan) for site in each["taking_part"]}
    facts = {
        "participation": rows,
        "rounds": len(rows),
        "privacy": plan.describe(),
        "mechanism": plan.mechanism,
        "plan": plan.to_json(),
        "spend": plan.spend().to_json(),
    }
    return full_report(**facts | changes)


def stamp(plan: PrivacyPlan) -> dict[str, Any]:
    """What a site's gate says of an update under ``plan``."""
    return {
        "scope": "dp",
        "mechanism": plan.mechanism,
        "spend": plan.spend().to_json(),
        "seeded_noise": plan.noise_seed is not None,
    }


def many_sites(count: int = 12, rounds: int = 200) -> dict[str, Any]:
    """Many sites and rounds, with refusals drawn at random."""
    rng = np.random.default_rng(0)
    names = [f"site-{number:02}" for number in range(count)]
    rows = []
    for index in range(rounds):
        absent = [name for name in names if rng.random() < 0.02]
        there = [name for name in names if name not in absent]
        rows.append(row(index, names, taking_part=there, refused=dict.fromkeys(absent, "STOPPED")))
    return full_report(
        participation=rows,
        rounds=rounds,
        site_figures={name: SiteComparison(40, 10, metrics(0.7, 8), metrics(0.8, 8), None) for name in names},
        local={name: metrics(0.7, 80) for name in names},
        external={},
        evaluated_at_sites=None,
        evaluation_refused={},
    )

"""A site's policy for one scope: what may leave the building at most.

A job names a scope; what the scope allows stands in a TOML file that is signed with the site's kit and that
no job can read or change: how updates are protected (``mechanism``), the budget, which metrics may leave and
from which cohort size on. The site's own file narrows that, and says what the site takes part in
(:mod:`histoflare.privacy.own_policy`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from histoflare.checks import is_above_zero, is_whole
from histoflare.errors import JobError, list_lines
from histoflare.privacy.budget import Budget
from histoflare.shipped import PROVISIONING

MECHANISMS = ("open", "dp-sgd", "dp-sgd-shared", "update-noise", "update-noise-shared", "server-noise")
"""``open``: updates leave as they were trained: no clipping, no noise, nothing booked, ε = ∞. The others are
``privacy.plan.DpSgd`` and ``privacy.plan.UpdateNoise``; the noise is each site's own, shared by the sites
under a secure sum (``-shared``), or a trusted server's."""

COUNTS = ("n_slides", "n_patients")
"""Metrics that are counts; they leave only where ``counts`` is true."""


TAKES_PART = ("purposes", "strategies", "models")
OWN = (*TAKES_PART, "pins", "trust_ca")
"""What the site's own policy alone says."""
_ELSEWHERE = "stands in the site's own policy.toml, and in no signed policy; take it out here"

RECORDS = ("patient", "slide")
REFUSE, LEAVE_OUT = "refuse", "leave out"
EXHAUSTED = (REFUSE, LEAVE_OUT)
"""What becomes of a job for which a patient has too little left: it is refused, or the patient left out."""

LEAVES_OUT = ("dp-sgd", "dp-sgd-shared")
"""Mechanisms whose training on nobody is noise like any other: patients can be left out of it unnoticed."""
MOST_COLLUDERS = 10_000
MAX_DELTA = 0.01
"""A larger δ allows what nobody would call private: to publish one patient in a hundred outright."""


@dataclass(frozen=True)
class Protection:
    """What a scope with a ledger asks for, beside its mechanism.

    Attributes:
        epsilon, delta: The budget of each patient, over all jobs together: ε at δ.
        evaluations: How many evaluations over a patient may leave, over all jobs; 0: none.
        job_share: The largest part of the budget's allowance that one job may take, in (0, 1].
        records: What DP-SGD may clip: ``"patient"``, or also ``"slide"``.
        seeded_noise: Whether a job may make its noise repeatable. That voids every guarantee: for research on
            data that may be shared anyway.
        colluders: Against the server and how many colluding sites the budget is kept, at least 1. It matters
            where sites share their noise, in whatever scope: a patient's budget is one.
        all_collude_epsilon: ε of each patient should all other sites collude; None: ``epsilon``.
        sites_per_patient: At how many of the sites that share noise a patient may be, at least 1: what the
            sites vouch for.
        exhausted: One of :data:`EXHAUSTED`: what becomes of a job that costs more than a patient has left.
            To leave out is covered by ε (``ledger.leaving_out``); to refuse tells that there is such a
            patient.
    """

    epsilon: float
    delta: float
    evaluations: int
    records: tuple[str, ...] = ("patient",)
    seeded_noise: bool = False
    job_share: float = 1.0
    colluders: int = 1
    all_collude_epsilon: float | None = None
    sites_per_patient: int = 1
    exhausted: str = REFUSE

    @property
    def leaves_out(self) -> bool:
        """Whether whoever has no room is left out of a job."""
        return self.exhausted == LEAVE_OUT

    def budget(self) -> Budget:
        """Return each patient's budget; :class:`JobError` (PRIVACY_INVALID) if it allows nothing at all."""
        return Budget(
            self.epsilon, self.delta, self.colluders, self.all_collude_epsilon, self.sites_per_patient
        )


@dataclass(frozen=True)
class Policy:
    """What one scope allows.

    Attributes:
        name: The scope, as jobs name it.
        mechanism: One of :data:`MECHANISMS`.
        metrics: Names of the metrics that may leave, e.g. ``"auc"`` or ``"validation/auc"``; others are cut.
        counts: Whether counts (of slides, patients, training samples as an update's weight) may leave.
        numbers: Names of the numbers that may leave beside an update (``rounds.strategy.Strategy.numbers``);
            none unless a policy says so. Under a budget those that follow from data stay, listed or not.
        minimum_patients: Nothing computed over fewer patients leaves, neither update nor metric. At least 1.
        protection: With every mechanism but ``open``: the budget, and what else holds. None books nothing.
        purposes, strategies, models: What the site takes part in, from its own file; no signed policy says
            it, and by itself one takes part in nothing.
        pins: Other site → SHA-256 of its certificate in hex; from the site's own file too. In a secure sum
            the site counts only on sites that it knows so.
        trust_ca: Whether it counts on every site with a certificate of the consortium's authority, pinned or
            not. Whoever holds the authority's key can then stand in for sites.
    """

    name: str
    mechanism: str
    metrics: tuple[str, ...]
    counts: bool
    minimum_patients: int
    protection: Protection | None = None
    numbers: tuple[str, ...] = ()
    purposes: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    pins: Mapping[str, str] = field(default_factory=dict)
    trust_ca: bool = False

    def allowed_metrics(self, metrics: Mapping[str, float | None]) -> dict[str, float | None]:
        """Return those of ``metrics`` that may leave."""
        return {
            name: value
            for name, value in metrics.items()
            if (self.counts if name.rpartition("/")[2] in COUNTS else name in self.metrics)
        }


POLICIES = PROVISIONING / "policies"
"""The policies that come with this package, one ``<scope>.toml`` each; a kit gets a copy of its own."""


def read_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        JobError: It is missing, is not TOML, or has a missing, unknown or unusable entry (all are listed).
            The reason is ``POLICY_INVALID``: without a policy nothing leaves.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError:
        raise JobError(
            f"{path}: not found. Without its policy this site takes no job.", reason="POLICY_INVALID"
        ) from None
    except (ValueError, RecursionError) as error:
        raise JobError(f"{path}: not a TOML file: {error}", reason="POLICY_INVALID") from None
    problems = _problems(content)
    if problems:
        listed = list_lines(problems)
        raise JobError(f"{path}: cannot be used as a policy; correct:{listed}", reason="POLICY_INVALID")
    return Policy(
        name=content["name"],
        mechanism=content["mechanism"],
        metrics=tuple(content["metrics"]),
        counts=content["counts"],
        minimum_patients=content["minimum_patients"],
        protection=_protection(content.get("protection")),
        numbers=tuple(content.get("numbers", ())),
    )


def _protection(content: Mapping[str, Any] | None) -> Protection | None:
    if content is None:
        return None
    return Protection(**{**content, "records": tuple(content.get("records", ["patient"]))})


def _problems(content: Mapping[str, Any]) -> list[str]:
    fields = [name for name in Policy.__dataclass_fields__ if name not in OWN]
    optional = ("protection", "numbers")
    problems = [f"{name}: missing" for name in fields if name not in content and name not in optional]
    problems += [
        f"{name}: {_ELSEWHERE if name in OWN else 'not an entry of a policy'}"
        for name in content
        if name not in fields
    ]
    if not (isinstance(content.get("name", "x"), str) and content.get("name", "x")):
        problems.append("name: the scope's name")
    if content.get("mechanism", "open") not in MECHANISMS:
        problems.append(
            f"mechanism: one of {', '.join(MECHANISMS)}, not {content['mechanism']!r}{_why(content)}"
        )
    for name in ("metrics", "numbers"):
        listed = content.get(name, [])
        if not (isinstance(listed, list) and all(isinstance(entry, str) and entry for entry in listed)):
            problems.append(f"{name}: a list of texts, not {listed!r}")
    if not isinstance(content.get("counts", True), bool):
        problems.append(f"counts: true or false, not {content['counts']!r}")
    minimum = content.get("minimum_patients", 1)
    if type(minimum) is not int or minimum < 1:
        problems.append(f"minimum_patients: a whole number of at least 1, not {minimum!r}")
    return problems + _protection_problems(content)


TOGETHER = (
    'with "leave out" sites_per_patient must be 1: a patient of two sites who is left out at one would stay '
    "at the other, and neither ledger would count it"
)
"""Why the two do not go together."""


def _why(content: Mapping[str, Any]) -> str:
    if "laplace" not in str(content["mechanism"]).lower():
        return ""
    return (
        ". Laplace noise goes with the L1 norm, in which an update of n numbers clipped to an L2 norm C can "
        "be as long as C times the root of n: for a network nothing can be learned under so much noise"
    )


def _protection_problems(content: Mapping[str, Any]) -> list[str]:
    mechanism, protection = content.get("mechanism", "open"), content.get("protection")
    if mechanism == "open" or mechanism not in MECHANISMS:
        return [] if protection is None else ["protection: goes with a mechanism other than open"]
    if not isinstance(protection, Mapping):
        return [f"protection: missing; the mechanism {mechanism} needs [protection] with its budget"]
    problems = []
    if content.get("counts") is not False:
        problems.append("counts: must be false: a count of patients or slides is no protected figure")
    metrics = content.get("metrics", [])
    if any(isinstance(name, str) and "/" in name for name in metrics):
        problems.append("metrics: none of every round (validation/…): each is a release that nobody books")
    known = Protection.__dataclass_fields__
    problems += [f"protection.{name}: not an entry of a policy" for name in protection if name not in known]
    needed = ("epsilon", "delta", "evaluations")
    problems += [f"protection.{name}: missing" for name in needed if name not in protection]
    epsilon, delta = protection.get("epsilon", 1.0), protection.get("delta", 1e-5)
    if not is_above_zero(epsilon):
        problems.append(f"protection.epsilon: a number above 0, not {epsilon!r}")
    if not is_above_zero(delta, MAX_DELTA):
        problems.append(f"protection.delta: a number above 0 and at most {MAX_DELTA}, not {delta!r}")
    share = protection.get("job_share", 1.0)
    if not is_above_zero(share, 1):
        problems.append(f"protection.job_share: a number above 0 and at most 1, not {share!r}")
    colluders = protection.get("colluders", 1)
    if not is_whole(colluders, 1, MOST_COLLUDERS):
        problems.append(
            f"protection.colluders: a whole number from 1 to {MOST_COLLUDERS}, not {colluders!r}. Each site "
            "sees the sum and knows its own noise: against the server and no site there is no figure"
        )
    sites = protection.get("sites_per_patient", 1)
    if not is_whole(sites, 1, MOST_COLLUDERS):
        problems.append(
            f"protection.sites_per_patient: a whole number from 1 to {MOST_COLLUDERS}, not {sites!r}"
        )
    together = protection.get("all_collude_epsilon", 1.0)
    if not is_above_zero(together):
        problems.append(f"protection.all_collude_epsilon: a number above 0, not {together!r}")
    exhausted = protection.get("exhausted", REFUSE)
    if exhausted not in EXHAUSTED:
        problems.append(
            f"protection.exhausted: one of {', '.join(f'{each!r}' for each in EXHAUSTED)}, not {exhausted!r}"
        )
    elif exhausted == LEAVE_OUT and mechanism not in LEAVES_OUT:
        problems.append(
            f'protection.exhausted: "leave out" goes with {" or ".join(LEAVES_OUT)}. Under {mechanism} '
            "training sees its patients without noise, and an error or a server would tell who is missing"
        )
    elif exhausted == LEAVE_OUT and sites != 1:
        problems.append(f"protection.exhausted: {TOGETHER}")
    evaluations = protection.get("evaluations", 0)
    if not is_whole(evaluations, 0):
        problems.append(f"protection.evaluations: a whole number of at least 0, not {evaluations!r}")
    records = protection.get("records", ["patient"])
    if not (isinstance(records, list) and records and all(record in RECORDS for record in records)):
        problems.append(f"protection.records: some of {', '.join(RECORDS)}, not {records!r}")
    if not isinstance(protection.get("seeded_noise", False), bool):
        problems.append(f"protection.seeded_noise: true or false, not {protection['seeded_noise']!r}")
    return problems

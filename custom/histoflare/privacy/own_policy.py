"""The second layer of policy: what a site's steward narrows, and what the site takes part in.

The first layer (:mod:`histoflare.privacy.policy`) is signed with the kit: the outer limit, which only the
lead changes. The second is one unsigned file of the site's own, ``local/policy.toml``. It may narrow the
first and never widen it: an entry that would is an error, which the steward has to see, and not a value
quietly put back to the limit. It alone lists the purposes, strategies and models that the site takes part in.
That a name is listed widens nothing: what the part of that name declares is judged by the job's privacy plan.

Guarantee: where :func:`narrowed` returns a policy, whatever that lets out the signed one would have let out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from histoflare.errors import JobError, list_lines
from histoflare.privacy.policy import REFUSE, TOGETHER, Policy, Protection

OWN_POLICY_FILE = "policy.toml"
"""A site's own policy, in the ``local`` folder of its kit, beside the signed ``policy_<scope>.toml``."""


@dataclass(frozen=True)
class Narrowing:
    """What a steward makes narrower; the entries are those of a signed policy. None leaves one as it is.

    Attributes:
        minimum_patients: At least the limit. metrics, numbers: Some of the limit's, or none. counts: Only
            false, where the limit is true.
        epsilon, delta, evaluations, job_share, all_collude_epsilon: At most the limit, in a scope with a
            budget. A lower ε or δ has another Rényi order (see ``privacy.budget``).
        colluders, sites_per_patient: At least the limit; what was spent before is then counted so, too.
        records: Some of the limit's, at least one. seeded_noise: As counts.
        exhausted: Only ``refuse``, where the limit is ``leave out``: fewer jobs are taken then. (That one is
            refused tells something, as every refusal of a site does.)
    """

    minimum_patients: int | None = None
    metrics: tuple[str, ...] | None = None
    counts: bool | None = None
    epsilon: float | None = None
    delta: float | None = None
    evaluations: int | None = None
    records: tuple[str, ...] | None = None
    seeded_noise: bool | None = None
    job_share: float | None = None
    numbers: tuple[str, ...] | None = None
    colluders: int | None = None
    all_collude_epsilon: float | None = None
    sites_per_patient: int | None = None
    exhausted: str | None = None


@dataclass(frozen=True)
class StewardPolicy:
    """A site's own policy, for all its scopes.

    Attributes:
        purposes, strategies, models: What the site takes part in; nothing that is not listed.
        scopes: The scopes that it takes part in; None for all that its kit has.
        everywhere: What it narrows in each of them.
        scope: Scope → what it narrows further there.
        pins, trust_ca: See :class:`~histoflare.privacy.policy.Policy`.
    """

    purposes: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    scopes: tuple[str, ...] | None = None
    everywhere: Narrowing = Narrowing()
    scope: Mapping[str, Narrowing] = field(default_factory=dict)
    pins: Mapping[str, str] = field(default_factory=dict)
    trust_ca: bool = False

    def takes_part(self, scope: str) -> bool:
        """Return whether the site takes part in a scope of its kit."""
        return self.scopes is None or scope in self.scopes


def narrowed(policy: Policy, own: StewardPolicy) -> Policy:
    """Return what holds: a signed policy as its site's own narrows it, with what the site takes part in.

    Raises:
        JobError: The site takes no part in the scope (SCOPE_NOT_ALLOWED), or an entry would widen the policy
            or cannot hold under it (POLICY_INVALID; all of them are listed).
    """
    if not own.takes_part(policy.name):
        raise JobError(
            f"This site takes no part in the scope '{policy.name}'; its {OWN_POLICY_FILE} lists "
            f"{', '.join(own.scopes or ()) or 'none'}.",
            reason="SCOPE_NOT_ALLOWED",
        )
    here, problems = _layered(policy, own)
    if problems:
        raise JobError(
            f"The site's own policy ({OWN_POLICY_FILE}) does not fit the kit's; correct:"
            + list_lines(problems),
            reason="POLICY_INVALID",
        )
    return replace(
        here,
        purposes=own.purposes,
        strategies=own.strategies,
        models=own.models,
        pins=own.pins,
        trust_ca=own.trust_ca,
    )


def faults(policy: Policy, own: StewardPolicy) -> list[str]:
    """Return why :func:`narrowed` would refuse a policy in a scope that the site takes part in."""
    return _layered(policy, own)[1] if own.takes_part(policy.name) else []


def layers(policy: Policy, own: StewardPolicy) -> dict[str, tuple[Any, Any, Any]]:
    """Return entry → (what the signed policy says, what the site's own says or None, what holds or None).

    Nothing holds in a scope that the site takes no part in. Entries that the scope cannot have are left out.

    Raises:
        JobError: As :func:`narrowed`, but not for a scope that the site takes no part in.
    """
    holds = narrowed(policy, own) if own.takes_part(policy.name) else None
    here = own.scope.get(policy.name, Narrowing())
    found = {}
    for name in _NARROWER:
        if name in IN_PROTECTION and policy.protection is None:
            continue
        says = getattr(here, name)
        if says is None:
            says = getattr(own.everywhere, name)
        found[name] = (_entry(policy, name), says, None if holds is None else _entry(holds, name))
    return found


def _entry(policy: Policy, name: str) -> Any:
    if name == "all_collude_epsilon" and policy.protection is not None:
        return policy.protection.all_collude_epsilon or policy.protection.epsilon
    return getattr(policy.protection if name in IN_PROTECTION else policy, name)


def check_taking_part(policy: Policy, *, purpose: object, strategy_name: object, model_name: object) -> None:
    """Refuse a job that the site takes no part in.

    Args:
        policy: As :func:`narrowed` returned it; one that was only signed takes part in nothing.
        purpose, strategy_name, model_name: The job's, as it says them.

    Raises:
        JobError: One is not listed (PURPOSE_NOT_ALLOWED, STRATEGY_NOT_ALLOWED, MODEL_NOT_ALLOWED).
    """
    for what, name, listed in (
        ("purpose", purpose, policy.purposes),
        ("strategy", strategy_name, policy.strategies),
        ("model", model_name, policy.models),
    ):
        if not (isinstance(name, str) and name in listed):
            raise JobError(
                f"The job's {what} is {shown(name)}; this site takes part in: {', '.join(listed) or 'none'} "
                f"({OWN_POLICY_FILE} lists them).",
                reason=f"{what.upper()}_NOT_ALLOWED",
            )


def _is_part(own: tuple[str, ...], limit: tuple[str, ...]) -> bool:
    return set(own) <= set(limit)


_NARROWER: Mapping[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum_patients": (operator.ge, "at least"),
    "metrics": (_is_part, "some of"),
    "counts": (operator.le, "no more than"),
    "numbers": (_is_part, "some of"),
    "epsilon": (operator.le, "at most"),
    "delta": (operator.le, "at most"),
    "evaluations": (operator.le, "at most"),
    "records": (_is_part, "some of"),
    "seeded_noise": (operator.le, "no more than"),
    "job_share": (operator.le, "at most"),
    "colluders": (operator.ge, "at least"),
    "all_collude_epsilon": (operator.le, "at most"),
    "sites_per_patient": (operator.ge, "at least"),
    "exhausted": (lambda value, limit: value in (limit, REFUSE), '"refuse", or'),
}
"""Entry → whether a value is within a limit (false is less than true), and the words for that."""

IN_PROTECTION = tuple(each.name for each in fields(Protection))
"""The entries that only a scope with a budget has."""


def _layered(policy: Policy, own: StewardPolicy) -> tuple[Policy, list[str]]:
    """Return ``policy`` under all that is narrower in its scope, and what does not fit."""
    everywhere, problems = _narrow(policy, own.everywhere, f"in the scope {policy.name}: ")
    table = f"[scope.{policy.name}] "
    here, more = _narrow(everywhere, own.scope.get(policy.name, Narrowing()), table)
    problems += more
    if not problems and here.protection is not None:
        problems = [f"{table}{problem}" for problem in _budget_problems(here.protection)]
    return here, problems


def _narrow(policy: Policy, own: Narrowing, where: str) -> tuple[Policy, list[str]]:
    """Return ``policy`` with the entries of ``own`` that fit, and in words those that do not."""
    outer: dict[str, Any] = {}
    protected: dict[str, Any] = {}
    problems = []
    for name, (is_narrower, words) in _NARROWER.items():
        value, inside = getattr(own, name), name in IN_PROTECTION
        if value is None:
            continue
        if inside and policy.protection is None:
            problems.append(
                f"{where}{name}: this scope has no budget and no noise, so nothing that {name} could narrow. "
                f"Leave '{policy.name}' out of scopes, or write {name} below [scope.<name>] of one that has "
                "a budget"
            )
            continue
        limit = _entry(policy, name)
        if is_narrower(value, limit):
            (protected if inside else outer)[name] = value
        else:
            problems.append(
                f"{where}{name}: {shown(value)} would widen what holds without it, {shown(limit)}: write "
                f"{words} that, or leave {name} out"
            )
    if policy.protection is not None:
        outer["protection"] = replace(policy.protection, **protected)
    return replace(policy, **outer), problems


def _budget_problems(protection: Protection) -> list[str]:
    if protection.leaves_out and protection.sites_per_patient > 1:
        return [f"exhausted: {TOGETHER}"]
    try:
        protection.budget().filters()
    except JobError as error:
        return [f"epsilon and delta: {error}"]
    return []


def shown(value: object, most: int = 200) -> str:
    """Return a value in words, cut after ``most`` letters."""
    if isinstance(value, bool):
        return str(value).lower()
    text = ", ".join(value) or "none" if isinstance(value, tuple) else repr(value)
    return text if len(text) <= most else f"{text[:most]}…"

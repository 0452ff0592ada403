"""A site's ``privacy.json``: where FLARE is told of Admission, Gate and Guard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from histoflare.privacy.own_policy import OWN_POLICY_FILE
from histoflare.privacy.own_policy_file import POLICY_FILE, write_own_policy
from histoflare.rounds.strategies import STRATEGIES

PRIVACY_FILE = "privacy.json"


def policy_file(scope: str) -> str:
    """Return the name of a scope's policy file, in the ``local`` folder of a startup kit."""
    return POLICY_FILE.format(scope)


def known_models() -> list[str]:
    """Return the names of the models that this version has."""
    from histoflare.bags.models import MODELS
    from histoflare.masks.networks import NETWORKS

    return [*MODELS, *NETWORKS]


def write_first_policy(local: Path) -> None:
    """Write a site's own policy as its kit first has it, for its steward to change.

    It takes part in research with all strategies and models that this version has, and narrows nothing.
    """
    write_own_policy(
        local / OWN_POLICY_FILE, purposes=["research"], strategies=list(STRATEGIES), models=known_models()
    )


def privacy_configuration(scopes: Sequence[str], default_scope: str) -> dict[str, Any]:
    """Return the content of ``privacy.json`` for a site with these scopes.

    Every scope has the same parts; what they allow is in its policy file. The gate stands on both ways out: a
    peer-to-peer workflow sends its updates as *task data*.
    """
    return {
        "scopes": [
            {
                "name": scope,
                "properties": {},
                "task_data_filters": [
                    _part("admission.Admission", scope, "in"),
                    _part("gate.Gate", scope, "out"),
                ],
                "task_result_filters": [_part("gate.Gate", scope, "out")],
            }
            for scope in scopes
        ],
        "default_scope": default_scope,
        "components": [{"id": "histoflare_guard", "path": "histoflare.flare.guard.Guard", "args": {}}],
    }


def _part(name: str, scope: str, direction: str) -> dict[str, Any]:
    return {
        "path": f"histoflare.flare.{name}",
        "args": {"policy": policy_file(scope)},
        "direction": direction,
    }

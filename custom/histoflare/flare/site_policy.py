"""A site's ``privacy.json``: where FLARE is told of Admission, Gate and Guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PRIVACY_FILE = "privacy.json"


def policy_file(scope: str) -> str:
    """Return the name of a scope's policy file, in the ``local`` folder of a startup kit."""
    return f"policy_{scope}.toml"


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

"""The topologies by name: each is one file, and one line here."""

from __future__ import annotations

from typing import Any

from histoflare.rounds.registry import make_registered
from histoflare.rounds.topology import Topology

TOPOLOGIES = {
    "federated": "histoflare.rounds.topologies.federated:Federated",
    "cyclic": "histoflare.rounds.topologies.cyclic:Cyclic",
}
"""Name → the topology's class, for :func:`make_topology`.

>>> from histoflare import TOPOLOGIES
>>> TOPOLOGIES["cyclic"]
'histoflare.rounds.topologies.cyclic:Cyclic'
"""


def make_topology(name: str, **arguments: Any) -> Topology:
    """Return the topology ``name`` with its arguments; :class:`JobError` if there is none that takes them."""
    made: Topology = make_registered("topology", TOPOLOGIES, name, arguments)
    return made

"""Tasks of MEM, and MEM itself, from flat settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from histoflare.bags.models import build_model
from histoflare.bags.models.mem import MEM, MemSettings
from histoflare.bags.task import BagTask

OWN = tuple(field.name for field in fields(MemSettings))


def with_mem(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a task, those of MEM's own in a model."""
    own = {name: value for name, value in settings.items() if name in OWN}
    rest = {name: value for name, value in settings.items() if name not in OWN}
    return {**rest, "model": MemSettings(**own)}


def make_mem_task(labels: Sequence[str], encoder: str, **settings: Any) -> BagTask:
    return BagTask(labels, encoder, **with_mem(settings))


def make_mem(outputs: int, *, features: int = 1024, seed: int = 0, **settings: Any) -> MEM:
    model = build_model(MemSettings(**settings), features, outputs, seed)
    assert isinstance(model, MEM)
    return model

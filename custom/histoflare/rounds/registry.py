"""Finds parts of a round, such as strategies, by their name in a registry: each is one file and one line."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from histoflare.errors import JobError


def find_class(place: str) -> Any:
    """Return the class that a registry names as ``module:class``."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def make_registered(what: str, registry: Mapping[str, str], name: str, arguments: Mapping[str, Any]) -> Any:
    """Return the part ``name`` of a registry, made with its arguments.

    Args:
        what: Kind of part, for messages, such as ``"strategy"``.
        registry: Name → ``"module:class"``.
        arguments: Fields of the class.

    Raises:
        JobError: There is no such part, or it does not take these arguments.
    """
    if name not in registry:
        raise JobError(f"There is no {what} {name!r}; there are: {', '.join(sorted(registry))}.")
    kind = find_class(registry[name])
    known = set(inspect.signature(kind).parameters)
    unknown = sorted(set(arguments) - known)
    if unknown:
        takes = ", ".join(sorted(known)) or "nothing"
        raise JobError(f"The {what} {name} takes no {', '.join(unknown)}; it takes: {takes}.")
    return kind(**arguments)

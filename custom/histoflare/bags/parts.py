"""A part that a table names: its name finds a dataclass in a registry, the other entries are its fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, TypeVar

from histoflare.errors import JobError

Part = TypeVar("Part")


def read_part(
    table: str, said: object, registry: Mapping[str, type[Part]], given: Sequence[str] = ()
) -> Part:
    """Return the part that a table says.

    Args:
        table: What the table is called, for messages.
        said: Its content: ``name``, and fields of the class of that name.
        registry: Name → frozen dataclass.
        given: Fields that are said elsewhere.

    Raises:
        JobError: It is no table, or has an unknown name or field; the message says which there are.
    """
    name = said.get("name") if isinstance(said, Mapping) else None
    if not isinstance(said, Mapping) or not isinstance(name, str) or name not in registry:
        raise JobError(f"{table}.name: one of {', '.join(registry)}, not {name!r}")
    known = [field.name for field in fields(registry[name]) if field.name not in given]  # type: ignore[arg-type]
    unknown = [key for key in said if key not in (*known, "name")]
    if unknown:
        has = ", ".join(known) or "none"
        raise JobError(f"{table}.{unknown[0]}: no setting of {name}; its settings are: {has}")
    return registry[name](**{key: value for key, value in said.items() if key != "name"})


def say_part(part: Any, given: Sequence[str] = ()) -> dict[str, Any]:
    """Return the table that :func:`read_part` makes the part of, as plain JSON."""
    own = {key: value for key, value in asdict(part).items() if key not in given}
    return {"name": part.name, **own}

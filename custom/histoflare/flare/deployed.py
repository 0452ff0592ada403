"""What a job may bring to a site: its configuration, looked at as text.

A configuration in HOCON can include any file or address, refer to the environment, and have FLARE fill parts
of variables into names that the server sees. Nothing of a site may get into a job that way.
"""

from __future__ import annotations

import re
from pathlib import Path

from histoflare.errors import JobError
from histoflare.flare.job import AGREED, START_MODEL_FILE, VARIABLES_FILE
from histoflare.flare.record import EARLIER_ROUNDS_FILE

CLIENT_FILE = "config_fed_client.conf"
FILES = frozenset(
    {CLIENT_FILE, "config_fed_server.conf", VARIABLES_FILE, "protocol.conf"}
    | {START_MODEL_FILE, EARLIER_ROUNDS_FILE}
)
OF_FLARE = ".__nvfl_"
"""Prefix of FLARE's signature files."""

INCLUDES = ('include "job.conf"', 'include "protocol.conf"')
SUBSTITUTIONS = frozenset({*AGREED.values(), "seed"})

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_REFERENCE = re.compile(r'"\{[a-z_]+\}"')


def check_deployed(config: Path) -> None:
    """Raise :class:`JobError` unless a deployed application is what a job of this project is, and no more.

    Args:
        config: The application's ``config`` folder at the site.
    """
    names = {
        path.relative_to(config.parent).as_posix()
        for path in config.parent.rglob("*")
        if path.is_file() and not path.name.startswith(OF_FLARE)
    }
    others = sorted(names - {f"{config.name}/{name}" for name in FILES})
    if others or f"{config.name}/{CLIENT_FILE}" not in names:
        listed = ", ".join(others) or f"no {CLIENT_FILE}"
        raise JobError(f"The job brings other files than a job of this project: {listed}.")
    for path in sorted(config.glob("*.conf")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            problem = _problem(line.strip())
            if problem:
                raise JobError(f"{path.name}, line {number}: {problem}")


def _problem(line: str) -> str | None:
    if line.startswith("#"):
        return None
    if re.search("include", line, re.IGNORECASE) and line not in INCLUDES:
        return f"only {' and '.join(INCLUDES)} may be included"
    if '"""' in line:
        return "no text in three quotes"
    if any(name not in SUBSTITUTIONS for name in re.findall(r"\$\{([^}]*)\}?", line)):
        return f"only ${{…}} of {', '.join(sorted(SUBSTITUTIONS))}"
    strings = _STRING.findall(line)
    if any(("{" in text or "}" in text) and not _REFERENCE.fullmatch(text) for text in strings):
        return 'a variable stands in a text of its own, "{name}"'
    return None

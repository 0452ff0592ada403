"""FLARE's scripts in a startup kit, changed: what they import, rights of files, blanks in paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from histoflare.errors import JobError
from histoflare.site.trainer import KIT_MALLOC

START_SCRIPT = "sub_start.sh"
ARENAS = "export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-4}\n"
"""In FLARE's start script: glibc's heaps for the threads of a process, unless its environment says so."""

FLAT = "".join(f"export {name}=${{{name}:-{value}}}\n" for name, value in KIT_MALLOC.items())
"""In its place."""

IMPORTS = "export PYTHONPATH=/local/custom:$PYTHONPATH\n"
"""There: a folder outside of the kit, and the current one where the variable was not set."""

SHELL = "#!/usr/bin/env bash\n"
SAFE_IMPORTS = """\
export PYTHONSAFEPATH=1
PYTHONPATH="$(printf '%s' "${PYTHONPATH:-}" | tr ':' '\\n' | grep '^/' | paste -s -d ':' -)"
if [[ -n "$PYTHONPATH" ]]; then export PYTHONPATH; else unset PYTHONPATH; fi
"""
"""First of all: what the environment says in full paths, and never the current folder."""

ADMIN_SCRIPT = "fl_admin.sh"
ADMIN_MODULE = "python3 -m nvflare.fuel.hci.tools.admin "
SAFE_ADMIN_MODULE = "python3 -m histoflare.flare.admin_console "

PRIVATE = "umask 077\n"
"""After the first line of a site's start script."""

UNQUOTED = re.compile(r'(?<!")\$DIR(?=/)')
"""The kit's folder, where a blank in its path would split it."""


def change_start_scripts(startup: Path) -> bool:
    """Change the scripts of a server's or a site's kit, all but their file mode.

    Args:
        startup: The kit's folder with the scripts.

    Returns:
        Whether memory is kept flat: False if FLARE's script is another than the one known here.

    Raises:
        JobError: FLARE's script is another, and what it imports cannot be limited (FLARE_CHANGED).
    """
    flat = _keep_memory_flat(startup / START_SCRIPT)
    _import_safely(startup / START_SCRIPT, {IMPORTS: ""})
    _quote_folder(startup)
    return flat


def change_admin_script(startup: Path) -> None:
    """Change the scripts of a person's kit; as :func:`change_start_scripts`."""
    if (startup / ADMIN_SCRIPT).is_file():
        _import_safely(startup / ADMIN_SCRIPT, {ADMIN_MODULE: SAFE_ADMIN_MODULE})
    _quote_folder(startup)


def keep_files_private(startup: Path) -> None:
    """Make what FLARE's processes write at a site (logs name slides) readable by its own user alone."""
    script = startup / START_SCRIPT
    first, rest = script.read_text().split("\n", 1)
    if not rest.startswith(PRIVATE):
        script.write_text(f"{first}\n{PRIVATE}{rest}")


def _quote_folder(startup: Path) -> None:
    """Quote ``$DIR`` in the scripts, so that they work where the kit's path has a blank."""
    for script in startup.glob("*.sh"):
        script.write_text(UNQUOTED.sub('"$DIR"', script.read_text()))


def _keep_memory_flat(script: Path) -> bool:
    """Make a process of FLARE return a round's memory to the system; return whether the script was changed.

    The tensors of an update come and go in other threads each round. With a heap for every few threads, what
    one of them has free is of no use to the others: with updates of 222 MB the server's job came to hold
    three times what it used.
    """
    text = script.read_text()
    script.write_text(text.replace(ARENAS, FLAT))
    return ARENAS in text or FLAT in text


def _import_safely(script: Path, changes: Mapping[str, str]) -> None:
    """Keep a script of FLARE from importing anything from the current folder or from a kit.

    Args:
        changes: Text of the script → the text that replaces it.

    Raises:
        JobError: FLARE's script is another (FLARE_CHANGED).
    """
    text = script.read_text()
    if SAFE_IMPORTS in text:
        return
    for line, instead in {SHELL: SHELL + SAFE_IMPORTS, **changes}.items():
        if text.count(line) != 1:
            raise JobError(
                f"{script}: has no line '{line.strip()}'. Install the FLARE of constraints.txt.",
                reason="FLARE_CHANGED",
            )
        text = text.replace(line, instead)
    script.write_text(text)

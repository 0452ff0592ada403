"""A startup kit as it was signed: every file of ``startup`` and ``local``, policy and start scripts included.

``startup/kit_signature.json`` lists each file with its SHA-256. The key of the consortium's certificate
authority signs the list (RSA-PSS, SHA-256); ``startup/rootCA.pem`` verifies it. A kit is as it was signed if
every listed file is there unchanged, and no other file but the site's own (:data:`OWN_FILES`,
:data:`OWN_FOLDERS`). A kit without the list, or with an unsigned one, is not.

Nowhere else in the kit, the site's own folders and those of jobs included, is there anything that Python or
FLARE could take for its own: modules, libraries, a ``resources.json`` (:func:`is_stray`).

It is against a kit that was changed, on its way or at the site, and against what a job left there. What it
does not see:

- A site that changes the Python environment, or the processes while they run. Such a site needs no kit.
- A kit whose ``rootCA.pem`` another authority has replaced, and signed all anew. TLS does: that kit's client
  and the consortium's server do not trust each other.
- An earlier kit of the same site. It was signed too.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.machinery import all_suffixes
from pathlib import Path
from typing import Any

from cryptography.x509.oid import NameOID
from nvflare.apis.workspace import Workspace
from nvflare.lighter.utils import (
    load_crt_bytes,
    load_private_key,
    sign_content,
    verify_cert,
    verify_content,
)

from histoflare.errors import JobError, list_lines
from histoflare.flare.job_files import take_once
from histoflare.site.places import kit_of
from histoflare.storage import write_json

SIGNATURE_FILE = "startup/kit_signature.json"
ROOT_CERTIFICATE = "startup/rootCA.pem"
FOLDERS = ("startup", "local")

OWN_FILES = (
    *("histoflare.toml", "histoflare.toml~", ".histoflare.toml.sw?", ".histoflare.toml.*.partial"),
    *("policy.toml", "policy.toml~", ".policy.toml.sw?", ".policy.toml.*.partial"),
    *("*.csv", "*.csv~", ".~lock.*.csv#", ".*.csv.sw?", ".*.csv.*.partial"),
)
"""Files of ``local`` that are the site's own: its settings, its policy, its manifests, what editors leave
beside them. FLARE reads none of them."""

OWN_FOLDERS = ("bags", "records")
"""Folders of ``local`` that are the site's own, whatever is in them. FLARE reads none of them."""

CODE = (
    *(".py", ".pyc", ".pyd", ".pyw", ".pyz", ".so", ".dylib", ".dll", ".pth", ".egg", ".egg-link"),
    *all_suffixes(),
)
"""Ends of names that Python imports or reads at its start."""

CLIENT_FILE = "startup/fed_client.json"
_CERTIFICATES = {
    CLIENT_FILE: "startup/client.crt",
    "startup/fed_server.json": "startup/server.crt",
}
"""What makes a kit a client's or a server's → the certificate it shows the others."""

_FORMAT = 1
_MOST_BYTES = 1 << 20
_MOST_LISTED = 20
_PURPOSE = b"histoflare kit 1\n"
"""In front of what is signed: the authority's key signs other things too."""


def sign_kit(kit: Path, key: Any) -> None:
    """List a kit's files in its :data:`SIGNATURE_FILE` and sign the list; an earlier one is replaced.

    Args:
        kit: Folder with ``startup`` and ``local``.
        key: The private key of the authority of the kit's ``rootCA.pem`` (RSA).

    Raises:
        JobError: The kit is another authority's or no kit, or has a symbolic link or another thing that is no
            plain file (KIT_CHANGED).
    """
    if load_crt_bytes(_read(kit / ROOT_CERTIFICATE)).public_key() != key.public_key():
        raise JobError(
            f"{kit}: this authority did not make the kit; its {ROOT_CERTIFICATE} is another's. Nothing was "
            "changed.",
            reason="KIT_CHANGED",
        )
    list_kit(kit)
    sign_list(kit / SIGNATURE_FILE, key)


def list_kit(kit: Path) -> Path:
    """List a kit's files in its :data:`SIGNATURE_FILE`, unsigned, and return that file.

    For a kit whose private key never leaves its site: the site has the list signed (:func:`sign_list`), not
    the kit. The list says nothing of a file but its name and its hash.

    Raises:
        JobError: As :func:`sign_kit`.
    """
    files, problems = _hash_files(kit)
    problems += [f"not a name that can be signed: {name!r}" for name in files if not _is_path(name)]
    if problems:
        raise _changed(kit, problems)
    path = kit / SIGNATURE_FILE
    write_json(path, {"format": _FORMAT, "files": files})
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        raise JobError(f"{path}: not there; a kit has startup and local.", reason="KIT_CHANGED") from None


def sign_list(path: Path, key: Any) -> None:
    """Sign a list that :func:`list_kit` wrote.

    Raises:
        JobError: It is no such list (KIT_CHANGED).
    """
    try:
        files, _ = _read_list(path)
    except (OSError, ValueError):
        raise JobError(
            f"{path}: neither a kit nor the list of a kit's files (startup/kit_signature.json).",
            reason="KIT_CHANGED",
        ) from None
    write_json(path, {"format": _FORMAT, "files": files, "signature": sign_content(_signed(files), key)})


def read_authority(folder: Path) -> Any:
    """Return the private key of a consortium's certificate authority.

    Args:
        folder: ``state`` beside the kits that ``nvflare provision`` made, or what ``nvflare cert init`` made.

    Raises:
        JobError: There is no key.
    """
    try:
        if (folder / "rootCA.key").is_file():
            return load_private_key((folder / "rootCA.key").read_text())
        return load_private_key(json.loads((folder / "cert.json").read_text())["root_pri_key"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise JobError(
            f"{folder}: no key of a certificate authority. It is in the folder 'state' beside the kits, or "
            "where 'nvflare cert init' wrote it."
        ) from None


def verify_kit(kit: Path) -> None:
    """Compare a kit with what was signed, and look for strays in all of it.

    The kit's ``startup`` and ``local`` may be links (FLARE's ``NVFL_WORKSPACE`` makes them so); below them
    and outside the site's own files and folders, links are refused.

    Args:
        kit: Folder with ``startup`` and ``local``.

    Raises:
        JobError: It is not as it was signed (KIT_CHANGED). The message lists what is changed, missing and not
            listed, for the people of the site.
    """
    try:
        expected, signature = _read_list(kit / SIGNATURE_FILE)
    except FileNotFoundError:
        raise _changed(kit, [f"missing: {SIGNATURE_FILE}"]) from None
    except (OSError, ValueError):
        raise _changed(kit, [f"changed: {SIGNATURE_FILE}"]) from None
    if signature is None:
        raise _changed(kit, [f"not signed yet: {SIGNATURE_FILE}"])
    certificate = next((path for made_by, path in _CERTIFICATES.items() if (kit / made_by).exists()), None)
    if certificate is None:
        raise _changed(kit, [f"missing: {' or '.join(_CERTIFICATES)}"])
    try:
        authority = load_crt_bytes(_read_plain(kit / ROOT_CERTIFICATE)).public_key()
        verify_content(_signed(expected), signature, authority)
    except Exception:  # what a damaged certificate or signature raises has no common type
        raise _changed(kit, [f"not signed by {ROOT_CERTIFICATE}: {SIGNATURE_FILE}"]) from None
    problems = [f"not a path of a kit: {path!r}" for path in expected if not _is_path(path)]
    if len({path.casefold() for path in expected}) < len(expected):
        problems.append("two paths that differ in capitals only")
    found, others = _hash_files(kit)
    problems += others
    problems += [f"could be run: {path}" for path in _strays(kit)]
    problems += [f"changed: {path}" for path in found if path in expected and found[path] != expected[path]]
    problems += [f"missing: {path}" for path in expected if path not in found]
    problems += [f"not signed: {path}" for path in found if path not in expected]
    if not problems:
        problems = _certificate_problems(kit, certificate, authority)
    if problems:
        raise _changed(kit, problems)


def running_kit(workspace: Workspace) -> Path | None:
    """Return the kit of a running FLARE process; None in FLARE's simulator, which has none.

    The ``startup`` folder of the simulator's workspaces is empty. A workspace with anything in that folder is
    a kit, with or without a signature. (A client whose ``startup`` was emptied starts no job: FLARE reads it
    in each job's process.)

    Args:
        workspace: FLARE's own, as from ``fl_ctx.get_engine().get_workspace()``.
    """
    kit = Path(workspace.get_site_config_dir()).parent
    startup = kit / "startup"
    is_kit = os.path.lexists(startup) and (not startup.is_dir() or any(startup.iterdir()))
    return kit if is_kit else None


def check_running_kit(workspace: Workspace) -> None:
    """Compare the kit of a running FLARE process with what was signed; without a kit do nothing.

    Raises:
        JobError: It is a kit, and not as it was signed (KIT_CHANGED).
    """
    kit = running_kit(workspace)
    if kit is not None:
        verify_kit(kit)


def participant_of(kit: Path) -> str:
    """Return whose kit it is: the name in its certificate, which is what the others know it by.

    Raises:
        JobError: It has none (KIT_CHANGED).
    """
    path = next((path for made_by, path in _CERTIFICATES.items() if (kit / made_by).exists()), None)
    try:
        subject = load_crt_bytes(_read_plain(kit / path)).subject if path else []
        (name,) = (str(each.value) for each in subject if each.oid == NameOID.COMMON_NAME)
    except (OSError, ValueError):
        raise _changed(kit, ["not a certificate of a participant"]) from None
    return name


def site_around(site: Path) -> str | None:
    """Return the name of the hospital whose kit a site's file is in; None if it is in no client's kit.

    Raises:
        JobError: The kit has no certificate (KIT_CHANGED).
    """
    kit = kit_of(site)
    return participant_of(kit) if kit is not None and (kit / CLIENT_FILE).exists() else None


def is_own(path: str) -> bool:
    """Return whether a path, as in the list, is the site's own: neither signed nor looked at."""
    folder, _, rest = path.partition("/")
    if folder != "local":
        return False
    top, below, _ = rest.partition("/")
    return top in OWN_FOLDERS or (not below and any(fnmatchcase(top, pattern) for pattern in OWN_FILES))


def _hash_files(kit: Path) -> tuple[dict[str, str], list[str]]:
    """Return path → SHA-256 of a kit's plain files but its own and the list, and what else is there."""
    files: dict[str, str] = {}
    problems: list[str] = []
    for folder in FOLDERS:
        for path, entry in _entries(kit / folder, folder, problems):
            if path == SIGNATURE_FILE or is_own(path):
                continue
            try:
                if entry.is_symlink():
                    problems.append(f"a link: {path}")
                elif entry.is_file(follow_symlinks=False):
                    with open(_open_plain(entry.path), "rb") as file:
                        files[path] = hashlib.file_digest(file, "sha256").hexdigest()
                elif not entry.is_dir(follow_symlinks=False):
                    problems.append(f"not a plain file: {path}")
            except OSError:
                problems.append(f"cannot be read: {path}")
    return dict(sorted(files.items())), problems


def _entries(folder: Path, name: str, problems: list[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield all that is in a folder and below it, but below the site's own folders."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError:
        problems.append(f"cannot be read: {name}")
        return
    for entry in entries:
        path = f"{name}/{entry.name}"
        yield path, entry
        if entry.is_dir(follow_symlinks=False) and not is_own(path):
            yield from _entries(Path(entry.path), path, problems)


def is_stray(path: str) -> bool:
    """Return whether Python or FLARE could take a file for its own that nobody has signed.

    FLARE looks for its ``resources`` anywhere below ``local``, before its loaders are closed.
    """
    name = path.rpartition("/")[2].casefold()
    return name.endswith(CODE) or (path.startswith("local/") and name.partition(".")[0] == "resources")


def _strays(kit: Path) -> Iterator[str]:
    """Yield what is stray in a kit, but for the files that are signed or refused anyhow.

    A folder that goes away meanwhile is a job's that has ended; one that may not be read cannot be imported
    from.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(kit / folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}".lstrip("/")
            signed = path.partition("/")[0] in FOLDERS and not is_own(path)
            if not signed and is_stray(path):
                yield path
            elif path in FOLDERS or entry.is_dir(follow_symlinks=False):
                folders.append(path)


def _read_list(path: Path) -> tuple[dict[str, str], str | None]:
    """Return the files of a list, and its signature if it has one; nothing of it is verified.

    Raises:
        OSError: It cannot be read. ValueError: It is no list.
    """
    try:
        content = json.loads(_read_plain(path), object_pairs_hook=take_once)
        files, signature = content["files"], content.get("signature")
        known = content["format"] == _FORMAT and set(content) <= {"format", "files", "signature"}
    except (LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError("no list") from None
    texts = [*files.values()] if isinstance(files, dict) else [None]
    if not known or not isinstance(signature, str | None) or not all(isinstance(each, str) for each in texts):
        raise ValueError("no list")
    return files, signature


def _signed(files: dict[str, str]) -> bytes:
    return _PURPOSE + json.dumps(files, sort_keys=True, separators=(",", ":")).encode()


def _is_path(path: str) -> bool:
    """Return whether a path is one of a file that a kit can have, spelt in the only way there is."""
    folder, *rest = path.split("/")
    return (
        folder in FOLDERS
        and rest != []
        and all(part not in ("", ".", "..") for part in rest)
        and path.isprintable()
        and "\\" not in path
        and path != SIGNATURE_FILE
        and not is_own(path)
    )


def _certificate_problems(kit: Path, path: str, authority: Any) -> list[str]:
    """Return what is wrong with the certificates: one of another authority could not connect."""
    try:
        verify_cert(load_crt_bytes(_read_plain(kit / path)), authority)
    except Exception:  # as above
        return [f"not of the authority of {ROOT_CERTIFICATE}: {path}"]
    return []


def _open_plain(path: str | Path) -> int:
    """Open a plain file, and nothing that waits for a writer or leads elsewhere."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a plain file")
    return descriptor


def _read_plain(path: Path) -> bytes:
    with open(_open_plain(path), "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise OSError("too large")
    return content


def _changed(kit: Path, problems: list[str]) -> JobError:
    more = len(problems) - _MOST_LISTED
    listed = list_lines(problems[:_MOST_LISTED])
    listed += f"\n  and {more} more" if more > 0 else ""
    return JobError(
        f"{kit}: this startup kit is not as it was signed:{listed}\n"
        "Take back what was changed, or ask the consortium's lead for the kit, or to sign this one.",
        reason="KIT_CHANGED",
    )

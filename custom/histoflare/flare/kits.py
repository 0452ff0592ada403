"""Startup kits for one workstation, made by FLARE from the builders that make production's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from histoflare.errors import HistoflareError
from histoflare.flare import processes
from histoflare.flare.kit_signature import read_authority, sign_kit
from histoflare.flare.provision import check_names, project_with_absolute_paths, read_agreed_protocol
from histoflare.flare.site_keys import fingerprint, read_certificate
from histoflare.privacy.own_policy import OWN_POLICY_FILE
from histoflare.privacy.own_policy_edit import pin_sites
from histoflare.privacy.policy import POLICIES
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.ledgers import on_workstation
from histoflare.site.site_file import SITE_FILE, SITES_VARIABLE, write_site_file
from histoflare.storage import real_path, write_text

SERVER = "server"
LEAD = "lead@consortium.example"
PROJECT = "histoflare"
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""FLARE's, within the 64 letters that a certificate has for a name (RFC 5280, ub-common-name)."""

PROJECT_FILE = "project.yml"
KITS_FOLDER = "kits"
MADE_HERE = "# Made by histoflare for one workstation, and made anew with every start.\n"
SCHEME = "tcp"
"""With TLS both ways. FLARE's default, a websocket, drops messages above 4 MiB: a job with a model in it."""

PREPARE_SECONDS = 120.0


@dataclass(frozen=True)
class Agreement:
    """What the sites of a federation have agreed to, and with which builders their kits are made.

    Attributes:
        protocol: A job's folder, or a JSON file.
        more: Further ones that the sites agree to.
        policies, default_scope: The sites' policies.
        project: A project file whose builders and administrators are used instead of all of the above.
    """

    protocol: Path
    policies: tuple[Path, ...] = tuple(sorted(POLICIES.glob("*.toml")))
    default_scope: str = "open"
    project: Path | None = None
    more: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Kits:
    """The kits of a federation on this machine.

    Attributes:
        name: The federation's; unique, and in the environment of each of its processes.
        folder: One startup kit per participant.
        server, lead: Names of the server and of the project's administrator; ``sites``: of the sites.
        port: The server's TCP port.
        protocol: The job, or the file, whose protocol the sites agreed to.
    """

    name: str
    folder: str
    server: str
    lead: str
    sites: tuple[str, ...]
    port: int
    protocol: str = ""

    def kit(self, participant: str) -> Path:
        """Return a participant's kit."""
        return Path(self.folder) / participant

    def sign(self, participant: str) -> None:
        """Sign a participant's kit anew after a change: no process starts with one that was changed.

        On one workstation only: the key of the federation's authority is beside the kits here.
        """
        sign_kit(self.kit(participant), read_authority(Path(self.folder).parent / "state"))


def make_kits(workspace: Path, sites: Mapping[str, SiteConfiguration], agreement: Agreement) -> Kits:
    """Make a kit for the server, its administrator and each site, with a free port for the server.

    Args:
        workspace: Gets ``project.yml``, ``home`` (which FLARE takes for the user's) and ``kits``.
        sites: Site → its own settings, written into its kit. Each gets a ledger if it has none.
        agreement: What they agreed to.

    Raises:
        HistoflareError: FLARE cannot make them (FEDERATION_FAILED), or a site's ledger cannot be made.
    """
    port = processes.free_port()
    content, server, lead = plan_project(workspace, sites, agreement, port)
    place = workspace / KITS_FOLDER
    write_text(workspace / PROJECT_FILE, MADE_HERE + yaml.safe_dump(content, sort_keys=False))
    _run_flare(workspace, place)
    folder = place / content["name"] / "prod_00"
    kits = Kits(
        uuid.uuid4().hex,
        str(folder),
        server,
        lead,
        tuple(sorted(sites)),
        port,
        str(agreement.protocol.resolve()),
    )
    missing = [who for who in (server, lead, *sites) if not (kits.kit(who) / "startup").is_dir()]
    if missing:
        raise HistoflareError(f"FLARE made no kit for {', '.join(missing)}.", reason="FEDERATION_FAILED")
    # FLARE's own for one workstation: it puts the job store elsewhere, and nobody has signed it.
    (kits.kit(server) / "local" / "resources.json").unlink(missing_ok=True)
    for site, configuration in sites.items():
        write_site_file(kits.kit(site) / "local" / SITE_FILE, on_workstation(site, _absolute(configuration)))
    _pin(kits)
    return kits


def _pin(kits: Kits) -> None:
    """Have each site know the others' certificates, as stewards do who have told each other."""
    pins = {site: fingerprint(read_certificate(kits.kit(site))) for site in kits.sites}
    for site in kits.sites:
        local = kits.kit(site) / "local"
        if (local / OWN_POLICY_FILE).is_file():
            pin_sites(local, {other: pin for other, pin in pins.items() if other != site})


def plan_project(
    workspace: Path, sites: Mapping[str, SiteConfiguration], agreement: Agreement, port: int
) -> tuple[dict[str, Any], str, str]:
    """Return the project file's content, and the names of its server and administrator. Writes nothing.

    Raises:
        HistoflareError: The agreement or a site's name cannot be used, or the workspace has a project file
            of somebody else's.
    """
    project_file = workspace / PROJECT_FILE
    if project_file.is_file() and not project_file.read_bytes().startswith(MADE_HERE.encode()):
        raise HistoflareError(
            f"{project_file}: not made by this command; give another --workspace.", reason="FEDERATION_FAILED"
        )
    if "\\" in str(workspace):
        raise HistoflareError(
            f"{workspace}: FLARE loses the results of a job in a path with a '\\'; give another folder.",
            reason="FEDERATION_FAILED",
        )
    for agreed in (agreement.protocol, *agreement.more):
        read_agreed_protocol(agreed)
    content = _project(agreement)
    _of_one_workstation(content)
    try:
        server, lead = _cast(content, sorted(sites), port)
    except (KeyError, TypeError, StopIteration):
        raise HistoflareError(
            f"{agreement.project}: needs a participant of type server and an admin with the role "
            "project_admin.",
            reason="FEDERATION_FAILED",
        ) from None
    wrong = [site for site in sites if not SITE_NAME.fullmatch(site) or site == server]
    if wrong:
        raise HistoflareError(
            f"{', '.join(map(repr, wrong))}: a site's name has up to 64 letters, digits, '-' and '_', and is "
            f"not '{server}'.",
            reason="FEDERATION_FAILED",
        )
    check_names([(part["name"], part.get("org") or "") for part in content["participants"]])
    return content, server, lead


def _of_one_workstation(content: dict[str, Any]) -> None:
    """Make the server listen on the loopback; written to the project, as signed kits cannot be changed."""
    for builder in content["builders"]:
        if builder["path"].endswith(".SitePolicyBuilder"):
            builder["args"]["loopback"] = True


def _project(agreement: Agreement) -> dict[str, Any]:
    """Return a project without clients; its builders are those of ``provisioning/project.yml``."""
    if agreement.project is not None:
        return project_with_absolute_paths(agreement.project)
    policy = {
        "policies": [str(real_path(path)) for path in agreement.policies],
        "default_scope": agreement.default_scope,
        "protocol": [str(real_path(path)) for path in (agreement.protocol, *agreement.more)],
    }
    flare = "nvflare.lighter.impl"
    return {
        "api_version": 3,
        "name": PROJECT,
        "description": "One workstation",
        "participants": [
            {"name": SERVER, "type": "server", "org": "consortium"},
            {"name": LEAD, "type": "admin", "org": "consortium", "role": "project_admin"},
        ],
        "builders": [
            {"path": f"{flare}.workspace.WorkspaceBuilder"},
            {"path": "histoflare.flare.provision.SitePolicyBuilder", "args": policy},
            {
                "path": f"{flare}.static_file.StaticFileBuilder",
                "args": {"config_folder": "config", "scheme": SCHEME},
            },
            {"path": f"{flare}.cert.CertBuilder"},
            {"path": f"{flare}.signature.SignatureBuilder"},
        ],
    }


def _cast(content: dict[str, Any], sites: Sequence[str], port: int) -> tuple[str, str]:
    """Give a project these sites and this port; return the names of its server and of its project's admin."""
    others = [part for part in content["participants"] if part["type"] != "client"]
    server = next(part for part in others if part["type"] == "server")
    server |= {"fed_learn_port": port, "admin_port": port}
    lead = next(part for part in others if part.get("role") == "project_admin")
    clients = [{"name": site, "type": "client", "org": _organisation(site)} for site in sites]
    content["participants"] = [*others, *clients]
    return server["name"], lead["name"]


def _organisation(site: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in site)


def _run_flare(workspace: Path, place: Path) -> None:
    project_file = workspace / PROJECT_FILE
    home = workspace / "home"
    home.mkdir(exist_ok=True)
    environment = kit_environment() | {"HOME": str(home), "NVFLARE_POC_WORKSPACE": str(place)}
    environment.pop("NVFLARE_HOME", None)
    command = [
        sys.executable,
        "-P",
        "-m",
        "nvflare.cli",
        "poc",
        "prepare",
        "-i",
        str(project_file),
        "--force",
    ]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            cwd=workspace,
            timeout=PREPARE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise HistoflareError(
            f"FLARE made no kits in {PREPARE_SECONDS:.0f} s.", reason="FEDERATION_FAILED"
        ) from None
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise HistoflareError(f"FLARE cannot make the kits:\n{last}", reason="FEDERATION_FAILED")


def kit_environment() -> dict[str, str]:
    """Return the environment of a kit's process: this Python first, one thread, no other site's settings."""
    environment = dict(os.environ)
    for name in (SITES_VARIABLE, processes.FEDERATION_VARIABLE, "NVFL_WORKSPACE", "NVFL_JOB_STORE_ROOT"):
        environment.pop(name, None)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment["OMP_NUM_THREADS"] = "1"
    return environment


def _absolute(configuration: SiteConfiguration) -> SiteConfiguration:
    """Return a configuration with full paths: a kit's relative ones would start at its ``local`` folder."""
    weights = configuration.encoder_weights
    return replace(
        configuration,
        files={key: real_path(path) for key, path in configuration.files.items()},
        records=real_path(configuration.records),
        ledger=configuration.ledger and real_path(configuration.ledger),
        ledger_key=configuration.ledger_key and real_path(configuration.ledger_key),
        encoder_weights=weights and real_path(weights),
    )

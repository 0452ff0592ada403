"""What histoflare adds to FLARE's startup kits: each site's policy, no more rights than needed, a signature.

FLARE reads ``local/<file>`` if there is one, else ``local/<file>.default``. This builder changes the
``.default`` files in place, so that a steward who deletes a file of his own falls back to these and not to
FLARE's wider defaults.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from nvflare.apis.fl_constant import AdminCommandNames
from nvflare.lighter.constants import CtxKey, ProvFileName
from nvflare.lighter.entity import Participant
from nvflare.lighter.spec import Builder, Project, ProvisionContext

from histoflare.errors import JobError
from histoflare.flare.allowed import ALLOWED_CLASSES
from histoflare.flare.job_files import CONFIG_FOLDER, read_tables, read_toml
from histoflare.flare.job_schema import complete
from histoflare.flare.kit_check import CHECK_FILE, check_configuration
from histoflare.flare.kit_scripts import change_admin_script, change_start_scripts, keep_files_private
from histoflare.flare.kit_signature import SIGNATURE_FILE, list_kit, sign_kit
from histoflare.flare.processes import LOOPBACK
from histoflare.flare.server_storage import JOBS_FOLDER, SNAPSHOTS_FOLDER
from histoflare.flare.site_policy import PRIVACY_FILE, policy_file, privacy_configuration, write_first_policy
from histoflare.privacy.policy import read_policy
from histoflare.privacy.protocol import PROTOCOL_FILE, write_protocols
from histoflare.shipped import JOBS, job_names
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.kinds import BAGS
from histoflare.site.site_file import SITE_FILE, entries, make_configuration, write_site_file
from histoflare.storage import real_path, write_json, write_text

SITE_PROPERTY = "histoflare"
"""A client's property in ``project.yml``: what its ``histoflare.toml`` says."""

PROJECT_OPTIONS = ("-p", "--project-file", "--project_file", "-i", "--project-input", "--project_input")
"""The options with which ``nvflare provision`` and ``nvflare poc prepare`` are told of a project file."""

TRUST = {"untrusted": "dp-patient", "trusted": "trusted-server"}
"""How far the sites trust the server → the scope of a job that names none."""

HEART_BEAT_TIMEOUT = 600
"""Seconds, as FLARE has it."""

MOST_NAME = 64
"""Letters of a name in a certificate (RFC 5280: ub-common-name, ub-organization-name)."""

_CATEGORIES = ("submit_job", "clone_job", "manage_job", "download_job", "view", "operate", "shell_commands")


class SitePolicyBuilder(Builder):
    """Puts policies, protocol and site file into every client's kit; limits jobs and admins; signs the kits.

    List it directly after WorkspaceBuilder: FLARE finalizes in reverse order. This one changes what
    StaticFileBuilder wrote, and what a builder adds after it is not signed.

    Where the consortium's key is not (``nvflare package``, at a hospital) it leaves the list of the kit's
    files unsigned, and says so. With such a kit no client starts.

    Args:
        policies: Policy files, one per scope.
        protocol: The agreed protocol: the name of a job that comes with the package, a job's folder, or a
            JSON file; or a list of them.
        trust: ``untrusted`` or ``trusted``: whether the sites trust the server with updates that have no
            noise in them. It picks the scope of a job that names none (:data:`TRUST`).
        default_scope: That scope, in place of what ``trust`` picks; one of the policies'. Where there is one
            policy only, it is that one's.
        heart_beat_timeout: Seconds after which the server gives up a site that says nothing.
        loopback: Whether the server listens on this machine's own address only. For one workstation.

    Relative paths start at the folder of the project file that the command line names, else at the current
    one. A client's property ``histoflare`` (keys as in ``histoflare.toml``) fills in its site file; what it
    does not say of manifest and bags is left to the site's steward.

    Raises:
        JobError: A policy or the protocol is missing or unusable.
    """

    def __init__(
        self,
        policies: Sequence[str],
        protocol: str | Sequence[str],
        trust: str = "untrusted",
        default_scope: str | None = None,
        heart_beat_timeout: int = HEART_BEAT_TIMEOUT,
        loopback: bool = False,
    ) -> None:
        folder = project_folder(sys.argv)
        self.policies = {}
        for entry in policies:
            path = folder / entry
            self.policies[read_policy(path).name] = path
        if trust not in TRUST:
            raise JobError(
                f"trust must be one of {', '.join(TRUST)}, not {trust!r}.", reason="POLICY_INVALID"
            )
        if default_scope is None:
            default_scope = next(iter(self.policies)) if len(self.policies) == 1 else TRUST[trust]
        if default_scope not in self.policies:
            raise JobError(
                f"default_scope '{default_scope}' is none of the policies: {', '.join(self.policies)}.",
                reason="POLICY_INVALID",
            )
        self.default_scope = default_scope
        agreed = [protocol] if isinstance(protocol, str) else protocol
        self.protocols = [read_agreed_protocol(find_agreed(folder, entry)) for entry in agreed]
        if type(heart_beat_timeout) is not int or heart_beat_timeout < 1:
            raise JobError(
                f"heart_beat_timeout must be whole seconds, at least 1, not {heart_beat_timeout!r}."
            )
        self.heart_beat_timeout = heart_beat_timeout
        self.loopback = loopback

    def initialize(self, project: Project, ctx: ProvisionContext) -> None:
        """Check the names, and close the folder of the consortium's private key before there is a key."""
        try:
            check_names([(each.name, each.org) for each in project.get_all_participants()])
        except JobError as error:
            raise SystemExit(str(error)) from None  # FLARE would show where in its code it is raised
        _keep_authority_private(Path(ctx.get_state_dir()))

    def finalize(self, project: Project, ctx: ProvisionContext) -> None:
        """Change the kits, once all other builders wrote theirs."""
        _keep_authority_private(Path(ctx.get_state_dir()))
        for client in project.get_clients():
            local = Path(ctx.get_local_dir(client))
            self._write_policy(local)
            write_first_policy(local)
            _write_site_file(local / SITE_FILE, client)
            _limit_jobs(local)
            _limit_admins(local, at_site=True)
            _close_commands(local)
            _start_jobs_anywhere(local, "ClientLauncher")
            _close_loaders(local)
        server = project.get_server()
        local = Path(ctx.get_local_dir(server))
        _limit_jobs(local)
        _limit_admins(local, at_site=False)
        _keep_jobs_in_kit(local)
        _start_jobs_anywhere(local, "ServerLauncher")
        _close_loaders(local)
        with _changed(local / ProvFileName.RESOURCES_JSON_DEFAULT) as resources:
            resources["servers"][0]["heart_beat_timeout"] = self.heart_beat_timeout
        if self.loopback:
            _listen_on_loopback(Path(ctx.get_kit_dir(server)))
        for client in project.get_clients():
            keep_files_private(Path(ctx.get_kit_dir(client)))
        for admin in project.get_admins():
            change_admin_script(Path(ctx.get_kit_dir(admin)))
        for participant in (server, *project.get_clients()):
            kit = Path(ctx.get_ws_dir(participant))
            if any((kit / "startup").glob("*.crt")):  # 'nvflare package' has an empty one for the server
                if not change_start_scripts(kit / "startup"):
                    ctx.warning(f"{kit.name}: memory may grow over rounds of large updates.")
                _sign(kit, ctx)

    def _write_policy(self, local: Path) -> None:
        for scope, source in self.policies.items():
            shutil.copyfile(source, local / policy_file(scope))
        write_json(local / PRIVACY_FILE, privacy_configuration(list(self.policies), self.default_scope))
        write_protocols(local / PROTOCOL_FILE, self.protocols)
        (local / ProvFileName.PRIVACY_JSON_SAMPLE).unlink(missing_ok=True)


def check_names(participants: Sequence[tuple[str, str]]) -> None:
    """Refuse names that no certificate can have, or that differ in capitals only.

    Args:
        participants: Name and organization of each.

    Raises:
        JobError: Some are too long, or two are the same.
    """
    names = [name for name, _ in participants]
    long = [text for pair in participants for text in pair if len(text) > MOST_NAME]
    if long:
        raise JobError(
            f"{', '.join(long)}: a certificate has up to {MOST_NAME} letters for a participant's name, and "
            "for its org."
        )
    if len({name.casefold() for name in names}) < len(names):
        twice = [name for name in names if sum(name.casefold() == other.casefold() for other in names) > 1]
        raise JobError(
            f"{', '.join(twice)}: names of participants that are the same but for capitals; where these do "
            "not count (Windows, macOS) they share a folder."
        )


def _keep_authority_private(state: Path) -> None:
    """Let only this user read the authority's private key; FLARE writes it as the umask says."""
    if state.is_dir():
        state.chmod(0o700)
        for path in state.iterdir():
            path.chmod(0o600)


def project_folder(arguments: Sequence[str]) -> Path:
    """Return the folder of the project file that a command line names, else the current folder."""
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in PROJECT_OPTIONS:
            value = value if equals else "".join(arguments[index + 1 : index + 2])
            return real_path(Path(value)).parent
    return Path.cwd()


def project_with_absolute_paths(path: Path) -> dict[str, Any]:
    """Return a project file's content, with the paths of :class:`SitePolicyBuilder` made absolute.

    Raises:
        JobError: It is no project file, or has no SitePolicyBuilder.
    """
    try:
        content: dict[str, Any] = yaml.safe_load(path.read_text())
        builder = next(part for part in content["builders"] if part["path"].endswith(".SitePolicyBuilder"))
        arguments = builder["args"]
        folder = real_path(path).parent
        arguments["policies"] = [str(folder / policy) for policy in arguments["policies"]]
        agreed = arguments["protocol"]
        agreed = [agreed] if isinstance(agreed, str) else agreed
        arguments["protocol"] = [str(find_agreed(folder, entry)) for entry in agreed]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError, StopIteration):
        raise JobError(
            f"{path}: not a project file with a SitePolicyBuilder; provisioning/project.yml is one."
        ) from None
    return content


def find_agreed(folder: Path, entry: str) -> Path:
    """Return where an agreed protocol is: below ``folder``, else in the job of that name of the package."""
    place = folder / entry
    return JOBS / entry if entry in job_names() and not place.exists() else place


def read_agreed_protocol(path: Path) -> dict[str, Any]:
    """Return the protocol of a job folder, of a ``protocol.toml``, or of a JSON file.

    Raises:
        JobError: There is none, or it is not a protocol.
    """
    if path.is_dir():
        if not (path / CONFIG_FOLDER).is_dir():
            raise JobError(f"{path}: not a job folder (it has no {CONFIG_FOLDER}).")
        _, protocol = read_tables(path / CONFIG_FOLDER)
    elif path.suffix == ".toml" and path.is_file():
        protocol = read_toml(str(path), path.read_bytes())
    else:
        try:
            protocol = json.loads(path.read_bytes())
        except OSError:
            raise JobError(
                f"{path}: not found; 'protocol' names a job's folder or a JSON file.",
                reason="PROTOCOL_MISSING",
            ) from None
        except ValueError as error:
            raise JobError(f"{path}: not JSON: {error}", reason="PROTOCOL_INVALID") from None
    if not isinstance(protocol, dict):
        raise JobError(f"{path}: has no protocol.", reason="PROTOCOL_MISSING")
    return complete(protocol)


def _write_site_file(path: Path, client: Participant) -> None:
    """Write a client's site file; what its steward has to say stands there as a comment."""
    settings = client.get_prop(SITE_PROPERTY, {})
    write_site_file(path, site_configuration(client.name, settings))
    unsaid = tuple(f"{name} = " for name in BAGS.keys if name not in settings)
    lines = path.read_text().splitlines(keepends=True)
    write_text(path, "".join(f"# {line}" if line.startswith(unsaid) else line for line in lines))


def site_configuration(site: str, settings: Any) -> SiteConfiguration:
    """Return what a client's property says of its site file.

    Raises:
        JobError: The property is not a mapping, or has a key that no site file has.
    """
    known = [name for name in entries() if name != "workstation"]
    if not isinstance(settings, Mapping) or set(settings) - set(known):
        raise JobError(
            f"{site}: the property '{SITE_PROPERTY}' takes the entries of a site file: {', '.join(known)}.",
            reason="SITE_NOT_CONFIGURED",
        )
    whole = {"manifest": BAGS.manifest, "bags": "bags", "records": "records"}
    return make_configuration(whole | {name: value for name, value in settings.items() if value != ""})


def _limit_jobs(local: Path) -> None:
    """Let a job name only this package's own classes, and let no log be sent."""
    with _changed(local / ProvFileName.RESOURCES_JSON_DEFAULT) as resources:
        resources["class_list_enforcement_mode"] = "enforce"
        resources["class_allow_list"] = list(ALLOWED_CLASSES)
        if "client" in resources:
            resources["allow_log_streaming"] = False


def _limit_admins(local: Path, at_site: bool) -> None:
    """Forbid that a job brings code, and that anybody reads a site's files over FLARE.

    FLARE's default lets ``project_admin`` do all of it, also read any text file of a site's kit.
    """
    with _changed(local / ProvFileName.AUTHORIZATION_JSON_DEFAULT) as authorization:
        permissions = authorization["permissions"]
        permissions["project_admin"] = dict.fromkeys(_CATEGORIES, "any")
        for role, rights in permissions.items():
            if role == "member":
                continue
            rights["byoc"] = "none"
            rights["server-predeployed-flwr"] = "none"
            if at_site:
                rights["shell_commands"] = "none"
            elif role in ("project_admin", "lead"):
                # FLARE's tools send them there. It is the server's own log, which a download has too.
                rights[AdminCommandNames.GET_JOB_LOG] = rights["download_job"]


def _close_commands(local: Path) -> None:
    """Close the client's commands in the client itself: FLARE's rights are checked by the server alone."""
    with _changed(local / ProvFileName.RESOURCES_JSON_DEFAULT) as resources:
        resources["components"].append(
            {
                "id": "histoflare_commands",
                "path": "histoflare.flare.closed_commands.ClosedCommands",
                "args": {},
            }
        )


def _close_loaders(local: Path) -> None:
    """Put the component that closes FLARE's loaders first: FLARE builds components in order, also in jobs."""
    with _changed(local / ProvFileName.RESOURCES_JSON_DEFAULT) as resources:
        resources["components"].insert(
            0,
            {"id": "histoflare_loaders", "path": "histoflare.flare.loaders.ClosedLoaders", "args": {}},
        )


def _start_jobs_anywhere(local: Path, launcher: str) -> None:
    """Use a launcher that works in any folder: FLARE's own splits paths at blanks."""
    with _changed(local / ProvFileName.RESOURCES_JSON_DEFAULT) as resources:
        part = next(part for part in resources["components"] if part["id"] == "process_launcher")
        part["path"] = f"histoflare.flare.launcher.{launcher}"


def _listen_on_loopback(startup: Path) -> None:
    """Make the server listen on the loopback alone: by default FLARE listens on every address."""
    with _changed(startup / ProvFileName.FED_SERVER_JSON) as content:
        service = content["servers"][0]["service"]
        service["target"] = f"{LOOPBACK}:{service['target'].rpartition(':')[2]}"


def _sign(kit: Path, ctx: ProvisionContext) -> None:
    """Sign a kit, or list its files if the key to sign with is elsewhere."""
    write_json(kit / "startup" / CHECK_FILE, check_configuration())
    key = ctx.get(CtxKey.ROOT_PRI_KEY)
    if key is not None:
        sign_kit(kit, key)
        return
    list_kit(kit)
    ctx.warning(
        f"{kit.name}: this kit is not signed, the consortium's key is not here. Nothing starts with it until "
        f"the lead has signed {SIGNATURE_FILE}."
    )


def _keep_jobs_in_kit(local: Path) -> None:
    with _changed(local / ProvFileName.RESOURCES_JSON_DEFAULT) as resources:
        storage = resources["snapshot_persistor"]["args"]["storage"]
        storage["path"] = "histoflare.flare.server_storage.KitStorage"
        storage["args"]["root_dir"] = SNAPSHOTS_FOLDER
        manager = next(part for part in resources["components"] if part["id"] == "job_manager")
        manager["path"] = "histoflare.flare.server_storage.KitJobs"
        manager["args"]["uri_root"] = JOBS_FOLDER


@contextmanager
def _changed(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a JSON file's content to change, and write it back."""
    content: dict[str, Any] = json.loads(path.read_text())
    yield content
    write_json(path, content)

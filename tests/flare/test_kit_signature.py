"""A kit is as it was signed, or it is refused."""

from __future__ import annotations

import json
import os
import shutil
import time
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nvflare.apis.workspace import Workspace
from nvflare.lighter.utils import (
    Identity,
    generate_cert,
    generate_keys,
    serialize_cert,
    serialize_pri_key,
    sign_content,
)

from histoflare.errors import JobError
from histoflare.flare.kit_check import KitCheck, require_signed_kit, require_usable_folder
from histoflare.flare.kit_signature import (
    SIGNATURE_FILE,
    check_running_kit,
    is_own,
    list_kit,
    read_authority,
    sign_kit,
    sign_list,
    verify_kit,
)
from tests.refusals import raises_reason

SIGNED = (
    "local/authorization.json.default",
    "local/custom/model.py",
    "local/policy_open.toml",
    "local/privacy.json",
    "local/protocol.json",
    "local/resources.json.default",
    "startup/client.crt",
    "startup/client.key",
    "startup/fed_client.json",
    "startup/rootCA.pem",
    "startup/start.sh",
    "startup/sub_start.sh",
)


class Authority:
    """A certificate authority, and what it gives a client."""

    def __init__(self, name: str) -> None:
        self.key, public = generate_keys()
        issuer = Identity(name)
        self.root = serialize_cert(generate_cert(issuer, issuer, self.key, public, ca=True))
        client_key, client_public = generate_keys()
        self.client = serialize_cert(generate_cert(Identity("clinic"), issuer, self.key, client_public))
        self.client_key = serialize_pri_key(client_key)

    def write_kit(self, kit: Path) -> Path:
        files = {path: f"what {path} says\n".encode() for path in SIGNED}
        files |= {"startup/rootCA.pem": self.root, "startup/client.crt": self.client}
        files |= {"startup/client.key": self.client_key, "local/histoflare.toml": b"# manifest =\n"}
        for path, content in files.items():
            (kit / path).parent.mkdir(parents=True, exist_ok=True)
            (kit / path).write_bytes(content)
        sign_kit(kit, self.key)
        return kit


@pytest.fixture(scope="module")
def ours() -> Authority:
    return Authority("consortium")


@pytest.fixture(scope="module")
def theirs() -> Authority:
    return Authority("somebody")


@pytest.fixture
def kit(tmp_path: Path, ours: Authority) -> Path:
    return ours.write_kit(tmp_path / "clinic")


def refusal(kit: Path) -> str:
    """Return what the refusal of a kit says."""
    with pytest.raises(JobError) as caught:
        verify_kit(kit)
    assert caught.value.reason == "KIT_CHANGED"
    return str(caught.value)


def edit_list(kit: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((kit / SIGNATURE_FILE).read_text())
    change(content)
    (kit / SIGNATURE_FILE).write_text(json.dumps(content))


def test_a_kit_as_it_was_signed(kit: Path) -> None:
    verify_kit(kit)
    assert set(json.loads((kit / SIGNATURE_FILE).read_text())["files"]) == set(SIGNED)


@pytest.mark.parametrize("path", SIGNED)
def test_one_byte_more(kit: Path, path: str) -> None:
    with (kit / path).open("ab") as file:
        file.write(b"\n")
    assert f"changed: {path}" in refusal(kit)


@pytest.mark.parametrize("path", SIGNED)
def test_a_file_less(kit: Path, path: str) -> None:
    (kit / path).unlink()
    says = {"startup/rootCA.pem": "not signed by startup/rootCA.pem"}  # it could not be verified
    assert says.get(path, f"missing: {path}") in refusal(kit)


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_byte_of_any_file_counts(kit: Path, data: st.DataObject) -> None:
    path = kit / data.draw(st.sampled_from([*SIGNED, SIGNATURE_FILE]))
    content = path.read_bytes()
    index = data.draw(st.integers(0, len(content) - 1))
    other = bytes([data.draw(st.integers(0, 255).filter(lambda byte: byte != content[index]))])
    changed = content[:index] + other + content[index + 1 :]
    if path == kit / SIGNATURE_FILE and _says_the_same(changed, content):
        return
    path.write_bytes(changed)
    try:
        refusal(kit)
    finally:
        path.write_bytes(content)


def _says_the_same(one: bytes, other: bytes) -> bool:
    """White space between the list's entries is not signed, nor how base64 fills its last byte."""
    try:
        read, expected = json.loads(one), json.loads(other)
        signatures = [b64decode(content.pop("signature")) for content in (read, expected)]
    except (ValueError, LookupError):
        return False
    return bool(read == expected) and signatures[0] == signatures[1]


@pytest.mark.parametrize(
    "path",
    [
        "local/resources.json",
        "local/authorization.json",
        "local/log_config.json",
        "local/comm_config.json",
        "local/job_resources.json",
        "local/histoflare.toml__resources.json",
        "local/custom/sitecustomize.py",
        "local/custom/manifest.csv",
        "local/Records/x.py",
        "local/bags.json",
        "startup/more__p_resources.json",
        "startup/manifest.csv",
        "startup/records/x.py",
        "startup/signature.json",
        "startup/KIT_SIGNATURE.JSON",
    ],
)
def test_what_nobody_signed_is_refused(kit: Path, path: str) -> None:
    (kit / path).parent.mkdir(exist_ok=True)
    (kit / path).write_text("{}")
    assert f"not signed: {path}" in refusal(kit)


def test_the_site_s_own_files_are_its_own(kit: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (kit / "local" / "records" / "deep").mkdir(parents=True)
    (kit / "local" / "records" / "deep" / "anything").write_text("x")
    (kit / "local" / "bags").symlink_to(tmp_path / "data")
    (kit / "local" / "records" / "link").symlink_to(tmp_path)
    for name in ("histoflare.toml", "histoflare.toml~", ".histoflare.toml.swp", "a.csv", ".~lock.a.csv#"):
        (kit / "local" / name).write_text("another")
    verify_kit(kit)
    (kit / "local" / "histoflare.toml").unlink()
    verify_kit(kit)


JOB = "0e7a1f0c-9d5f-4f0e-8a5c-3b1d2c4e5f60"
PLACES = (
    "",
    "transfer",
    "jobs/x",
    "local/bags",
    "local/records/deep",
    JOB,
    f"{JOB}/app_clinic/config",
)
CODE = (
    *(
        "msgpack.py",
        "torch/__init__.py",
        "x.pyc",
        "__pycache__/x.cpython-311.pyc",
        "x.so",
        "X.PY",
        "x.abi3.so",
    ),
    *("x.cpython-311-x86_64-linux-gnu.so", "x.pth", "x.pyd", "x.egg"),
    *("sitecustomize.py", "usercustomize.py"),
)


class TestStrays:
    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("name", CODE)
    def test_nothing_that_could_be_run_is_in_a_kit(self, kit: Path, place: str, name: str) -> None:
        path = Path(place, name)
        (kit / path).parent.mkdir(parents=True, exist_ok=True)
        (kit / path).write_text("")
        assert f"could be run: {path.as_posix()}" in refusal(kit)

    @pytest.mark.parametrize(
        "name", ["resources.json", "resources.conf", "resources.json.default", "Resources.yml"]
    )
    def test_nor_what_flare_could_take_for_the_kit_s_own(self, kit: Path, name: str) -> None:
        """FLARE searches all of local, and takes a .json before the kit's own .json.default."""
        (kit / "local" / "records" / "deep").mkdir(parents=True)
        (kit / "local" / "records" / "deep" / name).write_text("{}")
        assert f"could be run: local/records/deep/{name}" in refusal(kit)

    def test_what_a_running_kit_has_is_in_order(self, kit: Path) -> None:
        for path in (
            *(
                "log.txt",
                "audit.log",
                "pid.fl",
                "daemon_pid.fl",
                "transfer/x.txt",
                "snapshots/x",
                "jobs/x/data",
            ),
            *(f"{JOB}/log.txt", f"{JOB}/meta.json", f"{JOB}/app_clinic/config/config_fed_client.json"),
            *(f"{JOB}/FL_global_model.safetensors", "local/bags/s3.h5", "local/records/site.html"),
        ):
            (kit / path).parent.mkdir(parents=True, exist_ok=True)
            (kit / path).write_text("")
        verify_kit(kit)

    def test_a_link_is_not_followed_and_its_name_counts(self, kit: Path, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "module.py").write_text("")
        (kit / "jobs").symlink_to(elsewhere)
        verify_kit(kit)
        (kit / "msgpack.py").symlink_to(elsewhere / "none")
        assert "could be run: msgpack.py" in refusal(kit)

    def test_an_environment_in_a_kit_is_not_listed_file_by_file(self, kit: Path) -> None:
        for index in range(100):
            (kit / f"module{index}.py").write_text("")
        text = refusal(kit)
        assert text.count("could be run") == 20 and "and 80 more" in text

    def test_thousands_of_bags_take_less_than_a_second(self, kit: Path) -> None:
        (kit / "local" / "bags").mkdir()
        for index in range(5000):
            (kit / "local" / "bags" / f"s{index}.h5").touch()
        start = time.process_time()  # what else the machine does counts for nothing
        verify_kit(kit)
        assert time.process_time() - start < 1.0


class TestEarlierJobs:
    @pytest.fixture
    def job(self, kit: Path) -> Path:
        config = kit / JOB / "app_clinic" / "config"
        config.mkdir(parents=True)
        (config / "comm_config.json").write_text('{"comm_driver_path": "."}')
        (config / "evil.py").write_text("")
        (kit / JOB / "log.txt").write_text("what happened")
        return kit / JOB

    def test_what_they_brought_is_removed_at_a_client_s_start(self, kit: Path, job: Path) -> None:
        require_signed_kit(kit)
        assert sorted(path.name for path in job.iterdir()) == ["log.txt"]

    def test_and_refused_at_a_server_s(self, kit: Path, job: Path, ours: Authority) -> None:
        """A job that was lost goes on from what the server has of it."""
        for name in ("fed_client.json", "client.crt"):
            path = kit / "startup" / name
            path.rename(path.with_name(name.replace("client", "server")))
        sign_kit(kit, ours.key)
        with pytest.raises(SystemExit, match=rf"^KIT_CHANGED: (?s:.*){JOB}/app_clinic/config/evil\.py"):
            require_signed_kit(kit)
        (job / "app_clinic" / "config" / "evil.py").unlink()
        require_signed_kit(kit)
        assert (job / "app_clinic" / "config" / "comm_config.json").is_file()

    def test_nothing_else_is_removed(self, kit: Path, tmp_path: Path) -> None:
        """Neither a folder that is no job's, nor what a link leads to."""
        kept = tmp_path / "kept"
        (kept / "app_x").mkdir(parents=True)
        (kit / "app_clinic").mkdir()
        (kit / "bags" / "app_x").mkdir(parents=True)
        (kit / JOB).symlink_to(kept)
        other = kit / JOB.replace("0", "1")
        other.mkdir()
        (other / "app_clinic").symlink_to(kept)
        require_signed_kit(kit)
        assert (
            (kept / "app_x").is_dir() and (kit / "bags" / "app_x").is_dir() and (kit / "app_clinic").is_dir()
        )
        assert not list(other.iterdir())

    def test_code_elsewhere_in_them_keeps_a_client_from_starting(self, kit: Path, job: Path) -> None:
        (job / "left.py").write_text("")
        with pytest.raises(SystemExit, match=rf"^KIT_CHANGED: (?s:.*){JOB}/left\.py"):
            require_signed_kit(kit)


def test_a_hard_link_counts_by_its_bytes(kit: Path, tmp_path: Path) -> None:
    """Whoever has the other name of the file can change it, and that is seen at the next start or job."""
    path, other = kit / "local" / "privacy.json", tmp_path / "elsewhere.json"
    path.rename(other)
    path.hardlink_to(other)
    verify_kit(kit)
    other.write_text(other.read_text() + " ")
    assert "changed: local/privacy.json" in refusal(kit)


@pytest.mark.parametrize("mode", [0o600, 0o777, 0o4755])
def test_modes_are_the_site_s_own(kit: Path, mode: int) -> None:
    """FLARE's scripts call every other file by an interpreter: no mode makes one of them run."""
    for path in (kit / "local" / "privacy.json", kit / "startup" / "fed_client.json"):
        path.chmod(mode)
    verify_kit(kit)


@pytest.mark.parametrize("folder", ["startup", "local"])
def test_parts_of_two_kits_are_no_kit(kit: Path, tmp_path: Path, ours: Authority, folder: str) -> None:
    other = ours.write_kit(tmp_path / "other")
    (other / "local" / "privacy.json").write_text('{"scopes": []}')
    sign_kit(other, ours.key)
    shutil.rmtree(kit / folder)
    shutil.copytree(other / folder, kit / folder)
    assert "changed: local/privacy.json" in refusal(kit)


def test_every_fault_is_listed(kit: Path) -> None:
    (kit / "local" / "policy_open.toml").write_text("")
    (kit / "local" / "privacy.json").unlink()
    (kit / "local" / "resources.json").write_text("{}")
    says = refusal(kit)
    for fault in (
        "changed: local/policy_open.toml",
        "missing: local/privacy.json",
        "not signed: local/resources.json",
    ):
        assert fault in says


class TestNoPlainFile:
    def test_a_link_to_the_same_bytes(self, kit: Path, tmp_path: Path) -> None:
        path = kit / "local" / "policy_open.toml"
        shutil.move(path, tmp_path / "policy.toml")
        path.symlink_to(tmp_path / "policy.toml")
        assert "a link: local/policy_open.toml" in refusal(kit)

    def test_a_folder_elsewhere(self, kit: Path, tmp_path: Path) -> None:
        shutil.move(kit / "local" / "custom", tmp_path / "custom")
        (kit / "local" / "custom").symlink_to(tmp_path / "custom")
        assert "a link: local/custom" in refusal(kit)

    @pytest.mark.parametrize("path", [SIGNATURE_FILE, "startup/rootCA.pem", "startup/client.crt"])
    def test_what_is_read_first(self, kit: Path, tmp_path: Path, path: str) -> None:
        shutil.move(kit / path, tmp_path / "moved")
        (kit / path).symlink_to(tmp_path / "moved")
        refusal(kit)

    @pytest.mark.parametrize("path", ["local/policy_open.toml", "startup/pipe", SIGNATURE_FILE])
    def test_a_pipe_is_not_waited_for(self, kit: Path, path: str) -> None:
        (kit / path).unlink(missing_ok=True)
        os.mkfifo(kit / path)
        refusal(kit)

    def test_is_not_signed_either(self, kit: Path, ours: Authority, tmp_path: Path) -> None:
        (kit / "local" / "link").symlink_to(tmp_path)
        with raises_reason("KIT_CHANGED", "local/link"):
            sign_kit(kit, ours.key)

    def test_the_two_folders_may_be_links(self, kit: Path, tmp_path: Path) -> None:
        """FLARE makes them so if NVFL_WORKSPACE names another folder to work in."""
        workspace = tmp_path / "elsewhere"
        workspace.mkdir()
        for folder in ("startup", "local"):
            (workspace / folder).symlink_to(kit / folder)
        verify_kit(workspace)
        (kit / "local" / "policy_open.toml").write_text("")
        assert "changed: local/policy_open.toml" in refusal(workspace)


class TestSignature:
    def test_deleted(self, kit: Path) -> None:
        (kit / SIGNATURE_FILE).unlink()
        assert f"missing: {SIGNATURE_FILE}" in refusal(kit)

    def test_of_another_key(self, kit: Path, theirs: Authority) -> None:
        (kit / "local" / "policy_open.toml").write_text("")
        sign_list(list_kit(kit), theirs.key)
        assert "not signed by startup/rootCA.pem" in refusal(kit)
        with raises_reason("KIT_CHANGED", kit, "rootCA.pem"):
            sign_kit(kit, theirs.key)

    def test_of_other_words_by_the_same_key(self, kit: Path, ours: Authority) -> None:
        """The authority signs other things too; none of them is a list of a kit."""
        files = json.loads((kit / SIGNATURE_FILE).read_text())["files"]
        plain = json.dumps(files, sort_keys=True, separators=(",", ":"))
        edit_list(kit, lambda content: content.update(signature=sign_content(plain, ours.key)))
        assert "not signed by startup/rootCA.pem" in refusal(kit)

    @pytest.mark.parametrize("signature", ["", "AAAA", "no base64!", "ä"])
    def test_that_is_none(self, kit: Path, signature: str) -> None:
        edit_list(kit, lambda content: content.update(signature=signature))
        assert "not signed by startup/rootCA.pem" in refusal(kit)

    def test_left_out(self, kit: Path) -> None:
        edit_list(kit, lambda content: content.pop("signature"))
        assert "not signed yet" in refusal(kit)

    @pytest.mark.parametrize(
        "change",
        [
            lambda content: content["files"].pop("local/policy_open.toml"),
            lambda content: content["files"].update({"local/resources.json": "0" * 64}),
            lambda content: content["files"].clear(),
        ],
    )
    def test_of_another_list(self, kit: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        edit_list(kit, change)
        assert "not signed by startup/rootCA.pem" in refusal(kit)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{",
            '{"format": 1}',
            '{"format": 2, "files": {}, "signature": "AAAA"}',
            '{"format": 1, "files": [], "signature": "AAAA"}',
            '{"format": 1, "files": {"local/x": 5}, "signature": "AAAA"}',
            '{"format": 1, "files": {}, "signature": 5}',
            '{"format": 1, "files": {}, "signature": "AAAA", "more": 1}',
            '{"format": 1, "files": {}, "files": {}, "signature": "AAAA"}',
            "[" * 100_000,
            " " * (1 << 20) + "{}",
        ],
    )
    def test_a_list_that_is_none(self, kit: Path, text: str) -> None:
        (kit / SIGNATURE_FILE).write_text(text)
        assert f"changed: {SIGNATURE_FILE}" in refusal(kit)

    @pytest.mark.parametrize(
        "path",
        [
            "/etc/passwd",
            "local/../../secret",
            "local/./policy_open.toml",
            "local//policy_open.toml",
            "local",
            "local/",
            "Local/policy_open.toml",
            "transfer/x",
            "local\\policy_open.toml",
            "local/a\\b",
            "local/a\nb",
            "local/histoflare.toml",
            "local/records/x",
            SIGNATURE_FILE,
        ],
    )
    def test_a_signed_list_may_name_a_kit_s_files_only(self, kit: Path, ours: Authority, path: str) -> None:
        edit_list(kit, lambda content: content["files"].update({path: "0" * 64}))
        sign_list(kit / SIGNATURE_FILE, ours.key)
        assert f"not a path of a kit: {path!r}" in refusal(kit)

    def test_two_spellings_of_one_file(self, kit: Path, ours: Authority) -> None:
        edit_list(kit, lambda content: content["files"].update({"local/PRIVACY.json": "0" * 64}))
        sign_list(kit / SIGNATURE_FILE, ours.key)
        assert "differ in capitals only" in refusal(kit)


class TestAuthority:
    def test_another_root_with_our_signature(self, kit: Path, theirs: Authority) -> None:
        (kit / "startup" / "rootCA.pem").write_bytes(theirs.root)
        assert "not signed by startup/rootCA.pem" in refusal(kit)

    def test_another_root_that_signed_all_anew(self, kit: Path, theirs: Authority) -> None:
        (kit / "startup" / "rootCA.pem").write_bytes(theirs.root)
        sign_kit(kit, theirs.key)
        assert "not of the authority of startup/rootCA.pem: startup/client.crt" in refusal(kit)

    def test_a_kit_that_is_wholly_another_s_is_for_tls_to_refuse(self, kit: Path, theirs: Authority) -> None:
        """The limit, as the module states it: the kit alone cannot say whose it is."""
        (kit / "startup" / "client.crt").write_bytes(theirs.client)
        (kit / "startup" / "client.key").write_bytes(theirs.client_key)
        (kit / "startup" / "rootCA.pem").write_bytes(theirs.root)
        sign_kit(kit, theirs.key)
        verify_kit(kit)

    def test_neither_a_client_s_nor_a_server_s(self, kit: Path, ours: Authority) -> None:
        (kit / "startup" / "fed_client.json").unlink()
        sign_kit(kit, ours.key)
        assert "fed_client.json or startup/fed_server.json" in refusal(kit)

    def test_a_list_is_signed_where_the_key_is(
        self, kit: Path, ours: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kit and its own key stay at the site."""
        listed = list_kit(kit)
        assert "not signed yet" in refusal(kit)
        monkeypatch.chdir(tmp_path)
        sent = Path(shutil.copy(listed, "sent.json"))
        sign_list(sent, ours.key)
        shutil.copy(sent, listed)
        verify_kit(kit)

    @pytest.mark.parametrize("text", [None, "[]", '{"format": 1, "files": {"local/x": 5}}'])
    def test_what_is_no_list_is_not_signed(
        self, ours: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
    ) -> None:
        monkeypatch.chdir(tmp_path)
        if text is not None:
            Path("sent.json").write_text(text)
        with raises_reason("KIT_CHANGED", "sent.json: "):
            sign_list(Path("sent.json"), ours.key)

    def test_its_key_is_where_flare_keeps_it(self, ours: Authority, tmp_path: Path, kit: Path) -> None:
        key = serialize_pri_key(ours.key).decode()
        central, distributed = tmp_path / "state", tmp_path / "authority"
        central.mkdir()
        distributed.mkdir()
        (central / "cert.json").write_text(json.dumps({"root_pri_key": key}))
        (distributed / "rootCA.key").write_text(key)
        for folder in (central, distributed):
            sign_kit(kit, read_authority(folder))
            verify_kit(kit)
        for text in ("{}", "[]", '{"root_pri_key": null}', '{"root_pri_key": "x"}'):
            (central / "cert.json").write_text(text)
            with raises_reason("JOB_INVALID", central):
                read_authority(central)


class TestRunning:
    def test_a_kit_is_checked(self, kit: Path) -> None:
        check_running_kit(Workspace(str(kit), "clinic"))
        (kit / "local" / "policy_open.toml").write_text("")
        with pytest.raises(JobError) as caught:
            check_running_kit(Workspace(str(kit), "clinic"))
        assert caught.value.reason == "KIT_CHANGED"

    @pytest.mark.parametrize("left", [path for path in SIGNED if path.startswith("startup/")])
    def test_a_kit_without_a_signature_is_not_taken_for_a_simulation(self, kit: Path, left: str) -> None:
        for path in (kit / "startup").iterdir():
            if path != kit / left:
                path.unlink()
        with pytest.raises(JobError):
            check_running_kit(Workspace(str(kit), "clinic"))

    def test_the_simulator_has_no_kit(self, tmp_path: Path) -> None:
        (tmp_path / "startup").mkdir()
        (tmp_path / "local").mkdir()
        (tmp_path / "local" / "privacy.json").write_text("{}")
        check_running_kit(Workspace(str(tmp_path), "clinic"))

    def test_takes_less_than_50_ms(self, kit: Path) -> None:
        took = []
        for _ in range(5):
            start = time.perf_counter()
            verify_kit(kit)
            took.append(time.perf_counter() - start)
        assert min(took) < 0.05


class TestStart:
    def test_with_a_kit_as_it_was_signed(self, kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(kit)
        KitCheck()

    @pytest.mark.parametrize("script_waits", [True, False])
    def test_with_another_there_is_none(
        self, kit: Path, monkeypatch: pytest.MonkeyPatch, script_waits: bool
    ) -> None:
        (kit / "startup" / "start.sh").write_text("")
        if script_waits:
            (kit / "daemon_pid.fl").write_text("1")
        monkeypatch.chdir(kit)
        with pytest.raises(SystemExit) as caught:
            KitCheck()
        assert "KIT_CHANGED" in str(caught.value.code) and "changed: startup/start.sh" in str(
            caught.value.code
        )
        assert (kit / "shutdown.fl").exists() is script_waits, "the script must not start it again"

    def test_there_is_no_simulation_to_be_taken_for(self, tmp_path: Path) -> None:
        """What FLARE reads from a kit's own startup folder is read in a kit only."""
        (tmp_path / "startup").mkdir()
        (tmp_path / "local").mkdir()
        with pytest.raises(SystemExit):
            require_signed_kit(tmp_path)


@pytest.mark.parametrize(
    ("path", "own"),
    [
        ("local/histoflare.toml", True),
        ("local/policy.toml", True),
        ("local/manifest.csv", True),
        ("local/records", True),
        ("local/ledger/a/b", False),
        ("startup/histoflare.toml", False),
        ("histoflare.toml", False),
        ("local", False),
        ("local/x/manifest.csv", False),
        ("local/recordsx", False),
        ("local/policy_open.toml", False),
    ],
)
def test_what_is_the_site_s_own(path: str, own: bool) -> None:
    assert is_own(path) is own


def test_a_folder_in_which_results_would_be_lost_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^FEDERATION_FAILED: "):
        require_usable_folder(tmp_path / "a\\b")


@pytest.mark.parametrize("name", ["kit", "my kit", "it's", 'a"b', "Köln #1", "a(b)&c;$d*"])
def test_all_others_are_fine(tmp_path: Path, name: str) -> None:
    require_usable_folder(tmp_path / name)

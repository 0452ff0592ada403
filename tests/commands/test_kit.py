"""``histoflare kit``: compare a kit with what was signed, and sign one again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509 import load_pem_x509_certificate
from typer.testing import CliRunner

from histoflare.cli import app
from histoflare.errors import JobError, LedgerError
from histoflare.flare.kit_signature import sign_kit
from histoflare.privacy.ledger import Ledger
from histoflare.privacy.own_policy_file import read_own_policy
from tests.refusals import raises_reason


@pytest.fixture(scope="module")
def made(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits")
    project = repository / "provisioning" / "project.yml"
    command = [sys.executable, "-m", "nvflare.cli", "provision", "-p", str(project), "-w", str(folder)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return folder / "histoflare"


def test_a_changed_policy_is_found_and_the_lead_can_sign_it(made: Path) -> None:
    kit = made / "prod_00" / "hospital-a"
    run = CliRunner().invoke
    assert run(app, ["kit", "check", str(kit)]).exit_code == 0
    policy = kit / "local" / "policy_dp-patient.toml"
    policy.write_text(policy.read_text().replace("epsilon = 8.0", "epsilon = 4.0"))
    refused = run(app, ["kit", "check", str(kit)])
    assert isinstance(refused.exception, JobError)
    assert refused.exception.reason == "KIT_CHANGED"
    assert "policy_dp-patient.toml" in str(refused.exception)
    assert run(app, ["kit", "sign", str(kit), "--authority", str(made / "state")]).exit_code == 0
    assert run(app, ["kit", "check", str(kit)]).exit_code == 0


def test_the_steward_s_own_file_is_not_signed(made: Path) -> None:
    kit = made / "prod_00" / "hospital-b"
    own = kit / "local" / "histoflare.toml"
    own.write_text(own.read_text().replace('epsilon = ""', "epsilon = 2.0"))
    assert CliRunner().invoke(app, ["kit", "check", str(kit)]).exit_code == 0


def test_a_steward_pins_what_another_site_s_steward_reads_out(made: Path) -> None:
    """Name and fingerprint, as one command prints them and the other takes them."""
    run, kits = CliRunner().invoke, made / "prod_00"
    printed = run(app, ["kit", "fingerprint", str(kits / "hospital-b")]).stdout.split()
    with (kits / "hospital-b" / "startup" / "client.crt").open("rb") as file:
        certificate = load_pem_x509_certificate(file.read())
    assert printed == ["hospital-b", certificate.fingerprint(SHA256()).hex()]
    kit = kits / "hospital-d"
    for _ in range(2):
        assert run(app, ["policy", "pin", *printed, "--site", str(kit)]).exit_code == 0
    assert read_own_policy(kit / "local" / "policy.toml").pins == {printed[0]: printed[1]}
    caught = run(app, ["policy", "pin", *printed, "--site", str(kits / printed[0])]).exception
    assert isinstance(caught, JobError) and caught.reason == "POLICY_INVALID", "a site counts itself"
    assert run(app, ["policy", "pin", printed[0], "", "--site", str(kit)]).exit_code == 0
    assert read_own_policy(kit / "local" / "policy.toml").pins == {}
    assert run(app, ["kit", "check", str(kit)]).exit_code == 0, "it is the steward's own file"


def test_another_authority_cannot_sign(made: Path, tmp_path: Path) -> None:
    kit = made / "prod_00" / "hospital-c"
    (tmp_path / "cert.json").write_text(json.dumps({}))
    run = CliRunner().invoke
    assert isinstance(run(app, ["kit", "sign", str(kit), "--authority", str(tmp_path)]).exception, JobError)
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    with raises_reason("KIT_CHANGED", kit, "rootCA.pem"):
        sign_kit(kit, key)
    assert run(app, ["kit", "check", str(kit)]).exit_code == 0, "it is as it was"


def test_what_is_no_site_s_kit_is_said(made: Path, tmp_path: Path) -> None:
    for path, says in (
        (tmp_path, "no startup kit there"),
        (made / "prod_00" / "lead@consortium.example", "a person's kit"),
    ):
        result = CliRunner().invoke(app, ["kit", "check", str(path)])
        assert isinstance(result.exception, JobError)
        assert says in str(result.exception)


def test_the_ledger_of_another_hospital_is_neither_made_nor_bound_in_a_kit(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = made / "prod_00" / "hospital-d" / "local"
    place, elsewhere = (
        (tmp_path / folder / "data" / "ledger.sqlite", tmp_path / folder / "keys" / "ledger.key")
        for folder in ("here", "elsewhere")
    )
    Ledger.create(*elsewhere, "hospital-a")

    def run(command: str, files: tuple[Path, Path], *more: str) -> str | None:
        asked = ["--ledger", str(files[0]), "--key", str(files[1]), "--site", str(local)]
        caught = CliRunner().invoke(app, ["ledger", command, *more, *asked]).exception
        return caught.reason if isinstance(caught, LedgerError) else caught and repr(caught)

    assert run("create", place, "hospital-a") == "LEDGER_FOREIGN"
    assert not place[0].exists() and not place[1].exists()
    copy = tuple(tmp_path / "copy" / path.relative_to(tmp_path / "elsewhere") for path in elsewhere)
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "copy")
    assert run("move", copy, "--yes") == "LEDGER_FOREIGN"
    assert not Ledger(*elsewhere).identity().is_away, "the other hospital's goes on"
    assert run("create", place, "hospital-d") is None
    own = (local / "histoflare.toml").read_text()
    (local / "histoflare.toml").write_text(
        'manifest = "m.csv"\nbags = "b"\n' + own.replace(str(tmp_path / "here"), str(tmp_path / "copy"))
    )
    monkeypatch.chdir(local.parent)
    shown = CliRunner().invoke(app, ["ledger", "show", "--epsilon", "8", "--delta", "1e-5"]).stdout
    assert "the kit of 'hospital-d'" in shown and "ledger move" not in shown
    for more in ("--yes", "--away"):
        caught = CliRunner().invoke(app, ["ledger", "move", more]).exception
        assert isinstance(caught, LedgerError) and caught.reason == "LEDGER_FOREIGN"
    assert not Ledger(*elsewhere).identity().is_away
    (local / "histoflare.toml").write_text(own)
    assert run("move", place) is None


def test_the_project_s_copy_has_no_link_that_leads_nowhere(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["kit", "project", "--out", str(tmp_path / "consortium")])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "consortium" / "README.md").read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    assert not [link for link in links if link and not (tmp_path / "consortium" / link).exists()]
    assert "docs/steward.md" in text and not re.search(r"\([^()]*\([^()]*\)\)", text), (
        "no brackets in brackets"
    )

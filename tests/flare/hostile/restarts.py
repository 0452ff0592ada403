"""Clients that are started again: with other kits, and with what an older version would have left in them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid

from nvflare.fuel.f3.cellnet.defs import Encoding, MessageHeaderKey

from histoflare.flare.kits import Kits, kit_environment
from histoflare.storage import write_json

from ..test_strays import plant
from .attack import SITES, Attack
from .objects import too_large

EARLIER_JOB = str(uuid.UUID(int=9))


def restart(made: Attack) -> None:
    """Start the clients again: with an earlier kit, with another site's ledger, with files of two names.

    In each kit is what an older version would have left of a job (``test_kit_signature`` has more of it).
    """
    kits, (a, b) = made.federation.kits, SITES
    encoded = {MessageHeaderKey.PAYLOAD_ENCODING: Encoding.FOBS}
    large = {f"too large, {site}": ("cell", site, "admin", "x", too_large(), encoded) for site in SITES}
    made.send_objects(large)  # now: the connection that it comes on is closed
    for site in SITES:
        process = made.federation._started[site]
        assert process.poll() is None, "it goes on"
        process.terminate()
        process.wait(20)
    for site, kit in ((a, made.earlier), (b, kits.kit(b))):
        old = kit / EARLIER_JOB / f"app_{site}"
        plant(old / "config", made.marks, "evil.py", "custom/own.py")
        (old / "config" / "link").symlink_to(made.notes(site))
    shutil.copytree(kits.kit(a) / "local" / "records", made.earlier / "local" / "records", dirs_exist_ok=True)
    kits.kit(a).rename(made.folder / "issued again")
    made.earlier.rename(kits.kit(a))
    made.start(a)
    own = kits.kit(b) / "local" / "histoflare.toml"
    kept = own.read_bytes()
    shutil.copyfile(kits.kit(a) / "local" / "histoflare.toml", own)
    made.refused["another site's ledger"] = made.start_refused(b)
    own.write_bytes(kept)
    policy, other = kits.kit(b) / "local" / "policy_open.toml", made.folder / "policy of two names"
    text = policy.read_bytes()
    other.hardlink_to(policy)
    other.write_bytes(text.replace(b"minimum_patients = 2", b"minimum_patients = 1"))
    made.refused["a file that has changed under its other name"] = made.start_refused(b)
    other.write_bytes(text)
    for path in [path for folder in ("startup", "local") for path in (kits.kit(b) / folder).iterdir()]:
        if path.is_file():
            path.chmod(0o777)
    made.start(b)
    made.await_answers()


def issue_again(made: Attack) -> None:
    """Have the consortium issue its kits once more; the first site takes the new one and keeps the other."""
    run, kit = made.federation.workspace, made.federation.kits.kit(SITES[0])
    flare = [sys.executable, "-P", "-m", "nvflare.cli", "provision"]
    done = subprocess.run(
        [*flare, "-p", str(run / "project.yml"), "-w", str(run / "kits"), "--force"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=kit_environment() | {"HOME": str(run / "home")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kit.rename(made.earlier)
    shutil.move(kit.parent.with_name("prod_01") / kit.name, kit)
    for name in ("local/histoflare.toml", "startup/fed_client.json"):  # the server is on this machine
        shutil.copyfile(made.earlier / name, kit / name)
    take_unsigned_jobs(made.federation.kits, SITES[0])


def take_unsigned_jobs(kits: Kits, site: str) -> None:
    """Have a site take jobs that nobody signed: what is tested is what stands beside that check of FLARE."""
    path = kits.kit(site) / "startup" / "fed_client.json"
    write_json(path, json.loads(path.read_text()) | {"require_signed_jobs": False})
    kits.sign(site)

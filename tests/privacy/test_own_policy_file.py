"""A site's own policy as a file: read whole and strictly, with the signed ones, or the site takes no job."""

from __future__ import annotations

from pathlib import Path

import pytest

from histoflare.errors import JobError
from histoflare.privacy.own_policy import OWN_POLICY_FILE, Narrowing, StewardPolicy
from histoflare.privacy.own_policy_edit import change_own_policy, parse_changes, pin_sites
from histoflare.privacy.own_policy_file import (
    MOST_BYTES,
    POLICY_FILE,
    read_layers,
    read_own_policy,
    read_site_policy,
    write_own_policy,
)
from histoflare.privacy.policy import POLICIES, read_policy
from tests.refusals import raises_reason

LISTS = 'purposes = ["research"]\nstrategies = ["fedavg"]\nmodels = ["mem"]\n'
SCOPES = ("dp-patient", "dp-update", "open")


@pytest.fixture
def local(tmp_path: Path) -> Path:
    for scope in SCOPES:
        (tmp_path / POLICY_FILE.format(scope)).write_bytes((POLICIES / f"{scope}.toml").read_bytes())
    return tmp_path


def write(local: Path, text: str) -> Path:
    path = local / OWN_POLICY_FILE
    path.write_text(text)
    return path


def refusal(local: Path, scope: str = "dp-patient") -> JobError:
    with pytest.raises(JobError) as caught:
        read_site_policy(local / POLICY_FILE.format(scope))
    return caught.value


def test_everything_that_can_stand_in_it(tmp_path: Path) -> None:
    text = f"""{LISTS}
scopes = ["dp-patient"]
minimum_patients = 10
metrics = ["auc"]
counts = false
epsilon = 4
delta = 1e-6
evaluations = 0
records = ["patient"]
seeded_noise = false
[scope.dp-patient]
epsilon = 2.5
[scope.open]
"""
    assert read_own_policy(write(tmp_path, text)) == StewardPolicy(
        purposes=("research",),
        strategies=("fedavg",),
        models=("mem",),
        scopes=("dp-patient",),
        everywhere=Narrowing(10, ("auc",), False, 4, 1e-6, 0, ("patient",), False),
        scope={"dp-patient": Narrowing(epsilon=2.5), "open": Narrowing()},
    )


@pytest.mark.parametrize("entry", ["colluders", "sites_per_patient"])
def test_whom_a_budget_is_kept_against_is_one_for_all_scopes(local: Path, entry: str) -> None:
    """One scope would else use up what another keeps: 10.8 of 8 against server and two sites was reached."""
    write(local, f"{LISTS}[scope.dp-update]\n{entry} = 3\nepsilon = 2.0\n[scope.dp-patient]\n{entry} = 2\n")
    holds = {scope: read_site_policy(local / POLICY_FILE.format(scope)).protection for scope in SCOPES}
    assert holds["open"] is None
    for scope, epsilon in (("dp-patient", 8.0), ("dp-update", 2.0)):
        kept = holds[scope]
        assert kept is not None and (getattr(kept, entry), kept.epsilon) == (3, epsilon)
    write(local, f'{LISTS}scopes = ["dp-patient"]\n[scope.dp-update]\n{entry} = 3\n')
    kept = read_site_policy(local / POLICY_FILE.format("dp-patient")).protection
    assert kept is not None and getattr(kept, entry) == 1, "the site takes no part in the other scope"


def test_the_file_of_a_new_kit_narrows_nothing_and_its_comments_are_true(local: Path) -> None:
    path = local / OWN_POLICY_FILE
    write_own_policy(path, purposes=["research"], strategies=["fedavg", 'a "b"'], models=[])
    assert read_own_policy(path) == StewardPolicy(("research",), ("fedavg", 'a "b"'), ())
    for scope in SCOPES:
        holds = read_site_policy(local / POLICY_FILE.format(scope))
        signed = read_policy(POLICIES / f"{scope}.toml")
        assert (holds.metrics, holds.counts, holds.minimum_patients, holds.protection) == (
            signed.metrics,
            signed.counts,
            signed.minimum_patients,
            signed.protection,
        )
    examples = [line.removeprefix("# ") for line in path.read_text().splitlines()]
    entries = [line for line in examples if line.partition(" = ")[0].isidentifier() or line.startswith("[")]
    own = read_own_policy(write(local, "\n".join(entries)))
    assert own.scopes == ("dp-patient",)
    assert None not in vars(own.everywhere).values(), "each entry has its example"
    assert set(own.scope) == {"dp-patient"}
    assert read_site_policy(local / POLICY_FILE.format("dp-patient")).protection is not None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "purposes: missing"),
        (LISTS.replace("models", "model"), "models: missing"),
        (LISTS.replace("models", "model"), "model: no entry of this file (nearest: models"),
        (LISTS.replace('["fedavg"]', '"fedavg"'), "strategies: must be a list"),
        (LISTS.replace('["fedavg"]', '["fedavg", 3]'), "strategies: must be a list"),
        (LISTS.replace('["fedavg"]', '[""]'), "strategies: must be a list"),
        (LISTS.replace("fedavg", "f" * 65), "strategies: must be a list"),
        (LISTS.replace('["fedavg"]', str(["x"] * 257)), "strategies: must be a list"),
        (f"{LISTS}epsilom = 2", "epsilom: no entry of this file (nearest: epsilon"),
        (f"{LISTS}mechanism = 'open'", "mechanism: no entry of this file"),
        (f"{LISTS}epsilon = 0", "epsilon: must be a number above 0"),
        (f"{LISTS}epsilon = nan", "epsilon: must be"),
        (f"{LISTS}epsilon = inf", "epsilon: must be"),
        (f"{LISTS}epsilon = true", "epsilon: must be"),
        (f"{LISTS}epsilon = 0x{'f' * 20000}", "epsilon: must be"),
        (f"{LISTS}epsilon = {'9' * 5000}", "not a TOML file"),
        (f"{LISTS}delta = 0.5", "delta: must be a number above 0 and at most 0.01"),
        (f"{LISTS}evaluations = -1", "evaluations: must be"),
        (f"{LISTS}evaluations = 1.0", "evaluations: must be"),
        (f"{LISTS}minimum_patients = 0", "minimum_patients: must be"),
        (f"{LISTS}minimum_patients = true", "minimum_patients: must be"),
        (f"{LISTS}records = []", "records: must be some of patient, slide"),
        (f"{LISTS}records = ['tile']", "records: must be"),
        (f"{LISTS}counts = 0", "counts: must be true or false"),
        (f"{LISTS}scopes = 'open'", "scopes: must be a list"),
        (f"{LISTS}scopes = ['dp-patiens']", "scope dp-patiens: not in this kit (nearest: dp-patient"),
        (f"{LISTS}scope = 3", "scope: tables"),
        (f"{LISTS}scope.open = 3", "scope.open: must be a table"),
        (f"{LISTS}[scope.opn]\ncounts = false", "scope opn: not in this kit (nearest: open"),
        (f"{LISTS}[scope.open]\nmodels = []", "[scope.open] models: stands above the first table"),
        (f"{LISTS}[scope.open]\nmetric = []", "[scope.open] metric: no entry of this file (nearest: metrics"),
        (f"{LISTS}[protection]\nepsilon = 1", "protection: no entry of this file"),
        (f"{LISTS}epsilon 3", "not a TOML file"),
        (f"{LISTS}#{' ' * MOST_BYTES}", "more than 64 KiB"),
        (f"{LISTS}x = {'[' * 20000}", "not a TOML file"),
    ],
)
def test_what_is_wrong_with_it_is_said(local: Path, text: str, says: str) -> None:
    write(local, text)
    error = refusal(local)
    assert error.reason == "POLICY_INVALID"
    assert says in str(error)
    assert len(str(error)) < 2000


def test_all_that_is_wrong_is_said_at_once(local: Path) -> None:
    write(local, f'{LISTS}epsilon = -1\nx = 1\n[scope.open]\ncounts = ""\n')
    assert all(name in str(refusal(local)) for name in ("epsilon:", "x:", "[scope.open] counts:"))
    write(local, f"{LISTS}minimum_patients = 1\n[scope.dp-update]\nepsilon = 9\n[scope.opn]\n")
    text = str(refusal(local))
    assert "scope opn" in text and "[scope.dp-update] epsilon" in text
    assert all(f"in the scope {scope}: minimum_patients" in text for scope in SCOPES)


def test_without_it_a_site_takes_part_in_nothing(local: Path) -> None:
    error = refusal(local)
    assert error.reason == "POLICY_INVALID"
    assert str(local / OWN_POLICY_FILE) in str(error) and 'strategies = ["fedavg"]' in str(error)


def test_a_folder_or_other_bytes_are_no_policy(local: Path) -> None:
    (local / OWN_POLICY_FILE).mkdir()
    assert refusal(local).reason == "POLICY_INVALID"
    (local / OWN_POLICY_FILE).rmdir()
    write(local, "").write_bytes(b"purposes = ['\xff']")
    assert "not a TOML file" in str(refusal(local))


def test_an_entry_that_would_widen_one_scope_closes_all(local: Path) -> None:
    write(local, f"{LISTS}[scope.dp-update]\nepsilon = 9")
    for scope in SCOPES:
        assert refusal(local, scope).reason == "POLICY_INVALID"
    write(local, f"{LISTS}scopes = ['open']\n[scope.dp-update]\nepsilon = 9")
    assert read_site_policy(local / POLICY_FILE.format("open")).models == ("mem",)
    assert refusal(local, "dp-update").reason == "SCOPE_NOT_ALLOWED"


def test_another_signed_policy_can_be_looked_at_with_the_site_s_own(local: Path, tmp_path: Path) -> None:
    proposed = tmp_path / "elsewhere" / "proposed.toml"
    proposed.parent.mkdir()
    proposed.write_text((POLICIES / "dp-update.toml").read_text().replace("epsilon = 8.0", "epsilon = 3.0"))
    (local / POLICY_FILE.format("dp-update")).unlink()
    write(local, f"{LISTS}scopes = ['dp-update']\nepsilon = 2")
    holds = read_site_policy(proposed, local).protection
    assert holds is not None and holds.epsilon == 2
    write(local, f"{LISTS}scopes = ['dp-update']\nepsilon = 4")
    with raises_reason("POLICY_INVALID", "scope dp-update: epsilon: 4 ", 3.0):
        read_site_policy(proposed, local)


def test_a_signed_policy_stands_in_the_file_of_its_scope(local: Path) -> None:
    write(local, LISTS)
    (local / "policy_other.toml").write_bytes((POLICIES / "open.toml").read_bytes())
    assert "policy_open.toml" in str(refusal(local))


def test_a_folder_without_policies_is_no_kit(tmp_path: Path) -> None:
    write(tmp_path, LISTS)
    with raises_reason("POLICY_INVALID", tmp_path, "policy_<scope>.toml"):
        read_layers(tmp_path)


PIN = "8b" * 32


def test_other_sites_are_pinned_and_unpinned_and_comments_stay(local: Path) -> None:
    write_own_policy(local / OWN_POLICY_FILE, purposes=["research"], strategies=[], models=[])
    before = (local / OWN_POLICY_FILE).read_text()
    assert pin_sites(local, {"b": PIN.upper(), "c": PIN})
    assert not pin_sites(local, {"b": PIN})
    policy = read_site_policy(local / "policy_open.toml")
    assert (policy.pins, policy.trust_ca) == ({"b": PIN, "c": PIN}, False)
    assert change_own_policy(local, parse_changes(["trust_ca=true"]))
    assert pin_sites(local, {"b": "", "c": ""})
    policy = read_site_policy(local / "policy_open.toml")
    assert (policy.pins, policy.trust_ca) == ({}, True)
    kept = [line for line in before.splitlines() if line.startswith("#") and "trust_ca" not in line]
    assert set(kept) <= set((local / OWN_POLICY_FILE).read_text().splitlines())


@pytest.mark.parametrize("pin", ["", "8b", PIN[:-1] + "g", PIN + "00"])
def test_what_is_no_fingerprint_is_not_written(local: Path, pin: str) -> None:
    write(local, LISTS)
    if not pin:
        with raises_reason("POLICY_INVALID", "pins"):
            read_layers(local, text=(local / OWN_POLICY_FILE).read_text() + '[pins]\nb = ""\n')
        return
    before = (local / OWN_POLICY_FILE).read_text()
    with raises_reason("POLICY_INVALID", "b"):
        pin_sites(local, {"b": pin})
    assert (local / OWN_POLICY_FILE).read_text() == before


@pytest.mark.parametrize("entry", ["pins", "trust_ca"])
def test_no_signed_policy_says_whom_a_site_knows(tmp_path: Path, entry: str) -> None:
    signed = tmp_path / "policy_open.toml"
    said = {"pins": f'[pins]\nb = "{PIN}"\n', "trust_ca": "trust_ca = true\n"}[entry]
    text = (POLICIES / "open.toml").read_text()
    signed.write_text(text + said if entry == "pins" else said + text)
    with raises_reason("POLICY_INVALID", entry):
        read_policy(signed)

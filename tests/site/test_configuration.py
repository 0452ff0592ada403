"""A site's own file."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from histoflare.errors import JobError
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.ledgers import on_workstation
from histoflare.site.site_file import (
    SITE_FILE,
    SITES_VARIABLE,
    entries,
    find_site_file,
    name_ledger,
    named_ledger,
    read_site_file,
    write_site_file,
)
from tests.refusals import raises_reason

SHA256 = "0123456789abcdef" * 4
MINIMUM = 'manifest = "m.csv"\nbags = "bags"\n'


@pytest.mark.parametrize("name", ["bags", 'a "quoted" \\ folder', "größe 1", "line\nbreak\x7f", "{braces}"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    plain = SiteConfiguration({"manifest": tmp_path / f"{name}.csv", "bags": tmp_path / name})
    full = SiteConfiguration(
        {"manifest": tmp_path / "m.csv", "bags": tmp_path / "bags"},
        records=tmp_path / name,
        ledger=tmp_path / name / "ledger.sqlite",
        ledger_key=tmp_path / f"{name}.key",
        prepare=True,
        encoder_weights=tmp_path / f"{name}.pth",
        encoder_sha256=SHA256,
        cache_mb=0,
        evaluation_only=True,
        pseudonym="river-7",
    )
    of_workstation = SiteConfiguration(
        {"manifest": tmp_path / "m.csv", "bags": tmp_path / "bags"}, workstation=True
    )
    for configuration in (plain, full, of_workstation):
        write_site_file(tmp_path / SITE_FILE, configuration)
        assert read_site_file(tmp_path / SITE_FILE) == configuration


def test_a_written_file_has_every_key_with_a_comment_above_it(tmp_path: Path) -> None:
    named = {"ledger": tmp_path / "ledger.sqlite", "ledger_key": tmp_path / "keys" / "ledger.key"}
    site = SiteConfiguration(
        {"manifest": tmp_path / "m.csv", "bags": tmp_path / "bags"}, workstation=True, **named
    )
    write_site_file(tmp_path / SITE_FILE, site)
    text = (tmp_path / SITE_FILE).read_text()
    assert list(tomllib.loads(text)) == entries()
    blocks = text.split("\n\n")
    assert all(block.startswith("#") for block in blocks)


def test_relative_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'manifest = "m.csv"\nbags = "../bags"\nrecords = "notes"\nencoder_weights = "w.pth"\n'
    (tmp_path / SITE_FILE).write_text(f'{text}encoder_sha256 = "{SHA256}"\n')
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / SITE_FILE, Path(SITE_FILE)):
        assert read_site_file(path) == SiteConfiguration(
            {"manifest": tmp_path / "m.csv", "bags": tmp_path / "../bags"},
            records=tmp_path / "notes",
            encoder_weights=tmp_path / "w.pth",
            encoder_sha256=SHA256,
        )


def test_the_defaults(tmp_path: Path) -> None:
    (tmp_path / SITE_FILE).write_text(MINIMUM)
    read = read_site_file(tmp_path / SITE_FILE)
    assert read == SiteConfiguration(
        {"manifest": tmp_path / "m.csv", "bags": tmp_path / "bags"}, records=tmp_path / "records"
    )
    assert (read.prepare, read.cache_mb, read.evaluation_only) == (False, 2048, False)
    assert (read.encoder_weights, read.encoder_sha256, read.pseudonym) == (None, None, None)


def test_sites_on_one_machine_have_records_of_their_own(tmp_path: Path) -> None:
    sites = [
        SiteConfiguration({"manifest": tmp_path / f"{name}.csv", "bags": tmp_path / "bags" / name})
        for name in "ab"
    ]
    assert sites[0].records != sites[1].records
    for name in "ab":
        (tmp_path / f"{name}.toml").write_text(MINIMUM)
    read = [read_site_file(tmp_path / f"{name}.toml") for name in "ab"]
    assert [site.records for site in read] == [tmp_path / "records" / name for name in "ab"]
    assert [site.ledger for site in (*sites, *read)] == [None] * 4, "nobody has one that was not made"
    made = [on_workstation(name, site) for name, site in zip("ab", sites, strict=True)]
    assert made[0].ledger != made[1].ledger and made[0].ledger_key != made[1].ledger_key
    assert all(site.ledger is not None and site.ledger.exists() and site.workstation for site in made)
    assert on_workstation("a", sites[0]) == made[0], "it is made once"


def test_a_ledger_is_named_in_a_file_that_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / SITE_FILE
    write_site_file(path, SiteConfiguration({"manifest": tmp_path / "m.csv", "bags": tmp_path / "bags"}))
    before = path.read_text()
    assert "\n# ledger = " in before and named_ledger(path) is None
    ledger, key = tmp_path / 'a "place"' / "ledger.sqlite", tmp_path / "keys" / "ledger.key"
    assert name_ledger(path, ledger, key)
    assert (
        named_ledger(path) == (ledger, key) == (read_site_file(path).ledger, read_site_file(path).ledger_key)
    )
    changed = [line for line in path.read_text().splitlines() if line not in before.splitlines()]
    assert len(changed) == 2 and len(path.read_text().splitlines()) == len(before.splitlines())
    assert not name_ledger(path, ledger, key)
    assert name_ledger(path, ledger.with_name("other"), key)
    assert read_site_file(path).ledger == ledger.with_name("other")
    path.write_text("prepare = true\n")
    assert name_ledger(path, ledger, key) and named_ledger(path) == (ledger, key)
    path.write_text('ledger = "x"\n')
    with raises_reason("SITE_NOT_CONFIGURED", path, "ledger and ledger_key"):
        named_ledger(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ()),
        ("manifest = ", ["TOML"]),
        ("# \udcff", ["TOML"]),
        ('manifest = "m.csv"', ["bags: "]),
        (f'{MINIMUM}spare = "s"', ["spare: "]),
        ('manifest = ""\nbags = "b"', ["manifest: "]),
        ('bags = "b"\nimages = "i.csv"', ["manifest: "]),
        ('images = ""', ["manifest: "]),
        ("images = 3", ["images: "]),
        (f'{MINIMUM}device = "gpu"', ["device: "]),
        ('manifest = "m"\nbags = 3', ["bags: "]),
        (f"{MINIMUM}records = true", ["records: "]),
        (f"{MINIMUM}ledger = 1", ["ledger: "]),
        (f"{MINIMUM}epsilon = 2.0", ["epsilon: ", "policy.toml"]),
        (f'{MINIMUM}ledger_key = "k"', ["ledger and ledger_key: "]),
        (f"{MINIMUM}workstation = 1", ["workstation: "]),
        (f'{MINIMUM}site = "a"', ["site: "]),
        (f'{MINIMUM}prepare = "yes"', ["prepare: "]),
        (f"{MINIMUM}encoder_weights = 1", ["encoder_weights: "]),
        (f'{MINIMUM}encoder_sha256 = "abc"', ["encoder_sha256: "]),
        (f'{MINIMUM}encoder_weights = "w.pth"', ["encoder_weights and encoder_sha256: "]),
        (f"{MINIMUM}cache_mb = -1", ["cache_mb: "]),
        (f"{MINIMUM}cache_mb = true", ["cache_mb: "]),
        (f"{MINIMUM}cache_mb = 1.5", ["cache_mb: "]),
        (f"{MINIMUM}evaluation_only = 1", ["evaluation_only: "]),
        (f'{MINIMUM}pseudonym = "St. Mary"', ["pseudonym: "]),
        (f'{MINIMUM}pseudonym = "river\\n"', ["pseudonym: "]),
        (f'{MINIMUM}pseudonym = "{"x" * 33}"', ["pseudonym: "]),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, content: str | None, says: list[str]) -> None:
    if content is not None:
        (tmp_path / SITE_FILE).write_bytes(content.encode(errors="surrogateescape"))
    with raises_reason("SITE_NOT_CONFIGURED", tmp_path / SITE_FILE, *says):
        read_site_file(tmp_path / SITE_FILE)


def test_every_fault_is_in_the_error(tmp_path: Path) -> None:
    (tmp_path / SITE_FILE).write_text('bags = 3\ncache_mb = "much"\nspare = 1\npseudonym = "Ä"\n')
    with pytest.raises(JobError) as caught:
        read_site_file(tmp_path / SITE_FILE)
    for name in ("manifest", "bags", "cache_mb", "spare", "pseudonym"):
        assert f"\n  {name}: " in str(caught.value)


def test_the_variable_is_for_simulations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(SITES_VARIABLE, raising=False)
    assert find_site_file("a", tmp_path) == tmp_path / SITE_FILE
    monkeypatch.setenv(SITES_VARIABLE, str(tmp_path / "all"))
    assert find_site_file("a", tmp_path) == tmp_path / "all" / "a.toml"

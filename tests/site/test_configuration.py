"""A site's own file."""

from __future__ import annotations

from pathlib import Path

import pytest

from histoflare.errors import JobError
from histoflare.site.configuration import (
    SITE_FILE,
    SITES_VARIABLE,
    SiteConfiguration,
    find_site_file,
    read_site_file,
    write_site_file,
)


@pytest.mark.parametrize("name", ["bags", 'a "quoted" \\ folder', "größe 1"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    configuration = SiteConfiguration(tmp_path / f"{name}.csv", tmp_path / name)
    write_site_file(tmp_path / SITE_FILE, configuration)
    assert read_site_file(tmp_path / SITE_FILE) == configuration


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    (tmp_path / SITE_FILE).write_text('manifest = "m.csv"\nbags = "../bags"\n')
    assert read_site_file(tmp_path / SITE_FILE) == SiteConfiguration(tmp_path / "m.csv", tmp_path / "../bags")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "not found"),
        ("manifest = ", "not a TOML file"),
        ('manifest = "m.csv"', "it has manifest"),
        ('manifest = "m.csv"\nbags = 3', "must have exactly"),
        ('manifest = "m.csv"\nbags = "b"\nspare = "s"', "it has bags, manifest, spare"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / SITE_FILE).write_text(content)
    with pytest.raises(JobError, match=says) as caught:
        read_site_file(tmp_path / SITE_FILE)
    assert caught.value.reason == "SITE_NOT_CONFIGURED"


def test_the_variable_is_for_simulations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(SITES_VARIABLE, raising=False)
    assert find_site_file("a", tmp_path) == tmp_path / SITE_FILE
    monkeypatch.setenv(SITES_VARIABLE, str(tmp_path / "all"))
    assert find_site_file("a", tmp_path) == tmp_path / "all" / "a.toml"

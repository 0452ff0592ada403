"""Clients that start again with another kit, another ledger, and folders that an older version left."""

from __future__ import annotations

import pytest

from histoflare.site.ledgers import open_ledger
from histoflare.site.site_file import read_site_file

from .attack import SITES, Attack
from .restarts import EARLIER_JOB

pytestmark = [pytest.mark.flare, pytest.mark.slow]


def test_a_kit_that_is_not_the_site_s_own_is_not_started(attack: Attack) -> None:
    """It ends before it calls the server."""
    reasons = {"another site's ledger": "LEDGER_FOREIGN"}
    reasons["a file that has changed under its other name"] = "KIT_CHANGED"
    assert {name: code for name, (code, _) in attack.refused.items()} == dict.fromkeys(reasons, 1)
    for name, reason in reasons.items():
        assert f"{reason}: " in attack.refused[name][1] and "Traceback" not in attack.refused[name][1], name


def test_an_earlier_kit_goes_on_with_the_same_ledger(attack: Attack) -> None:
    for site in SITES:
        file = attack.federation.kits.kit(site) / "local" / "histoflare.toml"
        disclosures = open_ledger(read_site_file(file, site)).disclosures()
        runs = [(each.run, each.times) for each in disclosures if each.run in attack.job_ids.values()]
        assert runs == [(attack.job_ids[name], 1) for name in ("before", "after")]


def test_what_earlier_jobs_left_is_gone(attack: Attack) -> None:
    for site in SITES:
        left = attack.federation.kits.kit(site) / EARLIER_JOB
        assert list(left.iterdir()) == []
        assert attack.notes(site).exists()

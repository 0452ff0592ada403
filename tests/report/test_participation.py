"""What a report's rounds say of each site."""

from __future__ import annotations

from histoflare.report.participation import site_rounds, update_left


def test_an_update_that_the_strategy_did_not_use_is_told_with_its_code() -> None:
    rows = [
        {"round": 0, "asked": ["a", "b"], "taking_part": ["a", "b"], "rejected": {"b": "UPDATES_INVALID"}},
        {"round": 1, "asked": ["a", "b"], "taking_part": ["a", "b"]},
    ]
    first, second = site_rounds({"sites": {"a": {}, "b": {}}, "participation": rows})
    assert first.statuses == ("took", "took") and not first.refusals
    assert second.statuses == ("unused", "took")
    assert second.refusals == {"UPDATES_INVALID": [1]}
    assert update_left(rows[0], "b", "unused"), "it left the site all the same, and is paid for"

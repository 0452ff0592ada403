"""How sites fared, in codes and in sentences."""

from __future__ import annotations

from typing import Any

import pytest

from histoflare.reasons import explain
from histoflare.report.outcomes import LONGEST_CODES, find_outcomes, list_codes, say_codes, say_sites
from histoflare.report.participation import say_advice

ASKED = ["a", "b", "c"]


def row(
    index: int, taking_part: list[str], refused: dict[str, str], no_answer: list[str] | None = None
) -> Any:
    return {
        "round": index,
        "asked": ASKED,
        "taking_part": taking_part,
        "refused": refused,
        "no_answer": no_answer or [],
    }


ROWS = [
    row(0, ["a", "b"], {"c": "KIT_CHANGED"}),
    row(1, ["a"], {"b": "TRAINER_DIED", "c": "KIT_CHANGED"}),
    row(2, ["b"], {"c": "KIT_CHANGED"}, ["a"]),
]


def test_a_sentence_says_for_each_site_in_which_rounds_it_was_and_why_not_in_the_others() -> None:
    a, b, c = say_sites(find_outcomes(ROWS))
    assert a.startswith("a: took part in 2 of 3 rounds. No answer in round 3")
    assert b == f"b: took part in 2 of 3 rounds. TRAINER_DIED in round 2: {explain('TRAINER_DIED')}"
    assert c == f"c: KIT_CHANGED: {explain('KIT_CHANGED')}"
    assert say_sites(find_outcomes(ROWS[:1]), rounds=3)[0] == "a: took part in 1 of 3 rounds."


def test_codes_name_their_sites_or_else_what_ended_the_run() -> None:
    assert say_codes(find_outcomes(ROWS)) == "KIT_CHANGED: c; TRAINER_DIED: b"
    assert say_codes(find_outcomes([row(0, ["a"], {})]), "1 of at least 2 updates came").startswith("1 of at")
    assert say_codes(find_outcomes([row(0, ASKED, {})])) == ""


def test_that_a_site_only_evaluates_is_no_fault_of_a_job_that_completed() -> None:
    outcomes = find_outcomes([row(0, ["a", "b"], {"c": "EVALUATION_ONLY"})])
    assert say_codes(outcomes, completed=True) == ""
    assert say_codes(outcomes) == "EVALUATION_ONLY: c"


def test_codes_of_many_sites_are_counted() -> None:
    many = {f"a-hospital-with-a-name-{index}": "LEDGER_MISSING" for index in range(50)}
    said = say_codes(find_outcomes([row(0, [], many)]))
    assert said == "LEDGER_MISSING: 50 sites" and len(said) <= LONGEST_CODES


@pytest.mark.parametrize(
    ("note", "code"),
    [("c: JOB_VERSION", "JOB_VERSION"), ("c: no reply (deployment timeout)", ""), ("c: <x>", "")],
)
def test_a_site_that_did_not_take_the_job(note: str, code: str) -> None:
    """Only what is one of the fixed codes is shown of what a site said."""
    notes = ["server: OK", "a: OK", "invalid_clients: x", "num_ok_sites 0 < required_min_sites 2", note]
    outcomes = find_outcomes([], deployment=notes)
    assert list(outcomes) == ["c"] and outcomes["c"].codes == ([code] if code else [])
    assert say_codes(outcomes) == (f"{code}: c" if code else "")
    assert "<x>" not in "".join(say_sites(outcomes))


def test_what_sites_said_of_the_model_at_the_end() -> None:
    asked = {"taking_part": ["a", "external"], "refused": {"b": "TOO_FEW_PATIENTS"}}
    outcomes = find_outcomes([row(0, ["a", "b"], {})], asked)
    assert outcomes["a"].evaluated == "" and outcomes["external"].evaluated == ""
    assert say_codes(outcomes) == "TOO_FEW_PATIENTS: b"
    said = say_sites(outcomes)
    assert "It evaluated the model." in said[0] and said[1].endswith(explain("TOO_FEW_PATIENTS"))
    assert say_sites(find_outcomes([], asked), rounds=5)[2] == "external: It evaluated the model."


def test_who_gave_no_answer_about_the_model_and_who_refused_the_best_one() -> None:
    asked = {"taking_part": ["a"], "refused": {}, "no_answer": ["external"]}
    best = {"taking_part": [], "refused": {"a": "EVALUATIONS_EXHAUSTED"}, "no_answer": []}
    outcomes = find_outcomes([row(0, ["a"], {})], asked, best=best)
    assert outcomes["external"].unheard and not outcomes["a"].unheard
    assert "No answer" in say_sites(outcomes)[-1]
    assert (
        outcomes["a"].codes == ["EVALUATIONS_EXHAUSTED"] and "EVALUATIONS_EXHAUSTED" in say_sites(outcomes)[0]
    )


def test_advice_is_given_once() -> None:
    outcomes = find_outcomes([row(0, [], {"a": "PROTOCOL_MISMATCH", "b": "PROTOCOL_MISMATCH"})])
    (advice,) = say_advice(list_codes(outcomes))
    assert advice.startswith("PROTOCOL_MISMATCH: ")


def test_a_site_that_gave_no_answer_about_the_model_is_said() -> None:
    rows = [{"round": 0, "asked": ["a", "b"], "taking_part": ["a", "b"]}]
    evaluation = {"asked": ["a", "b", "outside"], "taking_part": ["a"], "refused": {}}
    found = find_outcomes(rows, evaluation | {"no_answer": ["b", "outside"]})
    assert [site for site, outcome in found.items() if outcome.unheard] == ["b", "outside"]
    assert found["a"].evaluated == ""

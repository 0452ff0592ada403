"""The guarantee is what the accountants say of the events that left the sites, no more and no less."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest

from histoflare.privacy.accountant import epsilon
from histoflare.privacy.budget import Budget
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan, UpdateNoise
from histoflare.privacy.spend import Spend
from histoflare.privacy.words import IF_CA_IS_HONEST, say_delta
from histoflare.report.guarantee import build_guarantee
from histoflare.report.guarantee_words import ALL_COLLUDE, say_epsilon, say_guarantee, say_site, say_title
from histoflare.report.participation import site_rounds
from tests.refusals import raises_reason
from tests.report.made import HOSTILE, protected_report, row, stamp

SITES = ["a", "b"]
SAMPLED = DpSgd(noise_multiplier=1.1, sample_rate=0.2, steps=2)
WHOLE = UpdateNoise(noise_multiplier=20.0)


def guarantee(plan: PrivacyPlan, rows: list[dict[str, Any]], /, **changes: Any) -> dict[str, Any]:
    """The guarantee of these rounds, as a script would read it."""
    arguments: dict[str, Any] = {
        "mechanism": plan.mechanism,
        "plan": plan.to_json(),
        "spend": plan.spend().to_json(),
        "rounds": len(rows),
        "rows": rows,
        "sites": site_rounds({"sites": dict.fromkeys(SITES), "participation": rows}),
    }
    read: dict[str, Any] = json.loads(json.dumps(build_guarantee(**arguments | changes), allow_nan=False))
    return read


def stamped(plan: PrivacyPlan, index: int, **changes: Any) -> dict[str, Any]:
    made = row(index, SITES, **changes)
    return made | {"stamps": {site: stamp(plan) for site in made["taking_part"]}}


def figure(value: float) -> dict[str, Any]:
    return {"epsilon": value, "epsilon_is_infinite": False}


INFINITE = {"epsilon": None, "epsilon_is_infinite": True}


@pytest.mark.parametrize(("plan", "tight"), [(SAMPLED, "pld"), (WHOLE, "gaussian")])
def test_every_figure_is_the_accountants(plan: PrivacyPlan, tight: str) -> None:
    found = guarantee(plan, [stamped(plan, index) for index in range(4)])
    assert found["accountants"] == ["filter", "rdp", tight]
    budget = Budget(8.0, 1e-5)
    assert (found["unit"], found["neighbouring_relation"]) == ("patient", "add or remove one")
    for site in SITES:
        spent = found["sites"][site]
        for number, after in enumerate(spent["after_round"], start=1):
            assert (after["round"], after["updates"]) == (number - 1, number)
            assert after["filter"] == figure(budget.spent([plan.spend().times(number)]))
        for accountant in ("rdp", tight):
            expected = epsilon([plan.spend().times(4)], plan.to_json()["delta"], accountant)
            assert spent[accountant] == found["federation"][accountant] == figure(expected)
            assert found["reserved"][accountant] == figure(expected)
        assert spent["filter"] == after["filter"] == found["reserved"]["filter"]
        assert spent[tight]["epsilon"] < spent["rdp"]["epsilon"]
    assert found["epsilon"] == found["federation"]["filter"]["epsilon"] == found["against_server"]["epsilon"]
    cost = budget.cost(plan.spend().times(4))
    assert found["budget"]["share"] == pytest.approx(cost / budget.allowance)
    assert found["budget"]["further"] == budget.room_for(cost, cost)


def test_the_figure_that_the_paper_states_for_its_pooled_slides() -> None:
    """Adnan et al. 2022, second series: q = 32/705, 3,966 steps, noise 4, delta 1e-4: they state 2.90."""
    plan = DpSgd(noise_multiplier=4.0, sample_rate=32 / 705, steps=661, delta=1e-4, published_epsilon=2.90)
    found = guarantee(plan, [stamped(plan, index) for index in range(6)])
    assert found["federation"]["rdp"]["epsilon"] == pytest.approx(2.898, abs=0.001)
    assert found["federation"]["pld"]["epsilon"] == pytest.approx(2.626, abs=0.001)
    assert found["published_note"] is None, "2.90, rounded to what is stated"


def test_the_figure_that_the_paper_states_for_noise_on_updates() -> None:
    """Pan et al. 2024 with noise 0.05 over 150 rounds: C/noise = 20, and the sensitivity is 2C: 122,088.

    By the exact Gaussian, delta 1e-5: mu = sqrt(150) · 40 (Balle & Wang 2018, Theorem 8).
    """
    plan = UpdateNoise(noise_multiplier=0.05, published_epsilon=20.0)
    found = guarantee(plan, [stamped(plan, index) for index in range(150)])
    assert found["federation"]["gaussian"]["epsilon"] == pytest.approx(122_088, abs=1)
    assert found["published_epsilon"] == 20.0
    assert "states ε = 20;" in found["published_note"]
    assert "122\u202f08" in found["published_note"]


SHARED = DpSgd(noise="shared", honest=3, noise_multiplier=4.0, sample_rate=32 / 705, delta=1e-4)
FOUR = ["a", "b", "c", "d"]


def shared(rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """The guarantee of rounds in which four sites share their noise."""
    for each in rows:
        each["stamps"] = {site: stamp(SHARED) | {"trusts_ca": False} for site in each["taking_part"]}
    sites = site_rounds({"sites": dict.fromkeys(FOUR), "participation": rows})
    return guarantee(SHARED, rows, sites=sites, **changes)


def test_noise_that_sites_share_has_a_figure_against_each_adversary() -> None:
    """Adnan's pooled step by four hospitals together, three of whom are counted on."""
    many = guarantee(SHARED, [], sites=[], rounds=3950, spare_rounds=16)
    assert many["reserved"]["rdp"]["epsilon"] == pytest.approx(2.898, abs=5e-4)
    assert many["if_all_collude"]["reserved"]["epsilon"] == pytest.approx(5.755, abs=5e-4)
    found = shared([row(index, FOUR) for index in range(5)])
    spend = SHARED.spend().times(5)
    assert found["federation"]["rdp"] == figure(epsilon([spend], 1e-4))
    few = Budget(8.0, 1e-4).spent([spend])
    assert epsilon([spend.alone()], 1e-4) < few, "another way to count: but no fewer know more"
    assert found["if_all_collude"]["federation"] == figure(few) == found["federation"]["filter"]
    assert found["against"] == "against the server and any 1 other site"
    local = guarantee(SAMPLED, [stamped(SAMPLED, 0)])
    assert (local["against"], local["if_all_collude"]) == (None, None)


def test_what_was_sent_to_a_sum_that_did_not_open_was_spent() -> None:
    rows = [row(index, FOUR) for index in range(3)]
    rows[1]["voids"] = [
        {"sites": FOUR, "no_answer": ["d"], "refused": {}},
        {"sites": ["a", "b", "c"], "no_answer": [], "refused": {}},
    ]
    found = shared(rows)
    assert [after["updates"] for after in found["sites"]["a"]["after_round"]] == [1, 4, 5]
    assert found["sites"]["d"]["updates"] == 4, "whether it was sent is not known"
    spend = SHARED.spend().times(5)
    assert found["federation"]["rdp"] == figure(epsilon([spend], 1e-4))
    assert found["if_all_collude"]["federation"] == found["federation"]["filter"]


def test_a_sum_that_did_not_open_has_the_noise_of_its_own_sites() -> None:
    """Two that collude leave the noise of two in an attempt of four, where the other sums had five."""
    five = [*FOUR, "e"]
    said = "against the server and any {} other site{}".format
    rows = [row(0, five), row(1, five)]
    assert shared(rows)["against"] == said(2, "s")
    rows[1]["voids"] = [{"sites": FOUR, "no_answer": ["d"], "refused": {}}]
    assert shared(rows)["against"] == said(1, "")
    rows[1]["voids"] = [{"sites": FOUR, "no_answer": [], "refused": dict.fromkeys(FOUR, "SUM_TOO_FEW_KNOWN")}]
    assert shared(rows)["against"] == said(2, "s"), "nobody sent anything"


def test_both_figures_stand_in_one_sentence_with_whom_they_are_about() -> None:
    found = shared([row(0, FOUR)])
    said = say_guarantee(found)
    assert f"at δ = {say_delta(1e-4)} {found['against']}" in said and found["against"] in say_title(found)
    assert f"{ALL_COLLUDE}, ε = {say_epsilon(found['if_all_collude']['federation'])}" in said
    assert IF_CA_IS_HONEST not in said
    found["trusts_ca"] = True
    assert f"{found['against']}, {IF_CA_IS_HONEST}" in say_guarantee(found)
    assert f"{found['against']}, {IF_CA_IS_HONEST}" in say_site(found, "a")


def test_a_site_that_missed_rounds_spent_less() -> None:
    found = protected_report(SAMPLED)["guarantee"]
    updates = {site: spent["updates"] for site, spent in found["sites"].items()}
    assert updates == {"amsterdam": 30, "graz": 28, HOSTILE: 30, "nijmegen": 26}
    for site, count in updates.items():
        for accountant in ("rdp", "pld"):
            expected = epsilon([SAMPLED.spend().times(count)], SAMPLED.delta, accountant)
            assert found["sites"][site][accountant] == figure(expected)
    curve = found["sites"]["nijmegen"]["after_round"]
    assert [after["updates"] for after in curve[:9]] == [0, 0, 0, 1, 2, 3, 4, 4, 5]
    assert curve[2]["filter"] == figure(0.0)
    assert curve[6]["filter"] == curve[7]["filter"], "a round it refused costs it nothing"
    assert found["federation"]["rdp"] == found["sites"]["amsterdam"]["rdp"], "the greatest"
    assert found["reserved"]["rounds"] == 30


def test_what_left_and_was_not_used_was_spent_all_the_same() -> None:
    rows = [
        stamped(WHOLE, 0),
        stamped(WHOLE, 1, taking_part=["a"]),  # the answer of b came and was not combined
        stamped(WHOLE, 2, taking_part=["a"], refused={"b": "UPDATES_INVALID"}),  # the server's own code
        stamped(WHOLE, 3, taking_part=["a"], refused={"b": "BUDGET_EXHAUSTED"}),
        stamped(WHOLE, 4, taking_part=["a"], no_answer=["b"]),
        stamped(WHOLE, 5, asked=["a"], taking_part=["a"]),
        stamped(WHOLE, 6, finished=False),
    ]
    found = guarantee(WHOLE, rows)
    assert [after["updates"] for after in found["sites"]["b"]["after_round"]] == [1, 2, 3, 3, 3, 3, 4]


def test_the_gate_has_the_last_word() -> None:
    """A site may have taken more noise than the plan says; and one whose stamp has no event had none."""
    quiet = Spend(noise_multiplier=50.0)
    rows = [stamped(WHOLE, 0), stamped(WHOLE, 1)]
    rows[1]["stamps"]["a"]["spend"] = quiet.to_json()
    rows[1]["stamps"]["b"]["spend"] = None
    found = guarantee(WHOLE, rows)
    assert found["sites"]["a"]["rdp"] == figure(epsilon([WHOLE.spend(), quiet], WHOLE.delta, "rdp"))
    assert found["sites"]["b"]["rdp"] == found["federation"]["rdp"] == INFINITE
    assert (found["epsilon"], found["epsilon_is_infinite"]) == (None, True)


def test_without_stamps_the_plans_event_counts() -> None:
    """In one process nobody stamps."""
    rows = [
        {"asked": taking, "taking_part": taking, "round": index} for index, taking in ((0, SITES), (1, ["a"]))
    ]
    found = guarantee(WHOLE, rows)
    assert found["sites"]["a"]["rdp"] == figure(epsilon([WHOLE.spend().times(2)], WHOLE.delta, "rdp"))
    assert found["sites"]["b"]["rdp"] == figure(epsilon([WHOLE.spend()], WHOLE.delta, "rdp"))


@pytest.mark.parametrize("by_plan", [True, False])
def test_repeatable_noise_voids_the_guarantee(by_plan: bool) -> None:
    plan = UpdateNoise(noise_multiplier=20.0, noise_seed=7 if by_plan else None)
    rows = [stamped(plan, 0)]
    if not by_plan:
        rows[0]["stamps"]["b"]["seeded_noise"] = True
    found = guarantee(plan, rows)
    assert found["seeded_noise"] is True
    assert (found["epsilon"], found["epsilon_is_infinite"]) == (None, True)
    assert found["against_server"] == INFINITE
    assert found["sites"]["b"]["seeded_noise"] is True
    assert found["sites"]["a"]["seeded_noise"] is by_plan
    assert found["federation"]["rdp"]["epsilon"] > 0, "what it would be, for whoever compares"


def test_noise_at_the_server_does_not_protect_against_it() -> None:
    plan = UpdateNoise(noise_multiplier=20.0, noise_location="server")
    found = guarantee(plan, [stamped(plan, 0)])
    assert found["mechanism"] == "server-noise"
    assert found["noise_location"] == "server"
    assert found["against_server"] == INFINITE
    assert found["epsilon"] == Budget(8.0, plan.delta).spent([plan.spend()])


def test_no_noise_is_infinite_and_no_round_is_nothing() -> None:
    bare = UpdateNoise(noise_multiplier=0.0)
    found = guarantee(bare, [stamped(bare, 0)])
    assert found["epsilon_is_infinite"] is True
    assert found["reserved"]["gaussian"] == INFINITE
    found = guarantee(WHOLE, [], rounds=2)
    assert (found["epsilon"], found["sites"]["a"]["updates"]) == (0.0, 0)
    assert found["reserved"]["rdp"] == figure(epsilon([WHOLE.spend().times(2)], WHOLE.delta, "rdp"))


def test_open_says_that_there_is_nothing() -> None:
    open_plan = Open()
    assert guarantee(open_plan, [row(0, SITES)]) == {"mechanism": "open"} | INFINITE
    assert guarantee(open_plan, [row(0, SITES)], plan=None, spend=None) == {"mechanism": "open"} | INFINITE


def test_a_mechanism_without_its_plan_is_no_guarantee() -> None:
    with raises_reason("PRIVACY_INVALID", "update-noise"):
        guarantee(WHOLE, [row(0, SITES)], plan=None)


def test_what_no_noise_covers_is_counted() -> None:
    rows = [stamped(WHOLE, 0), stamped(WHOLE, 1, metrics={})]
    found = guarantee(WHOLE, rows, evaluations=2)
    assert found["not_covered"] == {"evaluations": 2, "metrics_of_rounds": 2}


def test_sites_appear_under_their_pseudonyms() -> None:
    report = protected_report(WHOLE, pseudonyms={"graz": "north", "nijmegen": "rdp"})
    assert set(report["guarantee"]["sites"]) == {"amsterdam", "north", HOSTILE, "rdp"}
    assert set(report["participation"][20]["stamps"]) == {"amsterdam", "north", HOSTILE, "rdp"}
    assert '"graz"' not in json.dumps(report)
    assert '"nijmegen"' not in json.dumps(report)
    again = protected_report(WHOLE)["guarantee"]
    mine: Mapping[str, Any] = report["guarantee"]["sites"]["north"]
    assert mine == again["sites"]["graz"]
    assert report["guarantee"]["federation"] == again["federation"], "a site's name is no accountant's"


def test_equal_sites_are_accounted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def counted(spends: Any, delta: float, accountant: str) -> float:
        spent = list(spends)
        asked.append((accountant, sum(spend.steps for spend in spent)))
        return float(sum(spend.steps for spend in spent))

    monkeypatch.setattr("histoflare.privacy.accountant.epsilon", counted)
    rows = [row(index, SITES) for index in range(100)]
    found = guarantee(SAMPLED, rows)
    assert found["sites"]["b"]["pld"]["epsilon"] == 200
    assert len(asked) == len(set(asked))
    assert sum(accountant == "pld" for accountant, _ in asked) == 1


def test_the_samplers_part_of_delta_is_that_of_all_rounds_at_their_epsilon() -> None:
    rows = [stamped(SAMPLED, index) for index in range(2)]
    found = guarantee(SAMPLED, rows, numbers=10**9)
    expected = (1 + math.exp(found["reserved"]["filter"]["epsilon"])) * 2.0**-113 * 10**9
    assert found["sampler_delta"] == pytest.approx(expected, rel=1e-9)
    assert guarantee(SAMPLED, rows)["sampler_delta"] is None, "nothing is said of what is not known"

"""``histoflare privacy plan``: what a job would cost a site, before anything is booked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from histoflare.cli import app
from histoflare.flare.job import read_job
from histoflare.flare.job_variant import write_variant
from histoflare.flare.site_policy import policy_file, write_first_policy
from histoflare.lab import job_cost
from histoflare.lab.job_facts import find_allowances, find_cost, say_allowance, say_cost
from histoflare.privacy import sampler
from histoflare.privacy.budget import Budget
from histoflare.privacy.ledger import Ledger
from histoflare.privacy.own_policy import OWN_POLICY_FILE
from histoflare.privacy.policy import POLICIES, read_policy
from histoflare.privacy.protocol import PROTOCOL_FILE, write_protocols
from histoflare.privacy.words import ALL_COLLUDE, IF_CA_IS_HONEST, say_against, say_epsilon
from histoflare.site.bookkeeping import Bookkeeping
from histoflare.site.site_file import SITE_FILE, read_site_file
from histoflare.slides.manifest import read_manifest
from tests.flare.bags_on_disk import write_bags
from tests.privacy.ledgers import paths, site_lines
from tests.refusals import raises_reason


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return the file of a site with six training patients, its policies beside it."""
    rows = [f"{n}.tif,p{n},{('glandular', 'solid')[n % 2]},{'test' if n > 5 else 'train'}" for n in range(8)]
    (tmp_path / "m.csv").write_text("\n".join(["slide,patient,label,split", *rows]) + "\n")
    manifest = read_manifest(tmp_path / "m.csv", check_files=False)
    write_bags(manifest, tmp_path / "bags", np.random.default_rng(0))
    lines = site_lines(tmp_path / "steward")
    (tmp_path / SITE_FILE).write_text(f'manifest = "m.csv"\nbags = "bags"\n{lines}')
    for scope in ("dp-patient", "dp-update", "open"):
        (tmp_path / policy_file(scope)).write_bytes((POLICIES / f"{scope}.toml").read_bytes())
    write_first_policy(tmp_path)
    return tmp_path / SITE_FILE


def plan(job: Path, site: Path, *options: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["privacy", "plan", str(job), "--site", str(site), "--json", *options])
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize("name", ["mem_dpsgd", "mem_update_dp"])
def test_a_job_that_fits_is_shown_and_nothing_is_booked(repository: Path, site: Path, name: str) -> None:
    code, facts = plan(repository / "jobs" / name, site)
    assert (code, facts["admitted"], facts["reason"]) == (0, True, None)
    assert facts["spent"] == 0 and facts["patients_to_train_on"] == 6
    budget = Budget(8.0, 1e-5)
    quarter = budget.epsilon_of(0.25 * budget.allowance)
    assert facts["job_alone"] == facts["together"] == pytest.approx(quarter, abs=0.01)
    assert facts["job_alone"] <= quarter
    assert (facts["further"], facts["share"]) == (3, pytest.approx(0.25, abs=0.001))
    assert facts["budget"] == 8.0
    assert Ledger(*paths(site.parent / "steward")).verify().entries == 1


@pytest.mark.parametrize("name", ["mem_dpsgd", "mem_update_dp"])
def test_the_samplers_part_of_delta_is_said_and_counted(
    repository: Path, site: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = read_job(repository / "jobs" / name)
    weights = sum(p.numel() for p in job.task.build_model().parameters())
    numbers = job.plan.numbers(job.rounds, weights)
    assert numbers >= weights * job.plan.spend().steps * job.rounds
    code, facts = plan(repository / "jobs" / name, site)
    assert (code, facts["weights"]) == (0, weights)
    assert facts["sampler_delta"] == pytest.approx((1 + math.exp(8)) * 2.0**-113 * numbers)
    said = CliRunner().invoke(app, ["privacy", "plan", str(job.folder), "--site", str(site), "--how"]).stdout
    assert f"{facts['sampler_delta']:.1g}" in said
    monkeypatch.setattr(sampler, "DISTANCE", 1.01e-6 / ((1 + math.exp(8)) * numbers))
    with raises_reason("PRIVACY_INVALID", f"{numbers:,}"):
        read_job(repository / "jobs" / name)


def test_a_job_that_states_its_noise_is_refused_for_its_sampler_too(
    repository: Path, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"privacy.budget_share": None, "privacy.noise_multiplier": 300.0}
    job = write_variant(repository / "jobs" / "mem_update_dp", tmp_path / "variant", changes)
    assert plan(job, site)[0] == 0
    monkeypatch.setattr(sampler, "DISTANCE", 2.0**-40)
    code, facts = plan(job, site)
    assert (code, facts["reason"]) == (3, "PRIVACY_INVALID")


def test_what_was_spent_before_counts(repository: Path, site: Path) -> None:
    job = read_job(repository / "jobs" / "mem_dpsgd")
    policy = read_policy(site.parent / policy_file("dp-patient"))
    labels = list(job.task.labels)
    for run, before, fits in (("a", 0.0, True), ("b", 0.25, True), ("c", 0.5, True), ("d", 0.75, True)):
        code, facts = plan(repository / "jobs" / "mem_update_dp", site)
        assert (code == 0, facts["admitted"]) == (fits, fits)
        budget = Budget(8.0, 1e-5)
        assert facts["spent"] == pytest.approx(budget.epsilon_of(before * budget.allowance), abs=0.01)
        Bookkeeping(
            read_site_file(site),
            policy,
            job.plan,
            rounds=30,
            weights=1000,
            run=run,
            labels=labels,
            data="bags",
        ).reserve()
    code, facts = plan(repository / "jobs" / "mem_update_dp", site)
    assert (code, facts["admitted"], facts["reason"]) == (3, False, "BUDGET_EXHAUSTED")
    assert facts["spent"] == pytest.approx(8.0, abs=0.01), "four quarters"
    assert facts["together"] > 8.0


SHARED = {
    "privacy.noise": "shared",
    "privacy.honest": 3,
    "privacy.steps": 1,
    "strategy": {"name": "fedsgd", "learning_rate": 0.5, "weighting": "uniform"},
    "transport": {"name": "masked_sum"},
    "least_sites": 4,
    "spare_rounds": 3,
}


@pytest.fixture
def shared_job(repository: Path, tmp_path: Path) -> Path:
    """A job whose sites share the noise, for the scope dp-shared."""
    return write_variant(repository / "jobs" / "mem_dpsgd", tmp_path / "shared", SHARED, scope="dp-shared")


def test_a_job_with_shared_noise_must_fit_both_budgets(shared_job: Path, site: Path) -> None:
    scope = site.with_name(policy_file("dp-shared"))
    scope.write_bytes((POLICIES / "dp-shared.toml").read_bytes())
    job = read_job(shared_job)
    code, facts = plan(shared_job, site)
    assert (code, facts["admitted"]) == (0, True)
    assert facts["spend"]["steps"] == job.rounds + 3, "spare rounds are reserved too"
    first, second = Budget(8.0, 1e-5, 1, 20.0).filters()
    spend = job.plan.spend().times(job.rounds + 3)
    assert facts["job_alone"] == first.budget.spent([spend]) <= first.budget.epsilon
    alone = facts["if_all_collude"]
    assert (alone["budget"], alone["job_alone"]) == (20.0, second.budget.spent([spend.alone()]))
    said = CliRunner().invoke(app, ["privacy", "plan", str(shared_job), "--site", str(site)]).stdout
    assert f"against {first.whom()}" in said and f"{ALL_COLLUDE[1:]}, it spends" in said
    assert f"{job.rounds} rounds and 3 spare ones" in said and IF_CA_IS_HONEST not in said
    own = site.with_name(OWN_POLICY_FILE)
    before = own.read_text()
    own.write_text(f"trust_ca = true\n{before}")
    said = CliRunner().invoke(app, ["privacy", "plan", str(shared_job), "--site", str(site)]).stdout
    assert f"{first.whom()}, {IF_CA_IS_HONEST}" in said, "in the sentence with the figure"
    own.write_text(f"{before}[scope.dp-shared]\nall_collude_epsilon = 14.0\n")
    _, facts = plan(shared_job, site)
    rooms = [Budget(whole, 1e-5).room_for for whole in (8.0, 14.0)]
    costs = [Budget(8.0, 1e-5).cost(spend), Budget(14.0, 1e-5).cost(spend.alone())]
    fits = [room(cost, cost) for room, cost in zip(rooms, costs, strict=True)]
    assert facts["further"] == fits[1] < fits[0] == 3, "as many as fit both"
    own.write_text(f"{before}[scope.dp-shared]\njob_share = 0.5\nall_collude_epsilon = 2.0\n")
    code, facts = plan(shared_job, site)
    assert (code, facts["reason"]) == (3, "BUDGET_EXHAUSTED")
    assert facts["if_all_collude"]["budget"] == 2.0 < facts["if_all_collude"]["together"]


def test_a_sum_of_sites_that_are_not_pinned_is_refused_before_anything_is_reserved(
    shared_job: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job counts on three honest sites, the policy takes one for a colluder: four, with this one."""
    site.with_name(policy_file("dp-shared")).write_bytes((POLICIES / "dp-shared.toml").read_bytes())
    monkeypatch.setattr(job_cost, "kit_of", lambda _: site.parent)
    monkeypatch.setattr(job_cost, "verify_kit", lambda _: None)
    monkeypatch.setattr(job_cost, "participant_of", lambda _: "me")
    own = site.with_name(OWN_POLICY_FILE)
    text = own.read_text()
    pins = [f'site-{n} = "{n:064x}"' for n in range(3)]
    own_pin, twice = f'me = "{9:064x}"', f'again = "{0:064X}"'
    for head, listed, admitted in (
        ("", pins, True),
        ("", pins[:2], False),
        ("", [*pins[:2], own_pin], False),
        ("", [*pins[:2], twice], False),
        ("trust_ca = true", [], True),
    ):
        own.write_text("\n".join([head, text, "[pins]", *listed]))
        code, facts = plan(shared_job, site)
        assert (code, facts["reason"]) == ((0, None) if admitted else (3, "SUM_TOO_FEW_KNOWN"))


def test_a_scope_that_the_site_is_not_in_refuses_the_job_as_another_reason_does(
    repository: Path, site: Path
) -> None:
    own = site.with_name(OWN_POLICY_FILE)
    own.write_text(f'scopes = ["dp-update"]\n{own.read_text()}')
    code, facts = plan(repository / "jobs" / "mem_dpsgd", site)
    assert (code, facts["admitted"], facts["reason"]) == (3, False, "SCOPE_NOT_ALLOWED")
    said = CliRunner().invoke(app, ["privacy", "plan", "mem_dpsgd", "--site", str(site)])
    assert said.exit_code == 3 and "SCOPE_NOT_ALLOWED" in said.stdout


def test_a_lead_sees_both_figures(shared_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["privacy", "plan", str(shared_job), "--how"])
    assert result.exit_code == 0, result.output
    assert "any 1 other site" in result.stdout and f"{ALL_COLLUDE[1:]}, it spends" in result.stdout
    job = read_job(shared_job)
    said = say_cost(job, find_cost(job))
    assert say_against(3) in said and ALL_COLLUDE in said
    (allowed,) = find_allowances(job, POLICIES / "dp-shared.toml")
    second = say_epsilon(allowed["if_all_collude"]["job"]["epsilon"])
    assert f"{ALL_COLLUDE} {second} of 20" in say_allowance(allowed) and allowed["problem"] is None


def test_the_sites_own_epsilon_is_the_budget(repository: Path, site: Path) -> None:
    own = site.with_name(OWN_POLICY_FILE)
    own.write_text(own.read_text() + "[scope.dp-patient]\nepsilon = 2.0\n")
    code, facts = plan(repository / "jobs" / "mem_dpsgd", site)
    assert (code, facts["budget"], facts["reason"]) == (3, 2.0, "BUDGET_EXHAUSTED")


def test_a_policy_says_how_much_of_a_budget_one_job_may_take(
    repository: Path, site: Path, tmp_path: Path
) -> None:
    job = repository / "jobs" / "mem_dpsgd"
    for share, reason in ((0.5, None), (0.51, "JOB_SHARE_EXCEEDED")):
        asked = write_variant(job, tmp_path / str(share), {"privacy.budget_share": share})
        assert plan(asked, site)[1]["reason"] == reason
    own = site.with_name(OWN_POLICY_FILE)
    own.write_text(own.read_text() + "[scope.dp-patient]\njob_share = 0.2\n")
    assert plan(job, site)[1]["reason"] == "JOB_SHARE_EXCEEDED"


def test_bags_are_looked_at(repository: Path, site: Path) -> None:
    next((site.parent / "bags").glob("*.h5")).unlink()
    code, facts = plan(repository / "jobs" / "mem_dpsgd", site)
    assert (code, facts["reason"]) == (3, "COHORT_INVALID")
    site.write_text(f"{site.read_text()}prepare = true\n")
    assert plan(repository / "jobs" / "mem_dpsgd", site)[0] == 0, "the site makes them itself"


def test_a_lead_sees_the_cost_beside_what_a_policy_allows(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = repository / "jobs" / "mem_dpsgd"
    result = CliRunner().invoke(app, ["privacy", "plan", str(job)])
    assert result.exit_code == 0
    assert "spends ε = 4.5 of 8 at δ = 1e-5; 3 more like it fit" in result.stdout
    whole = write_variant(job, tmp_path / "whole", {"privacy.budget_share": 1.0})
    result = CliRunner().invoke(app, ["privacy", "plan", str(whole), "--json"])
    assert (result.exit_code, json.loads(result.stdout)["reason"]) == (3, "JOB_SHARE_EXCEEDED")


def test_the_wrong_policy_and_no_budget_are_said(repository: Path, site: Path) -> None:
    other = str(site.parent / policy_file("dp-update"))
    code, facts = plan(repository / "jobs" / "mem_dpsgd", site, "--policy", other)
    assert (code, facts["reason"]) == (3, "PRIVACY_MISMATCH")
    arguments = ["privacy", "plan", str(repository / "jobs" / "mem_fedavg"), "--site", str(site)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "has no budget" in str(result.exception)


def test_what_a_site_would_refuse_for_other_reasons_is_said(
    repository: Path, site: Path, tmp_path: Path
) -> None:
    job = repository / "jobs" / "mem_dpsgd"
    write_protocols(site.parent / PROTOCOL_FILE, [read_job(job).protocol])
    assert plan(job, site)[1]["reason"] is None
    for number, (changes, reason) in enumerate(
        [
            ({"purpose": "marketing"}, "PURPOSE_NOT_ALLOWED"),
            ({"rounds": 29}, "PROTOCOL_MISMATCH"),
            ({"strategy.weighting": "samples"}, "WEIGHT_NOT_ALLOWED"),
        ]
    ):
        variant = write_variant(job, tmp_path / f"variant-{number}", changes)
        code, facts = plan(variant, site)
        assert (code, facts["reason"]) == (3, reason)


@pytest.mark.parametrize(
    ("listed", "reason"),
    [('"fedavg", ', "STRATEGY_NOT_ALLOWED"), ('"mem", ', "MODEL_NOT_ALLOWED"), (None, "PURPOSE_NOT_ALLOWED")],
)
def test_what_the_site_takes_no_part_in_is_said_of_training_and_of_evaluations(
    repository: Path, site: Path, tmp_path: Path, listed: str | None, reason: str
) -> None:
    own = site.with_name(OWN_POLICY_FILE)
    text = own.read_text()
    own.write_text(text.replace('"research"', '"teaching"') if listed is None else text.replace(listed, ""))
    code, facts = plan(repository / "jobs" / "mem_dpsgd", site)
    assert (code, facts["reason"]) == (3, reason)
    job = write_variant(repository / "jobs" / "mem_evaluate", tmp_path / "ask", {}, scope="dp-patient")
    result = CliRunner().invoke(app, ["privacy", "plan", str(job), "--site", str(site)])
    assert result.exit_code == 3 and reason in result.stdout


def test_what_the_ledger_does_not_say_is_unknown(repository: Path, site: Path) -> None:
    job = repository / "jobs" / "mem_dpsgd"
    read, policy = read_job(job), read_policy(site.parent / policy_file("dp-patient"))
    labels = list(read.task.labels)
    Bookkeeping(
        read_site_file(site),
        policy,
        read.plan,
        rounds=30,
        weights=1000,
        run="first",
        labels=labels,
        data="bags",
    ).reserve()
    paths(site.parent / "steward")[0].unlink()
    code, facts = plan(job, site)
    assert (code, facts["reason"], facts["spent"], facts["together"]) == (3, "LEDGER_MISSING", None, None)


def test_of_another_sites_ledger_nothing_is_shown(
    repository: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histoflare.lab.job_cost.site_around", lambda _: "another")
    ledger, budget = Ledger(*paths(site.parent / "steward")), Budget(8.0, 1e-5)
    spend = read_job(repository / "jobs" / "mem_dpsgd").plan.spend()
    roles = {f"p{n}": "test" if n < 6 else "train" for n in range(8)}
    ledger.reserve(run="r", about="a", spend=spend, rounds=1, roles=roles, budget=budget)
    code, facts = plan(repository / "jobs" / "mem_dpsgd", site)
    assert (code, facts["reason"], facts["spent"]) == (3, "LEDGER_FOREIGN", None), "and not ROLE_CHANGED"


def test_a_site_without_a_ledger_knows_of_nothing_spent(repository: Path, site: Path) -> None:
    site.write_text('manifest = "m.csv"\nbags = "bags"\n')
    code, facts = plan(repository / "jobs" / "mem_dpsgd", site)
    assert (code, facts["reason"], facts["spent"]) == (3, "LEDGER_MISSING", None)
    assert facts["job_alone"] == pytest.approx(4.4, abs=0.01)


def test_an_evaluation_has_no_epsilon(repository: Path, site: Path, tmp_path: Path) -> None:
    for seconds, code in ((10, 0), (None, 3)):
        job = write_variant(
            repository / "jobs" / "mem_evaluate",
            tmp_path / f"ask-{seconds}",
            {"answer_seconds": seconds},
            scope="dp-patient",
        )
        result = CliRunner().invoke(app, ["privacy", "plan", str(job), "--site", str(site)])
        assert result.exit_code == code
        assert "10 evaluations" in result.stdout
        assert ("PRIVACY_INVALID" in result.stdout) == (code == 3)


def test_it_measures_whether_a_round_will_be_done_by_its_public_time(
    repository: Path, site: Path, tmp_path: Path
) -> None:
    slow = {"answer_seconds": 1, "privacy.steps": 2000}
    for name, changes, fits in (("quick", {}, True), ("slow", slow, False)):
        job = write_variant(repository / "jobs" / "mem_dpsgd", tmp_path / name, changes)
        _, facts = plan(job, site)
        assert (2 * facts["likely_seconds"] <= facts["answer_seconds"]) == fits
        shown = CliRunner().invoke(app, ["privacy", "plan", str(job), "--site", str(site)]).stdout
        assert ("ask the lead for answer_seconds" in " ".join(shown.split())) != fits


def test_the_table_says_it_in_words(repository: Path, site: Path) -> None:
    arguments = ["privacy", "plan", str(repository / "jobs" / "mem_dpsgd"), "--site", str(site)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    for words in ("spent so far", "this job", "the kit allows", "this site allows", "would admit the job"):
        assert words in result.stdout
    assert "spends ε = 4.5 of 8 of the most exposed patient at δ = 1e-5; 3 more like it fit" in result.stdout
    assert "RDP" not in result.stdout
    how = CliRunner().invoke(app, [*arguments, "--how"]).stdout
    assert "DP-SGD" in how and "by RDP at its best order" in how and "by pld" in how

"""A site's policy: read whole, or nothing leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from histoflare.privacy.budget import Budget
from histoflare.privacy.policy import POLICIES, Policy, Protection, read_policy
from histoflare.privacy.spend import Spend
from tests.refusals import raises_reason

GOOD = """
name = "open"
mechanism = "open"
metrics = ["auc", "validation/auc"]
counts = false
minimum_patients = 5
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return path


def test_a_policy_says_what_may_leave(tmp_path: Path) -> None:
    policy = read_policy(written(tmp_path, GOOD))
    assert policy == Policy("open", "open", ("auc", "validation/auc"), False, 5)
    metrics = {"auc": 0.5, "accuracy": 0.9, "validation/auc": None, "n_patients": 12.0, "test/n_slides": 3.0}
    assert policy.allowed_metrics(metrics) == {"auc": 0.5, "validation/auc": None}
    assert policy.numbers == (), "none, unless it says so"
    listing = read_policy(written(tmp_path, f'{GOOD}numbers = ["steps"]\n'))
    assert listing.numbers == ("steps",)
    counting = read_policy(written(tmp_path, GOOD.replace("false", "true")))
    assert set(counting.allowed_metrics(metrics)) == {"auc", "validation/auc", "n_patients", "test/n_slides"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("counts = false", ""), ["counts: "]),
        (("counts = false", "counts = 1"), ["counts: ", "not 1"]),
        (("counts = false", "counts = false\nextra = 1"), ["extra: "]),
        (
            ('mechanism = "open"', 'mechanism = "none"'),
            ["mechanism: ", "update-noise, update-noise-shared, server-noise", "'none'"],
        ),
        (("counts = false", 'counts = false\npurposes = ["research"]'), ["purposes: ", "policy.toml"]),
        (("counts = false", "counts = false\nmodels = []"), ["models: ", "policy.toml"]),
        (('["auc", "validation/auc"]', '"auc"'), ["metrics: ", "'auc'"]),
        (("counts = false", 'counts = false\nnumbers = "steps"'), ["numbers: ", "'steps'"]),
        (('mechanism = "open"', 'mechanism = "laplace"'), ["mechanism: ", "'laplace'", "L1"]),
        (("= 5", "= 0"), ["minimum_patients: ", "not 0"]),
        (("= 5", "= true"), ["minimum_patients: ", "not True"]),
        (('name = "open"', 'name = ""'), ["name: "]),
        (("minimum_patients", "minimum patients"), ["TOML", "line 6"]),
    ],
)
def test_what_is_wrong_with_a_policy_is_said(
    tmp_path: Path, change: tuple[str, str], says: list[str]
) -> None:
    with raises_reason("POLICY_INVALID", *says):
        read_policy(written(tmp_path, GOOD.replace(*change)))


def test_no_policy_is_an_error(tmp_path: Path) -> None:
    with raises_reason("POLICY_INVALID", tmp_path / "policy.toml"):
        read_policy(tmp_path / "policy.toml")


def test_the_policies_of_the_package_can_be_read_and_are_named_as_their_files() -> None:
    paths = sorted(POLICIES.glob("*.toml"))
    assert paths
    assert [read_policy(path).name for path in paths] == [path.stem for path in paths]


PROTECTED = """
name = "dp"
mechanism = "dp-sgd"
metrics = ["auc"]
counts = false
minimum_patients = 5
[protection]
epsilon = 8
delta = 1e-5
evaluations = 3
"""


def test_a_mechanism_comes_with_its_budget(tmp_path: Path) -> None:
    policy = read_policy(written(tmp_path, PROTECTED))
    assert policy.protection == Protection(8, 1e-5, 3, ("patient",), seeded_noise=False)
    more = PROTECTED + 'records = ["patient", "slide"]\nseeded_noise = true\n'
    assert read_policy(written(tmp_path, more)).protection == Protection(
        8, 1e-5, 3, ("patient", "slide"), True
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[protection]", "[other]"), ["protection: ", "[protection]"]),
        (('"dp-sgd"', '"open"'), ["protection: ", "open"]),
        (("counts = false", "counts = true"), ["counts: ", "false"]),
        (('["auc"]', '["auc", "validation/auc"]'), ["metrics: ", "validation/"]),
        (("epsilon = 8\n", ""), ["protection.epsilon: "]),
        (("epsilon = 8", "epsilon = 0"), ["protection.epsilon: ", "not 0"]),
        (("epsilon = 8", "epsilon = inf"), ["protection.epsilon: "]),
        (("epsilon = 8", "epsilon = nan"), ["protection.epsilon: "]),
        (("epsilon = 8", "epsilon = true"), ["protection.epsilon: "]),
        (("1e-5", "0.5"), ["protection.delta: ", "0.01", "not 0.5"]),
        (("1e-5", "0.0"), ["protection.delta: "]),
        (("evaluations = 3", "evaluations = -1"), ["protection.evaluations: "]),
        (("evaluations = 3", "evaluations = 1.5"), ["protection.evaluations: "]),
        (("evaluations = 3", "evaluations = 3\nrecords = []"), ["protection.records: "]),
        (("evaluations = 3", 'evaluations = 3\nrecords = ["tile"]'), ["protection.records: "]),
        (("evaluations = 3", "evaluations = 3\nseeded_noise = 1"), ["protection.seeded_noise: "]),
        (("evaluations = 3", "evaluations = 3\nbudget = 1"), ["protection.budget: "]),
    ],
)
def test_what_is_wrong_with_a_budget_is_said(
    tmp_path: Path, change: tuple[str, str], says: list[str]
) -> None:
    with raises_reason("POLICY_INVALID", *says):
        read_policy(written(tmp_path, PROTECTED.replace(*change)))


@pytest.mark.parametrize(
    ("mechanism", "entries", "is_fine"),
    [
        ("dp-sgd", 'exhausted = "leave out"', True),
        ("dp-sgd-shared", 'exhausted = "leave out"', True),
        ("update-noise", 'exhausted = "refuse"', True),
        ("update-noise", 'exhausted = "leave out"', False),
        ("update-noise-shared", 'exhausted = "leave out"', False),
        ("server-noise", 'exhausted = "leave out"', False),
        ("dp-sgd", 'exhausted = "leave out"\nsites_per_patient = 2', False),
        ("dp-sgd", "exhausted = true", False),
        ("dp-sgd", "exhausted = []", False),
    ],
)
def test_patients_are_left_out_only_where_epsilon_covers_it(
    tmp_path: Path, mechanism: str, entries: str, is_fine: bool
) -> None:
    text = PROTECTED.replace("evaluations = 3", f"evaluations = 3\n{entries}")
    path = written(tmp_path, text.replace('"dp-sgd"', f'"{mechanism}"'))
    if is_fine:
        protection = read_policy(path).protection
        assert protection is not None and protection.leaves_out == ("leave out" in entries)
    else:
        with raises_reason("POLICY_INVALID", "protection.exhausted: "):
            read_policy(path)


def test_the_scopes_of_the_package_refuse() -> None:
    kept = [read_policy(path).protection for path in POLICIES.glob("*.toml")]
    assert not any(each.leaves_out for each in kept if each is not None)


def test_the_scope_of_shared_noise_has_a_budget_against_each_adversary() -> None:
    protection = read_policy(POLICIES / "dp-shared.toml").protection
    assert protection is not None and protection.budget() == Budget(8.0, 1e-5, 1, 20.0, 1)
    # A job that takes a quarter of the budget and counts on three sites takes no more of the other.
    budget = protection.budget()
    for rate, steps in ((1.0, 60), (0.1, 500), (0.02, 4000)):
        spend = Spend(budget.calibrate(rate, steps, 0.25), rate, steps, honest=3)
        first, second = (kept.budget.share_of(kept.cost([kept.price(spend)])) for kept in budget.filters())
        assert second <= first <= 0.25


@pytest.mark.parametrize("colluders", [0, -1, 1.0, True, 10_001])
def test_no_site_is_taken_to_keep_to_itself_what_all_of_them_see(tmp_path: Path, colluders: object) -> None:
    # Each site sees the sum and knows its own noise: against the server and none there is no figure.
    said = str(colluders).lower()
    with raises_reason("POLICY_INVALID", "protection.colluders", colluders):
        read_policy(
            written(tmp_path, PROTECTED.replace("evaluations = 3", f"evaluations = 3\ncolluders = {said}"))
        )


def test_without_a_word_all_others_together_have_the_same_budget() -> None:
    assert Protection(4.0, 1e-5, 1).budget().if_all_collude == Budget(4.0, 1e-5)


def test_every_protected_scope_of_the_package_keeps_noise_secret_and_counts_at_home() -> None:
    protected = [read_policy(path) for path in POLICIES.glob("*.toml") if path.stem != "open"]
    assert len(protected) == 4
    for policy in protected:
        assert policy.protection is not None and not policy.protection.seeded_noise
        assert not policy.counts


def test_the_scopes_of_the_package_have_one_budget() -> None:
    """A ledger counts the jobs of all of them: a job of one would else use up the budget of another."""
    protections = [read_policy(path).protection for path in POLICIES.glob("*.toml")]
    assert len({each.budget() for each in protections if each is not None}) == 1

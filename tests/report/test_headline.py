"""The sentence at the top is true of the figures below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from histoflare.privacy.plan import UpdateNoise
from histoflare.report.headline import closing_words, say_threshold, write_headline
from histoflare.rounds.comparison import SiteComparison
from histoflare.rounds.evaluation import Figure
from tests.report.made import full_report, metrics, protected_report, row

QUIET = UpdateNoise(noise_multiplier=60.0)
SITES = ["amsterdam", "graz", "nijmegen"]


def complete(**changes: Any) -> dict[str, Any]:
    """A report in which everybody took part in both rounds."""
    figures = metrics(0.7, 15)
    sites = {site: SiteComparison(40, 30, figures, figures, figures) for site in SITES}
    everybody = {"participation": [row(0, SITES), row(1, SITES)], "rounds": 2, "site_figures": sites}
    return full_report(**everybody | changes)


def models(*centres: float) -> dict[str, Any]:
    return {f"s{number}": metrics(centre, 46) for number, centre in enumerate(centres)}


@pytest.mark.parametrize(
    ("federated", "local", "said"),
    [
        (0.82, (0.6, 0.65), "is better than every site's own model: the intervals do not overlap."),
        (
            0.82,
            (0.6, 0.8),
            "is better than 1 of 2 sites' own models; with the other 1 the intervals overlap.",
        ),
        (
            0.82,
            (0.78, 0.8),
            "scores higher than the sites' own models do on average, but the intervals overlap",
        ),
        (
            0.78,
            (0.8, 0.82),
            "scores lower than the sites' own models do on average, but the intervals overlap",
        ),
        (
            0.8,
            (0.8, 0.8),
            "scores the same as the sites' own models do on average, and the intervals overlap",
        ),
        (0.6, (0.8, 0.82), "is worse than every site's own model: the intervals do not overlap."),
        (0.7, (0.5, 0.9), "is better than 1 of 2 sites' own models and worse than 1 of them."),
        (0.7, (0.9, 0.7), "is worse than 1 of 2 sites' own"),
    ],
)
def test_the_verdict_follows_the_intervals(federated: float, local: tuple[float, ...], said: str) -> None:
    """Every interval reaches 0.06 to both sides, so figures more than 0.12 apart differ."""
    headline = write_headline(complete(federated=metrics(federated, 46), local=models(*local)))
    assert said in headline.verdict
    assert (
        f"{federated:.3f} (95 % interval {federated - 0.06:.2f} to {federated + 0.06:.2f})" in headline.result
    )
    assert f"{sum(local) / len(local):.3f} on average" in headline.result


def test_a_site_whose_own_model_does_better_at_home_is_named() -> None:
    home, away = metrics(0.83, 15), metrics(0.79, 15)
    sites = {site: SiteComparison(40, 30, away, away, away) for site in SITES}
    sites[SITES[0]] = SiteComparison(40, 30, home, away, away)
    report = complete(federated=metrics(0.82, 46), local=models(0.6, 0.65), site_figures=sites)
    (said,) = (caution for caution in write_headline(report).cautions if "own test patients" in caution)
    assert f"{SITES[0]} 0.830 (federated 0.790)" in said and SITES[1] not in said


def test_few_patients_can_tell_nothing_however_far_apart_the_intervals() -> None:
    headline = write_headline(complete(federated=metrics(0.95, 19), local=models(0.2)))
    assert headline.verdict == "With 19 test patients this run cannot tell which model is better."
    assert not any("one place" in caution for caution in headline.cautions)


def test_guessing_is_called_guessing() -> None:
    said = "Guessing gives 0.5, which lies within the federated model's interval."
    assert said in write_headline(complete(federated=metrics(0.55, 46))).cautions
    assert said not in write_headline(complete(federated=metrics(0.57, 46))).cautions
    three = complete(federated=metrics(0.37, 46), task={"labels": ["a", "b", "c"], "encoder": "e:v1"})
    assert any("Guessing gives 0.33" in caution for caution in write_headline(three).cautions)


@pytest.mark.parametrize(("pooled", "said"), [(0.82, "overlap"), (0.97, "is better"), (0.6, "is worse")])
def test_what_all_slides_in_one_place_give_is_said(pooled: float, said: str) -> None:
    cautions = write_headline(complete(federated=metrics(0.8, 46), pooled=metrics(pooled, 46))).cautions
    assert any("in one place" in caution and said in caution for caution in cautions)


def test_a_cohort_that_was_not_asked_about_the_model_is_said() -> None:
    cautions = write_headline(complete(evaluation_refused={"external-c": "MANIFEST_UNREADABLE"})).cautions
    (said,) = (caution for caution in cautions if "external-c" in caution)
    assert said.startswith("external-c gave no figures on the model: ") and "manifest" in said


def test_a_subset_is_said_first() -> None:
    missing = complete(
        participation=[row(0, SITES, taking_part=SITES[:2], refused={"nijmegen": "TOO_FEW_PATIENTS"})] * 2
    )
    headline = write_headline(missing)
    assert headline.verdict.startswith("Not every site took part in every round it was asked in.")
    assert "Never took part: nijmegen" in " ".join(headline.cautions)
    partly = complete(
        participation=[row(0, SITES), row(1, SITES, taking_part=SITES[:2], no_answer=["nijmegen"])]
    )
    headline = write_headline(partly)
    assert headline.verdict.startswith("Not every site took part")
    assert "nijmegen 1 of 2" in " ".join(headline.cautions)
    assert not write_headline(complete()).verdict.startswith("Not every site")
    nothing = complete(federated=None, participation=[row(0, SITES, taking_part=SITES[:2])], rounds=1)
    assert write_headline(nothing).verdict.startswith("Not every site took part")


def test_a_site_without_a_turn_is_no_missing_site() -> None:
    """Cyclic weight transfer asks one site a round."""
    turns = [row(index, SITES, asked=[site], taking_part=[site]) for index, site in enumerate(SITES)]
    headline = write_headline(complete(participation=turns, rounds=3))
    assert "federated model" in headline.verdict.partition(".")[0]
    assert "asks only some of the sites" in headline.cautions[0]


def test_a_site_that_only_refused_is_not_forgotten() -> None:
    rows = [row(0, [*SITES, "bonn"], taking_part=SITES, refused={"bonn": "EVALUATION_ONLY"})]
    cautions = " ".join(write_headline(complete(participation=rows, rounds=1)).cautions)
    assert "Never took part: bonn." in cautions
    assert "Not in the figures: bonn." in cautions


def test_a_run_that_its_patience_ended_says_so() -> None:
    said = {"metric": "validation/auc", "patience": 3, "best": 0.7312, "best_round": 0}
    rows = [row(0, SITES, validation=0.7312), row(1, SITES, validation=0.7, stopped=said)]
    cautions = " ".join(write_headline(complete(participation=rows, rounds=5)).cautions)
    assert "Stopped after 2 of 5 rounds" in cautions and "above 0.731 for 3 rounds" in cautions
    assert "Only 2 of 5" not in cautions
    report = complete()
    report["protocol"]["stop"] = {"rounds": 2, "model": "last", "patience": 3}
    assert "patience never counted" in " ".join(write_headline(report).cautions)
    report["participation"][0]["validation"] = 0.5
    assert "patience never counted" not in " ".join(write_headline(report).cautions)


def test_a_run_that_was_broken_off_says_so() -> None:
    rows = [row(0, SITES), row(1, SITES, taking_part=[], finished=False)]
    cautions = " ".join(write_headline(complete(participation=rows, rounds=5)).cautions)
    assert "Only 1 of 5 rounds were finished" in cautions
    nobody = [row(0, SITES, taking_part=[], no_answer=SITES)]
    cautions = " ".join(write_headline(complete(participation=nobody, rounds=1)).cautions)
    assert "In 1 round nobody took part" in cautions


def test_a_run_that_was_given_up_says_why() -> None:
    last = row(1, SITES, taking_part=[], finished=False, given_up="1 of at least 2 updates came")
    cautions = " ".join(write_headline(complete(participation=[row(0, SITES), last], rounds=5)).cautions)
    assert "Only 1 of 5 rounds were finished (1 of at least 2 updates came)" in cautions


def late(*rounds: int, sites: Sequence[str] = SITES) -> list[dict[str, Any]]:
    """Five rounds; the last site is late in some of them, counted from 1."""
    there = list(sites[:-1])
    rows = [row(index, list(sites)) for index in range(5)]
    for number in rounds:
        rows[number - 1] |= {"taking_part": there, "no_answer": [sites[-1]]}
    return rows


@pytest.mark.parametrize(
    ("rounds", "said"), [((3,), "round 3"), ((3, 4), "rounds 3–4"), ((1, 3, 4), "rounds 1, 3–4")]
)
def test_a_late_sites_rounds_are_said_and_that_they_are_spent(rounds: tuple[int, ...], said: str) -> None:
    name = "nijmegen"
    open_run = write_headline(complete(participation=late(*rounds), rounds=5))
    assert f"{name} was late in {said}: no update came in time." in open_run.cautions
    private = write_headline(protected_report(QUIET, participation=late(*rounds)))
    assert (
        f"{name} was late in {said}: no update came in time; its ε of {said} is spent all the same, and not "
        "in the figures here." in private.cautions
    )
    assert not [caution for caution in write_headline(complete()).cautions if "late" in caution]


def test_of_a_site_that_was_sent_no_task_nothing_is_spent() -> None:
    rows = late(2, 4)
    rows[3]["absent"] = ["nijmegen"]
    cautions = write_headline(protected_report(QUIET, participation=rows)).cautions
    (said,) = [caution for caution in cautions if "nijmegen was" in caution]
    assert "its ε of round 2 is spent" in said
    assert said.endswith(" nijmegen was not there in round 4, and was sent no task.")


def test_the_console_says_that_a_run_ended_early() -> None:
    rows = [row(index, SITES) for index in range(3)]
    rows[-1]["stopped"] = {"metric": "AUC", "best": 0.71, "patience": 2}
    assert "Stopped after 3 of 30 rounds" in closing_words([complete(participation=rows, rounds=30)])


def test_what_the_guarantee_rests_on_is_said() -> None:
    assert write_headline(protected_report(QUIET)).privacy.endswith("It holds if no patient is at two sites.")
    assert "two sites" not in write_headline(complete()).privacy


def test_the_console_closes_with_the_pages_sentences() -> None:
    by_chance = {"federated": metrics(0.5, 46), "participation": late(3)}
    private = protected_report(QUIET, **by_chance)
    said = closing_words([private])
    headline = write_headline(private)
    assert headline.privacy in said and "ε = " in headline.privacy
    assert "At chance: Guessing gives 0.5" in said
    for part in ("Guessing gives", "was late in round 3"):
        (caution,) = [caution for caution in headline.cautions if part in caution]
        assert caution in said
    assert closing_words([complete(federated=metrics(0.8, 46))]) == "", "nothing protects it, it is better"
    assert "At chance" in closing_words([complete(federated=metrics(0.5, 46))])


def test_what_some_seeds_say_is_said_of_these() -> None:
    reports = [
        protected_report(QUIET, seed=seed, federated=metrics(centre, 46))
        for seed, centre in ((1, 0.5), (2, 0.9), (3, 0.5))
    ]
    said = closing_words(reports)
    assert "Seed 1, 3: At chance: Guessing gives 0.5" in said
    assert said.count("This job spends ε = ") == 1 and not said.startswith("Seed")


def test_the_agreed_metric_is_spoken_of_or_its_absence() -> None:
    agreed = {"metric": "auc", "sha256": "0"}
    assert "an AUC of" in write_headline(complete(protocol=agreed)).result
    headline = write_headline(complete(protocol=agreed, federated=metrics(0.8, 46, auc=False)))
    assert headline.metric == "balanced_accuracy"
    assert "The agreed figure, AUC, does not exist here: all slides are of one class." in headline.cautions


def test_an_interval_that_does_not_exist_decides_nothing() -> None:
    made = metrics(0.8, 46)
    bare = replace(made, figures={**made.figures, "balanced_accuracy": Figure(0.8)})
    assert "cannot tell" in write_headline(complete(federated=bare)).verdict
    assert "no models of single sites" in write_headline(complete(local={})).verdict


def test_a_good_ranking_with_the_wrong_threshold_is_said() -> None:
    def said(auc: float, balanced: float) -> str:
        return say_threshold({"auc": auc, "balanced_accuracy": balanced}, ["glandular", "solid"], "here")

    assert said(1.0, 0.5).startswith("AUC 1.000 and balanced accuracy 0.500 (here)")
    few = {"auc": 1.0, "balanced_accuracy": 0.5, "balanced_accuracy_no_interval": "2 patients: no interval"}
    assert say_threshold(few, ["glandular", "solid"], "here") == "", "two patients show no threshold"
    assert "at least 1.00" in said(1.0, 0.5)
    assert said(0.7, 0.55) == "" and said(0.9, 0.8) == "" and said(0.5, 0.5) == ""
    assert say_threshold({"auc": 1.0, "balanced_accuracy": 0.5}, ["a", "b", "c"], "here") == ""
    figures = metrics(0.5, 46)
    figures = replace(figures, figures=figures.figures | {"auc": Figure(1.0)})
    assert any(
        caution.startswith("AUC 1.000") for caution in write_headline(complete(federated=figures)).cautions
    )


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=30))
def test_a_ranking_has_a_threshold_as_good_as_its_auc_says(rows: list[tuple[int, bool]]) -> None:
    scores, labels = np.array([score for score, _ in rows]), np.array([label for _, label in rows])
    if labels.all() or not labels.any():
        return
    best = max(
        (np.mean(scores[labels] >= at) + np.mean(scores[~labels] < at)) / 2 for at in [*np.unique(scores), 99]
    )
    assert best >= 1 - np.sqrt((1 - roc_auc_score(labels, scores)) / 2) - 1e-9

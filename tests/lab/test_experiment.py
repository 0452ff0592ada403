"""An experiment evaluates the models that its sites really have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from histoflare.bags.bag import read_bag
from histoflare.bags.cohort import FeatureCache, load_cohort
from histoflare.bags.models.mem import MemSettings
from histoflare.commands.console import progress, watch_on
from histoflare.errors import JobError
from histoflare.flare.job import Job, read_job
from histoflare.lab.bounds import rounds_run
from histoflare.lab.chapters import run_chapters
from histoflare.lab.experiment import Experiment, Runtime
from histoflare.lab.federation import Federated
from histoflare.lab.pages import write_site_pages
from histoflare.lab.run import Outcome, run_experiment, run_watched
from histoflare.lab.watch import Watch
from histoflare.model_file import MODEL_FILE
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan, UpdateNoise
from histoflare.report.consortium import say_missing
from histoflare.report.guarantee_words import say_epsilon
from histoflare.rounds import bounds
from histoflare.rounds.comparison import compare
from histoflare.rounds.local import predict
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.strategies.cyclic import CyclicWeightTransfer
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import load_site_data
from histoflare.slides.manifest import read_manifest
from tests.flare.bags_on_disk import relabel, write_site
from tests.masks.made import TASK as MASK_TASK
from tests.masks.made import make_site
from tests.refusals import raises_reason
from tests.report.made import full_report
from tests.report.made_masks import segmentation_facts
from tests.report.parsed import parse

SMALL_MEM = MemSettings(memories=2, dim=4, hidden=8)


def test_personal_layers_are_evaluated(tmp_path: Path, repository: Path) -> None:
    job = read_job(repository / "jobs" / "mem_fedavg")
    task = replace(job.task, model=SMALL_MEM, learning_rate=0.02)
    job = replace(job, task=task, strategy=FedAvg(share=["head"]), rounds=2)
    sites = {site: write_site(tmp_path, site, slides=20) for site in ("a", "b")}
    experiment = Experiment(job, sites, {}, Runtime.INPROCESS)
    with progress() as bars:
        report = run_watched(experiment, tmp_path / "out", watch_on(bars)).report
    cohorts = {
        site: load_cohort(
            site,
            read_manifest(w.files["manifest"], task.labels, False),
            w.files["bags"],
            task.target,
            task.encoder,
        )
        for site, w in sites.items()
    }
    run = run_in_process(task, cohorts, job.strategy, job.rounds, job.seed)
    own = compare(task, job.strategy, run.state, cohorts, site_states=run.site_states, seed=job.seed)
    shared = compare(task, job.strategy, run.state, cohorts, seed=job.seed)
    assert own.federated != shared.federated, "the blocks matter here"
    assert report["federated"]["accuracy"] == own.federated["accuracy"].value
    assert report["federated"]["auc"] == own.federated["auc"].value


def small_job(repository: Path, plan: PrivacyPlan) -> Job:
    """The MEM job with two rounds of a tiny model under ``plan``."""
    job = read_job(repository / "jobs" / "mem_fedavg")
    task = replace(job.task, model=SMALL_MEM, learning_rate=0.02)
    return replace(job, task=task, strategy=FedAvg(), rounds=2, plan=plan.settled(2, 1000), asked=plan)


def reported(job: Job, folder: Path, *epsilons: float) -> tuple[dict[str, Any], Progress]:
    sites = {site: write_site(folder, site, slides=20) for site in ("a", "b")}
    with progress() as bars:
        experiment = Experiment(job, sites, {}, Runtime.INPROCESS)
        outcome = run_watched(experiment, folder / "out", watch_on(bars), epsilons)
    return outcome.report, bars


@pytest.mark.parametrize("epsilons", [(), (1.0,)])
def test_the_second_chapter_has_what_its_own_noise_costs(
    epsilons: tuple[float, ...], tmp_path: Path, repository: Path
) -> None:
    """Against its own settings without noise, and not against the first chapter's; empty if not trained."""
    plan = DpSgd(budget_epsilon=3.0, budget_share=1.0, sample_rate=0.5, batch_size=5, steps=2, noise_seed=5)
    sites = {site: write_site(tmp_path, site, slides=20) for site in ("a", "b")}
    first, second = (
        Experiment(small_job(repository, each), sites, {}, Runtime.INPROCESS) for each in (Open(), plan)
    )
    report = run_chapters(first, second, tmp_path / "out", Watch(), epsilons).report
    if not epsilons:
        assert report["cost_of_noise"] == {}
        return
    (noiseless,) = (entry for entry in report["accuracy_against_epsilon"] if entry["epsilon_is_infinite"])
    for figure in ("auc", "balanced_accuracy"):
        less = noiseless[figure] - report["federated"][figure]
        assert report["cost_of_noise"][figure] == pytest.approx(less)


@pytest.mark.parametrize(
    "plan",
    [
        UpdateNoise(budget_epsilon=3.0, budget_share=1.0, noise_seed=5),
        DpSgd(budget_epsilon=3.0, budget_share=1.0, sample_rate=0.5, batch_size=5, steps=2, noise_seed=5),
    ],
)
def test_accuracy_against_epsilon(plan: UpdateNoise | DpSgd, tmp_path: Path, repository: Path) -> None:
    job = small_job(repository, plan)
    report, bars = reported(job, tmp_path, 1.0, 3.0)
    own, smaller, unprotected = report["accuracy_against_epsilon"]
    assert [entry["is_own"] for entry in (own, smaller, unprotected)] == [True, False, False]
    assert own["balanced_accuracy"] == report["federated"]["balanced_accuracy"], "it is not run again"
    assert own["epsilon"] == report["guarantee"]["reserved"]["filter"]["epsilon"]
    assert own["epsilon"] == pytest.approx(3.0, rel=0.1)
    assert smaller["epsilon"] == pytest.approx(1.0, rel=0.1)
    assert unprotected["epsilon_is_infinite"] is True
    assert own["noise_multiplier"] < smaller["noise_multiplier"]
    cohorts = {site: load_site_data(site, job.task, made) for site, made in sites_of(tmp_path).items()}
    for entry, tried in (
        (smaller, replace(plan, budget_epsilon=1.0, budget_share=1.0).settled(2, 1000)),
        (unprotected, plan.settled(2, 1000).without_noise(job.seed)),
    ):
        run = run_in_process(job.task, cohorts, job.strategy, 2, job.seed, tried)
        found = compare(job.task, job.strategy, run.state, cohorts, seed=job.seed).federated
        assert found is not None
        assert entry["balanced_accuracy"] == found["balanced_accuracy"].value
        assert entry["auc"] == found["auc"].value
    local = [site["local_unprotected"]["balanced_accuracy"] for site in report["sites"].values()]
    assert own["local_mean"] == unprotected["local_mean"] == pytest.approx(sum(local) / 2)
    (bar,) = [task for task in bars.tasks if task.description == "other budgets"]
    assert (bar.completed, bar.total) == (4, 4)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Balanced accuracy against ε" in page
    for model in ("local", "pooled"):
        stated = report["bounds"][model]
        assert stated["mechanism"] == plan.mechanism and stated["seeded_noise"] is True
        assert stated["epsilon"] == pytest.approx(3.0, rel=0.1)
        assert f"{model} (ε = {say_epsilon(stated)}, void)" in page
        assert f"{model}, unprotected" in page
        free = report["bounds"][f"{model}_unprotected"]
        assert free["epsilon_is_infinite"] is True and free["noise_multiplier"] == 0.0
        assert (free["steps"], free["clip_norm"]) == (stated["steps"], stated["clip_norm"])
    (bar,) = [task for task in bars.tasks if task.description.startswith("bounds")]
    assert (bar.completed, bar.total) == (6, 6)


def sites_of(folder: Path) -> dict[str, SiteConfiguration]:
    return {
        site: SiteConfiguration({"manifest": folder / site / "manifest.csv", "bags": folder / site / "bags"})
        for site in ("a", "b")
    }


def test_other_budgets_are_tried_only_where_asked(tmp_path: Path, repository: Path) -> None:
    noisy = small_job(repository, UpdateNoise(noise_multiplier=30.0))
    report, bars = reported(noisy, tmp_path / "noisy")
    assert report["accuracy_against_epsilon"] == []
    assert report["guarantee"]["sites"]["a"]["updates"] == 2
    assert report["guarantee"]["plan"]["noise_multiplier"] == 30.0
    assert "other budgets" not in {task.description for task in bars.tasks}
    report, _ = reported(small_job(repository, Open()), tmp_path / "open", 1.0)
    assert report["accuracy_against_epsilon"] == []
    assert report["guarantee"] == {"mechanism": "open", "epsilon": None, "epsilon_is_infinite": True}


def test_a_budget_that_no_noise_reaches_is_left_out(tmp_path: Path, repository: Path) -> None:
    noisy = small_job(repository, UpdateNoise(noise_multiplier=30.0))
    report, _ = reported(noisy, tmp_path, 1e-9)
    assert [entry["epsilon_is_infinite"] for entry in report["accuracy_against_epsilon"]] == [False, True]


def test_sites_with_images_get_their_own_pages(tmp_path: Path, repository: Path) -> None:
    job = replace(read_job(repository / "jobs" / "dhunet_fedavg"), task=MASK_TASK, rounds=30)
    sites = {
        site: SiteConfiguration({"images": make_site(tmp_path / site, seed, patients=3, side_px=64)})
        for seed, site in enumerate(("tnbc-1", "dsb-2"))
    }
    cohorts = {site: load_site_data(site, job.task, at) for site, at in sites.items()}
    federated = Federated(job.task.build_model().state_dict(), {}, [])
    own = {"tnbc-1": federated.state}  # the other site's own model failed
    outcome = Outcome(full_report(**segmentation_facts()), cohorts, federated, local=own)
    experiment = Experiment(job, sites, {}, Runtime.INPROCESS)
    with progress() as bars:
        paths = write_site_pages(experiment, outcome, tmp_path / "out", watch_on(bars))
    assert [path.name for path in paths] == ["site-tnbc-1.html", "site-dsb-2.html"]
    for site, path in zip(sites, paths, strict=True):
        parsed = parse(path)
        masks = 3 if site in own else 2  # given, federated, alone
        assert len(parsed.named("img")) == (2 + masks) * 3
        assert parsed.text.count("Mask of the model of this site alone") == 3 * (site in own)
        _, rows = predict(job.task, federated.state, cohorts[site], "test").listed()
        assert all(f"Dice {float(dice):.3f}" in parsed.text for _, _, dice in rows)


def test_a_site_that_does_not_fit_ends_nobody_elses_run(tmp_path: Path, repository: Path) -> None:
    job = small_job(repository, Open())
    sites = {site: write_site(tmp_path, site, slides=20) for site in ("a", "b")}
    sites["broken"] = write_site(tmp_path, "broken", encoder="other:v1")
    sites["untrained"] = relabel(write_site(tmp_path, "untrained"), "test", column="split")
    outside = {
        "external": relabel(write_site(tmp_path, "external"), "solid"),
        "external-c": SiteConfiguration({"manifest": tmp_path / "nowhere.csv", "bags": tmp_path / "nowhere"}),
    }
    with progress() as bars:
        experiment = Experiment(job, sites, outside, Runtime.INPROCESS)
        outcome = run_watched(experiment, tmp_path / "out", watch_on(bars))
        steps = {task.description: (task.completed, task.total) for task in bars.tasks}
        assert steps["reading the sites' bags again"] == (3, 3) and steps["evaluation"] == (1, 1)
        pages = write_site_pages(experiment, outcome, tmp_path / "out", watch_on(bars))
    codes = {"broken": "COHORT_INVALID", "untrained": "SITE_HAS_NO_TRAINING_DATA"}
    report = outcome.report
    assert list(report["sites"]) == ["a", "b"]
    assert [row["refused"] for row in report["participation"]] == [codes] * 2
    assert [row["taking_part"] for row in report["participation"]] == [["a", "b"]] * 2
    assert report["evaluation_refused"] == {"external-c": "MANIFEST_UNREADABLE"}
    assert sorted(outcome.refused) == ["broken", "external-c", "untrained"]
    assert [page.name for page in pages] == ["site-a.html", "site-b.html", "site-external.html"]
    # the external cohort is of one class
    assert report["external"]["auc"] is None and report["external"]["accuracy"] is not None
    assert say_missing(report) == ["No AUC for external: all slides are of one class."]
    without = run_watched(
        Experiment(job, {site: sites[site] for site in ("a", "b")}, {}, Runtime.INPROCESS),
        tmp_path / "without",
        watch_on(bars),
    )
    assert report["model_sha256"] == without.report["model_sha256"]


def test_a_run_that_no_site_fits_says_every_fault(tmp_path: Path, repository: Path) -> None:
    sites = {site: write_site(tmp_path, site, encoder="other:v1") for site in ("a", "b")}
    experiment = Experiment(small_job(repository, Open()), sites, {}, Runtime.INPROCESS)
    with progress() as bars, raises_reason("COHORT_INVALID", "\na: ", "\nb: ", "other:v1"):
        run_watched(experiment, tmp_path / "out", watch_on(bars))


def test_a_site_whose_training_fails_is_left_out_of_the_figures(tmp_path: Path, repository: Path) -> None:
    sites = {site: write_site(tmp_path, site, slides=20) for site in ("a", "b", "gone")}
    experiment = Experiment(small_job(repository, Open()), sites, {}, Runtime.INPROCESS)
    damage(sites["gone"])
    with progress() as bars:
        outcome = run_watched(experiment, tmp_path / "out", watch_on(bars))
    assert list(outcome.report["sites"]) == ["a", "b"]
    assert [row["refused"] for row in outcome.report["participation"]] == [{"gone": "BAG_DAMAGED"}] * 2
    assert outcome.refused["gone"].startswith("BAG_DAMAGED: ")


def test_the_loss_of_each_round_is_shown(tmp_path: Path, repository: Path) -> None:
    sites = {site: write_site(tmp_path, site, slides=20) for site in ("a", "b")}
    job = small_job(repository, Open())
    with progress() as bars:
        run_watched(Experiment(job, sites, {}, Runtime.INPROCESS), tmp_path / "out", watch_on(bars))
    cohorts = {site: load_site_data(site, job.task, made) for site, made in sites.items()}
    (*_, last) = run_in_process(job.task, cohorts, job.strategy, job.rounds, job.seed).losses
    (bar,) = [task for task in bars.tasks if task.description.startswith("federated rounds")]
    assert bar.description == f"federated rounds, loss {sum(last.values()) / 2:.3g}"
    assert (bar.completed, bar.total) == (2, 2)


def test_bounds_take_as_many_rounds_as_patience_left(repository: Path) -> None:
    job = read_job(repository / "jobs" / "mem_fedavg")
    rows: list[dict[str, object]] = [{"taking_part": ["a"]}, {"taking_part": ["a"]}]
    ran = Federated(state={}, site_states={}, participation=rows)
    assert rounds_run(job, ran) == job.rounds > 2
    rows[-1]["stopped"] = {"patience": 1}
    assert rounds_run(job, ran) == 2


def damage(site: SiteConfiguration) -> None:
    """Flip a bit of the content of a site's first bag; its header stays as it was."""
    bag = min(site.files["bags"].glob("*.h5"))
    content = bytearray(bag.read_bytes())
    content[content.find(read_bag(bag).features.astype("<f4").tobytes())] ^= 1
    bag.write_bytes(content)


def run_with_fault_after_round_1(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], outside: bool
) -> Outcome:
    """Run the job over sites, of which the last is damaged when its first round is over."""
    sites = {site: write_site(tmp_path, site, slides=20) for site in names}
    external = {site: write_site(tmp_path, site) for site in ("external-a", "external-b") if outside}
    experiment = Experiment(small_job(repository, Open()), sites, external, Runtime.INPROCESS)
    seen = []

    def damaging(*args: Any, **kwargs: Any) -> Any:
        heard = kwargs["on_round"]

        def on_round(index: int, *rest: Any) -> None:
            heard(index, *rest)
            if not seen:
                seen.append(index)
                for site in (sites[names[-1]], *list(external.values())[-1:]):
                    damage(site)
                object.__setattr__(args[1][names[-1]], "cache", FeatureCache(0))

        return run_in_process(*args, **{**kwargs, "on_round": on_round})

    monkeypatch.setattr("histoflare.lab.federation.run_in_process", damaging)
    with progress() as bars:
        return run_watched(experiment, tmp_path / "out", watch_on(bars))


def test_a_site_that_fails_mid_run_costs_its_own_figures_only(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run_with_fault_after_round_1(tmp_path, repository, monkeypatch, ("a", "b", "c"), outside=True)
    report = outcome.report
    assert [row["taking_part"] for row in report["participation"]] == [["a", "b", "c"], ["a", "b"]]
    assert list(report["sites"]) == list(report["local_on_all_sites"]) == ["a", "b"]
    assert report["pooled"]["n_patients"] == report["federated"]["n_patients"] == 16
    assert outcome.refused["c"].startswith("BAG_DAMAGED: ")
    assert sorted(outcome.refused) == ["c", "external-b"]
    assert report["external"]["n_patients"] == 10
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.json", "report.html", MODEL_FILE}


def test_a_bound_that_diverges_costs_its_own_figures_only(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = bounds.train_alone

    def diverging(*args: Any, name: str, **kwargs: Any) -> Any:
        if name in ("b", bounds.POOLED):
            raise JobError("The training loss became nan.", reason="TRAINING_FAILED")
        return train(*args, name=name, **kwargs)

    monkeypatch.setattr(bounds, "train_alone", diverging)
    report, _ = reported(small_job(repository, Open()), tmp_path)
    assert report["pooled"] is None and report["sites"]["b"]["local"] is None
    assert report["sites"]["a"]["local"] and report["sites"]["b"]["federated"]
    assert list(report["local_on_all_sites"]) == ["a"] and list(report["bounds"]) == ["local"]
    assert (tmp_path / "out" / MODEL_FILE).is_file() and (tmp_path / "out" / "report.html").is_file()


def test_a_delta_too_large_for_the_pool_costs_the_pool_only(tmp_path: Path, repository: Path) -> None:
    """10 patients agreed for a site and 20 for two: δ = 0.08 is at most 1/10, and more than 1/20."""
    plan = DpSgd(noise_multiplier=2.0, sample_rate=0.5, batch_size=5, steps=1, delta=0.08, noise_seed=5)
    report, _ = reported(small_job(repository, plan), tmp_path)
    assert report["pooled"] is None and "pooled" not in report["bounds"]
    assert report["sites"]["a"]["local"] and report["federated"]


def test_a_cycle_in_which_every_site_fails_says_why(tmp_path: Path, repository: Path) -> None:
    job = replace(small_job(repository, Open()), strategy=CyclicWeightTransfer())
    sites = {site: write_site(tmp_path, site) for site in ("a", "b")}
    for site in sites.values():
        damage(site)
    experiment = Experiment(job, sites, {}, Runtime.INPROCESS)
    with (
        progress() as bars,
        raises_reason("BAG_DAMAGED", "\na: ", "\nb: "),
    ):
        run_watched(experiment, tmp_path / "out", watch_on(bars))


def test_a_runtime_that_there_is_not_is_refused(tmp_path: Path, repository: Path) -> None:
    job = small_job(repository, Open())
    with raises_reason("JOB_INVALID", "'cloud'", "poc, simulator, inprocess"):
        run_experiment(job, {}, tmp_path / "out", runtime="cloud")


def test_a_warning_that_nobody_asked_for_is_one_of_pythons(tmp_path: Path, repository: Path) -> None:
    sites = {site: write_site(tmp_path, site, slides=20) for site in ("a", "b")}
    sites["broken"] = write_site(tmp_path, "broken", encoder="other:v1")
    heard: list[str] = []
    job = small_job(repository, Open())
    with pytest.warns(UserWarning, match=r"^broken is left out \(COHORT_INVALID\)"):
        outcome = run_experiment(job, sites, tmp_path / "out")
    again = run_experiment(job, sites, tmp_path / "again", on_warning=heard.append)
    assert [said.partition(":")[0] for said in heard] == ["broken is left out (COHORT_INVALID)"]
    assert outcome.report["model_sha256"] == again.report["model_sha256"]


def test_a_federation_of_one_says_so_and_progress_reads_as_a_line(tmp_path: Path, repository: Path) -> None:
    heard, lines = [], []
    run_experiment(
        small_job(repository, Open()),
        {"alone": write_site(tmp_path, "alone", slides=20)},
        tmp_path / "out",
        on_progress=lambda step: lines.append(str(step)),
        on_warning=heard.append,
    )
    assert ["alone" in said for said in heard] == [True]
    assert any(line.endswith("1 of 1") for line in lines) and not any("Step(" in line for line in lines)

"""Jobs are data: every job of the project is read, and what no job says is refused."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoflare.errors import JobError
from histoflare.flare.admission import check_patience
from histoflare.flare.allowed import ALLOWED_CLASSES
from histoflare.flare.application import check_submission
from histoflare.flare.job import MECHANISMS, TASKS, read_application, read_job
from histoflare.flare.job_files import (
    CONFIG_FOLDER,
    CONFIGURATIONS,
    JOB_FILE,
    PROTOCOL_FILE,
    check_configuration,
    configuration_text,
    read_tables,
    read_toml,
)
from histoflare.flare.job_schema import EVALUATION
from histoflare.flare.job_variant import parse_settings, read_preset, try_variant, write_variant
from histoflare.flare.workflow import AskingScatterAndGather
from histoflare.privacy.accountant import epsilon
from histoflare.privacy.budget import Budget
from histoflare.privacy.policy import POLICIES, read_policy
from histoflare.privacy.protocol import hash_protocol
from histoflare.rounds.strategies import STRATEGIES
from histoflare.slides.splits import SplitRule
from tests.refusals import raises_reason

from ..rounds.throwaway import Swarm
from .evaluation_jobs import write_evaluation

JOBS = sorted((Path(__file__).resolve().parents[2] / "jobs").iterdir())
FEDAVG = next(job for job in JOBS if job.name == "mem_fedavg")


def test_the_sites_are_asked_about_a_model_under_the_split_it_was_trained_under(tmp_path: Path) -> None:
    settings = ["protocol.split.folds=5", "protocol.split.fold=2", "protocol.stop.patience=3"]
    job = read_job(write_variant(FEDAVG, tmp_path / "fold", parse_settings(settings)))
    asked = read_job(write_evaluation(FEDAVG.parent / "mem_evaluate", tmp_path / "asked", job))
    assert asked.split == job.split == SplitRule(None, folds=5, fold=2)
    assert asked.protocol == job.protocol and asked.patience is None


def test_a_job_can_end_by_patience() -> None:
    job = try_variant(FEDAVG, parse_settings(["protocol.stop.patience=5"]))
    assert (job.patience, job.best_metric) == (5, job.protocol["metric"])
    named = try_variant(FEDAVG, parse_settings(["protocol.stop.patience=5", "best_metric=auc"]))
    assert (named.patience, named.best_metric) == (5, "auc")
    assert read_job(FEDAVG).patience is read_job(FEDAVG).best_metric is None
    for setting in ("patience=0", "patience=true", "patience=2.5", 'patience="5"', "patients=5"):
        with raises_reason("PROTOCOL_INVALID", "stop: "):
            try_variant(FEDAVG, parse_settings([f"protocol.stop.{setting}"]))
    private = next(job for job in JOBS if job.name == "mem_dpsgd")
    with raises_reason("JOB_INVALID", "privacy: ", "stop.patience"):
        try_variant(private, parse_settings(["protocol.stop.patience=5"]))
    cyclic = next(job for job in JOBS if job.name == "mem_cwt")
    for folder, asks_some in ((cyclic, []), (FEDAVG, ["strategy.clients_per_round=2"])):
        with raises_reason("JOB_INVALID", "stop.patience", read_job(folder).strategy.name):
            try_variant(folder, parse_settings(["protocol.stop.patience=5", *asks_some]))


def test_a_policy_that_keeps_the_figure_admits_no_patience() -> None:
    job = try_variant(FEDAVG, parse_settings(["protocol.stop.patience=5", "best_metric=auc"]))
    policy = read_policy(POLICIES / "open.toml")
    check_patience(policy, job)
    check_patience(replace(policy, metrics=()), read_job(FEDAVG))
    with pytest.raises(JobError) as caught:
        check_patience(replace(policy, metrics=("auc",)), job)
    assert caught.value.reason == "METRIC_NOT_ALLOWED"


def test_the_presets_are_the_papers_experiments() -> None:
    """Adnan et al. 2022, series 1 and 2 (Table 3, first row); Pan et al. 2024, III.A and eq. 15."""

    def job_of(name: str, preset: str) -> Any:
        folder = next(job for job in JOBS if job.name == name)
        return try_variant(folder, read_preset(folder, preset).changes)

    series2, per_site = job_of("mem_dpsgd", "adnan"), job_of("mem_dpsgd", "per-site")
    series1, feddp = job_of("mem_fedavg", "adnan-series1"), job_of("dhunet_fedavg", "feddp")
    for job in (series2, per_site, series1):
        task = job.task
        assert (task.patch_px, task.mpp, task.features, task.model.input_norm) == (1000, 0.5, 1024, "none")
        assert tuple(task.labels) == ("LUAD", "LUSC") and job.protocol["metric"] == "accuracy"
        assert task.encoder.startswith("densenet121:") and task.max_patches >= 512
    assert (series2.task.optimizer, series2.task.learning_rate) == ("adam", 2e-5)
    plan = series2.plan
    assert (plan.clip_norm, plan.noise_multiplier, plan.delta, plan.batch_size) == (1.0, 4.0, 1e-4, 32)
    assert plan.published_epsilon == 2.90 and plan.sample_rate == pytest.approx(32 / 165, abs=1e-5)
    assert plan.steps * series2.rounds == round(180 * 165 / 32)
    assert series2.split == SplitRule(0.2) and series2.protocol == per_site.protocol
    assert (series1.task.optimizer, series1.task.learning_rate, series1.task.local_epochs) == ("sgd", 0.01, 1)
    assert (series1.rounds, series1.split, series1.strategy.weighting) == (250, SplitRule(0.3), "samples")
    assert (feddp.rounds, feddp.split, feddp.strategy.weighting) == (150, SplitRule(0.3), "uniform")
    assert (feddp.task.local_steps, feddp.task.batch_size) == (5, 24)
    assert (feddp.task.window_px, feddp.task.stride_px, feddp.task.patch_px) == (1000, 500, 224)


def test_the_preset_of_shared_noise_is_the_pooled_run_of_the_paper() -> None:
    """Adnan et al. 2022, Table 4: 32 of 213 + 168 + 165 + 159 in a step, 180 epochs of them, noise 4."""
    folder = next(job for job in JOBS if job.name == "linear_shared")
    preset = read_preset(folder, "adnan-shared")
    job, pooled = try_variant(folder, preset.changes), 213 + 168 + 165 + 159
    plan: Any = job.plan
    assert (plan.clip_norm, plan.noise_multiplier, plan.delta, plan.published_epsilon) == (
        1.0,
        4.0,
        1e-4,
        2.9,
    )
    assert plan.sample_rate == pytest.approx(32 / pooled, rel=1e-12) and plan.batch_size == 32
    assert job.rounds == round(180 * pooled / 32) == 3966 and plan.steps == 1
    assert (plan.mechanism, plan.honest, job.least_sites) == ("dp-sgd-shared", 3, 4)
    assert (job.strategy.name, job.transport.name, preset.scope) == ("fedsgd", "masked_sum", "dp-shared")
    papers = read_preset(next(job for job in JOBS if job.name == "mem_dpsgd"), "adnan").changes
    assert {name: preset.changes[name] for name in preset.changes if name.startswith("task.model.")} == {
        name: value for name, value in papers.items() if name.startswith("task.model.")
    }
    assert (job.task.features, job.task.model.memories) == (1024, 10)
    whole = plan.spend().times(job.rounds + job.spare_rounds)
    assert plan.budget().admits(plan.budget().cost(whole)) and plan.budget_epsilon == 2.9
    against = [epsilon([plan.spend().times(job.rounds).against(k)], 1e-4) for k in (4, 3, 2, 1)]
    assert against == pytest.approx([2.444, 2.898, 3.704, 5.755], abs=5e-4)


@pytest.mark.parametrize(("name", "patients", "part"), [("private-small", 40, 0.5), ("private", 300, 0.25)])
def test_the_presets_for_cohorts_are_jobs_of_the_shared_scope(name: str, patients: int, part: float) -> None:
    """The divisor is the sample's expected size at four hospitals, and the policy's limits hold the job."""
    folder = next(job for job in JOBS if job.name == "linear_shared")
    preset = read_preset(folder, name)
    job = try_variant(folder, preset.changes)
    plan: Any = job.plan
    assert (preset.scope, plan.mechanism, job.transport.name) == ("dp-shared", "dp-sgd-shared", "masked_sum")
    assert plan.batch_size == plan.sample_rate * 4 * patients
    assert job.task.model_name == "linear" and not job.task.model.bias and job.strategy.one_step
    whole = plan.spend().times(job.rounds + job.spare_rounds)
    share = plan.budget().share_of(plan.budget().cost(whole))
    assert part - 0.01 <= share <= part <= 0.5
    other = {"protocol.target.name": "classes", "protocol.target.class_shares": [4, 1]}
    assert try_variant(folder, {**preset.changes, **other}).task.target.class_shares == (4, 1)


def test_folds_stand_in_place_of_the_share(tmp_path: Path) -> None:
    job = try_variant(FEDAVG, parse_settings(["protocol.split.folds=5", "protocol.split.fold=2"]))
    assert job.split == SplitRule(None, folds=5, fold=2)
    both = ["protocol.split.test_fraction=0.3", "protocol.split.folds=5", "protocol.split.fold=2"]
    assert try_variant(FEDAVG, parse_settings(both)).split == SplitRule(0.3, folds=5, fold=2)
    changed = try_variant(FEDAVG, parse_settings(["protocol.split.test_fraction=0.3"]))
    assert changed.split == SplitRule(0.3)
    assert hash_protocol(changed.protocol) != hash_protocol(read_job(FEDAVG).protocol)
    for setting in ("protocol.split.seed=1", "protocol.split.test_fraction=0.25", "protocol.split.folds=5"):
        with raises_reason("PROTOCOL_INVALID", "test_fraction", "folds"):
            try_variant(FEDAVG, parse_settings([setting]))


def test_another_fold_of_a_job_leaves_its_share_as_it_is(tmp_path: Path) -> None:
    both = ["protocol.split.test_fraction=0.3", "protocol.split.folds=5", "protocol.split.fold=0"]
    job = write_variant(FEDAVG, tmp_path / "job", parse_settings(both))
    for settings, split in (
        (["fold=1"], SplitRule(0.3, folds=5, fold=1)),
        (["folds=4"], SplitRule(0.3, folds=4, fold=0)),
        (["test_fraction=0.2"], SplitRule(0.2)),
    ):
        changes = parse_settings([f"protocol.split.{setting}" for setting in settings])
        assert try_variant(job, changes).split == split


def test_there_are_jobs() -> None:
    assert "mem_fedavg" in [job.name for job in JOBS]


@pytest.mark.parametrize("folder", JOBS, ids=lambda folder: folder.name)
class TestEveryJob:
    def test_is_four_files_of_which_two_never_vary(self, folder: Path) -> None:
        names = {path.name for path in (folder / CONFIG_FOLDER).iterdir()}
        assert names == {*CONFIGURATIONS, JOB_FILE, PROTOCOL_FILE}
        for name in CONFIGURATIONS:
            assert (folder / CONFIG_FOLDER / name).read_text() == configuration_text(name)
        assert {path.name for path in folder.iterdir()} <= {"meta.json", "app", "presets"}
        assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".toml"}

    def test_meta_names_the_job(self, folder: Path) -> None:
        assert json.loads((folder / "meta.json").read_text())["name"] == folder.name

    def test_protects_its_updates_as_the_scope_it_names_asks_for(self, folder: Path) -> None:
        job = read_job(folder)
        policy = read_policy(POLICIES / f"{job.scope}.toml")
        if job.kind == EVALUATION:  # it trains nothing
            return
        assert job.plan.mechanism == policy.mechanism
        if policy.protection is not None:
            budget = Budget(policy.protection.epsilon, policy.protection.delta)
            whole = budget.cost(job.plan.spend().times(job.rounds))
            assert budget.admits(whole), "it fits the budget of a site that has spent nothing"
            assert not policy.counts and job.strategy.weighting == "uniform"

    def test_names_the_consortium_s_protocol(self, folder: Path, repository: Path) -> None:
        assert read_job(folder).purpose == "research"
        question = "dhunet_fedavg" if folder.name.startswith("dhunet") else "mem_fedavg"
        agreed = read_job(repository / "jobs" / question).protocol
        assert hash_protocol(read_job(folder).protocol) == hash_protocol(agreed), (
            "one protocol for each question"
        )

    def test_survives_the_rewriting_of_nvflare_job_submit(self, folder: Path, tmp_path: Path) -> None:
        """FLARE's command loads each configuration, and submits what it has written out again."""
        from nvflare.tool.job.job_cli import prepare_job_config

        shutil.copytree(folder, tmp_path / "job")
        arguments = SimpleNamespace(job_folder=str(folder), config_file=None, app_config=None, debug=True)
        prepare_job_config(arguments, ["app"], str(tmp_path / "job"))
        assert read_tables(tmp_path / "job" / CONFIG_FOLDER) == read_tables(folder / CONFIG_FOLDER)

    def test_every_preset_makes_a_job(self, folder: Path) -> None:
        for path in folder.glob("presets/*"):
            preset = read_preset(folder, path.stem)
            made = try_variant(folder, preset.changes)
            assert made.kind == read_job(folder).kind and preset.changes


def test_the_classes_of_the_two_files_exist_are_allowed_and_take_their_arguments() -> None:
    found = []

    def walk(content: Any) -> None:
        if isinstance(content, dict):
            found.extend([content] if "path" in content else [])
            content = list(content.values())
        for part in content if isinstance(content, list) else []:
            walk(part)

    walk(list(CONFIGURATIONS.values()))
    assert len(found) == 6
    for component in found:
        assert component["path"] in ALLOWED_CLASSES
        module, _, name = component["path"].rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        assert set(component["args"]) <= set(inspect.signature(kind).parameters), component["path"]
    assert {part["path"] for part in found} == set(ALLOWED_CLASSES)


@pytest.mark.parametrize("registry", [TASKS, MECHANISMS, STRATEGIES])
def test_every_name_in_a_registry_is_a_class(registry: dict[str, str]) -> None:
    for place in registry.values():
        module, _, name = place.partition(":")
        assert inspect.isclass(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", CONFIGURATIONS)
class TestConfiguration:
    def test_its_layout_may_differ(self, name: str) -> None:
        check_configuration(name, json.dumps(CONFIGURATIONS[name]).encode())

    @pytest.mark.parametrize(
        "change",
        [
            lambda text: text.replace('"format_version": 2', '"format_version": 2.0'),
            lambda text: text.replace('"format_version": 2', '"format_version": true'),
            lambda text: text.replace('"format_version": 2,', '"format_version": 2, "x": 1,'),
            lambda text: text.replace('"format_version": 2,', '"format_version": 1, "format_version": 2,'),
            lambda text: text.replace('"format_version": 2,', ""),
            lambda text: text.replace("histoflare.flare.", "histoflare.flare.x."),
            lambda text: text.replace(
                '"task_data_filters": []', '"task_data_filters": [{"path": "os.system"}]'
            ),
            lambda text: text.replace('"args": {}', '"args": {"x": "{WORKSPACE}"}'),
            lambda text: "﻿" + text,
            lambda text: text + "{}",
            lambda text: "[" * 100_000,
            lambda text: '{"a": ' * 10_000,
            lambda text: '{"a": ' + "9" * 6000 + "}",
            lambda text: text.encode("utf-16").decode("latin-1"),
            lambda text: "null",
            lambda text: "",
        ],
    )
    def test_anything_else_is_refused(self, name: str, change: Callable[[str], str]) -> None:
        changed = change(configuration_text(name))
        assert changed != configuration_text(name)
        with pytest.raises(JobError) as caught:
            check_configuration(name, changed.encode("utf-8", "surrogatepass"))
        assert caught.value.reason == "JOB_INVALID"


class TestToml:
    @pytest.mark.parametrize(
        "text",
        [
            "a = " + "[" * 5000 + "]" * 5000,
            "\n".join(["a = ["] + ["["] * 5000),
            "a." * 400 + "b = 1",
            "a = " + "9" * 900,
            "a = 0x" + "f" * 900,
            "a = 1e999",
            "a = nan",
            "a = 1979-05-27",
            'a = "' + "x" * 5000 + '"',
            'a = "\\u001b[31m"',
            'a = """one\ntwo"""',
            '"a b" = 1',
            "a = 1\na = 2",
            "a = [[[[[[1]]]]]]",
            "[a.b.c.d.e.f]\ng = 1",
            "x\r= 1",
            "a = 1 # " + "x" * 70_000,
            "\n".join(f"a{n} = 1" for n in range(10_000)),
            "a = [" + "1,\n" * 10_001 + "]",
            "﻿a = 1",
            "a = 1\x00",
            "a = 9007199254740993",
        ],
    )
    def test_what_no_job_says_is_one_clear_error(self, text: str) -> None:
        with pytest.raises(JobError) as caught:
            read_toml(JOB_FILE, text.encode())
        assert caught.value.reason == "JOB_INVALID" and len(str(caught.value)) < 2000

    @given(st.binary(max_size=200))
    def test_no_bytes_do_anything_else(self, content: bytes) -> None:
        try:
            read_toml(JOB_FILE, content)
        except JobError as error:
            assert error.reason == "JOB_INVALID"

    def test_what_looks_like_a_reference_is_a_text(self) -> None:
        text = 'a = "${HOME} {WORKSPACE} {$HOME} @include /etc/passwd"\n'
        assert read_toml(JOB_FILE, text.encode()) == {"a": "${HOME} {WORKSPACE} {$HOME} @include /etc/passwd"}

    def test_lines_end_where_toml_says(self) -> None:
        """A comment hides nothing from one reader that another one sees: there is one reader."""
        for character in "\u2028\u2029\u0085":
            assert read_toml(JOB_FILE, f"# x{character}a = 1\nb = 2\n".encode()) == {"b": 2}
        for character in "\r\x0b\x0c\x1c":
            with pytest.raises(JobError):
                read_toml(JOB_FILE, f"# x{character}a = 1\nb = 2\n".encode())


def test_a_variant_changes_what_it_names_and_what_follows_from_it(tmp_path: Path) -> None:
    original = read_job(FEDAVG)
    changes = {"rounds": 7, "seed": 99, "task.labels": ["a", "b", "c"], "run": "r-1", "start_round": 2}
    changed = read_job(write_variant(FEDAVG, tmp_path / "v", changes))
    assert (changed.rounds, changed.seed, changed.run, changed.start_round) == (7, 99, "r-1", 2)
    assert changed.task.labels == ("a", "b", "c")
    assert changed.task.seed == 99, "the task's seed is the job's"
    assert changed.task.encoder == original.task.encoder and original.task.seed != 99
    lines = [line for line in (FEDAVG / CONFIG_FOLDER / JOB_FILE).read_text().splitlines() if "#" in line]
    said = (tmp_path / "v" / CONFIG_FOLDER / JOB_FILE).read_text()
    assert all(line.partition("#")[2] in said for line in lines), "comments stay"


def test_what_a_variant_adds_stands_above_the_next_tables_comment(tmp_path: Path) -> None:
    named = ("protocol.split.folds", "protocol.split.fold", "task.added")
    config = write_variant(FEDAVG, tmp_path / "v", dict.fromkeys(named, 1)) / CONFIG_FOLDER
    said = (config / PROTOCOL_FILE).read_text()
    assert said.index("[split]") < said.index("\nfold = ") < said.index("# When training ends")
    said = (config / JOB_FILE).read_text()
    assert said.index("[task]") < said.index("added = 1") < said.index("# The model and its own")


@pytest.mark.parametrize("value", [None, "text", 3, 0.25, True, ["a", "b"], {"clinic-a": 1.0}])
def test_a_variant_says_any_plain_value(tmp_path: Path, value: Any) -> None:
    config = write_variant(FEDAVG, tmp_path / "v", {"strategy.weights": value}) / CONFIG_FOLDER
    job, _ = read_tables(config)
    assert job["strategy"].get("weights") == value


def test_of_two_ways_to_say_one_thing_the_last_holds() -> None:
    assert parse_settings(["privacy.noise_multiplier=4"]) == {
        "privacy.noise_multiplier": 4,
        "privacy.budget_share": None,
    }
    assert parse_settings(["task.local_epochs=2", "purpose=care"])["purpose"] == "care"


def test_a_model_goes_to_the_server_alone(tmp_path: Path) -> None:
    model = tmp_path / "m.safetensors"
    model.write_bytes(b"model")
    with pytest.raises(JobError) as caught:
        write_variant(FEDAVG, tmp_path / "all", {}, start_model=model)
    assert caught.value.reason == "SITES_NOT_NAMED" and not (tmp_path / "all").exists()
    made = write_variant(FEDAVG, tmp_path / "named", {}, sites=["a", "b"], start_model=model)
    meta = json.loads((made / "meta.json").read_text())
    assert meta["deploy_map"] == {"app_server": ["server"], "app": ["a", "b"]}
    assert [path.parent.parent.name for path in made.rglob("start_model*")] == ["app_server"]


BROKEN: dict[str, tuple[str, str, str]] = {
    "not TOML": (JOB_FILE, "seed = 1\n", "seed = {\n"),
    "no seed": (JOB_FILE, "seed = 1\n", ""),
    "half a seed": (JOB_FILE, "seed = 1\n", "seed = 1.5\n"),
    "a negative seed": (JOB_FILE, "seed = 1\n", "seed = -1\n"),
    "no clients": (JOB_FILE, "least_sites = 2", "least_sites = 0"),
    "true clients": (JOB_FILE, "least_sites = 2", "least_sites = true"),
    "unknown variable": (JOB_FILE, "seed = 1\n", "seed = 1\nsead = 1\n"),
    "unknown table": (JOB_FILE, "[strategy]", "[startegy]\n[strategy]"),
    "unknown field": (JOB_FILE, "memories = 10", "memorys = 10"),
    "field of the wrong type": (JOB_FILE, "memories = 10", 'memories = "10"'),
    "half a memory": (JOB_FILE, "memories = 10", "memories = 10.5"),
    "huge model": (JOB_FILE, "hidden = 256", "hidden = 1000000000"),
    "huge batch": (JOB_FILE, "batch_size = 4", "batch_size = 1000000000"),
    "unknown task": (JOB_FILE, 'name = "bags"', 'name = "subprocess.Popen"'),
    "no task": (JOB_FILE, 'name = "bags"', ""),
    "unknown model": (JOB_FILE, 'name = "mem"', 'name = "subprocess.Popen"'),
    "no model": (JOB_FILE, 'name = "mem"', ""),
    "model that is a word": (JOB_FILE, "[task.model]", 'model = "mem"\n[task.other]'),
    "unknown target": (PROTOCOL_FILE, "[stop]", '[target]\nname = "subprocess.Popen"\n[stop]'),
    "setting that no target has": (
        PROTOCOL_FILE,
        "[stop]",
        '[target]\nname = "classes"\nlabels = ["a"]\n[stop]',
    ),
    "unknown strategy": (JOB_FILE, 'name = "fedavg"', 'name = "os:system"'),
    "list for a name": (JOB_FILE, 'name = "fedavg"', 'name = ["fedavg"]'),
    "weights of texts": (JOB_FILE, 'weighting = "samples"', 'weighting = "fixed"\nweights = {a = "x"}'),
    "half a site": (JOB_FILE, 'weighting = "samples"', "clients_per_round = 1.5"),
    "run that is a path": (JOB_FILE, "seed = 1\n", 'seed = 1\nrun = "../x"\n'),
    "start beyond the end": (JOB_FILE, "seed = 1\n", "seed = 1\nstart_round = 30\n"),
    "kind of its own": (JOB_FILE, 'kind = "training"', 'kind = "anything"'),
    "no format": (JOB_FILE, "format = 1\n", ""),
    "table for a number": (JOB_FILE, "seed = 1\n", "seed = {a = 1}\n"),
    "zero rounds": (PROTOCOL_FILE, "rounds = 30", "rounds = 0"),
    "half a round": (PROTOCOL_FILE, "rounds = 30", "rounds = 1.5"),
    "no rounds": (PROTOCOL_FILE, "rounds = 30", ""),
    "unknown field of a protocol": (PROTOCOL_FILE, "labels =", "lables = 3\nlabels ="),
    "stop that is a number": (PROTOCOL_FILE, "[stop]\nrounds = 30\n", "[stap]\nrounds = 30\n"),
}


@pytest.mark.parametrize(("name", "old", "new"), BROKEN.values(), ids=BROKEN)
def test_a_broken_job_is_one_clear_error(tmp_path: Path, name: str, old: str, new: str) -> None:
    path = write_variant(FEDAVG, tmp_path / "job", {}) / CONFIG_FOLDER / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(JobError) as caught:
        read_application(path.parent)
    assert caught.value.reason in ("JOB_INVALID", "PROTOCOL_INVALID")


def test_what_decides_elsewhere_is_said(tmp_path: Path) -> None:
    path = write_variant(FEDAVG, tmp_path / "job", {}) / CONFIG_FOLDER / JOB_FILE
    path.write_text(path.read_text().replace('name = "bags"', 'name = "bags"\nencoder = "x:v1"\nmpp = 1.0'))
    with raises_reason(
        "JOB_INVALID", "task.encoder: encoder in protocol.toml", "task.mpp: mpp in protocol.toml"
    ):
        read_job(tmp_path / "job")


@pytest.mark.parametrize(
    "number", [{"min_clients": 3}, {"min_clients": "2"}, {"min_clients": None}], ids=["3", "text", "none"]
)
def test_flare_and_the_job_agree_how_many_must_answer(tmp_path: Path, number: dict[str, Any]) -> None:
    job = write_variant(FEDAVG, tmp_path / "job", {})
    meta = json.loads((job / "meta.json").read_text())
    (job / "meta.json").write_text(json.dumps(meta | number))
    with raises_reason("JOB_INVALID", "min_clients", number["min_clients"]):
        read_job(job)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"round_seconds": 0}, ("round_seconds: ", "not 0")),
        ({"round_seconds": None}, ("round_seconds: ",)),
        ({"answer_seconds": 60, "round_seconds": 120}, ("round_seconds: ", "answer_seconds (60)", "not 120")),
        ({"strategy.clients_per_round": 1}, ("least_sites: ", " 1,")),
        ({"strategy": {"name": "cyclic"}}, ("least_sites: ", " 1,")),
        ({"transport": {"name": "masked_sum"}}, ("least_sites: ", " 3,")),
    ],
)
def test_a_round_ends_and_can_end_well(
    tmp_path: Path, changes: dict[str, Any], says: tuple[str, ...]
) -> None:
    with raises_reason("JOB_INVALID", *says):
        try_variant(FEDAVG, changes)


def test_a_sum_begins_with_as_many_sites_as_its_noise_counts_on_and_a_curious_one() -> None:
    """Each site would refuse a sum of fewer, with its budget reserved."""
    with raises_reason("JOB_INVALID", "least_sites: ", " 5,"):
        try_variant(FEDAVG.parent / "linear_shared", {"privacy.honest": 4})


def test_flare_s_processes_refuse_a_topology_in_which_sites_aggregate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_variant(FEDAVG, tmp_path / "job", {"strategy": {"name": "swarm"}})
    monkeypatch.setitem(STRATEGIES, "swarm", f"{Swarm.__module__}:Swarm")
    assert read_job(folder).strategy == Swarm(), "a job can be read, and run in process"
    with raises_reason("JOB_INVALID", "rotating", "swarm"):
        read_application(folder / CONFIG_FOLDER)
    with raises_reason("JOB_INVALID", "rotating", "swarm"):
        AskingScatterAndGather(str(folder / CONFIG_FOLDER.parent / "custom"))


def test_what_just_fits_into_a_round_is_taken() -> None:
    job = try_variant(FEDAVG, {"answer_seconds": 60, "round_seconds": 121, "strategy.clients_per_round": 2})
    assert (job.round_seconds, job.least_sites) == (121, 2)
    assert job.longest_seconds == (job.rounds + 1) * 181 + 1800, "with the question about the model"


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_job_waits_for_its_sites_an_hour_or_more_and_not_for_ever(job: Path) -> None:
    assert 3600 <= read_job(job).round_seconds <= 86400


def test_an_evaluation_has_nothing_of_a_training(tmp_path: Path) -> None:
    evaluate = next(job for job in JOBS if job.name == "mem_evaluate")
    for change in ({"best_metric": "auc"}, {"start_round": 0}, {"privacy.mechanism": "dp-sgd"}):
        with raises_reason("JOB_INVALID", next(iter(change)).partition(".")[0] + ": "):
            try_variant(evaluate, change)


def test_jobs_of_other_versions_are_refused_and_the_files_wanted_are_named(tmp_path: Path) -> None:
    later = write_variant(FEDAVG, tmp_path / "later", {"format": 2}) / CONFIG_FOLDER
    earlier = write_variant(FEDAVG, tmp_path / "earlier", {}) / CONFIG_FOLDER
    (earlier / JOB_FILE).rename(earlier / "job.conf")
    for config, says in ((later, ["format 2"]), (earlier, ["job.toml", "protocol.toml"])):
        with raises_reason("JOB_VERSION", *says):
            read_application(config)


@pytest.mark.parametrize("name", [*CONFIGURATIONS, JOB_FILE, PROTOCOL_FILE, "../../meta.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    job = write_variant(FEDAVG, tmp_path / "job", {})
    (job / CONFIG_FOLDER / name).unlink()
    with raises_reason("JOB_INVALID", Path(name).name):
        read_job(job)


def test_a_link_is_no_file_of_a_job(tmp_path: Path) -> None:
    job = write_variant(FEDAVG, tmp_path / "job", {})
    path = job / CONFIG_FOLDER / JOB_FILE
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JobError):
        read_job(job)


def test_what_is_sent_is_what_the_task_trains(repository: Path) -> None:
    folder = repository / "jobs" / "dhunet_dpsgd"
    sizes = {}
    for word in ("all", "norm", "decoder", "head"):
        job = try_variant(folder, {"task.train": word})
        model = job.task.build_model()
        trained = {name for name, each in model.named_parameters() if each.requires_grad}
        assert set(job.strategy.sent(model.state_dict())) == trained
        sizes[word] = job.weights
    assert sizes["all"] > sizes["decoder"] > sizes["norm"] > sizes["head"] == 24 * 4
    with raises_reason("JOB_INVALID", "strategy.trains", "task.train"):
        try_variant(folder, {"strategy.trains": ["head"]})
    with raises_reason("MODEL_NOT_PRIVATE"):
        try_variant(folder, {"task.train": "all", "task.norm": "batch"})


def test_a_job_whose_strategy_does_not_fit_its_protection_is_none(repository: Path) -> None:
    """Whoever reads it says so: the lead before it is submitted, the server, a site."""
    with pytest.raises(JobError) as caught:
        try_variant(repository / "jobs" / "mem_dpsgd", {"strategy.share": ["head"]})
    assert caught.value.reason == "PRIVACY_INVALID"


@pytest.mark.parametrize(("honest", "enough"), [(2, True), (3, False)])
def test_a_sum_of_counts_has_the_sites_on_whose_noise_it_counts(honest: int, enough: bool) -> None:
    """Or each of them would refuse it, when the training is over and paid for."""
    counts = {"mechanism": "tally", "noise_multiplier": 4.0, "noise": "shared", "honest": honest}
    said = {"privacy.honest": 2, "least_sites": 3, "evaluate": True, "evaluation": counts}
    if enough:
        assert try_variant(FEDAVG.parent / "linear_shared", said).tally is not None
        return
    with raises_reason("JOB_INVALID", "least_sites"):
        try_variant(FEDAVG.parent / "linear_shared", said)


def test_a_sum_of_counts_takes_its_hello_and_the_sites_in_no_sum_their_time() -> None:
    folder = FEDAVG.parent / "linear_shared"
    counts = {"mechanism": "tally", "noise_multiplier": 4.0}
    alone, together = (
        try_variant(folder, {"evaluate": True, "evaluation": {**counts, **how}})
        for how in ({}, {"noise": "shared", "honest": 2})
    )
    assert together.longest_seconds == alone.longest_seconds + 2 * (alone.round_seconds + 60)


def test_what_asks_no_model_is_no_training_and_needs_no_model_to_start_from() -> None:
    folder = next(job for job in JOBS if job.name == "cohort_statistics")
    job = read_job(folder)
    assert job.kind == EVALUATION and job.tally is None and job.protocol == read_job(FEDAVG).protocol
    tally = {"evaluation.mechanism": "tally", "evaluation.noise_multiplier": 2.0}
    booked = try_variant(folder, {"answer_seconds": 5, **tally})
    assert booked.tally is not None and booked.tally.noise_multiplier == 2.0
    with raises_reason("JOB_INVALID", "task.name"):
        try_variant(FEDAVG, {"task.name": "cohort"})
    for setting in ('task.scanners=["../x"]', 'task.scanners=["<b>"]', 'task.stains=["H&E"]'):
        with raises_reason("JOB_INVALID"):
            try_variant(folder, parse_settings([setting]))


@pytest.mark.parametrize(
    "settings",
    [
        ["strategy.order=named", 'strategy.visits=["b", "a"]'],
        ["strategy.order=size", "strategy.sizes.b=1", "strategy.sizes.a=2"],
    ],
)
def test_a_job_says_in_which_order_a_model_goes_from_site_to_site(settings: list[str]) -> None:
    """The job is read before anyone knows the sites, and checked when they are there."""
    cyclic = next(job for job in JOBS if job.name == "mem_cwt")
    strategy = try_variant(cyclic, parse_settings(settings)).strategy
    visits = [strategy.topology.plan(index, ["a", "b"], 1).trainers for index in range(3)]
    assert visits == [("b",), ("a",), ("b",)]
    with raises_reason("JOB_INVALID"):
        strategy.check_sites(["a", "b", "c"])


@pytest.mark.parametrize("name", ["mem_evaluate", "dhunet_evaluate", "cohort_statistics"])
def test_a_server_takes_an_evaluation_without_a_model_only_if_none_is_asked(name: str) -> None:
    folder = next(job for job in JOBS if job.name == name)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(folder.rglob("*")):
            packed.write(path, path.relative_to(folder.parent))
    if name == "cohort_statistics":
        check_submission(archive.getvalue())
    else:
        with raises_reason("JOB_INVALID", "--model"):
            check_submission(archive.getvalue())

"""Jobs are data: every job of the project is read, and every name in it is held to the code."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from histoflare.errors import JobError
from histoflare.flare.allowed import ALLOWED_CLASSES
from histoflare.flare.job import CONFIG_FOLDER, make_component, read_configuration, read_job, write_variant
from histoflare.privacy.budget import Budget
from histoflare.privacy.policy import POLICIES, read_policy
from histoflare.privacy.protocol import check_task, digest

JOBS = sorted((Path(__file__).resolve().parents[2] / "jobs").iterdir())


def components(content: Any) -> list[dict[str, Any]]:
    """Return every dictionary with a class ``path`` in a configuration."""
    found = []
    if isinstance(content, dict):
        found += [content] if isinstance(content.get("path"), str) else []
        content = list(content.values())
    if isinstance(content, list):
        found += [component for part in content for component in components(part)]
    return found


def test_there_are_jobs() -> None:
    assert "mem_fedavg" in [job.name for job in JOBS]


@pytest.mark.parametrize("folder", JOBS, ids=lambda folder: folder.name)
class TestEveryJob:
    def test_has_no_code(self, folder: Path) -> None:
        kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
        assert kinds <= {".json", ".conf"}
        assert not (folder / "app" / "custom").exists()

    def test_meta_names_the_job(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["name"] == folder.name
        assert meta["min_clients"] >= 1

    def test_protects_its_updates_as_the_scope_it_names_asks_for(self, folder: Path) -> None:
        job = read_job(folder)
        policy = read_policy(POLICIES / f"{job.scope}.toml")
        if job.name.endswith("_evaluate"):  # it trains nothing
            return
        assert job.plan.mechanism == policy.mechanism
        if policy.protection is not None:
            budget = Budget(policy.protection.epsilon, policy.protection.delta)
            whole = budget.cost(job.plan.spend().times(job.rounds))
            assert budget.admits(whole), "it fits the budget of a site that has spent nothing"
            assert not policy.counts and job.strategy.weighting == "uniform"

    def test_names_its_purpose_and_the_consortium_s_protocol(self, folder: Path, repository: Path) -> None:
        variables = read_configuration(folder / CONFIG_FOLDER / "config_fed_client.conf")
        assert variables["purpose"] == "research"
        family = folder.name.partition("_")[0]
        agreed = read_job(repository / "jobs" / f"{family}_fedavg").protocol
        assert digest(variables["protocol"]) == digest(agreed), (
            "a site agrees to one protocol for each question"
        )
        check_task(agreed, read_job(folder).task.to_json())

    @pytest.mark.parametrize("side", ["server", "client"])
    def test_every_class_exists_is_allowed_and_takes_its_arguments(self, folder: Path, side: str) -> None:
        found = components(read_configuration(folder / CONFIG_FOLDER / f"config_fed_{side}.conf"))
        assert found
        for component in found:
            assert component["path"] in ALLOWED_CLASSES
            module, _, name = component["path"].rpartition(".")
            kind = getattr(importlib.import_module(module), name)
            known = set(inspect.signature(kind).parameters)
            if "arguments" in known:  # handed on to FLARE's own
                known |= set(inspect.signature(kind.__mro__[1]).parameters)
            assert set(component.get("args") or {}) <= known, component["path"]

    def test_both_sides_agree(self, folder: Path) -> None:
        sides = [
            read_configuration(folder / CONFIG_FOLDER / f"config_fed_{s}.conf") for s in ("server", "client")
        ]
        parts = [{part["id"]: part for part in side["components"]} for side in sides]
        for name in ("task", "strategy"):
            assert parts[0][name] == parts[1][name]
        assert sides[0]["seed"] == sides[1]["seed"]

    def test_survives_the_rewriting_of_nvflare_job_submit(self, folder: Path, tmp_path: Path) -> None:
        """FLARE's command loads each configuration, and submits what it has written out again."""
        from nvflare.tool.job.job_cli import prepare_job_config

        shutil.copytree(folder, tmp_path / "job")
        arguments = SimpleNamespace(job_folder=str(folder), config_file=None, app_config=None, debug=True)
        prepare_job_config(arguments, ["app"], str(tmp_path / "job"))
        for name in ("config_fed_server.conf", "config_fed_client.conf"):
            path = CONFIG_FOLDER / name
            assert (tmp_path / "job" / path).read_text() != (folder / path).read_text()
            assert read_configuration(tmp_path / "job" / path) == read_configuration(folder / path)

    def test_no_variable_is_left_open(self, folder: Path) -> None:
        for path in (folder / CONFIG_FOLDER).glob("config_fed_*.conf"):
            assert "{" not in "".join(texts(read_configuration(path)))

    def test_names_no_path_or_site(self, folder: Path) -> None:
        content = texts(read_configuration(folder / CONFIG_FOLDER / "config_fed_client.conf"))
        assert not [text for text in content if "/" in text and not text.startswith("histoflare")]


def texts(content: Any) -> list[str]:
    """Return every text in a configuration."""
    if isinstance(content, str):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
    return [text for part in parts for text in texts(part)]


def append(job: Path, line: str) -> None:
    variables = job / CONFIG_FOLDER / "job.conf"
    variables.write_text(f"{variables.read_text()}\n{line}\n")


def test_a_variant_changes_what_it_names_and_what_follows_from_it(tmp_path: Path, repository: Path) -> None:
    original = read_job(repository / "jobs" / "mem_fedavg")
    changed = read_job(
        write_variant(
            original.folder, tmp_path / "v", {"rounds": 7, "seed": 99, "task.labels": ["a", "b", "c"]}
        )
    )
    assert (changed.rounds, changed.seed) == (7, 99)
    assert changed.task.labels == ("a", "b", "c")
    assert changed.task.seed == 99, "the task's seed is the job's"
    assert changed.task.encoder == original.task.encoder
    assert original.task.seed != 99


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda job: (job / "meta.json").unlink(), "not a job folder"),
        (lambda job: (job / CONFIG_FOLDER / "config_fed_server.conf").unlink(), "not found"),
        (lambda job: (job / CONFIG_FOLDER / "job.conf").write_text("rounds = {"), "cannot be read"),
        (lambda job: (job / CONFIG_FOLDER / "job.conf").write_text("seed = 1"), "does not say"),
        (lambda job: append(job, "rounds = 1.5"), "rounds in job.conf must be a whole number of at least 1"),
        (lambda job: append(job, "rounds = 0"), "at least 1, not 0"),
        (lambda job: append(job, "seed = null"), "seed in job.conf must be a whole number, not None"),
    ],
    ids=["no meta", "no server", "not HOCON", "no rounds", "half a round", "zero rounds", "no seed"],
)
def test_a_broken_job_is_one_clear_error(tmp_path: Path, repository: Path, break_it: Any, says: str) -> None:
    folder = write_variant(repository / "jobs" / "mem_fedavg", tmp_path / "job", {})
    break_it(folder)
    with pytest.raises(JobError, match=says):
        read_job(folder)


def test_only_own_classes_are_made() -> None:
    with pytest.raises(JobError, match="not a class of this package"):
        make_component({"path": "subprocess.Popen", "args": {"args": ["true"]}})


def test_a_wrong_argument_is_named(tmp_path: Path, repository: Path) -> None:
    folder = write_variant(repository / "jobs" / "mem_fedavg", tmp_path / "job", {"task.memorys": 3})
    with pytest.raises(JobError, match="memorys"):
        read_job(folder)

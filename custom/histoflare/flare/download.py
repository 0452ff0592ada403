"""What a lead gets of a job: a download, read as a job, its rounds and what was said of its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from histoflare.errors import JobError
from histoflare.flare.job import Job, read_application
from histoflare.flare.job_files import START_MODEL_FILE
from histoflare.flare.job_schema import EVALUATION
from histoflare.flare.persistor import BEST_MODEL_FILE
from histoflare.flare.record import (
    BEST_EVALUATION_ROUND_FILE,
    EVALUATION_FILE,
    EVALUATION_ROUND_FILE,
    EVALUATION_TOTAL_FILE,
    ROUNDS_FILE,
    SITES_FILE,
)
from histoflare.flare.result import FederationResult, evaluation_noise_of, read_result
from histoflare.flare.resume import find_configuration, job_name, refuse_links
from histoflare.model_file import GLOBAL_MODEL_FILE, read_model_header
from histoflare.privacy.protocol import hash_protocol
from histoflare.report.consortium import RunFacts, build_report
from histoflare.report.report_file import drop_missing
from histoflare.rounds.comparison import Comparison
from histoflare.rounds.round import count_sent_by_job
from histoflare.rounds.state import State, hash_state

RUNTIME = "federation"
Said = dict[str, dict[str, float | None]]
READ = (
    ROUNDS_FILE,
    SITES_FILE,
    EVALUATION_FILE,
    EVALUATION_ROUND_FILE,
    EVALUATION_TOTAL_FILE,
    BEST_EVALUATION_ROUND_FILE,
    GLOBAL_MODEL_FILE,
    BEST_MODEL_FILE,
)


@dataclass(frozen=True)
class Download:
    """A job that came back.

    Attributes:
        folder: Where it was read. workspace: In it, what was the server's folder of the run.
        job: The job. run: The name under which the sites have it.
        sites: Whom it was for, by their FLARE names.
        result: Its rounds, its last model, what sites said of a model.
        asked_after: The row of the question about the model with which a training job ended; None: none.
        best_sha256: Of the best model's tensors; None if none was kept.
    """

    folder: Path
    workspace: Path
    job: Job
    run: str
    sites: tuple[str, ...]
    result: FederationResult
    asked_after: dict[str, Any] | None
    best_sha256: str | None

    @property
    def model_sha256(self) -> str | None:
        """Of the last global model's tensors; None if no round was finished."""
        return None if self.result.state is None else hash_state(self.result.state)


def read_download(folder: Path) -> Download:
    """Read the folder that a job's download made, or the server's own folder of the job.

    Raises:
        JobError: It has no job or no rounds in it, holds links, or something in it is damaged.
    """
    places = [folder / "workspace", folder]
    workspace = next((place for place in places if (place / ROUNDS_FILE).is_file()), None)
    if workspace is None:
        raise JobError(
            f"{folder}: no {ROUNDS_FILE} there. Give the folder that a job's download made (it has the "
            "job's id as its name and workspace/ in it). A job that began no round has none."
        )
    configuration, meta_file = find_configuration(folder, workspace)
    for path in (configuration, meta_file, *(workspace / name for name in READ)):
        refuse_links(folder, path)
    meta = _read_json(meta_file, dict)
    job = replace(
        read_application(configuration), name=job_name(meta), folder=folder, scope=str(meta.get("scope"))
    )
    try:
        result = read_result(workspace)
        asked_after = _read_optional(workspace / EVALUATION_ROUND_FILE)
        _check(result, asked_after)
        best = workspace / BEST_MODEL_FILE
        best_sha256 = hash_state(load_file(best)) if best.is_file() else None
    except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise JobError(f"{workspace}: damaged ({error}): download the job again.") from None
    return Download(
        folder=folder,
        workspace=workspace,
        job=job,
        run=_run_of(job, workspace, meta),
        sites=_sites_of(meta, result),
        result=result,
        asked_after=asked_after,
        best_sha256=best_sha256,
    )


def build_download_report(download: Download, evaluation: Download | None = None) -> dict[str, Any]:
    """Return the consortium's report of what came back: see :mod:`histoflare.report.report_file`.

    Args:
        download: A training job.
        evaluation: The job that asked about its model, if that was another.

    Raises:
        JobError: One of the two is of the other kind, or they are of different models.
    """
    job, result = download.job, download.result
    if job.kind == EVALUATION:
        raise JobError(
            f"{download.folder}: its job asked about a model. Give the result of the job that trained the "
            f"model, and then this one: histoflare job result RESULT {download.folder}."
        )
    evaluated, refused = _said_of_the_model(download)
    model, noise = "last", _evaluation_noise(download)
    if evaluation is not None:
        model = _model_asked_about(download, evaluation)
        evaluated, refused = _said_of_the_model(evaluation)
        noise = _evaluation_noise(evaluation)
        result = replace(result, pseudonyms=result.pseudonyms | evaluation.result.pseudonyms)
    facts = RunFacts(
        job=job.name,
        runtime=RUNTIME,
        strategy={"name": job.strategy.name, **asdict(job.strategy), "transport": job.transport.name},
        task=job.task.to_json(),
        seed=job.seed,
        rounds=job.rounds,
        participation=result.rounds,
        privacy=job.plan.describe(),
        seconds={},
        model_sha256=download.model_sha256 or "",
        mechanism=job.plan.mechanism,
        plan=job.plan.to_json(),
        spend=job.plan.spend().to_json(),
        numbers=job.plan.numbers(job.reserved_rounds, count_sent_by_job(job.strategy, job.task)),
        spare_rounds=job.spare_rounds,
        protocol={"sha256": hash_protocol(job.protocol), **job.protocol},
        evaluated_at_sites=evaluated,
        evaluation_refused=refused,
        evaluation_noise=noise,
        pseudonyms=result.pseudonyms,
        data=job.task.data,
    )
    report = build_report(facts, Comparison({}, None, None, {}, {}))
    report |= {"evaluated_model": model, "model_sha256": download.model_sha256}
    if "not_covered" in report["guarantee"]:
        report["guarantee"]["not_covered"]["own_figures"] = False
    return drop_missing(report)


def _evaluation_noise(download: Download) -> dict[str, Any] | None:
    """Return what a job's evaluation cost, and its figures of all sites; None where no noise was in it."""
    job, result = download.job, download.result
    asked = job.kind == EVALUATION or download.asked_after is not None
    return evaluation_noise_of(job, result.evaluation_total, result.evaluation_round) if asked else None


def _said_of_the_model(
    download: Download,
) -> tuple[Said | None, dict[str, str]]:
    """Return site → its figures of a model (None: nobody was asked), and site → why it gave none."""
    result = download.result
    if download.job.kind == EVALUATION:
        return result.evaluation, result.refused
    if download.asked_after is None and not result.evaluation:
        return None, {}
    return result.evaluation, dict((download.asked_after or {}).get("refused", {}))


def _model_asked_about(download: Download, evaluation: Download) -> str:
    """Return which model of a job another one asked about: ``last`` or ``best``."""
    if evaluation.job.kind != EVALUATION:
        raise JobError(f"{evaluation.folder}: its job is no evaluation, but '{evaluation.job.name}'.")
    path = evaluation.workspace / "app_server" / "config" / START_MODEL_FILE
    if not path.is_file():
        path = evaluation.workspace / GLOBAL_MODEL_FILE
    refuse_links(evaluation.folder, path)
    asked = hash_state(_load(path))
    known = {download.model_sha256: "last", download.best_sha256: "best"}
    if asked not in known:
        raise JobError(
            f"{evaluation.folder}: asked about another model than the last or the best of {download.folder}. "
            "Give the evaluation that was made from this result."
        )
    return "last" if asked == download.model_sha256 else "best"


def _load(path: Path) -> State:
    try:
        state: State = load_file(path)
    except (SafetensorError, OSError) as error:
        raise JobError(f"{path}: not a model: {error}") from None
    return state


def _check(result: FederationResult, asked_after: Mapping[str, Any] | None) -> None:
    """Raise one of what a damaged file raises, unless rows, figures and names are built as they should be."""
    for row in [
        *result.rounds,
        *(row for row in (asked_after, result.best_evaluation_round) if row is not None),
    ]:
        if not (type(row["round"]) is int and isinstance(row["taking_part"], list)):
            raise ValueError(f"{ROUNDS_FILE}: a round that is none")
        dict(row["refused"]), list(row.get("no_answer", [])), list(row["asked"])
    for name, table in (("figures", result.evaluation), ("names", result.pseudonyms)):
        if not isinstance(table, dict):
            raise ValueError(f"{name} of sites that are none")
    for figures in result.evaluation.values():
        dict(figures)
    if result.evaluation_total is not None:
        list(result.evaluation_total["sites"]), dict(result.evaluation_total["figures"])


def _run_of(job: Job, workspace: Path, meta: Mapping[str, Any]) -> str:
    """Return a run's name: the job's, its model's, or FLARE's id of the job."""
    if job.run:
        return job.run
    model = workspace / GLOBAL_MODEL_FILE
    found = read_model_header(model).run if model.is_file() else None
    return found or str(meta.get("job_id", ""))


def _sites_of(meta: Mapping[str, Any], result: FederationResult) -> tuple[str, ...]:
    """Return whom a job was for; where it was for all, who was there."""
    deployed = {str(site) for sites in (meta.get("deploy_map") or {}).values() for site in sites} - {"server"}
    if deployed and "@ALL" not in deployed:
        return tuple(sorted(deployed))
    return tuple(sorted({site for row in result.rounds for site in row.get("sites", [])}))


def _read_optional(path: Path) -> dict[str, Any] | None:
    return _read_json(path, dict) if path.is_file() else None


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise JobError(f"{path}: cannot be read ({error}): download the job again.") from None
    if not isinstance(content, kind):
        raise JobError(f"{path}: not what FLARE keeps of a job; is it damaged?")
    return content

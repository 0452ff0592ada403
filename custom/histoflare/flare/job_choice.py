"""Which job runs: the folder's own, a preset, what a person set, and what the data that are there ask for.

Every command that takes a job chooses it here, so that a job fits the same data in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from histoflare.errors import JobError
from histoflare.flare.job import Job, read_job
from histoflare.flare.job_variant import DECIDED, parse_settings, read_preset, try_variant
from histoflare.site.found_data import FoundData
from histoflare.slides.manifest import same_but_for_capitals
from histoflare.slides.resolution import SAME_MPP


@dataclass(frozen=True)
class Choice:
    """A chosen job.

    Attributes:
        job: What it says; its ``folder`` is the one it was chosen from.
        changes: What ``write_variant`` makes it of. scope: The privacy scope that a preset asks for.
        fitted: Those of the changes that the data asked for.
        doubt: Which of the labels taken from the data may be mistyped, and where they are; empty if none.
    """

    job: Job
    changes: dict[str, Any]
    scope: str | None
    fitted: dict[str, Any]
    doubt: str = ""

    def say_fitted(self) -> str:
        """Return in words what the data changed; empty if nothing."""
        listed = "; ".join(f"{name} = {_say(value)}" for name, value in self.fitted.items())
        return f"{self.job.name}: taken from the data that are there: {listed}" if listed else ""


def choose_job(
    folder: Path,
    preset: str | None = None,
    settings: Sequence[str] = (),
    found: FoundData | None = None,
    changes: Mapping[str, Any] | None = None,
    before: Mapping[str, Any] | None = None,
) -> Choice:
    """Choose a job; nothing is written.

    Args:
        folder: The job folder.
        preset: Name of one of its presets.
        settings: ``name=value`` texts (``--set``), which come before all else.
        found: The data that are there: labels, encoder, width, side and resolution of the patches are theirs
            unless a setting says otherwise.
        changes: Further changes, as ``write_variant`` takes them; None entries are left out.
        before: Changes that come before preset and settings, such as the task of a model.

    Raises:
        JobError: The folder, the preset or a setting cannot be used; or labels are taken from the data, and
            there is one only, or two differ in capitals only.

    >>> from histoflare import choose_job
    >>> from histoflare.shipped import JOBS
    >>> choice = choose_job(JOBS / "mem_fedavg", settings=["rounds=2"])
    >>> choice.job.rounds, choice.job.name
    (2, 'mem_fedavg')
    """
    read_job(folder)  # what is wrong with the job must not be said of a copy
    chosen = read_preset(folder, preset) if preset else None
    said = _by_decision(parse_settings(settings))
    said |= _by_decision({name: value for name, value in (changes or {}).items() if value is not None})
    of_preset = _by_decision(before or {}) | _by_decision(chosen.changes if chosen else {})
    fitted: dict[str, Any] = {}
    doubt = ""
    if found is not None:
        job = try_variant(folder, of_preset | said)
        fitted = {name: value for name, value in fit(job, found).items() if name not in said}
        if "protocol.labels" in fitted:
            _check_spelling(found)
            doubt = _say_doubt(job, found)
    whole = of_preset | fitted | said
    job = replace(try_variant(folder, whole), folder=folder)
    scope = chosen.scope if chosen else None
    return Choice(job if scope is None else replace(job, scope=scope), whole, scope, fitted, doubt)


def fit(job: Job, found: FoundData) -> dict[str, Any]:
    """Return the changes that make a job fit the data that are there; empty if it does.

    Labels stay the job's, in its order, where the data have no others.

    Raises:
        JobError: The data have one label, and it is not the job's (JOB_INVALID).
    """
    task = job.task
    changes: dict[str, Any] = {}
    known = task.manifest_labels
    if known is not None and not set(found.labels) <= set(known):
        if len(found.labels) < 2:
            raise JobError(
                f"Every slide of every site has the label '{found.labels[0]}'; to tell labels apart takes "
                "two of them. If the other is to come, name both: --set 'protocol.labels="
                f'["{found.labels[0]}", "…"]\'.',
                reason="JOB_INVALID",
            )
        changes["protocol.labels"] = list(found.labels)
    patches = found.patches
    if patches is None:
        return changes
    if patches.mpp is None or task.mpp is None or abs(patches.mpp - task.mpp) > SAME_MPP * task.mpp:
        changes["protocol.mpp"] = patches.mpp
    if patches.encoder is not None:
        changes |= {"protocol.encoder": patches.encoder, "task.features": patches.features}
        changes["protocol.patch_px"] = patches.patch_px
    return {name: value for name, value in changes.items() if value != _now(job, name)}


def _check_spelling(found: FoundData) -> None:
    """Refuse labels that are one class in two spellings, each of which would be a class of the job."""
    alike = [
        f"{label} at {', '.join(site for site, counts in found.slides.items() if label in counts)}"
        for pair in same_but_for_capitals(found.labels)
        for label in pair
    ]
    if alike:
        raise JobError(
            f"Labels that differ in capitals only: {'; '.join(alike)}. Write them one way in the manifests, "
            "or name the job's: --set 'protocol.labels=[…]'.",
            reason="JOB_INVALID",
        )


def _say_doubt(job: Job, found: FoundData) -> str:
    """Return which labels may be mistyped: those beside all of the job's own, and those of one site only."""
    where = {
        label: {site: counts[label] for site, counts in found.slides.items() if counts.get(label)}
        for label in found.labels
    }
    own = set(job.task.labels)
    doubtful = [
        label
        for label, sites in where.items()
        if label not in own and (own < set(found.labels) or (len(sites) == 1 < len(found.slides)))
    ]
    if not doubtful:
        return ""
    listed = ""
    for label in doubtful:
        counts = (f"{n} slide{'' if n == 1 else 's'} at {site}" for site, n in where[label].items())
        listed += f"\n  {label}: {', '.join(counts)}"
    return f"Each label is a class of the job, for all sites. Mend the manifest if one is mistyped:{listed}"


def facts_of(job: Job) -> dict[str, Any]:
    """Return what makes two jobs the same but for their seed, as plain JSON."""
    task = {name: value for name, value in job.task.to_json().items() if name != "seed"}
    strategy = {"name": job.strategy.name, **vars(job.strategy)}
    facts = {"name": job.name, "protocol": job.protocol, "task": task, "privacy": job.asked.to_json()}
    transport = {"name": job.transport.name, **vars(job.transport)}
    return facts | {"strategy": strategy, "transport": transport}


def _now(job: Job, name: str) -> Any:
    value = getattr(job.task, name.rpartition(".")[2])
    return list(value) if isinstance(value, tuple) else value


def _by_decision(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes under the names of what decides them, so that two names of one variable meet."""
    return {DECIDED.get(name, name): value for name, value in changes.items()}


def _say(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "any" if value is None else str(value)

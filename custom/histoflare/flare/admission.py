"""The door a task comes in by: a site's own filter that admits a job's tasks, or says why not.

It stands in the site's ``privacy.json``, where no job can leave it out, and applies to every task of every
job, whatever the job's own filters are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from histoflare.errors import HistoflareError, JobError
from histoflare.flare import capabilities
from histoflare.flare.application import check_folder
from histoflare.flare.capabilities import Admitted
from histoflare.flare.job import Job, job_of
from histoflare.flare.job_schema import HELLO, TRAIN, TRAINING
from histoflare.flare.kit_signature import check_running_kit
from histoflare.privacy.own_policy import check_taking_part
from histoflare.privacy.own_policy_file import read_site_policy
from histoflare.privacy.policy import Policy
from histoflare.privacy.protocol import PROTOCOL_FILE, hash_protocol, read_protocols
from histoflare.site.bookkeeping import Bookkeeping, check_plan
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.kinds import kind_of
from histoflare.site.refusals import note_refusal, say_refusal
from histoflare.site.site_file import read_own_file


class Admission(Filter):
    """Compares a job with the site's policy and protocol, and reserves its cost in the site's ledger.

    Each task of an admitted job gets a token.

    It refuses by issuing no token, and never raises: what a filter raises travels to the server as text.

    Args:
        policy: The scope's signed policy, in the ``local`` folder of the site's startup kit.
    """

    def __init__(self, policy: str) -> None:
        super().__init__()
        self._policy = policy
        self._admitted: dict[str, Admitted] = {}

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Admit or refuse one task; the task itself goes on unchanged."""
        capabilities.keep_task(shareable, fl_ctx)
        job_id = fl_ctx.get_job_id()
        try:
            if job_id not in self._admitted:
                self._admitted[job_id] = self._check(fl_ctx)
            admitted = self._admitted[job_id]
            job, task = admitted.job, fl_ctx.get_prop(FLContextKey.TASK_NAME)
            if task not in job.tasks:
                raise JobError(
                    f"This job has the tasks {', '.join(job.tasks)}, and not {task!r}.",
                    reason="TASK_UNEXPECTED",
                )
            if job.kind == TRAINING:
                check_plan(admitted.policy, admitted.bookkeeping.plan)
                check_patience(admitted.policy, job)
                check_parts(admitted.policy, job)
            if task in (HELLO, TRAIN):
                admitted.bookkeeping.reserve()  # the whole job, before its first gradient
            elif admitted.policy.protection is not None and job.answer_seconds is None:
                raise JobError(
                    "An evaluation under this policy is answered at a public time: job.toml must say "
                    "answer_seconds.",
                    reason="PRIVACY_INVALID",
                )
            capabilities.issue(admitted, fl_ctx)
        except HistoflareError as error:
            self._refuse(error, fl_ctx)
        except Exception as error:
            self.logger.warning("this job is not admitted: it could not be checked", exc_info=True)
            self._refuse(JobError(f"It could not be checked: {error!r}", reason="NOT_ADMITTED"), fl_ctx)
        return shareable

    def _refuse(self, error: HistoflareError, fl_ctx: FLContext) -> None:
        job_id = fl_ctx.get_job_id()
        capabilities.refuse(error.reason, fl_ctx)
        say_refusal(self.logger.warning, job_id, error)
        with suppress(Exception):
            note_refusal(_site_file(fl_ctx), job_id, error)

    def _check(self, fl_ctx: FLContext) -> Admitted:
        """Return what the job may do.

        Raises:
            JobError: The site takes no such job.
        """
        workspace = fl_ctx.get_engine().get_workspace()
        check_running_kit(workspace)
        local = Path(workspace.get_site_config_dir())
        policy = read_site_policy(local / self._policy)
        scope = (fl_ctx.get_prop(FLContextKey.JOB_META) or {}).get("scope") or policy.name
        if scope != policy.name:
            raise JobError(f"The job's scope '{scope}' is not '{policy.name}'.", reason="SCOPE_UNKNOWN")
        check_folder(Path(workspace.get_app_config_dir(fl_ctx.get_job_id())))
        job = job_of(fl_ctx)
        check_taking_part(
            policy,
            purpose=job.purpose,
            strategy_name=job.strategy.name,
            model_name=job.task.model_name,
        )
        agreed = check_agreement(job, local)
        _check_rules(agreed)
        kind_of(job.task.data).check_resolution_named(job.task, _site_file(fl_ctx))
        rounds = agreed["stop"]["rounds"]
        bookkeeping = Bookkeeping(
            _site_file(fl_ctx),
            policy,
            job.plan,
            rounds=rounds + job.spare_rounds,
            weights=job.weights,
            run=job.run or fl_ctx.get_job_id(),
            labels=list(agreed["labels"]),
            data=job.task.data,
            split=job.split,
        )
        return Admitted(job, policy, rounds, bookkeeping)


def check_agreement(job: Job, local: Path) -> dict[str, Any]:
    """Return the job's protocol, if it is one that the site agreed to.

    Args:
        local: The site's folder with its protocol.

    Raises:
        JobError: The job's protocol is not one that the site has agreed to.
    """
    protocol = job.protocol
    agreed = {hash_protocol(each): each for each in read_protocols(local / PROTOCOL_FILE)}
    if hash_protocol(protocol) not in agreed:
        known = ", ".join(f"{each[:12]}…" for each in agreed)
        raise JobError(
            f"The job's protocol ({hash_protocol(protocol)[:12]}…) is not one this site agreed to ({known}).",
            reason="PROTOCOL_MISMATCH",
        )
    return agreed[hash_protocol(protocol)]


def check_patience(policy: Policy, job: Job) -> None:
    """Refuse a job that ends by a figure which the policy keeps: it would never end so."""
    if job.patience is not None and not policy.allowed_metrics({f"validation/{job.best_metric}": None}):
        raise JobError(
            f"The job ends when validation/{job.best_metric} does not rise any more, and this policy does "
            "not let that figure out.",
            reason="METRIC_NOT_ALLOWED",
        )


def check_parts(policy: Policy, job: Job) -> None:
    """Refuse a job whose parts its privacy plan does not admit, or that sends what the policy keeps."""
    job.plan.admits(job.strategy, job.task, job.transport)
    check_listed(policy, job.strategy.numbers)
    if not policy.counts and getattr(job.strategy, "weighting", None) == "samples":
        raise JobError(
            'The job weighs sites by their samples; under this policy it must say weighting "uniform".',
            reason="WEIGHT_NOT_ALLOWED",
        )


def check_listed(policy: Policy, numbers: Iterable[str]) -> None:
    """Refuse a strategy that has a site send numbers which its policy does not list."""
    unlisted = [name for name in numbers if name not in policy.numbers]
    if unlisted:
        raise JobError(
            f"The job's strategy sends {', '.join(unlisted)} beside the update, and the policy lets "
            f"{', '.join(policy.numbers) or 'no numbers'} out.",
            reason="NUMBER_NOT_ALLOWED",
        )


def _site_file(fl_ctx: FLContext) -> SiteConfiguration:
    local = Path(fl_ctx.get_engine().get_workspace().get_site_config_dir())
    site = fl_ctx.get_identity_name()
    return read_own_file(site, local)


def _check_rules(protocol: Mapping[str, Any]) -> None:
    """Refuse a protocol that promises what this version does not do."""
    stop = protocol["stop"]
    if not isinstance(stop, Mapping) or stop.get("model") not in ("last", "best"):
        raise JobError(
            "The protocol is not kept: stop.model must be last or best.", reason="PROTOCOL_MISMATCH"
        )

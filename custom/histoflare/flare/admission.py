"""The door a task comes in by: a site's own filter that admits a job's tasks, or says why not.

It stands in the site's ``privacy.json``, where no job can leave it out, and applies to every task of every
job, whatever the job's own filters are.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from histoflare.errors import HistoflareError, JobError
from histoflare.flare import handshake
from histoflare.flare.deployed import CLIENT_FILE, check_deployed
from histoflare.flare.handshake import Admitted
from histoflare.flare.job import PRIVACY, STRATEGY, TASK, read_configuration
from histoflare.flare.kit_signature import check_running_kit
from histoflare.privacy.plan import Open, PrivacyPlan
from histoflare.privacy.policy import Policy, read_policy
from histoflare.privacy.protocol import PROTOCOL_FILE, check_task, digest, read_protocols
from histoflare.site.books import Books
from histoflare.site.configuration import SiteConfiguration, find_site_file, read_site_file
from histoflare.site.ledgers import note_refusal
from histoflare.slides.manifest import SPLIT_RULE

TRAIN = "train"
"""The task for which a whole job is reserved. Under another name no training is booked, so none is done."""


class Admission(Filter):
    """Compares a job with the site's policy and protocol, and reserves its cost in the site's ledger.

    Each task of an admitted job gets a token.

    It refuses by issuing no token, and never raises: what a filter raises travels to the server as text.

    Args:
        policy: The scope's policy file, in the ``local`` folder of the site's startup kit.
    """

    def __init__(self, policy: str) -> None:
        super().__init__()
        self._policy = policy
        self._admitted: dict[str, Admitted] = {}

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Admit or refuse one task; the task itself goes on unchanged."""
        handshake.keep_task(shareable, fl_ctx)
        job_id = fl_ctx.get_job_id()
        try:
            if job_id not in self._admitted:
                self._admitted[job_id] = self._check(fl_ctx)
            admitted = self._admitted[job_id]
            if fl_ctx.get_prop(FLContextKey.TASK_NAME) == TRAIN:
                engine = fl_ctx.get_engine()
                check_strategy(admitted.policy, admitted.books.plan, engine.get_component(STRATEGY))
                admitted.books.plan.check_task(engine.get_component(TASK))
                admitted.books.reserve()  # the whole job, before its first gradient
            handshake.admit(admitted, fl_ctx)
        except HistoflareError as error:
            self.logger.warning("this job is not admitted: %s", error)
            with suppress(HistoflareError):
                note_refusal(_site_file(fl_ctx), job_id, error)
            handshake.refuse(error.reason, fl_ctx)
        except Exception:
            self.logger.warning("this job is not admitted: it could not be checked", exc_info=True)
            handshake.refuse("NOT_ADMITTED", fl_ctx)
        return shareable

    def _check(self, fl_ctx: FLContext) -> Admitted:
        """Return what the job may do.

        Raises:
            JobError: The site takes no such job.
        """
        workspace = fl_ctx.get_engine().get_workspace()
        check_running_kit(workspace)
        local = Path(workspace.get_site_config_dir())
        policy = read_policy(local / self._policy)
        scope = (fl_ctx.get_prop(FLContextKey.JOB_META) or {}).get("scope") or policy.name
        if scope != policy.name:
            raise JobError(f"The job's scope '{scope}' is not '{policy.name}'.", reason="SCOPE_UNKNOWN")
        folder = Path(workspace.get_app_config_dir(fl_ctx.get_job_id()))
        check_deployed(folder)
        variables = read_configuration(folder / CLIENT_FILE)
        agreed = check_agreement(policy, variables, local)
        engine = fl_ctx.get_engine()
        task = engine.get_component(TASK)
        check_task(agreed, task.to_json())
        _check_rules(agreed, variables)
        rounds = agreed["stop"]["rounds"]
        asked = engine.get_component(PRIVACY) or Open()
        if not isinstance(asked, PrivacyPlan):
            raise JobError("The job's 'privacy' is no privacy plan.", reason="PRIVACY_INVALID")
        plan = asked.settled(rounds)
        run = variables.get("run") or fl_ctx.get_job_id()
        books = Books(
            _site_file(fl_ctx),
            policy,
            plan,
            rounds=rounds,
            run=str(run),
            labels=list(agreed["labels"]),
            data=task.data,
        )
        return Admitted(policy, rounds, books)


def check_agreement(policy: Policy, variables: Mapping[str, Any], local: Path) -> dict[str, Any]:
    """Return the job's protocol, if it is one that the site agreed to.

    Args:
        variables: Of the job. local: The site's folder with its protocol.

    Raises:
        JobError: The job's purpose or protocol is not one that the site has agreed to.
    """
    purpose = variables.get("purpose")
    if purpose not in policy.purposes:
        raise JobError(
            f"The job's purpose is {purpose!r}; this site works for {', '.join(policy.purposes) or '–'}.",
            reason="PURPOSE_NOT_ALLOWED",
        )
    protocol = variables.get("protocol")
    if not isinstance(protocol, dict):
        raise JobError("The job names no protocol.", reason="PROTOCOL_MISSING")
    agreed = {digest(each): each for each in read_protocols(local / PROTOCOL_FILE)}
    if digest(protocol) not in agreed:
        known = ", ".join(f"{each[:12]}…" for each in agreed)
        raise JobError(
            f"The job's protocol ({digest(protocol)[:12]}…) is not one this site agreed to ({known}).",
            reason="PROTOCOL_MISMATCH",
        )
    return agreed[digest(protocol)]


def check_strategy(policy: Policy, plan: PrivacyPlan, strategy: Any) -> None:
    """Refuse a strategy under which the guarantee does not hold, or that sends what the policy keeps."""
    plan.check_strategy(strategy)
    if not policy.counts and getattr(strategy, "weighting", None) == "samples":
        raise JobError(
            'The job weighs sites by their samples; under this policy it must say weighting "uniform".',
            reason="WEIGHT_NOT_ALLOWED",
        )


def _site_file(fl_ctx: FLContext) -> SiteConfiguration:
    local = Path(fl_ctx.get_engine().get_workspace().get_site_config_dir())
    site = fl_ctx.get_identity_name()
    return read_site_file(find_site_file(site, local), site)


def _check_rules(protocol: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    """Refuse a protocol that promises what this version does not do, and a job that does not keep it."""
    stop = protocol["stop"]
    problems = []
    if protocol["split"] != SPLIT_RULE:
        problems.append(f"split must be {SPLIT_RULE}")
    if not isinstance(stop, Mapping) or stop.get("model") not in ("last", "best"):
        problems.append("stop.model must be last or best")
    elif type(stop.get("rounds")) is not int or stop["rounds"] < 1:
        problems.append("stop.rounds must be a whole number of at least 1")
    elif "rounds" in variables and variables["rounds"] != stop.get("rounds"):
        problems.append("the job's rounds are not the protocol's")
    if problems:
        raise JobError(f"The protocol is not kept: {'; '.join(problems)}.", reason="PROTOCOL_MISMATCH")

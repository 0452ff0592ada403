"""The door a result leaves by: a site's own filter that rebuilds every reply from what may leave.

It stands in the site's ``privacy.json``. It copies nothing that it does not know: no header, no key, no DXO
meta of the reply it was given gets past it, whoever put it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import ProcessType, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from histoflare.errors import HistoflareError, JobError
from histoflare.flare import capabilities
from histoflare.flare.admission import check_listed
from histoflare.flare.capabilities import ReleasedResult
from histoflare.flare.header_names import METRICS, NUMBERS, PSEUDONYM, REFUSED, RELEASE, WEIGHT
from histoflare.flare.job import job_of
from histoflare.privacy.own_policy_file import read_site_policy
from histoflare.privacy.policy import Policy
from histoflare.privacy.secure_sum.hello import Hello
from histoflare.reasons import REASONS
from histoflare.rounds.round import check_numbers
from histoflare.rounds.strategy import Strategy
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.ledgers import ledger_holds
from histoflare.site.messages import digest_of
from histoflare.site.refusals import note_refusal, say_refusal
from histoflare.site.site_file import read_own_file


class Gate(Filter):
    """Lets out updates and metrics that were released, as the policy allows, and fixed reason codes.

    Refuses by a coded reply, and never raises: what is raised in a filter travels to the server as text.

    Args:
        policy: The scope's signed policy, in the ``local`` folder of the site's startup kit.
    """

    def __init__(self, policy: str) -> None:
        super().__init__()
        self._policy = policy

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Return the reply that leaves."""
        if fl_ctx.get_process_type() == ProcessType.SERVER_JOB:
            return shareable  # FLARE's simulator gives its server the sites' files too
        site = _Site(fl_ctx)
        try:
            local = Path(fl_ctx.get_engine().get_workspace().get_site_config_dir())
            reply = self._rebuild(shareable, read_site_policy(local / self._policy), site, fl_ctx)
        except HistoflareError as error:
            say_refusal(self.logger.warning, fl_ctx.get_job_id(), error)
            site.note(error)
            reply = refused(error.reason)
        except Exception:
            self.logger.warning("nothing leaves: the reply could not be checked", exc_info=True)
            reply = refused("REPLY_NOT_ALLOWED")
        _restore_cookies(fl_ctx)
        pseudonym = _pseudonym(fl_ctx)
        if pseudonym:
            reply.set_header(PSEUDONYM, pseudonym)
        capabilities.permit(reply)
        return reply

    def _rebuild(self, shareable: Shareable, policy: Policy, site: _Site, fl_ctx: FLContext) -> Shareable:
        code = shareable.get_return_code()
        if code not in (None, ReturnCode.OK):
            return refused(reason_of(code))
        try:
            dxo = from_shareable(shareable)
        except Exception:
            raise JobError("It is neither an update nor metrics.", reason="REPLY_NOT_ALLOWED") from None
        if dxo.data_kind == DataKind.WEIGHT_DIFF:
            return _update(dxo, policy, site, lambda: job_of(fl_ctx).strategy)
        if dxo.data_kind == DataKind.APP_DEFINED:
            return _hello(dxo.data, fl_ctx.get_identity_name())
        if dxo.data_kind == DataKind.METRICS:
            metrics, release = _released(dxo.data, policy, site)
            metrics = _metrics(metrics, policy)
            return _stamped(
                DataKind.METRICS, metrics, {}, replace(release, digest=digest_of(metrics)), policy
            )
        raise JobError(f"A reply of kind {dxo.data_kind} does not leave.", reason="REPLY_NOT_ALLOWED")


@dataclass(frozen=True)
class _Site:
    """The site's own file, read only where something is asked of it."""

    fl_ctx: FLContext

    def holds(self, sha256: str) -> bool:
        """Return whether the site's ledger says that these bytes were released."""
        return ledger_holds(self._configuration(), sha256)

    def note(self, error: HistoflareError) -> None:
        """Write why nothing leaves into the site's audit log."""
        with suppress(HistoflareError):
            note_refusal(self._configuration(), self.fl_ctx.get_job_id(), error)

    def _configuration(self) -> SiteConfiguration:
        local = Path(self.fl_ctx.get_engine().get_workspace().get_site_config_dir())
        site = self.fl_ctx.get_identity_name()
        return read_own_file(site, local)


def refused(reason: str) -> Shareable:
    """Return a reply with nothing but a fixed reason code."""
    reply: Shareable = make_reply(REFUSED + reason)
    return reply


def reason_of(code: str) -> str:
    """Return the fixed reason in a return code; any other text becomes ``REPLY_NOT_ALLOWED``."""
    reason = code.removeprefix(REFUSED)
    if code.startswith(REFUSED) and reason in REASONS:
        return reason
    known = {ReturnCode.TASK_UNKNOWN: "TASK_UNEXPECTED", ReturnCode.TASK_ABORTED: "STOPPED"}
    return known.get(code, "REPLY_NOT_ALLOWED")


def _hello(content: Any, site: str) -> Shareable:
    """Return a site's hello and nothing beside it: names and keys of fixed lengths, and no word of its data.

    Its certificate is public, its key and its random bytes are new, and the executor noted it.
    """
    if not capabilities.take_hello(content):
        raise JobError("The reply holds a hello that was not released.", reason="NOT_RELEASED")
    hello = Hello.from_json(content)
    if hello.site != site:
        raise JobError("The reply holds a hello of another site.", reason="REPLY_NOT_ALLOWED")
    reply: Shareable = DXO(DataKind.APP_DEFINED, data=hello.to_json()).to_shareable()
    return reply


def _update(dxo: DXO, policy: Policy, site: _Site, strategy: Callable[[], Strategy]) -> Shareable:
    arrays, release = _released(dxo.data, policy, site)
    if not all(np.isfinite(np.asarray(array)).all() for array in arrays.values()):
        raise JobError("The update has NaN or infinity in it.", reason="NOT_FINITE")
    weight = dxo.get_meta_prop(WEIGHT)
    if type(weight) is not float or not (math.isfinite(weight) and weight >= 0):
        raise JobError("The update's weight is not a number of at least 0.", reason="WEIGHTS_INVALID")
    if weight != 1.0 and not policy.counts:
        raise JobError(
            "The update's weight is a count of samples, and the policy lets no counts out: use weighting "
            '"uniform" in the job.',
            reason="WEIGHT_NOT_ALLOWED",
        )
    meta: dict[str, Any] = {WEIGHT: weight}
    numbers = dxo.get_meta_prop(NUMBERS)
    if numbers:
        meta[NUMBERS] = _numbers(numbers, policy, strategy())
    metrics = dxo.get_meta_prop(METRICS)
    if metrics:
        meta[METRICS] = _metrics(_released(metrics, policy, site)[0], policy)
    return _stamped(DataKind.WEIGHT_DIFF, arrays, meta, release, policy)


def _released(content: Any, policy: Policy, site: _Site) -> tuple[dict[str, Any], ReleasedResult]:
    """Return ``content`` and the note on it if exactly this was released, over enough patients.

    Under a policy with a budget the ledger has the last word: what it does not hold as released stays here.
    """
    release = capabilities.take_release(content) if isinstance(content, Mapping) else None
    if release is None:
        raise JobError("The reply holds something that was not released.", reason="NOT_RELEASED")
    if release.patients < policy.minimum_patients:
        raise JobError(
            f"It was computed over {release.patients} patients, and the policy asks for at least "
            f"{policy.minimum_patients}.",
            reason="TOO_FEW_PATIENTS",
        )
    if policy.protection is not None and not site.holds(release.digest):
        raise JobError("The ledger does not hold this as released.", reason="NOT_RELEASED")
    return dict(content), release


def _metrics(metrics: Mapping[str, Any], policy: Policy) -> dict[str, float | None]:
    allowed = policy.allowed_metrics(metrics)
    if any(type(value) not in (float, int, type(None)) for value in allowed.values()):
        raise JobError("A metric is not a number.", reason="METRIC_NOT_ALLOWED")
    if metrics and not allowed:
        raise JobError(
            "The policy lists none of these metrics. One that rests on too few patients of a class was taken "
            "out before: the note of the evaluation above this one says which.",
            reason="METRIC_NOT_ALLOWED",
        )
    return {name: None if value is None else float(value) for name, value in allowed.items()}


def _numbers(numbers: Any, policy: Policy, strategy: Strategy) -> dict[str, float]:
    """Return the numbers beside an update, over whose patients it was, if all of them may leave.

    They are what the executor let go, and what the job's strategy declares; the policy lists each. Under a
    budget none may follow from the site's data: the ledger holds nothing of them.
    """
    if not isinstance(numbers, Mapping) or capabilities.take_release(numbers) is None:
        raise JobError("The reply holds numbers that were not released.", reason="NOT_RELEASED")
    check_numbers(strategy, numbers, whose="The reply")
    check_listed(policy, numbers)
    if policy.protection is not None and any(strategy.numbers[name] is not False for name in numbers):
        raise JobError(
            "A number beside the update follows from the site's data, and nothing protects it.",
            reason="NUMBER_NOT_ALLOWED",
        )
    return dict(numbers)


def _stamped(
    kind: str, data: dict[str, Any], meta: dict[str, Any], release: ReleasedResult, policy: Policy
) -> Shareable:
    stamp = {
        "digest": release.digest,
        "scope": policy.name,
        "mechanism": policy.mechanism,
        "spend": None if release.spend is None else release.spend.to_json(),
        "seeded_noise": release.seeded,
    }
    if release.spend is not None and release.spend.honest > 1:
        stamp["trusts_ca"] = policy.trust_ca
    reply: Shareable = DXO(kind, data=data, meta={**meta, RELEASE: stamp}).to_shareable()
    return reply


def _restore_cookies(fl_ctx: FLContext) -> None:
    """Restore the task's cookies as they came: FLARE copies them onto the reply after this filter."""
    task = capabilities.kept_task(fl_ctx)
    if task is not None:
        task.data.set_cookie_jar(dict(task.cookies))


def _pseudonym(fl_ctx: FLContext) -> str | None:
    local = Path(fl_ctx.get_engine().get_workspace().get_site_config_dir())
    try:
        return read_own_file(fl_ctx.get_identity_name(), local).pseudonym
    except HistoflareError:
        return None

"""What Admission, executor, Gate and Guard know of one another in a site's job process.

Admission issues a token for a task; the executor does nothing without one, and notes what it lets go; the
gate lets out what was noted, once, and notes the reply it made; the guard checks that this is what is sent.
All of it is state of this process and private properties of FLARE's context: headers could be forged by the
server, or stripped by a filter of the job.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable

from histoflare.flare.header_names import PSEUDONYM
from histoflare.flare.job import Job
from histoflare.privacy.plan import PrivacyPlan
from histoflare.privacy.policy import Policy
from histoflare.privacy.spend import Spend
from histoflare.site.bookkeeping import Bookkeeping
from histoflare.site.messages import digest_of

_ADMITTED = "histoflare_admitted"
_TASK = "histoflare_task"
_REFUSAL = "histoflare_refusal"
_PLAIN = (str, int, float, bool)

_issued: dict[str, Admitted] = {}
_permitted: list[tuple[str, dict[str, Any]]] = []
_released: dict[str, ReleasedResult] = {}
_hellos: list[dict[str, str]] = []


@dataclass(frozen=True)
class ReleasedResult:
    """One result that may leave.

    Attributes:
        digest: Of its tensors or its metrics, see :func:`digest_of`.
        patients: Over how many patients it was computed.
        spend: What its mechanism did with each patient, as the plan says; None for metrics.
        seeded: Whether its noise can be repeated, which voids the guarantee.
    """

    digest: str
    patients: int
    spend: Spend | None = None
    seeded: bool = False


@dataclass(frozen=True)
class Admitted:
    """A job that was admitted here: under which policy, for how many rounds, and what is booked of it."""

    job: Job
    policy: Policy
    rounds: int
    bookkeeping: Bookkeeping


@dataclass(frozen=True)
class ReceivedTask:
    """A task as it came: the message, its cookies before anything else of this process saw them, and when."""

    data: Shareable
    cookies: dict[str, Any]
    arrived: float = field(default_factory=time.monotonic)


def issue(admitted: Admitted, fl_ctx: FLContext) -> None:
    """Issue the token that lets the executor work on this task."""
    token = secrets.token_hex(16)
    _issued[token] = admitted
    _set(fl_ctx, _ADMITTED, token)
    _set(fl_ctx, _REFUSAL, None)


def refuse(reason: str, fl_ctx: FLContext) -> None:
    """Note why no token is issued for this task."""
    _set(fl_ctx, _ADMITTED, None)
    _set(fl_ctx, _REFUSAL, reason)


def redeem(fl_ctx: FLContext) -> Admitted | None:
    """Take back this task's token; None if there is none. A token works once; earlier releases are void."""
    _released.clear()
    _hellos.clear()
    admitted = _issued.pop(str(fl_ctx.get_prop(_ADMITTED)), None)
    _set(fl_ctx, _ADMITTED, None)
    return admitted


def refusal(fl_ctx: FLContext) -> str:
    """Return why this task has no token."""
    return fl_ctx.get_prop(_REFUSAL) or "NOT_ADMITTED"


def release(content: Mapping[str, Any], patients: int, plan: PrivacyPlan | None = None) -> None:
    """Note that ``content`` (the tensors of an update made under ``plan``, or metrics) may leave, once."""
    spend, seeded = (None, False) if plan is None else (plan.spend(), plan.noise_seed is not None)
    noted = ReleasedResult(digest_of(content), patients, spend, seeded)
    _released[noted.digest] = noted


def take_release(content: Mapping[str, Any]) -> ReleasedResult | None:
    """Return the note on ``content`` and strike it out; None if exactly these bytes were never released."""
    return _released.pop(digest_of(content), None)


def release_hello(hello: Mapping[str, str]) -> None:
    """Note that this hello may leave, once."""
    _hellos[:] = [dict(hello)]


def take_hello(content: Any) -> bool:
    """Return whether ``content`` is the hello that was released, and strike it out."""
    released = _hellos.pop() if _hellos else None
    return released is not None and isinstance(content, dict) and content == released


def permit(reply: Shareable) -> None:
    """Note the reply that the gate made: no other may be sent. Its arrays can be read only from now on."""
    content = _content(reply)
    for value in content.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    _permitted[:] = [(_saying(reply), content)]


def is_permitted(reply: Shareable) -> bool:
    """Return whether ``reply`` is what the gate's reply was, FLARE's own headers apart.

    It holds the same arrays, which nobody can have written to: they are not hashed once more.
    """
    if not _permitted:
        return False
    ((said, permitted),) = _permitted
    content = _content(reply)
    return (
        _saying(reply) == said
        and content.keys() == permitted.keys()
        and all(_is_same(content[name], value) for name, value in permitted.items())
    )


def keep_task(task: Shareable, fl_ctx: FLContext) -> None:
    """Remember a task as it came; of its cookies, which go back to the server, the words and numbers."""
    jar = task.get_cookie_jar()
    cookies = jar if isinstance(jar, dict) else {}
    plain = {name: value for name, value in cookies.items() if type(name) is str and type(value) in _PLAIN}
    _set(fl_ctx, _TASK, ReceivedTask(task, plain))


def kept_task(fl_ctx: FLContext) -> ReceivedTask | None:
    """Return the task as it came."""
    kept: ReceivedTask | None = fl_ctx.get_prop(_TASK)
    return kept


def _saying(reply: Shareable) -> str:
    """Return a reply's code, pseudonym, kind and meta of its content, and any key beside them."""
    others = {name: value for name, value in reply.items() if name not in (ReservedHeaderKey.HEADERS, "DXO")}
    parts = [reply.get_return_code(), reply.get_header(PSEUDONYM), others]
    if reply.get_header(ReservedHeaderKey.CONTENT_TYPE) == "DXO":
        dxo = from_shareable(reply)
        parts += [dxo.data_kind, dxo.meta]
    return repr(parts)


def _content(reply: Shareable) -> dict[str, Any]:
    """Return a reply's tensors or numbers; a tensor that cannot be locked as the hash of its bytes."""
    if reply.get_header(ReservedHeaderKey.CONTENT_TYPE) != "DXO":
        return {}
    return {
        name: digest_of({name: value}) if isinstance(value, torch.Tensor) else value
        for name, value in from_shareable(reply).data.items()
    }


def _is_same(value: Any, permitted: Any) -> bool:
    if isinstance(permitted, np.ndarray):
        return value is permitted and not permitted.flags.writeable
    return value is permitted or (type(value) is type(permitted) and bool(value == permitted))


def _set(fl_ctx: FLContext, name: str, value: Any) -> None:
    fl_ctx.set_prop(name, value, private=True, sticky=False)

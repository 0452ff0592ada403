"""Why a site refused or failed a job, for its own people: a line in the log and one in the audit log.

Both have the fixed code, which is all that leaves the site, what is wrong in words, and what to do about it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress

from histoflare.errors import HistoflareError, LedgerError
from histoflare.reasons import advise_site
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.ledgers import audit_log_of

REFUSED = "refused"
"""``what`` of the audit log's lines."""
MOST_NOTED = 100
LONGEST_DETAIL = 10_000
_noted: Counter[tuple[str, str]] = Counter()
_said: defaultdict[tuple[str, str], set[str]] = defaultdict(set)


def say_refusal(say: Callable[[str], None], job: str, error: HistoflareError) -> None:
    """Say in one line of a log which code a job was answered with, what is wrong, and what to do.

    A process says each error of a job once; where the server asks again, only that it is so still. Of one
    code it tells :data:`MOST_NOTED` different errors apart and no more.

    Args:
        say: Writes a line, at a level that FLARE does not send to the server (a warning).
    """
    said, detail = _said[job, error.reason], str(error)[:LONGEST_DETAIL]
    if detail in said:
        say(f"job {job}: refused: {error.reason}, as before")
    elif len(said) >= MOST_NOTED:
        say(f"job {job}: refused: {error.reason}, for yet another cause; no more of them are listed")
    else:
        said.add(detail)
        say(describe_refusal(job, error.reason, detail))


def describe_refusal(job: str, code: str, detail: str, times: int = 1) -> str:
    """Return the line of a refusal: code, what is wrong, what to do."""
    often = f" ({times} times)" if times > 1 else ""
    advice = advise_site(code)
    todo = f" What to do: {advice}" if advice else ""
    return f"job {job}: refused: {code}{often}: {' '.join(detail.split())[:LONGEST_DETAIL]}{todo}"


def note_refusal(
    configuration: SiteConfiguration, run: str, error: HistoflareError, job: str | None = None
) -> None:
    """Write why nothing left into the site's audit log; a full disk is no reason to say more.

    A server that asks for what is refused again and again may not fill the disk with it: of one reason in one
    run a process writes :data:`MOST_NOTED` lines.

    Args:
        run: The run, under whose name the ledger and the site's notes have it.
        job: FLARE's id of the job; None: as the run.
    """
    kind = (run, error.reason)
    _noted[kind] += 1
    if _noted[kind] > MOST_NOTED:
        return
    last = {"further": "not noted"} if _noted[kind] == MOST_NOTED else {}
    advice = advise_site(error.reason)
    todo = {"do": advice} if advice else {}
    with suppress(LedgerError):
        audit_log_of(configuration).write(
            REFUSED,
            run=run,
            job=run if job is None else job,
            reason=error.reason,
            detail=str(error)[:LONGEST_DETAIL],
            **todo,
            **last,
        )


def list_refusals(configuration: SiteConfiguration, job: str, from_byte: int = 0) -> Iterator[str]:
    """Yield a line for each error with which a job was refused here, as :func:`say_refusal` has it.

    Args:
        job: FLARE's id of it.
        from_byte: Where in the audit log to begin; what stands there before is of earlier jobs.
    """
    times: Counter[tuple[str, str]] = Counter()
    for event in audit_log_of(configuration).read(from_byte):
        if event.get("what") == REFUSED and event.get("job") == job:
            times[str(event.get("reason")), str(event.get("detail"))] += 1
    for (code, detail), often in times.items():
        yield describe_refusal(job, code, detail, often)

"""A ledger's way from one place to another, and what becomes of the one it leaves.

A copy of a ledger would have the same patients pay from two purses. So a ledger goes on in one place only:

- *Within a machine* the new one closes the old one, with an entry of its own, before it is bound; an old one
  that has gone on since it was copied is not left behind: the move is refused.
- *To another machine* the old one is closed first (:func:`depart`), then copied, then bound there.
- *Back again*, what was left behind is an older copy: while the one that it went on to can be read, it is
  refused, whatever a person says. That one is copied back, and moved.
- *Renamed*, it is the same two files; *copied without its key*, it shares the head, which knows one history.
- *Otherwise* nobody can see whether the old one is still in use, and a person has to say that it is not.

What cannot be seen: a person who says so wrongly; two copies that were both made after the closing, each
bound on a machine of its own; a whole machine or volume that is set back to an earlier state.
"""

from __future__ import annotations

import os
from pathlib import Path

from histoflare.errors import LedgerError
from histoflare.privacy.ledger.chain import Entry
from histoflare.privacy.ledger.file import opened
from histoflare.privacy.ledger.place import Place
from histoflare.privacy.ledger.session import Sessions
from histoflare.privacy.ledger.state import LedgerState


def depart(sessions: Sessions) -> None:
    """Close a ledger in its place."""
    with sessions.writing(whole=True) as page:
        page.append("departure", {"to": None})


def move(sessions: Sessions, *, old_is_gone: bool, site: str | None) -> bool:
    """Bind a ledger to the place where it is; see :meth:`~histoflare.privacy.ledger.Ledger.move`."""
    with sessions.reading() as (state, entries, _):
        here = sessions.place(state.keys)
    old = state.place
    assert old is not None, "every ledger begins with its place"
    is_elsewhere = old != here
    if not is_elsewhere and not state.is_away and site in (None, state.site):
        return False
    if state.went_to is not None:
        _refuse_older(state, here)
        is_safe = False
    elif state.is_away:
        is_safe = is_elsewhere and _close(state, entries, here) is not False
    else:
        is_safe = not is_elsewhere or _is_renamed(old, here) or _close(state, entries, here) is True
    if not (is_safe or old_is_gone):
        raise LedgerError(
            f"This ledger was bound to {old.ledger} on {old.host}"
            + (f" and went on to {state.went_to}" if state.went_to else "")
            + ", and it cannot be seen from here whether anything is still booked there. It may be moved if "
            "nothing will be, ever again.",
            reason="LEDGER_MOVED",
        )
    with sessions.writing(whole=True, anywhere=True) as page:
        page.append("move", {"place": here.to_json(), "site": site or page.state.site})
    return True


def _refuse_older(state: LedgerState, here: Place) -> None:
    """Refuse to take up a ledger again while the one that it went on to is there.

    Two would be bound then, and what was spent there is not in this one.

    Raises:
        LedgerError: It is there (LEDGER_DAMAGED).
    """
    assert state.went_to is not None
    path = Path(state.went_to)
    try:
        if not path.exists() or path.samefile(here.ledger):
            return
        with opened(path) as connection:
            theirs = LedgerState(path, state.keys)
            theirs.read_on(connection)  # with the key of this one: a copy has the same
    except (OSError, LedgerError):
        return  # another ledger, or none: a person has to know
    if theirs.ledger == state.ledger:
        raise LedgerError(
            f"{here.ledger}: an older copy: the ledger went on as {path}, up to entry {theirs.head.seq}, and "
            "is there. What was spent since is not in this one, and two would be bound. To have it here "
            "again, copy that one, its key and the head beside the key over these, and move it. Nothing was "
            "changed.",
            reason="LEDGER_DAMAGED",
        )


def _is_renamed(old: Place, here: Place) -> bool:
    """Return whether there is no second history: the very files, or one of the two in its very place."""
    if here.machine is None or old.machine != here.machine:
        return False
    ledger_stays = (old.ledger, old.files[0]) == (here.ledger, here.files[0])
    key_stays = (old.key, old.files[1]) == (here.key, here.files[1])
    return ledger_stays or key_stays or (old.files == here.files and not os.path.lexists(old.ledger))


def _close(state: LedgerState, entries: list[Entry], here: Place) -> bool | None:
    """Close the ledger in the place that another one was bound to.

    Returns:
        True: it is closed, for this one. False: it went on to a third place. None: it cannot be reached.

    Raises:
        LedgerError: It has gone on since this copy was made (LEDGER_DAMAGED).
    """
    old = state.place
    if old is None or old.ledger == here.ledger or old.key == here.key:
        return None  # what is there is not the old one, but this one
    path, key = Path(old.ledger), Path(old.key)
    try:
        if not (path.exists() and key.exists()):
            return None
        if path.samefile(here.ledger) or key.samefile(here.key):
            return True  # one file under two names has one history
        with Sessions(path, key).writing(whole=True, anywhere=True) as page:
            theirs = page.state
            if (theirs.ledger, theirs.keys) != (state.ledger, state.keys):
                return None
            shared = min(len(entries), len(page.entries))
            has_gone_on = entries[shared - 1].chain != page.entries[shared - 1].chain or any(
                entry.kind != "departure" for entry in page.entries[shared:]
            )
            if not has_gone_on and theirs.went_to is None:
                page.append("departure", {"to": here.ledger})
    except OSError:
        return None
    except LedgerError as error:
        if error.reason == "LEDGER_FULL":
            raise
        return None
    if has_gone_on:
        raise LedgerError(
            f"{path}: the ledger has gone on there since this copy was made, up to entry {theirs.head.seq}. "
            "Copy it anew, with its key and the head beside it; nothing was changed.",
            reason="LEDGER_DAMAGED",
        )
    return theirs.went_to == here.ledger

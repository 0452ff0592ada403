"""A site's privacy ledger, which refuses what the patients' budgets do not allow.

One SQLite file per site, append-only and hash-chained. Before a job trains, its whole cost is composed with
everything that was ever charged to any of the patients it would train on, and reserved; before a round is
computed, its event is booked; before bytes leave, their hash is marked released, and before a failure is
answered, that is noted. A crash can lose a release, never a booking.

Guarantee: each patient's charges are Rényi divergences at one order that the budget fixed beforehand, and are
added up. That is an RDP filter (Feldman and Zrnic, Individual Privacy Accounting via a Rényi Filter, 2021):
the total stays within (ε, δ) although every job was chosen after the results of the earlier ones. The
neighbouring cohorts differ by one patient.

Where sites share their noise, what an event costs depends on who colludes with the server. The ledger keeps
on how many sites each sum counted, and a budget has two filters, each against one adversary for all jobs
(:meth:`histoflare.privacy.budget.Budget.filters`); both must have room. A budget against more colluders
prices the whole history anew.

================================  ===========================================
no noise (multiplier 0)           the charge is ∞: refused under any budget
a step count of 0                 the charge is 0
no patient to train on            refused (SITE_HAS_NO_TRAINING_DATA)
exactly what is left              reserved
left out, and nobody has room     reserved for nobody: the job is trained on nobody
left out, and reserved again      the cohort of the first time, less those who are gone
closed before anything is booked  nothing is charged
booked, and nothing answered yet  computed again under the same booking, free
released                          asked again: the same bytes and no others
answered with a failure           stays charged; asked again: booked anew
released, and then a failure      stays released; the failure is not noted
a sum that did not open           stays charged; its next attempt is booked anew
a sum's list, asked again         the same bytes, and else nothing: its pads serve for one vector
nothing protects what leaves      no charge bounds it: noted, beside all budgets
================================  ===========================================

It is made once, for one site, by :meth:`Ledger.create`; nothing else makes one. It is bound to its place
(:mod:`histoflare.privacy.ledger.place`), so that of two copies only one goes on.

It sees accidents, not its own keepers: who puts older copies of the ledger and of its head back goes unseen,
and so does a second ledger that was made for the same patients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from histoflare.checks import is_whole
from histoflare.errors import JobError, LedgerError
from histoflare.privacy.ledger import moves
from histoflare.privacy.ledger.chain import normalised
from histoflare.privacy.ledger.events import LEAVES_OUT, UNPROTECTED, booked_mechanism, mechanism_of, trust_of
from histoflare.privacy.ledger.history import RunHistory, summarise_history
from histoflare.privacy.ledger.leaving_out import (
    key_of,
    not_among,
    refuse_public,
    refuse_unsound,
    same_run,
    with_room,
)
from histoflare.privacy.ledger.place import Place
from histoflare.privacy.ledger.remaining import PatientsLeft, count_left
from histoflare.privacy.ledger.rules import (
    TRAIN,
    admit_further,
    admit_share,
    check_digest,
    check_text,
    enter_patients,
    members_of,
    most_charged,
    normalise_roles,
    open_account,
    refuse_beyond,
    refuse_few_known,
    refuse_nobody,
    refuse_over_budget,
    refuse_share,
    some_of,
)
from histoflare.privacy.ledger.session import Sessions
from histoflare.privacy.ledger.state import STEWARD, WORKSTATION
from histoflare.privacy.ledger.summary import DisclosureSummary, Summary, summarise, summarise_disclosures
from histoflare.privacy.ledger.tokens import EVALUATION, Booking, Disclosure, Release, Reservation
from histoflare.privacy.spend import Spend

if TYPE_CHECKING:
    from histoflare.privacy.budget import Budget


@dataclass(frozen=True)
class Verification:
    """What was found to be as it was written.

    Attributes:
        entries, patients, cohorts: How many of each.
        ahead: Entries that a crash kept from the head; the next use of the ledger puts that right.
        first_unix_time, last_unix_time: Of the first and the newest entry.
    """

    entries: int
    patients: int
    cohorts: int
    ahead: int
    first_unix_time: int
    last_unix_time: int


@dataclass(frozen=True)
class Identity:
    """Whose a ledger is, and where it goes on.

    Attributes:
        ledger: Its own number (hexadecimal); a copy has the same.
        site, owner: The site's name, and who made it: ``steward`` or ``workstation``.
        place: Where it is bound to. is_away: It was closed there, to be moved.
        went_to: The path of the one that closed it; None where it was closed before it was copied.
        is_here: Whether what is read here is what may be written to.
        entries: How many.
    """

    ledger: str
    site: str
    owner: str
    place: Place
    is_away: bool
    went_to: str | None
    is_here: bool
    entries: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "place": self.place.to_json()}


class Ledger:
    """A site's ledger. Nothing is read before the first use; several processes and threads may use it.

    Args:
        path: The SQLite file.
        key_path: The key's file, in another folder. Beside it are the head and the lock.
        site, owner: Whose ledger it must be to be written to; None: anybody's.

    Every method raises :class:`LedgerError`: ``LEDGER_MISSING`` (ledger or key is gone), ``LEDGER_DAMAGED``
    (nothing is done until a person has looked), ``LEDGER_FULL`` (no room on the disk), ``LEDGER_UNUSABLE``
    (permissions; another process has it; another version wrote it). What writes raises also
    ``LEDGER_FOREIGN`` (another's) and ``LEDGER_MOVED`` (bound to another place). Nothing was booked then, or
    something nobody acted on.
    """

    def __init__(
        self, path: Path, key_path: Path, *, site: str | None = None, owner: str | None = None
    ) -> None:
        self.path, self.key_path = path, key_path
        self._sessions = Sessions(path, key_path, site=site, owner=owner)

    @classmethod
    def create(cls, path: Path, key_path: Path, site: str) -> Ledger:
        """Make a site's ledger and its key, which have never been there, and return it.

        A making that a crash cut short is finished.

        Raises:
            LedgerError: There is a ledger already (LEDGER_UNUSABLE), or one of the two is gone.
            JobError: The site's name is empty.
        """
        check_text(site=site)
        ledger = cls(path, key_path, site=site, owner=STEWARD)
        if not ledger._sessions.create(site, STEWARD):
            raise LedgerError(
                f"{path}: there is a ledger already, and a site has one for all jobs and kits. Name it and "
                "its key in the site's file (histoflare ledger show says whose it is); nothing was changed."
            )
        return ledger

    @classmethod
    def open_or_create(cls, path: Path, key_path: Path, site: str) -> Ledger:
        """Return the ledger of a site on a workstation; it is made, and marked as such, if there is none."""
        check_text(site=site)
        ledger = cls(path, key_path, site=site)
        ledger._sessions.create(site, WORKSTATION)
        return ledger

    def check_usable(self) -> None:
        """Raise :class:`LedgerError` unless this ledger may be written to; nothing is written."""
        with self._sessions.reading() as (state, _, _):
            self._sessions.check_usable(state)

    def identity(self) -> Identity:
        """Return whose it is, and where it is bound to."""
        with self._sessions.reading() as (state, _, _):
            assert state.place is not None
            is_here = not state.is_away and state.place == self._sessions.place(state.keys)
            return Identity(
                ledger=state.ledger,
                site=state.site,
                owner=state.owner,
                place=state.place,
                is_away=state.is_away,
                went_to=state.went_to,
                is_here=is_here,
                entries=state.head.seq,
            )

    def depart(self) -> None:
        """Close it in this place, so that it can be copied to another and :meth:`move` there."""
        moves.depart(self._sessions)

    def move(self, *, old_is_gone: bool = False, site: str | None = None) -> bool:
        """Bind the ledger to the place where it is now; return whether there was anything to do.

        The one in the place it was bound to is closed, if it can be reached from here and is another file.

        Args:
            old_is_gone: That nothing will be booked there any more, where that cannot be seen from here.
            site: Another name that the site has from now on; None leaves it.

        Raises:
            LedgerError: The old one has gone on since this copy was made (LEDGER_DAMAGED); whether it is in
                use cannot be seen (LEDGER_MOVED).
        """
        return moves.move(self._sessions, old_is_gone=old_is_gone, site=site)

    def reserve(
        self,
        *,
        run: str,
        about: str,
        spend: Spend,
        rounds: int,
        roles: Mapping[str, str],
        budget: Budget,
        trusts_server: bool = False,
        trusts_ca: bool = False,
        job_share: float = 1.0,
        role: str = TRAIN,
        leave_out: bool = False,
    ) -> Reservation:
        """Reserve a run's whole cost, all rounds with participation 1, for the patients of one role.

        What is reserved and open already (same run, about, spend, rounds and cohort) is given back as it is.
        With any of them changed it is a new reservation, charged beside the old one.

        With ``leave_out`` a patient without room is left out (:mod:`~histoflare.privacy.ledger.leaving_out`),
        and :meth:`left_out` says who. What is reserved and open already is then given back whatever the
        cohort would be today.

        Args:
            run: The run's name; a job that resumes the run has the same.
            about: What the noise protects against, in a few words, such as ``"dp-patient: dp-sgd"``. It is
                kept in the clear.
            spend: The event of one round.
            rounds: How many rounds; at least 1. Of shared noise each attempt of a round is one.
            roles: Patient → one of :data:`ROLES`, for all patients of the site. Those with ``role`` are the
                cohort. Names are compared as NFC without spaces around them.
            budget: What each patient may be charged.
            trusts_server: Whether the protection does not hold against the server. It is charged all the
                same.
            trusts_ca: Whether sites are counted on that only the certificate authority vouches for.
            job_share: Which part of the budget's allowance the run may charge a patient, all its reservations
                together.
            role: Whose cohort it is: ``train``, or ``test`` for an evaluation.
            leave_out: Leave out whoever has no room; else nothing is reserved if one has none.

        Raises:
            LedgerError: A patient would be charged more than the budget (BUDGET_EXHAUSTED), or for this run
                more than its share (JOB_SHARE_EXCEEDED); with ``leave_out`` so only if everybody would. A
                patient has another role in the ledger (ROLE_CHANGED); nobody has the role
                (SITE_HAS_NO_TRAINING_DATA, NOTHING_TO_EVALUATE); to leave anybody out is not covered
                (LEAVE_OUT_UNSOUND).
            JobError: The arguments cannot be used (PRIVACY_INVALID).
        """
        if type(rounds) is not int or rounds < 1:
            raise JobError(f"rounds: a whole number of at least 1, not {rounds!r}", reason="PRIVACY_INVALID")
        check_text(run=run, about=about)
        known_as = normalise_roles(roles)
        refuse_nobody(known_as, role)
        with self._sessions.writing(whole=True) as page:
            ids = enter_patients(page, known_as)
            of_role = {name: ids[name] for name, its in known_as.items() if its == role}
            asked = (run, about, spend, rounds, trusts_server, trusts_ca)
            content: dict[str, Any] = {"run": run, "about": about, "rounds": rounds}
            content |= {"mechanism": mechanism_of(spend)}
            content |= {"trust": trust_of(server=trusts_server, ca=trusts_ca)}
            if leave_out:
                going_on = same_run(page.state, asked, role)
                if going_on is not None:
                    return going_on.reservation
                refuse_unsound(page.state, budget, trusts_server=trusts_server)
                refuse_public(budget, spend, rounds, job_share)
                kept_in = with_room(
                    page.state,
                    of_role,
                    budget=budget,
                    spend=spend,
                    rounds=rounds,
                    job_share=job_share,
                    run=run,
                )
                content |= {"cohort": page.add_cohort(of_role[name] for name in kept_in), LEAVES_OUT: role}
                return page.state.accounts[page.append("reservation", content)].reservation
            cohort = page.add_cohort(of_role.values())
            for account in page.state.accounts.values():
                old = account.reservation
                same = account.cohort == cohort and key_of(old) == asked and not old.leaves_out
                if account.is_open and same:
                    return old
            members, is_shared = members_of(page.state, cohort), spend.honest > 1
            for kept in budget.filters():
                before = float(page.state.charges(kept)[members].max())
                cost = kept.cost([kept.price(spend).times(rounds)])
                refuse_over_budget(kept, before, cost, f"run {run}", is_shared)
                admit_share(page.state, kept, run, cohort, cost, job_share, is_shared)
            content |= {"cohort": cohort}
            return page.state.accounts[page.append("reservation", content)].reservation

    def left_out(self, reservation: Reservation, roles: Mapping[str, str]) -> frozenset[str]:
        """Return who is not in a reservation that leaves out, by their names in ``roles``.

        Those who had no room, and those who came later: a run's cohort is chosen once.

        Raises:
            LedgerError: The reservation is closed, or not of this ledger (NOT_ADMITTED).
        """
        if not reservation.leaves_out:
            return frozenset()
        with self._sessions.writing(whole=False) as page:  # as every use of what was just reserved
            state = page.state
            account = open_account(state, reservation)
            ids = {
                name: state.patients.get(state.keys.patient(normalised(name)), len(state.roles) + 1)
                for name, its in roles.items()
                if its == account.role
            }
            return frozenset(not_among(state, account, ids, ids))

    def exposure(self, roles: Mapping[str, str], budget: Budget, role: str = TRAIN) -> tuple[float, ...]:
        """Return what the most exposed of the patients of a role was charged (ρ); nothing is written.

        Args:
            roles, budget, role: As for :meth:`reserve`.

        Returns:
            One figure for each of the budget's filters, in their order.

        Raises:
            LedgerError: A patient has another role in the ledger (ROLE_CHANGED).
        """
        known_as = normalise_roles(roles)
        with self._sessions.reading() as (state, _, _):
            return most_charged(state, known_as, budget.filters(), role)

    def check_room(
        self,
        *,
        spend: Spend,
        rounds: int,
        roles: Mapping[str, str],
        budget: Budget,
        job_share: float = 1.0,
        role: str = TRAIN,
        leave_out: bool = False,
    ) -> frozenset[str]:
        """Refuse what :meth:`reserve` would refuse of a new run, as it does; nothing is written.

        Returns:
            Who would be left out, by their names in ``roles``; nobody without ``leave_out``.
        """
        known_as = normalise_roles(roles)
        refuse_nobody(known_as, role)
        filters, is_shared = budget.filters(), spend.honest > 1
        with self._sessions.reading() as (state, _, _):
            charged = most_charged(state, known_as, filters, role)
            if leave_out:
                refuse_unsound(state, budget, trusts_server=False)
                refuse_public(budget, spend, rounds, job_share)
                ids = {
                    name: state.patients.get(state.keys.patient(normalised(name)))
                    for name, its in roles.items()
                    if its == role
                }
                room = with_room(state, ids, budget=budget, spend=spend, rounds=rounds, job_share=job_share)
                return frozenset(ids.keys() - room)
        for kept, before in zip(filters, charged, strict=True):
            cost = kept.cost([kept.price(spend).times(rounds)])
            refuse_over_budget(kept, before, cost, "this job", is_shared)
            refuse_share(kept, cost, job_share, is_shared)
        return frozenset()

    def book(
        self,
        reservation: Reservation,
        round_index: int,
        model_sha256: str,
        budget: Budget,
        job_share: float = 1.0,
        *,
        countable: int | None = None,
    ) -> Booking | Release:
        """Charge one round before anything of it is computed; or say what became of it.

        The event's key is (reservation, round, hash of the received model). A new key is booked. One that is
        booked and not answered may be computed again under the same booking: nothing of it left. For a
        released one the :class:`Release` says which bytes may leave again; nothing else may. One that was
        answered with a failure (:meth:`fail`) is booked anew, and charged again.

        Of shared noise the transcript of the sum stands in the model's place. It is booked once, whatever
        becomes of it: the pads that hide a vector would not hide a second one. Each attempt of a round has
        another, and is charged.

        Args:
            reservation: As :meth:`reserve` gave it.
            round_index: From 0.
            model_sha256: SHA-256 (64 hexadecimal digits) of the model the round starts from, or of the
                transcript.
            budget, job_share: Asked again for events beyond the reserved ones, and for each event of shared
                noise, as the budget may be one against more colluders now.
            countable: Of shared noise, and only then: how many sites of the sum this one counts on, itself
                included.

        Raises:
            LedgerError: An event beyond the reserved ones, and the budget has no room for it
                (BUDGET_EXHAUSTED), or the run's share (JOB_SHARE_EXCEEDED), or it leaves out and takes none
                beyond (RESERVATION_USED_UP); the reservation was closed, or is not of this ledger
                (NOT_ADMITTED); a sum has too few sites that are known here
                (SUM_TOO_FEW_KNOWN), or its transcript served before and no bytes were released
                (NOT_RELEASED).
        """
        return self._book(
            reservation, round_index, model_sha256, budget, job_share, countable=countable, again=False
        )

    def book_again(
        self,
        reservation: Reservation,
        round_index: int,
        model_sha256: str,
        budget: Budget,
        job_share: float = 1.0,
    ) -> Booking:
        """Charge a released round a further time, because its bytes are lost; as :meth:`book` otherwise.

        Raises:
            LedgerError: Its noise is shared (NOT_RELEASED): the same pads would hide two vectors.
        """
        if reservation.spend.honest > 1:
            raise _served()
        booked = self._book(reservation, round_index, model_sha256, budget, job_share, again=True)
        assert isinstance(booked, Booking)
        return booked

    def _book(
        self,
        reservation: Reservation,
        round_index: int,
        model_sha256: str,
        budget: Budget,
        job_share: float,
        *,
        countable: int | None = None,
        again: bool,
    ) -> Booking | Release:
        check_digest(model_sha256)
        is_shared = reservation.spend.honest > 1
        if is_shared != is_whole(countable, 1):
            raise JobError(
                f"countable: with shared noise a whole number of at least 1, else None; not {countable!r}",
                reason="PRIVACY_INVALID",
            )
        if type(round_index) is not int or round_index < 0:
            raise JobError(f"A round is counted from 0, not {round_index!r}.", reason="PRIVACY_INVALID")
        with self._sessions.writing(whole=False) as page:
            state = page.state
            account = open_account(state, reservation)
            id_ = state.newest.get((reservation.id, round_index, model_sha256))
            if id_ is not None and id_ not in state.failures:
                if id_ in state.releases and not again:
                    return Release(state.bookings[id_], state.releases[id_])
                if id_ not in state.releases and not is_shared:
                    return state.bookings[id_]
            if countable is not None:
                if model_sha256 in state.transcripts:
                    raise _served()
                refuse_few_known(reservation.spend, countable, budget.colluders)
            if reservation.leaves_out:
                refuse_beyond(account)
            elif is_shared or account.booked >= account.reservation.rounds:
                admit_further(state, account, budget, job_share, countable)
            content = {
                "reservation": reservation.id,
                "round": round_index,
                "model": model_sha256,
                "attempt": 1 if id_ is None else state.bookings[id_].attempt + 1,
                "mechanism": booked_mechanism(countable),
                "trust": trust_of(server=reservation.trusts_server, ca=reservation.trusts_ca),
            }
            return state.bookings[page.append("booking", content)]

    def release(self, paid: Booking | Disclosure, digest: str, figures: Iterable[str] = ()) -> None:
        """Mark the bytes with this SHA-256 (hex) as those that may leave for what was booked; twice is once.

        Args:
            figures: Of an evaluation: the names of its figures.

        Raises:
            LedgerError: Other bytes were released for it, or it was answered with a failure (NOT_RELEASED);
                it is not of this ledger (NOT_ADMITTED).
        """
        check_digest(digest)
        with self._sessions.writing(whole=False) as page:
            state = page.state
            if state.paid.get(paid.id) != paid:
                raise LedgerError("What is to be released is not in this ledger.", reason="NOT_ADMITTED")
            if paid.id in state.failures:
                raise LedgerError(
                    f"Entry {paid.id} was answered with a failure; nothing may leave for it any more.",
                    reason="NOT_RELEASED",
                )
            if state.releases.get(paid.id, digest) != digest:
                raise LedgerError(
                    f"Entry {paid.id} was released with other bytes; only those may leave.",
                    reason="NOT_RELEASED",
                )
            if paid.id not in state.releases:
                page.append("release", {"of": paid.id, "digest": digest, "figures": sorted(figures)})

    def fail(self, booking: Booking) -> None:
        """Note, before it is said, that the answer to a booking is that it failed; twice is once.

        A failure is an answer too, and a booking pays for one answer. It stays charged, nothing can be
        released for it any more, and the same question is booked anew. A booking that is released already is
        left as it is: asked again, it gives the same bytes, and nothing is computed.

        Raises:
            LedgerError: The booking is not of this ledger (NOT_ADMITTED).
        """
        with self._sessions.writing(whole=False) as page:
            state = page.state
            if state.bookings.get(booking.id) != booking:
                raise LedgerError("What failed is not booked in this ledger.", reason="NOT_ADMITTED")
            if booking.id not in state.failures and booking.id not in state.releases:
                page.append("failure", {"of": booking.id})

    def is_released(self, digest: str) -> bool:
        """Return whether the bytes with this SHA-256 (hex) were released."""
        # With the lock: what a crash kept from the head must be in it before anyone acts on it.
        with self._sessions.writing(whole=False) as page:
            return digest in page.state.digests

    def disclose(
        self, *, run: str, model_sha256: str, patients: Iterable[str], roles: Mapping[str, str], limit: int
    ) -> Disclosure:
        """Book that figures of a model on some patients leave.

        The same run, model and patients again are the same disclosure; other patients are another one, for
        the difference of the two tells about the patients between them.

        Args:
            run, model_sha256: What was evaluated.
            patients: On whom; none of them may have the role ``train``.
            roles: As for :meth:`reserve`, for all patients of the site.
            limit: How many disclosures a patient may have part in; at least 0.

        Raises:
            LedgerError: The limit is 0 (EVALUATION_NOT_ALLOWED), a patient has reached it
                (EVALUATIONS_EXHAUSTED), a patient has another role in the ledger or is trained on
                (ROLE_CHANGED), or there are no patients (NOTHING_TO_EVALUATE).
        """
        check_text(run=run)
        check_digest(model_sha256)
        known_as = normalise_roles(roles)
        evaluated = sorted({normalised(patient) for patient in patients})
        if limit < 1:
            raise LedgerError("This site lets no evaluation out.", reason="EVALUATION_NOT_ALLOWED")
        if not evaluated:
            raise LedgerError("There is no patient to evaluate on.", reason="NOTHING_TO_EVALUATE")
        trained_on = [name for name in evaluated if known_as.get(name) in (TRAIN, None)]
        if trained_on:
            raise LedgerError(
                f"Evaluated are patients of another role than train; not so: {some_of(trained_on)}.",
                reason="ROLE_CHANGED",
            )
        with self._sessions.writing(whole=True) as page:
            state = page.state
            ids = enter_patients(page, known_as)
            cohort = page.add_cohort(ids[name] for name in evaluated)
            key = (run, model_sha256, cohort)
            if key not in state.counted:
                counted = state.disclosed()[members_of(state, cohort)]
                if counted.max() >= limit:
                    raise LedgerError(
                        f"{np.count_nonzero(counted >= limit)} of {len(evaluated)} patients had part in "
                        f"{limit} evaluations that left, as many as the policy allows.",
                        reason="EVALUATIONS_EXHAUSTED",
                    )
                content: dict[str, Any] = {
                    "what": EVALUATION,
                    "run": run,
                    "round": None,
                    "model": model_sha256,
                }
                content |= {"cohort": cohort, "patients": len(evaluated), "figures": None, "digest": None}
                page.append("disclosure", {**content, "mechanism": UNPROTECTED, "trust": None})
            return state.counted[key]

    def note(
        self,
        *,
        what: str,
        run: str,
        model_sha256: str,
        digest: str,
        figures: Iterable[str],
        patients: int,
        round_index: int | None = None,
    ) -> Disclosure:
        """Note what leaves without any protection, before it leaves. No budget covers it, and none is asked.

        The same bytes for the same question again are the same disclosure.

        Args:
            what: :data:`~histoflare.privacy.ledger.tokens.EVALUATION` or
                :data:`~histoflare.privacy.ledger.tokens.UPDATE`.
            run, model_sha256: What was evaluated, or what the update started from.
            digest: SHA-256 (hex) of what leaves.
            figures: Names of the figures that leave.
            patients: Of how many patients.
            round_index: Of an update; from 0.
        """
        check_text(run=run, what=what)
        check_digest(model_sha256)
        check_digest(digest)
        key = (what, run, round_index, model_sha256, digest)
        with self._sessions.writing(whole=False) as page:
            if key not in page.state.noted:
                content: dict[str, Any] = {"what": what, "run": run, "round": round_index}
                content |= {"model": model_sha256, "cohort": None}
                content |= {"patients": patients, "figures": sorted(figures)}
                content |= {"digest": digest, "mechanism": UNPROTECTED, "trust": None}
                page.append("disclosure", content)
            return page.state.noted[key]

    def close(self, run: str) -> list[Reservation]:
        """Give back what a run reserved and did not book; return what was open.

        Nothing more is booked under it; the run goes on only by reserving anew. What is booked may still be
        released: it is paid for.

        Raises:
            LedgerError: The run has nothing open (RUN_INVALID).
        """
        with self._sessions.writing(whole=True) as page:
            found = [account.reservation for account in page.state.accounts.values() if account.is_open]
            found = [reservation for reservation in found if reservation.run == run]
            if not found:
                raise LedgerError(f"Run {run!r} has no open reservation here.", reason="RUN_INVALID")
            page.append("closing", {"run": run, "reservations": [reservation.id for reservation in found]})
        return found

    def open_runs(self) -> set[str]:
        """Return the runs under which more may be booked."""
        with self._sessions.reading() as (state, _, _):
            return {account.reservation.run for account in state.accounts.values() if account.is_open}

    def summary(self, budget: Budget) -> Summary:
        """Return what was reserved, booked, answered and disclosed, and its cost; no patient is named."""
        with self._sessions.reading() as (state, _, _):
            return summarise(state, budget)

    def remaining(self, budget: Budget, names: Iterable[str] = ()) -> tuple[PatientsLeft, ...]:
        """Return how many patients have how much of a budget left, those with the least first.

        Args:
            names: Patients who are named in it; the ledger knows nobody's name.
        """
        with self._sessions.reading() as (state, _, _):
            return count_left(state, budget, names)

    def disclosures(self) -> tuple[DisclosureSummary, ...]:
        """Return what left without protection, by run and kind, in the order of their first entries."""
        with self._sessions.reading() as (state, _, _):
            return summarise_disclosures(state)

    def history(self, run: str) -> RunHistory:
        """Return what happened in one run: what was paid for, what left and when; no patient is named."""
        with self._sessions.reading() as (state, entries, _):
            return summarise_history(state, entries, run)

    def verify(self) -> Verification:
        """Read and verify everything; :class:`LedgerError` (LEDGER_DAMAGED) if anything is not as written."""
        with self._sessions.reading() as (state, entries, head):
            return Verification(
                entries=state.head.seq,
                patients=len(state.roles),
                cohorts=len(state.cohorts),
                ahead=state.head.seq - head.seq,
                first_unix_time=entries[0].unix_time,
                last_unix_time=state.unix_time,
            )

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield all entries as plain JSON values, verified; patients are MACs.

        An entry that added patients or a cohort has them too: ``patients`` is a list of [MAC, role],
        ``members`` the cohort's bit set, both in hexadecimal. With the key anyone can check the chain: the
        ``body`` as :func:`~histoflare.privacy.ledger.chain.canonical_json` JSON is what was signed.
        """
        with self._sessions.reading() as (state, entries, _):
            macs = iter(state.patients)
            roles, cohorts = iter(state.roles), iter(state.cohorts)
            for entry in entries:
                body = entry.content()
                line: dict[str, Any] = {"seq": entry.seq, "unix_time": entry.unix_time, "kind": entry.kind}
                line |= {"body": body, "chain": entry.chain.hex()}
                if entry.kind == "patients":
                    line["patients"] = [[next(macs).hex(), next(roles)] for _ in range(body["count"])]
                elif entry.kind == "cohort":
                    line["members"] = next(cohorts).hex()
                yield line


def _served() -> LedgerError:
    return LedgerError(
        "This list of sites served for a vector before, and its bytes are not here to be sent again. The "
        "pads of a list hide one vector: the round needs another attempt, with new hellos.",
        reason="NOT_RELEASED",
    )

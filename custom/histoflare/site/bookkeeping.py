"""A site's bookkeeping of one job: it reserves, books and releases, and refuses what is not booked.

It stands between FLARE and the trainer. Under a scope without a budget nothing is booked, and every update
and evaluation that leaves is noted in the ledger all the same, as one that nothing protects.

A round is booked before its first gradient and released before FLARE gets its bytes. A crash between the two
can lose a release, never a booking; a round asked for again gets the very bytes that were released, or it is
booked anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from histoflare.errors import HistoflareError, JobError, LedgerError
from histoflare.privacy.budget import Budget
from histoflare.privacy.ledger import EVALUATION, UPDATE, Booking, Ledger, Release, Reservation
from histoflare.privacy.plan import PrivacyPlan
from histoflare.privacy.policy import Policy
from histoflare.privacy.release_store import ReleaseStore
from histoflare.privacy.small_cells import hide_small
from histoflare.privacy.tally import Tally
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import read_roles
from histoflare.site.ledgers import audit_log_of, open_ledger
from histoflare.site.messages import Arrays, EvaluateAnswer, TrainAnswer, digest_of
from histoflare.site.refusals import note_refusal
from histoflare.site.run_name import is_run_name
from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule

TEST = "test"
"""Role of the patients who are asked about; at a site that only evaluates all have it."""

NO_RAW_FIGURES = (
    "This policy lets no figures without noise out (protection.evaluations is 0). A job that says in "
    '[evaluation] mechanism = "tally" sends noised counts, which are booked on the patients asked about.'
)

MOST_TALLY_BYTES = 2**23
"""Of the counts of an evaluation: those of a thousand classes."""


@dataclass(frozen=True)
class Answer:
    """A round's answer: its digest, and whether it is one that was released before."""

    answer: TrainAnswer
    digest: str
    again: bool


class Bookkeeping:
    """What is booked of one job at one site.

    ``roles`` are the patients of the manifest as they were reserved for; ``left_out`` those among them who
    take no part, as their budget has no room and the policy leaves them out. Nothing that leaves, and no
    check, may depend on ``left_out`` but training and evaluation without them.

    Args:
        configuration: The site's. policy: Of the job's scope. plan: The job's, settled for its rounds.
        rounds: Of the job, with its spare ones. run: Its run; the same for a job that goes on after another.
        weights: How many numbers leave in a round (``rounds.round.count_sent_by_job``).
        labels: Of the task. data: The kind of data it is trained on (``site.kinds``).
        split: The protocol's rule, for a manifest without a split column.

    Raises:
        JobError: ``run`` cannot be the name of a folder (RUN_INVALID).
    """

    def __init__(
        self,
        configuration: SiteConfiguration,
        policy: Policy,
        plan: PrivacyPlan,
        *,
        rounds: int,
        weights: int,
        run: str,
        labels: list[str],
        data: str,
        split: SplitRule = DEFAULT_SPLIT,
    ) -> None:
        if not is_run_name(run):
            raise JobError(f"{run!r} cannot be the name of a run.", reason="RUN_INVALID")
        self.run = run
        self.plan = plan
        self.roles: dict[str, str] | None = None
        self.left_out: frozenset[str] = frozenset()
        self.configuration = configuration
        self._policy = policy
        self._rounds = rounds
        self._weights = weights
        self._labels = labels
        self._data = data
        self._split = split
        self._reservation: Reservation | None = None
        self._broken = False
        self._audit = audit_log_of(configuration)

    @property
    def budget(self) -> Budget:
        """Each patient's budget under the policy; only where the policy has one."""
        assert self._policy.protection is not None
        return self._policy.protection.budget()

    def reserve(self) -> None:
        """Reserve the whole job for every patient of the training cohort; without a budget look for a ledger.

        Raises:
            JobError: The plan is not what the policy asks for (PRIVACY_MISMATCH), the sampler of its noise
                takes too much of the budget's δ (PRIVACY_INVALID), or the site only evaluates.
            LedgerError: There is no ledger (LEDGER_MISSING) or it cannot be used, the budget, or the share
                of it that one job may take, does not suffice, or a patient's role changed.
        """
        if self.configuration.evaluation_only:
            raise JobError("This site only evaluates (evaluation_only).", reason="EVALUATION_ONLY")
        check_plan(self._policy, self.plan)
        check_leaving_out(self._policy, self.plan)
        protection = self._policy.protection
        if protection is None:
            open_ledger(self.configuration).check_usable()
            return
        if self._reservation is not None:
            return
        check_sampler(self.budget, self.plan, self._rounds, self._weights)
        is_shared = self.plan.spend().honest > 1
        roles = read_roles(self.configuration, self._labels, self._data, self._split)
        check_size(self._policy, sum(role == "train" for role in roles.values()))
        ledger = open_ledger(self.configuration)
        reservation = ledger.reserve(
            run=self.run,
            about=self._about(self.plan, self._policy.mechanism),
            spend=self.plan.spend(),
            rounds=self._rounds,
            roles=roles,
            budget=self.budget,
            trusts_server=self._policy.mechanism == "server-noise",
            trusts_ca=is_shared and self._policy.trust_ca,
            job_share=protection.job_share,
            leave_out=protection.leaves_out,
        )
        left_out = self._leave_out(ledger, reservation, roles)
        self._reservation, self.roles = reservation, roles
        self._audit.write(
            "reserved",
            run=self.run,
            left_out=left_out,
            rounds=self._rounds,
            plan=self.plan.to_json(),
            sampler_delta=self.budget.sampler_delta(self.plan.numbers(self._rounds, self._weights)),
        )

    def _leave_out(self, ledger: Ledger, reservation: Reservation, roles: Mapping[str, str]) -> int:
        """Leave out of the run who is not in a reservation; return how many, for the site's own log."""
        found = ledger.left_out(reservation, roles)
        self.left_out |= found
        return len(found)

    def _about(self, plan: PrivacyPlan, what: str) -> str:
        """Return what a reservation is for, for whoever reads the ledger."""
        about = f"{self._policy.name}: {what}"
        if plan.mechanism == "server-noise":
            about += ", no protection from the server"
        if plan.spend().honest > 1 and self._policy.trust_ca:
            about += ", if the holder of the certificate authority is honest"
        return about + (", repeatable noise: no protection" if plan.noise_seed is not None else "")

    def train(
        self,
        received: Mapping[str, NDArray[Any]],
        index: int,
        train: Callable[[], TrainAnswer],
        *,
        transcript: str | None = None,
        countable: int | None = None,
    ) -> Answer:
        """Return a round's answer, booked and released.

        Args:
            received: The global state as received; with run and round it is the key of the event.
            train: Trains and protects the update; in a secure sum it adds the pads.
            transcript: In a secure sum, the hash of all that it depends on (64 hexadecimal digits): the key
                of the event in place of ``received``.
            countable: In a secure sum, on how many of its sites this one counts, itself included.

        Raises:
            LedgerError: The round may not be booked, or there is no room for it; or its bytes were released
                and are lost, and a sum has pads for no others (NOT_RELEASED). Nothing was trained.
            HistoflareError: Training failed.
        """
        ledger = open_ledger(self.configuration)
        model = transcript or digest_of(received)
        if self._policy.protection is None:
            ledger.check_usable()  # before anything is trained that could not be noted
            answer = train()
            said = digest_of(answer.tensors)
            ledger.note(
                what=UPDATE,
                run=self.run,
                round_index=index,
                model_sha256=model,
                digest=said,
                figures=[*self._policy.allowed_metrics(answer.metrics), *answer.numbers],
                patients=answer.patients,
            )
            self._note_release("update", index, said, answer.patients)
            return Answer(answer, said, again=False)
        return self._paid(
            "update",
            self._reserved(),
            index,
            model,
            train,
            size_bytes=sum(array.nbytes for array in received.values()),
            transcript=transcript,
            countable=countable,
        )

    def _paid(
        self,
        what: str,
        reservation: Reservation,
        index: int,
        model: str,
        make: Callable[[], TrainAnswer],
        *,
        size_bytes: int,
        transcript: str | None = None,
        countable: int | None = None,
    ) -> Answer:
        """Return an answer under a budget: booked, made, kept and released, or the same bytes once more.

        Args:
            what: ``update`` or ``evaluation``, for the site's own log.
            index, model: With the reservation the key of the event.
            make: Makes what leaves.
            size_bytes: Of what leaves, at most: there must be room to keep it.
            transcript, countable: As for :meth:`train`.
        """
        assert self._policy.protection is not None
        ledger, share = open_ledger(self.configuration), self._policy.protection.job_share
        store = ReleaseStore(ledger.path.with_suffix(".releases") / self.run)
        counted = countable if reservation.spend.honest > 1 else None
        booked = ledger.book(reservation, index, model, self.budget, share, countable=counted)
        if isinstance(booked, Release):
            # A server that adds the noise would draw it anew: outsiders would see two draws for one event.
            kept = None if reservation.trusts_server else self._load(store, booked)
            if kept is not None:
                self._note_release(f"{what}, again", index, booked.digest, kept.patients)
                return Answer(kept, booked.digest, again=True)
            if transcript is not None:
                raise LedgerError(
                    "What was released for this list of sites is lost, and its pads hide no second vector: "
                    "the round needs another attempt, with new hellos.",
                    reason="NOT_RELEASED",
                )
            booked = ledger.book_again(reservation, index, model, self.budget, share)
        store.make_room(booked.id, size_bytes)
        try:
            answer = make()
            said = digest_of(answer.tensors)
            beside = {"patients": answer.patients, "weight": answer.weight, "numbers": answer.numbers}
            store.save(booked.id, answer.tensors, beside)
            ledger.release(booked, said)
        except Exception as error:
            if not (isinstance(error, HistoflareError) and error.reason == "STOPPED"):
                self._fail(ledger, booked, error)
            raise
        self._note_release(what, index, said, answer.patients)
        return Answer(answer, said, again=False)

    def check_reserved(self) -> None:
        """Raise :class:`JobError` (NOT_ADMITTED) if the policy has a budget and nothing is reserved in it."""
        if self._policy.protection is not None:
            self._reserved()

    def _reserved(self) -> Reservation:
        if self._reservation is None or self._broken:
            raise JobError("Nothing is reserved for this job.", reason="NOT_ADMITTED")
        return self._reservation

    def _fail(self, ledger: Ledger, booked: Booking, error: Exception) -> None:
        """Note in the ledger that a booked round is answered with a failure, and raise that failure.

        Raises:
            HistoflareError: TRAINING_FAILED, always.
        """
        self._broken = True  # unless the ledger knows of it
        ledger.fail(booked)
        self._broken = False
        known = error if isinstance(error, HistoflareError) else HistoflareError(repr(error))
        note_refusal(self.configuration, self.run, known)
        raise HistoflareError(str(known), reason="TRAINING_FAILED") from error

    def reserve_tally(self, tally: Tally, evaluations: int, length: int) -> Reservation:
        """Reserve an evaluation under the budget for every patient who is asked about.

        Args:
            tally: Its noise, settled.
            evaluations: How many of them: all of the job.
            length: How many numbers leave in one.

        Raises:
            JobError: The policy has no budget, or asks for noise that nobody can repeat (PRIVACY_MISMATCH);
                the sampler of the noise takes too much of the budget's δ (PRIVACY_INVALID); there are fewer
                patients than the policy asks for (TOO_FEW_PATIENTS); the manifest was changed since a
                training was reserved (COHORT_INVALID).
            LedgerError: There is no ledger or no room in the budget, or a patient's role changed.
        """
        check_tally(self._policy, tally)
        check_leaving_out(self._policy, tally)
        assert self._policy.protection is not None
        check_sampler(self.budget, tally, evaluations, length)
        is_shared = tally.spend().honest > 1
        roles = self._read_roles_again()
        check_size(self._policy, sum(role == TEST for role in roles.values()))
        ledger = open_ledger(self.configuration)
        reservation = ledger.reserve(
            run=self.run,
            about=self._about(tally, "evaluation"),
            spend=tally.spend(),
            rounds=evaluations,
            roles=roles,
            budget=self.budget,
            trusts_ca=is_shared and self._policy.trust_ca,
            job_share=self._policy.protection.job_share,
            role=TEST,
            leave_out=self._policy.protection.leaves_out,
        )
        self._leave_out(ledger, reservation, roles)
        self.roles = roles
        return reservation

    def tally(
        self,
        reservation: Reservation,
        received: Arrays,
        index: int,
        question: str,
        make: Callable[[], TrainAnswer],
        *,
        transcript: str | None = None,
        countable: int | None = None,
    ) -> Answer:
        """Return an evaluation under the budget, booked on the patients who are asked about, and released.

        Args:
            reservation: As :meth:`reserve_tally` gave it.
            received: The model as received. question: What else the counts depend on (task, seed).
            index: Of the evaluation in its job, from 0.
            make: Makes the noised counts.
            transcript, countable: In a secure sum, as for :meth:`train`.

        Raises:
            LedgerError: There is no room in the budget for one more.
            HistoflareError: The evaluation failed.
        """
        model = hashlib.sha256(f"{digest_of(received)} {TEST} {question}".encode()).hexdigest()
        return self._paid(
            "evaluation",
            reservation,
            index,
            transcript or model,
            make,
            size_bytes=MOST_TALLY_BYTES,
            transcript=transcript,
            countable=countable,
        )

    def _read_roles_again(self) -> dict[str, str]:
        """Return the patients' roles as the manifest has them.

        Raises:
            JobError: They are not those that were reserved for (COHORT_INVALID): the trainer would read the
                manifest anew, and train on patients for whom nothing is reserved.
        """
        roles = read_roles(self.configuration, self._labels, self._data, self._split)
        if self._reservation is not None and roles != self.roles:
            raise JobError(
                "The manifest was changed since the job was admitted: its patients are not those that "
                "stand in the ledger for this job. Leave it as it was until the job is over.",
                reason="COHORT_INVALID",
            )
        return roles

    def evaluate(
        self, received: Arrays, split: str, question: str, evaluate: Callable[[], EvaluateAnswer]
    ) -> EvaluateAnswer:
        """Return raw figures, booked as a disclosure over their patients; under an open scope noted as one.

        Args:
            received: The model as received.
            split: train, validation, test or all.
            question: What else the figures depend on (task, seed): another question is another disclosure.
            evaluate: Computes them.

        Raises:
            LedgerError: The policy lets no (further) evaluation of these patients out.
            JobError: The manifest was changed since a training was reserved (COHORT_INVALID).
            HistoflareError: The evaluation failed.
        """
        protection = self._policy.protection
        model = hashlib.sha256(f"{digest_of(received)} {split} {question}".encode()).hexdigest()
        ledger = open_ledger(self.configuration)
        if protection is None:
            ledger.check_usable()
        else:
            if not protection.evaluations:
                raise LedgerError(NO_RAW_FIGURES, reason="EVALUATION_NOT_ALLOWED")
            roles = self._read_roles_again()
            patients = [patient for patient, role in roles.items() if split in ("all", role)]
            check_size(self._policy, len(patients))  # before it is counted
            disclosure = ledger.disclose(
                run=self.run,
                model_sha256=model,
                patients=patients,
                roles=roles,
                limit=protection.evaluations,
            )
            self.roles = roles
        found = evaluate()
        answer = self._of_enough(found)
        figures, said = self._policy.allowed_metrics(answer.metrics), digest_of(answer.metrics)
        if protection is not None:
            ledger.release(disclosure, said, figures)
        elif answer.patients >= self._policy.minimum_patients:  # or the gate keeps it
            ledger.note(
                what=EVALUATION,
                run=self.run,
                model_sha256=model,
                digest=said,
                figures=figures,
                patients=answer.patients,
            )
        self._audit.write(
            "evaluated",
            run=self.run,
            split=split,
            model_sha256=model,
            patients=answer.patients,
            too_few_patients=sorted(set(found.metrics) - set(answer.metrics)),
            not_listed=sorted(set(answer.metrics) - set(figures)),
        )
        return answer

    def _of_enough(self, answer: EvaluateAnswer) -> EvaluateAnswer:
        """Return the answer without what rests on too few patients: figures of a class, and counts."""
        least = self._policy.minimum_patients
        metrics = {
            name: value for name, value in answer.metrics.items() if answer.behind.get(name, least) >= least
        }
        for cells in answer.cells.values():
            metrics |= {name: float(count) for name, count in hide_small(cells, least).items()}
        return replace(answer, metrics=metrics, cells={})

    def _load(self, store: ReleaseStore, released: Release) -> TrainAnswer | None:
        """Return what was released, if exactly that is still there."""
        kept = store.load(released.booking.id)
        if kept is None or digest_of(kept.arrays) != released.digest:
            return None
        return TrainAnswer(
            tensors=kept.arrays,
            weight=float(kept.extra["weight"]),
            metrics={},
            patients=int(kept.extra["patients"]),
            numbers=dict(kept.extra.get("numbers", {})),
        )

    def _note_release(self, what: str, index: int, said: str, patients: int) -> None:
        self._audit.write("released", run=self.run, kind=what, round=index, sha256=said, patients=patients)


def check_plan(policy: Policy, plan: PrivacyPlan) -> None:
    """Raise :class:`JobError` (PRIVACY_MISMATCH) unless the plan is what the policy asks for."""
    problem = None
    if plan.mechanism != policy.mechanism:
        problem = f"the job's mechanism is {plan.mechanism}, the policy's is {policy.mechanism}"
    elif policy.protection is not None:
        record = getattr(plan, "record", "patient")
        if record not in policy.protection.records:
            problem = f"the job clips by {record}; the policy allows {', '.join(policy.protection.records)}"
        elif plan.noise_seed is not None and not policy.protection.seeded_noise:
            problem = "the job's noise is repeatable (noise_seed), and the policy does not allow that"
    if problem:
        raise JobError(f"The job's privacy is not the policy's: {problem}.", reason="PRIVACY_MISMATCH")


def check_leaving_out(policy: Policy, plan: PrivacyPlan) -> None:
    """Raise :class:`JobError` (LEAVE_OUT_UNSOUND) if the policy leaves out and ε does not cover it."""
    if policy.protection is not None and policy.protection.leaves_out and plan.noise_seed is not None:
        raise JobError(
            "The job's noise is repeatable (noise_seed), so nothing hides who is left out of it, and the "
            "policy leaves out whoever has no budget left.",
            reason="LEAVE_OUT_UNSOUND",
        )


def check_tally(policy: Policy, tally: Tally) -> None:
    """Raise :class:`JobError` (PRIVACY_MISMATCH) unless a policy takes this noise of an evaluation."""
    if policy.protection is None:
        raise JobError(
            f"The scope '{policy.name}' has no budget in which an evaluation could be counted: take the "
            "table [evaluation] out of the job.",
            reason="PRIVACY_MISMATCH",
        )
    if tally.noise_seed is not None and not policy.protection.seeded_noise:
        raise JobError(
            "The noise of the job's evaluation is repeatable (noise_seed); the policy does not allow that.",
            reason="PRIVACY_MISMATCH",
        )


def check_sampler(budget: Budget, plan: PrivacyPlan, rounds: int, weights: int) -> None:
    """Raise :class:`JobError` (PRIVACY_INVALID) if a job's sampler takes too much of δ, in any filter."""
    numbers = plan.numbers(rounds, weights)
    budget.without_sampler(numbers)
    if plan.spend().honest > 1:
        budget.if_all_collude.without_sampler(numbers)


def check_size(policy: Policy, patients: int) -> None:
    """Raise :class:`JobError` (TOO_FEW_PATIENTS) if the policy asks for more patients."""
    if patients < policy.minimum_patients:
        raise JobError(
            f"{patients} patients; the policy asks for at least {policy.minimum_patients}.",
            reason="TOO_FEW_PATIENTS",
        )

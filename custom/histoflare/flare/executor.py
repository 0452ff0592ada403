"""The site's side of a round: FLARE's task in, an update, metrics or a fixed reason code out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants
from nvflare.fuel.utils.memory_utils import try_malloc_trim

from histoflare.errors import HistoflareError, JobError
from histoflare.flare import capabilities
from histoflare.flare.capabilities import Admitted
from histoflare.flare.gate import refused
from histoflare.flare.header_names import ATTEMPT, HELLOS, METRICS, NUMBERS, TOTAL_ROUNDS, WEIGHT
from histoflare.flare.job import Job, job_of
from histoflare.flare.job_schema import EVALUATE, HELLO, TRAIN
from histoflare.flare.site_keys import keys_of
from histoflare.flare.site_sum import Joined, SiteSum
from histoflare.flare.tensors import as_arrays
from histoflare.privacy.ledger import Reservation
from histoflare.privacy.plan import PrivacyPlan
from histoflare.privacy.tally import Tally
from histoflare.rounds.tally import tally_form_of
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.messages import Arrays, digest_of
from histoflare.site.pace import EVALUATING, PREPARING, TRAINING, Pace
from histoflare.site.refusals import note_refusal, say_refusal
from histoflare.site.site_file import read_own_file
from histoflare.site.trainer import EvaluateAnswer, TrainAnswer, Trainer, TrainerSetup

PACE_FILE = "pace.json"
"""In the site's notes of a run: its public times, where they are longer than the job's."""


class SiteExecutor(Executor):
    """Hands the tasks of an admitted job to this site's trainer process."""

    def __init__(self) -> None:
        super().__init__()
        self._trainer: Trainer | None = None
        self._roles: dict[str, str] | None = None
        self._evaluated = 0
        self._pace: Pace | None = None
        self._doing: str | None = PREPARING
        self._sum: SiteSum | None = None
        self._prepared: int | None = None  # the trainer's process that has this site's data

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """End the trainer with the job."""
        if event_type == EventType.END_RUN and self._trainer is not None:
            self._trainer.close()

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Answer one FLARE task, at a public time where the job says one.

        Never raises: an exception would go round the gate, with its text.
        """
        try_malloc_trim()  # the tensors of the round before have left since; heaps of threads keep their room
        self._open_pace(fl_ctx)
        reply = self._answer(task_name, shareable, fl_ctx, abort_signal)
        # What is released stays so: whoever asks again after an end in between gets the same bytes.
        return reply if self._is_time(lambda: bool(abort_signal.triggered)) else refused("STOPPED")

    def _answer(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        admitted = None
        try:
            admitted = capabilities.redeem(fl_ctx)
            if admitted is None:
                return refused(capabilities.refusal(fl_ctx))
            if task_name == HELLO and not admitted.job.transport.readable:
                return self._hello(shareable, fl_ctx, admitted, abort_signal)
            if task_name == TRAIN:
                return self._train(shareable, fl_ctx, admitted, abort_signal)
            if task_name == EVALUATE:
                return self._evaluate(shareable, fl_ctx, admitted, abort_signal)
            return refused("TASK_UNEXPECTED")
        except HistoflareError as error:
            return self._refuse(error, admitted, fl_ctx)
        except Exception as error:
            # Warning level: FLARE streams error logs to the server by default.
            self.logger.warning("the task failed", exc_info=True)
            return self._refuse(HistoflareError(repr(error), reason="TRAINING_FAILED"), admitted, fl_ctx)

    def _refuse(self, error: HistoflareError, admitted: Admitted | None, fl_ctx: FLContext) -> Shareable:
        job_id = fl_ctx.get_job_id()
        say_refusal(self.logger.warning, job_id, error)
        if admitted is not None:
            note_refusal(admitted.bookkeeping.configuration, admitted.bookkeeping.run, error, job_id)
        return refused(error.reason)

    def _round_of(
        self, shareable: Shareable, configuration: SiteConfiguration, admitted: Admitted
    ) -> tuple[int, int]:
        """Return the round that is asked for and how many there are.

        Raises:
            JobError: This site trains in no round, or in none any more, or not in this one.
        """
        if self._evaluated:
            raise JobError(
                "This job has been asked about its model: it is trained.", reason="TASK_UNEXPECTED"
            )
        if configuration.evaluation_only:
            raise JobError("This site only evaluates (evaluation_only).", reason="EVALUATION_ONLY")
        index, total = shareable.get_header(AppConstants.CURRENT_ROUND), shareable.get_header(TOTAL_ROUNDS)
        if type(index) is not int or not 0 <= index < admitted.rounds or total != admitted.rounds:
            raise JobError(
                f"The server asked for round {index!r} of {total!r}; the protocol has {admitted.rounds}.",
                reason="ROUND_INVALID",
            )
        return index, total

    def _hello(
        self, shareable: Shareable, fl_ctx: FLContext, admitted: Admitted, abort_signal: Signal
    ) -> Shareable:
        """Return this site's hello, for a round that it could train in: what is against that is said here."""
        configuration = self._configuration(fl_ctx, admitted)
        index, plan, tally = shareable.get_header(AppConstants.CURRENT_ROUND), admitted.bookkeeping.plan, None
        if index == admitted.rounds and not configuration.evaluation_only:
            tally = admitted.job.tally  # the question after the last round, if that is answered by a sum
        if tally is not None and tally.is_shared:
            _reserve(tally, admitted)
            plan = tally
        else:
            index, _ = self._round_of(shareable, configuration, admitted)
            admitted.bookkeeping.check_reserved()
        trainer = self._start(configuration, fl_ctx, admitted)
        if trainer.pid is not None and trainer.pid == self._prepared:
            if plan is not tally:  # whose patients were looked up just now
                self._doing = None  # nothing of the data is looked at: no time of it to hide
        else:
            trainer.prepare(
                to_train=plan is not tally,
                left_out=admitted.bookkeeping.left_out,
                stopped=lambda: bool(abort_signal.triggered),
            )
            self._prepared = trainer.pid
        if self._sum is None:
            site = fl_ctx.get_identity_name()
            keys = keys_of(fl_ctx.get_engine().get_workspace())
            self._sum = SiteSum(site, keys, admitted.job, admitted.bookkeeping.run)
        self._sum.check_pins(admitted.policy, plan)
        said = self._sum.hello(index, shareable.get_header(ATTEMPT))
        capabilities.release_hello(said)
        reply: Shareable = DXO(DataKind.APP_DEFINED, data=said).to_shareable()
        return reply

    def _join(
        self, shareable: Shareable, index: int, received: Arrays, admitted: Admitted, plan: PrivacyPlan
    ) -> Joined:
        """Return the sum that an update, or the counts of an evaluation, are to be part of.

        Raises:
            JobError: The list of its sites is not one that this site takes part in.
        """
        if self._sum is None:
            raise JobError("A list of a sum came before any hello.", reason="SUM_LIST_INVALID")
        return self._sum.join(
            shareable.get_header(HELLOS),
            index,
            shareable.get_header(ATTEMPT),
            digest_of(received),
            admitted.policy,
            plan,
        )

    def _train(
        self, shareable: Shareable, fl_ctx: FLContext, admitted: Admitted, abort_signal: Signal
    ) -> Shareable:
        configuration = self._configuration(fl_ctx, admitted)
        index, total = self._round_of(shareable, configuration, admitted)
        policy, bookkeeping, best = admitted.policy, admitted.bookkeeping, admitted.job.best_metric
        asked = [f"validation/{best}"] if best else []
        received = as_arrays(from_shareable(shareable).data)
        joined = None
        if not admitted.job.transport.readable:
            joined = self._join(shareable, index, received, admitted, bookkeeping.plan)

        def stopped() -> bool:
            return bool(abort_signal.triggered)

        def train() -> TrainAnswer:
            answer = trainer.train(
                received,
                index,
                total,
                metrics=list(policy.allowed_metrics(dict.fromkeys(asked))),
                left_out=bookkeeping.left_out,
                stopped=stopped,
            )
            # From here on there is nothing of this site in the tensors, for whoever has not all vectors.
            return answer if joined is None else joined.sealed(answer)

        bookkeeping.check_reserved()  # nothing is said of the data before
        trainer = self._start(configuration, fl_ctx, admitted)
        cold = trainer.pid is None
        # What is wrong with the data is said before a round is booked.
        trainer.prepare(left_out=bookkeeping.left_out, stopped=stopped)
        if cold and not self._is_time(stopped):  # how long it took to read them is no part of a round's time
            raise HistoflareError("The work was stopped.", reason="STOPPED")
        self._doing = TRAINING
        answer = bookkeeping.train(
            received,
            index,
            train,
            transcript=None if joined is None else joined.transcript,
            countable=None if joined is None else joined.countable,
        ).answer
        capabilities.release(answer.tensors, answer.patients, bookkeeping.plan)
        meta: dict[str, object] = {WEIGHT: float(answer.weight)}
        if answer.numbers:
            capabilities.release(answer.numbers, answer.patients)
            meta[NUMBERS] = answer.numbers
        if answer.metrics and answer.metric_patients >= policy.minimum_patients:
            capabilities.release(answer.metrics, answer.metric_patients)
            meta[METRICS] = answer.metrics
        reply: Shareable = DXO(DataKind.WEIGHT_DIFF, data=answer.tensors, meta=meta).to_shareable()
        return reply

    def _evaluate(
        self, shareable: Shareable, fl_ctx: FLContext, admitted: Admitted, abort_signal: Signal
    ) -> Shareable:
        tally, configuration = admitted.job.tally, self._configuration(fl_ctx, admitted)
        only = configuration.evaluation_only
        if tally is not None:
            tally = tally.of_site(only_evaluates=only)
        # A sum that did not open may be asked for again, and is paid for each time.
        spare = admitted.job.spare_rounds if tally is not None and tally.is_shared else 0
        if self._evaluated >= admitted.job.most_evaluations + spare:
            raise JobError("This job has had its answer.", reason="EVALUATED_ALREADY")
        self._evaluated += 1  # of the attempts: a question that fails must not be asked again and again
        self._doing = EVALUATING
        # None of the patients of a site that never trains has been seen: all of them are asked.
        split = "all" if only else "test"
        received = as_arrays(from_shareable(shareable).data)
        if tally is not None:
            joined = None
            if tally.is_shared:
                joined = self._join(shareable, admitted.rounds, received, admitted, tally)
            return self._tally(tally, joined, received, split, fl_ctx, admitted, abort_signal)

        def evaluate() -> EvaluateAnswer:
            trainer = self._start(configuration, fl_ctx, admitted)
            return trainer.evaluate(received, split, stopped=lambda: bool(abort_signal.triggered))

        answer = admitted.bookkeeping.evaluate(received, split, _question(admitted.job), evaluate)
        capabilities.release(answer.metrics, answer.patients)
        reply: Shareable = DXO(DataKind.METRICS, data=answer.metrics).to_shareable()
        return reply

    def _tally(
        self,
        tally: Tally,
        joined: Joined | None,
        received: Arrays,
        split: str,
        fl_ctx: FLContext,
        admitted: Admitted,
        abort_signal: Signal,
    ) -> Shareable:
        """Answer an evaluation with noised counts: an update of one tensor, booked and released as one."""
        job, bookkeeping = admitted.job, admitted.bookkeeping

        def stopped() -> bool:
            return bool(abort_signal.triggered)

        def count() -> TrainAnswer:
            counts = trainer.tally(received, split, left_out=bookkeeping.left_out, stopped=stopped)
            return counts if joined is None else joined.sealed(counts)

        reservation = _reserve(tally, admitted)
        trainer = self._start(self._configuration(fl_ctx, admitted), fl_ctx, admitted)
        # What is wrong is said before anything is booked.
        trainer.prepare(to_train=False, left_out=bookkeeping.left_out, stopped=stopped)
        answer = bookkeeping.tally(
            reservation,
            received,
            self._evaluated - 1,
            _question(job),
            count,
            transcript=None if joined is None else joined.transcript,
            countable=None if joined is None else joined.countable,
        ).answer
        capabilities.release(answer.tensors, answer.patients, tally)
        meta = {WEIGHT: float(answer.weight)}
        reply: Shareable = DXO(DataKind.WEIGHT_DIFF, data=answer.tensors, meta=meta).to_shareable()
        return reply

    def _open_pace(self, fl_ctx: FLContext) -> None:
        """Begin to count when the task came in at the door; admission takes its time too."""
        self._doing = PREPARING
        try:
            job, task = job_of(fl_ctx), capabilities.kept_task(fl_ctx)
            if job.answer_seconds is None or task is None:
                return
            if self._pace is None:
                notes = self._configuration(fl_ctx).records / (job.run or fl_ctx.get_job_id())
                self._pace = Pace(job.answer_seconds, notes / PACE_FILE, self.logger.warning)
            self._pace.open(task.arrived)
        except HistoflareError as error:  # the job or the site's file cannot be used: nothing of its data is
            self.logger.warning("no public time: %s", error)

    def _is_time(self, stopped: Callable[[], bool]) -> bool:
        return self._pace is None or self._doing is None or self._pace.close(self._doing, stopped)

    def _configuration(self, fl_ctx: FLContext, admitted: Admitted | None = None) -> SiteConfiguration:
        """Return the site's file. Whether the site only evaluates is what it was when its job was admitted:
        that decides whom a job asks and with how much noise, and on whom it is booked."""
        local = Path(fl_ctx.get_engine().get_workspace().get_site_config_dir())
        site = fl_ctx.get_identity_name()
        configuration = read_own_file(site, local)
        if admitted is None:
            return configuration
        only = admitted.bookkeeping.configuration.evaluation_only
        return replace(configuration, evaluation_only=only)

    def _start(self, configuration: SiteConfiguration, fl_ctx: FLContext, admitted: Admitted) -> Trainer:
        bookkeeping, job = admitted.bookkeeping, admitted.job
        if self._trainer is not None and self._roles != bookkeeping.roles:
            self._trainer.close()  # it has read the manifest under other roles than were booked since
            self._trainer = None
        if self._trainer is None:
            self._roles = bookkeeping.roles
            setup = TrainerSetup(
                site=fl_ctx.get_identity_name(),
                configuration=configuration,
                task=job.task,  # which admission has compared with the protocol
                strategy=job.strategy,
                transport=job.transport,
                seed=job.seed,
                run=bookkeeping.run,
                plan=bookkeeping.plan,
                roles=bookkeeping.roles,
                split=job.split,
                tally=job.tally,
            )
            self._trainer = Trainer(setup, say=self.logger.info)
        return self._trainer


def _reserve(tally: Tally, admitted: Admitted) -> Reservation:
    """Reserve a job's evaluation for every patient who is asked about."""
    job = admitted.job
    length = tally_form_of(job.task).length
    return admitted.bookkeeping.reserve_tally(tally, job.most_evaluations, length)


def _question(job: Job) -> str:
    """Return all that an evaluation depends on beside the model and this site."""
    about = {"task": job.task.to_json(), "strategy": vars(job.strategy), "seed": job.seed}
    about["split"] = vars(job.split)
    return json.dumps(about, sort_keys=True, default=str)

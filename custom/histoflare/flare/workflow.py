"""FLARE's scatter-and-gather, with the topology's choice of sites and a record of every round."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather

from histoflare.errors import HistoflareError, JobError
from histoflare.flare.aggregator import MetricsCollector
from histoflare.flare.gate import reason_of
from histoflare.flare.header_names import ASKED, ATTEMPT, HELLOS, PSEUDONYM, TOTAL_ROUNDS
from histoflare.flare.job import read_application
from histoflare.flare.job_files import CONFIG_FOLDER
from histoflare.flare.job_schema import EVALUATE, HELLO, TASK_OF, TRAINING
from histoflare.flare.record import (
    BEST_EVALUATION_FILE,
    BEST_EVALUATION_ROUND_FILE,
    EVALUATION_FILE,
    EVALUATION_ROUND_FILE,
    RoundRecord,
    RunRecord,
    run_folder,
)
from histoflare.flare.tensorboard_log import TensorBoardLog
from histoflare.flare.tensors import as_arrays, as_state, tensor_bytes
from histoflare.privacy.secure_sum.hello import Hello
from histoflare.rounds.strategy import split
from histoflare.site.site_file import is_pseudonym
from histoflare.storage import write_json

TASK_CHECK_SECONDS = 0.05
"""Between two looks of the server at who has answered."""


HEARING_SECONDS = 3.0
"""How long sites are still heard after so many have refused that the run ends: what each of them has against
the job is then known at once, and not one by one."""


class AskingScatterAndGather(ScatterAndGather):
    """Sends a round's task to the sites that the topology asks, waits for all of them, records what happened.

    Five things differ from FLARE's own:

    * FLARE sends the task to every site. Here only the sites asked get it, and none is told who the others
      are. A site that FLARE deems disconnected gets none until it is back.
    * FLARE closes a round soon after ``min_clients`` sites have answered, so that two fast sites leave out
      the slow ones, who have paid for the round. Here a round lasts until every site that got the task has
      answered, with an update or a refusal, or until ``round_seconds`` are over.
    * FLARE combines whatever there is then. Here fewer than ``least_sites`` updates end the job (not where
      the topology skips sites: then a site without an update loses its turn).
    * After the last round of a job that says ``evaluate``, every site is asked how well the model does on its
      test patients, also those that only evaluate; and how well the best model does, if one was kept and the
      sites keep nothing of their own (``Job.most_evaluations``). What a site refuses then costs the job
      nothing.
    * Where the server sees only the sum of the updates (``Transport.readable``), a round has two tasks: the
      sites say hello, each with a fresh key, and then train, each with the list of all hellos. If one of
      those on the list sends no update, the sum is void, and both are asked for again with fresh keys, as
      often as the job has ``spare_rounds``.

    Args:
        custom: FLARE's folder for a job's own code, beside the one of its configuration. There is none here,
            but no other of FLARE's variables says where a job is.
    """

    def __init__(self, custom: str) -> None:
        job = read_application(Path(custom).parent / CONFIG_FOLDER.name)
        super().__init__(
            num_rounds=job.rounds - job.start_round,
            start_round=job.start_round,
            min_clients=job.least_sites,  # what must stay within reach when a site refuses
            wait_time_after_min_received=0,
            train_task_name=TASK_OF[job.kind],
            train_timeout=job.round_seconds,
            task_check_period=TASK_CHECK_SECONDS,
            ignore_result_error=True if job.strategy.topology.skips_sites else None,
            # No snapshots: FLARE cannot resume from them, and they hold every tensor once more.
            snapshot_every_n_rounds=0,
            persistor_id="persistor",
            aggregator_id="aggregator" if job.kind == TRAINING else "collector",
            shareable_generator_id="shareable_generator",
        )
        self._patience = job.new_patience()
        self._last_round = job.rounds - 1
        self._job = job
        self._collector: MetricsCollector | None = None
        self._giving_up: threading.Timer | None = None
        self._hellos: dict[str, Hello] = {}
        self._record = RunRecord()
        self._board = TensorBoardLog()
        self._current: RoundRecord | None = None

    def broadcast_and_wait(
        self,
        task: Task,
        fl_ctx: FLContext,
        targets: list[str] | None = None,
        min_responses: int = 1,
        wait_time_after_min_received: int = 0,
        abort_signal: Signal | None = None,
    ) -> None:
        """Send the task to the sites asked, and wait for all of them that are there."""
        sites = self._job.training_sites(client.name for client in self._engine.get_clients())
        asked = task.data.get_header(ASKED) or sites
        task.data.set_header(ASKED, None)
        self._current = RoundRecord(self._current_round, sites, list(asked))
        if self._job.transport.readable:
            self._send(task, asked, fl_ctx, abort_signal)
        else:
            self._sum(task, asked, self._current, fl_ctx, abort_signal)
        self._current.ended = time.monotonic()
        if self._giving_up is not None:
            self._giving_up.cancel()
        self._require_updates(fl_ctx, abort_signal)
        self._keep_best(fl_ctx)

    def _there(self, sites: Iterable[str]) -> list[str]:
        return [site for site in sites if self.get_client_disconnect_time(site) is None]

    def _send(self, task: Task, sites: Iterable[str], fl_ctx: FLContext, abort_signal: Signal | None) -> None:
        """Send a task to those of the sites that are there, and wait for all of them."""
        there = self._there(sites)
        self._current_num_targets = len(there)
        if there:
            super().broadcast_and_wait(task, fl_ctx, there, len(there), 0, abort_signal)

    def _sum(
        self,
        task: Task,
        asked: list[str],
        current: RoundRecord,
        fl_ctx: FLContext,
        abort_signal: Signal | None,
    ) -> None:
        """Have the sites say hello and then train, anew while the sum is void and rounds are spare."""
        for attempt in itertools.count():
            self._hellos = {}
            current.ask_again()
            self._send(self._task_hello(task, attempt), asked, fl_ctx, abort_signal)
            listed = sorted(self._hellos)
            if abort_signal is not None and abort_signal.triggered:
                return
            if len(listed) < self._min_clients:
                current.given_up = f"{len(listed)} of at least {self._min_clients} sites were ready"
                return
            if self._there(listed) != listed:
                continue  # before anybody has trained, and paid for it
            self.aggregator.expect(listed, attempt, fl_ctx)
            current.ask_again(listed)
            self._send(self._task_training(task, attempt, listed), listed, fl_ctx, abort_signal)
            void = self.aggregator.open_sum(fl_ctx)
            if not void or (abort_signal is not None and abort_signal.triggered):
                return
            current.note_void(listed)
            self.aggregator.reset(fl_ctx)
            self.log_warning(fl_ctx, f"round {self._current_round + 1} is void: {void}")
            if self._record.count_voids(fl_ctx) + len(current.voids) > self._job.spare_rounds:
                current.given_up = (
                    f"the sum was void ({void}), and none of {self._job.spare_rounds} spare rounds is left"
                )
                return
            self._record.write(current, fl_ctx, finished=False)

    def _task_hello(self, task: Task, attempt: int) -> Task:
        """Return the task that asks for the sites' fresh keys."""
        data = Shareable()
        for header in (AppConstants.CURRENT_ROUND, TOTAL_ROUNDS):
            data.set_header(header, task.data.get_header(header))
        data.set_header(ATTEMPT, attempt)
        return Task(
            name=HELLO,
            data=data,
            timeout=task.timeout,
            before_task_sent_cb=self._note_sent,
            result_received_cb=self._take_hello,
        )

    def _task_training(self, task: Task, attempt: int, listed: list[str]) -> Task:
        """Return a round's task for one attempt: each goes out once, and the model in it is not copied."""
        data = copy.copy(task.data)
        data[ReservedHeaderKey.HEADERS] = copy.deepcopy(data[ReservedHeaderKey.HEADERS])
        data.set_header(ATTEMPT, attempt)
        data.set_header(HELLOS, [self._hellos[site].to_json() for site in listed])
        data.add_cookie(ATTEMPT, attempt)
        return Task(
            name=task.name,
            data=data,
            timeout=task.timeout,
            before_task_sent_cb=self._prepare_train_task_data,
            result_received_cb=self._process_train_result,
        )

    def _note_sent(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        if self._current is not None:
            self._current.sent.setdefault(client_task.client.name, time.monotonic())

    def _take_hello(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        """Keep a site's hello as it came. Sites, and not the server, decide whether they believe it."""
        site, result, current = client_task.client.name, client_task.result, self._current
        client_task.result = None
        if current is None:
            return
        self._note(current, site, result, fl_ctx)
        if site not in current.refused:
            try:
                hello = Hello.from_json(from_shareable(result).data)
                if hello.site != site:
                    raise JobError("a hello of another site")
                self._hellos[site] = hello
            except (HistoflareError, ValueError, TypeError, AttributeError):
                current.refused[site] = "UPDATES_INVALID"
        if self._is_hopeless(current):
            self._record.write(current, fl_ctx, finished=False)
            self._give_up_soon(current)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Run the rounds, then ask about the model if the job says so."""
        super().control_flow(abort_signal, fl_ctx)
        if self._job.kind != TRAINING or not self._job.evaluate or abort_signal.triggered:
            return
        after = self._start_round + self._num_rounds
        self._ask(EVALUATION_FILE, self._global_weights, after, abort_signal, fl_ctx)
        several = self._job.most_evaluations > 1
        best = self.persistor.load_best(fl_ctx) if several and self.persistor is not None else None
        if best is not None and not abort_signal.triggered:
            self._ask(BEST_EVALUATION_FILE, best, after + 1, abort_signal, fl_ctx)

    def _ask(
        self, file: str, model: ModelLearnable, index: int, abort_signal: Signal, fl_ctx: FLContext
    ) -> None:
        """Ask every site that is there about a model; write what they say, and who was asked and refused.

        Args:
            index: Of a round that was not run, so that no late answer is taken for one to this.
        """
        self._collector = self._engine.get_component("collector")
        self._collector.reset(fl_ctx)
        fl_ctx.set_prop(AppConstants.CURRENT_ROUND, index, private=True, sticky=True)
        state = as_state(model[ModelLearnableKey.WEIGHTS])
        asked = self._job.strategy.handed_out(*split(state))  # what else the strategy keeps here stays
        data = DXO(DataKind.WEIGHTS, data=as_arrays(asked)).to_shareable()
        data.add_cookie(AppConstants.CONTRIBUTION_ROUND, index)
        sites = sorted(client.name for client in self._engine.get_clients())
        self._current = current = RoundRecord(index, sites, sites)
        task = Task(
            name=EVALUATE,
            data=data,
            timeout=self._job.round_seconds,
            before_task_sent_cb=self._prepare_train_task_data,
            result_received_cb=self._take_figures,
        )
        self._send(task, sites, fl_ctx, abort_signal)
        current.ended = time.monotonic()
        if abort_signal.triggered:  # by somebody, or by FLARE, as too few sites are left
            current.given_up = "all rounds are finished; it ended while sites were asked about the model"
        current.taking_part = list(self._collector.taking_part)
        current.stamps = dict(self._collector.stamps)
        self._collector.write(file, fl_ctx)
        row_file = EVALUATION_ROUND_FILE if file == EVALUATION_FILE else BEST_EVALUATION_ROUND_FILE
        write_json(run_folder(fl_ctx) / row_file, current.to_json())
        self._current = None

    def _take_figures(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        site, result, current = client_task.client.name, client_task.result, self._current
        client_task.result = None
        if current is None or self._collector is None:
            return
        self._note(current, site, result, fl_ctx)
        if not self._collector.accept(result, fl_ctx):
            current.refused.setdefault(site, "UPDATES_INVALID")

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Write the record of a round when it is done."""
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.ROUND_DONE and self._current is not None:
            self._current.taking_part = list(self.aggregator.taking_part)
            self._current.stamps = dict(self.aggregator.stamps)
            self._current.notes = dict(self.aggregator.notes)
            self._record.write(self._current, fl_ctx, finished=True)
            self._board.write(self._current, fl_ctx)
            self._current = None

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Start, and exempt the objects that exist now from garbage collection.

        FLARE collects garbage after every round; with torch imported that takes 0.13 s for modules alone.
        """
        super().start_controller(fl_ctx)
        gc.collect()
        gc.freeze()

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Close what is open."""
        super().stop_controller(fl_ctx)
        self._board.close()

    def _prepare_train_task_data(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        self._note_sent(client_task, fl_ctx)
        if self._current is not None:
            self._current.bytes_down += tensor_bytes(client_task.task.data)
        super()._prepare_train_task_data(client_task, fl_ctx)

    def _accept_train_result(
        self, client_name: str, result: Shareable, fl_ctx: FLContext, is_unknown_task: bool = False
    ) -> bool:
        if self._current is not None and not is_unknown_task:
            self._note(self._current, client_name, result, fl_ctx)
        is_sum = not self._job.transport.readable
        if is_sum and result.get_return_code() not in (None, ReturnCode.OK):
            return False  # this sum is void; whether the job goes on is decided when all have answered
        if (
            self._current is not None
            and not is_sum
            and not is_unknown_task
            and self._is_hopeless(self._current)
        ):
            self._record.write(self._current, fl_ctx, finished=False)
            self._give_up_soon(self._current)  # FLARE would do it here
            return False
        accepted: bool = super()._accept_train_result(client_name, result, fl_ctx, is_unknown_task)
        if self._current is not None and not is_unknown_task:
            if not accepted:
                self._current.refused.setdefault(client_name, "UPDATES_INVALID")
                self._record.write(self._current, fl_ctx, finished=False)
            elif client_name in self.aggregator.metrics:
                self._current.metrics[client_name] = self.aggregator.metrics[client_name]
        return accepted

    def _note(self, current: RoundRecord, site: str, result: Shareable, fl_ctx: FLContext) -> None:
        current.answered[site] = time.monotonic()
        code = result.get_return_code()
        if code not in (None, ReturnCode.OK):
            current.refused[site] = reason_of(str(code))
        else:
            current.bytes_up += tensor_bytes(result)
        pseudonym = result.get_header(PSEUDONYM)
        if isinstance(pseudonym, str) and is_pseudonym(pseudonym):
            self._record.name(site, pseudonym, fl_ctx)

    def _is_hopeless(self, current: RoundRecord) -> bool:
        """Return whether so many sites have refused that the round cannot have the updates it needs."""
        refused = len(current.refused)
        most = self._current_num_targets - self._min_clients
        return self.ignore_result_error is not True and refused > max(most, 0)

    def _give_up_soon(self, current: RoundRecord) -> None:
        if self._giving_up is None:
            self._giving_up = threading.Timer(HEARING_SECONDS, self._give_up, (current,))
            self._giving_up.daemon = True
            self._giving_up.start()

    def _give_up(self, current: RoundRecord) -> None:
        if self._current is current:
            with self._engine.new_context() as fl_ctx:
                self.system_panic(f"{len(current.refused)} sites refused", fl_ctx)

    def _require_updates(self, fl_ctx: FLContext, abort_signal: Signal | None) -> None:
        """End the job if a round ended with fewer updates than it needs (its time is over, sites are gone).

        FLARE would combine what there is. The last whole round's model is kept, and a job can go on from it.
        """
        came = len(self.aggregator.taking_part)
        if self.ignore_result_error is True or came >= self._min_clients or self._current is None:
            return
        self._current.taking_part = []
        left = sum(self.get_client_disconnect_time(site) is None for site in self._current.sites)
        ended = abort_signal is not None and abort_signal.triggered
        if ended and left < self._min_clients:  # FLARE ends a job by itself then; the record says why
            self._current.given_up = f"{left} of at least {self._min_clients} sites are left"
        elif self._current.given_up:
            pass
        elif self._is_hopeless(self._current):
            self._current.given_up = (
                f"{len(self._current.refused)} of {self._current_num_targets} sites refused, and at least "
                f"{self._min_clients} must take part"
            )
        elif not ended:
            self._current.given_up = f"{came} of at least {self._min_clients} updates came"
        self._record.write(self._current, fl_ctx, finished=False)
        if not ended:
            self.system_panic(f"round {self._current_round + 1}: {self._current.given_up}", fl_ctx)

    def _keep_best(self, fl_ctx: FLContext) -> None:
        """Keep the model the sites were sent, if it is the best by what all who took part said of it.

        The round in which the protocol's patience is over is made the last.
        """
        heard, current = self._patience, self._current
        if heard is None or current is None:
            return
        name = f"validation/{heard.metric}"
        said = [current.metrics.get(site, {}).get(name) for site in self.aggregator.taking_part]
        is_best = heard.hear(self._current_round, said)
        current.validation = heard.means[-1]
        if is_best and self.persistor is not None:
            self.persistor.save_best(self._global_weights, heard.best, name, fl_ctx)
        if heard.is_over and self._current_round < self._last_round:
            current.stopped = heard.to_json()
            self._num_rounds: int = self._current_round - self._start_round + 1

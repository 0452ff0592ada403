"""The site's side of a round: FLARE's task in, an update or a fixed reason code out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants

from histoflare.bags.cohort import Cohort, load_cohort
from histoflare.errors import HistoflareError
from histoflare.flare.headers import ASKED, NOT_ASKED, REFUSED, WEIGHT
from histoflare.site.configuration import find_site_file, read_site_file
from histoflare.flare.tensors import to_arrays, to_state
from histoflare.privacy.plan import Open
from histoflare.rounds.state import State
from histoflare.rounds.strategy import site_round
from histoflare.slides.manifest import read_manifest


class SiteExecutor(Executor):
    """Trains this site's model for one round with the code that every runtime uses.

    Args:
        task_id: Component that says what is learned (e.g. ``histoflare.bags.task.MemTask``).
        strategy_id: Component that says how sites work together (e.g. ``histoflare.rounds.fedavg.FedAvg``).
        seed: The job's seed.
        train_task_name: The FLARE task this executor answers.
    """

    def __init__(
        self,
        task_id: str = "task",
        strategy_id: str = "strategy",
        seed: int = 0,
        train_task_name: str = "train",
    ) -> None:
        super().__init__()
        self._task_id = task_id
        self._strategy_id = strategy_id
        self._seed = seed
        self._train_task_name = train_task_name
        self._cohort: Cohort | None = None
        self._site_state: State = {}

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Answer one FLARE task. Never raises: the text of an exception would travel to the server."""
        if task_name != self._train_task_name:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        try:
            return self._train(shareable, fl_ctx)
        except HistoflareError as error:
            self.log_warning(fl_ctx, f"this site leaves the round out: {error}", fire_event=False)
            return make_reply(REFUSED + error.reason)
        except Exception:
            # Warning level: FLARE streams error logs to the server by default.
            self.logger.warning("training failed", exc_info=True)
            return make_reply(REFUSED + "TRAINING_FAILED")

    def _train(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        site = fl_ctx.get_identity_name()
        if site not in shareable.get_header(ASKED, [site]):
            return make_reply(ReturnCode.OK, headers={NOT_ASKED: True})
        engine = fl_ctx.get_engine()
        task = engine.get_component(self._task_id)
        outcome = site_round(
            task,
            engine.get_component(self._strategy_id),
            to_state(from_shareable(shareable).data),
            self._data(task, site, fl_ctx),
            site=site,
            site_state=self._site_state,
            round_index=shareable.get_header(AppConstants.CURRENT_ROUND),
            total_rounds=shareable.get_header(AppConstants.NUM_ROUNDS),
            seed=self._seed,
            plan=Open(),
        )
        update = outcome.update
        dxo = DXO(DataKind.WEIGHT_DIFF, data=to_arrays(update.tensors), meta={WEIGHT: float(update.weight)})
        reply: Shareable = dxo.to_shareable()
        self._site_state = outcome.site_state
        return reply

    def _data(self, task: Any, site: str, fl_ctx: FLContext) -> Cohort:
        if self._cohort is None:
            local_folder = Path(fl_ctx.get_engine().get_workspace().get_site_config_dir())
            configuration = read_site_file(find_site_file(site, local_folder))
            manifest = read_manifest(configuration.manifest, labels=task.labels, check_files=False)
            self._cohort = load_cohort(
                site,
                manifest,
                configuration.bags,
                labels=task.labels,
                encoder=task.encoder,
                mpp=task.mpp,
                patch_px=task.patch_px,
            )
            for warning in self._cohort.warnings:
                self.logger.info(warning)
        return self._cohort

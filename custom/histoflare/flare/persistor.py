"""The global model on the server's disk: safetensors, written whole, every round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants
from safetensors import SafetensorError
from safetensors.torch import load_file

from histoflare.ensemble import MEMBER, split_models
from histoflare.errors import JobError
from histoflare.flare.job import job_of
from histoflare.flare.job_files import START_MODEL_FILE
from histoflare.flare.job_schema import EVALUATION
from histoflare.flare.record import run_folder
from histoflare.flare.tensors import apart, as_arrays, as_state
from histoflare.model_file import GLOBAL_MODEL_FILE, describe_model, handed_out, write_model_file
from histoflare.privacy.protocol import hash_protocol
from histoflare.rounds.state import State, check_tensors, model_state
from histoflare.rounds.strategy import OWN, Strategy, join, split
from histoflare.rounds.tally import asks_model
from histoflare.rounds.task import Task

BEST_MODEL_FILE = "best_model.safetensors"
"""Its header's ``training`` also says ``metric`` and ``value``."""


class SeededPersistor(ModelPersistor):
    """Starts from the file that a job brings, or the task's seeded model; keeps the last global model."""

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """Return the first global model, and with it what the strategy keeps at the server.

        Raises:
            JobError: An evaluation brings no model (MODEL_FILE_MISSING), or the file has another one.
        """
        job = job_of(fl_ctx)
        state = first_state(job.strategy, job.task)
        start = job.folder / START_MODEL_FILE
        if start.is_file() and job.kind == EVALUATION:
            state = read_handed_out(start, job.task)
        elif start.is_file() and job.start_round > 0:
            state = read_state(start, like=state)
        elif start.is_file():
            model = read_state(start, like=split(state)[0])
            state = join(model, job.strategy.begin(model))
        elif job.start_round > 0 or (job.kind == EVALUATION and asks_model(job.task)):
            raise JobError("The job brings no model to start from.", reason="MODEL_FILE_MISSING")
        return make_model_learnable(as_arrays(state), {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Write the global model of this round."""
        self._write(GLOBAL_MODEL_FILE, model, fl_ctx, int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND)))

    def save_best(self, model: ModelLearnable, value: float, metric: str, fl_ctx: FLContext) -> None:
        """Write the best global model so far, with what made it the best."""
        before = int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND)) - 1  # the model as this round began with it
        self._write(BEST_MODEL_FILE, model, fl_ctx, before, {"metric": metric, "value": value})

    def load_best(self, fl_ctx: FLContext) -> ModelLearnable | None:
        """Return the best global model and what the strategy kept beside it, as :meth:`save_best` left them.

        None if there is none.
        """
        path = run_folder(fl_ctx) / BEST_MODEL_FILE
        if not path.is_file():
            return None
        job = job_of(fl_ctx)
        state = read_state(path, like=first_state(job.strategy, job.task))
        return make_model_learnable(as_arrays(state), {})

    def _write(
        self,
        name: str,
        model: ModelLearnable,
        fl_ctx: FLContext,
        round_index: int,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        job = job_of(fl_ctx)
        state = as_state(model[ModelLearnableKey.WEIGHTS])
        models = job.strategy.handed_out(*split(state))
        header = describe_model(
            job.task,
            mosaic=getattr(job.task, "mosaic", None),
            protocol_sha256=hash_protocol(job.protocol),
            run=job.run or fl_ctx.get_job_id(),
            round_index=round_index,
            training={
                "strategy": job.strategy.name,
                "rounds": job.rounds,
                "seed": job.seed,
                **(training or {}),
            },
            models=len(split_models(models)),
        )
        write_model_file(run_folder(fl_ctx) / name, apart({**state, **models}), header)


def first_state(strategy: Strategy, task: Task) -> State:
    """Return a run's seeded global model, and with it what the strategy keeps at the server."""
    model = model_state(task.build_model())
    return join(model, strategy.begin(model))


def read_handed_out(path: Path, task: Task) -> State:
    """Return the model in a file, or the ensemble, as it is asked.

    Raises:
        JobError: The file is missing or damaged, or has not the tensors of the task's model.
    """
    state, like = handed_out(_read(path)), model_state(task.build_model())
    for each in split_models(state):
        check_tensors(each, like, whose=f"The model in {path.name}")
    return state


def read_state(path: Path, like: State) -> State:
    """Return the global model in a file, and with it what a strategy kept at the server if ``like`` has that.

    Args:
        path: The model file.
        like: Tensors of the names, shapes and dtypes that it must have; of :func:`first_state`, or the
            model's alone.

    Raises:
        JobError: The file is missing or damaged, or has not the tensors of ``like``.
    """
    found = _read(path)
    state: State = {
        name: each for name, each in found.items() if name in like or not name.startswith((OWN, MEMBER))
    }
    check_tensors(state, like, whose=f"The model in {path.name}")
    return state


def _read(path: Path) -> State:
    try:
        # a copy: what safetensors loads is the file itself, in memory
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise JobError(f"{path}: not found.", reason="MODEL_FILE_MISSING") from None
    except (SafetensorError, OSError) as error:
        raise JobError(f"{path}: not a model: {error}", reason="MODEL_FILE_INVALID") from None

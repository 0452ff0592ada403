"""Training at one site, the same bytes wherever it runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from histoflare.ensemble import assemble, split_models
from histoflare.errors import HistoflareError, JobError
from histoflare.rounds.hook import LocalHook
from histoflare.rounds.state import State, is_finite, load_state, model_state
from histoflare.rounds.task import Decaying, PredictionTable, Task
from histoflare.seeds import derive_seed


@dataclass(frozen=True)
class LocalResult:
    """What local training gives. Everything but what a strategy sends stays at the site.

    Attributes:
        state: The trained state.
        n_samples: Training samples at this site.
        n_steps: Optimizer steps taken.
        mean_loss: Mean of the steps' losses.
        failures: Under DP-SGD, why drawn records counted as zero, in words; for the site's own log.
    """

    state: State
    n_samples: int
    n_steps: int
    mean_loss: float
    failures: tuple[str, ...] = ()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block on one thread and put torch's thread count back after it.

    How a sum is cut into threads changes its last bits; and threads that wait for one another on a busy
    machine cost a round more than they save. The count is torch's, so it holds for the whole process: do not
    run two rounds in two threads of one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def reproducible(seed: int, device: str = "cpu") -> Iterator[None]:
    """Run a block under ``seed``, on the CPU on one thread too; put both back after it.

    On another device the same bytes are not to be had, and the threads that read and augment its batches are
    as many as torch has.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        with one_thread(), torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: where CUDA is not started it queues a call, with its stack, for ever.
            torch.default_generator.manual_seed(seed)
            yield
        return
    module: Any = torch.get_device_module(device)
    with torch.random.fork_rng(devices=[device], device_type=kind):
        with module.device(device):
            module.manual_seed(seed)
        torch.default_generator.manual_seed(seed)
        yield


def train_locally(
    task: Task,
    state: State,
    data: Any,
    *,
    seed: int,
    hook: LocalHook | None = None,
    round_index: int = 0,
    total_rounds: int = 1,
    device: str = "cpu",
    steps: int | None = None,
) -> LocalResult:
    """Train one round's local epochs from ``state`` (which is left as it is).

    Args:
        seed: Of batch order, subsets, dropout; derived from (job seed, "train", site, round).
        hook: Takes part in each step; None: nothing does.
        round_index, total_rounds: How far the run is: a learning rate may fall over all of it.
        device: Where to train.
        steps: Take so many steps, in more passes over the data or in fewer; None takes the task's.

    Raises:
        JobError: No training data, or the loss or the trained state is not finite.
    """
    n_samples = task.n_train(data)
    if n_samples < 1:
        raise JobError(
            "This site has no training samples: its manifest needs rows with split 'train'.",
            reason="SITE_HAS_NO_TRAINING_DATA",
        )
    hook = hook or LocalHook()
    with reproducible(seed, device):
        model = task.build_model()
        load_state(model, state)
        model.to(device).train()
        optimizer = task.build_optimizer(model)
        rate = rate_schedule(task, optimizer, data, round_index, total_rounds, steps)
        losses = []
        for batch in task.train_batches(data, seed) if steps is None else _batches(task, data, seed, steps):
            losses.append(_step(task, model, optimizer, batch, hook))
            if rate is not None:
                rate.step()
        trained = model_state(model)
    finite = all(map(is_finite, trained.values()))
    if not losses or not finite:
        what = "took no step" if not losses else "ended with NaN or infinity in the model"
        raise JobError(
            f"Local training {what}: check the task's batches and its learning rate.",
            reason="TRAINING_FAILED",
        )
    return LocalResult(trained, n_samples, len(losses), math.fsum(losses) / len(losses))


def predict(task: Task, state: State, data: Any, split: str, device: str = "cpu") -> PredictionTable:
    """Return what the model, or ensemble, with ``state`` says of ``split``: evaluation mode, no gradients.

    On the CPU it takes one thread, so that the figures are the same wherever they are made.

    >>> from pathlib import Path
    >>> from histoflare import MODELS, BagTask, load_cohort, predict, read_manifest
    >>> model = MODELS["mem"](memories=2, dim=4, hidden=8)
    >>> task = BagTask(("glandular", "solid"), "densenet121-random:v1", model, patch_px=224)
    >>> manifest = read_manifest(Path("clinic-a/manifest.csv"), check_files=False)
    >>> cohort = load_cohort("clinic-a", manifest, Path("clinic-a/bags"), task.target, task.encoder)
    >>> state = task.build_model().state_dict()  # or that of a run
    >>> table = predict(task, state, cohort, "test")
    >>> table.probabilities.shape == (len(table.patients), 2)
    True
    """
    with reproducible(0, device), torch.no_grad():
        return task.predict(load_model(task, state, device), data, split)


def training_loss(task: Task, state: State, data: Any, seed: int, device: str = "cpu") -> float:
    """Return the mean loss of a model over the batches of one round of training, without training.

    In evaluation mode, without gradients; the model, as :func:`train_locally` takes it, is left as it is.

    Args:
        seed: Of the batches. Each counts the same.

    Raises:
        JobError: There is no batch (SITE_HAS_NO_TRAINING_DATA).
    """
    with reproducible(seed, device), torch.no_grad():
        model = load_model(task, state, device)
        losses = [float(task.loss(model, batch)) for batch in task.train_batches(data, seed)]
    if not losses:
        raise JobError(
            "This site has no training samples: its manifest needs rows with split 'train'.",
            reason="SITE_HAS_NO_TRAINING_DATA",
        )
    return math.fsum(losses) / len(losses)


def load_model(task: Task, state: State, device: str = "cpu") -> nn.Module:
    """Return the task's model with the weights of ``state``, in evaluation mode; or the ensemble that it is.

    Raises:
        JobError: The state is not one of the task's model.
    """
    members = []
    for each in split_models(state):
        members.append(task.build_model())
        load_state(members[-1], each)
    return assemble(members, task.average).to(device).eval()


def samples_there(task: Task, data: Any) -> int:
    """Return the number of training samples; 0 where they cannot be counted, as a file cannot be read."""
    try:
        return task.n_train(data)
    except (HistoflareError, OSError):
        return 0


def _batches(task: Task, data: Any, seed: int, steps: int) -> Iterator[Any]:
    """Yield ``steps`` batches: rounds of the task, each in another order."""
    taken = 0
    for again in itertools.count():
        before = taken
        for batch in task.train_batches(data, derive_seed(seed, "again", again) if again else seed):
            yield batch
            taken += 1
            if taken == steps:
                return
        if taken == before:
            return


def rate_schedule(
    task: Task,
    optimizer: torch.optim.Optimizer,
    data: Any,
    round_index: int,
    total_rounds: int,
    steps: int | None,
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Return what sets the learning rate step by step, if the task has one that changes."""
    if not isinstance(task, Decaying):
        return None
    steps, decay = max(1, task.n_steps(data) if steps is None else steps), task.decay
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: decay((round_index + step / steps) / total_rounds)
    )


def _step(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, hook: LocalHook
) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = hook.loss(model, batch, task.loss(model, batch))
    value = float(loss.detach())
    if not math.isfinite(value):
        raise JobError(
            f"The training loss became {value}: the learning rate is too large, or the features are damaged.",
            reason="TRAINING_FAILED",
        )
    loss.backward()  # type: ignore[no-untyped-call]
    add_terms(model, hook)
    optimizer.step()
    hook.after_step(model)
    return value


def add_terms(model: nn.Module, hook: LocalHook) -> None:
    """Add a hook's terms to the gradients of a model's parameters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            term = hook.gradient(name, parameter) if parameter.requires_grad else None
            if term is not None:
                parameter.grad = term if parameter.grad is None else parameter.grad + term

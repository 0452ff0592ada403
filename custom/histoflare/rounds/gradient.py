"""The gradient of one step at one site: what a strategy sends whose optimizer is at the server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from histoflare.errors import JobError
from histoflare.privacy.dpsgd import private_gradient
from histoflare.privacy.noise import NoiseSource, poisson_sample
from histoflare.rounds.local import LocalResult, reproducible, samples_there
from histoflare.rounds.private import StepPlan, record_loss, records_of
from histoflare.rounds.state import State, load_state, model_state
from histoflare.rounds.task import Task
from histoflare.seeds import derive_seed


class GradientPlan(StepPlan, Protocol):
    """The public numbers of a step whose noise sites may share; ``privacy.plan.DpSgd`` says what each is."""

    @property
    def is_shared(self) -> bool: ...
    @property
    def sites_noise(self) -> float: ...


@dataclass(frozen=True)
class Gradient:
    """A site's part in one step.

    Attributes:
        change: Of each floating-point tensor of the model. A trained parameter: minus its gradient, the
            change that a step of plain SGD with learning rate 1 makes. A buffer: how the batch moved it.
        training: How it went, for the site's own log; its ``state`` is the model as it came.
    """

    change: State
    training: LocalResult


def batch_gradient(task: Task, state: State, data: Any, *, seed: int, device: str = "cpu") -> Gradient:
    """Return the mean gradient of one batch, the first that the task yields under ``seed``.

    Raises:
        JobError: No training data (SITE_HAS_NO_TRAINING_DATA), or the loss or the gradient is not finite
            (TRAINING_FAILED).
    """
    n_samples = task.n_train(data)
    if n_samples < 1:
        raise JobError(
            "This site has no training samples: its manifest needs rows with split 'train'.",
            reason="SITE_HAS_NO_TRAINING_DATA",
        )
    with reproducible(seed, device):
        model = _model(task, state, device)
        loss = math.nan
        for batch in task.train_batches(data, seed):
            made = task.loss(model, batch)
            loss = float(made.detach())
            made.backward()  # type: ignore[no-untyped-call]
            break
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        change = _change(model, state, gradients)
    if not (math.isfinite(loss) and all(bool(tensor.isfinite().all()) for tensor in change.values())):
        raise JobError(
            f"The training loss became {loss}, or its gradient is not finite: the learning rate is too "
            "large, or the features are damaged.",
            reason="TRAINING_FAILED",
        )
    return Gradient(change, LocalResult(dict(state), n_samples, 1, loss))


def record_gradient(
    task: Task,
    state: State,
    data: Any,
    *,
    plan: GradientPlan,
    noise: NoiseSource,
    seed: int,
    device: str = "cpu",
) -> Gradient:
    """Return the gradient of one step of DP-SGD: of a Poisson sample, each record's clipped, with noise.

    Guarantee: ``change`` is the output of one mechanism of :mod:`histoflare.privacy.dpsgd`. Where sites share
    the noise, it is minus the *sum* of the clipped gradients with this site's share of the noise, in float64
    on the noise's grid; a share by itself protects far less, so it leaves as part of a secure sum alone. The
    rest of the result is the site's own and must stay.

    Args:
        plan: Of one step a round.
        noise: Source of sample and noise; a secure one unless it is research.
        seed: Of the patches or windows that a record shows.

    Raises:
        JobError: See :func:`histoflare.rounds.private.train_privately`. No error follows from one record.
    """
    records = records_of(task, data, plan)
    secret = int(noise.uniform(1)[0] * 2**53)
    with reproducible(secret, device):
        model = _model(task, state, device)
        drawn = poisson_sample(len(records), plan.sample_rate, noise).tolist()
        made = private_gradient(
            model,
            partial(record_loss, task, data, derive_seed(seed, "step", 0)),
            [records[i] for i in drawn],
            clip_norm=plan.clip_norm,
            noise_multiplier=plan.sites_noise,
            batch_size=1.0 if plan.is_shared else plan.batch_size,
            noise=noise,
            dtype=torch.float64 if plan.is_shared else None,
        )
        change = _change(model, state, made.tensors)
    if plan.is_shared:
        change = {name: tensor.double() for name, tensor in change.items()}
    losses = [loss for loss in made.losses.tolist() if math.isfinite(loss)]
    mean = math.fsum(losses) / len(losses) if losses else math.nan
    result = LocalResult(dict(state), len(records), 1, mean, tuple(dict.fromkeys(made.failures)))
    return Gradient(change, result)


def no_gradient(task: Task, state: State, data: Any, why: Exception) -> Gradient:
    """Return a gradient of zeros, with the reason for the site's own log."""
    zeros = {n: torch.zeros_like(tensor) for n, tensor in state.items() if tensor.is_floating_point()}
    n_samples = samples_there(task, data)
    return Gradient(zeros, LocalResult(dict(state), n_samples, 0, math.nan, (str(why),)))


def _model(task: Task, state: State, device: str) -> nn.Module:
    model = task.build_model()
    load_state(model, state)
    return model.to(device).train()


def _change(model: nn.Module, before: State, gradients: Mapping[str, Tensor]) -> State:
    """Return the change of each floating-point tensor, on the CPU."""
    after = model_state(model)
    return {
        name: gradients[name].detach().cpu().neg() if name in gradients else after[name] - tensor
        for name, tensor in before.items()
        if tensor.is_floating_point()
    }

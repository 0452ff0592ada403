"""Training at one site under DP-SGD: local training whose steps see records only through clip and noise."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from histoflare.errors import JobError
from histoflare.privacy.dpsgd import PrivateGradient, private_gradient
from histoflare.privacy.noise import NoiseSource, poisson_sample
from histoflare.rounds.hook import LocalHook
from histoflare.rounds.local import LocalResult, add_terms, one_thread, rate_schedule, reproducible
from histoflare.rounds.state import is_finite, load_state, model_state
from histoflare.rounds.task import PerRecord, Task
from histoflare.seeds import derive_seed


class StepPlan(Protocol):
    """The public numbers of a round of DP-SGD; ``privacy.plan.DpSgd`` says what each is."""

    @property
    def clip_norm(self) -> float: ...
    @property
    def noise_multiplier(self) -> float | None: ...
    @property
    def sample_rate(self) -> float: ...
    @property
    def batch_size(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def record(self) -> str: ...
    @property
    def slides_per_patient(self) -> int | None: ...


def train_privately(
    task: Task,
    state: dict[str, Tensor],
    data: Any,
    *,
    plan: StepPlan,
    noise: NoiseSource,
    seed: int,
    hook: LocalHook | None = None,
    round_index: int = 0,
    total_rounds: int = 1,
    device: str = "cpu",
) -> LocalResult:
    """Train one round's ``plan.steps`` steps from ``state`` (which is left as it is).

    Guarantee: the trained state is the output of ``plan.steps`` mechanisms of
    :mod:`histoflare.privacy.dpsgd` on Poisson samples of the records. Nothing else is: ``mean_loss`` (of the
    records that were drawn; NaN if none was) and ``n_samples`` (the records) are the site's own and must
    stay. Buffers of the model keep what ``state`` gives them, and so do parameters that the task does not
    train.

    The order of what is drawn from ``noise``: the seed of dropout, then for each step the sample and the
    noise. Dropout must not follow the public ``seed``: a mask that is known and falls on another record when
    one is taken out would tell of it.

    Args:
        noise: Source of samples and noise; a secure one unless it is research.
        seed: Of the patches or windows that a record shows in a step, each record's by itself.
        hook: Takes part in each step after clip and noise. It must not depend on this site's records but
            through what was released, and has no part in the loss.
        round_index, total_rounds: How far the run is: a learning rate may fall over all of it.
        device: Where the gradients of the records are made, clipped and summed. Samples and noise come from
            the CPU, where the cryptographic source is. The guarantee takes for granted that a record's
            gradient does not depend on which others were drawn, roundings and all; that was tried on CPUs.

    Raises:
        JobError: No training data, a task that is no ``PerRecord`` or a model that will not do
            (MODEL_NOT_PRIVATE), settings out of range or a hook with a part in the loss (PRIVACY_INVALID), or
            the trained state is not finite (TRAINING_FAILED: it follows from the noised steps, and costs no
            more than they do).

    No error follows from a single record: one that cannot be had, or has not the task's shape, counts as
    zero, and ``failures`` says so. Whether the data fit the task at all is asked when they are loaded.
    """
    records = records_of(task, data, plan)
    if plan.noise_multiplier is None:
        raise JobError("The job's noise is not settled yet.", reason="PRIVACY_INVALID")
    hook = hook or LocalHook()
    if type(hook).loss is not LocalHook.loss:
        raise JobError(
            "This strategy's part in the loss looks at data, which DP-SGD does not protect.",
            reason="PRIVACY_INVALID",
        )
    secret = int(noise.uniform(1)[0] * 2**53)
    losses: list[float] = []
    failures: list[str] = []
    with one_thread(), reproducible(secret, device):
        model = task.build_model()
        load_state(model, state)
        model.to(device).train()
        optimizer = task.build_optimizer(model)
        rate = rate_schedule(task, optimizer, data, round_index, total_rounds, plan.steps)
        for step in range(plan.steps):
            drawn = poisson_sample(len(records), plan.sample_rate, noise).tolist()
            step_seed = derive_seed(seed, "step", step)
            gradient = private_gradient(
                model,
                partial(record_loss, task, data, step_seed),
                [records[i] for i in drawn],
                clip_norm=plan.clip_norm,
                noise_multiplier=plan.noise_multiplier,
                batch_size=plan.batch_size,
                noise=noise,
            )
            _step(model, optimizer, gradient, hook)
            if rate is not None:
                rate.step()
            failures += gradient.failures
            losses += [loss for loss in gradient.losses.tolist() if math.isfinite(loss)]
        trained = model_state(model)
    if not all(map(is_finite, trained.values())):
        raise JobError(
            "Local training ended with NaN or infinity in the model: check the task's learning rate.",
            reason="TRAINING_FAILED",
        )
    mean = math.fsum(losses) / len(losses) if losses else math.nan
    return LocalResult(trained, len(records), plan.steps, mean, tuple(dict.fromkeys(failures)))


def records_of(task: Task, data: Any, plan: StepPlan) -> list[Any]:
    """Return the records that a sample is drawn from.

    Raises:
        JobError: The task does not tell its records apart (MODEL_NOT_PRIVATE), or has none at this site
            (SITE_HAS_NO_TRAINING_DATA).
    """
    if not isinstance(task, PerRecord):
        raise JobError(
            f"{type(task).__name__} does not tell its records apart, as training under DP-SGD needs it.",
            reason="MODEL_NOT_PRIVATE",
        )
    records = task.records(data, plan.record, plan.slides_per_patient)
    # Where all were left out there is nobody to train on, and an error would tell: an empty sample is a step.
    if not records and not getattr(data, "left_out", 0):
        raise JobError(
            "This site has no training samples: its manifest needs rows with split 'train'.",
            reason="SITE_HAS_NO_TRAINING_DATA",
        )
    return records


def record_loss(task: Any, data: Any, seed: int, model: nn.Module, record: Any) -> Tensor:
    """Return the loss (1,) of one record, which is read here."""
    losses: Tensor = task.record_losses(model, task.record_batch(data, [record], seed))
    return losses


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, gradient: PrivateGradient, hook: LocalHook
) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = gradient.tensors[name]
    add_terms(model, hook)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    hook.after_step(model)

"""What a strategy is, and the two halves of a round that every runtime runs.

A strategy is one file: whom it asks (:meth:`Strategy.participants`), what a site does with the global state
and what it sends (:meth:`Strategy.local_round`), what the server does with it (:meth:`Strategy.combine`), and
which model a site then has (:meth:`Strategy.personalize`). A new one is a subclass in a file of its own and a
line in :data:`STRATEGIES`.

A round, in the in-process runner and under FLARE alike, is :func:`site_round` at each participant, then
:func:`server_round`. What is sent are *updates*, local minus global (Rieke et al. 2020, Algorithm 1).
"""

from __future__ import annotations

import importlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from histoflare.errors import BagError, HistoflareError, JobError, MaskError
from histoflare.model_file import OF_STRATEGY
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan
from histoflare.rounds.local import Correction, LocalResult, one_thread, train_locally
from histoflare.rounds.state import (
    BATCH_NORM,
    State,
    batch_norm_names,
    check_tensors,
    shared_names,
    subtract,
    without_negative_variances,
)
from histoflare.rounds.task import Task
from histoflare.seeds import derive_seed

STRATEGIES = {
    "fedavg": "histoflare.rounds.fedavg:FedAvg",
    "cyclic": "histoflare.rounds.cyclic:CyclicWeightTransfer",
}

EXTRA = OF_STRATEGY
"""Prefix of the tensors that a strategy adds to the global state beside the model's (control variates)."""

TRANSFERS = ("float32", "float16")

UNTOLD = ("TRAINING_FAILED", "SITE_HAS_NO_TRAINING_DATA")
"""Under a privacy plan nobody is told that training diverged, had nothing to learn from, or met a
bag or an image that cannot be read."""

PERSONAL = "personal/"
"""Prefix, in a site's own state, of the model tensors that it does not share."""


@dataclass(frozen=True)
class SiteRound:
    """All that a site's half of a round depends on.

    Attributes:
        global_state: As received; not to be changed in place.
        site_state: What the strategy left at this site in its last round there (empty before the first).
        round_index: From 0. total_rounds: Of the job.
        seed: The job's.
        plan: What protects the update; a strategy trains with :meth:`train` and so under it.
        device: Where training runs, ``"cpu"`` or ``"cuda"``; only on the former do the same bytes come out.
        steps: Optimizer steps of the round; None as the task has it. Under DP-SGD the plan says it.
    """

    task: Task
    data: Any
    site: str
    global_state: State
    site_state: State
    round_index: int
    total_rounds: int
    seed: int
    plan: PrivacyPlan
    device: str = "cpu"
    steps: int | None = None

    @property
    def train_seed(self) -> int:
        """The seed of this site's training in this round."""
        return derive_seed(self.seed, "train", self.site, self.round_index)

    def train(self, start: State, correction: Correction | None = None) -> LocalResult:
        """Train from ``start``: under DP-SGD if the plan says so, else as the task has it."""
        if not isinstance(self.plan, DpSgd):
            return self._train_plainly(start, correction)
        from histoflare.rounds.private import train_privately

        return train_privately(
            self.task,
            start,
            self.data,
            plan=self.plan,
            noise=self.plan.noise(self.site, self.round_index, "steps"),
            seed=self.train_seed,
            correction=correction,
            device=self.device,
        )

    def _train_plainly(self, start: State, correction: Correction | None) -> LocalResult:
        try:
            return train_locally(
                self.task,
                start,
                self.data,
                seed=self.train_seed,
                correction=correction,
                round_index=self.round_index,
                total_rounds=self.total_rounds,
                device=self.device,
                steps=self.steps,
            )
        except (HistoflareError, OSError) as error:
            of_data = isinstance(error, (BagError, MaskError, OSError))
            if isinstance(self.plan, Open) or not (of_data or getattr(error, "reason", "") in UNTOLD):
                raise
            # That depends on the data, and would leave without noise: the update is zeros.
            return LocalResult(dict(start), self.task.n_train(self.data), 0, math.nan, (str(error),))


@dataclass(frozen=True)
class Update:
    """What leaves a site: named tensors (local minus global, floating-point) and their weight."""

    site: str
    tensors: State
    weight: float


@dataclass(frozen=True)
class SiteOutcome:
    """A site's half of a round. Only ``update`` leaves.

    Attributes:
        update: For the server.
        site_state: For the site's next round; the runtime keeps it, once the update is on its way.
        training: How training went, for the site's own log.
    """

    update: Update
    site_state: State
    training: LocalResult


class Strategy(ABC):
    """How sites and server work together. Subclasses are frozen dataclasses of plain JSON-able fields.

    What decides whether a privacy plan's guarantee holds is declared, and has no default: ``linear``,
    ``kept`` and ``equal_weights``. Plans refuse a strategy that leaves one out.

    Attributes:
        name: As in a job's configuration.
        skips_sites: Whether a site that refuses loses its turn and the others go on, however few answered.
        linear: Whether the updates enter the next global state only as terms of one weighted sum. Noise that
            the server adds to the sum protects nothing where they are also used in another way.
        kept: What it keeps at a site from round to round beside the layers that are not sent, in words
            (control variates); () for nothing.
        share: Module prefixes of what is sent; None sends every floating-point tensor. Tensors not sent are
            personal: each site keeps its own between rounds, and the server's stay as they were.
        batch_norm: What of BatchNorm layers is sent, one of ``rounds.state.BATCH_NORM``.
        transfer: ``"float32"``: updates are sent as they are. ``"float16"``: their float32 tensors are
            rounded to half precision, after any noise, which halves what is sent. Sums are float64 as ever.
    """

    name: ClassVar[str]
    skips_sites: ClassVar[bool] = False
    linear: ClassVar[bool]
    kept: ClassVar[tuple[str, ...]]
    share: Sequence[str] | None = None
    batch_norm: str = "shared"
    transfer: str = "float32"

    def __post_init__(self) -> None:
        for name, known in (("batch_norm", BATCH_NORM), ("transfer", TRANSFERS)):
            if getattr(self, name) not in known:
                raise JobError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}.")

    @property
    @abstractmethod
    def equal_weights(self) -> bool:
        """Whether all updates of a round weigh the same in the sum, whatever a site sends."""

    @property
    def keeps(self) -> tuple[str, ...]:
        """All that stays at a site from round to round, in words; () for nothing."""
        personal = [] if self.share is None else ["personal layers"]
        norms = [] if self.batch_norm == "shared" else ["batch-norm statistics"]
        return (*self.kept, *personal, *norms)

    def check_sites(self, sites: Sequence[str]) -> None:
        """Raise :class:`JobError` if this strategy cannot work with these sites. Called before round 0."""
        if not sites or len(set(sites)) != len(sites):
            raise JobError(f"A federation needs at least one site, each once; got {list(sites)}.")

    def begin(self, state: State) -> State:
        """Return the first global state: the model's, plus the strategy's own tensors under :data:`EXTRA`."""
        return state

    @abstractmethod
    def participants(self, round_index: int, sites: Sequence[str], seed: int) -> tuple[str, ...]:
        """Return who trains in this round, in site order; the same answer in every process."""

    @abstractmethod
    def combine(self, global_state: State, updates: Sequence[Update]) -> State:
        """Return the next global state from checked updates in site order (at least one)."""

    def weight(self, site: str, n_samples: int) -> float:
        """Return the weight a site sends. 1, unless a strategy needs more: a sample count tells something."""
        return 1.0

    def correction(self, ctx: SiteRound) -> Correction | None:
        """Return the term to add to each gradient in local training, if the strategy has one."""
        return None

    def sent_names(self, global_state: Mapping[str, Tensor]) -> list[str]:
        """Return the names a site sends: the shared ones and the strategy's own."""
        model = {name: tensor for name, tensor in global_state.items() if not name.startswith(EXTRA)}
        return self.shared_names(model) + [name for name in global_state if name.startswith(EXTRA)]

    def shared_names(self, model: Mapping[str, Tensor]) -> list[str]:
        """Return which of a model's tensors a site sends."""
        kept = batch_norm_names(model, self.batch_norm)
        return [name for name in shared_names(model, self.share) if name not in kept]

    def personalize(self, global_state: Mapping[str, Tensor], site_state: Mapping[str, Tensor]) -> State:
        """Return a site's model: the global tensors, with the site's personal ones in their place."""
        return {
            name: site_state.get(PERSONAL + name, tensor)
            for name, tensor in global_state.items()
            if not name.startswith(EXTRA)
        }

    def local_round(self, ctx: SiteRound) -> SiteOutcome:
        """Train from the site's model; send the change of what is shared, keep the rest for the next time."""
        start = self.personalize(ctx.global_state, ctx.site_state)
        result = ctx.train(start, self.correction(ctx))
        sent = self.shared_names(start)
        update = Update(
            ctx.site, subtract(result.state, start, sent), self.weight(ctx.site, result.n_samples)
        )
        return SiteOutcome(update, self.personal_state(result.state), result)

    def personal_state(self, trained: Mapping[str, Tensor]) -> State:
        """Return the floating-point tensors of ``trained`` that are not sent, for a site's own state."""
        sent = set(self.shared_names(trained))
        return {
            PERSONAL + name: tensor.clone()
            for name, tensor in trained.items()
            if name not in sent and tensor.is_floating_point()
        }


def site_round(
    task: Task,
    strategy: Strategy,
    global_state: State,
    data: Any,
    *,
    site: str,
    site_state: State,
    round_index: int,
    total_rounds: int,
    seed: int,
    plan: PrivacyPlan,
    device: str = "cpu",
    steps: int | None = None,
) -> SiteOutcome:
    """The site's half of a round: the strategy's local round, then the privacy plan's release.

    Training runs on ``device``; what it gives is on the CPU, and so is the release, on one thread.

    Raises:
        JobError: Training failed, or what would leave has not the names and shapes the strategy sends.
        HistoflareError: The privacy plan lets nothing leave.
    """
    ctx = SiteRound(
        task, data, site, global_state, site_state, round_index, total_rounds, seed, plan, device, steps
    )
    outcome = strategy.local_round(ctx)
    with one_thread():
        released = plan.release(outcome.update.tensors, plan.noise(site, round_index, "update"))
        update = replace(outcome.update, tensors=compress(released, strategy.transfer))
        check_update(strategy, global_state, update)
    return replace(outcome, update=update)


def count_sent(strategy: Strategy, global_state: Mapping[str, Tensor]) -> int:
    """Return how many numbers a site sends in a round, those of the strategy itself included."""
    return sum(global_state[name].numel() for name in strategy.sent_names(global_state))


def count_sent_by_job(strategy: Strategy, task: Task) -> int:
    """Return the same for a task's model, which is made for its shapes alone, without memory or numbers."""
    with torch.device("meta"), _RealRanges():
        model = task.build_model()
        state = strategy.begin(dict(model.state_dict()))
    return count_sent(strategy, state)


class _RealRanges(TorchFunctionMode):
    """Makes ranges with numbers where all else has none: networks read rates of theirs from one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        fixed = {"device": torch.device("cpu")} if func is torch.linspace else {}
        return func(*args, **{**(kwargs or {}), **fixed})


def compress(tensors: Mapping[str, Tensor], transfer: str) -> State:
    """Return tensors as they are sent; what half precision cannot hold becomes the nearest that it can.

    Rounding what was released tells nothing more of the data (post-processing).
    """
    if transfer == "float32":
        return dict(tensors)
    largest = torch.finfo(torch.float16).max
    return {
        name: tensor.clamp(-largest, largest).half() if tensor.dtype == torch.float32 else tensor
        for name, tensor in tensors.items()
    }


def check_update(strategy: Strategy, global_state: State, update: Update) -> None:
    """Raise :class:`JobError` unless ``update`` has the tensors that ``strategy`` sends and a weight."""
    like = compress(
        {name: global_state[name] for name in strategy.sent_names(global_state)}, strategy.transfer
    )
    check_tensors(update.tensors, like, whose=f"The update of {update.site}")
    if not (math.isfinite(update.weight) and update.weight >= 0):
        raise JobError(
            f"The update of {update.site} has weight {update.weight}; it must be a number of at least 0.",
            reason="WEIGHTS_INVALID",
        )


@one_thread()
def server_round(
    strategy: Strategy,
    global_state: State,
    updates: Sequence[Update],
    sites: Sequence[str],
    plan: PrivacyPlan | None = None,
) -> State:
    """The server's half of a round: check every update, order them by ``sites``, combine them.

    The order of arrival does not matter, to the last bit.

    Args:
        sites: All sites of the federation, in its fixed order; not all need to have sent an update.
        plan: The job's; one whose noise is added at the server has its part here.

    Raises:
        JobError: No update; one from an unknown site or two from one; an update with missing, unknown,
            wrongly shaped or non-finite tensors or a bad weight; a result that is not finite.
    """
    arrived = [update.site for update in updates]
    unknown = sorted(set(arrived) - set(sites))
    doubled = sorted({site for site in arrived if arrived.count(site) > 1})
    if not arrived or unknown or doubled:
        what = f"from unknown sites {unknown}" if unknown else f"more than once from {doubled}"
        raise JobError(
            f"Updates came {what if arrived else 'from no site'}; the sites are {list(sites)}.",
            reason="UPDATES_INVALID",
        )
    for update in updates:
        check_update(strategy, global_state, update)
    ordered = [
        replace(
            update, tensors={name: each.to(global_state[name].dtype) for name, each in update.tensors.items()}
        )
        for update in sorted(updates, key=lambda update: list(sites).index(update.site))
    ]
    if plan is not None:
        plan.check_strategy(strategy)
        protected = plan.at_server([update.tensors for update in ordered])
        ordered = [replace(update, tensors=own) for update, own in zip(ordered, protected, strict=True)]
    combined = without_negative_variances(strategy.combine(global_state, ordered))
    check_tensors(combined, global_state, whose=f"The global state that {strategy.name} made")
    return combined


def make_strategy(name: str, **arguments: Any) -> Strategy:
    """Return the strategy ``name`` with its arguments, as a job's configuration gives them.

    Raises:
        JobError: No such strategy, or it does not take these arguments.
    """
    if name not in STRATEGIES:
        raise JobError(f"There is no strategy {name!r}; there are: {', '.join(sorted(STRATEGIES))}.")
    module, _, attribute = STRATEGIES[name].partition(":")
    kind: type[Strategy] = getattr(importlib.import_module(module), attribute)
    known = set(inspect.signature(kind).parameters)
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise JobError(
            f"The strategy {name} takes no {', '.join(unknown)}; it takes: {', '.join(sorted(known))}."
        )
    return kind(**arguments)

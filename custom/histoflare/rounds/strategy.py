"""What a strategy is: how sites and server work together in a training run.

A strategy is one file in ``rounds/strategies/`` and one line in its registry. It says what a site does and
sends (:meth:`Strategy.local_round`), what the aggregator makes of it (:meth:`Strategy.combine`), and which
model a site then has (:meth:`Strategy.personalize`). Who trains and who aggregates is its topology's
(:attr:`Strategy.topology`). What is sent are *updates*, local minus global (Rieke et al. 2020, Algorithm 1).

The aggregator is called the server here, as it is in every federation that FLARE runs; where a topology has a
site aggregate, that site is meant.

Tensors of a strategy's own travel beside the model's, and are kept beside them, under names that begin with
:data:`OWN`; :func:`join` and :func:`split` put the two together and take them apart.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from histoflare.ensemble import join_models, tensor_name
from histoflare.errors import BagError, JobError, MaskError
from histoflare.model_file import OF_STRATEGY
from histoflare.privacy.plan import PrivacyPlan
from histoflare.rounds.gradient import Gradient, batch_gradient, no_gradient, record_gradient
from histoflare.rounds.hook import LocalHook
from histoflare.rounds.local import LocalResult, samples_there, train_locally
from histoflare.rounds.private import train_privately
from histoflare.rounds.state import BATCH_NORM, State, batch_norm_names, shared_names, subtract
from histoflare.rounds.task import PartlyTrained, Task
from histoflare.rounds.topologies.federated import Federated
from histoflare.rounds.topology import Topology
from histoflare.seeds import derive_seed

OWN = OF_STRATEGY
"""Prefix of a strategy's own tensors beside the model's (control variates, momentum)."""

SUM = "sum"
"""In place of a site's name: the mean of a round's updates, where the server sees nothing but their sum."""

PERSONAL = "personal/"
"""Prefix, in a site's own state, of the model tensors that it does not share."""


def join(model: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> State:
    """Return a model's tensors and a strategy's own (without :data:`OWN`) in one state."""
    return {**model, **{OWN + name: tensor for name, tensor in own.items()}}


def split(state: Mapping[str, Tensor]) -> tuple[State, State]:
    """Return the model's tensors in ``state``, and the strategy's own without :data:`OWN`."""
    model = {name: tensor for name, tensor in state.items() if not name.startswith(OWN)}
    own = {name.removeprefix(OWN): tensor for name, tensor in state.items() if name.startswith(OWN)}
    return model, own


def trained_by(task: Task) -> Sequence[str] | None:
    """Return the paths of the modules that a task trains; None for all."""
    return task.trained if isinstance(task, PartlyTrained) else None


@dataclass(frozen=True)
class SiteRound:
    """All that a site's half of a round depends on.

    Attributes:
        task, data: What is learned, and this site's data.
        site: The site's name.
        model: The global model as received; not to be changed in place.
        downlink: What the strategy sent down beside it; see :meth:`Strategy.downlink`.
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
    model: State
    downlink: State
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

    def train(self, start: State, hook: LocalHook | None = None) -> LocalResult:
        """Train from ``start`` in the way that the privacy plan chooses.

        Raises:
            HistoflareError: Training failed in a way that may be told.
        """
        result: LocalResult = self.plan.train(_Training(self, start, hook or LocalHook()))
        return result

    def gradient(self, start: State) -> Gradient:
        """Return the gradient of one step from ``start``, made in the way that the privacy plan chooses.

        Raises:
            HistoflareError: It cannot be made, and that may be told.
        """
        made: Gradient = self.plan.gradient(_OneStep(self, start, LocalHook()))
        return made


@dataclass(frozen=True)
class _Training:
    """The ways to train that a privacy plan chooses from (``privacy.plan.Training``)."""

    ctx: SiteRound
    start: State
    hook: LocalHook

    def plainly(self) -> Any:
        """Train as the task has it."""
        ctx = self.ctx
        return train_locally(
            ctx.task,
            self.start,
            ctx.data,
            seed=ctx.train_seed,
            hook=self.hook,
            round_index=ctx.round_index,
            total_rounds=ctx.total_rounds,
            device=ctx.device,
            steps=ctx.steps,
        )

    def by_record(self, plan: Any) -> Any:
        """Train with the gradient of each record by itself, clipped and noised as ``plan`` says."""
        ctx = self.ctx
        return train_privately(
            ctx.task,
            self.start,
            ctx.data,
            plan=plan,
            noise=plan.noise_source(ctx.site, ctx.round_index, "steps"),
            seed=ctx.train_seed,
            hook=self.hook,
            round_index=ctx.round_index,
            total_rounds=ctx.total_rounds,
            device=ctx.device,
        )

    def not_at_all(self, why: Exception) -> Any:
        """Return the model as it was."""
        n_samples = samples_there(self.ctx.task, self.ctx.data)
        return LocalResult(dict(self.start), n_samples, 0, math.nan, (str(why),))

    @staticmethod
    def tells_of_data(error: Exception) -> bool:
        """Return whether an error of :meth:`plainly` depends on this site's data.

        Training that diverged, had nothing to learn from, or met a bag or an image that cannot be read.
        """
        told = ("TRAINING_FAILED", "SITE_HAS_NO_TRAINING_DATA")
        return isinstance(error, BagError | MaskError | OSError) or getattr(error, "reason", "") in told


class _OneStep(_Training):
    """The same ways, for the gradient of one step in place of trained weights."""

    def plainly(self) -> Any:
        """Return the gradient of one batch of the task."""
        ctx = self.ctx
        return batch_gradient(ctx.task, self.start, ctx.data, seed=ctx.train_seed, device=ctx.device)

    def by_record(self, plan: Any) -> Any:
        """Return the gradient of one sample, each record's clipped, with noise as ``plan`` says."""
        ctx = self.ctx
        noise = plan.noise_source(ctx.site, ctx.round_index, "steps")
        return record_gradient(
            ctx.task, self.start, ctx.data, plan=plan, noise=noise, seed=ctx.train_seed, device=ctx.device
        )

    def not_at_all(self, why: Exception) -> Any:
        """Return a gradient of zeros."""
        return no_gradient(self.ctx.task, self.start, self.ctx.data, why)


@dataclass(frozen=True)
class Update:
    """What leaves a site.

    Attributes:
        site: Its name.
        tensors: Local minus global of what is shared, and under :data:`OWN` what the strategy adds;
            floating-point.
        weight: Its weight in the sum, at least 0.
        numbers: Of the names that ``Strategy.numbers`` declares, each finite. They leave without noise.
    """

    site: str
    tensors: State
    weight: float
    numbers: Mapping[str, float] = field(default_factory=dict)


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


@dataclass(frozen=True)
class ServerRound:
    """All that the server's half of a round depends on.

    Attributes:
        model: The global model that the sites began with; not to be changed in place.
        own: What the strategy keeps at the server, as it left it in the last round.
        updates: Checked, in site order; at least ``Strategy.least_updates``.
        sites: All sites of the federation, in its fixed order.
        round_index: From 0. total_rounds: Of the job. seed: The job's.
    """

    model: State
    own: State
    updates: Sequence[Update]
    sites: Sequence[str]
    round_index: int = 0
    total_rounds: int = 1
    seed: int = 0


@dataclass(frozen=True)
class ServerOutcome:
    """The server's half of a round.

    Attributes:
        model: The next global model: the names, shapes and dtypes of the last.
        own: What the strategy keeps at the server for the next round; the names, shapes and dtypes of
            :meth:`Strategy.begin`.
        rejected: Site → why its update was not used, a fixed code; for the run's record and report.
        contribution: Site → its share of the step, where the strategy has such a figure; likewise.
        numbers: Site → the numbers that it sent; the round puts them here.
    """

    model: State
    own: State = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    contribution: Mapping[str, float] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def notes(self) -> dict[str, Any]:
        """Return what goes into the run's record, as plain JSON: empty where there is nothing to say."""
        said = {
            "rejected": dict(self.rejected),
            "contribution": dict(self.contribution),
            "numbers": {site: dict(sent) for site, sent in self.numbers.items()},
        }
        return {name: value for name, value in said.items() if value}


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """How sites and server work together. Subclasses are frozen dataclasses of plain JSON-able fields.

    What decides whether a privacy plan's guarantee holds is declared, and has no default: ``linear``,
    ``kept``, ``sees_data`` and ``equal_weights``. Plans refuse a strategy that leaves one out.

    Attributes:
        name: As in a job's configuration.
        linear: Whether the updates enter the next model only as terms of one weighted sum. Noise that the
            server adds to the sum protects nothing where they are also used in another way.
        kept: What it keeps at a site from round to round beside the layers that are not sent, in words
            (control variates); () for nothing.
        sees_data: Whether its :class:`LocalHook` looks at training data. DP-SGD refuses it then.
        own_models: Whether a site that trained has a model of its own beside the global one, and answers with
            it (:meth:`personalize`); layers that are not shared apart.
        one_step: Whether a site sends the gradient of one step (``SiteRound.gradient``), and trains no
            further. Noise that sites share is the noise of one step.
        numbers: What a site sends beside the tensors: name → whether it follows from the site's data (its
            loss does, a planned number of steps does not). Each must be one that the site's policy lists, and
            no privacy plan admits one that follows from data, for it has no noise.
        share: Module prefixes of what is sent; None sends every floating-point tensor. Tensors not sent are
            personal: each site keeps its own between rounds, and the server's stay as they were.
        batch_norm: What of BatchNorm layers is sent, one of ``rounds.state.BATCH_NORM``.
        trains: Module prefixes of what the task trains; None for all. The rest stays as the job began with
            it: it is not sent, and no site has its own. The task says it (:meth:`of_task`), and no job.
    """

    name: ClassVar[str]
    linear: ClassVar[bool]
    kept: ClassVar[tuple[str, ...]]
    sees_data: ClassVar[bool]
    own_models: ClassVar[bool] = False
    one_step: ClassVar[bool] = False
    numbers: ClassVar[Mapping[str, bool]] = {}
    share: Sequence[str] | None = None
    batch_norm: str = "shared"
    trains: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.batch_norm not in BATCH_NORM:
            raise JobError(f"batch_norm must be one of {', '.join(BATCH_NORM)}, not {self.batch_norm!r}.")
        if problems := self.problems():
            raise JobError(f"The strategy {self.name} cannot work so: {'; '.join(problems)}.")

    def problems(self) -> list[str]:
        """Return which of its own fields are out of range, in words (``histoflare.ranges``)."""
        return []

    def of_task(self, task: Task) -> Self:
        """Return the strategy that sends what ``task`` trains."""
        return replace(self, trains=trained_by(task))

    @property
    def least_updates(self) -> int:
        """With fewer updates than these it cannot make a next model."""
        return 1

    @property
    @abstractmethod
    def equal_weights(self) -> bool:
        """Whether all updates of a round weigh the same in the sum, whatever a site sends."""

    @property
    def topology(self) -> Topology:
        """Who trains in a round and who aggregates: all sites and the server, unless a strategy says else."""
        return Federated()

    @property
    def keeps(self) -> tuple[str, ...]:
        """All that stays at a site from round to round, in words; () for nothing."""
        personal = [] if self.share is None else ["personal layers"]
        norms = [] if self.batch_norm == "shared" else ["batch-norm statistics"]
        return (*self.kept, *personal, *norms)

    def models(self, model: State, own: State) -> dict[str, State]:
        """Return the models that a job hands out after a round: name, without a slash → tensors.

        One, unless a strategy says else. Several are an ensemble (``histoflare.ensemble``): wherever the
        job's model is asked (by sites, beside its bounds, out of its file), each of them is, and their
        probabilities are averaged.

        Args:
            model: The global model.
            own: What the strategy keeps at the server, or of it what it sent down: sites ask the models of
                the round that they received, so that what makes them must be sent down.
        """
        return {"global": model}

    def handed_out(self, model: State, own: State) -> State:
        """Return :meth:`models` as one state, as it is sent to be asked and written to files."""
        return join_models(self.models(model, own))

    def check_sites(self, sites: Sequence[str]) -> None:
        """Raise :class:`JobError` if this strategy cannot work with these sites. Called before round 0."""
        if SUM in sites:
            raise JobError(f"No site can be called {SUM}: that is the sum of all sites' updates.")
        if not sites or len(set(sites)) != len(sites):
            raise JobError(f"A federation needs at least one site, each once; got {list(sites)}.")

    # ---- the server

    def begin(self, model: State) -> State:
        """Return what the strategy keeps at the server before the first round (momentum); {} for nothing."""
        return {}

    def downlink(self, own: State) -> State:
        """Return what of it goes down to the sites beside the model; nothing unless a strategy says so."""
        return {}

    @abstractmethod
    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the next global model, and what the strategy keeps at the server."""

    # ---- a site

    def weight(self, site: str, n_samples: int) -> float:
        """Return the weight a site sends. 1, unless a strategy needs more: a sample count tells something."""
        return 1.0

    def uplink(self, model: Mapping[str, Tensor]) -> State:
        """Return what a site sends beside the model's tensors: tensors of those names, shapes and dtypes."""
        return {}

    def said(self, ctx: SiteRound, training: LocalResult) -> dict[str, float]:
        """Return the numbers that a site sends: all that :attr:`numbers` declares, and no other."""
        return {}

    def hook(self, ctx: SiteRound) -> LocalHook | None:
        """Return what takes part in the steps of local training, if the strategy needs that."""
        return None

    def local_round(self, ctx: SiteRound) -> SiteOutcome:
        """Train from the site's model; send the change of what is shared, keep the rest for the next time."""
        start = self.personalize(ctx.model, ctx.site_state)
        result = ctx.train(start, self.hook(ctx))
        change = subtract(result.state, start, self.shared_names(start))
        update = Update(ctx.site, change, self.weight(ctx.site, result.n_samples), self.said(ctx, result))
        return SiteOutcome(update, self.personal_state(result.state), result)

    def shared_names(self, model: Mapping[str, Tensor]) -> list[str]:
        """Return which of a model's tensors a site sends."""
        kept = batch_norm_names(model, self.batch_norm)
        trained = set(shared_names(model, self.trains))
        names = [name for name in shared_names(model, self.share) if name in trained and name not in kept]
        if not names:
            raise JobError("share names nothing of what the task trains.", reason="SHARE_INVALID")
        return names

    def learned_names(self, model: Mapping[str, Tensor]) -> list[str]:
        """Return which of the sent tensors a gradient moves: all but BatchNorm's running statistics."""
        statistics = batch_norm_names(model, "local-statistics")
        return [name for name in self.shared_names(model) if name not in statistics]

    def sent(self, model: Mapping[str, Tensor]) -> State:
        """Return tensors with the names, shapes and dtypes of an update: the shared ones, then its own."""
        return join({name: model[name] for name in self.shared_names(model)}, self.uplink(model))

    def personalize(self, model: Mapping[str, Tensor], site_state: Mapping[str, Tensor]) -> State:
        """Return a site's model: the global tensors, with the site's personal ones in their place.

        Args:
            model: The global model, or what a job hands out (:meth:`handed_out`): then in every member.
        """
        return {name: site_state.get(PERSONAL + tensor_name(name), each) for name, each in model.items()}

    def personal_state(self, trained: Mapping[str, Tensor]) -> State:
        """Return the tensors of ``trained`` that were trained and not sent, for a site's own state."""
        sent = set(self.shared_names(trained))
        return {
            PERSONAL + name: trained[name].clone()
            for name in shared_names(trained, self.trains)
            if name not in sent
        }

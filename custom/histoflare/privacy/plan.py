"""How a job asks for its updates to be protected, and what a site does to an update before it leaves.

A privacy plan says how a site trains, and is one named step between local training and the way out. Every
runtime takes it through ``rounds.round.site_round``, so no strategy and no job can go round it. It is data:
the job states it, each site's policy says which mechanism it must be, and what it costs
(:meth:`PrivacyPlan.spend`) follows from its public numbers alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from histoflare.checks import is_above_zero, is_whole
from histoflare.errors import HistoflareError, JobError, list_lines
from histoflare.privacy.accountant import MOST_DELTA
from histoflare.privacy.noise import NoiseSource, SecureNoise, SeededNoise, grid
from histoflare.privacy.secure_sum.hello import MOST_SITES
from histoflare.privacy.secure_sum.ring import has_room
from histoflare.privacy.spend import Spend
from histoflare.seeds import derive_seed

if TYPE_CHECKING:
    from histoflare.privacy.budget import Budget

RECORDS = ("patient", "slide")
LOCATIONS = ("client", "server")
NOISES = ("local", "shared")
MOST_HONEST = 10_000
MOST_RECORDS = 2**20
"""Of a site, for which a step's sum is bounded (``privacy.gradients``)."""

LIKELY_DEVIATIONS = 6
"""A sample is larger than its mean and so many standard deviations with a chance of some 1e-9."""

SMALLEST_CLIP, LARGEST_CLIP, LARGEST_NOISE = 1e-6, 1e6, 1e6
"""Of a job's settings: nobody needs others, and far beyond them numbers of 32 bits do not add up."""


class Training(Protocol):
    """A site's training in one round, in the ways that a plan can choose from (``rounds.strategy``)."""

    def plainly(self) -> Any:
        """Train as the task has it, and return what came out.

        Raises:
            HistoflareError, OSError: Training failed.
        """

    def by_record(self, plan: Any) -> Any:
        """Train under DP-SGD with the numbers of ``plan``, and return what came out."""

    def not_at_all(self, why: Exception) -> Any:
        """Return the model as it was, with the reason for the site's own log."""

    def tells_of_data(self, error: Exception) -> bool:
        """Return whether an error of :meth:`plainly` depends on the site's data."""


class PrivacyPlan(ABC):
    """The step between local training and release. Subclasses are frozen dataclasses of plain numbers.

    Attributes:
        mechanism: As in a site's policy.
        protects: Whether anything protects the updates: what leaves then costs of a budget, and is counted.
        own_steps: Optimizer steps of a round that the plan prescribes; None: the task's own.
        delta: δ at which the plan's ε is stated; None where nothing is counted.
        noise_seed: None draws the noise from a cryptographic source. A number makes it repeatable, for
            research: whoever knows the seed can take the noise off, so there is no guarantee at all.
    """

    mechanism: ClassVar[str]
    protects: ClassVar[bool] = True
    noise_seed: int | None = None
    delta: float | None = None

    @property
    def own_steps(self) -> int | None:
        """See the class."""
        return None

    @abstractmethod
    def settled(self, rounds: int, weights: int) -> Self:
        """Return the plan with its noise fixed for a job of ``rounds`` rounds, at participation in each.

        Args:
            weights: How many numbers leave a site in a round (``rounds.round.count_sent_by_job``):
                public, like the job's model. Each is noised, and a part of δ goes to the sampler.

        Raises:
            JobError: No noise reaches the share that the job asks for, or the sampler takes more than a tenth
                of δ (PRIVACY_INVALID).
        """

    @abstractmethod
    def numbers(self, rounds: int, weights: int) -> int:
        """Return how many random numbers a job's mechanism draws at a site, at most: for the sampler's δ."""

    @abstractmethod
    def spend(self) -> Spend:
        """Return what one round of a settled plan does with each patient."""

    @abstractmethod
    def without_noise(self, seed: int) -> Self:
        """Return the same with noise 0, to train what stands beside a protected model; ε = ∞.

        Args:
            seed: Of samples, which have nothing to hide then.
        """

    def train(self, training: Training) -> Any:
        """Train in the way that this plan needs, and return what came out.

        An error that depends on the site's data would leave without noise: then nothing was trained, and the
        update is one of zeros.

        Raises:
            HistoflareError: Training failed, and that tells nothing of the data.
        """
        try:
            return training.plainly()
        except (HistoflareError, OSError) as error:
            if not training.tells_of_data(error):
                raise
            return training.not_at_all(error)

    def gradient(self, training: Training) -> Any:
        """Make the gradient of one step in the way that this plan needs, and return what came out.

        Args:
            training: The ways in which a gradient can be made.

        Raises:
            HistoflareError: As for :meth:`train`.
        """
        return self.train(training)

    def release(self, tensors: Mapping[str, Tensor], noise: NoiseSource) -> dict[str, Tensor]:
        """Return what leaves in place of ``tensors``: the same names, shapes and dtypes."""
        return dict(tensors)

    @property
    def sum_step(self) -> float | None:
        """Return the grid of which every number that a site sends is a multiple; None: of none.

        Known where the noise is shared and settled; a secure sum writes its fixed point in these steps.
        """
        return None

    def at_server(self, updates: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return the round's updates as the server may use them; its own part of the mechanism, if any."""
        return [dict(update) for update in updates]

    def of_sum(self, total: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
        """Return the one update that a strategy gets where the server sees only a sum.

        Args:
            total: Σ weight · update of all sites, float64.
            weight: The sum of their weights, above 0.
        """
        return {name: tensor / weight for name, tensor in total.items()}

    def noise_source(self, *parts: str | int) -> NoiseSource:
        """Return where this plan's noise comes from; ``parts`` (site, round) tell seeded sources apart."""
        if self.noise_seed is None:
            return SecureNoise()
        return SeededNoise(derive_seed(self.noise_seed, "noise", *parts))

    def budget(self) -> Budget | None:
        """Return the budget in which a job is counted; None where nothing is."""
        return None

    def for_steps(self, steps: int) -> Self:
        """Return the plan for a round of so many steps; the same where it prescribes none."""
        return self

    def most_drawn(self, records: int) -> int:
        """Return the most of a site's records that one step is likely to train on."""
        return records

    def for_one_full_step(self) -> Self:
        """Return the plan for a single step on all records, by which the time of a step is measured."""
        return self

    def alone(self) -> Self:
        """Return what protects the same training at a site that shares its noise with nobody."""
        return self

    def pooled(self, asked: Self, *, sites: int, steps: int, weights: int) -> Self:
        """Return what protects the same training on the data of all sites in one place, settled.

        Args:
            asked: This plan as the job states it, before it was settled.
            sites: How many sites' data there are. steps: Of all rounds. weights: As for :meth:`settled`.

        Raises:
            JobError: It cannot be protected so: as for :meth:`settled`, or δ is too large for that many.
        """
        return self

    def admits(self, strategy: Any, task: Any, transport: Any) -> None:
        """Raise :class:`JobError` unless the guarantee holds with these parts: here, and only here, a plan
        refuses.

        It is decided by what the parts declare (``rounds.strategy.Strategy``, ``rounds.topology.Topology``,
        ``rounds.transport.Transport``); one that does not declare it is refused (PRIVACY_INVALID).

        Args:
            strategy: How the sites work together, and with it the topology in which they do.
            task: What is learned.
            transport: How an update travels.
        """
        for part, asked in (
            (
                strategy,
                {
                    "linear": bool,
                    "keeps": tuple,
                    "equal_weights": bool,
                    "sees_data": bool,
                    "numbers": Mapping,
                },
            ),
            (getattr(strategy, "topology", None), {"aggregates_at_server": bool}),
            (transport, {"readable": bool, "exact": bool}),
        ):
            for name, kind in asked.items():
                if not isinstance(getattr(part, name, None), kind):
                    raise JobError(
                        f"{getattr(part, 'name', part)} does not declare {name}; without it no privacy plan "
                        "can be checked. See histoflare.rounds.strategy, .topology and .transport.",
                        reason="PRIVACY_INVALID",
                    )

    @abstractmethod
    def describe(self) -> str:
        """Return one sentence for logs and reports."""

    def to_json(self) -> dict[str, Any]:
        """Return the plan's numbers, with its mechanism."""
        return {"mechanism": self.mechanism, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Open(PrivacyPlan):
    """No protection: what was trained is what leaves.

    Guarantee: none. ε = ∞ before, during and after; nothing is booked.

    >>> from histoflare import Open
    >>> Open().protects
    False
    """

    mechanism: ClassVar[str] = "open"
    protects: ClassVar[bool] = False

    def settled(self, rounds: int, weights: int) -> Self:
        """Return the plan itself."""
        return self

    def numbers(self, rounds: int, weights: int) -> int:
        """Return 0."""
        return 0

    def spend(self) -> Spend:
        """Return an event without noise: ε = ∞."""
        return Spend(noise_multiplier=0.0)

    def train(self, training: Training) -> Any:
        """Train as the task has it; every error is told."""
        return training.plainly()

    def without_noise(self, seed: int) -> Self:
        """Return the plan itself."""
        return self

    def describe(self) -> str:
        """Return one sentence for logs and reports."""
        return "Updates leave as they are: no clipping, no noise, nothing booked, ε = ∞."


@dataclass(frozen=True)
class Noisy(PrivacyPlan):
    """What the plans with noise have in common: how the job states it.

    Attributes:
        clip_norm: C, the L2 norm to which each contribution is clipped; above 0.
        delta: δ of the budget.
        budget_epsilon: ε at ``delta`` of the budget that a patient has for all jobs together, in which this
            one is counted (``privacy.budget``): what the sites' policies grant.
        budget_share: Which part of that budget's allowance the whole job takes, in (0, 1]; each site then
            takes the least noise with which it does. Shares of jobs add up; their ε do not. Or
        noise_multiplier: z; the noise has standard deviation z·C.
        published_epsilon: What the source of these settings claims, to be shown beside the true figure.
        noise_seed: See :class:`PrivacyPlan`.
        noise: ``"local"``: a site adds all of its noise itself. ``"shared"``: each site adds a share of it,
            and a secure sum shows nobody more than the sum of all. ``budget_share``, ``budget_epsilon`` and
            ``noise_multiplier`` are then about whoever does not know the shares of ``honest`` sites.
        honest: h, at least 2, only with ``"shared"``: on how many sites' shares the job counts. Each site
            adds noise of z·C/√h.
        most_terms: Of how many contributions a site's part of a sum is, at most, each clipped.
    """

    most_terms: ClassVar[int] = 1
    clip_norm: float = 1.0
    delta: float = 1e-5
    budget_epsilon: float = 8.0
    budget_share: float | None = None
    noise_multiplier: float | None = None
    published_epsilon: float | None = None
    noise_seed: int | None = None
    noise: str = "local"
    honest: int | None = None

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise JobError(
                f"The privacy settings of this job cannot be used; correct:{list_lines(problems)}",
                reason="PRIVACY_INVALID",
            )
        if self.is_shared:
            # The class says what a policy must allow; here it depends on who adds the noise.
            object.__setattr__(self, "mechanism", f"{type(self).mechanism}-shared")

    @property
    def is_shared(self) -> bool:
        """Whether the sites share the noise."""
        return self.noise == "shared"

    @property
    def sites_noise(self) -> float:
        """Return what one site adds, in clip norms: z where noise is local, z/√h of shared noise."""
        return self._settled_noise() / math.sqrt(self.honest or 1)

    @property
    def sum_step(self) -> float | None:
        """See :class:`PrivacyPlan`: the grid of one site's share of the noise."""
        if not self.is_shared or not self.noise_multiplier:
            return None
        return grid(self.sites_noise * self.clip_norm)

    def _problems(self) -> list[str]:
        problems = []
        if not (is_above_zero(self.clip_norm) and SMALLEST_CLIP <= self.clip_norm <= LARGEST_CLIP):
            problems.append(
                f"privacy.clip_norm: from {SMALLEST_CLIP:g} to {LARGEST_CLIP:g}, not {self.clip_norm!r}"
            )
        if not is_above_zero(self.delta, MOST_DELTA):
            problems.append(f"privacy.delta: a number above 0 and at most {MOST_DELTA}, not {self.delta!r}")
        if (self.noise_multiplier is None) == (self.budget_share is None):
            problems.append("privacy: give budget_share or noise_multiplier, one of them")
        if self.noise_multiplier is not None and not (
            self.noise_multiplier == 0 or is_above_zero(self.noise_multiplier, LARGEST_NOISE)
        ):
            problems.append(
                f"privacy.noise_multiplier: at least 0, at most {LARGEST_NOISE:g}, not "
                f"{self.noise_multiplier!r}"
            )
        if not is_above_zero(self.budget_epsilon):
            problems.append(f"privacy.budget_epsilon: a number above 0, not {self.budget_epsilon!r}")
        if self.budget_share is not None and not is_above_zero(self.budget_share, 1):
            problems.append(f"privacy.budget_share: above 0 and at most 1, not {self.budget_share!r}")
        if self.published_epsilon is not None and not is_above_zero(self.published_epsilon):
            problems.append(f"privacy.published_epsilon: a number above 0, not {self.published_epsilon!r}")
        if self.noise_seed is not None and type(self.noise_seed) is not int:
            problems.append(f"privacy.noise_seed: a whole number or null, not {self.noise_seed!r}")
        if self.noise not in NOISES:
            problems.append(f"privacy.noise: one of {', '.join(NOISES)}, not {self.noise!r}")
        elif self.is_shared != is_whole(self.honest, 2, MOST_HONEST):
            problems.append(
                "privacy.honest: with noise = shared the number of sites on whose noise the job counts, from "
                f"2 to {MOST_HONEST}, else null; not {self.honest!r}"
            )
        return problems

    def numbers(self, rounds: int, weights: int) -> int:
        """Return one for each weight in each step; where records are drawn, one for each of them too.

        Shared noise is the sum of the shares of ``honest`` sites, each of them drawn.
        """
        like = replace(self, noise_multiplier=1.0, budget_share=None).spend()
        drawn = weights * (self.honest or 1) + (MOST_RECORDS if like.sample_rate < 1 else 0)
        return drawn * like.steps * rounds

    def admits(self, strategy: Any, task: Any, transport: Any) -> None:
        """No number of a site's data may leave beside the update; and of data in bags, the largest that is
        trained on must be public, for time tells of a longer one. Shared noise needs a sum that alone is
        seen, in which all weigh the same."""
        super().admits(strategy, task, transport)
        if self.is_shared and transport.readable:
            raise JobError(
                "Shared noise protects a sum, and no update by itself: a job with noise = shared needs a "
                f"transport that shows the server only the sum (masked_sum), not {transport.name}.",
                reason="PRIVACY_INVALID",
            )
        if self.is_shared and not (
            strategy.linear and strategy.equal_weights and strategy.topology.aggregates_at_server
        ):
            raise JobError(
                "Shared noise is the noise of one sum: it takes a strategy that uses the updates in no other "
                "way (linear), with equal weights, and whose sum the server makes.",
                reason="PRIVACY_INVALID",
            )
        telling = [name for name, of_data in strategy.numbers.items() if of_data is not False]
        if telling:
            raise JobError(
                f"The strategy {strategy.name} sends {', '.join(telling)} beside the update, which follows "
                "from the site's data and has no noise: choose another strategy.",
                reason="PRIVACY_INVALID",
            )
        self.check_room()
        if getattr(task, "max_patches", 0) is None:
            raise JobError(
                "A protected job says in protocol.toml how long a bag it trains on: max_patches.",
                reason="PRIVACY_INVALID",
            )

    def check_room(self) -> None:
        """Raise :class:`JobError` (PRIVACY_INVALID) if a sum has no room on the grid of a share of noise."""
        if self.sum_step is not None and not has_room(
            self.sum_step,
            self.clip_norm,
            self.sites_noise * self.clip_norm,
            sites=MOST_SITES,
            records=self.most_terms,
        ):
            raise JobError(
                f"A site's share of the noise ({self.sites_noise:g} clip norms) is so small that a sum has "
                "no room on its grid: use more noise.",
                reason="PRIVACY_INVALID",
            )

    def settled(self, rounds: int, weights: int) -> Self:
        """Return the plan with ``noise_multiplier`` in place of ``budget_share``."""
        if self.budget_share is None:
            return self

        like = replace(self, noise_multiplier=1.0, budget_share=None).spend()
        budget = self.budget().without_sampler(self.numbers(rounds, weights))
        least = budget.calibrate(like.sample_rate, like.steps * rounds, self.budget_share)
        # A spend's noise is in units of the sensitivity; the plan's in units of clip_norm.
        multiplier = least / like.noise_multiplier
        if self.is_shared:
            # Sites whose processors differ in a logarithm's last digit must come to the same number: their
            # pads cancel, and their grids are one, only if they do.
            multiplier = math.ceil(multiplier * 2**20) / 2**20
        return replace(self, noise_multiplier=multiplier, budget_share=None)

    def budget(self) -> Budget:
        """Return the budget in which the job is counted.

        Raises:
            JobError: It allows nothing at all (PRIVACY_INVALID).
        """
        from histoflare.privacy.budget import Budget  # scipy's optimizers take their time

        return Budget(self.budget_epsilon, self.delta)

    def alone(self) -> Self:
        """Return the plan with all of the noise added by one site."""
        return replace(self, noise="local", honest=None)

    def without_noise(self, seed: int) -> Self:
        """Return the plan with its clip and its steps, and with noise 0."""
        return replace(
            self,
            noise_multiplier=0.0,
            budget_share=None,
            published_epsilon=None,
            noise_seed=seed,
            noise="local",
            honest=None,
        )

    def _settled_noise(self) -> float:
        if self.noise_multiplier is None:
            raise JobError("The job's noise is not settled yet.", reason="PRIVACY_INVALID")
        return self.noise_multiplier


@dataclass(frozen=True)
class DpSgd(Noisy):
    """Differentially private SGD in the trainer (Abadi et al. 2016; Adnan et al. 2022).

    Each step draws every record with probability ``sample_rate``, clips the gradient of each drawn one to
    ``clip_norm`` and adds N(0, (noise_multiplier·clip_norm)²) to their sum, which is divided by
    ``batch_size``. All of these are public: none follows from how many patients a site has.

    Guarantee: for the unit *patient* (all slides), add or remove one. With ``record = "slide"`` the clipped
    record is a slide; a patient with up to k = ``slides_per_patient`` of them moves the sum by up to k·C in a
    step in which any is drawn, so that a step is a Gaussian mechanism with noise z/k on a sample of rate
    1 - (1 - q)^k (an upper bound: the patient's contribution never exceeds that of all k at once). Further
    slides of a patient are not used.

    With ``noise = "shared"`` a round is one step: each site sends the sum of its clipped gradients with its
    share of the noise, and the server divides the sum of all by ``batch_size``. All samples together are
    then one sample of the records of all sites.

    Attributes:
        sample_rate: q, in (0, 1].
        batch_size: The divisor: the agreed expected number of records in a sample.
        steps: Of each round; 1 where noise is shared.
        record: ``"patient"`` or ``"slide"``: what is sampled and clipped.
        slides_per_patient: k; only with ``record = "slide"``.

    >>> from histoflare import DpSgd
    >>> asked = DpSgd(budget_epsilon=8.0, budget_share=0.25, sample_rate=0.1, batch_size=8, steps=2)
    >>> plan = asked.settled(rounds=20, weights=1000)
    >>> plan.budget().spent([plan.spend().times(20)]) <= 8
    True
    """

    mechanism: ClassVar[str] = "dp-sgd"
    most_terms: ClassVar[int] = MOST_RECORDS
    sample_rate: float = 0.1
    batch_size: float = 8
    steps: int = 1
    record: str = "patient"
    slides_per_patient: int | None = None

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if not is_above_zero(self.sample_rate, 1):
            problems.append(f"privacy.sample_rate: a number above 0 and at most 1, not {self.sample_rate!r}")
        if not is_above_zero(self.batch_size):
            problems.append(f"privacy.batch_size: a number above 0, not {self.batch_size!r}")
        if type(self.steps) is not int or self.steps < 1:
            problems.append(f"privacy.steps: a whole number of at least 1, not {self.steps!r}")
        elif self.is_shared and self.steps != 1:
            problems.append(f"privacy.steps: 1 with noise = shared, which is in one sum, not {self.steps!r}")
        if self.record not in RECORDS:
            problems.append(f"privacy.record: one of {', '.join(RECORDS)}, not {self.record!r}")
        elif not problems and self.record == "patient" and self.delta * self.batch_size > self.sample_rate:
            problems.append(
                f"privacy.delta: at most 1 ÷ the agreed cohort size (batch_size ÷ sample_rate = "
                f"{self.batch_size / self.sample_rate:g}), and better far below it, not {self.delta!r}"
            )
        k = self.slides_per_patient
        if (self.record == "slide") != is_whole(k, 1):
            problems.append(
                "privacy.slides_per_patient: a whole number of at least 1 with record = slide, else null"
            )
        return problems

    def train(self, training: Training) -> Any:
        """Train with the gradient of each record by itself, clipped and noised.

        Raises:
            JobError: Noise is shared: a share protects no step at a site (PRIVACY_INVALID).
        """
        if self.is_shared:
            raise JobError(
                "A site's share of the noise protects no training at the site: use a strategy that sends "
                "a gradient (fedsgd).",
                reason="PRIVACY_INVALID",
            )
        return training.by_record(self)

    def gradient(self, training: Training) -> Any:
        """Make the gradient of one sample, each record's clipped, with noise."""
        return training.by_record(self)

    def of_sum(self, total: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
        """Return a sum of clipped gradients divided by ``batch_size``, which no site's data decide."""
        if not self.is_shared:
            return super().of_sum(total, weight)
        return {name: tensor / self.batch_size for name, tensor in total.items()}

    @property
    def own_steps(self) -> int:
        """The steps of a round."""
        return self.steps

    def for_steps(self, steps: int) -> Self:
        """Return the plan with so many steps a round."""
        return replace(self, steps=steps)

    def most_drawn(self, records: int) -> int:
        """Return what a step exceeds with a chance of some 1e-9: the mean and six standard deviations."""
        mean = records * self.sample_rate
        spread = math.sqrt(mean * (1 - self.sample_rate))
        return min(records, math.ceil(mean + LIKELY_DEVIATIONS * spread))

    def for_one_full_step(self) -> Self:
        """Return the plan with one step a round, in which every record is drawn."""
        return replace(self, sample_rate=1.0, steps=1)

    def pooled(self, asked: Self, *, sites: int, steps: int, weights: int) -> Self:
        """Return the same clip and divisor with samples as large as a site's are on average.

        Of shared noise the sample is one of all sites' records already, and the pool adds the noise z itself.
        """
        whole = asked
        if self.is_shared:
            whole, sites = replace(asked, noise="local", honest=None), 1
        return replace(whole, sample_rate=self.sample_rate / sites, steps=steps).settled(1, weights)

    def admits(self, strategy: Any, task: Any, transport: Any) -> None:
        """Each record must have a loss of its own (``rounds.task.PerRecord``), and every step see the data
        through its own noise alone and start from what was released."""
        if not hasattr(task, "record_losses"):
            raise JobError(
                "This task has no loss of one patient alone, which DP-SGD needs: protect the update as a "
                "whole (update-noise).",
                reason="MODEL_NOT_PRIVATE",
            )
        if getattr(task, "sample_mixing", True):
            raise JobError(
                f"What the model {task.model_name} says of a sample may depend on others of the batch "
                "(sample_mixing); DP-SGD needs one that declares that it does not: for a segmentation, say "
                "norm = group.",
                reason="MODEL_NOT_PRIVATE",
            )
        super().admits(strategy, task, transport)
        if strategy.sees_data:
            raise JobError(
                f"The strategy {strategy.name} looks at training data beside the loss, and DP-SGD protects "
                "the loss of each record alone: choose another strategy.",
                reason="PRIVACY_INVALID",
            )
        if strategy.keeps:
            raise JobError(
                f"Under DP-SGD a site keeps nothing of its own, but this strategy keeps "
                f"{' and '.join(strategy.keeps)}: share must be null, and batch_norm shared. What it kept "
                "could be of steps that nobody booked.",
                reason="PRIVACY_INVALID",
            )
        one_step = getattr(strategy, "one_step", False)
        if self.is_shared and not one_step:
            raise JobError(
                "A site's share of the noise protects no training at the site: use a strategy whose sites "
                f"send the gradient of one step (fedsgd), not {strategy.name}.",
                reason="PRIVACY_INVALID",
            )
        if one_step and self.steps != 1:
            raise JobError(
                f"With the strategy {strategy.name} a round is one step: set privacy.steps to 1, not "
                f"{self.steps}.",
                reason="PRIVACY_INVALID",
            )

    def spend(self) -> Spend:
        """Return one round's steps."""
        step = Spend(self._settled_noise(), self.sample_rate, self.steps, self.honest or 1)
        return step.together(self.slides_per_patient or 1)

    def describe(self) -> str:
        """Return one sentence for logs and reports."""
        noise = _stated(self)
        clipped = (
            "patient" if self.record == "patient" else f"slide, up to {self.slides_per_patient} a patient"
        )
        return (
            f"DP-SGD: the gradient of each {clipped}, clipped to {self.clip_norm:g}, {noise}, "
            f"sample rate {self.sample_rate:g}, {self.steps} step{'s' if self.steps > 1 else ''} a round."
        )


@dataclass(frozen=True)
class UpdateNoise(Noisy):
    """Clip and noise of the update as a whole (FedDP, Pan et al. 2024).

    The update (all floating-point tensors that leave, as one vector) is clipped to the L2 norm ``clip_norm``,
    and N(0, (noise_multiplier·clip_norm)²) is added.

    Guarantee: for the unit *patient*, add or remove one: whatever training does, one patient more or less can
    move a clipped update from anywhere in its ball to anywhere else, so the sensitivity is **2C** and a round
    is a Gaussian mechanism with noise z/2. (C is the sensitivity for a whole *site* coming or going.)

    Attributes:
        noise_location: ``"client"``: each site adds its own. ``"server"``: sites clip, and the server adds
            noise once to the sum (eq. 11): against the server itself ε is ∞, and the sites must trust it.

    >>> from histoflare import UpdateNoise
    >>> plan = UpdateNoise(noise_multiplier=10.0)
    >>> plan.spend().noise_multiplier  # one patient can move an update by twice the clip
    5.0
    """

    mechanism: ClassVar[str] = "update-noise"
    noise_location: str = "client"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_location == "server":
            # The class says what a policy must allow; here it depends on the place.
            object.__setattr__(self, "mechanism", "server-noise")

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.noise_location not in LOCATIONS:
            problems.append(
                f"privacy.noise_location: one of {', '.join(LOCATIONS)}, not {self.noise_location!r}"
            )
        elif self.is_shared and self.noise_location != "client":
            problems.append("privacy.noise_location: client with noise = shared, which the sites add")
        return problems

    def spend(self) -> Spend:
        """Return one round's mechanism, as it protects against those who see the noised values only."""
        return Spend(self._settled_noise() / 2, honest=self.honest or 1)

    def release(self, tensors: Mapping[str, Tensor], noise: NoiseSource) -> dict[str, Tensor]:
        """Return the clipped update, with noise if that is added here.

        An update that is not finite counts as one of zeros. With shared noise the numbers are float64, each a
        multiple of :attr:`sum_step`, so that a sum of them is exact.
        """
        from histoflare.privacy.mechanism import clip, release_update

        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            # To refuse would tell of the data, and no noise would hide it. An update of zeros is one of those
            # that the guarantee is about.
            tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        if self.noise_location == "server":
            return clip(tensors, self.clip_norm)[0]
        if self.is_shared:
            tensors = {name: tensor.double() for name, tensor in tensors.items()}
        return release_update(
            tensors, clip_norm=self.clip_norm, noise_multiplier=self.sites_noise, noise=noise
        )

    def at_server(self, updates: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return the updates, with noise in the first of them if the server adds it: once to their sum."""
        from histoflare.privacy.mechanism import noise_at_server

        given = super().at_server(updates)
        if self.noise_location == "server" and given:
            given[0] = noise_at_server(  # in one of the terms, and so once in their sum
                given[0],
                clip_norm=self.clip_norm,
                noise_multiplier=self._settled_noise(),
                noise=self.noise_source("server"),
            )
        return given

    def admits(self, strategy: Any, task: Any, transport: Any) -> None:
        """Noise in a sum is noise in each update only if the sum is all that is used, with equal weights."""
        super().admits(strategy, task, transport)
        if self.noise_location != "server":
            return
        if not strategy.topology.aggregates_at_server:
            raise JobError(
                "Noise at the server needs a server that aggregates; in the topology "
                f"{strategy.topology.name} a site does, which would see every update without noise.",
                reason="PRIVACY_INVALID",
            )
        if not (strategy.linear and strategy.equal_weights):
            raise JobError(
                "Noise at the server is added once to the sum of the updates: it takes a strategy that uses "
                "them in no other way (linear), with equal weights (fedavg with weighting = uniform).",
                reason="PRIVACY_INVALID",
            )
        if not transport.exact:
            raise JobError(
                f"The transport {transport.name} rounds what it carries, which has to follow the noise, and "
                "here the server adds that: use transport float32.",
                reason="PRIVACY_INVALID",
            )

    def describe(self) -> str:
        """Return one sentence for logs and reports."""
        where = (
            "at the site"
            if self.noise_location == "client"
            else "at the server (which sees all: ε = ∞ there)"
        )
        return f"Update noise: the whole update, clipped to {self.clip_norm:g}, {_stated(self)}, {where}."


def _stated(plan: Noisy) -> str:
    if plan.noise_multiplier is None:
        return (
            f"noise with which the job takes {plan.budget_share:.4g} of a budget of ε = "
            f"{plan.budget_epsilon:g} at δ = {plan.delta:g}"
        )
    stated = f"noise multiplier {plan.noise_multiplier:.4g}"
    if plan.is_shared:
        stated += f" (each site adds {plan.sites_noise:.4g}, counting on {plan.honest} honest sites)"
    return stated

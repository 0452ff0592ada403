"""The bounds beside a federation: each site on its own (lower), all data in one place (upper).

A bound is a federation of one site: it trains with the same code, from the same initial model, with a fresh
optimizer each round, and what protects the federation's updates protects its own. So what differs is the
federation and nothing else. A *local* bound has a site's own data, *pooled* has the data of all sites.

What "the same" means, for n sites of which m train in a round:

- *Rounds.* A site's local model trains in the rounds in which the topology asks the site, pooled in all.
- *Steps.* A local model takes its site's own, the pool as many as the m sites together.
- *One step.* Where sites send gradients (``Strategy.one_step``) a round is one step of the server's. So it is
  one of each bound too, with the strategy's own rate and momentum.
- *Batch.* The task's ``batch_size``, everywhere.
- *DP-SGD.* A local model has the job's own numbers. The pool has the same clip, divisor and record, and the
  sample rate q/n: a sample of the pool is expected to be as large as that of a site is on average, and the
  number does not follow from how many patients there are.
- *Noise on updates.* The job's own numbers: one update a round, clipped and noised.
- *Shared noise.* A bound shares it with nobody: it adds all of it, z.

Steps. With ``local_steps`` = k the sum is m·k. With ``local_epochs`` it is what the sites' passes take
together; where every site's last batch is full, that is a pass over the pool. The pool is passed over, each
time in another order, until the steps are taken.

Noise of DP-SGD. A job that states ``noise_multiplier`` has the same one in the pool; the pool's ε is then
another, as it is in Adnan et al. 2022 (Sci Rep 12:1953): their combined model (Table 4) has q = 32/705 where
a hospital has 32/165, the steps of all hospitals together, noise 4.0, and so ε = 2.90. A job that states
``budget_share`` has the noise in the pool that takes the same share there.

Pooled need not be above federated under noise. A federation averages the noise of its sites, and the pool
takes all steps one after the other, at the same learning rate. With noise on updates a federation averages n
of them where the pool has one: at the same ε for a patient its noise is √n times as large.

*Unprotected* bounds beside a protected run are the same with noise 0: same steps, samples, clip and learning
rate (``PrivacyPlan.without_noise``). The learning rate of such a job was chosen for clipped gradients, and
without the clip the same rate may well diverge; that would say nothing of what noise costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from histoflare.errors import HistoflareError
from histoflare.privacy.plan import Open, PrivacyPlan
from histoflare.privacy.spend import Spend
from histoflare.rounds.round import count_sent_by_job, server_round, site_round
from histoflare.rounds.state import State, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategies.fedsgd import FedSgd
from histoflare.rounds.strategy import Strategy
from histoflare.rounds.task import Task

POOLED = "pooled"


@dataclass(frozen=True)
class Course:
    """How a bound trains.

    Attributes:
        steps: Optimizer steps of each round; 0: it does not train in this one.
        plan: What protects its updates, settled. Of DP-SGD, ``plan.steps`` is replaced by ``steps``.
    """

    steps: tuple[int, ...]
    plan: PrivacyPlan

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all rounds."""
        return sum(self.steps)

    @property
    def spends(self) -> list[Spend]:
        """What each of its rounds spends of a patient's budget."""
        return [self.plan_of(index).spend() for index, steps in enumerate(self.steps) if steps]

    def plan_of(self, index: int) -> PrivacyPlan:
        """Return what protects round ``index``."""
        return self.plan.for_steps(self.steps[index])


@dataclass(frozen=True)
class Courses:
    """How all bounds train: each site alone, and the pool of all data.

    A site without training data has none.

    Attributes:
        pooled: None where the pool cannot be protected as the job's sites are.
        no_pool: Why not.
    """

    local: dict[str, Course]
    pooled: Course | None
    no_pool: HistoflareError | None = None

    def until(self, rounds: int) -> Courses:
        """Return the same, ended after so many rounds: the schedule is still that of all."""

        def ended(course: Course) -> Course:
            return replace(course, steps=course.steps[:rounds] + (0,) * len(course.steps[rounds:]))

        local = {site: ended(course) for site, course in self.local.items()}
        return replace(self, local=local, pooled=None if self.pooled is None else ended(self.pooled))


@dataclass(frozen=True)
class Bounds:
    """The models of the bounds: each site's own, and the pooled one (None if it was not trained).

    Attributes:
        failed: Site, or :data:`POOLED` → why its training failed.
    """

    local: dict[str, State]
    pooled: State | None
    failed: dict[str, HistoflareError] = field(default_factory=dict)


def plan_bounds(
    task: Task,
    sites: Mapping[str, Any],
    strategy: Strategy,
    rounds: int,
    seed: int,
    plan: PrivacyPlan | None = None,
    asked: PrivacyPlan | None = None,
) -> Courses:
    """Return how the bounds of a job train, see the module's text.

    Args:
        sites: Site → its data, all sites of the job.
        strategy: The job's; its topology says who trains in which round.
        plan: The job's, settled; None: nothing protects. asked: The same as the job states it, if not so.

    Without a course for the pool where its DP-SGD cannot be: its δ is too large for so many patients, or no
    noise reaches the ε that the job asks for.
    """
    plan = plan or Open()
    asks = [strategy.topology.plan(index, list(sites), seed).trainers for index in range(rounds)]
    own = {
        site: task.n_steps(data) if plan.own_steps is None else plan.own_steps
        for site, data in sites.items()
        if task.n_train(data)
    }
    if strategy.one_step:
        own = dict.fromkeys(own, 1)
    together = tuple(sum(own.get(site, 0) for site in asked_now) for asked_now in asks)
    if strategy.one_step:
        together = tuple(min(1, steps) for steps in together)
    pooled, no_pool = plan, None
    try:
        pooled = plan.pooled(
            asked or plan,
            sites=max(1, len(own)),
            steps=max(1, sum(together)),
            weights=count_sent_by_job(_alone(strategy), task) if plan.protects else 0,
        ).alone()
    except HistoflareError as error:
        no_pool = error
    return Courses(
        local={
            site: Course(tuple(steps if site in asked_now else 0 for asked_now in asks), plan.alone())
            for site, steps in own.items()
        },
        pooled=Course(together, pooled) if no_pool is None else None,
        no_pool=no_pool,
    )


def without_noise(courses: Courses, seed: int) -> Courses:
    """Return the same without noise; samples follow ``seed``, for there is nothing to hide."""
    return replace(
        courses,
        local={site: _without_noise(course, seed) for site, course in courses.local.items()},
        pooled=None if courses.pooled is None else _without_noise(courses.pooled, seed),
    )


def train_bounds(
    task: Task,
    sites: Mapping[str, Any],
    pooled: Any,
    courses: Courses,
    strategy: Strategy,
    seed: int,
    *,
    device: str = "cpu",
    on_model: Callable[[], None] = lambda: None,
) -> Bounds:
    """Train every bound; one whose training fails is left out.

    Args:
        sites: Site → its data. pooled: The same as one.
        on_model: Called after each model, trained or failed.
    """
    failed: dict[str, HistoflareError] = {}

    def train(name: str, data: Any, course: Course) -> State | None:
        try:
            return train_alone(task, data, course, strategy, seed, name=name, device=device)
        except HistoflareError as error:
            failed[name] = error
            return None
        finally:
            on_model()

    local = {site: train(site, sites[site], course) for site, course in courses.local.items()}
    together = None if courses.pooled is None else train(POOLED, pooled, courses.pooled)
    return Bounds({site: state for site, state in local.items() if state is not None}, together, failed)


def train_alone(
    task: Task, data: Any, course: Course, strategy: Strategy, seed: int, *, name: str, device: str = "cpu"
) -> State:
    """Return the model that ``data`` alone give: a federation of one site, called ``name``."""
    alone = _alone(strategy).of_task(task)
    state = model_state(task.build_model())
    kept: State = {}
    own = alone.begin(state)
    for index, steps in enumerate(course.steps):
        if not steps:
            continue
        plan = course.plan_of(index)
        outcome = site_round(
            task,
            alone,
            state,
            data,
            site=name,
            site_state=kept,
            round_index=index,
            total_rounds=len(course.steps),
            seed=seed,
            plan=plan,
            device=device,
            steps=steps,
        )
        made = server_round(alone, state, [outcome.update], [name], plan, own=own)
        state, own = made.model, made.own
        kept = outcome.site_state
    return alone.personalize(state, kept)


def _alone(strategy: Strategy) -> FedAvg:
    """Return the strategy of one site that keeps for itself what the job's sites keep."""
    if isinstance(strategy, FedSgd):
        return replace(strategy, weighting="uniform", weights=None, clients_per_round=None)
    return FedAvg(weighting="uniform", share=strategy.share, batch_norm=strategy.batch_norm)


def _without_noise(course: Course, seed: int) -> Course:
    return replace(course, plan=course.plan.without_noise(seed))

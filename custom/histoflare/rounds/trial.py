"""A strategy tried out in this process: how well it serves every site after each round, and what that takes.

What a comparison of strategies asks, such as Darzidehkalani et al. 2022 (JACR 19:974), Table 1: how good, for
whom, how soon, and how much is sent.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from histoflare.errors import JobError
from histoflare.privacy.plan import PrivacyPlan
from histoflare.rounds.evaluation import figure_of
from histoflare.rounds.local import predict
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State
from histoflare.rounds.strategy import Strategy
from histoflare.rounds.task import Task
from histoflare.rounds.transport import Transport
from histoflare.rounds.transports.float32 import PLAIN

Served = Mapping[str, float]
"""Site → a figure of its own test patients, with the model that it would use."""


@dataclass(frozen=True)
class Trial:
    """What came of a strategy.

    Attributes:
        rounds: For each round, how the sites are served by the model that it ended with. A site without test
            patients, or of one class only, has no figure and is left out.
        external: The same figure of the external cohort after the last round; None: there is none.
        seconds: Of each round: training and combining, without the tests.
        bytes_up, bytes_down: What all sites together send, and are sent, in a round on average; tensors only.
    """

    rounds: tuple[Served, ...]
    external: float | None
    seconds: tuple[float, ...]
    bytes_up: float
    bytes_down: float

    @property
    def last(self) -> Served:
        """How the sites are served in the end."""
        return self.rounds[-1]

    def reached(self, figure: float, *, lower_is_better: bool = False) -> int | None:
        """Return after how many rounds the mean over the sites was first as good as ``figure``; None: never.

        Later rounds may be worse again.
        """
        for number, served in enumerate(self.rounds, start=1):
            mean = statistics.fmean(served.values())
            if mean <= figure if lower_is_better else mean >= figure:
                return number
        return None

    def seconds_until(self, rounds: int) -> float:
        """Return how long the first so many rounds took, all sites one after the other."""
        return sum(self.seconds[:rounds])


def try_strategy(
    task: Task,
    sites: Mapping[str, Any],
    strategy: Strategy,
    rounds: int,
    seed: int,
    figure: str,
    *,
    plan: PrivacyPlan | None = None,
    transport: Transport = PLAIN,
    external: Any = None,
    device: str = "cpu",
    on_round: Callable[[], None] = lambda: None,
) -> Trial:
    """Train with ``strategy`` and test the model of every round at every site.

    Nothing is chosen by the tests: they say what happened.

    Args:
        sites: Site → its data.
        rounds, seed: As for :func:`run_in_process`.
        figure: The figure of the task's that is asked for, such as ``"balanced_accuracy"``.
        plan, transport, device: As for :func:`run_in_process`.
        external: The external cohort's data; every split of it is asked.
        on_round: Called after each round.

    Raises:
        JobError: No site has the figure, or there is no such figure.
        HistoflareError: As of :func:`run_in_process`.
    """
    served: list[Served] = []

    def test(index: int, model: State, kept: Mapping[str, State]) -> None:
        found = {}
        for site, data in sites.items():
            own = strategy.personalize(model, kept[site])
            found[site] = figure_of(predict(task, own, data, "test", device), figure)
        served.append({site: value for site, value in found.items() if value is not None})
        on_round()

    strategy = strategy.of_task(task)
    run = run_in_process(
        task,
        sites,
        strategy,
        rounds,
        seed,
        plan,
        on_model=test,
        transport=transport,
        device=device,
    )
    if not served or not served[-1]:
        raise JobError(
            f"No site has the figure {figure}: it takes test patients, of every class.",
            reason="NOTHING_TO_EVALUATE",
        )
    shared = strategy.personalize(run.handed_out, {})
    return Trial(
        tuple(served),
        None if external is None else figure_of(predict(task, shared, external, "all", device), figure),
        run.seconds,
        run.bytes_up / rounds,
        run.bytes_down / rounds,
    )

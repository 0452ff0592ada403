"""What every topology must do; a new one is covered by being registered.

Those of ``throwaway`` are covered too: in them a site aggregates, as in no registered one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from histoflare.rounds.runner import RunResult, run_in_process
from histoflare.rounds.state import hash_state, n_bytes
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategies.fedavgm import FedAvgM
from histoflare.rounds.strategy import Strategy, join
from histoflare.rounds.topologies import TOPOLOGIES, make_topology
from histoflare.rounds.topologies.cyclic import Cyclic
from histoflare.rounds.topology import SERVER, RoundPlan, Topology
from tests.refusals import raises_reason

from .throwaway import THROWAWAY_TOPOLOGIES, Passing, Rotating
from .toy import ToyTask, toy_sites

SITES = ["a", "b", "c", "d"]
TASK, DATA = ToyTask(hidden=4, batch_norm=True), toy_sites(3)


def make(name: str, **fields: Any) -> Topology:
    """Return a registered or a throw-away topology."""
    if name in THROWAWAY_TOPOLOGIES:
        return THROWAWAY_TOPOLOGIES[name](**fields)
    return make_topology(name, **fields)


@pytest.fixture(params=sorted({*TOPOLOGIES, *THROWAWAY_TOPOLOGIES}))
def topology(request: pytest.FixtureRequest) -> Topology:
    return make(request.param)


def test_it_is_named_as_registered_and_its_fields_are_json(topology: Topology) -> None:
    assert make(topology.name, **json.loads(json.dumps(asdict(topology)))) == topology
    for name in ("aggregates_at_server", "skips_sites"):
        assert isinstance(vars(type(topology))[name], bool), f"{name}: of its own, not inherited"


def test_trainers_are_sites_in_site_order_and_everybody_has_a_turn(topology: Topology) -> None:
    seen: set[str] = set()
    for index in range(20):
        plan = topology.plan(index, SITES, 1)
        assert plan.trainers and list(plan.trainers) == [site for site in SITES if site in plan.trainers]
        assert plan == topology.plan(index, SITES, 1)
        seen |= set(plan.trainers)
    assert seen == set(SITES)


def test_the_aggregator_is_the_server_or_a_site_as_declared(topology: Topology) -> None:
    aggregators = {topology.plan(index, SITES, 1).aggregator for index in range(20)}
    assert (aggregators == {SERVER}) == topology.aggregates_at_server
    assert aggregators <= {SERVER, *SITES}


def test_whoever_works_on_the_model_receives_it_once(topology: Topology) -> None:
    for index in range(8):
        plan = topology.plan(index, SITES, 1)
        assert Counter(plan.receivers) == Counter({*plan.trainers, plan.aggregator} - {SERVER})


def test_one_site_alone_will_do(topology: Topology) -> None:
    for index in range(4):
        plan = topology.plan(index, ["only"], 1)
        assert plan.trainers == ("only",) and plan.aggregator in ("only", SERVER)


@pytest.mark.parametrize(
    "made", [make_topology("federated", clients_per_round=2), make_topology("cyclic", order="seeded")]
)
def test_another_process_gives_the_same_answer(made: Topology, repository: Path) -> None:
    """Hashes of text differ from process to process; no choice may follow from them."""
    program = (
        "from histoflare.rounds.topologies import make_topology\n"
        f"made = make_topology({made.name!r}, **{asdict(made)!r})\n"
        f"print([made.plan(index, {SITES!r}, 1).trainers for index in range(20)])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str([made.plan(index, SITES, 1).trainers for index in range(20)])


def test_unknown_words_are_refused() -> None:
    with raises_reason("JOB_INVALID", "'ring'", "cyclic, federated"):
        make_topology("ring")
    with raises_reason("JOB_INVALID", "federated", "order", "clients_per_round"):
        make_topology("federated", order="site")


def in_topology(strategy: Strategy, chosen: Topology) -> Strategy:
    """Return a strategy that works in another topology."""

    class Elsewhere(type(strategy)):  # type: ignore[misc]
        topology = chosen

    moved: Strategy = Elsewhere(**asdict(strategy))
    return moved


def run(strategy: Strategy, rounds: int = 4) -> RunResult:
    return run_in_process(TASK, DATA, strategy, rounds, 1)


@pytest.mark.parametrize("strategy", [FedAvg(), FedAvgM(weighting="uniform")], ids=lambda one: one.name)
def test_a_site_that_aggregates_makes_the_bytes_of_a_server(strategy: Strategy) -> None:
    star, swarm = run(strategy), run(in_topology(strategy, Rotating()))
    assert hash_state(swarm.state) == hash_state(star.state)
    assert hash_state(swarm.own) == hash_state(star.own)
    assert swarm.participation == star.participation


def test_what_a_site_hands_to_itself_is_not_sent() -> None:
    swarm = run(in_topology(FedAvg(), Rotating()))
    update = n_bytes(FedAvg().sent(swarm.state))
    model = n_bytes(swarm.state)
    # Of three sites two send to the one that aggregates. It sends its model to the two others, of whom the
    # next one to aggregate gets what the strategy keeps, nothing here, with it.
    assert swarm.bytes_up == 4 * 2 * update
    assert swarm.bytes_down == 4 * 2 * model
    momentum = run(in_topology(FedAvgM(weighting="uniform"), Rotating()))
    kept = n_bytes(join({}, momentum.own))
    assert momentum.bytes_down == 4 * 2 * model + 3 * kept, "the first aggregator begins it by itself"


def test_an_aggregator_need_not_train() -> None:
    passed, visited = run(in_topology(FedAvg(), Passing())), run(in_topology(FedAvg(), Cyclic()))
    assert hash_state(passed.state) == hash_state(visited.state)


def test_the_runner_asks_whom_the_topology_says() -> None:
    class Two(Rotating):
        def plan(self, round_index: int, sites: Any, seed: int) -> RoundPlan:
            return RoundPlan(tuple(sites[:2]), sites[2])

    assert run(in_topology(FedAvg(), Two())).participation == (("site_0", "site_1"),) * 4

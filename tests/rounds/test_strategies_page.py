"""docs/strategies.md names every strategy, and says of each what its declarations say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from histoflare.errors import JobError
from histoflare.privacy.plan import DpSgd, UpdateNoise
from histoflare.rounds.strategies import STRATEGIES
from histoflare.rounds.transport import check_readable
from histoflare.rounds.transports.float32 import PLAIN
from histoflare.rounds.transports.masked_sum import MaskedSum

from .test_strategy_contract import make
from .toy import RowTask

PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"


def rows() -> dict[str, list[str]]:
    """Return name → the cells of its row."""
    found = {}
    for line in PAGE.read_text().splitlines():
        if row := re.fullmatch(r"\| `(\w+)` \|(.*)\|", line):
            found[row[1]] = [cell.strip() for cell in row[2].split("|")]
    return found


def admitted(check: Callable[[], object]) -> str:
    try:
        check()
    except JobError:
        return "no"
    return "yes"


def test_every_strategy_has_a_row() -> None:
    assert set(rows()) == set(STRATEGIES)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_row_says_what_the_strategy_declares(name: str) -> None:
    strategy, (_, by_step, by_update, in_sum, why) = make(name), rows()[name]
    # As a fresh job has it: no layer is kept at the sites but by the strategy's own doing.
    dp_sgd = DpSgd(noise_multiplier=1.0, steps=1)
    assert by_step == admitted(lambda: dp_sgd.admits(strategy, RowTask(), PLAIN))
    assert by_update == admitted(lambda: UpdateNoise(noise_multiplier=1.0).admits(strategy, RowTask(), PLAIN))
    assert in_sum == admitted(lambda: check_readable(strategy, MaskedSum()))
    assert why or (by_step, by_update, in_sum) == ("yes", "yes", "yes")

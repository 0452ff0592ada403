"""What to expect under noise: the quotient by hand, and what follows from its form."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from histoflare.privacy.advice import MANY, PRESETS, SLOPE, advise, preset_for
from histoflare.privacy.budget import Budget
from histoflare.privacy.spend import Spend
from tests.refusals import raises_reason

BUDGET = Budget(3.0, 1e-5)


def test_the_quotient_is_noise_over_the_longest_sum_of_gradients() -> None:
    found = advise(4, 40, 9, BUDGET, colluders=1, rounds=25, sample_rate=0.2)
    z = BUDGET.calibrate(0.2, 25)
    noise = z * math.sqrt(4 / 3) * math.sqrt(25)
    assert found.noise_to_signal == pytest.approx(noise * 3 / (0.2 * 160 * 25))
    assert found.part_left == pytest.approx(1 / (1 + SLOPE * found.noise_to_signal))
    assert BUDGET.admits(BUDGET.cost(Spend(found.noise_multiplier, 0.2, 25)))


def test_shared_noise_is_less_by_the_root_of_those_counted_on() -> None:
    own, shared = (advise(16, 40, 100, BUDGET, colluders=colluders) for colluders in (None, 1))
    assert own.noise_to_signal / shared.noise_to_signal == pytest.approx(math.sqrt(15))
    assert own.part_left < shared.part_left < 1


def test_four_times_the_classes_take_twice_the_patients() -> None:
    few, many = advise(4, 40, 100, BUDGET, colluders=1), advise(4, 80, 400, BUDGET, colluders=1)
    assert few.noise_to_signal == pytest.approx(many.noise_to_signal)


def test_the_size_of_a_hospital_names_the_preset() -> None:
    presets = Path(__file__).parents[2] / "jobs" / "linear_shared" / "presets"
    assert {f"{name}.toml" for name in PRESETS} <= {path.name for path in presets.iterdir()}
    assert [preset_for(4, patients, 1) for patients in (1, 40, MANY - 1)] == ["private-small"] * 3
    assert [preset_for(4, patients, 1) for patients in (MANY, 5000)] == ["private"] * 2
    assert preset_for(2, 40, 1) is preset_for(4, 40, 3) is None and preset_for(3, 40, 1) is not None


@pytest.mark.parametrize("numbers", [(2, 40, 100, 1), (4, 0, 100, 1), (4, 40, 0, 1), (4, 40, 9, 0)])
def test_numbers_of_no_sense_are_refused(numbers: tuple[int, int, int, int]) -> None:
    sites, patients, weights, colluders = numbers
    with raises_reason("PRIVACY_INVALID"):
        advise(sites, patients, weights, BUDGET, colluders=colluders)

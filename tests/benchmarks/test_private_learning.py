"""What the benchmarks of private learning make at once is what the package makes one record at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from histoflare.bags.models.linear import Linear, LinearSettings
from histoflare.bags.models.mem import MemSettings
from histoflare.bags.models.model import ModelSettings
from histoflare.bags.targets.classes import Classes
from histoflare.bags.task import BagTask
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State
from histoflare.rounds.strategies.fedsgd import FedSgd
from tests.benchmarks import (
    bench_adnan_shared,
    bench_private,
    bench_threshold,
    linear_steps,
    private_questions,
)
from tests.benchmarks.bags_in_memory import Bags
from tests.benchmarks.batched_dpsgd import Steps
from tests.benchmarks.bench_private import Cohort, Line, Row, is_fitted, measure, rows_of
from tests.benchmarks.drawn_bags import Drawn
from tests.benchmarks.linear_steps import Points, Protection, first_weights, see
from tests.benchmarks.private_questions import FIVE, QUESTIONS

ROUNDS, RATE, CLIP = 4, 0.5, 0.05
PATIENTS = (6, 9, 7)
DRAWN = Drawn(features=5, patches=3, separation=1.0, shown=1.0, seed=3)
EVERYBODY = DpSgd(noise_multiplier=0.0, sample_rate=1.0, batch_size=4.0, clip_norm=CLIP, delta=1e-3)
"""No noise and no chance: what is left is arithmetic. Every gradient of these bags is clipped."""


def task(settings: ModelSettings, batch_size: int = 2) -> BagTask:
    return BagTask(
        ("a", "b"),
        "drawn",
        settings,
        mpp=None,
        patch_px=None,
        features=5,
        optimizer="sgd",
        batch_size=batch_size,
        max_patches=3,
        seed=8,
    )


def by_the_package(asked: BagTask, sites: dict[str, Bags], plan: PrivacyPlan) -> State:
    strategy = FedSgd(learning_rate=RATE, weighting="uniform", averaged_part=0.5)
    return run_in_process(asked, sites, strategy, ROUNDS, 1, plan).handed_out


@pytest.mark.parametrize("shares", [None, (0.8, 0.2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("plan", [EVERYBODY, replace(EVERYBODY, clip_norm=100.0), Open()])
def test_a_linear_step_at_once_is_the_package_s(
    plan: PrivacyPlan, bias: bool, shares: tuple[float, float] | None
) -> None:
    """Without protection all batches are whole sites, so that chance has no part here either."""
    sites = DRAWN.sites([6] * 3, 0)
    asked = replace(
        task(LinearSettings(directions=4, bias=bias), batch_size=6), target=Classes(class_shares=shares)
    )
    expected = by_the_package(asked, sites, plan)
    protection = None
    if isinstance(plan, DpSgd):
        protection = Protection(plan.sample_rate, plan.clip_norm, 0.0, plan.batch_size * len(sites))
    got = linear_steps.train(
        [see(asked, bags, "train") for bags in sites.values()],
        first_weights(asked),
        protection,
        rounds=ROUNDS,
        learning_rate=RATE,
        batch_size=6,
        averaged_part=0.5,
        seed=(1,),
        class_shares=shares,
    )
    # a record is clipped a little below its clip norm by the package
    torch.testing.assert_close(
        torch.tensor(got[:-1].T), expected["head.weight"].double(), rtol=1e-3, atol=2e-4
    )
    last = expected["head.bias"].double() if bias else torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(got[-1]), last, rtol=1e-3, atol=2e-4)
    moved = (expected["head.weight"] - asked.build_model().state_dict()["head.weight"]).abs().max()
    assert moved > 0.005


@pytest.mark.parametrize("settings", [MemSettings(2, 3, 4), LinearSettings(directions=0)])
@pytest.mark.parametrize("clip_norm", [CLIP, 100.0])
def test_a_step_of_any_model_at_once_is_the_package_s(settings: ModelSettings, clip_norm: float) -> None:
    sites = DRAWN.sites(PATIENTS, 0)
    plan = replace(EVERYBODY, clip_norm=clip_norm)
    expected = by_the_package(task(settings), sites, plan)
    steps = Steps(ROUNDS, 12, RATE, sample_rate=1.0, clip_norm=clip_norm)
    got = steps.train(task(settings), list(sites.values()), 1)
    first = task(settings).build_model().state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=2e-4)
        assert (tensor - first[name]).abs().max() > 1e-4, name


def test_the_noise_of_the_steps_is_as_large_as_they_say() -> None:
    """With a clip that leaves nothing of the gradients: N(0, T · (noise · C · rate / divisor)²)."""
    asked, clip, noise, divisor = task(LinearSettings(directions=0)), 1e-20, 3e20, 7
    std = noise * clip * RATE / divisor * math.sqrt(20)
    sites, moved = DRAWN.sites(PATIENTS, 0), []
    first = first_weights(asked)
    points = [see(asked, bags, "train") for bags in sites.values()]
    for seed in range(20):
        steps = Steps(20, divisor, RATE, 0.5, clip, noise, averaged_part=0.0)
        state = steps.train(asked, list(sites.values()), seed)
        moved.append(state["head.weight"].numpy() - first[:-1].T)
    assert np.std(moved) == pytest.approx(std, rel=0.15)
    protection = Protection(0.5, clip, noise, divisor)
    ends = [
        linear_steps.train(
            points,
            first,
            protection,
            rounds=20,
            learning_rate=RATE,
            batch_size=1,
            averaged_part=1 / 20,
            seed=(s,),
        )
        for s in range(20)
    ]
    assert np.std([end - first for end in ends]) == pytest.approx(std, rel=0.15)


def test_the_rows_have_the_noise_that_their_names_say() -> None:
    split = Cohort("drawn", 4, 10).split(0)
    rows = dict(rows_of(split.task, list(split.sites), 10, [8.0]))

    def noise(name: str) -> float:
        plan: Any = rows[name, 8.0][0].plan
        n = 1 if rows[name, 8.0][0].pooled else 4
        return float(plan.sites_noise * math.sqrt(n))

    pooled = noise("pooled")
    assert noise("shared") == pytest.approx(pooled * math.sqrt(4 / 3), rel=1e-4)
    assert noise(bench_private.TWO) == pytest.approx(pooled * math.sqrt(2), rel=1e-4)
    assert noise("local") == pytest.approx(2 * pooled, rel=1e-4)
    assert noise("pooled, noise of shared") == pytest.approx(noise("shared"), rel=1e-4)
    assert len(rows["alone", 8.0]) == 4


def test_a_small_table_either_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_private, "ROUNDS", 2)
    monkeypatch.setattr(bench_private, "REHEARSALS", 1)
    monkeypatch.setattr(bench_private, "RATES", (1.0, 4.0))
    monkeypatch.setattr(private_questions, "TEST", 40)
    cohort = Cohort("drawn", 4, 6)
    for in_process in (False, True):
        lines = measure(cohort, 1, [8.0], in_process)
        assert [line.row for line in lines if line.epsilon is None] == ["open", "alone, open"]
        advised = [line for line in lines if line.expected is not None]
        assert [line.row for line in advised] == ["local", "shared", bench_private.TWO]
        assert all(0 <= line.mean <= 1 for line in lines)
    picture = bench_private.draw_picture(lines)
    assert picture.startswith("<svg xmlns=") and "drawn bags, 4 × 6" in picture
    assert picture.count('class="series s0') >= 1


def test_the_constant_is_fitted_to_its_six_rows_alone() -> None:
    line = Line("tiles", 4, 40, "shared", 8.0, 352, 16.0, 0.5, None, 20)
    others = [
        replace(line, patients=100),
        replace(line, row=bench_private.TWO),
        replace(line, question="wide"),
    ]
    assert is_fitted(line) and not any(map(is_fitted, others))


def test_patients_of_five_tiles_share_none() -> None:
    data = bench_private.QUESTIONS["fives"]
    try:
        split = data.split(4, 40, 0, 12)
    except FileNotFoundError:
        pytest.skip("HISTOFLARE_TEST_DATA has no feat_crc5000")
    bags = [bag for site in [*split.sites.values(), split.test] for bag in site.bags.values()]
    rows = torch.cat(bags)
    assert all(len(bag) == FIVE for bag in bags)
    assert len(torch.unique(rows, dim=0)) >= 0.99 * len(rows), "tiles of equal features are rare"
    assert set(QUESTIONS) >= {"tiles", "fives", "wide", "lung", "drawn"}


class TestAdnanShared:
    def test_the_four_figures_are_the_accountant_s(self) -> None:
        """Computed once with dp-accounting's RDP at q = 32/705, z = 4, T = 3,966, δ = 1e-4."""
        found = list(bench_adnan_shared.epsilons(bench_adnan_shared.preset()).values())
        assert found == pytest.approx([2.444, 2.898, 3.704, 5.755], abs=5e-4)

    def test_the_sum_has_the_noise_that_is_said(self) -> None:
        found = {
            name: arm.noise for name, arm in bench_adnan_shared.arms(bench_adnan_shared.preset()).items()
        }
        noises = [found[name] for name in ("pooled, z", "shared", "local", "alone")]
        assert noises == pytest.approx([4.0, 4 * math.sqrt(4 / 3), 8.0, 4.0])
        assert found["pooled, open"] is None and found["federated, open"] is None

    @pytest.mark.parametrize("way", [(), ("--in-process",)])
    def test_a_few_rounds(
        self, way: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        monkeypatch.setattr(bench_adnan_shared, "TEST", 40)
        results = tmp_path / "results.jsonl"
        asked = ["--results", str(results), "--models", "linear", "--seeds", "0", "--rounds", "2"]
        bench_adnan_shared.main([*asked, *way])
        shown = capsys.readouterr().out
        assert shown.count("ε = ") == 4
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        arms = {line["arm"] for line in lines}
        assert arms == set(bench_adnan_shared.arms(bench_adnan_shared.preset())) - (
            set() if way else {"pooled, louder"}
        )
        bench_adnan_shared.main([*asked, *way])
        assert len(results.read_text().splitlines()) == len(lines), "nothing is made again"

    def test_shared_runs_under_a_secure_sum(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[str, str]] = []

        def instead(task: Any, sites: Any, *rest: Any, transport: Any) -> Any:
            asked.append((rest[-1].mechanism, transport.name))
            return run_in_process(task, sites, *rest, transport=transport)

        monkeypatch.setattr(bench_adnan_shared, "run_in_process", instead)
        monkeypatch.setattr(bench_adnan_shared, "TEST", 40)
        for name in ("shared", "local"):
            bench_adnan_shared.make_run(name, "linear", 0.01, 0, 1, "in process")
        assert asked == [("dp-sgd-shared", "masked_sum"), ("dp-sgd", "float32")]


def test_a_row_in_process_goes_where_it_says() -> None:
    split = Cohort("drawn", 4, 6).split(0)
    assert Row(("site-00",), Open()).transport.name == "float32"
    assert {
        row.transport.name for _, rows in rows_of(split.task, list(split.sites), 6, [8.0]) for row in rows
    } == {
        "float32",
        "masked_sum",
    }


class TestThreshold:
    COHORT = bench_threshold.Cohort("shifted", 3, 20, 0.2)

    @pytest.mark.parametrize("directions", [0, 16])
    def test_patients_are_seen_as_the_model_sees_them(self, directions: int) -> None:
        dealt = replace(self.COHORT.deal(0), directions=directions)
        settings, (bags, _) = LinearSettings(directions, bias=False), dealt.test
        model = settings.build(128, 2).double()
        assert isinstance(model, Linear)
        if model.directions is not None:
            model.directions = model.directions.double()
        points = dealt.points(dealt.test, False, False)
        # one patch that is the mean already: scaled anew, its direction is the same
        expected = model(torch.tensor(bags[:, None])).detach().numpy()
        weights = model.head.weight.detach().numpy().T
        np.testing.assert_allclose(points.inputs[:, :-1] @ weights, expected, atol=1e-9)
        assert not points.inputs[:, -1].any() and dealt.points(dealt.test, True, False).inputs[:, -1].all()

    def test_hindsight_is_the_best_of_all_thresholds(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(20):
            said, labels = rng.integers(-3, 4, size=(12, 2)).astype(float), rng.permutation([0, 1] * 6)
            tried = [
                bench_threshold.balanced(said + np.array([0.0, cut]), labels) for cut in np.arange(-7.5, 8)
            ]
            assert bench_threshold.hindsight(said, labels) == pytest.approx(max(tried))

    def test_a_booked_offset_without_noise_sets_the_classes_apart_in_their_middle(self) -> None:
        inputs = np.array([[0.9, 1.0], [0.7, 1.0], [0.3, 1.0]])
        weights = np.array([[-0.5, 0.5], [0.0, 0.0]])
        found = bench_threshold.offset(
            weights, [Points(inputs, np.array([1, 1, 0]))], 0.0, np.random.default_rng(0)
        )
        # mean difference of outputs: 0.8 and 0.3, their middle 0.55
        assert found[1] - found[0] == pytest.approx(-0.55)

    def test_class_means_without_noise_are_the_nearest(self) -> None:
        rng = np.random.default_rng(1)
        x, y = rng.normal(size=(30, 4)), np.arange(30) % 3
        points = Points(np.hstack([x, np.zeros((30, 1))]), y)
        means = np.stack([x[y == label].mean(axis=0) for label in range(3)])
        nearest = np.square(x[:, None] - means).sum(axis=2).argmin(axis=1)
        said = bench_threshold.nearest_mean([points], points, 3, 0.0, (0,))
        assert (said.argmax(axis=1) == nearest).all()

    def test_a_small_table(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.setattr(bench_threshold, "ROUNDS", 3)
        monkeypatch.setattr(bench_threshold, "REHEARSALS", (100,))
        for own in (False, True):
            lines = bench_threshold.measure("shifted:3x20@0.2", [0.0, 8.0], bench_threshold.ARMS, own, 1)
            assert [line.arm for line in lines] == [*bench_threshold.ARMS] * 2
            assert all(0.0 <= line.balanced <= line.hindsight + 1e-9 <= 1.0 + 1e-9 for line in lines)
        assert capsys.readouterr().out.count("in hindsight") == 4 * len(bench_threshold.ARMS)

    def test_a_preset_s_table(self) -> None:
        before, after = bench_threshold.measure_preset("private-small", "drawn:4x40@0.2", 2)
        assert (before.arm, after.arm, before.epsilon) == ("before", "after", 8.0)
        assert after.balanced > before.balanced + 0.05, "with a rare class the bias takes the threshold"

    def test_mem_by_the_package_s_rounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        dealt = self.COHORT.deal(0)
        monkeypatch.setattr(bench_threshold.Cohort, "deal", lambda *_: dealt)
        asked: list[Any] = []

        def instead(task: Any, sites: Any, strategy: Any, rounds: int, *rest: Any) -> Any:
            asked.append((task, rounds))
            return run_in_process(task, sites, strategy, 1, *rest)

        monkeypatch.setattr(bench_threshold, "run_in_process", instead)
        for arm in ("before", "after"):
            found = bench_threshold.by_the_job("shifted:3x20@0.2", 8.0, arm, 0.25, 0)
            assert 0.0 <= found.balanced <= found.hindsight <= 1.0
        assert [(task.model.bias, task.target.class_shares is None, r) for task, r in asked] == [
            (True, True, 30),
            (False, False, 30),
        ]

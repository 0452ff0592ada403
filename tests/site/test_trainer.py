"""The trainer's process: it stays, it dies alone, and it never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from histoflare.errors import HistoflareError
from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict
from histoflare.rounds.state import State, model_state
from histoflare.seeds import derive_seed
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import load_site_data
from histoflare.site.trainer import Trainer
from tests.refusals import raises_reason

from ..flare.bags_on_disk import ENCODER, LABELS, write_site
from ..mem import make_mem_task
from .tasks import (
    SEED,
    SHARED_BODY,
    SMALL,
    TASK,
    FailingTask,
    GatedTask,
    UnreadableTask,
    first_state,
    in_process,
    same_bytes,
    setup_of,
)

LARGE = make_mem_task(labels=LABELS, encoder=ENCODER, mpp=0.5, patch_px=224)
"""The job's own model: 1.6 million parameters."""

AT_ONCE = 5.0
"""Seconds that a busy machine may need for it; what waits for the end of a :class:`GatedTask` needs 60."""

Make = Callable[..., Trainer]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> SiteConfiguration:
    return write_site(tmp_path_factory.mktemp("site"), "a", slides=20)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def make(site: SiteConfiguration, lines: list[str]) -> Iterator[Make]:
    """Return a function that makes a trainer, with a run of its own for each test."""
    made: list[Trainer] = []

    def make_trainer(task: Any = TASK, **changes: Any) -> Trainer:
        made.append(Trainer(setup_of(site, task, run=uuid.uuid4().hex, **changes), lines.append))
        return made[-1]

    yield make_trainer
    for trainer in made:
        trainer.close()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file that holds up a :class:`GatedTask` while it exists."""
    path = tmp_path / "gate"
    path.touch()
    return path


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> float:
    """Wait until ``condition`` holds; return how long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not come to pass"
        time.sleep(0.005)
    return time.monotonic() - started


def is_gone(pid: int) -> bool:
    """Return whether the process is dead (a zombie that nobody has waited for yet is)."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def in_training(gate: Path) -> bool:
    return Path(f"{gate}.here").exists()


def test_a_round_gives_the_bytes_of_site_round_in_process(make: Make, site: SiteConfiguration) -> None:
    trainer = make()
    global_state = model_state(TASK.build_model())
    for index in range(2):
        answer = trainer.train(first_state(), index, 5)
        expected = in_process(site, global_state, index, {})
        assert same_bytes(answer.tensors, expected.update.tensors)
        assert (answer.weight, answer.patients) == (12.0, 12)


def test_an_evaluation_is_the_one_in_process(make: Make, site: SiteConfiguration) -> None:
    answer = make().evaluate(first_state(), "test")
    table = predict(TASK, model_state(TASK.build_model()), load_site_data("a", TASK, site), "test")
    auc = evaluate(table, seed=derive_seed(SEED, "evaluate"))["auc"]
    found = [answer.metrics[name] for name in ("auc", "auc_low", "auc_high")]
    assert (found, answer.patients) == ([auc.value, auc.low, auc.high], 8)


def test_one_process_serves_all_rounds_and_closing_leaves_nothing(make: Make) -> None:
    me = psutil.Process()
    trainer = make()
    assert trainer.pid is None
    files, threads = me.num_fds(), threading.active_count()
    trainer.train(first_state(), 0, 2)
    pid = trainer.pid
    assert pid is not None
    trainer.train(first_state(), 1, 2)
    trainer.evaluate(first_state(), "test")
    assert trainer.pid == pid
    trainer.close()
    assert trainer.pid is None and is_gone(pid)
    assert not [child for child in me.children() if child.pid == pid], "not even a zombie"
    assert (me.num_fds(), threading.active_count()) == (files, threads)
    trainer.close()
    with pytest.raises(HistoflareError) as caught:
        trainer.train(first_state(), 2, 3)
    assert caught.value.reason == "STOPPED"


def test_it_imports_neither_flare_nor_its_parents_program(make: Make) -> None:
    import nvflare.apis.executor  # noqa: F401 (as in a job's process)

    with pytest.raises(HistoflareError) as caught:
        make(FailingTask(**SMALL, how="modules")).train(first_state(), 0, 1)
    modules = str(caught.value).split()
    assert "torch" in modules and "histoflare.site.work" in modules
    assert not [name for name in modules if name.split(".")[0] in ("nvflare", "pytest", "_pytest", "monai")]


def test_its_environment_and_that_it_is_in_its_parents_group(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # the kit's
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # an administrator's
    with pytest.raises(HistoflareError) as caught:
        make(FailingTask(**SMALL, how="environment")).train(first_state(), 0, 1)
    assert str(caught.value) == f"1 [None, '65536'] {os.getpgrp()}"


def test_large_states_cross_unharmed(make: Make, site: SiteConfiguration) -> None:
    state = first_state(LARGE)
    assert sum(array.size for array in state.values()) > 1_000_000
    answer = make(LARGE).train(state, 0, 5)
    expected = in_process(site, model_state(LARGE.build_model()), 0, {}, task=LARGE)
    assert same_bytes(answer.tensors, expected.update.tensors)


@pytest.mark.parametrize(
    ("how", "reason", "says"),
    [
        ("refuses", "BAG_DAMAGED", "s1.h5 of patient Doe is damaged"),
        ("raises", "TRAINING_FAILED", "log"),
        ("end of file", "TRAINING_FAILED", "log"),
        ("exits", "TRAINER_DIED", " 3"),
    ],
)
def test_faults_arrive_as_codes(make: Make, lines: list[str], how: str, reason: str, says: str) -> None:
    trainer = make(FailingTask(**SMALL, how=how))
    with raises_reason(reason, says) as caught:
        trainer.train(first_state(), 0, 1)
    tracebacks = [line for line in lines if "Traceback" in line and "patient Doe" in line]
    assert len(tracebacks) == (reason == "TRAINING_FAILED")
    assert how == "refuses" or "Doe" not in str(caught.value)
    before = trainer.pid
    assert (before is None) == (how == "exits"), "an error leaves the process as it is"
    assert trainer.evaluate(first_state(), "test").patients == 8, "and the next call works"
    assert before is None or trainer.pid == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"run": "../elsewhere"}, "RUN_INVALID"), ({"task": UnreadableTask(**SMALL)}, "TRAINING_FAILED")],
)
def test_a_setup_that_cannot_be_used_leaves_no_process(
    site: SiteConfiguration, lines: list[str], changes: dict[str, Any], reason: str
) -> None:
    trainer = Trainer(setup_of(site, **changes), lines.append)
    for _ in range(2):
        with pytest.raises(HistoflareError) as caught:
            trainer.train(first_state(), 0, 1)
        assert caught.value.reason == reason
        assert trainer.pid is None
    assert "Doe" not in str(caught.value)
    assert (reason == "TRAINING_FAILED") == any("patient Doe" in line for line in lines)


def test_killed_in_mid_training_it_costs_one_call(make: Make, site: SiteConfiguration, gate: Path) -> None:
    task = GatedTask(**SMALL, gate=str(gate))
    gate.unlink()
    trainer = make(task, strategy=SHARED_BODY)
    global_state = model_state(TASK.build_model())
    trainer.train(first_state(), 0, 5)
    kept: State = in_process(site, global_state, 0, {}, SHARED_BODY).site_state
    first = trainer.pid
    assert first is not None

    gate.touch()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(trainer.train, first_state(), 1, 5)
        wait_for(lambda: in_training(gate))
        os.kill(first, signal.SIGKILL)
        killed = time.monotonic()
        with raises_reason("TRAINER_DIED", "SIGKILL") as caught:
            asked.result(timeout=20)
        assert time.monotonic() - killed < AT_ONCE
    assert caught.value.reason == "TRAINER_DIED"
    assert trainer.pid is None

    gate.unlink()
    answer = trainer.train(first_state(), 2, 5)
    expected = in_process(site, global_state, 2, kept, SHARED_BODY)
    assert trainer.pid not in (None, first)
    assert same_bytes(answer.tensors, expected.update.tensors), "with what the site kept of round 0"
    assert not same_bytes(answer.tensors, in_process(site, global_state, 2, {}, SHARED_BODY).update.tensors)


def test_killed_between_two_rounds_it_costs_nothing(make: Make, lines: list[str]) -> None:
    trainer = make()
    trainer.train(first_state(), 0, 2)
    first = trainer.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(first))  # and waited for
    assert trainer.train(first_state(), 1, 2).patients == 12
    assert trainer.pid not in (None, first)
    assert any("ended between two rounds (signal SIGKILL)" in line for line in lines)


def test_stopped_ends_a_training_at_once(make: Make, gate: Path) -> None:
    trainer = make(GatedTask(**SMALL, gate=str(gate)))
    since: list[float] = []

    def stopped() -> bool:
        if in_training(gate):
            since.append(time.monotonic())
        return bool(since)

    pids: list[int | None] = []
    with pytest.raises(HistoflareError) as caught:
        trainer.train(first_state(), 0, 1, stopped=lambda: pids.append(trainer.pid) or stopped())  # type: ignore[func-returns-value]
    assert caught.value.reason == "STOPPED"
    assert time.monotonic() - since[0] < AT_ONCE
    assert pids[-1] is not None and is_gone(pids[-1]) and trainer.pid is None
    gate.unlink()
    assert trainer.train(first_state(), 0, 1).patients == 12


def test_stopped_ends_a_process_that_is_just_starting(make: Make) -> None:
    trainer = make()
    started = time.monotonic()
    with pytest.raises(HistoflareError) as caught:
        trainer.train(first_state(), 0, 1, stopped=lambda: True)
    assert caught.value.reason == "STOPPED"
    assert time.monotonic() - started < 1.0, "it is not waited for until it has started"
    assert trainer.pid is None


def test_closing_ends_a_training_of_another_thread(make: Make, gate: Path) -> None:
    trainer = make(GatedTask(**SMALL, gate=str(gate)))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(trainer.train, first_state(), 0, 1)
        wait_for(lambda: in_training(gate))
        pid = trainer.pid
        assert pid is not None
        started = time.monotonic()
        trainer.close()
        with pytest.raises(HistoflareError) as caught:
            asked.result(timeout=20)
        assert time.monotonic() - started < AT_ONCE
    assert caught.value.reason == "STOPPED" and is_gone(pid)


def test_an_error_of_the_callers_own_leaves_no_process(make: Make, gate: Path) -> None:
    trainer = make(GatedTask(**SMALL, gate=str(gate)))
    pids: list[int] = []

    def stopped() -> bool:
        if in_training(gate):
            pids.append(trainer.pid or 0)
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        trainer.train(first_state(), 0, 1, stopped=stopped)
    assert is_gone(pids[0]) and trainer.pid is None


def test_it_lives_on_when_the_thread_that_called_ends(make: Make) -> None:
    trainer = make()
    caller = threading.Thread(target=trainer.train, args=(first_state(), 0, 2))
    caller.start()
    caller.join()
    pid = trainer.pid
    time.sleep(0.3)
    trainer.train(first_state(), 1, 2)
    assert pid is not None and trainer.pid == pid


def test_it_ignores_ctrl_c_while_it_starts_and_later(make: Make) -> None:
    trainer = make()
    pids: set[int] = set()

    def interrupt() -> bool:
        if trainer.pid is not None and len(pids) < 10:
            os.kill(trainer.pid, signal.SIGINT)
            pids.add(trainer.pid)
        return False

    assert trainer.train(first_state(), 0, 2, stopped=interrupt).patients == 12
    assert pids == {trainer.pid}
    os.kill(pids.pop(), signal.SIGINT)
    assert trainer.train(first_state(), 1, 2).patients == 12


PARENT = """
import sys, threading
from pathlib import Path
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.trainer import Trainer
from tests.site.tasks import GatedTask, SMALL, first_state, setup_of

root, gate, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
site = SiteConfiguration({"manifest": root / "a" / "manifest.csv", "bags": root / "a" / "bags"})
trainer = Trainer(setup_of(site, GatedTask(**SMALL, gate=str(gate)), run=how.replace(" ", "-")), print)
if how == "leaves":
    gate.unlink()
    trainer.train(first_state(), 0, 2)
    print("pid", trainer.pid, flush=True)
else:
    asked = threading.Thread(target=trainer.train, args=(first_state(), 0, 2), daemon=True)
    asked.start()
    while trainer.pid is None:
        pass
    print("pid", trainer.pid, flush=True)
    asked.join()
"""


@pytest.mark.parametrize("how", ["is killed", "is interrupted", "leaves"])
def test_it_dies_with_its_parent(
    site: SiteConfiguration, gate: Path, repository: Path, tmp_path: Path, how: str
) -> None:
    root = site.files["manifest"].parents[1]
    (tmp_path / "program.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(root), str(gate), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(repository)},
        text=True,
    )
    assert parent.stdout is not None
    with parent.stdout:
        pid = next(int(line.split()[1]) for line in parent.stdout if line.startswith("pid "))
        if how == "leaves":
            parent.wait(timeout=20)
        else:
            wait_for(lambda: in_training(gate))
            assert not is_gone(pid)
            parent.send_signal(signal.SIGKILL if how == "is killed" else signal.SIGINT)
            parent.wait(timeout=20)
        assert wait_for(lambda: is_gone(pid)) < 1.0


def test_its_memory_does_not_grow(make: Make) -> None:
    trainer = make(LARGE, strategy=SHARED_BODY)
    state = first_state(LARGE)
    rng = np.random.default_rng(0)
    resident: list[int] = []
    for index in range(36):
        change = {
            name: array + rng.normal(0, 1e-4, array.shape).astype(array.dtype)
            for name, array in state.items()
        }
        trainer.train(change, index, 36, metrics=["validation/auc"])
        resident.append(psutil.Process(trainer.pid).memory_info().rss)
    # A state has 6.6 MB: what kept one of each round would keep 200 MB.
    assert np.median(resident[-5:]) - np.median(resident[3:8]) < 20e6


def test_a_state_of_another_model_is_refused_and_the_process_stays(make: Make) -> None:
    trainer = make()
    wrong = {name: array[:1] for name, array in first_state().items()}
    with pytest.raises(HistoflareError) as caught:
        trainer.train(wrong, 0, 2)
    assert caught.value.reason == "STATE_INVALID"
    pid = trainer.pid
    assert trainer.train(first_state(), 0, 2).patients == 12 and trainer.pid == pid

"""The one federation that is attacked, and the order in which that is done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from histoflare.flare import processes
from histoflare.flare.job_files import CONFIG_FOLDER
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kits import Agreement
from histoflare.flare.poc import Federation

from ..bags_on_disk import write_site
from ..test_strays import MODULES, plant
from . import raw_messages, restarts, running_jobs, submissions
from .archives import Around, honest
from .attack import SITES, Attack, secret
from .objects import PLANTED
from .watchers import Listener, Memory


@pytest.fixture(scope="session")
def attack(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Attack]:
    """All that was sent to a federation and came of it. The federation has ended."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in ("tap", "orders", "results", "marks", *(f"tmp-{who}" for who in ("server", *SITES))):
        (folder / name).mkdir()
    job = write_variant(repository / "jobs" / "mem_fedavg", folder / "job", {"rounds": 1, "evaluate": False})
    sites = {
        site: write_site(folder / secret("folder", site), site, mark=secret("name", site)) for site in SITES
    }
    listener = Listener()
    with Federation.prepare(folder / "run", sites, Agreement(job)) as federation:
        bag = next(sites["clinic-a"].files["bags"].glob("*.h5"))
        made = Attack(folder, federation, listener, Around(folder / "marker", bag, listener.url))
        memory = Memory(federation.kits.name)
        try:
            with _timed(made, "start"):
                _start(made)
            _attack(made, memory, job)
        finally:
            memory.end()
            listener.end()
    print(made.seconds, made.usual, made.most)
    yield made
    assert not processes.find(federation.kits.name)


def _start(made: Attack) -> None:
    around, modules = made.folder / "around", made.folder / "modules"
    plant(around, made.marks, *MODULES)
    for name in PLANTED:
        (modules / name).parent.mkdir(parents=True, exist_ok=True)
        (modules / name).write_bytes(made.around.code())
    restarts.issue_again(made)
    for participant in ("server", *SITES):
        if participant in SITES:
            made.notes(participant).parent.mkdir(exist_ok=True)
            made.notes(participant).write_text(secret("records", participant))
        made.start(participant)
    made.federation._await_registration(60.0)


def _attack(made: Attack, memory: Memory, job: Path) -> None:
    good = honest(job / CONFIG_FOLDER)
    submissions.with_code_in_comments(made, job)
    with _timed(made, "a job that leaves code in comments"):
        made.run("before", job)
        submissions.note_what_the_first_left(made)
    made.usual = memory.most()
    before = made.files()
    with _timed(made, "submissions"), pytest.MonkeyPatch.context() as monkeypatch:
        submissions.submit_archives(made, job, good, monkeypatch)
    with _timed(made, "submissions one after the other"):
        submissions.submit_one_after_the_other(made, job)
    of_submissions = memory.most()
    with _timed(made, "raw deployments"):
        raw_messages.deploy_archives(made, good)
    with _timed(made, "raw commands"):
        raw_messages.send_commands(made)
    with _timed(made, "objects"):
        raw_messages.send_objects(made)
    made.left = {who: paths - before[who] for who, paths in made.files().items()}
    with _timed(made, "jobs with text that means nothing"):
        raw_messages.deploy_what_means_nothing(made, good)
    with _timed(made, "a job of references"):
        running_jobs.run_with_references(made, job)
    with _timed(made, "tasks that are replaced"):
        running_jobs.replace_tasks(made, job)
    with _timed(made, "deployments on earlier jobs"):
        raw_messages.deploy_on_earlier_jobs(made, good)
    with _timed(made, "clients that are started again"):
        restarts.restart(made)
    with _timed(made, "an honest job again"):
        made.run("after", job)
    # What the server holds after the submissions is what it sends itself: messages of 40 MiB among them.
    made.most = memory.most() | {"server_train": of_submissions["server_train"]}


@contextmanager
def _timed(made: Attack, step: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    made.seconds[step] = round(time.monotonic() - began, 1)

"""A job that plants a secret in every way out, at a site with its policy and at one without.

Looked at is everything that the server received, stored, wrote down or gave away. The site without a policy
shows that each way is open in FLARE as it comes: a secret that arrives from nowhere proves nothing.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from histoflare.flare.job_files import CLIENT_CONFIGURATION, CLIENT_FILE, CONFIG_FOLDER
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kits import Agreement
from histoflare.flare.poc import COMPLETED, Federation
from histoflare.storage import write_json

from .bags_on_disk import write_site
from .leaks.leaky import WAYS, secret

pytestmark = [pytest.mark.flare, pytest.mark.slow]

LEAKS = Path(__file__).parent / "leaks"
TAP = Path(__file__).parent / "tap"
HONEST, GUARDED, OPEN = SITES = "clinic-a", "clinic-b", "clinic-c"
ROUNDS = 5
TO_FED_EVENT = "nvflare.app_common.widgets.convert_to_fed_event.ConvertToFedEvent"
LOG_STREAMER = "nvflare.app_common.logging.job_log_streamer.JobLogStreamer"
LEAKY = [
    *("leaky.LeakyExecutor", "leaky.OpenExecutor", "leaky.Leaker", "leaky.LeakyFilter"),
    *(TO_FED_EVENT, LOG_STREAMER),
]


def write_leaky_job(repository: Path, target: Path) -> Path:
    """A job that no site would take: here they take any (``ANY_JOB``), for what stands behind that is tested.

    One site does what the job says; at the others the job's own components try to get secrets out."""
    job = write_variant(
        repository / "jobs" / "mem_fedavg",
        target,
        {
            "rounds": ROUNDS,
            "least_sites": 1,
            "task.model.memories": 2,
            "task.model.dim": 4,
            "task.model.hidden": 8,
        },
    )
    executors = {"guarded": "leaky.LeakyExecutor", "open": "leaky.OpenExecutor"}
    for mark, executor in executors.items():
        folder = shutil.copytree(job / CONFIG_FOLDER, job / f"app_{mark}" / "config")
        configuration = copy.deepcopy(CLIENT_CONFIGURATION)
        configuration["executors"][0]["executor"] = {"path": executor, "args": {"mark": mark}}
        configuration["task_result_filters"] = [
            {"tasks": ["train"], "filters": [{"path": "leaky.LeakyFilter", "args": {"mark": mark}}]}
        ]
        events = ["analytix_log_stats", "_error_log_available"]
        configuration["components"] = [
            {"id": "leaker", "path": "leaky.Leaker", "args": {"mark": mark}},
            {"id": "to_fed", "path": TO_FED_EVENT, "args": {"events_to_convert": events}},
            {"id": "log", "path": LOG_STREAMER, "args": {"poll_interval": 0.2}},
        ]
        write_json(folder / CLIENT_FILE, configuration)
    meta = json.loads((job / "meta.json").read_text())
    meta["deploy_map"] = {"app": ["server", HONEST], "app_guarded": [GUARDED], "app_open": [OPEN]}
    write_json(job / "meta.json", meta)
    return job


def admit_classes(local: Path) -> dict[str, Any]:
    """Have a site allow the leaking classes: what is tested is what stands behind the list of classes."""
    path = local / "resources.json.default"
    resources = json.loads(path.read_text())
    resources["class_allow_list"] += LEAKY
    write_json(path, resources)
    return resources


@pytest.fixture(scope="module")
def received(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[tuple[bytes, list[Any]]]:
    """All that the server came to have, and the rows of its rounds."""
    folder = tmp_path_factory.mktemp("leaks")
    tap = folder / "tap"
    tap.mkdir()
    job = write_leaky_job(repository, folder / "job")
    sites = {site: write_site(folder / "sites", site) for site in SITES}
    with Federation.prepare(folder / "run", sites, Agreement(job)) as federation:
        for site in sites:
            resources = admit_classes(federation.kits.kit(site) / "local")
        (federation.kits.kit(OPEN) / "local" / "privacy.json").unlink()
        resources["allow_log_streaming"] = True
        write_json(federation.kits.kit(OPEN) / "local" / "resources.json.default", resources)
        for site in sites:
            federation.kits.sign(site)
        environment = {"PYTHONPATH": f"{LEAKS}{os.pathsep}{TAP}", "WIRE_TAP": str(tap)}
        federation.start(environment=environment | {"ANY_JOB": "1", "OPEN_SITE": OPEN})
        job_id = federation.admin.submit(job)
        status = federation.follow(job_id, timeout_s=240)
        result = federation.admin.download(job_id, folder / "download")
        assert status == COMPLETED
        _wait_for_what_clients_send_after_the_job(federation, tap)
        seen = _all_files(tap, federation.kits.kit("server"), result)
        seen += (federation.log("server")).read_bytes()
    rows = json.loads((result / "workspace" / "rounds.json").read_text())
    yield seen, rows


def _wait_for_what_clients_send_after_the_job(federation: Federation, tap: Path) -> None:
    """FLARE's client sends a job's error log once the job's process has ended, if it may."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        ended = ["child worker process finished" in federation.log(site).read_text() for site in SITES]
        if all(ended) and secret("exception", "open").encode() in _all_files(tap):
            return
        time.sleep(0.2)


def _all_files(*places: Path) -> bytes:
    paths = [path for place in places for path in sorted(place.rglob("*"))]
    return b"".join(path.read_bytes() for path in paths if path.is_file())


@pytest.mark.parametrize("way", WAYS)
def test_nothing_planted_leaves_a_site_with_its_policy(received: tuple[bytes, list[Any]], way: str) -> None:
    arrived = [mark for mark in ("open", "guarded") if secret(way, mark).encode() in received[0]]
    assert arrived == ["open"], "FLARE as it comes lets it out (else this shows nothing), the policy does not"


def test_reason_codes_arrive_instead(received: tuple[bytes, list[Any]]) -> None:
    _, rows = received
    refusals = [row["refused"].get(GUARDED) for row in rows]
    assert refusals == [
        None,  # what was planted beside the update was left out, the update itself is in order
        "REPLY_CHANGED",
        "REPLY_NOT_ALLOWED",
        "REPLY_NOT_ALLOWED",
        "REPLY_CHANGED",
    ]
    assert [HONEST in row["taking_part"] for row in rows] == [True] * ROUNDS
    assert not any(OPEN in row["taking_part"] for row in rows), "what no gate has stamped is not used"


def test_nothing_says_where_a_site_keeps_its_slides(received: tuple[bytes, list[Any]]) -> None:
    seen, _ = received
    for site in (HONEST, GUARDED):
        assert f"{site}/manifest.csv".encode() not in seen
        assert f"{site}/bags".encode() not in seen

"""What a site and a server make of the bytes of a job, in one process: the whole table, and mutations.

``hostile`` sends the same table to real processes.
"""

from __future__ import annotations

import io
import json
import time
import tracemalloc
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvflare.private.admin_defs import Message, MsgHeader, ReturnCode, ok_reply
from nvflare.private.defs import RequestHeader, TrainingTopic

from histoflare.errors import JobError
from histoflare.flare.application import (
    check_application,
    check_server_application,
    check_submission,
)
from histoflare.flare.closed_commands import CheckedProcessor
from histoflare.flare.job_files import CONFIG_FOLDER, check_files
from histoflare.flare.job_schema import check_tables

from .hostile.archives import FOUR, Around, Pack, entry, honest, hostile, inert, other_versions

JOB = Path(__file__).resolve().parents[2] / "jobs" / "mem_fedavg"
GOOD = honest(JOB / CONFIG_FOLDER)
META = json.loads((JOB / "meta.json").read_text())
AROUND = Around(Path("/nowhere/marker"), Path("/nowhere/bags/s3-1.h5"), "http://127.0.0.1:9")
SUBMITTED = Pack("job/app/", {"job/": b"", "job/meta.json": json.dumps(META).encode(), "job/app/": b""})
INERT = inert(GOOD, AROUND, Pack())
ID = str(uuid.UUID(int=13))
MOST_SECONDS = 10.0
"""For one archive, under a tracer of memory: without it a tenth."""
MOST_BYTES = 32 << 20


def meaning(body: bytes) -> tuple[Any, ...]:
    """Return what an application says to whoever reads it once it is unpacked."""
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert {name for name in archive.namelist() if not name.endswith("/")} == {
            f"config/{name}" for name in FOUR
        }
        job, protocol = check_files({name: archive.read(f"config/{name}") for name in FOUR})
    return job, check_tables(job, protocol)


def refused(check: Any, archive: Any, *more: Any) -> str:
    """Return the reason for which an archive is refused."""
    with pytest.raises(JobError) as caught:
        check(archive, *more)
    assert len(str(caught.value)) < 2000, "its log has an end"
    return caught.value.reason


@pytest.fixture
def bounded() -> Iterator[Callable[[], None]]:
    """Begin to measure, and return what holds all since it was called last to a bound on memory and time."""
    tracemalloc.start()
    began = [time.process_time(), tracemalloc.get_traced_memory()[0]]

    def hold() -> None:
        took, (now, peak) = time.process_time() - began[0], tracemalloc.get_traced_memory()
        assert took < MOST_SECONDS and peak - began[1] < MOST_BYTES
        tracemalloc.reset_peak()
        began[:] = time.process_time(), now

    yield hold
    tracemalloc.stop()


@pytest.fixture(scope="module")
def archives() -> dict[str, bytes]:
    """What nobody may take, alone; made where it is used, for it takes seconds."""
    return hostile(GOOD, AROUND, Pack())


@pytest.fixture(scope="module")
def submissions() -> dict[str, bytes]:
    """The same in a job's folder; made before memory is traced."""
    return hostile(GOOD, AROUND, SUBMITTED)


def test_no_site_takes_any_of_it(bounded: Callable[[], None], archives: dict[str, bytes]) -> None:
    for name, body in archives.items():
        assert refused(check_application, body) == "JOB_INVALID", name
        bounded()


def test_no_server_starts_it(archives: dict[str, bytes]) -> None:
    for name, body in archives.items():
        assert refused(check_server_application, body, "app") == "JOB_INVALID", name
        if not name.startswith(("config/start_model", "config/earlier_rounds")):
            assert refused(check_server_application, body, "app_server") == "JOB_INVALID", name


def test_no_server_takes_it(
    bounded: Callable[[], None], submissions: dict[str, bytes], tmp_path: Path
) -> None:
    for name, body in submissions.items():
        (tmp_path / "job.zip").write_bytes(body)
        for archive in (body, str(tmp_path / "job.zip")):
            assert refused(check_submission, archive) == "JOB_INVALID", name
            bounded()


@pytest.mark.parametrize("name", INERT)
def test_text_that_means_nothing_means_nothing(name: str) -> None:
    check_application(INERT[name])
    assert meaning(INERT[name]) == meaning(Pack()(GOOD))
    check_submission(inert(GOOD, AROUND, SUBMITTED)[name])


@pytest.mark.parametrize(("name", "body"), other_versions(GOOD).items())
def test_another_release_is_told_so(name: str, body: bytes) -> None:
    assert refused(check_application, body) == "JOB_VERSION"


@pytest.mark.parametrize(
    "body",
    [
        None,
        "",
        "PK",
        [],
        {},
        bytearray(Pack()(GOOD)),
        memoryview(Pack()(GOOD)),
        Path("/"),
        bytes(2 << 20) + Pack()(GOOD),
    ],
)
def test_only_bytes_are_an_archive(body: Any) -> None:
    assert refused(check_application, body) == "JOB_INVALID"


class Recording:
    """Stands in for FLARE's own processor: it notes what it is given, and leaves the job's folder."""

    def __init__(self) -> None:
        self.given: list[Message] = []

    def process(self, request: Message, engine: Any) -> Message:
        self.given.append(request)
        (Path(engine.args.workspace) / request.get_header(RequestHeader.JOB_ID)).mkdir()
        return ok_reply(body="deployed")


def deployed(kit: Path, body: Any, **headers: Any) -> tuple[Any, list[Message]]:
    """Deploy a body to a site in a folder; return what it answers, and what FLARE got to see."""
    request = Message(TrainingTopic.DEPLOY, body)
    said = {
        RequestHeader.JOB_ID: ID,
        RequestHeader.JOB_META: {**META, "job_id": ID},
        RequestHeader.APP_NAME: "app",
    }
    for name, value in {**said, **headers}.items():
        if value is not None:
            request.set_header(name, value)
    engine = SimpleNamespace(args=SimpleNamespace(workspace=str(kit)), get_client_name=lambda: "clinic")
    recording = Recording()
    reply = CheckedProcessor(recording).process(request, engine)  # type: ignore[arg-type]
    failed = reply is not None and reply.get_header(MsgHeader.RETURN_CODE) == ReturnCode.ERROR
    return (reply.body if failed else "OK"), recording.given


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    for folder in ("startup", "local"):
        (tmp_path / folder).mkdir()
    return tmp_path


LARGE: dict[str, Callable[[], Any]] = {
    "study": lambda: "x" * (2 << 20),
    "schedule_history": lambda: [0] * (2 << 20),
    "deploy_map": lambda: {str(n): [n] for n in range(1 << 20)},
}
"""Key → what makes a value for it that is too large, where it is used."""


def meta_of(name: str, metas: dict[str, Any]) -> Any:
    """Return one of ``metas``, or one that is too large."""
    key = name.removeprefix("too large: ")
    return metas[name] if key == name else {**META, "job_id": ID, key: LARGE[key]()}


METAS: dict[str, Any] = {
    "none": None,
    "a list": [META],
    "a text": "meta",
    "empty": {},
    **{
        f"{key}: {value!r}"[:60]: {**META, "job_id": ID, key: value}
        for key, value in [
            ("launcher_spec", {"default": {"docker": {"image": "x"}}}),
            ("launcher_spec", {}),
            ("stats_pool_config", {"save_pools": ["*"]}),
            ("custom_props", {"x": 1}),
            ("mandatory_clients", ["clinic"]),
            ("byoc", True),
            ("submit_token", "x"),
            ("resource_spec", {"clinic": {"num_of_gpus": 1}}),
            ("resource_spec", {"clinic": {"docker": {"image": "x"}}}),
            ("scope", "../open"),
            ("scope", ["open"]),
            ("scope", "x" * 65),
            ("scope", None),
            ("scope", "open\n"),
            ("name", "../x"),
            ("name", ""),
            ("name", "a b"),
            ("name", 5),
            ("study", b"x"),
            ("approvals", [AROUND]),
            ("job_id", "../../local"),
            ("job_id", str(uuid.UUID(int=14))),
            ("job_id", None),
            (5, 5),
            (("a",), 5),
        ]
    },
}


class TestDeploy:
    def test_an_honest_one_is_handed_on(self, kit: Path) -> None:
        said, given = deployed(kit, Pack()(GOOD))
        assert said == "OK" and len(given) == 1 and (kit / ID).is_dir()

    def test_nothing_of_a_hostile_one_is(self, kit: Path, archives: dict[str, bytes]) -> None:
        before = sorted(kit.rglob("*"))
        for name, body in archives.items():
            said, given = deployed(kit, body)
            assert (said, given) == ("JOB_INVALID", []), name
        assert sorted(kit.rglob("*")) == before

    @pytest.mark.parametrize("meta", [*METAS, *(f"too large: {key}" for key in LARGE)])
    def test_a_meta_that_asks_for_something(self, kit: Path, meta: str) -> None:
        headers = {RequestHeader.JOB_META: meta_of(meta, METAS)}
        assert deployed(kit, Pack()(GOOD), **headers) == ("JOB_INVALID", [])

    @pytest.mark.parametrize(
        "job_id",
        [
            *("local", "startup", "../x", "/tmp", "", ".", "..", "a/b", "x" * 36, f"{{{ID}}}", ID.upper()),
            *(
                f"urn:uuid:{ID}",
                ID.replace("-", ""),
                f"{ID}/",
                f" {ID}",
                f"{ID}\n",
                f"{ID}\0",
                5,
                True,
                [ID],
                None,
            ),
            ID.replace("d", "D"),
        ],
    )
    def test_an_id_that_is_a_path(self, kit: Path, job_id: Any) -> None:
        meta = {**META, "job_id": job_id}
        before = sorted(kit.rglob("*"))
        headers = {RequestHeader.JOB_ID: job_id, RequestHeader.JOB_META: meta}
        assert deployed(kit, Pack()(GOOD), **headers) == ("JOB_INVALID", [])
        assert sorted(kit.rglob("*")) == before

    @pytest.mark.parametrize("app", ["../x", "app_server", "x" * 100_000, "import os", ["app"], {}, None])
    def test_an_application_of_another_name(self, kit: Path, app: Any) -> None:
        """FLARE writes the name into a file of its own in the kit, as long as it is."""
        assert deployed(kit, Pack()(GOOD), **{RequestHeader.APP_NAME: app}) == ("JOB_INVALID", [])

    def test_a_refused_one_does_not_remove_an_earlier_job(
        self, kit: Path, archives: dict[str, bytes]
    ) -> None:
        (kit / ID).mkdir()
        assert deployed(kit, archives["nothing"])[0] == "JOB_INVALID" and (kit / ID).is_dir()


SUBMITTED_METAS = {
    **{name: meta for name, meta in METAS.items() if name[0] not in "5("},
    "deploy_map: a folder": {**META, "deploy_map": {"../app": ["@ALL"]}},
    "deploy_map: another": {**META, "deploy_map": {"app": ["@ALL"], "app2": ["x"]}},
    "deploy_map: a list": {**META, "deploy_map": ["app"]},
    "deploy_map: the server's to a site": {
        **META,
        "deploy_map": {"app": ["server"], "app_server": ["clinic"]},
    },
    "deploy_map: the server's to all": {**META, "deploy_map": {"app": [], "app_server": ["@ALL"]}},
    "deploy_map: none": {key: value for key, value in META.items() if key != "deploy_map"},
    "min_clients: another": {**META, "min_clients": 1},
    "min_clients: true": {**META, "min_clients": True},
    "a list of lists": [[[]]],
}


@pytest.mark.parametrize("meta", [*SUBMITTED_METAS, *(f"too large: {key}" for key in LARGE)])
def test_a_submission_whose_meta_asks_for_something(meta: str) -> None:
    said = json.dumps(meta_of(meta, SUBMITTED_METAS), default=repr).encode()
    pack = Pack("job/app/", {"job/": b"", "job/meta.json": said, "job/app/": b""})
    assert refused(check_submission, pack(GOOD)) == "JOB_INVALID"


@pytest.mark.parametrize(
    "name", ["meta.conf", "meta.yml", "META.JSON", "meta.json.default", "comm_config.json"]
)
def test_a_submission_with_more_beside_its_meta(name: str) -> None:
    more = {**SUBMITTED.more, f"job/{name}": b'include url("http://127.0.0.1:9")'}
    assert refused(check_submission, Pack("job/app/", more)(GOOD)) == "JOB_INVALID"
    less = {key: value for key, value in more.items() if key != "job/meta.json"}
    assert refused(check_submission, Pack("job/app/", less)(GOOD)) == "JOB_INVALID"


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good application with entries left out, doubled, renamed or changed, and bytes of all changed."""
    entries = [(entry(name), content) for name, content in GOOD.items()]
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(entries) - 1))
        info, content = entries[at]
        match draw(st.sampled_from(["drop", "twice", "rename", "cut", "insert", "flip"])):
            case "drop":
                del entries[at]
                if not entries:
                    break
            case "twice":
                entries.append(entries[at])
            case "rename":
                entries[at] = (entry(info.filename[:-1] + draw(st.characters(codec="utf-8"))), content)
            case "cut" if content:
                start = draw(st.integers(0, len(content) - 1))
                entries[at] = (info, content[:start] + content[start + draw(st.integers(1, 40)) :])
            case "insert" if content:
                where = draw(st.integers(0, len(content)))
                entries[at] = (
                    info,
                    content[:where] + draw(st.binary(min_size=1, max_size=20)) + content[where:],
                )
            case "flip" if content:
                where = draw(st.integers(0, len(content) - 1))
                flipped = content[where] ^ draw(st.integers(1, 255))
                entries[at] = (info, content[:where] + bytes([flipped]) + content[where + 1 :])
    body = bytearray(Pack()(entries))
    for _ in range(draw(st.integers(0, 3))):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body)


@given(mutated())
def test_a_mutated_job_is_refused_or_is_a_job(body: bytes) -> None:
    """Whatever is taken has the four files, JSON that is this package's, and tables within the schema."""
    try:
        check_application(body)
    except JobError as error:
        assert error.reason in ("JOB_INVALID", "JOB_VERSION")
        return
    job, protocol = meaning(body)
    assert job["kind"] in ("training", "evaluation") and set(protocol) <= {
        *("labels", "metric", "encoder", "max_patches", "network", "window_px", "mpp", "patch_px"),
        *("split", "stop"),
    }


@given(st.binary(max_size=300))
def test_no_bytes_do_anything_else(body: bytes) -> None:
    with pytest.raises(JobError):
        check_application(body)
    with pytest.raises(JobError):
        check_submission(body)

"""What a changed server sends to sites by itself: deployments, commands, and objects in all of them."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import msgpack
from nvflare.apis.fl_constant import ReservedTopic
from nvflare.fuel.f3.cellnet.defs import Encoding, MessageHeaderKey
from nvflare.fuel.f3.streaming.stream_const import StreamHeaderKey
from nvflare.private.admin_defs import MsgHeader, ReturnCode
from nvflare.private.defs import RequestHeader, SysCommandTopic, TrainingTopic

from .archives import Pack, falsely_signed, hostile, inert, other_versions
from .attack import SITES, Attack
from .objects import MAIN, objects, raw_messages, section

RAW = (
    *(("cellnet.channel", topic) for topic in ("process_info", "config_vars", "comm_config", "bulk")),
    *(("cellnet_agent", topic) for topic in ("process_info", "config_vars", "comm_config", "peers", "echo")),
    *(
        ("aux_communication", "x"),
        ("client_command", "show_stats"),
        ("client_main", "x"),
        ("no_channel", "x"),
    ),
)
"""Channel and topic of messages that no job needs."""


TAKEN_JOB = str(uuid.UUID(int=7))
"""An application that a site took and that nobody started."""

MORE_FILES = (" more", "link")
"""What is in the names of archives that bring more than a job has."""


def deploy_archives(made: Attack, good: dict[str, bytes]) -> None:
    """Deploy the whole table of archives."""
    made.deployed = made.deploy(hostile(good, made.around, Pack()) | falsely_signed(good, made.around))
    made.versions = made.deploy(other_versions(good))


def send_commands(made: Attack) -> None:
    """Send every command of FLARE's, for jobs that are none, and what goes to a site's process elsewhere."""
    made.commands = made.order(raw_commands(str(uuid.uuid4())), 2.0)


def send_objects(made: Attack) -> None:
    """Send objects and bytes that no message needs, to the processes of both sites."""
    made.note_pids()
    made.send_objects(with_objects(made) | raw(SITES[0], "admin") | raw(SITES[1], "admin"))
    made.await_answers()
    made.note_pids()


def deploy_what_means_nothing(made: Attack, good: dict[str, bytes]) -> None:
    made.taken = made.deploy(inert(good, made.around, Pack()))


def deploy_on_earlier_jobs(made: Attack, good: dict[str, bytes]) -> None:
    """Deploy archives as jobs that were here before: one that ran, one that was taken and never started."""
    (taken,) = made.deploy({"first": Pack()(good)}, TAKEN_JOB).values()
    assert taken[SITES[0]][0][MsgHeader.RETURN_CODE] == ReturnCode.OK
    more = hostile(good, made.around, Pack())
    few = {name: archive for name, archive in more.items() if any(part in name for part in MORE_FILES)}
    before = made.files()
    for job_id in (TAKEN_JOB, made.job_ids["before"]):
        said = made.deploy(few, job_id)
        made.built_on |= {f"{name}, {job_id}": each for name, each in said.items()}
    now = made.files()
    made.left |= {site: made.left[site] | (now[site] - before[site]) for site in SITES}


def raw_commands(job_id: str) -> dict[str, tuple[Any, ...]]:
    """Return name → a message of a changed server that is no deployment."""
    found: dict[str, tuple[Any, ...]] = {}
    topics = {
        value
        for group in (TrainingTopic, SysCommandTopic)
        for name, value in vars(group).items()
        if not name.startswith("_") and isinstance(value, str)
    }
    topics -= {TrainingTopic.SHUTDOWN, TrainingTopic.RESTART, TrainingTopic.DEPLOY}
    ids = {"none": None, "of no job": job_id, "a folder": "local", "a path": "../../etc", "a number": 5}
    for topic in sorted({*topics, "no.such.topic"}):
        for what, id_ in ids.items():
            headers = (
                {} if id_ is None else {RequestHeader.JOB_ID: id_, RequestHeader.JOB_META: {"job_id": id_}}
            )
            found[f"{topic}, job {what}"] = ("admin", topic, headers, "cat local/histoflare.toml")
    for site in SITES:
        for channel, topic in RAW:
            found[f"{site}: {channel}/{topic}"] = ("cell", site, channel, topic, {"x": "PLANTED"})
    return found


def with_objects(made: Attack) -> dict[str, tuple[Any, ...]]:
    """Return name → a message with an object in it that no message needs: in every part of a command."""
    found: dict[str, tuple[Any, ...]] = {}
    job_id = str(uuid.uuid4())
    for what, each in objects(made.notes(SITES[0]), made.federation.kits.kit(SITES[0])).items():
        names = {RequestHeader.JOB_ID: job_id, RequestHeader.APP_NAME: "app"}
        meta = {RequestHeader.JOB_META: {"job_id": job_id, "name": each}}
        found[f"{what}, deployed"] = ("admin", TrainingTopic.DEPLOY, {**names, **meta}, each)
        found[f"{what}, started"] = ("admin", TrainingTopic.START_JOB, {**names, **meta}, "")
        found[f"{what}, in a header"] = ("admin", TrainingTopic.CHECK_STATUS, {"x": each}, "")
        for site in SITES:
            found[f"{what}, to {site}"] = ("cell", site, "admin", "x", each)
            found[f"{what}, to {site} elsewhere"] = ("cell", site, "aux_communication", "x", each)
    return found


def raw(target: str, channel: str) -> dict[str, tuple[Any, ...]]:
    """Return name → bytes for a process of a site, as they are."""
    encoded = {MessageHeaderKey.PAYLOAD_ENCODING: Encoding.FOBS}
    return {
        f"{what}, {target}": ("cell", target, channel, "x", content, encoded)
        for what, content in raw_messages(Path("/")).items()
    }


def to_a_job(made: Attack, job_id: str) -> dict[str, tuple[Any, ...]]:
    """Return name → a message for a job's processes with an object in it that no message needs."""
    found: dict[str, tuple[Any, ...]] = {}
    channel, topic = "aux_communication", ReservedTopic.END_RUN
    for site in SITES:
        target = f"{site}.{job_id}"
        found |= raw(target, channel)
        for what, each in objects(made.notes(site), made.federation.kits.kit(site)).items():
            found[f"{what}, to a job of {site}"] = ("cell", target, channel, "x", each)
            encoded = {StreamHeaderKey.PAYLOAD_ENCODING: Encoding.FOBS}
            content = section(MAIN, msgpack.packb(each))
            found[f"{what}, streamed to a job of {site}"] = (
                "stream",
                target,
                channel,
                topic,
                content,
                encoded,
            )
    return found

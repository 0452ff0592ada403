"""A model in one file, as every writer leaves it and every reader opens it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from histoflare.bags.task import BagTask
from histoflare.errors import JobError
from histoflare.masks.task import MaskTask
from histoflare.model_file import (
    ENTRY,
    LARGEST_HEADER_BYTES,
    PLACES,
    describe_model,
    read_model_file,
    read_model_header,
    save_model,
    write_model_file,
)
from tests.refusals import raises_reason

from .mem import make_mem_task

TASK = make_mem_task(["benign", "tumour"], "toy:1", features=6, memories=3, dim=4, hidden=8, seed=2)
MOSAIC = {"mpp": 0.5, "patch_px": 1000}
TRAINING = {"strategy": "fedavg", "rounds": 5, "seed": 0}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    state = TASK.build_model().state_dict()
    save_model(path, state, TASK, mosaic=MOSAIC, protocol_sha256="ab" * 32, training=TRAINING)
    return path


def rewrite(path: Path, metadata: dict[str, str] | None, **tensors: torch.Tensor) -> None:
    state = {**safetensors.torch.load(path.read_bytes()), **tensors}
    path.write_bytes(safetensors.torch.save(state, metadata=metadata))


def header(**changes: Any) -> dict[str, str]:
    return {ENTRY: json.dumps({**describe_model(TASK), **changes})}


def test_what_goes_in_comes_out(written: Path) -> None:
    loaded = read_model_file(written, BagTask)
    told = loaded.header
    assert (loaded.task, told.mosaic, told.training, told.data) == (TASK, MOSAIC, TRAINING, "bags")
    assert (told.protocol_sha256, told.run, told.round) == ("ab" * 32, None, None)
    model = TASK.build_model()
    assert list(loaded.state) == list(model.state_dict())
    bag = torch.randn(1, 5, 6)
    assert torch.equal(loaded.build_model()(bag), model(bag))
    assert not loaded.build_model().training


def test_anyone_can_open_it(written: Path) -> None:
    with safetensors.safe_open(written, framework="np") as opened:
        (text,) = opened.metadata().values()
        fields = json.loads(text)
        assert (fields["model"], fields["encoder"], fields["labels"]) == (
            "mem",
            "toy:1",
            ["benign", "tumour"],
        )
        assert fields["mosaic"] == MOSAIC and fields["protocol_sha256"] == "ab" * 32
        assert set(opened.keys()) == set(TASK.build_model().state_dict())


def test_a_federation_s_model_opens_without_what_its_strategy_keeps(tmp_path: Path) -> None:
    state = {**TASK.build_model().state_dict(), "strategy/momentum": torch.ones(3)}
    facts = describe_model(TASK, mosaic=TASK.mosaic, run="run-1", round_index=4)
    download = tmp_path / "4c1f" / "workspace"
    write_model_file(download / "global_model.safetensors", state, facts)
    for named in (download / "global_model.safetensors", download, download.parent):
        loaded = read_model_file(named, BagTask)
        assert (loaded.header.run, loaded.header.round, loaded.header.mosaic) == ("run-1", 4, MOSAIC)
        assert set(loaded.state) == set(TASK.build_model().state_dict())


def test_a_folder_s_own_model_comes_before_a_server_s(written: Path) -> None:
    (written.parent / PLACES[1]).write_bytes(b"not this one")
    assert read_model_header(written.parent).path == written


def test_a_header_is_read_without_pytorch(written: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from histoflare.model_file import read_model_header;"
        f"print(read_model_header(Path({str(written)!r})).labels, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['benign', 'tumour'] False"


@pytest.mark.parametrize("entry", ["histoflare-masks", "histoflare.global_model"])
def test_an_earlier_version_s_segmentation_still_opens(tmp_path: Path, entry: str) -> None:
    task = MaskTask(labels=("a", "b"), width=24, window_px=32, stride_px=32, patch_px=32)
    save_model(tmp_path / "m", task.build_model().state_dict(), task)
    fields = {"format": entry, "version": 1, "task": task.to_json(), "round": 3, "run": "r"}
    rewrite(tmp_path / "m", {entry: json.dumps(fields)})
    loaded = read_model_file(tmp_path / "m", MaskTask)
    assert (loaded.task, loaded.header.mosaic) == (task, None)


@pytest.mark.parametrize("entry", ["histoflare-mem", "histoflare.global_model", ENTRY])
def test_a_model_of_before_models_had_names_is_refused(written: Path, entry: str) -> None:
    said = TASK.to_json()
    flat = {name: value for name, value in said.items() if name != "model"} | said["model"]
    rewrite(written, {entry: json.dumps({"version": 2, "task": flat})})
    with pytest.raises(JobError) as caught:
        read_model_file(written, BagTask)
    assert caught.value.reason == "MODEL_FILE_INVALID"


def with_model(**settings: Any) -> dict[str, Any]:
    said = TASK.to_json()
    return {**said, "model": {**said["model"], **settings}}


def test_a_model_of_the_other_kind_says_which_command_takes_it(written: Path, tmp_path: Path) -> None:
    with raises_reason("MODEL_FILE_INVALID", written, "histoflare classify"):
        read_model_file(written, MaskTask)
    task = MaskTask(labels=("a", "b"), width=24, window_px=32, stride_px=32, patch_px=32)
    save_model(tmp_path / "m", task.build_model().state_dict(), task)
    assert read_model_header(tmp_path / "m").data == "images"
    with raises_reason("MODEL_FILE_INVALID", tmp_path / "m", "histoflare segment"):
        read_model_file(tmp_path / "m", BagTask)


def test_a_header_has_an_end(written: Path, tmp_path: Path) -> None:
    long = describe_model(TASK, training={"notes": "x" * LARGEST_HEADER_BYTES})
    with raises_reason("JOB_INVALID", tmp_path / "long", LARGEST_HEADER_BYTES):
        write_model_file(tmp_path / "long", {}, long)
    rewrite(written, {ENTRY: json.dumps(long)})
    with raises_reason("MODEL_FILE_INVALID", written):
        read_model_header(written)
    written.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with raises_reason("MODEL_FILE_INVALID", written):
        read_model_header(written)


def test_the_same_model_is_the_same_bytes(written: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    state = dict(reversed(TASK.build_model().state_dict().items()))
    mosaic = dict(reversed(MOSAIC.items()))
    save_model(again, state, TASK, mosaic=mosaic, protocol_sha256="ab" * 32, training=TRAINING)
    assert again.read_bytes() == written.read_bytes()


def test_a_state_that_is_not_the_tasks_is_not_written(tmp_path: Path) -> None:
    state = TASK.build_model().state_dict()
    wrong = {
        "missing": {name: tensor for name, tensor in state.items() if name != "head.bias"},
        "shape": {**state, "head.bias": torch.zeros(3)},
        "extra": {**state, "extra": torch.zeros(1)},
        "nan": {**state, "head.bias": torch.full((2,), float("nan"))},
    }
    for name, bad in wrong.items():
        with raises_reason("MODEL_FILE_INVALID", name, "extra" if name == "extra" else "head.bias"):
            save_model(tmp_path / name, bad, TASK)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_model_say_why(written: Path, tmp_path: Path) -> None:
    with raises_reason("MODEL_FILE_MISSING", tmp_path / "absent"):
        read_model_file(tmp_path / "absent", BagTask)
    (tmp_path / "empty").mkdir()
    with raises_reason("MODEL_FILE_MISSING", tmp_path / "empty", "global_model.safetensors"):
        read_model_file(tmp_path / "empty", BagTask)
    whole = written.read_bytes()
    faults: list[tuple[Any, str]] = [
        (lambda: written.write_bytes(whole[: len(whole) // 2]), "model.safetensors"),
        (lambda: written.write_bytes(b""), "model.safetensors"),
        (lambda: written.write_text("not a model"), "model.safetensors"),
        (lambda: rewrite(written, None), "histoflare"),
        (lambda: rewrite(written, {"format": "pt"}), "histoflare"),
        (lambda: rewrite(written, {ENTRY: "{"}), "JSON"),
        (lambda: rewrite(written, {ENTRY: "[" * 100_000}), "JSON"),
        (lambda: rewrite(written, {ENTRY: "7"}), "JSON"),
        (lambda: rewrite(written, header(version=3)), "version 3"),
        (lambda: rewrite(written, header(task=None)), "task"),
        (lambda: rewrite(written, header(mosaic=[1])), "mosaic"),
        (lambda: rewrite(written, header(round="one")), "round"),
        (lambda: rewrite(written, header(training=[1])), "training"),
        (lambda: rewrite(written, header(task=with_model(hidden=9))), "head.weight"),
        (lambda: rewrite(written, header(task=with_model(memories=0))), "memories"),
        (lambda: rewrite(written, header(), **{"head.bias": torch.zeros(3)}), "head.bias"),
    ]
    for spoil, says in faults:
        written.write_bytes(whole)
        spoil()
        with raises_reason("JOB_INVALID" if says == "memories" else "MODEL_FILE_INVALID", says):
            read_model_file(written, BagTask)

"""Nothing that is read is ever written over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from histoflare.cli import app
from histoflare.commands.outputs import check_outputs
from histoflare.errors import JobError
from histoflare.flare.job import read_job
from histoflare.model_file import describe_model, write_model_file
from histoflare.slides.mosaic import MosaicParameters
from tests.refusals import raises_reason


def test_an_output_is_no_input_no_folder_and_no_other_output(tmp_path: Path) -> None:
    slide, model, folder = tmp_path / "a.svs", tmp_path / "m.safetensors", tmp_path / "dicom"
    slide.touch()
    model.touch()
    folder.mkdir()
    check_outputs([tmp_path / "out.tiff", None, tmp_path / "new" / "o.png"], [slide, model, folder])
    (tmp_path / "link").symlink_to(slide)
    for outputs in (
        [slide],
        [tmp_path / "dicom" / ".." / "a.svs"],
        [tmp_path / "link"],
        [None, model],
        [folder],
        [folder / "1.dcm"],
        [tmp_path / "out.tiff", tmp_path / "out.tiff"],
    ):
        with raises_reason("JOB_INVALID", outputs[-1]):
            check_outputs(outputs, [slide, model, folder])


@pytest.mark.parametrize(
    "arguments",
    [
        ["segment", "SLIDE", "--model", "MODEL", "--out", "SLIDE"],
        ["segment", "SLIDE", "--model", "MODEL", "--out", "x.tiff", "--overlay", "SLIDE"],
        ["segment", "SLIDE", "--model", "MODEL", "--out", "x.tiff", "--geojson", "MODEL"],
        ["segment", "SLIDE", "--model", "MODEL", "--out", "x.tiff", "--geojson", "x.tiff"],
        ["classify", "SLIDE", "--model", "MODEL", "--heatmap", "SLIDE"],
        ["masks", "pretrained", "jobs/dhunet_fedavg", "--swin", "MODEL", "--out", "MODEL"],
    ],
)
def test_a_command_leaves_what_it_reads(tmp_path: Path, repository: Path, arguments: list[str]) -> None:
    files = {"SLIDE": tmp_path / "a.svs", "MODEL": tmp_path / "m.safetensors"}
    files["SLIDE"].write_bytes(b"dear")
    job = "mem_fedavg" if arguments[0] == "classify" else "dhunet_fedavg"
    mosaic = MosaicParameters().to_json() if arguments[0] == "classify" else None
    header = describe_model(read_job(repository / "jobs" / job).task, mosaic=mosaic)
    write_model_file(files["MODEL"], {"weight": torch.zeros(1)}, header)
    before = {name: file.read_bytes() for name, file in files.items()}
    given = [
        str(files.get(each, repository / each if each.startswith("jobs/") else each)) for each in arguments
    ]
    result = CliRunner().invoke(app, [each if each != "x.tiff" else str(tmp_path / each) for each in given])
    assert isinstance(result.exception, JobError) and "give" in str(result.exception)
    assert {name: file.read_bytes() for name, file in files.items()} == before

"""One place makes a job fit the data that are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from histoflare.flare.job import read_job
from histoflare.flare.job_choice import choose_job
from histoflare.flare.job_variant import write_variant
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.found_data import FoundData, Patches
from histoflare.site.kinds import BAGS, IMAGES
from tests.flare.bags_on_disk import relabel, write_site
from tests.refusals import raises_reason

SHIPPED = Patches("densenet121-random:v1", 1024, 224, 0.5)


@pytest.fixture
def mem(repository: Path) -> Path:
    return repository / "jobs" / "mem_fedavg"


def test_what_fits_stays_as_it_is(mem: Path, tmp_path: Path) -> None:
    found = BAGS.find({"a": write_site(tmp_path, "a"), "b": write_site(tmp_path, "b")})
    assert found == FoundData(("glandular", "solid"), SHIPPED)
    choice = choose_job(mem, found=found)
    assert choice.fitted == choice.changes == {} and choice.say_fitted() == ""


def test_labels_encoder_and_patches_are_those_of_most_bags(mem: Path, tmp_path: Path) -> None:
    sites = {
        "a": relabel(write_site(tmp_path, "a", encoder="imported:uni", features=64), "LUAD", "LUSC"),
        "b": relabel(write_site(tmp_path, "b", encoder="imported:uni", features=64), "LUAD"),
        "odd": relabel(write_site(tmp_path, "odd", slides=5), "LUSC"),
    }
    choice = choose_job(mem, found=BAGS.find(sites))
    assert choice.fitted == {
        "protocol.labels": ["LUAD", "LUSC"],
        "protocol.encoder": "imported:uni",
        "task.features": 64,
    }
    task = read_job(write_variant(mem, tmp_path / "job", choice.changes)).task
    assert (task.labels, task.encoder, task.features) == (("LUAD", "LUSC"), "imported:uni", 64)
    assert "protocol.labels = LUAD, LUSC" in choice.say_fitted()


@pytest.mark.parametrize(
    ("there", "changes"),
    [
        (replace(SHIPPED, mpp=0.5024), {}),
        (replace(SHIPPED, mpp=1.0, patch_px=112), {"protocol.mpp": 1.0, "protocol.patch_px": 112}),
        (replace(SHIPPED, mpp=None, patch_px=None), {"protocol.mpp": None, "protocol.patch_px": None}),
        (replace(SHIPPED, features=384), {"task.features": 384}),
        (None, {}),
    ],
)
def test_patches(mem: Path, there: Patches | None, changes: dict[str, Any]) -> None:
    assert choose_job(mem, found=FoundData(("solid",), there)).fitted == changes


def test_a_label_that_may_be_mistyped_is_said_with_its_site(mem: Path, tmp_path: Path) -> None:
    sites = {name: write_site(tmp_path, name) for name in ("a", "b")}
    assert choose_job(mem, found=BAGS.find(sites)).doubt == ""
    manifest = sites["b"].files["manifest"]
    assert manifest is not None
    manifest.write_text(manifest.read_text().replace("solid", "soild", 1))
    doubt = choose_job(mem, found=BAGS.find(sites)).doubt
    assert doubt.endswith("mistyped:\n  soild: 1 slide at b")
    named = ['protocol.labels=["glandular", "solid", "soild"]']
    assert choose_job(mem, None, named, BAGS.find(sites)).doubt == ""
    others = {"a": relabel(sites["a"], "LUAD", "LUSC"), "b": relabel(sites["b"], "LUAD")}
    assert choose_job(mem, found=BAGS.find(others)).doubt.endswith(":\n  LUSC: 5 slides at a")


def test_labels_in_two_spellings_are_no_classes_unless_the_job_names_its_own(
    mem: Path, tmp_path: Path
) -> None:
    sites = {
        "a": relabel(write_site(tmp_path, "a"), "LUAD", "LUSC"),
        "b": relabel(write_site(tmp_path, "b"), "luad", "LUSC"),
    }
    found = BAGS.find(sites)
    with raises_reason("JOB_INVALID", "LUAD at a; luad at b"):
        choose_job(mem, found=found)
    named = ['protocol.labels=["LUAD", "LUSC"]']
    assert choose_job(mem, None, named, found).changes["protocol.labels"] == ["LUAD", "LUSC"]


def test_a_setting_comes_before_the_data_and_the_data_before_a_preset(repository: Path) -> None:
    folder = repository / "jobs" / "mem_dpsgd"
    found = FoundData(("x", "y"), replace(SHIPPED, patch_px=112, mpp=1.0))
    choice = choose_job(folder, "adnan", ["task.patch_px=64", 'protocol.labels=["y","x"]'], found)
    assert (choice.job.task.patch_px, choice.job.task.mpp, list(choice.job.task.labels)) == (
        64,
        1.0,
        ["y", "x"],
    )
    assert choice.job.rounds == 116 and choice.job.folder == folder
    assert choice.fitted == {"protocol.mpp": 1.0, "protocol.encoder": SHIPPED.encoder}


def test_images_that_agree_on_a_resolution(repository: Path, tmp_path: Path) -> None:
    def site(name: str, *mpps: object) -> SiteConfiguration:
        rows = [f"{name}{i}.png,{name}{i}m.png,p{i},{mpp}" for i, mpp in enumerate(mpps)]
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join(["image,mask,patient,mpp", *rows]) + "\n")
        return SiteConfiguration({"images": path})

    folder = repository / "jobs" / "dhunet_fedavg"
    same = IMAGES.find({"a": site("a", 0.25, 0.25), "b": site("b", 0.2505)})
    assert choose_job(folder, found=same).fitted == {"protocol.mpp": 0.25}
    unsaid = IMAGES.find({"a": site("a", 0.25), "d": site("d", "")})
    assert choose_job(folder, found=unsaid).fitted == {"protocol.mpp": 0.25}
    for others in ({"a": site("a", 0.25), "c": site("c", 0.5)}, {"d": site("d", "")}):
        assert choose_job(folder, found=IMAGES.find(others)).fitted == {}
    apart = {"a": site("a", 0.25), "c": site("c", 0.5)}
    with raises_reason("COHORT_INVALID", "a: 0.25; c: 0.5"):
        IMAGES.check_resolutions(read_job(folder).task, apart)
    named = choose_job(folder, None, ["protocol.mpp=0.5"], IMAGES.find(apart))
    IMAGES.check_resolutions(named.job.task, apart)  # each site is then held to it


def test_one_label_everywhere_is_nothing_to_tell_apart(mem: Path) -> None:
    with raises_reason("JOB_INVALID", "'LUAD'", "protocol.labels"):
        choose_job(mem, found=FoundData(("LUAD",), SHIPPED))
    assert choose_job(mem, found=FoundData(("solid",), SHIPPED)).fitted == {}

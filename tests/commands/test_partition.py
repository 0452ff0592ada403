"""``histoflare manifest partition``: manifests, bags and images of one collection, dealt out to sites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from histoflare.bags.bag import BAG_VERSION, Bag, BagHeader, read_bag
from histoflare.bags.cohort import load_cohort
from histoflare.bags.folder import RowResult, bag_path, save_bag, save_left_out
from histoflare.bags.targets.classes import Classes
from histoflare.cli import app
from histoflare.errors import ManifestError
from histoflare.lab.sites import find_sites
from histoflare.masks.image_manifest import read_image_manifest
from histoflare.site.kinds import IMAGES
from histoflare.slides.manifest import read_manifest
from tests.refusals import raises_reason

from ..masks.made import make_site


def run(*arguments: object) -> Result:
    done = CliRunner().invoke(app, ["manifest", "partition", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def found(*arguments: object) -> dict[str, Any]:
    sites: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)["sites"]
    return sites


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    (tmp_path / "all").mkdir()
    path = tmp_path / "all" / "manifest.csv"
    rows = [f"slides/s{i}.svs,p{i // 2},{'ab'[i // 2 % 2]}" for i in range(24)]
    path.write_text("\n".join(["slide,patient,label", *rows]) + "\n")
    return path


@pytest.fixture
def bags(manifest: Path) -> Path:
    folder = manifest.parent / "bags"
    folder.mkdir()
    read = read_manifest(manifest, check_files=False)
    for number, row in enumerate(read.rows[1:]):
        header = BagHeader(BAG_VERSION, None, 0, 0, None, "enc:1", 4, "test", 0.5, 64, 64)
        bag = Bag(header, np.full((3, 4), number, np.float32), np.zeros((3, 2), np.int64))
        save_bag(bag_path(folder, read.row_id(row)), bag)
    save_left_out(folder, [RowResult(read.row_id(read.rows[0]), 2, "s0", "skipped", reason="NO_TISSUE")])
    return folder


def test_sites_read_what_was_dealt_with_bags_that_are_links(
    manifest: Path, bags: Path, tmp_path: Path
) -> None:
    out = tmp_path / "three"
    sites = found(manifest, "--sites", 3, "--bags", bags, "--out", out)
    assert [entry["patients"] for entry in sites.values()] == [4, 4, 4]
    folder = find_sites(out)
    assert list(folder.sites) == list(sites) and not folder.external
    first = read_manifest(manifest, check_files=False)
    whole = {row.slide.resolve(): first.row_id(row) for row in first.rows}
    records = 0
    for site, path in folder.sites.items():
        dealt = read_manifest(path, check_files=False)
        cohort = load_cohort(site, dealt, path.parent / "bags", Classes(("a", "b")), "enc:1")
        records += len(cohort.records)
        for row in dealt.rows:
            lying = bag_path(bags, whole[row.slide.resolve()])
            link = bag_path(path.parent / "bags", dealt.row_id(row))
            assert lying.exists() == link.is_symlink()
            if link.exists():
                assert link.resolve() == lying.resolve()
                np.testing.assert_array_equal(read_bag(link).features, read_bag(lying).features)
    assert records == 23, "one slide has no bag, and 'prepare' said why"


def test_a_folder_of_sites_with_its_folder_of_bags_is_a_collection(
    manifest: Path, bags: Path, tmp_path: Path
) -> None:
    run(manifest, "--sites", 3, "--bags", bags, "--out", tmp_path / "three")
    made = tmp_path / "made"
    for site in ("hospital-1", "hospital-2", "hospital-3"):
        (made / site).parent.mkdir(exist_ok=True)
        (tmp_path / "three" / site / "bags").rename(made / site)
    (tmp_path / "three" / "external.csv").write_text("slide,patient,label\ne.svs,e,a\n")
    out = tmp_path / "two"
    done = run(tmp_path / "three", "--sites", 2, "--bags", made, "--out", out, "--json")
    sites = json.loads(done.stdout)["sites"]
    assert sum(entry["rows"] for entry in sites.values()) == 24 and "external" in done.stderr
    links = list(out.glob("*/bags/*.h5"))
    assert len(links) == 23 and all(link.exists() for link in links)


def test_a_slide_without_a_bag_is_named_and_nothing_is_written(
    manifest: Path, bags: Path, tmp_path: Path
) -> None:
    next(bags.glob("s5-*.h5")).unlink()
    with raises_reason("BAG_MISSING", "line 7: ", bags / "s5-"):
        run(manifest, "--sites", 3, "--bags", bags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_poor_sites_are_said(manifest: Path, tmp_path: Path) -> None:
    done = run(manifest, "--sites", 12, "--out", tmp_path / "twelve")
    assert "warning: hospital-1: no test patients" in done.stderr.replace("\n", " ")
    sites = found(manifest, "--sites", 9, "--non-iid", "--seed", 1, "--out", tmp_path / "nine")
    empty = [site for site, entry in sites.items() if entry["patients"] == 0]
    assert empty and all("no patient fell to it" in sites[site]["warnings"][0] for site in empty)
    assert set(find_sites(tmp_path / "nine").sites) == set(sites) - set(empty)
    assert sum(entry["patients"] for entry in sites.values()) == 12


def test_without_a_split_the_protocol_decides(manifest: Path, tmp_path: Path) -> None:
    sites = found(manifest, "--sites", 2, "--no-split", "--out", tmp_path / "two")
    assert all(list(entry["splits"]) == ["none"] for entry in sites.values())
    assert "split" not in (tmp_path / "two" / "hospital-1" / "manifest.csv").read_text().splitlines()[0]


def test_several_manifests_are_one_collection(manifest: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "north.csv"
    other.parent.mkdir()
    other.write_text("slide,patient,label\nn0.svs,p0,a\nn1.svs,q1,b\n")
    done = run(manifest, other, "--sites", 2, "--out", tmp_path / "two", "--json")
    assert "1 names of patients are in several manifests" in done.stderr.replace("\n", " ")
    assert sum(entry["patients"] for entry in json.loads(done.stdout)["sites"].values()) == 13
    with raises_reason("MANIFEST_INVALID", "line 2: ", "s0.svs"):
        run(manifest, manifest, "--sites", 2, "--out", tmp_path / "no")


def test_a_fault_between_manifests_names_the_file_of_each_row(tmp_path: Path) -> None:
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    first.write_text("slide,patient,label,split\na.svs,p,x,train\nb.svs,q,x,test\n")
    second.write_text("slide,patient,label,split\nc.svs,r,x,train\nd.svs,p,x,test\n")
    with pytest.raises(ManifestError) as caught:
        run(first, second, "--sites", 2, "--out", tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.startswith(f"{second}, line 3: patient p is in 'test' here")
    assert f"in {first}, line 2;" in problem and str(first) not in str(caught.value).split("\n")[0]
    second.write_text("slide,patient,label\nc.svs,r,x\n")
    with pytest.raises(ManifestError) as caught:
        run(first, second, "--sites", 2, "--out", tmp_path / "out")
    assert list(caught.value.problems) == [f"{second}, line 2: no split"]


def test_a_folder_with_other_sites_is_left_alone(manifest: Path, tmp_path: Path) -> None:
    run(manifest, "--sites", 4, "--out", tmp_path / "out")
    with raises_reason("JOB_INVALID", tmp_path / "out"):
        run(manifest, "--sites", 2, "--out", tmp_path / "out")


def test_images_with_masks_are_dealt_too(tmp_path: Path) -> None:
    images = make_site(tmp_path / "all")
    sites = found(images, "--sites", 2, "--out", tmp_path / "two")
    assert [entry["patients"] for entry in sites.values()] == [3, 3]
    dealt = [read_image_manifest(path) for path in find_sites(tmp_path / "two", IMAGES).sites.values()]
    before = {
        row.image.resolve(): (row.mask.resolve(), row.split) for row in read_image_manifest(images).rows
    }
    after = {row.image.resolve(): (row.mask.resolve(), row.split) for each in dealt for row in each.rows}
    assert before == after
    for number, (change, encoding) in enumerate(
        [
            (lambda text: text.replace(",", "\t"), "utf-8"),
            (lambda text: "sep=;\n" + text.replace(",", ";"), "utf-8"),
            (lambda text: text.replace("image", "Image", 1), "utf-16"),
        ]
    ):
        written = images.with_name(f"as-{number}.csv")
        written.write_text(change(images.read_text()), encoding=encoding)
        assert len(found(written, "--sites", 2, "--out", tmp_path / f"{number}")) == 2
    with raises_reason("JOB_INVALID"):
        run(images, "--sites", 2, "--bags", tmp_path, "--out", tmp_path / "no")

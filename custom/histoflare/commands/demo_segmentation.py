"""``histoflare demo --task segmentation``: generated images, a federated DHUnet, its masks and a report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from histoflare.commands.console import progress, say_fitted, watch_on
from histoflare.errors import JobError
from histoflare.flare.job import Job, read_job
from histoflare.flare.job_choice import choose_job
from histoflare.flare.job_variant import write_variant
from histoflare.lab.earlier_run import claim_output
from histoflare.lab.experiment import Experiment, Runtime
from histoflare.lab.generated import draw_generated
from histoflare.lab.pages import write_site_pages
from histoflare.lab.run import PAGE_FILE, Outcome, run_watched
from histoflare.lab.sites import find_sites
from histoflare.lab.watch import Watch
from histoflare.masks.importers import MANIFEST
from histoflare.report.page import write_page
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.kinds import IMAGES
from histoflare.synthetic.image_files import make_images
from histoflare.synthetic.images import SyntheticImages, plan_images

if TYPE_CHECKING:
    from rich.progress import Progress

JOB = Path("dhunet_fedavg")
PRESET = "generated-nuclei"
GENERATED = SyntheticImages(patients=16, images_per_patient=1, side_px=128, stain_power=4.0)
"""Four hospitals, 10 patients of each for training and 6 for testing. Their stains differ much, so that a
hospital's own model has seen little of what the others have."""


def run_segmentation_demo(
    out_dir: Path,
    images: Path | None,
    job: Path,
    preset: str | None,
    runtime: Runtime,
    device: str,
    changes: Mapping[str, Any],
) -> tuple[Outcome, list[Path], Watch]:
    """Train, compare, and write the report, its page and each site's page.

    Args:
        out_dir: Folder for everything that is made.
        images: Folder with one ``<site>/images.csv`` per site; None: images are generated.
        job, preset: The job folder, and its preset.
        device: Where models run.
        changes: Variables of the job and their values; None: as it has them.

    Returns:
        What came out, the sites' pages, and what took how long.
    """
    generated = images is None
    with progress() as bars:
        watch = watch_on(bars)
        if images is None:
            images = out_dir / "images"
            with watch.phase("make images"):
                _make(images, bars)
        found = find_sites(images, IMAGES)
        claim_output(out_dir, {"task": "segmentation", "sites": found.to_json()})

        def configure(manifests: Mapping[str, Path], **settings: Any) -> dict[str, SiteConfiguration]:
            records = (out_dir / "records").resolve()
            return {
                name: IMAGES.configure(name, path, None, records=records / name, device=device, **settings)
                for name, path in manifests.items()
            }

        sites = configure(found.sites)
        experiment = Experiment(
            job=_write_job(job, preset, sites, out_dir / "job", changes),
            sites=sites,
            external=configure(found.external, evaluation_only=True),
            runtime=runtime,
            device=device,
        )
        outcome = run_watched(experiment, out_dir, watch, ())
        if generated:
            write_page(outcome.report, out_dir / PAGE_FILE, draw_generated(GENERATED, experiment, outcome))
        pages = write_site_pages(experiment, outcome, out_dir, watch)
    return outcome, pages, watch


def _make(folder: Path, bars: Progress) -> None:
    planned = plan_images(GENERATED)
    there = all((folder / site / MANIFEST).exists() for site in {image.site for image in planned})
    if there and len(list(folder.glob("*/images/*.png"))) == len(planned):
        return
    bar = bars.add_task("make images", total=len(planned))
    make_images(folder, GENERATED, progress=lambda done, total: bars.update(bar, completed=done, total=total))


def _write_job(
    folder: Path,
    preset: str | None,
    sites: Mapping[str, SiteConfiguration],
    jobs: Path,
    changes: Mapping[str, Any],
) -> Job:
    """Return the job, fitted to the images that are there."""
    IMAGES.expect(read_job(folder).task, f"{folder}: no job of segmentation; jobs/dhunet_fedavg is one.")
    choice = choose_job(folder, preset, found=IMAGES.find(sites), changes=changes)
    say_fitted(choice)
    if folder.parent.resolve() == jobs.resolve():
        raise JobError(
            f"{folder}: this command writes its jobs to {jobs}; copy yours to another folder first."
        )
    shutil.rmtree(jobs / folder.name, ignore_errors=True)
    return read_job(write_variant(folder, jobs / folder.name, choice.changes, scope=choice.scope))

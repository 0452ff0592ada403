"""The demo of segmentation: generated images, a federated DHUnet, its masks and a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from histoflare.flare.job import read_job
from histoflare.flare.job_choice import choose_job
from histoflare.lab.earlier_run import claim_output
from histoflare.lab.experiment import Experiment, Runtime
from histoflare.lab.fitted_job import JOBS_FOLDER, OnChoice, refuse_written, write_chosen
from histoflare.lab.generated import draw_generated
from histoflare.lab.pages import write_site_pages
from histoflare.lab.run import PAGE_FILE, Outcome, run_watched
from histoflare.lab.sites import find_sites
from histoflare.lab.watch import Watch
from histoflare.masks.importers import MANIFEST
from histoflare.report.page import write_page
from histoflare.site.kinds import IMAGES
from histoflare.synthetic.image_files import make_images
from histoflare.synthetic.images import SyntheticImages, plan_images

JOB = Path("dhunet_fedavg")
PRESET = "generated-nuclei"
GENERATED = SyntheticImages(patients=16, images_per_patient=1, side_px=128, stain_power=4.0)
"""Four hospitals, 10 patients of each for training and 6 for testing. Their stains differ much, so that a
hospital's own model has seen little of what the others have."""


def run_segmentation_demo(
    out: Path,
    images: Path | None,
    job: Path,
    preset: str | None,
    runtime: Runtime,
    device: str,
    changes: Mapping[str, Any],
    watch: Watch,
    on_choice: OnChoice,
) -> tuple[Outcome, list[Path]]:
    """Train, compare, and write the report, its page and each site's page.

    Args:
        out: Folder for everything that is made.
        images: Folder with one ``<site>/images.csv`` per site; None: images are generated.
        job: The job folder.
        preset: Name of one of its presets.
        runtime: Where the job runs.
        device: Where models run.
        changes: Variables of the job and their values; None: as it has them.
        watch: Is told how far it is.
        on_choice: Is told what of the job was taken from the images.

    Returns:
        What came out, and the sites' pages.
    """
    generated = images is None
    if images is None:
        images = out / "images"
        with watch.phase("make images"):
            _make(images, watch)
    found = find_sites(images, IMAGES)
    claim_output(out, {"task": "segmentation", "sites": found.to_json()})
    sites, external = found.configure(IMAGES, out=out, device=device)
    IMAGES.expect(read_job(job).task, f"{job}: no job of segmentation; jobs/dhunet_fedavg is one.")
    choice = choose_job(job, preset, found=IMAGES.find(sites), changes=changes)
    on_choice(choice)
    refuse_written(job, out / JOBS_FOLDER)
    experiment = Experiment(write_chosen(choice, out / JOBS_FOLDER), sites, external, runtime, device)
    outcome = run_watched(experiment, out, watch, ())
    if generated:
        write_page(outcome.report, out / PAGE_FILE, draw_generated(GENERATED, experiment, outcome))
    return outcome, write_site_pages(experiment, outcome, out, watch)


def _make(folder: Path, watch: Watch) -> None:
    planned = plan_images(GENERATED)
    there = all((folder / site / MANIFEST).exists() for site in {image.site for image in planned})
    if not there or len(list(folder.glob("*/images/*.png"))) != len(planned):
        make_images(folder, GENERATED, progress=watch.begin("make images", len(planned)).count)

"""The demo on slides: makes or takes slides, prepares their bags, and runs one job or two as chapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from histoflare.bags.encoder import RANDOM_ID, load_encoder, load_encoder_of
from histoflare.bags.encoder_names import EFFICIENTNET, find_packaged_weights
from histoflare.bags.network_encoder import Encoder
from histoflare.bags.prepare import prepare
from histoflare.errors import JobError
from histoflare.flare.job import Job
from histoflare.flare.job_choice import choose_job, facts_of
from histoflare.flare.job_schema import TRAINING
from histoflare.lab.chapters import run_chapters
from histoflare.lab.earlier_run import claim_output
from histoflare.lab.experiment import Experiment, Runtime
from histoflare.lab.fitted_job import JOBS_FOLDER, OnChoice, refuse_written, write_chosen
from histoflare.lab.pages import write_site_pages
from histoflare.lab.run import Outcome, run_watched
from histoflare.lab.sites import SiteFolder, find_sites
from histoflare.lab.watch import Watch
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.found_data import FoundData, Patches, find_labels
from histoflare.site.kinds import BAGS
from histoflare.slides.manifest import read_manifest
from histoflare.slides.mosaic import MosaicParameters
from histoflare.synthetic.bags import FieldParameters, make_undrawn_bags
from histoflare.synthetic.slides import SyntheticCohort, make_slides, plan_slides


@dataclass(frozen=True)
class Demo:
    """What a demo on slides makes and runs.

    Attributes:
        out: Folder for everything that is made.
        slides: Folder with one manifest per site; None: ``cohort`` is made.
        cohort: The made-up patients; used only without ``slides``.
        undrawn_patches: Patches in the bag of a made-up patient without a slide.
        jobs: Job folders: one, or the two of the chapters.
        chapter_settings: Job of a chapter → what it says otherwise than the job that comes with the package.
        preset: Name of a preset of the job.
        changes: Variables of the jobs and their values; None: as they have them.
        encoder: The encoder instead of the job's, as ``load_encoder`` takes it.
        weights: Weight file of the encoder.
        weights_sha256: The SHA-256 that it must have.
        workers: Threads that read slides.
        budgets: Budgets (ε) at which a protected job is tried, too.
        runtime: Where the jobs run.
        device: Where encoders and models run.
    """

    out: Path
    slides: Path | None
    cohort: SyntheticCohort
    undrawn_patches: int
    jobs: Sequence[Path]
    chapter_settings: Mapping[str, Mapping[str, Any]]
    preset: str | None
    changes: Mapping[str, Any]
    encoder: str | None
    weights: Path | None
    weights_sha256: str | None
    workers: int | None
    budgets: Sequence[float]
    runtime: Runtime
    device: str


def run_demo(demo: Demo, watch: Watch, on_choice: OnChoice) -> tuple[Outcome, list[Path], int]:
    """Run a demo on slides and write its report and each site's page.

    Args:
        demo: What to make and run.
        watch: Is told how far it is, and which slides are left out.
        on_choice: Is told what of a job was taken from the data.

    Returns:
        What came out, the sites' pages, and how many slides were left out.

    Raises:
        HistoflareError: A job, the encoder or the folder of slides cannot be used.
    """
    encoder = _open_encoder(demo)
    slides = demo.slides
    if slides is None:
        slides = demo.out / "slides"
        with watch.phase("make slides"):
            _make_slides(slides, demo.cohort, watch)
    with watch.phase("prepare bags"):
        found = find_sites(slides)
        jobs = _write_jobs(demo, found, encoder, on_choice)
        training, external = found.configure(BAGS, demo.out / "bags", demo.out, device=demo.device)
        sites = training | external
        if demo.slides is None:
            _make_undrawn_bags(demo, sites, jobs[0], encoder, watch)
        left_out = sum(_prepare(demo, name, site, jobs[0], encoder, watch) for name, site in sites.items())
    experiments = [Experiment(job, training, external, demo.runtime, demo.device) for job in jobs]
    if len(experiments) == 2:
        outcome = run_chapters(
            experiments[0], experiments[1], demo.out, watch, demo.budgets, _describe_cohort(demo)
        )
    else:
        outcome = run_watched(experiments[0], demo.out, watch, demo.budgets)
    return outcome, write_site_pages(experiments[-1], outcome, demo.out, watch), left_out


def _describe_cohort(demo: Demo) -> str:
    """Return what made-up data are; empty if the slides are a person's own."""
    if demo.slides is not None:
        return ""
    planned = plan_slides(demo.cohort)
    everyone = {slide.patient for slide in planned}
    without = {slide.patient for slide in planned if not slide.drawn}
    return (
        f"All data are generated. Of {len(everyone)} patients {len(everyone) - len(without)} have slides. "
        f"Each of the other {len(without)} has a bag of {demo.undrawn_patches} patches of the same kind of "
        "tissue, drawn and encoded without a slide in between. Hospitals were given unlike mixes of the two "
        "classes, so that the model of one alone does less well on the patients of others."
    )


def _make_slides(folder: Path, cohort: SyntheticCohort, watch: Watch) -> None:
    """Make the slides of a cohort, unless they are there already."""
    planned = plan_slides(cohort)
    wanted = sum(slide.drawn for slide in planned)
    others = sorted({path.parent.name for path in folder.glob("*/manifest.csv")} - set(cohort.sites))
    if others:
        raise JobError(
            f"{folder}: has slides of other hospitals too ({', '.join(others)}), made for another run. "
            "Give another folder with --out, or remove this one.",
            reason="OUTPUT_TAKEN",
        )
    manifests = [folder / site / "manifest.csv" for site in cohort.sites]
    listed = sum(len(path.read_text().splitlines()) - 1 for path in manifests if path.exists())
    step = watch.begin("make slides", wanted)
    if listed == len(planned) and len(list(folder.glob("*/slides/*.tif"))) == wanted:
        step.show(wanted, f"{folder}: the slides are there already")
    else:
        make_slides(folder, cohort, progress=step.count)


def _make_undrawn_bags(
    demo: Demo, sites: Mapping[str, SiteConfiguration], job: Job, encoder: Encoder, watch: Watch
) -> None:
    """Make the bags of the patients of whom there is no slide."""
    places = {name: BAGS.paths(site) for name, site in sites.items()}
    make_undrawn_bags(
        {name: manifest for name, (manifest, _) in places.items()},
        {name: folder for name, (_, folder) in places.items()},
        encoder,
        demo.cohort,
        FieldParameters(demo.undrawn_patches, job.task.patch_px or 224, job.task.mpp or 0.5),
        watch.begin("bags without slides").count,
    )


def _open_encoder(demo: Demo) -> Encoder:
    """Return the encoder of the jobs. What is wrong with it or them is said before slides are made."""
    for folder in demo.jobs:
        refuse_written(folder, demo.out / JOBS_FOLDER)
        job = choose_job(folder, demo.preset, changes=demo.changes).job
        otherwise = f"{folder}: the demo trains on bags of slides, and this job does not."
        BAGS.expect(job.task, otherwise)
        if job.kind != TRAINING:
            raise JobError(otherwise)
    spec, task = demo.encoder, job.task
    if spec is None and task.encoder == RANDOM_ID and demo.weights is None and find_packaged_weights():
        spec = EFFICIENTNET  # real features, where the extra is installed that has them
    load, name = (load_encoder_of, task.encoder) if spec is None else (load_encoder, spec)
    return load(name, demo.weights, demo.weights_sha256, demo.device, task.patch_px)


def _write_jobs(demo: Demo, found: SiteFolder, encoder: Encoder, on_choice: OnChoice) -> list[Job]:
    """Write the jobs with the changes asked for, fitted to the manifests' labels and the bags to be made."""
    labels, chapters = find_labels(found.sites.values()), len(demo.jobs) > 1
    choices = []
    for folder in demo.jobs:
        before = demo.chapter_settings.get(folder.name) if chapters else None
        asked = dict(demo.changes)
        job = choose_job(folder, demo.preset, changes=asked, before=before).job
        if job.answer_seconds is not None:
            asked["answer_seconds"] = 1  # all sites are of one user, who may know how long they work
        if chapters and getattr(job.asked, "budget_share", None) is not None:
            asked["privacy.budget_share"] = 1.0  # the chapters' ledgers are thrown away with the workspace
        task = job.task
        patches = Patches(encoder.id, encoder.features, task.patch_px, task.mpp)  # as they will be made
        choices.append(
            choose_job(folder, demo.preset, found=FoundData(labels, patches), changes=asked, before=before)
        )
        on_choice(choices[-1])
    jobs = [facts_of(choice.job) for choice in choices]
    claim_output(demo.out, {"sites": found.to_json(), "jobs": jobs})
    return [write_chosen(choice, demo.out / JOBS_FOLDER) for choice in choices]


def _prepare(demo: Demo, name: str, site: SiteConfiguration, job: Job, encoder: Encoder, watch: Watch) -> int:
    """Make the bags of the site's slides; return how many slides were left out."""
    file, bags = BAGS.paths(site)
    made_up = demo.slides is None  # then slides that are not there have bags without one
    manifest = read_manifest(file, labels=job.task.manifest_labels, check_files=not made_up)
    if made_up:
        manifest = replace(manifest, rows=tuple(row for row in manifest.rows if row.slide.is_file()))
    step = watch.begin(f"prepare {name}", len(manifest.rows))
    parameters = MosaicParameters(mpp=job.task.mpp, patch_px=job.task.patch_px)
    report = prepare(manifest, bags, encoder, parameters, demo.workers, on_row=lambda _: step.advance())
    for row in report.left_out:
        watch.warn(f"{name}: {row.slide} left out: {row.message}")
    return len(report.left_out)

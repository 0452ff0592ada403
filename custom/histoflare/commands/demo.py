"""``histoflare demo``: from slides on disk to a federated model and its report, in one command."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import console, out, progress, say, say_fitted, say_refused, watch_on
from histoflare.commands.options import (
    DEMO_JOBS,
    DEVICE_HELP,
    EPSILONS_HELP,
    JOB_HELP,
    RUNTIME_HELP,
    DemoTask,
    Preset,
    read_device,
    read_epsilons,
)
from histoflare.errors import JobError
from histoflare.lab.experiment import Runtime

if TYPE_CHECKING:
    from rich.progress import Progress

    from histoflare.bags.network_encoder import Encoder
    from histoflare.flare.job import Job
    from histoflare.lab.run import Outcome
    from histoflare.lab.sites import SiteFolder
    from histoflare.site.configuration import SiteConfiguration
    from histoflare.slides.mosaic import MosaicParameters
    from histoflare.synthetic.slides import SyntheticCohort

PATCHES_WITHOUT_SLIDE = 4
"""Patches in the bag of a made-up patient without a slide: cheap."""

HOSPITALS, SLIDES_PER_HOSPITAL, PATIENTS_WITHOUT_SLIDE = 4, 6, 80

CHAPTER_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "mem_fedavg": {
        "rounds": 16,
        "task.learning_rate": 0.02,
        "task.batch_size": 16,
        "task.local_epochs": 4,
        "task.model.memories": 4,
        "task.model.dim": 32,
        "task.model.hidden": 64,
    },
    "mem_dpsgd": {"rounds": 16, "privacy.steps": 3},
}
"""Job of a chapter → what it says otherwise than the job that comes with the package, for the sake of time.

Half the rounds, and in each twice the learning rate, or half as many protected steps again. Without
protection a step also takes four times as many bags, and a round four passes over them: with four bags a step
the labels of the last few decided where the model draws the line between the classes, and balanced accuracy
rose and fell by 0.1 from round to round while AUC did not. The smaller MEM is as good here and faster."""

JOBS_FOLDER = "job"
"""In the output folder: the jobs that ran."""


def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for everything the demo makes.")] = Path(
        "demo-run"
    ),
    slides: Annotated[
        Path | None,
        typer.Option(help="Your own slides: a folder with one <site>/manifest.csv (or <site>.csv) per site."),
    ] = None,
    job: Annotated[
        Path | None, typer.Option(help=f"{JOB_HELP} Instead of the two chapters (mem_fedavg, mem_dpsgd).")
    ] = None,
    task: Annotated[
        DemoTask, typer.Option(help="What to learn; segmentation takes images with masks, or makes them.")
    ] = DemoTask.CLASSIFICATION,
    preset: Preset = None,
    runtime: Annotated[Runtime, typer.Option(help=RUNTIME_HELP)] = Runtime.POC,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds instead of the job's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed instead of the job's.")] = None,
    patch_px: Annotated[int | None, typer.Option(min=32, help="Patch edge instead of the job's.")] = None,
    hospitals: Annotated[int, typer.Option(min=2, help="Made-up hospitals (without --slides).")] = HOSPITALS,
    slides_per_hospital: Annotated[
        int, typer.Option(min=4, help="Made-up slides of each.")
    ] = SLIDES_PER_HOSPITAL,
    patients_per_hospital: Annotated[
        int, typer.Option(min=0, help="Further made-up patients of each, as bags without a slide.")
    ] = PATIENTS_WITHOUT_SLIDE,
    encoder: Annotated[str | None, typer.Option(help="Encoder instead of the job's, see prepare.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weight file of the encoder.")] = None,
    weights_sha256: Annotated[str | None, typer.Option(help="SHA-256 the weight file must have.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read slides.")] = None,
    epsilons: Annotated[str, typer.Option(help=EPSILONS_HELP)] = "1,3,8",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Federate four made-up hospitals and an external one, from slides on disk to a report in two chapters.

    Makes the slides (or takes yours), cuts and encodes their mosaics, provisions and starts a FLARE server
    and a client per hospital, trains MEM there without protection and then under DP-SGD, asks each hospital
    about the models, ends them, trains the bounds (each hospital alone; all pooled) and compares them all.
    Writes a report for the consortium and a page with pictures for each hospital. What is there is not made
    again. A slide that cannot be used is listed and costs no other; the exit code is then 3.

    Of a made-up hospital's patients only the first have slides; of the others there is a bag of the same kind
    of tissue, drawn and encoded without a slide in between. They are many, so that figures can be told apart.

    Example: histoflare demo --out demo-run

    Example: histoflare demo --slides my-sites --out my-run --rounds 20

    Example: histoflare demo --task segmentation --out segmentation-run
    """
    from histoflare.lab.chapters import run_chapters
    from histoflare.lab.experiment import Experiment
    from histoflare.lab.federation import FEDERATION_FOLDER
    from histoflare.lab.pages import write_site_pages
    from histoflare.lab.run import run_watched
    from histoflare.lab.sites import find_sites
    from histoflare.shipped import find_job
    from histoflare.site.kinds import BAGS

    if runtime == Runtime.POC:
        from histoflare.flare.poc import refuse_running

        refuse_running(out_dir / FEDERATION_FOLDER)
    budgets, where = read_epsilons(epsilons), read_device(device)
    if task == DemoTask.SEGMENTATION:
        from histoflare.commands.demo_segmentation import JOB, PRESET, run_segmentation_demo

        chosen_job, chosen_preset = (JOB, preset or PRESET) if job is None else (job, preset)
        outcome, pages, watch = run_segmentation_demo(
            out_dir,
            slides,
            find_job(chosen_job),
            chosen_preset,
            runtime,
            where,
            {"rounds": rounds, "seed": seed},
        )
        _show(outcome, pages, watch.seconds, out_dir, as_json=as_json)
        raise typer.Exit(3 if outcome.refused else 0)
    if job is None and preset is not None:
        raise JobError("A preset belongs to one job: name it, too (--job mem_dpsgd).")
    folders = [find_job(each) for each in (DEMO_JOBS if job is None else (job,))]
    changes = {"rounds": rounds, "seed": seed, "task.patch_px": patch_px}
    cohort = None
    with progress() as bars:
        watch = watch_on(bars)
        network = _open_encoder(folders, preset, out_dir, changes, (encoder, weights, weights_sha256, where))
        if slides is None:
            slides = out_dir / "slides"
            cohort = plan_cohort(hospitals, slides_per_hospital, patients_per_hospital)
            with watch.phase("make slides"):
                _make_slides(slides, cohort, bars)
        with watch.phase("prepare bags"):
            found = find_sites(slides)
            chosen = _write_jobs(folders, preset, out_dir, found, changes, network)
            sites = {
                name: BAGS.configure(
                    name,
                    path,
                    out_dir / "bags",
                    records=(out_dir / "records" / name).resolve(),
                    device=where,
                    evaluation_only=name in found.external,
                )
                for name, path in (found.sites | found.external).items()
            }
            if cohort is not None:
                _make_undrawn_bags(cohort, sites, chosen[0], network, bars)
            left_out = sum(
                _prepare(name, site, chosen[0], network, workers, bars, only_there=cohort is not None)
                for name, site in sites.items()
            )
        experiments = [
            Experiment(
                job=each,
                sites={name: sites[name] for name in found.sites},
                external={name: sites[name] for name in found.external},
                runtime=runtime,
                device=where,
            )
            for each in chosen
        ]
        if len(experiments) == 2:
            outcome = run_chapters(experiments[0], experiments[1], out_dir, watch, budgets, _note(cohort))
        else:
            outcome = run_watched(experiments[0], out_dir, watch, budgets)
        pages = write_site_pages(experiments[-1], outcome, out_dir, watch)
    _show(outcome, pages, watch.seconds, out_dir, as_json=as_json)
    raise typer.Exit(3 if left_out or outcome.refused else 0)


def plan_cohort(
    hospitals: int = HOSPITALS,
    slides_per_hospital: int = SLIDES_PER_HOSPITAL,
    patients_per_hospital: int = PATIENTS_WITHOUT_SLIDE,
) -> SyntheticCohort:
    """Return the made-up cohort: the external site has half as many patients without slides as a hospital."""
    from histoflare.synthetic.slides import SyntheticCohort

    return SyntheticCohort(
        hospitals,
        slides_per_hospital=slides_per_hospital,
        slides_external=slides_per_hospital,
        more_patients=patients_per_hospital,
        more_external=patients_per_hospital // 2,
    )


def _show(
    outcome: Outcome, pages: list[Path], seconds: Mapping[str, float], out_dir: Path, *, as_json: bool
) -> None:
    from histoflare.commands.console import print_json
    from histoflare.lab.run import PAGE_FILE
    from histoflare.report.chapters import write_chapters
    from histoflare.report.consortium import results_table

    if as_json:
        print_json(outcome.report)
    else:
        for number, chapter in enumerate(write_chapters(outcome.report), start=1):
            out.print(f"Chapter {number}: {chapter.verdict}", highlight=False, markup=False)
        out.print(results_table(outcome.report))
        spent = " · ".join(f"{phase} {took:.0f} s" for phase, took in seconds.items())
        console.print(spent, style="dim", highlight=False)
        say(f"report: {out_dir / PAGE_FILE}")
        say(f"each site's own: {', '.join(str(path) for path in pages)}")
    say_refused(outcome.refused)


def _note(cohort: SyntheticCohort | None) -> str:
    """Return what made-up data are."""
    if cohort is None:
        return ""
    from histoflare.synthetic.slides import plan_slides

    planned = plan_slides(cohort)
    everyone = {slide.patient for slide in planned}
    without = {slide.patient for slide in planned if not slide.drawn}
    return (
        f"All data are generated. Of {len(everyone)} patients {len(everyone) - len(without)} have slides. "
        f"Each of the other {len(without)} has a bag of {PATCHES_WITHOUT_SLIDE} patches of the same kind of "
        "tissue, drawn and encoded without a slide in between. Hospitals were given unlike mixes of the two "
        "classes, so that the model of one alone does less well on the patients of others."
    )


def _make_slides(folder: Path, cohort: SyntheticCohort, bars: Progress) -> None:
    from histoflare.synthetic.slides import make_slides, plan_slides

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
    if listed == len(planned) and len(list(folder.glob("*/slides/*.tif"))) == wanted:
        say(f"{folder}: the slides are there already")
        return
    bar = bars.add_task("make slides", total=wanted)
    make_slides(folder, cohort, progress=lambda done, total: bars.update(bar, completed=done, total=total))


def _make_undrawn_bags(
    cohort: SyntheticCohort, sites: dict[str, SiteConfiguration], job: Job, encoder: Encoder, bars: Progress
) -> None:
    """Make the bags of the patients of whom there is no slide."""
    from histoflare.site.kinds import BAGS
    from histoflare.synthetic.bags import FieldParameters, make_undrawn_bags

    places = {name: BAGS.paths(site) for name, site in sites.items()}
    bar = bars.add_task("bags without slides", total=None)
    make_undrawn_bags(
        {name: manifest for name, (manifest, _) in places.items()},
        {name: folder for name, (_, folder) in places.items()},
        encoder,
        cohort,
        FieldParameters(PATCHES_WITHOUT_SLIDE, job.task.patch_px or 224, job.task.mpp or 0.5),
        lambda done, total: bars.update(bar, completed=done, total=total),
    )


def _open_encoder(
    folders: Sequence[Path],
    preset: str | None,
    out_dir: Path,
    changes: dict[str, Any],
    wanted_encoder: tuple[str | None, Path | None, str | None, str],
) -> Encoder:
    """Return the encoder of the jobs with the changes asked for.

    What is wrong with either is said here, before slides are made.
    """
    from histoflare.bags.efficientnet import find_packaged_weights
    from histoflare.bags.encoder import EFFICIENTNET, RANDOM_ID, load_encoder, load_encoder_of
    from histoflare.flare.job_choice import choose_job
    from histoflare.flare.job_schema import TRAINING
    from histoflare.site.kinds import BAGS

    for folder in folders:
        if (out_dir / JOBS_FOLDER).resolve() in folder.resolve().parents:
            raise JobError(
                f"{folder}: this command writes its jobs to {out_dir / JOBS_FOLDER}; copy yours to another "
                "folder first."
            )
        job = choose_job(folder, preset, changes=changes).job
        otherwise = f"{folder}: the demo trains on bags of slides, and this job does not."
        BAGS.expect(job.task, otherwise)
        if job.kind != TRAINING:
            raise JobError(otherwise)
    spec, weights, sha256, device = wanted_encoder
    if spec is None and job.task.encoder == RANDOM_ID and weights is None and find_packaged_weights():
        spec = EFFICIENTNET  # real features, where the extra is installed that has them
    if spec is None:
        return load_encoder_of(job.task.encoder, weights, sha256, device, job.task.patch_px)
    return load_encoder(spec, weights, sha256, device, job.task.patch_px)


def _write_jobs(
    folders: Sequence[Path],
    preset: str | None,
    out_dir: Path,
    found: SiteFolder,
    changes: dict[str, Any],
    encoder: Encoder,
) -> list[Job]:
    """Return the jobs with the changes asked for.

    Their labels are those of the manifests, where these are others.
    """
    from histoflare.flare.job import read_job
    from histoflare.flare.job_choice import choose_job, facts_of
    from histoflare.flare.job_variant import write_variant
    from histoflare.lab.earlier_run import claim_output
    from histoflare.site.found_data import FoundData, Patches, find_labels

    labels, jobs = find_labels(found.sites.values()), out_dir / JOBS_FOLDER
    choices = []
    for folder in folders:
        before = CHAPTER_SETTINGS.get(folder.name) if len(folders) > 1 else None
        asked, job = dict(changes), choose_job(folder, preset, changes=changes, before=before).job
        if job.answer_seconds is not None:
            asked["answer_seconds"] = 1  # all sites are of one user, who may know how long they work
        if len(folders) > 1 and getattr(job.asked, "budget_share", None) is not None:
            asked["privacy.budget_share"] = 1.0  # the chapters' ledgers are thrown away with the workspace
        task = job.task
        patches = Patches(encoder.id, encoder.features, task.patch_px, task.mpp)  # as they will be made
        choices.append(
            choose_job(folder, preset, found=FoundData(labels, patches), changes=asked, before=before)
        )
        say_fitted(choices[-1])
    claim_output(out_dir, {"sites": found.to_json(), "jobs": [facts_of(choice.job) for choice in choices]})
    chosen = []
    for folder, choice in zip(folders, choices, strict=True):
        shutil.rmtree(jobs / folder.name, ignore_errors=True)
        chosen.append(read_job(write_variant(folder, jobs / folder.name, choice.changes, scope=choice.scope)))
    return chosen


def _prepare(
    name: str,
    site: SiteConfiguration,
    job: Job,
    encoder: Encoder,
    workers: int | None,
    bars: Progress,
    *,
    only_there: bool,
) -> int:
    """Make the bags of the site's slides; return how many slides were left out.

    Args:
        only_there: Whether slides of the manifest that are not there have bags of another kind.
    """
    from histoflare.bags.prepare import prepare
    from histoflare.site.kinds import BAGS
    from histoflare.slides.manifest import read_manifest

    manifest_file, bags = BAGS.paths(site)
    manifest = read_manifest(manifest_file, labels=job.task.manifest_labels, check_files=not only_there)
    if only_there:
        manifest = replace(manifest, rows=tuple(row for row in manifest.rows if row.slide.is_file()))
    bar = bars.add_task(f"prepare {name}", total=len(manifest.rows))
    report = prepare(
        manifest, bags, encoder, _mosaic_parameters(job), workers, on_row=lambda _: bars.advance(bar)
    )
    for row in report.left_out:
        say(f"{name}: {row.slide} left out: {row.message}", style="yellow")
    return len(report.left_out)


def _mosaic_parameters(job: Job) -> MosaicParameters:
    from histoflare.slides.mosaic import MosaicParameters

    return MosaicParameters(mpp=job.task.mpp, patch_px=job.task.patch_px)

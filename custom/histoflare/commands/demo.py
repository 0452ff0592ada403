"""``histoflare demo``: from slides on disk to a federated model and its report, in one command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import console, out, progress, say, say_fitted, say_refused
from histoflare.commands.options import (
    DEMO_JOB,
    DEVICE_HELP,
    EPSILONS_HELP,
    RUNTIME_HELP,
    DemoTask,
    Preset,
    Runtime,
    read_device,
    read_epsilons,
)

if TYPE_CHECKING:
    from rich.progress import Progress

    from histoflare.bags.network_encoder import Encoder
    from histoflare.commands.clock import PhaseClock
    from histoflare.commands.experiment import Outcome
    from histoflare.flare.job import Job
    from histoflare.site.configuration import SiteConfiguration
    from histoflare.slides.mosaic import MosaicParameters


def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for everything the demo makes.")] = Path(
        "demo-run"
    ),
    slides: Annotated[
        Path | None,
        typer.Option(help="Your own slides: a folder with one <site>/manifest.csv (or <site>.csv) per site."),
    ] = None,
    job: Annotated[Path, typer.Option(help="The job folder.")] = DEMO_JOB,
    task: Annotated[
        DemoTask, typer.Option(help="What to learn; segmentation takes images with masks, or makes them.")
    ] = DemoTask.CLASSIFICATION,
    preset: Preset = None,
    runtime: Annotated[Runtime, typer.Option(help=RUNTIME_HELP)] = Runtime.POC,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds instead of the job's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed instead of the job's.")] = None,
    patch_px: Annotated[int | None, typer.Option(min=32, help="Patch edge instead of the job's.")] = None,
    hospitals: Annotated[int, typer.Option(min=2, help="Made-up hospitals (without --slides).")] = 4,
    slides_per_hospital: Annotated[int, typer.Option(min=4, help="Made-up slides of each.")] = 20,
    encoder: Annotated[str | None, typer.Option(help="Encoder instead of the job's, see prepare.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weight file of the encoder.")] = None,
    weights_sha256: Annotated[str | None, typer.Option(help="SHA-256 the weight file must have.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read slides.")] = None,
    epsilons: Annotated[str, typer.Option(help=EPSILONS_HELP)] = "1,3,8",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Federate four made-up hospitals and an external one, from slides on disk to a report.

    Makes the slides (or takes yours), cuts and encodes their mosaics, provisions and starts a FLARE server
    and a client per hospital, trains MEM there, asks each hospital about the model, ends them, trains the
    bounds (each hospital alone; all pooled) and compares them all. Writes a report for the consortium and a
    page with pictures for each hospital. What is there is not made again. A slide that cannot be used is
    listed and costs no other; the exit code is then 3.

    Example: histoflare demo --out demo-run

    Example: histoflare demo --slides my-sites --out my-run --rounds 20

    Example: histoflare demo --task segmentation --out segmentation-run
    """
    from histoflare.commands.clock import PhaseClock
    from histoflare.commands.earlier_run import claim_output
    from histoflare.commands.experiment import run_experiment, write_site_pages
    from histoflare.commands.runtimes import FEDERATION_FOLDER, Experiment
    from histoflare.commands.sites import find_sites
    from histoflare.flare.job_choice import choose_job
    from histoflare.site.configuration import SiteConfiguration

    if runtime == Runtime.POC:
        from histoflare.flare.poc import refuse_running

        refuse_running(out_dir / FEDERATION_FOLDER)
    budgets, where = read_epsilons(epsilons), read_device(device)
    if task == DemoTask.SEGMENTATION:
        from histoflare.commands.demo_segmentation import JOB, PRESET, run_segmentation_demo

        chosen_job, chosen_preset = (JOB, preset or PRESET) if job == DEMO_JOB else (job, preset)
        outcome, pages, clock = run_segmentation_demo(
            out_dir, slides, chosen_job, chosen_preset, runtime, where, {"rounds": rounds, "seed": seed}
        )
        _show(outcome, pages, clock, out_dir, as_json=as_json)
        raise typer.Exit(3 if outcome.refused else 0)
    clock = PhaseClock()
    with progress() as bars:
        if slides is None:
            slides = out_dir / "slides"
            with clock.phase("make slides"):
                _make_slides(slides, hospitals, slides_per_hospital, bars)
        with clock.phase("prepare bags"):
            found = find_sites(slides)
            claim_output(out_dir, {"sites": found.to_json()})
            changes = {"rounds": rounds, "seed": seed, "task.patch_px": patch_px}
            if choose_job(job, preset).job.answer_seconds is not None:
                changes["answer_seconds"] = 1  # all sites are of one user, who may know how long they work
            chosen, network = _choose_job(
                job, preset, out_dir, found.sites, changes, (encoder, weights, weights_sha256, where)
            )
            sites = {
                name: SiteConfiguration(
                    manifest=path.resolve(),
                    bags=(out_dir / "bags" / name).resolve(),
                    records=(out_dir / "records" / name).resolve(),
                    device=where,
                    evaluation_only=name in found.external,
                )
                for name, path in (found.sites | found.external).items()
            }
            left_out = sum(
                _prepare(name, site, chosen, network, workers, bars) for name, site in sites.items()
            )
        experiment = Experiment(
            job=chosen,
            sites={name: sites[name] for name in found.sites},
            external={name: sites[name] for name in found.external},
            runtime=runtime,
            device=where,
        )
        outcome = run_experiment(experiment, out_dir, bars, clock, budgets)
        pages = write_site_pages(experiment, outcome, out_dir, bars, clock)
    _show(outcome, pages, clock, out_dir, as_json=as_json)
    raise typer.Exit(3 if left_out or outcome.refused else 0)


def _show(outcome: Outcome, pages: list[Path], clock: PhaseClock, out_dir: Path, *, as_json: bool) -> None:
    from histoflare.commands.console import print_json
    from histoflare.commands.experiment import PAGE_FILE
    from histoflare.report.consortium import results_table

    if as_json:
        print_json(outcome.report)
    else:
        out.print(results_table(outcome.report))
        spent = " · ".join(f"{phase} {seconds:.0f} s" for phase, seconds in clock.seconds.items())
        console.print(spent, style="dim", highlight=False)
        say(f"report: {out_dir / PAGE_FILE}")
        say(f"each site's own: {', '.join(str(path) for path in pages)}")
    say_refused(outcome.refused)


def _make_slides(folder: Path, hospitals: int, slides_per_hospital: int, bars: Progress) -> None:
    from histoflare.slides.synthetic import SyntheticCohort, make_slides

    cohort = SyntheticCohort(hospitals=hospitals, slides_per_hospital=slides_per_hospital)
    wanted = sum(cohort.sites.values())
    manifests = [folder / site / "manifest.csv" for site in cohort.sites]
    if all(path.exists() for path in manifests) and len(list(folder.glob("*/slides/*.tif"))) == wanted:
        say(f"{folder}: the slides are there already")
        return
    bar = bars.add_task("make slides", total=wanted)
    make_slides(folder, cohort, progress=lambda done, total: bars.update(bar, completed=done, total=total))


def _choose_job(
    folder: Path,
    preset: str | None,
    out_dir: Path,
    manifests: dict[str, Path],
    changes: dict[str, Any],
    wanted_encoder: tuple[str | None, Path | None, str | None, str],
) -> tuple[Job, Encoder]:
    """Return the job with the changes asked for, and its encoder; with it goes the job that evaluates.

    Its labels are those of the manifests, where these are others.
    """
    from histoflare.bags.encoder import load_encoder, load_encoder_of
    from histoflare.commands.runtimes import EVALUATION_JOBS
    from histoflare.errors import JobError
    from histoflare.flare.job import read_job
    from histoflare.flare.job_choice import choose_job
    from histoflare.flare.job_variant import write_variant
    from histoflare.flare.workstation import write_evaluation
    from histoflare.site.found_data import FoundData, Patches, find_labels

    job = choose_job(folder, preset, changes=changes).job
    spec, weights, sha256, device = wanted_encoder
    if spec is None:
        encoder = load_encoder_of(job.task.encoder, weights, sha256, device, job.task.patch_px)
    else:
        encoder = load_encoder(spec, weights, sha256, device, job.task.patch_px)
    patches = Patches(encoder.id, encoder.features, job.task.patch_px, job.task.mpp)  # as they will be made
    choice = choose_job(
        folder, preset, found=FoundData(find_labels(manifests.values()), patches), changes=changes
    )
    say_fitted(choice)
    jobs = out_dir / "job"
    evaluation = folder.parent / EVALUATION_JOBS["bags"]
    if folder.parent.resolve() == jobs.resolve():
        raise JobError(
            f"{folder}: this command writes its jobs to {jobs}; copy yours to another folder first."
        )
    for name in (folder.name, EVALUATION_JOBS["bags"]):
        shutil.rmtree(jobs / name, ignore_errors=True)
    chosen = read_job(write_variant(folder, jobs / folder.name, choice.changes, scope=choice.scope))
    if evaluation.is_dir():
        write_evaluation(evaluation, jobs, chosen)
    return chosen, encoder


def _prepare(
    name: str, site: SiteConfiguration, job: Job, encoder: Encoder, workers: int | None, bars: Progress
) -> int:
    """Make the site's bags; return how many slides were left out."""
    from histoflare.bags.prepare import prepare
    from histoflare.site.data import bags_of
    from histoflare.slides.manifest import read_manifest

    manifest_file, bags = bags_of(site)
    manifest = read_manifest(manifest_file, labels=job.task.labels)
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

"""``histoflare demo``: from slides on disk to a federated model and its report, in one command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import (
    console,
    out,
    print_json,
    progress,
    say,
    say_fitted,
    say_refused,
    watch_on,
)
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
    from histoflare.lab.run import Outcome
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
    from histoflare.bags.encoder_names import check_encoder

    if encoder is not None:
        check_encoder(encoder, weights, weights_sha256)
    from histoflare.lab.federation import FEDERATION_FOLDER
    from histoflare.shipped import find_job

    if runtime == Runtime.POC:
        from histoflare.flare.poc import refuse_running

        refuse_running(out_dir / FEDERATION_FOLDER)
    budgets, where = read_epsilons(epsilons), read_device(device)
    changes = {"rounds": rounds, "seed": seed}
    left_out = 0
    with progress() as bars:
        watch = watch_on(bars)
        if task == DemoTask.SEGMENTATION:
            from histoflare.lab.demo_segmentation import JOB, PRESET, run_segmentation_demo

            chosen, chosen_preset = (JOB, preset or PRESET) if job is None else (job, preset)
            outcome, pages = run_segmentation_demo(
                out_dir,
                slides,
                find_job(chosen),
                chosen_preset,
                runtime,
                where,
                changes,
                watch,
                say_fitted,
            )
        else:
            from histoflare.lab.demo import Demo, run_demo

            if job is None and preset is not None:
                raise JobError("A preset belongs to one job: name it, too (--job mem_dpsgd).")
            cohort = plan_cohort(hospitals, slides_per_hospital, patients_per_hospital)
            wanted = Demo(
                out=out_dir,
                slides=slides,
                cohort=cohort,
                undrawn_patches=PATCHES_WITHOUT_SLIDE,
                jobs=[find_job(each) for each in (DEMO_JOBS if job is None else (job,))],
                chapter_settings=CHAPTER_SETTINGS,
                preset=preset,
                changes=changes | {"task.patch_px": patch_px},
                encoder=encoder,
                weights=weights,
                weights_sha256=weights_sha256,
                workers=workers,
                budgets=budgets,
                runtime=runtime,
                device=where,
            )
            outcome, pages, left_out = run_demo(wanted, watch, say_fitted)
    if as_json:
        print_json(outcome.report)
    else:
        _show(outcome, pages, watch.seconds, out_dir)
    say_refused(outcome.refused)
    if left_out:
        said = "1 slide was" if left_out == 1 else f"{left_out} slides were"
        say(f"{said} left out; each site's page has its own, with the reasons", "yellow")
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


def _show(outcome: Outcome, pages: list[Path], seconds: Mapping[str, float], out_dir: Path) -> None:
    from histoflare.lab.run import PAGE_FILE
    from histoflare.report.chapters import write_chapters
    from histoflare.report.consortium import results_table

    for number, chapter in enumerate(write_chapters(outcome.report), start=1):
        said = " ".join([chapter.verdict, *chapter.evidence])
        out.print(f"Chapter {number}: {said}", highlight=False, markup=False)
    out.print(results_table(outcome.report))
    spent = " · ".join(f"{phase} {took:.0f} s" for phase, took in seconds.items())
    console.print(spent, style="dim", highlight=False)
    say(f"report: {out_dir / PAGE_FILE}")
    say(f"each site's own: {', '.join(str(path) for path in pages)}")

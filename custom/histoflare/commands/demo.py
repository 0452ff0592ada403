"""``histoflare demo``: from slides on disk to a federated model and its report, in one command."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import console, out, progress

if TYPE_CHECKING:
    from rich.progress import Progress

    from histoflare.bags.encoder import Encoder
    from histoflare.flare.job import Job
    from histoflare.site.configuration import SiteConfiguration
    from histoflare.slides.mosaic import MosaicParameters

DEFAULT_JOB = Path("jobs/mem_fedavg")


class Runtime(StrEnum):
    """Where a job's server and sites run."""

    SIMULATOR = "simulator"
    INPROCESS = "inprocess"


def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for everything the demo makes.")] = Path(
        "demo-run"
    ),
    slides: Annotated[
        Path | None,
        typer.Option(help="Your own slides: a folder with one <site>/manifest.csv (or <site>.csv) per site."),
    ] = None,
    job: Annotated[Path, typer.Option(help="The job folder.")] = DEFAULT_JOB,
    runtime: Annotated[
        Runtime, typer.Option(help="simulator: a real FLARE server and sites; inprocess: without FLARE.")
    ] = Runtime.SIMULATOR,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds instead of the job's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed instead of the job's.")] = None,
    patch_px: Annotated[int | None, typer.Option(min=32, help="Patch edge instead of the job's.")] = None,
    hospitals: Annotated[int, typer.Option(min=2, help="Made-up hospitals (without --slides).")] = 4,
    slides_per_hospital: Annotated[int, typer.Option(min=4, help="Made-up slides of each.")] = 20,
    encoder: Annotated[str | None, typer.Option(help="Encoder instead of the job's, see prepare.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weight file of the encoder.")] = None,
    weights_sha256: Annotated[str | None, typer.Option(help="SHA-256 the weight file must have.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read slides.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Federate four made-up hospitals and an external one, from slides on disk to a report.

    Makes the slides (or takes yours), cuts and encodes their mosaics, trains MEM over FLARE, trains the
    bounds (each hospital alone; all pooled) and compares them all. What is there is not made again. A slide
    that cannot be used is listed and costs no other; the exit code is then 3.

    Example: histoflare demo --out demo-run

    Example: histoflare demo --slides my-sites --out my-run --rounds 20
    """
    from histoflare.commands.console import print_json
    from histoflare.commands.experiment import REPORT_FILE, Experiment, PhaseClock, run_experiment
    from histoflare.commands.sites import find_sites
    from histoflare.report.consortium import results_table

    clock = PhaseClock()
    with progress() as bars:
        if slides is None:
            slides = out_dir / "slides"
            with clock.phase("make slides"):
                _make_slides(slides, hospitals, slides_per_hospital, bars)
        with clock.phase("prepare bags"):
            found = find_sites(slides)
            changes = {"rounds": rounds, "seed": seed, "task.patch_px": patch_px}
            chosen, network = _choose_job(
                job, out_dir, found.sites, changes, (encoder, weights, weights_sha256)
            )
            prepared = {
                name: _prepare(name, path, out_dir / "bags" / name, chosen, network, workers, bars)
                for name, path in (found.sites | found.external).items()
            }
        sites = {name: where for name, (where, _) in prepared.items()}
        left_out = sum(count for _, count in prepared.values())
        experiment = Experiment(
            job=chosen,
            sites={name: sites[name] for name in found.sites},
            external={name: sites[name] for name in found.external},
            runtime=runtime.value,
        )
        report = run_experiment(experiment, out_dir, bars, clock)
    if as_json:
        print_json(report)
    else:
        out.print(results_table(report))
        spent = " · ".join(f"{phase} {seconds:.0f} s" for phase, seconds in clock.seconds.items())
        console.print(spent, style="dim", highlight=False)
        console.print(f"report: {out_dir / REPORT_FILE}", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(3 if left_out else 0)


def _make_slides(folder: Path, hospitals: int, slides_per_hospital: int, bars: Progress) -> None:
    from histoflare.slides.synthetic import SyntheticCohort, make_slides

    cohort = SyntheticCohort(hospitals=hospitals, slides_per_hospital=slides_per_hospital)
    wanted = sum(cohort.sites.values())
    manifests = [folder / site / "manifest.csv" for site in cohort.sites]
    if all(path.exists() for path in manifests) and len(list(folder.glob("*/slides/*.tif"))) == wanted:
        console.print(
            f"{folder}: the slides are there already", markup=False, highlight=False, soft_wrap=True
        )
        return
    bar = bars.add_task("make slides", total=wanted)
    make_slides(folder, cohort, progress=lambda done, total: bars.update(bar, completed=done, total=total))


def _choose_job(
    folder: Path,
    out_dir: Path,
    manifests: dict[str, Path],
    changes: dict[str, Any],
    wanted_encoder: tuple[str | None, Path | None, str | None],
) -> tuple[Job, Encoder]:
    """Return the job with the changes asked for, and its encoder.

    Its labels are those of the manifests, where these are others.
    """
    from histoflare.bags.encoder import load_encoder
    from histoflare.flare.job import read_job, write_variant
    from histoflare.slides.manifest import read_manifest

    job = read_job(folder)
    spec, weights, sha256 = wanted_encoder
    encoder = load_encoder(spec or job.task.encoder.rpartition(":")[0], weights, sha256)
    found = sorted({label for path in manifests.values() for label in read_manifest(path).labels})
    if set(found) != set(job.task.labels):
        changes["task.labels"] = found
    if encoder.id != job.task.encoder:
        changes |= {"task.encoder": encoder.id, "task.features": encoder.features}
    target = out_dir / "job" / folder.name
    shutil.rmtree(target, ignore_errors=True)
    changed = {name: value for name, value in changes.items() if value is not None}
    return read_job(write_variant(folder, target, changed)), encoder


def _prepare(
    name: str,
    manifest_path: Path,
    bags: Path,
    job: Job,
    encoder: Encoder,
    workers: int | None,
    bars: Progress,
) -> tuple[SiteConfiguration, int]:
    """Make the site's bags; return where they are, and how many slides were left out."""
    from histoflare.bags.prepare import prepare
    from histoflare.site.configuration import SiteConfiguration
    from histoflare.slides.manifest import read_manifest

    manifest = read_manifest(manifest_path, labels=job.task.labels)
    bar = bars.add_task(f"prepare {name}", total=len(manifest.rows))
    report = prepare(
        manifest, bags, encoder, _mosaic_parameters(job), workers, on_row=lambda _: bars.advance(bar)
    )
    for row in report.left_out:
        console.print(
            f"{name}: {row.slide} left out: {row.message}",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return SiteConfiguration(manifest_path.resolve(), bags.resolve()), len(report.left_out)


def _mosaic_parameters(job: Job) -> MosaicParameters:
    from histoflare.slides.mosaic import MosaicParameters

    return MosaicParameters(mpp=job.task.mpp, patch_px=job.task.patch_px)

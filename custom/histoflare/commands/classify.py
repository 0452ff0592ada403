"""``histoflare classify``: slides, from their files to a model's answer and what it attends to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histoflare.commands.console import console, make_table, out, print_json, progress, say, tell
from histoflare.commands.options import MODEL_HELP, PLANE_HELP, PlaneName
from histoflare.commands.outputs import check_output_folders, check_outputs
from histoflare.commands.several import ask_for_table, follow_table, show_table
from histoflare.commands.slide import MPP_HELP
from histoflare.errors import JobError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from histoflare.bags.attention_files import AttentionFiles
    from histoflare.bags.classifier import Answer, SlideClassifier
    from histoflare.model_file import ModelHeader

QUICK_DEVICES = ("auto", "cpu")
"""Those that need no look at what this machine has."""


def classify(
    slide: Annotated[
        Path,
        typer.Argument(
            help="Slide file, or the folder of a DICOM series; with --out also a folder of slides, or a "
            "manifest (CSV) of which the column slide is enough."
        ),
    ],
    model: Annotated[Path, typer.Option(help=MODEL_HELP)],
    table: Annotated[
        Path | None,
        typer.Option(
            "--out", help="CSV of results, of one slide or many; --heatmap, --overlay, --geojson are folders."
        ),
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option(help="What the model attends to: a pyramidal TIFF in colour.")
    ] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="Picture of the slide and what the model attends to (PNG).")
    ] = None,
    geojson: Annotated[
        Path | None, typer.Option(help="What the model attends to: a tile per patch, for QuPath.")
    ] = None,
    plane: Annotated[PlaneName, typer.Option(help=PLANE_HELP)] = PlaneName.BOUNDS,
    mpp: Annotated[
        float | None, typer.Option(help=MPP_HELP + " With --out: of the slides that do not say it.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weight file of the model's encoder; the model says which one.")
    ] = None,
    weights_sha256: Annotated[
        str | None,
        typer.Option(help="SHA-256 of the weight file, if 12 digits will not do."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads that read patches.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Cut a slide's mosaic, encode it, ask the model, and show where it looks.

    The heat map covers every patch with enough tissue, not the mosaic alone: for those outside the mosaic it
    is the attention that each would be paid if it were added. 1 is the average patch of the mosaic.

    With --out, of many slides: each has its row once it is done, and the same command goes on where it was
    stopped. A slide that cannot be used has the reason in its row and costs no other; the exit code is then
    3.

    A research model's answer is not a diagnosis.

    Example: histoflare classify a.svs --model demo-run --heatmap a.heat.tiff --overlay a.heat.png

    Example: histoflare classify slides --model demo-run --out results.csv --geojson attention
    """
    from histoflare.model_file import read_model_header
    from histoflare.slides.resolution import check_given_mpp

    header = read_model_header(model)
    _check_model(header, weights)
    check_given_mpp(mpp, "--mpp")
    _say_unagreed(header)
    read = [slide, header.path, *([] if weights is None else [weights])]
    wanted = (heatmap, overlay, geojson)
    encoder = (weights, weights_sha256, device)
    if table is None:
        check_outputs(wanted, read)
        ask_for_table(slide, "--out results.csv")
        _show(_classify_one(slide, header, wanted, plane, mpp, encoder, threads), wanted, as_json=as_json)
        return
    check_outputs([table], read)
    check_output_folders(wanted, [slide])
    raise typer.Exit(_classify_many(slide, header, table, wanted, plane, mpp, encoder, threads, as_json))


def _check_model(header: ModelHeader, weights: Path | None) -> None:
    """Say at once that the model is none of slides, or that the weight file is not there."""
    from histoflare.site.kinds import BAGS

    header.check_data(BAGS.name)
    encoder_id = str(header.task.get("encoder"))
    if header.mosaic is None or encoder_id.startswith("imported:"):
        raise JobError(
            f"{header.path}: does not say how its slides were cut: its features were imported, or an earlier "
            "histoflare wrote it."
        )
    if weights is not None and not weights.is_file():
        raise JobError(f"{weights}: there is no such weight file.", reason="ENCODER_WEIGHTS_MISSING")
    if weights is not None and encoder_id.startswith("densenet121-random:"):
        raise JobError(
            f"The model wants features of {encoder_id}, which has no weight file: leave --weights out."
        )
    if weights is None and encoder_id.startswith(("densenet121:", "torchscript:")):
        raise JobError(
            f"The model wants features of {encoder_id}: give its weight file (--weights FILE).",
            reason="ENCODER_WEIGHTS_MISSING",
        )


def _say_unagreed(header: ModelHeader) -> None:
    """Say what the model does not say of how patches are chosen: a protocol names resolution and side."""
    from histoflare.slides.mosaic import MosaicParameters

    assert header.mosaic is not None
    chosen = MosaicParameters.from_json(header.mosaic).to_json()
    open_ones = ", ".join(
        f"{name} {value}"
        for name, value in chosen.items()
        if name not in header.mosaic and name != "seed" and value is not None
    )
    if open_ones:
        say(
            "note: the model does not say how its patches were chosen, for its sites' protocol does not; the "
            f"defaults of prepare are taken, which a site may have changed: {open_ones}"
        )


def _classify_one(
    path: Path,
    header: ModelHeader,
    wanted: tuple[Path | None, Path | None, Path | None],
    plane: PlaneName,
    mpp: float | None,
    encoder: tuple[Path | None, str | None, str],
    threads: int,
) -> Answer:
    """Return the model's answer on one slide, and write what shows where it looks.

    Args:
        wanted: Heat map, picture and tiles. encoder: Weight file, its SHA-256 and device.
    """
    from histoflare.slides.mosaic import MosaicParameters, build_mosaic
    from histoflare.slides.reader import Slide

    assert header.mosaic is not None
    with Slide(path, mpp=mpp) as opened:
        # Loading PyTorch and the networks takes seconds, a mosaic may take minutes: what may be wrong with
        # the slide comes before the first, and what may be wrong with the encoder before the second.
        _ = opened.mpp
        classifier = None
        if encoder[0] is not None or encoder[2] not in QUICK_DEVICES:
            classifier = _load(header, encoder)
        mosaic = build_mosaic(opened, MosaicParameters.from_json(header.mosaic), threads)
        classifier = classifier or _load(header, encoder)
        from histoflare.bags.attention_files import write_attention_files

        files = _files(wanted)
        with progress() as bars:
            steps: dict[str, TaskID] = {}

            def on_patches(what: str, done: int, total: int) -> None:
                if what not in steps:
                    steps[what] = bars.add_task(what, total=total)
                bars.update(steps[what], completed=done)

            answer, _ = classifier.answer(
                opened, mosaic, attend=bool(files.wanted), threads=threads, on_patches=on_patches
            )
        if answer.attention is not None:
            write_attention_files(files, opened, mosaic, answer.attention, plane.value)
    return answer


def _classify_many(
    path: Path,
    header: ModelHeader,
    table: Path,
    wanted: tuple[Path | None, Path | None, Path | None],
    plane: PlaneName,
    mpp: float | None,
    encoder: tuple[Path | None, str | None, str],
    threads: int,
    as_json: bool,
) -> int:
    """Fill the table of results; return the exit code. Arguments as of :func:`_classify_one`."""
    from histoflare.slides.files import fingerprint
    from histoflare.slides.sources import find_sources

    sources = find_sources(path)
    from histoflare.bags.classify_slides import classify_slides
    from histoflare.bags.task import BagTask

    classes = BagTask.from_json(header.task).target.classes

    report = follow_table(
        lambda on_start, on_row, on_part: classify_slides(
            lambda: _load(header, encoder),
            classes,
            sources,
            table,
            model_sha256=fingerprint(header.path).sha256,
            folders=_files(wanted),
            plane=plane.value,
            default_mpp=mpp,
            threads=threads,
            on_start=on_start,
            on_row=on_row,
            on_patches=lambda source, done, total: on_part(f"{source.path.name}: patch {done} of {total}"),
        )
    )
    show_table(report, table, as_json=as_json)
    return report.exit_code


def _load(header: ModelHeader, encoder: tuple[Path | None, str | None, str]) -> SlideClassifier:
    from histoflare.bags.classifier import SlideClassifier

    return SlideClassifier(header, *encoder)


def _files(wanted: tuple[Path | None, Path | None, Path | None]) -> AttentionFiles:
    from histoflare.bags.attention_files import AttentionFiles

    return AttentionFiles(*wanted)


def _show(answer: Answer, wanted: tuple[Path | None, ...], *, as_json: bool) -> None:
    """Say what the model says, and what was written."""
    from histoflare.bags.classifier import say_patches

    for warning in answer.warnings:
        say(f"warning: {warning}", style="yellow")
    for note in answer.notes:
        say(f"note: {note}")
    if as_json:
        print_json(answer.to_json())
        return
    if answer.probabilities:
        shown = make_table("class", "probability")
        for label, share in answer.probabilities.items():
            shown.add_row(label, f"{share:.3f}")
        out.print(shown)
    else:
        out.print(answer.predicted, highlight=False, markup=False)
    console.print(f"{say_patches(answer.patches)} · {answer.encoder}", highlight=False, markup=False)
    files = ", ".join(str(path) for path in wanted if path is not None)
    if files:
        tell(files)

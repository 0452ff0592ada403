"""``histoflare classify``: one slide, from its file to a model's answer and what it attends to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import console, make_table, out, print_json, progress
from histoflare.commands.options import MODEL_HELP, PLANE_HELP, PlaneName
from histoflare.commands.outputs import check_outputs
from histoflare.commands.slide import MPP_HELP
from histoflare.errors import JobError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from histoflare.bags.mem import MEM
    from histoflare.bags.network_encoder import Encoder
    from histoflare.slides.mosaic import Mosaic
    from histoflare.slides.reader import Slide

BATCH_PATCHES = 16
FEW_PATCHES = 2
"""An answer that rests on so few patches is said to."""


def classify(
    slide: Annotated[Path, typer.Argument(help="Slide file, or the folder of a DICOM series.")],
    model: Annotated[Path, typer.Option(help=MODEL_HELP)],
    heatmap: Annotated[
        Path | None, typer.Option(help="What the model attends to: a pyramidal TIFF in colour.")
    ] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="Picture of the slide and what the model attends to (PNG).")
    ] = None,
    plane: Annotated[PlaneName, typer.Option(help=PLANE_HELP)] = PlaneName.BOUNDS,
    mpp: Annotated[float | None, typer.Option(help=MPP_HELP)] = None,
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

    A research model's answer is not a diagnosis.

    Example: histoflare classify a.svs --model demo-run --heatmap a.heat.tiff --overlay a.heat.png
    """
    from histoflare.model_file import read_model_header
    from histoflare.slides.mosaic import MosaicParameters, build_mosaic
    from histoflare.slides.reader import Slide

    header = read_model_header(model)
    header.check_data("bags")
    check_outputs([heatmap, overlay], [slide, header.path, *([] if weights is None else [weights])])
    encoder_id = str(header.task.get("encoder"))
    if header.mosaic is None or encoder_id.startswith("imported:"):
        raise JobError(
            f"{header.path}: does not say how its slides were cut: its features were imported, or an earlier "
            "histoflare wrote it."
        )
    _check_weights(encoder_id, weights)
    with Slide(slide, mpp=mpp) as opened:
        # Loading PyTorch and the networks takes seconds: what may be wrong with the slide comes before.
        mosaic = build_mosaic(opened, MosaicParameters.from_json(header.mosaic), threads)
        used = (weights, weights_sha256, device)
        answer = _ask(opened, mosaic, header.path, used, threads, heatmap, overlay, plane)
    shares, patches = answer["probabilities"], answer["patches"]
    for warning in answer["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print_json(answer)
        return
    table = make_table("class", "probability")
    for label, share in shares.items():
        table.add_row(label, f"{share:.3f}")
    out.print(table)
    console.print(f"{_counted(patches)} · {answer['encoder']}", highlight=False, markup=False)
    files = ", ".join(str(path) for path in (heatmap, overlay) if path is not None)
    if files:
        out.print(files, soft_wrap=True, highlight=False, markup=False)


def _ask(
    slide: Slide,
    mosaic: Mosaic,
    model: Path,
    encoder_file: tuple[Path | None, str | None, str],
    threads: int,
    heatmap: Path | None,
    overlay: Path | None,
    plane: PlaneName,
) -> dict[str, Any]:
    """Return the model's answer as JSON-ready values, and write what shows where it looks.

    Args:
        encoder_file: Weight file, its SHA-256 and device of the encoder.
    """
    import numpy as np
    import torch

    from histoflare.bags.encoder import choose_device, load_encoder_of
    from histoflare.bags.task import MemTask
    from histoflare.model_file import read_model_file
    from histoflare.site.pictures import attention_limit

    loaded = read_model_file(model, MemTask)
    encoder = load_encoder_of(loaded.task.encoder, *encoder_file, mosaic.parameters.patch_px)
    network = loaded.build_model().to(choose_device(encoder_file[2]))
    features = torch.cat(list(_features(slide, mosaic, encoder, threads, "mosaic")))  # (n, f)
    with torch.inference_mode():
        found = loaded.task.probabilities(network, features)
    answer: dict[str, Any] = {
        "patches": len(features),
        "encoder": encoder.id,
        "probabilities": {
            label: float(share) for label, share in zip(loaded.task.labels, found, strict=True)
        },
        "warnings": _warnings(len(features)),
    }
    if heatmap is not None or overlay is not None:
        relative = _attend(slide, mosaic, encoder, network, features, threads)
        limit = attention_limit([relative])
        answer["attention"] = {
            "patches": len(relative),
            "least": float(relative.min()),
            "most": float(relative.max()),
            "colours_end_at": limit,
        }
        corners = [(patch.l0_x_px, patch.l0_y_px) for patch in mosaic.candidates]
        l0_coords = np.array(corners, np.int64)
        _write(slide, l0_coords, mosaic.l0_patch_px, relative, limit, heatmap, overlay, plane)
    return answer


def _check_weights(encoder_id: str, weights: Path | None) -> None:
    """Say at once that the weight file is not there."""
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


def _counted(patches: int) -> str:
    return f"{patches} patch" if patches == 1 else f"{patches} patches"


def _warnings(patches: int) -> list[str]:
    """Return what is to be known of an answer that rests on so many patches."""
    if patches > FEW_PATCHES:
        return []
    return [
        f"the answer rests on {_counted(patches)}: the slide has little tissue for patches of this size. Do "
        "not rely on it."
    ]


def _features(
    slide: Slide, mosaic: Mosaic, encoder: Encoder, threads: int, what: str
) -> Iterator[torch.Tensor]:
    """Yield the features (b, f) of the chosen patches, batch by batch, read while others are encoded."""
    from contextlib import closing

    from histoflare.bags.patches import MosaicPatchDataset, iterate_batches

    patches = MosaicPatchDataset(slide, mosaic)
    with progress() as bar, closing(iterate_batches(patches, BATCH_PATCHES, threads)) as batches:
        task = bar.add_task(what, total=len(patches))
        for batch in batches:
            yield encoder.encode(batch)
            bar.advance(task, len(batch))


def _attend(
    slide: Slide, mosaic: Mosaic, encoder: Encoder, network: MEM, features: torch.Tensor, threads: int
) -> NDArray[np.float64]:
    """Return the relative attention to every candidate (c,); the chosen have ``features`` (n, f)."""
    import numpy as np

    from histoflare.bags.heatmap import BagAttention

    attention = BagAttention(network, features)
    relative = np.empty(len(mosaic.candidates))
    relative[list(mosaic.chosen)] = attention.bag
    others = sorted(set(range(len(mosaic.candidates))) - set(mosaic.chosen))
    if others:
        rest = replace(mosaic, chosen=tuple(others))
        batches = _features(slide, rest, encoder, threads, "other patches")
        relative[others] = np.concatenate([attention.added(batch) for batch in batches])
    return relative


def _write(
    slide: Slide,
    l0_coords: NDArray[np.int64],
    l0_patch_px: int,
    relative: NDArray[np.float64],
    limit: float,
    heatmap: Path | None,
    overlay: Path | None,
    plane: PlaneName,
) -> None:
    """Write the heat map and the picture that are wanted."""
    from tempfile import TemporaryDirectory

    from histoflare.bags.heatmap import write_heat
    from histoflare.site.pictures import attention_levels
    from histoflare.slides.mask_overlay import add_attention_legend
    from histoflare.slides.overlay import draw_attention, read_picture
    from histoflare.slides.planes import plane_of
    from histoflare.storage import atomic_path, make_folder

    levels = attention_levels(relative, limit)
    if heatmap is not None:
        make_folder(heatmap.parent)
        with TemporaryDirectory(dir=heatmap.parent, prefix=".heat.") as scratch:
            covered = plane_of(slide.info, plane.value)
            write_heat(heatmap, levels, l0_coords, l0_patch_px, covered, slide.mpp, Path(scratch))
    if overlay is not None:
        base = read_picture(slide)
        picture = draw_attention(base, l0_coords, l0_patch_px, levels)
        picture = add_attention_legend(picture, limit, base.px_per_l0 / slide.mpp)
        with atomic_path(overlay) as partial:
            picture.save(partial, "PNG")

"""``histoflare classify``: one slide, from its file to a model's answer and what it attends to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histoflare.commands.console import console, make_table, out, print_json, progress
from histoflare.commands.outputs import check_outputs
from histoflare.commands.slide import MPP_HELP
from histoflare.errors import JobError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from histoflare.bags.encoder import Encoder
    from histoflare.bags.mem import MEM
    from histoflare.slides.mosaic import Mosaic
    from histoflare.slides.reader import Slide

MODEL_FILE = "model.safetensors"
BATCH_PATCHES = 16


def classify(
    slide: Annotated[Path, typer.Argument(help="Slide file, or the folder of a DICOM series.")],
    model: Annotated[Path, typer.Option(help=f"A model file, or a run's folder with {MODEL_FILE}.")],
    heatmap: Annotated[
        Path | None, typer.Option(help="What the model attends to: a pyramidal TIFF in colour.")
    ] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="Picture of the slide and what the model attends to (PNG).")
    ] = None,
    mpp: Annotated[float | None, typer.Option(help=MPP_HELP)] = None,
    weights: Annotated[Path | None, typer.Option(help="Weight file of the model's encoder.")] = None,
    weights_sha256: Annotated[str | None, typer.Option(help="SHA-256 the weight file must have.")] = None,
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
    import numpy as np
    import torch

    from histoflare.bags.encoder import choose_device, load_encoder
    from histoflare.bags.model_file import load_model
    from histoflare.site.pictures import attention_limit
    from histoflare.slides.mosaic import MosaicParameters, build_mosaic
    from histoflare.slides.reader import Slide

    file = model / MODEL_FILE if model.is_dir() else model
    check_outputs([heatmap, overlay], [slide, file, *([] if weights is None else [weights])])
    loaded = load_model(file)
    if loaded.mosaic is None:
        raise JobError(f"{file}: does not say how its slides were cut (features were imported).")
    encoder = load_encoder(loaded.task.encoder.rpartition(":")[0], weights, weights_sha256, device)
    if encoder.id != loaded.task.encoder:
        raise JobError(f"The model wants features of {loaded.task.encoder}; the encoder is {encoder.id}.")
    network = loaded.build_model().to(choose_device(device))
    with Slide(slide, mpp=mpp) as opened:
        mosaic = build_mosaic(opened, MosaicParameters.from_json(loaded.mosaic), threads)
        features = torch.cat(list(_features(opened, mosaic, encoder, threads, "mosaic")))  # (n, f)
        with torch.inference_mode():
            found = loaded.task.probabilities(network, features)
        shares = {label: float(share) for label, share in zip(loaded.task.labels, found, strict=True)}
        answer: dict[str, object] = {
            "patches": len(features),
            "encoder": encoder.id,
            "probabilities": shares,
        }
        if heatmap is not None or overlay is not None:
            relative = _attend(opened, mosaic, encoder, network, features, threads)
            limit = attention_limit([relative])
            answer["attention"] = {
                "patches": len(relative),
                "least": float(relative.min()),
                "most": float(relative.max()),
                "colours_end_at": limit,
            }
            corners = [(patch.l0_x_px, patch.l0_y_px) for patch in mosaic.candidates]
            _write(opened, np.array(corners, np.int64), mosaic.l0_patch_px, relative, limit, heatmap, overlay)
    if as_json:
        print_json(answer)
        return
    table = make_table("class", "probability")
    for label, share in shares.items():
        table.add_row(label, f"{share:.3f}")
    out.print(table)
    console.print(f"{len(features)} patches · {encoder.id}", highlight=False, markup=False)
    files = ", ".join(str(path) for path in (heatmap, overlay) if path is not None)
    if files:
        out.print(files, soft_wrap=True, highlight=False, markup=False)


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
) -> None:
    """Write the heat map and the picture that are wanted."""
    from tempfile import TemporaryDirectory

    from histoflare.bags.heatmap import write_heat
    from histoflare.site.pictures import attention_levels
    from histoflare.slides.mask_overlay import add_attention_legend
    from histoflare.slides.overlay import draw_attention, read_picture
    from histoflare.storage import atomic_path, make_folder

    levels = attention_levels(relative, limit)
    if heatmap is not None:
        make_folder(heatmap.parent)
        with TemporaryDirectory(dir=heatmap.parent, prefix=".heat.") as scratch:
            write_heat(
                heatmap, levels, l0_coords, l0_patch_px, slide.info.l0_size_px, slide.mpp, Path(scratch)
            )
    if overlay is not None:
        base = read_picture(slide)
        picture = draw_attention(base, l0_coords, l0_patch_px, levels)
        picture = add_attention_legend(picture, limit, base.px_per_l0 / slide.mpp)
        with atomic_path(overlay) as partial:
            picture.save(partial, "PNG")

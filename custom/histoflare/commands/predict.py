"""``histoflare predict``: one slide, from its file to a model's answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from histoflare.commands.console import console, out, print_json
from histoflare.errors import JobError


def predict(
    model: Annotated[Path, typer.Argument(help="A model file, e.g. demo-run/model.safetensors.")],
    slide: Annotated[Path, typer.Argument(help="The slide.")],
    mpp: Annotated[
        float | None, typer.Option(help="µm per pixel of level 0, where the slide has none.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weight file of the model's encoder.")] = None,
    weights_sha256: Annotated[str | None, typer.Option(help="SHA-256 the weight file must have.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Cut the slide's mosaic, encode it and ask the model.

    A research model's answer is not a diagnosis.

    Example: histoflare predict demo-run/model.safetensors slide.svs --json
    """
    from contextlib import closing

    import torch

    from histoflare.bags.encoder import load_encoder
    from histoflare.bags.model_file import load_model
    from histoflare.bags.patches import MosaicPatchDataset, iterate_batches
    from histoflare.slides.mosaic import MosaicParameters, build_mosaic
    from histoflare.slides.reader import Slide

    loaded = load_model(model)
    if loaded.mosaic is None:
        raise JobError(f"{model}: does not say how its slides were cut (features were imported).")
    encoder = load_encoder(loaded.task.encoder.rpartition(":")[0], weights, weights_sha256)
    if encoder.id != loaded.task.encoder:
        raise JobError(f"The model wants features of {loaded.task.encoder}; the encoder is {encoder.id}.")
    with Slide(slide, mpp=mpp) as opened:
        mosaic = build_mosaic(opened, MosaicParameters.from_json(loaded.mosaic))
        with closing(iterate_batches(MosaicPatchDataset(opened, mosaic), 16, threads=1)) as batches:
            features = torch.cat([encoder.encode(batch) for batch in batches])  # (n, f)
    with torch.inference_mode():
        found = loaded.task.probabilities(loaded.build_model(), features)
    answer = {label: float(share) for label, share in zip(loaded.task.labels, found, strict=True)}
    if as_json:
        print_json({"patches": len(features), "encoder": encoder.id, "probabilities": answer})
    else:
        console.print(f"{len(features)} patches · {encoder.id}", highlight=False)
        for label, share in answer.items():
            out.print(f"{label}\t{share:.3f}", highlight=False)

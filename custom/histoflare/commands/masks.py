"""``histoflare masks``: images and masks that segmentation is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands import mask_imports
from histoflare.commands.mask_options import AS_JSON, LABELS, follow, split_labels
from histoflare.commands.options import JOB_HELP, Preset
from histoflare.errors import JobError
from histoflare.shipped import find_job

if TYPE_CHECKING:
    from histoflare.masks.images import ImageCohort

app = typer.Typer(no_args_is_help=True)
app.add_typer(mask_imports.app, name="import", help="Make a manifest of images and masks from what there is.")


@app.callback()
def _group() -> None:
    """Make and check what segmentation is trained on: images with a mask of class indices each."""


@app.command()
def check(
    manifest: Annotated[Path, typer.Argument(help="CSV with image, mask, patient and optional columns.")],
    labels: LABELS,
    window_px: Annotated[int, typer.Option(help="Side of the job's windows.", min=1)] = 1,
    mpp: Annotated[float | None, typer.Option(help="The job's resolution in µm/px.")] = None,
    as_json: AS_JSON = False,
) -> None:
    """Check a manifest and read every image and mask of it; every fault is listed.

    Example: histoflare masks check tnbc-masks/images.csv --labels background,nucleus --window-px 256
    """
    from histoflare.commands.console import print_json, say
    from histoflare.masks.images import load_image_cohort

    cohort = follow(
        "images",
        lambda on_image: load_image_cohort(
            manifest.stem,
            manifest,
            split_labels(labels),
            mpp=mpp,
            window_px=window_px,
            mpp_place="with --mpp",
            on_image=on_image,
        ),
    )
    for warning in cohort.warnings:
        say(f"note: {warning}")
    counts = _counts(cohort)
    if as_json:
        print_json({**counts, "warnings": list(cohort.warnings)})
        return
    _print_counts(counts)


@app.command()
def pretrained(
    job: Annotated[Path, typer.Argument(help=f"Whose network is to start from it. {JOB_HELP}")],
    out: Annotated[Path, typer.Option(help="The model file to make.")],
    swin: Annotated[Path | None, typer.Option(help="Swin-T weights of ImageNet (timm, authors, HF).")] = None,
    convnext: Annotated[Path | None, typer.Option(help="ConvNeXt-T weights of ImageNet, likewise.")] = None,
    preset: Preset = None,
) -> None:
    """Put ImageNet weights into a job's network, for 'histoflare job make --model'.

    The files are read here and nowhere else: every site gets the first model from the server.

    Example: histoflare masks pretrained dhunet_fedavg --swin swin.pth --convnext convnext.pth
    --out first.safetensors
    """
    from histoflare.commands.console import console
    from histoflare.commands.outputs import check_outputs
    from histoflare.flare.job_choice import choose_job
    from histoflare.masks.checkpoints import load_pretrained
    from histoflare.model_file import save_model
    from histoflare.privacy.protocol import hash_protocol
    from histoflare.site.kinds import IMAGES

    job = find_job(job)
    check_outputs([out], [path for path in (job, swin, convnext) if path is not None])
    read = choose_job(job, preset).job
    task = read.task
    if swin is None and convnext is None:
        raise JobError("Give --swin, --convnext or both.")
    IMAGES.expect(task, f"{job}: does not segment.")
    network = task.build_model()
    loaded = load_pretrained(network, swin=swin, convnext=convnext)
    save_model(
        out,
        network.state_dict(),
        task,
        protocol_sha256=hash_protocol(read.protocol),
        training={"pretrained": "ImageNet"},
    )
    console.print(
        f"{out}: {loaded.swin} tensors of Swin-T, {loaded.convnext} of ConvNeXt-T",
        highlight=False,
        markup=False,
    )


def _counts(cohort: ImageCohort) -> dict[str, Any]:
    """Return images, patients and share of pixels by class, for each split."""
    from histoflare.masks.image_files import class_counts
    from histoflare.masks.windows import IGNORE

    counts: dict[str, Any] = {}
    for split in ("train", "validation", "test"):
        records = cohort.of_split(split)
        pixels = sum(class_counts(cohort.read_mask(record)) for record in records)
        if not records or isinstance(pixels, int):
            continue
        total = int(pixels.sum())
        shares = {label: int(pixels[index]) / total for index, label in enumerate(cohort.labels)}
        counts[split] = {
            "images": len(records),
            "patients": len({record.patient for record in records}),
            "classes": {**shares, "not annotated": int(pixels[IGNORE]) / total},
        }
    return counts


def _print_counts(counts: dict[str, Any]) -> None:
    from histoflare.commands.console import make_table, out

    table = make_table("split", "images", "patients", "share of pixels")
    for split, each in counts.items():
        shares = ", ".join(
            f"{label} {100 * share:.1f} %" for label, share in each["classes"].items() if share
        )
        table.add_row(split, str(each["images"]), str(each["patients"]), shares)
    out.print(table, markup=False)

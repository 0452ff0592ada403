"""ImageNet weights for DHUnet's encoders, from local files under the names that are in use.

Swin-T: the file of the authors (``swin_tiny_patch4_window7_224.pth``), of timm (old and new names) or of
transformers. ConvNeXt-T: the file of the authors (``convnext_tiny_1k_224_ema.pth``), of timm or of
transformers. DHUnet has fewer blocks in the third stage: it takes 2 and 5 of Swin's six and 2, 5 and 8 of
ConvNeXt's nine. The quadrants of a patch merge are in the same order in all these files and in MONAI's
``mergingv2``, so no weight is permuted.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from histoflare.errors import CheckpointError
from histoflare.masks.checkpoint_names import convnext_names, swin_names
from histoflare.masks.networks.dhunet import DHUnet

LISTED = 10
THIRD_STAGE = 2
SWIN_TAKEN = (2, 5)
SWIN_DEPTH = 6
CONVNEXT_TAKEN = (2, 5, 8)
CONVNEXT_DEPTH = 9


@dataclass(frozen=True)
class LoadedWeights:
    """What :func:`load_pretrained` put into a network.

    Attributes:
        swin: Number of tensors of the Swin encoder that were loaded.
        convnext: Number of tensors of the ConvNeXt encoder that were loaded.
    """

    swin: int
    convnext: int


@dataclass(frozen=True)
class Source:
    """A published network whose weights an encoder takes.

    Attributes:
        title: For messages.
        blocks: Where an encoder's state has the third stage's blocks, e.g. ``stages.2.blocks.``.
        taken: Blocks of the published third stage that become 0, 1, ….
        depth: Number of blocks of the published third stage.
        translate: From a file's tensors to (tensors under the encoder's names, keys that have no such name).
    """

    title: str
    blocks: str
    taken: tuple[int, ...]
    depth: int
    translate: Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], list[str]]]


SWIN = Source("Swin-T", "stages.2.blocks.", SWIN_TAKEN, SWIN_DEPTH, swin_names)
CONVNEXT = Source("ConvNeXt-T", "stages.2.layers.", CONVNEXT_TAKEN, CONVNEXT_DEPTH, convnext_names)


def load_pretrained(
    network: nn.Module, *, swin: Path | None = None, convnext: Path | None = None
) -> LoadedWeights:
    """Put the weights of ImageNet classifiers into the encoders of a DHUnet.

    Both files are read and checked before anything is changed: it loads all or nothing. Every tensor of the
    published network has to be there, those of blocks that are not taken too; the classifier and its norm
    are left out.

    Args:
        network: A :class:`DHUnet`, changed in place.
        swin: A Swin-T file (``.safetensors``, or written by ``torch.save``), or None to leave the encoder.
        convnext: A ConvNeXt-T file, or None.

    Raises:
        CheckpointError: There is no such file (CHECKPOINT_MISSING); it is damaged, partial, or of another
            network or width, with the keys listed; or ``network`` is no DHUnet (CHECKPOINT_INVALID).
    """
    if not isinstance(network, DHUnet):
        raise CheckpointError(
            f"ImageNet weights are loaded into dhunet only, not into {type(network).__name__}: "
            "leave the pretrained files out of the job"
        )
    for_swin = None if swin is None else read_encoder(swin, network.swin, SWIN)
    for_convnext = None if convnext is None else read_encoder(convnext, network.convnext, CONVNEXT)
    if for_swin is not None:
        network.swin.load_state_dict(for_swin)
    if for_convnext is not None:
        network.convnext.load_state_dict(for_convnext)
    return LoadedWeights(swin=len(for_swin or {}), convnext=len(for_convnext or {}))


def read_encoder(path: Path, encoder: nn.Module, source: Source) -> dict[str, Tensor]:
    """Return a state for ``encoder`` from the file ``path`` of the network ``source``.

    Raises:
        CheckpointError: As :func:`load_pretrained`.
    """
    found, unexpected = source.translate(read_tensors(path))
    state = encoder.state_dict()
    shapes = {name: tensor.shape for own, tensor in state.items() for name in _published_names(own, source)}
    missing = sorted(shapes.keys() - found.keys())
    unexpected = sorted(unexpected + list(found.keys() - shapes.keys()))
    wrong = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name].shape != shape
    ]
    faults = [
        _listed(kind, keys)
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if keys
    ]
    if faults:
        raise CheckpointError(
            f"{path} does not hold the weights of {source.title} (ImageNet, 224 px) that this network takes; "
            "nothing was loaded. Use the published file, and width 96.\n  " + "\n  ".join(faults)
        )
    broken = [name for name in shapes if not torch.isfinite(found[name]).all()]
    if broken:
        raise CheckpointError(
            f"{path} holds NaN or infinity; nothing was loaded. Fetch it anew.\n  "
            + _listed("broken", broken)
        )
    return {own: found[_taken_name(own, source)].to(tensor.dtype) for own, tensor in state.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name: safetensors, or a state dict of ``torch.save``.

    A state dict may stand below ``model`` or ``state_dict``. Nothing but tensors is unpickled.

    Raises:
        CheckpointError: There is no such file (CHECKPOINT_MISSING) or it is no such file
            (CHECKPOINT_INVALID).
    """
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint {path}: put the file there, or leave it out of the job",
            reason="CHECKPOINT_MISSING",
        )
    try:
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            stored: object = load(content)
        else:
            stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{path} is no checkpoint that can be read safely ({said}): fetch it anew, or save it as "
            "safetensors"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{path} holds no state dict: save network.state_dict() into it")
    return {str(key): value for key, value in stored.items() if isinstance(value, Tensor)}


def _published_names(own: str, source: Source) -> Iterator[str]:
    """Yield the names the published network has for an encoder's tensor ``own``.

    That is the one, or, for the third stage's block 0, one for every block there.
    """
    block = _third_stage_block(own, source)
    if block is None:
        yield own
    elif block == 0:
        rest = own.removeprefix(f"{source.blocks}0.")
        for index in range(source.depth):
            yield f"{source.blocks}{index}.{rest}"


def _taken_name(own: str, source: Source) -> str:
    """Return the name, in the published network, of what becomes the encoder's tensor ``own``."""
    block = _third_stage_block(own, source)
    if block is None:
        return own
    rest = own.removeprefix(f"{source.blocks}{block}.")
    return f"{source.blocks}{source.taken[block]}.{rest}"


def _third_stage_block(own: str, source: Source) -> int | None:
    """Return which block of the third stage the tensor ``own`` is of, None if of none."""
    match = re.match(re.escape(source.blocks) + r"(\d+)\.", own)
    return int(match[1]) if match else None


def _listed(kind: str, keys: list[str]) -> str:
    """Return e.g. ``12 missing: a, b, …`` with at most ``LISTED`` keys."""
    more = ", …" if len(keys) > LISTED else ""
    return f"{len(keys)} {kind}: {', '.join(keys[:LISTED])}{more}"

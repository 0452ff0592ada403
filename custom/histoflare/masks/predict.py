"""Masks out of a network: of windows, and of whole images that fit into memory.

A whole slide is ``masks.segmenter``'s.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from histoflare.errors import JobError
from histoflare.masks.augmentation import IMAGENET_MEAN, IMAGENET_STD
from histoflare.masks.windows import resize_window

WHITE = 1.0
"""What stands beside an image that is smaller than a window: bare glass."""


@torch.no_grad()
def window_probabilities(model: nn.Module, windows: NDArray[np.uint8], patch_px: int) -> NDArray[np.float32]:
    """Return the class probabilities of windows, as the network sees them.

    Args:
        model: In evaluation mode.
        windows: uint8 (b, w, w, 3).
        patch_px: Side of what the network sees.

    Returns:
        float32 (b, k, patch_px, patch_px).

    Raises:
        JobError: The network gives numbers that are not finite (NOT_FINITE).
    """
    device = next(model.parameters()).device
    patches = np.stack([resize_window(window, patch_px) for window in windows])  # (b, p, p, 3)
    images = _normalised(_as_images(patches))  # (b, 3, p, p)
    probabilities: NDArray[np.float32] = _probabilities(model(images.to(device))).numpy(force=True)
    return probabilities


@torch.no_grad()
def predict_image(
    model: nn.Module,
    image: NDArray[np.uint8],
    *,
    window_px: int,
    stride_px: int,
    patch_px: int,
    batch_size: int,
    fallback: int | None = 0,
) -> NDArray[np.uint8]:
    """Return the most probable class of each pixel of an image.

    The image is brought to the network's scale and asked in windows that overlap as those of training do.
    Their probabilities are blended with MONAI's Gaussian weights and brought back to the image's size.

    Args:
        model: In evaluation mode.
        image: uint8 (h, w, 3); smaller than a window is fine.
        window_px, stride_px: Of the windows in pixels of the image.
        patch_px: Side of a window as the network sees it.
        fallback: Class of pixels for which the network gives numbers that are not finite. A network that was
            broken by noise shall be seen as useless, and not stop its own evaluation. None: that is an error.

    Returns:
        uint8 (h, w) class indices.

    Raises:
        JobError: Without ``fallback``, the network gives numbers that are not finite (NOT_FINITE).
    """
    height, width = image.shape[:2]
    scale = patch_px / window_px
    small = (max(1, round(height * scale)), max(1, round(width * scale)))
    pixels = _as_images(_resized(image, small)[None])  # (1, 3, h', w')
    pixels = F.pad(pixels, (0, max(0, patch_px - small[1]), 0, max(0, patch_px - small[0])), value=WHITE)
    inferer = SlidingWindowInferer(
        roi_size=(patch_px, patch_px),
        sw_batch_size=batch_size,
        overlap=1 - stride_px / window_px,
        mode="gaussian",
    )
    pixels = _normalised(pixels).to(next(model.parameters()).device)

    def probabilities(windows: Tensor) -> Tensor:
        logits = model(windows)
        return _probabilities(logits) if fallback is None else _or_else(logits, fallback)

    blended = inferer(pixels, probabilities)
    assert isinstance(blended, Tensor)
    blended = blended[:, :, : small[0], : small[1]]  # (1, k, h', w')
    if blended.shape[2:] != (height, width):
        blended = F.interpolate(blended, (height, width), mode="bilinear", align_corners=False)
    return blended[0].argmax(dim=0).to(torch.uint8).numpy(force=True)  # (h, w)


def _as_images(windows: NDArray[np.uint8]) -> Tensor:
    """Return images uint8 (b, h, w, 3) as float32 (b, 3, h, w) in [0, 1]."""
    return torch.tensor(windows).permute(0, 3, 1, 2).float() / 255


def _resized(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return an image (h, w, 3) of another size (h, w), as ``masks.windows`` resizes windows in training."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def _normalised(images: Tensor) -> Tensor:
    """Return images (b, 3, h, w) in [0, 1] as the network was trained on them."""
    mean, std = (images.new_tensor(each)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def _or_else(logits: Tensor, fallback: int) -> Tensor:
    """Return probabilities (b, k, h, w); the class ``fallback`` for certain where logits are not finite."""
    found = logits.float().softmax(dim=1)
    certain = torch.zeros_like(found[:1, :, :1, :1])
    certain[:, fallback] = 1.0
    return torch.where(found.isfinite().all(dim=1, keepdim=True), found, certain)


def _probabilities(logits: Tensor) -> Tensor:
    found = logits.float().softmax(dim=1)
    if not bool(torch.isfinite(found).all()):
        raise JobError(
            "The network gives numbers that are not finite: training diverged; use a smaller learning rate.",
            reason="NOT_FINITE",
        )
    return found

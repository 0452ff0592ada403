"""Windows as a network sees them: MONAI transforms that flip, turn, change colours and normalise.

Everything random in an item follows from the seed it is asked with, and from nothing else: the same seed
gives the same bytes in every process, whatever was drawn before.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import Dataset
from monai.transforms import Compose, MapTransform, RandFlipd, RandomizableTransform, Transform
from monai.utils import convert_to_tensor
from torch import Tensor

from histoflare.masks.images import ImageCohort, ImageRecord

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

HUE_TURNS = 0.05
SATURATION = 0.2
VALUE = 0.2
"""How far the colours go: hue by a share of the full circle, saturation and value by a share of themselves.

The papers say that HSV is changed and not by how much; these keep haematoxylin violet and eosin pink.
"""

Window = tuple[ImageRecord, tuple[int, int]]


class LoadWindow(Transform):  # type: ignore[misc]
    """A window (record, corner) → ``image`` uint8 (3, p, p) and ``mask`` uint8 (1, p, p)."""

    def __init__(self, cohort: ImageCohort, windows: Sequence[Window], window_px: int, patch_px: int) -> None:
        self.cohort, self.window_px, self.patch_px = cohort, window_px, patch_px
        self.corners: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for record, xy in windows:
            self.corners[record.slide_id].append(xy)

    def __call__(self, window: Window) -> dict[str, Tensor]:
        """Return the window with its augmentation; raises MaskError as :meth:`ImageCohort.read`."""
        record, xy = window
        image, mask = self.cohort.cache.read_patch(
            record, xy, self.cohort.labels, self.window_px, self.patch_px, self.corners[record.slide_id]
        )
        return {
            "image": torch.tensor(image).permute(2, 0, 1),  # (h, w, 3) → (3, h, w), a copy
            "mask": torch.tensor(mask)[None],
        }


class ToUnitFloatd(MapTransform):  # type: ignore[misc]
    """uint8 in 0 … 255 → float32 in 0 … 1, contiguous, without MetaTensor, whose book-keeping takes time."""

    def __call__(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = dict(data)
        for key in self.key_iterator(made):
            image: Tensor = convert_to_tensor(made[key], track_meta=False)
            made[key] = image.to(torch.float32, memory_format=torch.contiguous_format) / 255
        return made


MOST_DEGREES = 90.0
"""How far windows are turned, either way (Pan et al. 2024, III.A: random rotations between -90° and 90°)."""


class RandTurnd(RandomizableTransform, MapTransform):  # type: ignore[misc]
    """Turn an image float32 (3, h, w) and its mask uint8 (1, h, w) by one random angle about their centre.

    What comes in at the corners is the window's own, reflected at its edges, in the image and the mask alike:
    every pixel keeps its class, and none is made up. Pixels of the image are interpolated, those of the mask
    are the nearest ones, so that no class and no 255 (not annotated) arises in between. MONAI's
    ``RandRotated`` does the same in some four times the time.

    Args:
        image, mask: Their keys.
        most_degrees: The angle is uniform between minus and plus this.
    """

    def __init__(self, image: str, mask: str, most_degrees: float = MOST_DEGREES) -> None:
        MapTransform.__init__(self, [image, mask])
        RandomizableTransform.__init__(self, 1.0)
        self.image, self.mask, self.most_degrees = image, mask, most_degrees

    def randomize(self, data: Any = None) -> None:
        """Draw the angle."""
        super().randomize(None)
        self.degrees = float(self.R.uniform(-self.most_degrees, self.most_degrees))

    def __call__(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.randomize()
        image, mask = turn(
            data[self.image], convert_to_tensor(data[self.mask], track_meta=False), self.degrees
        )
        return {**data, self.image: image, self.mask: mask}


def turn(image: Tensor, mask: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Return an image float32 (3, h, w) and its mask uint8 (1, h, w), turned about their centre.

    Counter-clockwise. Outside the window lies its reflection. The image is interpolated (bilinear), the mask
    takes the nearest pixel.
    """
    height, width = image.shape[1:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # where each pixel comes from, in a plane that reaches from -1 to 1 along both sides
    back = torch.tensor([[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]])
    grid = F.affine_grid(back, [1, 1, height, width], align_corners=False)  # (1, h, w, 2)

    def sample(pixels: Tensor, mode: str) -> Tensor:
        return F.grid_sample(pixels[None], grid, mode, padding_mode="reflection", align_corners=False)[0]

    return sample(image, "bilinear"), sample(mask.float(), "nearest").to(mask.dtype)


class RandHSVd(RandomizableTransform, MapTransform):  # type: ignore[misc]
    """Turn the hue of an RGB image float32 (3, h, w) in 0 … 1, and scale its saturation and value.

    Args:
        keys: Of the images.
        hue_turns: The hue moves by up to this share of the full circle, either way.
        saturation, value: Each is multiplied by 1 ± up to this, and cut off at 1.
        prob: How often.
    """

    def __init__(
        self,
        keys: Sequence[str] | str,
        hue_turns: float = HUE_TURNS,
        saturation: float = SATURATION,
        value: float = VALUE,
        prob: float = 1.0,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.limits = (hue_turns, saturation, value)

    def randomize(self, data: Any = None) -> None:
        """Draw whether to change an image, and how much."""
        super().randomize(None)
        self.drawn = tuple(float(self.R.uniform(-limit, limit)) for limit in self.limits)

    def __call__(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.randomize()
        made = dict(data)
        if self._do_transform:
            for key in self.key_iterator(made):
                made[key] = change_colours(made[key], *self.drawn)
        return made


class ImageNetNormalized(MapTransform):  # type: ignore[misc]
    """float32 (3, h, w) in 0 … 1 → by the mean and deviation of ImageNet's channels, as encoders expect."""

    mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
    std = torch.tensor(IMAGENET_STD)[:, None, None]

    def __call__(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**data, **{key: (data[key] - self.mean) / self.std for key in self.key_iterator(data)}}


def change_colours(image: Tensor, hue_turns: float, saturation: float, value: float) -> Tensor:
    """Return RGB float32 (3, h, w) in 0 … 1 with its hue turned, the others times 1 + their share."""
    if hue_turns == saturation == value == 0.0:
        return image
    hue, chroma, brightest = split_hsv(image)
    safe = brightest.clamp(min=1e-12)
    new_value = (brightest * (1.0 + value)).clamp_(0.0, 1.0)
    new_chroma = (chroma / safe).mul_(1.0 + saturation).clamp_(0.0, 1.0).mul_(new_value)
    return join_hsv(hue + 6.0 * hue_turns, new_chroma, new_value)


def split_hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue in sixths of a turn (0 for grays), chroma (value x saturation), value of RGB (3, h, w)."""
    red, green, blue = image
    brightest = torch.maximum(torch.maximum(red, green), blue)
    chroma = brightest - torch.minimum(torch.minimum(red, green), blue)
    safe = chroma.clamp(min=1e-12)
    of_blue = (red - green).div_(safe).add_(4.0)
    of_green = (blue - red).div_(safe).add_(2.0)
    of_red = (green - blue).div_(safe)
    hue = torch.where(brightest == red, of_red, torch.where(brightest == green, of_green, of_blue))
    return hue, chroma, brightest


def join_hsv(hue: Tensor, chroma: Tensor, value: Tensor) -> Tensor:
    """Return RGB (3, h, w): a channel is ``value`` less what its distance in hue takes of ``chroma``.

    Red lies at 0, green at 2 and blue at 4 sixths of a turn; a channel is full within one sixth of its place
    and empty beyond two.
    """
    place = torch.tensor([0.0, 2.0, 4.0])[:, None, None]
    distance = (hue - place + 3.0).remainder_(6.0).sub_(3.0).abs_()  # (3, h, w) in 0 … 3
    return distance.sub_(1.0).clamp_(0.0, 1.0).mul_(chroma).neg_().add_(value)


def plain_transform() -> Compose:
    """Return what evaluation does to a loaded window: normalise."""
    return Compose([ToUnitFloatd("image"), ImageNetNormalized("image")])


def training_transform() -> Compose:
    """Return what training does to a loaded window; seed it with ``set_random_state``.

    As FedDP does (Pan et al. 2024, III.A): flips along both axes, a turn by any angle up to 90° either way,
    and changes of hue, saturation and value.
    """
    both = ["image", "mask"]
    return Compose(
        [
            RandFlipd(both, prob=0.5, spatial_axis=0),
            RandFlipd(both, prob=0.5, spatial_axis=1),
            ToUnitFloatd("image"),
            RandTurnd("image", "mask"),
            RandHSVd("image"),
            ImageNetNormalized("image"),
        ]
    )


class WindowDataset(Dataset):  # type: ignore[misc]
    """Windows of a cohort's images, ready for a network.

    An item is {"image": float32 (3, p, p), "mask": int64 (p, p)}, p = ``patch_px``.

    Args:
        cohort: Whose images they are.
        windows: (record, corner), as ``masks.training_windows`` gives them.
        patch_px: Side of an item.
        window_px: Side of a window in its image.
        augment: Whether items are flipped, turned and changed in colour.
    """

    def __init__(
        self, cohort: ImageCohort, windows: Sequence[Window], patch_px: int, window_px: int, augment: bool
    ) -> None:
        super().__init__(windows)
        # by itself and not in a Compose, which would hide an error about an image in one of its own
        self.load = LoadWindow(cohort, windows, window_px, patch_px)
        self.augment = augment
        self.change = training_transform() if augment else plain_transform()

    def item(self, index: int, seed: int) -> dict[str, Tensor]:
        """Return the window ``index``, changed as ``seed`` says.

        Raises:
            MaskError: Its image cannot be read any more.
        """
        if self.augment:
            self.change.set_random_state(seed=seed % (1 << 32))
        made = self.change(self.load(self.data[index]))
        mask: Tensor = convert_to_tensor(made["mask"], track_meta=False)
        return {"image": made["image"], "mask": mask[0].long()}  # (1, p, p) → (p, p)

    def _transform(self, index: int) -> dict[str, Tensor]:
        """Return the window ``index`` for MONAI's loaders, with the index as its seed."""
        return self.item(index, index)

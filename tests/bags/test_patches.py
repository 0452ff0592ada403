from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from monai.data import DataLoader, MetaTensor, PatchWSIDataset
from monai.transforms import Compose, RandFlipd, Resized, ScaleIntensityd
from PIL import Image

from histoflare.bags.patches import MosaicPatchDataset, iterate_batches
from histoflare.slides.mosaic import MosaicParameters, build_mosaic
from histoflare.slides.pyramid import write_pyramid
from histoflare.slides.reader import Slide

from .conftest import paint_slide


def test_items_are_those_of_monais_dataset(test_data: Path) -> None:
    path = test_data / "wsi" / "CMU-1-Small-Region.svs"
    with Slide(path) as slide:
        mosaic = build_mosaic(slide, MosaicParameters(patch_px=224, max_patches=5))
        ours = MosaicPatchDataset(slide, mosaic, label=1)
        data = [
            {"image": str(path), "location": (patch.l0_y_px, patch.l0_x_px), "label": 1}
            for patch in mosaic.patches
        ]
        theirs = PatchWSIDataset(
            data, patch_size=224, patch_level=0, center_location=False, reader="openslide"
        )
        assert len(ours) == len(theirs) == 5
        for mine, reference in zip(ours, theirs, strict=True):
            assert mine.keys() == reference.keys()
            assert isinstance(mine["image"], MetaTensor) and mine["image"].dtype == torch.uint8
            np.testing.assert_array_equal(mine["image"].numpy(), reference["image"].numpy())
            assert torch.equal(mine["label"], reference["label"])
            assert mine["image"].meta.keys() == reference["image"].meta.keys()
            for key, value in reference["image"].meta.items():
                np.testing.assert_array_equal(np.asarray(mine["image"].meta[key]), np.asarray(value), key)


def test_monais_transforms_and_loader_work_on_items(slide_path: Path, parameters: MosaicParameters) -> None:
    transform = Compose(
        [ScaleIntensityd("image"), RandFlipd("image", prob=1.0, spatial_axis=1), Resized("image", (32, 32))]
    )
    with Slide(slide_path) as slide:
        dataset = MosaicPatchDataset(slide, build_mosaic(slide, parameters), 1, transform)
        batch = next(iter(DataLoader(dataset, batch_size=4)))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["image"].min() >= 0 and batch["image"].max() <= 1
    assert batch["label"].tolist() == [1, 1, 1, 1]


def test_patches_are_read_at_the_mosaics_mpp(tmp_path: Path) -> None:
    """At 1 µm/px a slide of 0.5 is read from its second level; the pixels are OpenSlide's."""
    path = tmp_path / "a.tif"
    write_pyramid(path, paint_slide(3, (1024, 768)), 0.5)
    with Slide(path) as slide, openslide.OpenSlide(path) as raw:
        mosaic = build_mosaic(slide, MosaicParameters(mpp=1.0, patch_px=64, fraction=1.0))
        image = MosaicPatchDataset(slide, mosaic)[0]["image"]
        patch = mosaic.patches[0]
        level = raw.get_best_level_for_downsample(2.01)
        assert round(raw.level_downsamples[level]) == 2 and image.meta["level"] == level
        region = raw.read_region((patch.l0_x_px, patch.l0_y_px), level, (64, 64)).convert("RGB")
    np.testing.assert_array_equal(image.numpy(), np.asarray(region).transpose(2, 0, 1))
    assert image.meta["location"].tolist() == [patch.l0_y_px, patch.l0_x_px]
    assert isinstance(region, Image.Image)


def test_batches_hold_every_patch_in_order(slide_path: Path, parameters: MosaicParameters) -> None:
    with Slide(slide_path) as slide:
        dataset = MosaicPatchDataset(slide, build_mosaic(slide, parameters))
        one_by_one = torch.stack([item["image"].as_tensor() for item in dataset])
        for threads, batch_size in ((1, 3), (4, 3), (4, 1000)):
            batches = list(iterate_batches(dataset, batch_size, threads))
            assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
            assert type(batches[0]) is torch.Tensor
            assert torch.equal(torch.cat(batches), one_by_one)


class Counting:
    """A data set that counts how far it was read, and fails at ``broken``."""

    def __init__(self, length: int, broken: int = -1, seconds: float = 0.0) -> None:
        self.length, self.broken, self.seconds = length, broken, seconds
        self.started = 0
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        with self.lock:
            self.started += 1
        time.sleep(self.seconds)
        if index == self.broken:
            raise OSError("broken")
        return {"image": torch.full((3, 2, 2), index, dtype=torch.uint8)}


def test_reading_ahead_is_bounded() -> None:
    dataset = Counting(200)
    batches = iterate_batches(dataset, batch_size=10, threads=4, ahead=2)
    next(batches)
    assert settled(dataset, 30) == 30  # the batch in hand and two ahead
    next(batches)
    assert settled(dataset, 40) == 40
    batches.close()
    assert dataset.started == 40


def test_reading_overlaps_with_work() -> None:
    dataset = Counting(40)
    batches = iterate_batches(dataset, batch_size=10, threads=1)
    next(batches)
    assert settled(dataset, 20) >= 20, "the next batch is read while nobody asks for it"
    batches.close()


def settled(dataset: Counting, count: int) -> int:
    """Wait until ``count`` patches were asked for and others would have been; return how many were."""
    until = time.monotonic() + 20
    while dataset.started < count and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    return dataset.started


def test_an_error_comes_through_and_ends_the_reading() -> None:
    dataset = Counting(1000, broken=15)
    batches = iterate_batches(dataset, batch_size=10, threads=4)
    next(batches)
    with pytest.raises(OSError, match="broken"):
        next(batches)
    assert dataset.started <= 40
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("patches")]
    assert list(iterate_batches(Counting(0), 10, 2)) == []


@pytest.mark.parametrize("mpp", [0.5, 0.8])
def test_an_image_alone_is_the_items_image(
    slide_path: Path, parameters: MosaicParameters, mpp: float
) -> None:
    with Slide(slide_path) as slide:
        mosaic = build_mosaic(slide, MosaicParameters(mpp=mpp, patch_px=parameters.patch_px, fraction=1.0))
        dataset = MosaicPatchDataset(slide, mosaic)
        for index in range(len(dataset)):
            image = dataset.read_image(index)
            assert torch.equal(image, dataset[index]["image"].as_tensor())
            image += 1  # its memory is its own


def test_batches_are_of_transformed_images_where_there_is_a_transform(
    slide_path: Path, parameters: MosaicParameters
) -> None:
    with Slide(slide_path) as slide:
        mosaic = build_mosaic(slide, parameters)
        plain = torch.cat(list(iterate_batches(MosaicPatchDataset(slide, mosaic), 4, 1)))
        half = ScaleIntensityd("image", minv=0.0, maxv=0.5)
        scaled = torch.cat(list(iterate_batches(MosaicPatchDataset(slide, mosaic, transform=half), 4, 1)))
    assert plain.dtype == torch.uint8 and scaled.is_floating_point()
    assert scaled.max() == 0.5

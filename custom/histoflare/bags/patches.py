"""A mosaic's patches as a MONAI dataset.

Items follow ``monai.data.PatchWSIDataset``: ``{"image": MetaTensor (3, h, w) uint8, "label": tensor}`` with
its meta keys, so MONAI's transforms and loaders work on them. Reading goes through :class:`Slide`, which
chooses the level by mpp: ``level`` in the meta data is the level read from, ``location`` (y, x) is in level-0
pixels, ``size`` (h, w) in pixels at the mosaic's mpp. The meta data hold the slide's path: items stay at the
site.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from monai.data import BaseWSIReader, PatchWSIDataset
from numpy.typing import NDArray

from histoflare.slides.mosaic import Mosaic
from histoflare.slides.reader import Slide
from histoflare.slides.resolution import choose_level
from histoflare.storage import real_path


class SlideReader(BaseWSIReader):
    """MONAI's reader interface on an open :class:`Slide`; every patch is read at ``mpp``.

    Args:
        slide: Read by :meth:`read` whatever the name; it is closed by whoever opened it.
        mpp: Resolution of the patches in µm/px.
    """

    supported_suffixes: Sequence[str] = ("svs", "ndpi", "mrxs", "scn", "bif", "tif", "tiff", "dcm")
    backend = "openslide"

    def __init__(self, slide: Slide, mpp: float) -> None:
        super().__init__(mpp=mpp)
        self._slide = slide
        self._read_mpp = mpp

    def read(self, data: Any, **_: Any) -> Slide:
        """Return the slide."""
        return self._slide

    def get_level_count(self, wsi: Slide) -> int:
        """Return the number of levels."""
        return len(wsi.info.levels)

    def get_size(self, wsi: Slide, level: int) -> tuple[int, int]:
        """Return (height, width) of ``level``."""
        width, height = wsi.info.levels[level].lv_size_px
        return height, width

    def get_downsample_ratio(self, wsi: Slide, level: int) -> float:
        """Return the factor from ``level`` to level 0."""
        return wsi.info.levels[level].downsample

    def get_file_path(self, wsi: Slide) -> str:
        """Return the slide's absolute path."""
        return str(real_path(wsi.path))

    def get_mpp(self, wsi: Slide, level: int) -> tuple[float, float]:
        """Return the resolution of ``level`` (down, across) in µm/px."""
        mpp = wsi.mpp * wsi.info.levels[level].downsample
        return mpp, mpp

    def get_power(self, wsi: Slide, level: int) -> float:
        """Return the objective power that ``level`` corresponds to."""
        return 10.0 / self.get_mpp(wsi, level)[0]

    def _get_patch(
        self, wsi: Slide, location: tuple[int, int], size: tuple[int, int], level: int, dtype: Any, mode: str
    ) -> NDArray[Any]:
        pixels = wsi.read((location[1], location[0]), (size[1], size[0]), self._read_mpp)  # (h, w, 3)
        # A copy: tensors need memory they may write to, and encoders want the channels in planes.
        return np.ascontiguousarray(np.moveaxis(pixels, -1, self.channel_dim), dtype=dtype)


class MosaicPatchDataset(PatchWSIDataset):
    """The chosen patches of one slide's mosaic, in the mosaic's order.

    Args:
        slide: The open slide.
        mosaic: Its mosaic.
        label: The slide's class, given to every patch; -1 where it plays no part.
        transform: MONAI dictionary transform on each item.

    Raises:
        SlideError: An item cannot be read (see :meth:`Slide.read`).
    """

    def __init__(
        self, slide: Slide, mosaic: Mosaic, label: int = -1, transform: Callable[..., Any] | None = None
    ) -> None:
        level, _ = choose_level(slide.info, slide.mpp, mosaic.parameters.mpp)
        data = [
            {"image": str(slide.path), "location": (patch.l0_y_px, patch.l0_x_px), "label": label}
            for patch in mosaic.patches
        ]
        super().__init__(
            data,
            patch_size=mosaic.parameters.patch_px,
            patch_level=level,
            transform=transform,
            center_location=False,
            reader=SlideReader(slide, mosaic.parameters.mpp),
        )
        self.slide = slide
        self._mpp = mosaic.parameters.mpp

    def read_image(self, index: int) -> torch.Tensor:
        """Return the pixels of item ``index`` before any transform: uint8 (3, h, w), without meta data.

        The same pixels as the item's image. Meta data cost more than decoding a small patch does.
        """
        sample = self.data[index]
        size = self._get_size(sample)
        l0_y_px, l0_x_px = sample["location"]
        pixels = self.slide.read((l0_x_px, l0_y_px), (size[1], size[0]), self._mpp)  # (h, w, 3)
        return torch.from_numpy(np.moveaxis(pixels, -1, 0).copy())

    def _get_wsi_object(self, sample: Mapping[str, Any]) -> Slide:
        # The dictionary MONAI keeps open slides in is emptied at every read and not safe among threads.
        return self.slide


def iterate_batches(
    dataset: Sequence[Any] | PatchWSIDataset, batch_size: int, threads: int, ahead: int = 2
) -> Generator[torch.Tensor, None, None]:
    """Yield the images of ``dataset`` in order, uint8 (b, 3, h, w), read by ``threads`` in the background.

    While the caller works on a batch the next ones are read; no more than ``ahead`` batches beyond it are in
    memory, however slow the caller is. Closing the iterator, or an error in it, waits only for reads that
    have begun; close it before the slide (``contextlib.closing``).

    Args:
        dataset: Its items hold the patch under ``"image"``.
        batch_size: Patches a batch, >= 1; the last may have fewer.
        threads: Readers, >= 1.
        ahead: Batches to read ahead, >= 1.
    """
    total = len(dataset)
    window = max(ahead * batch_size, 1)
    pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="patches")
    waiting: deque[Future[torch.Tensor]] = deque()
    submitted = 0
    try:
        for start in range(0, total, batch_size):
            count = min(batch_size, total - start)
            while submitted < min(total, start + count + window):
                waiting.append(pool.submit(_read_image, dataset, submitted))
                submitted += 1
            yield torch.stack([waiting.popleft().result() for _ in range(count)])  # (b, 3, h, w)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read_image(dataset: Any, index: int) -> torch.Tensor:
    if isinstance(dataset, MosaicPatchDataset) and dataset.transform is None:
        return dataset.read_image(index)
    image = dataset[index]["image"]
    # Stacking MetaTensors collates their meta data as well, which costs more than decoding a small patch.
    plain: torch.Tensor = image.as_tensor() if hasattr(image, "as_tensor") else torch.as_tensor(image)
    return plain

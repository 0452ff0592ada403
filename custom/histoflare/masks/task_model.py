"""A trained segmentation model as the segmenter of slides wants it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from histoflare import model_file
from histoflare.masks.predict import predict_image
from histoflare.masks.task import MaskTask


@dataclass(frozen=True)
class TaskModel:
    """A task and its trained network as a model of windows (``masks.segmenter.WindowModel``)."""

    task: MaskTask
    network: torch.nn.Module

    @property
    def labels(self) -> Sequence[str]:
        """Names of the classes."""
        return self.task.labels

    @property
    def background(self) -> str | None:
        """The class of what is no tissue."""
        return self.task.background

    @property
    def mpp(self) -> float | None:
        """Resolution of the windows in µm/px."""
        return self.task.mpp

    @property
    def window_px(self) -> int:
        """Side of a window."""
        return self.task.window_px

    @property
    def stride_px(self) -> int:
        """Distance of windows."""
        return self.task.stride_px

    @property
    def patch_px(self) -> int:
        """Side of a window's probabilities."""
        return self.task.patch_px

    def probabilities(self, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the class probabilities (b, k, p, p) of ``windows`` (b, w, w, 3)."""
        return self.task.window_probabilities(self.network, windows)

    def segment_image(self, image: NDArray[np.uint8], mpp: float | None, batch: int) -> NDArray[np.uint8]:
        """Return the class (h, w) of each pixel of an image (h, w, 3).

        Args:
            mpp: Of the image in µm/px; None takes it for the model's. Windows span as many micrometres as
                those that the model was trained on.
            batch: Windows given to the network at once.

        Raises:
            JobError: The model's probabilities are not finite (NOT_FINITE).
        """
        scale = 1.0 if mpp is None or self.mpp is None else self.mpp / mpp
        window_px = max(1, round(self.window_px * scale))
        return predict_image(
            self.network,
            image,
            window_px=window_px,
            stride_px=min(window_px, max(1, round(self.stride_px * scale))),
            patch_px=self.patch_px,
            batch_size=batch,
            fallback=None,
        )


def load_task_model(path: Path, device: torch.device) -> TaskModel:
    """Return the model in a file, on a device.

    Raises:
        JobError: The file is no model of images, or damaged.
    """
    loaded = model_file.read_model_file(path, MaskTask)
    return TaskModel(loaded.task, loaded.build_model().to(device))

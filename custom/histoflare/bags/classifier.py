"""A trained model and its encoder: from an open slide to the model's answer and where it looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from histoflare.bags.encoder import choose_device, load_encoder_of
from histoflare.bags.heatmap import FLATTEST, BagAttention, attention_limit, is_even
from histoflare.bags.patches import MosaicPatchDataset, iterate_batches
from histoflare.bags.task import BagTask
from histoflare.model_file import ModelHeader, read_model_file
from histoflare.slides.mosaic import Mosaic, MosaicParameters, build_mosaic
from histoflare.slides.reader import Slide

BATCH_PATCHES = 16
FEW_PATCHES = 2
"""An answer that rests on so few patches is said to."""

OnPatches = Callable[[str, int, int], None]
"""Told what is encoded, how many patches of it are done, and of how many."""


@dataclass(frozen=True)
class Attention:
    """Where the model looks.

    Attributes:
        relative: Attention to each patch with enough tissue (c,), in the order of the mosaic's candidates; 1
            is the average patch of the mosaic.
        limit: Where colours end: at 1 / limit and limit times the average.
    """

    relative: NDArray[np.float64]
    limit: float

    @property
    def is_even(self) -> bool:
        """Whether no patch stands out."""
        return is_even(self.limit)


@dataclass(frozen=True)
class Answer:
    """What the model says of a slide.

    Attributes:
        predicted: In words: of classes the most probable, of equally probable ones the first.
        probabilities: Class → its probability; empty where the model tells no classes.
        patches: How many patches the answer rests on.
        encoder: Id of the encoder.
        attention: Where the model looks, if that was asked for.
    """

    predicted: str
    probabilities: Mapping[str, float]
    patches: int
    encoder: str
    attention: Attention | None = None

    @property
    def warnings(self) -> list[str]:
        """What is to be known of an answer that rests on so many patches."""
        if self.patches > FEW_PATCHES:
            return []
        return [
            f"the answer rests on {say_patches(self.patches)}: the slide has little tissue for patches of "
            "this size. Do not rely on it."
        ]

    @property
    def notes(self) -> list[str]:
        """What is to be known of where the model looks; it changes nothing about the answer."""
        if self.attention is None or not self.attention.is_even:
            return []
        return [
            f"the attention is nearly even, from {1 / FLATTEST:g} to {FLATTEST:g} times the average for "
            "almost every patch: the model weighs them about alike, and the map points to no region"
        ]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        said: dict[str, Any] = {
            "patches": self.patches,
            "encoder": self.encoder,
            "predicted": self.predicted,
            "probabilities": dict(self.probabilities),
            "warnings": self.warnings,
        }
        if self.attention is not None:
            relative = self.attention.relative
            said["attention"] = {
                "patches": len(relative),
                "least": float(relative.min()),
                "most": float(relative.max()),
                "colours_end_at": self.attention.limit,
                "even": self.attention.is_even,
            }
        return said


def say_patches(count: int) -> str:
    """Return ``1 patch``, ``2 patches`` …"""
    return f"{count} patch" if count == 1 else f"{count} patches"


class SlideClassifier:
    """A model on bags, with the encoder that it wants.

    Args:
        header: What the model file says of itself; its ``mosaic`` is there.
        weights, weights_sha256: The encoder's weight file and its SHA-256, if it has one.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        JobError: The model file is damaged.
        EncoderError: As :func:`load_encoder_of`.
    """

    def __init__(
        self, header: ModelHeader, weights: Path | None, weights_sha256: str | None, device: str
    ) -> None:
        assert header.mosaic is not None
        self.parameters = MosaicParameters.from_json(header.mosaic)
        where = choose_device(device)
        self._loaded = read_model_file(header.path, BagTask)
        self._encoder = load_encoder_of(
            self._loaded.task.encoder, weights, weights_sha256, device, self.parameters.patch_px
        )
        self._network = self._loaded.build_model().to(where)

    def answer(
        self,
        slide: Slide,
        mosaic: Mosaic | None = None,
        *,
        attend: bool = False,
        threads: int = 1,
        on_patches: OnPatches = lambda *_: None,
    ) -> tuple[Answer, Mosaic]:
        """Return what the model says of a slide, and the mosaic on which that rests.

        Args:
            slide: Closed by whoever opened it.
            mosaic: The slide's, with the model's parameters, if it was built already.
            attend: Whether to find out where the model looks, which takes every patch with enough tissue.
            threads: That read.
            on_patches: Follows the encoding.

        Raises:
            SlideError: The slide has no tissue or patches, no mpp, or cannot be read.
            EncoderError: The encoder gives what is not finite.
        """
        mosaic = mosaic or build_mosaic(slide, self.parameters, threads)
        features = torch.cat(list(self._encode(slide, mosaic, threads, "mosaic", on_patches)))  # (n, f)
        with torch.inference_mode():
            said = self._loaded.task.answer(self._network, features)
        attention = self._attend(slide, mosaic, features, threads, on_patches) if attend else None
        return Answer(said.predicted, said.probabilities, len(features), self._encoder.id, attention), mosaic

    def _attend(
        self, slide: Slide, mosaic: Mosaic, features: torch.Tensor, threads: int, on_patches: OnPatches
    ) -> Attention:
        """Return the attention to every candidate; the chosen have ``features`` (n, f)."""
        attention = BagAttention(self._network, features)
        relative = np.empty(len(mosaic.candidates))
        relative[list(mosaic.chosen)] = attention.bag
        others = sorted(set(range(len(mosaic.candidates))) - set(mosaic.chosen))
        if others:
            rest = replace(mosaic, chosen=tuple(others))
            batches = self._encode(slide, rest, threads, "other patches", on_patches)
            relative[others] = np.concatenate([attention.added(batch) for batch in batches])
        return Attention(relative, attention_limit([relative]))

    def _encode(
        self, slide: Slide, mosaic: Mosaic, threads: int, what: str, on_patches: OnPatches
    ) -> Iterator[torch.Tensor]:
        """Yield the features (b, f) of the chosen patches, batch by batch, read while others are encoded."""
        patches = MosaicPatchDataset(slide, mosaic)
        done = 0
        with closing(iterate_batches(patches, BATCH_PATCHES, threads)) as batches:
            for batch in batches:
                yield self._encoder.encode(batch)
                done += len(batch)
                on_patches(what, done, len(patches))

"""Models on bags by name: one file and one line here."""

from __future__ import annotations

import torch

from histoflare.bags.models.linear import LinearSettings
from histoflare.bags.models.mem import MemSettings
from histoflare.bags.models.model import BagModel, ModelSettings

MODELS: dict[str, type[ModelSettings]] = {
    "mem": MemSettings,
    "linear": LinearSettings,
}
"""Name → the model's settings, which make it.

>>> from histoflare import MODELS
>>> MODELS["mem"](memories=4).memories
4
"""


def build_model(settings: ModelSettings, features: int, outputs: int, seed: int) -> BagModel:
    """Return the model of these settings, in training mode.

    The same arguments give the same bytes in every process; the global random state is left alone.

    Args:
        settings: Within their ranges.
        features: Length of a patch's feature vector.
        outputs: How many numbers the target wants of a bag.
        seed: Of the initial weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return settings.build(features, outputs)

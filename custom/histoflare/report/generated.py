"""Pictures that the consortium's page may show: of images that the program itself drew, and of no others.

A page for the consortium holds no pixel of a site. What stands here was never in a site's files: its only
maker, :mod:`histoflare.lab.generated`, is handed what images are drawn from, and no image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image with masks of it, as data URIs.

    Attributes:
        name: Of the image. site: The made-up hospital whose look it has.
        pictures: (caption, data URI, whether it is a mask), the image itself first.
    """

    name: str
    site: str
    pictures: Sequence[tuple[str, str, bool]]

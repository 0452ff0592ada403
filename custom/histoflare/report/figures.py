"""The two kinds of task that a report can be of, and what each one's figures and data are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WHY_WITHHELD = (
    "A site lets no figure out that rests on fewer patients than its policy says (minimum_patients), in all "
    "or of one class, and none that its policy does not list (metrics). Which of the two it was stands in "
    "the site's audit log."
)


@dataclass(frozen=True)
class Kind:
    """How a report of one kind of task speaks.

    Attributes:
        names: Every figure that such a task computes, in that order, and what it is called.
        shown: Those in the tables, the main one first: sentences and charts of one figure are of it.
        charted: Those with a chart of their own, three at most, unless a protocol agreed on another.
        pair: The two in a table for the terminal, and ``pair_heading``, what stands above them there.
        data: What a site prepares for it, as in a task's ``data``.
        tested: What a model is tested on, one of them; trained: what it is trained on.
        model: What a reader knows the model by: the task's field ``encoder`` or ``network``.
        note: What tells the figures apart, where their names do not say it all.
    """

    names: Mapping[str, str]
    shown: Sequence[str]
    charted: Sequence[str]
    pair: tuple[str, str]
    pair_heading: str
    data: str
    tested: str
    trained: str
    model: str
    note: str = ""

    @property
    def main(self) -> str:
        """The figure that speaks for the others."""
        return self.shown[0]

    def say_sizes(self, n_train: int, n_test: int) -> str:
        """Return what was trained and tested on: ``9 training and 4 test slides``."""
        trained = "" if self.trained == self.tested else f" {self.trained}s"
        return f"{n_train} training{trained} and {n_test} test {self.tested}s"


CLASSIFICATION = Kind(
    names={"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auc": "AUC"},
    shown=("balanced_accuracy", "auc", "accuracy"),
    charted=("balanced_accuracy", "auc", "accuracy"),
    pair=("balanced_accuracy", "auc"),
    pair_heading="bal.acc · AUC",
    data="bags",
    tested="slide",
    trained="slide",
    model="encoder",
)

SEGMENTATION = Kind(
    names={
        "dice": "Dice",
        "jaccard": "Jaccard",
        "dice_pooled": "pooled Dice",
        "jaccard_pooled": "pooled Jaccard",
        "pixel_accuracy": "pixel accuracy",
        "dice_authors": "authors' Dice",
        "jaccard_authors": "authors' Jaccard",
        "accuracy_authors": "authors' accuracy",
    },
    shown=("dice", "jaccard", "dice_pooled", "pixel_accuracy", "dice_authors"),
    charted=("dice", "dice_pooled", "pixel_accuracy"),
    pair=("dice", "pixel_accuracy"),
    pair_heading="Dice · pixels",
    data="images",
    tested="image",
    trained="window",
    model="network",
    note=(
        "Dice and Jaccard are of each image and class, then the mean over images and over classes; a class "
        "that is missed, or made up, counts 0. Pooled: of the pixels of all images together, for each class. "
        "Pixel accuracy counts the background too. Authors' Dice is as DHUnet's authors compute it: a class "
        "that is made up is left out, and one that is rightly nowhere counts 1."
    ),
)

KINDS = {kind.data: kind for kind in (CLASSIFICATION, SEGMENTATION)}

NAMES = {name: words for kind in KINDS.values() for name, words in kind.names.items()}
"""Every figure in words: no two kinds have one of the same name."""


def kind_of(report: Mapping[str, Any]) -> Kind:
    """Return the kind of task that a report is of, by its ``data``; without it, classification.

    Raises:
        KeyError: There is no such kind.
    """
    return KINDS[report.get("data", CLASSIFICATION.data)]


def put_first(metric: str, figures: Sequence[str]) -> list[str]:
    """Return ``figures`` with ``metric`` first, be it among them or not."""
    return [metric, *(name for name in figures if name != metric)]


def title_of(metric: str) -> str:
    """Return a figure's name with a capital letter."""
    return NAMES[metric][0].upper() + NAMES[metric][1:]

"""What a tally counts: a row of numbers for each patient, and the figures that follow from their noised sum.

A *tally* is what an evaluation under a budget releases: one vector of counts over patients, with noise. A
form says what is in the vector, and how figures with intervals are made of it. What is made of the noised
vector costs no privacy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from histoflare.figure import Figure

Floats = NDArray[np.float64]


class Predicted(Protocol):
    """What a form reads of a table of predictions (``rounds.task.PredictionTable``)."""

    @property
    def columns(self) -> Mapping[str, NDArray[Any]]: ...
    @property
    def patients(self) -> Sequence[str]: ...


class TallyForm(ABC):
    """What is counted of a task's predictions. All of it follows from the task, and nothing from data."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called, such as ``classes``."""

    @property
    @abstractmethod
    def length(self) -> int:
        """How many numbers a row has."""

    @abstractmethod
    def rows(self, table: Predicted) -> Floats:
        """Return one row for each patient of a table: (patients, length), in their order of appearance.

        A row's L2 norm is at most 1, whatever the table holds, and depends on that patient's part of the
        table alone. What is undefined or not finite counts as a public constant, and is no error.
        """

    @abstractmethod
    def figures(self, total: Floats, std: float, *, seed: int) -> dict[str, Figure]:
        """Return figures of a noised sum of rows, each with a 95 % interval.

        An interval is for the patients whom those counted are drawn from: it includes both that they are few
        and the noise. A figure that the noise drowns has no value, and a reason.

        Args:
            total: (length,), the sum of rows, and noise in each number.
            std: Standard deviation of that noise; 0 for none.
            seed: Of whatever is drawn.
        """


def first_rows(patients: Sequence[str]) -> tuple[list[str], NDArray[np.intp]]:
    """Return the patients in their order of appearance, and for each row (n,) whose it is."""
    order: dict[str, int] = {}
    owner = [order.setdefault(patient, len(order)) for patient in patients]
    return list(order), np.array(owner, dtype=np.intp)

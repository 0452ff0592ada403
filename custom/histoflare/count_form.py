"""Counts of patients in cells that are named in public, as they are or with noise in them.

A *block* is a question that every patient has one answer to, such as the label; its *cells* are the answers.
Each patient is in one cell of each block. So a row has one number for each cell, and of each of Q blocks one
of them is √(1/Q): its L2 norm is exactly 1, and one patient more moves the sum by no more than that.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from histoflare.figure import Figure
from histoflare.noised_ratio import Z
from histoflare.tally_form import Floats, Predicted, TallyForm, first_rows

OTHER, UNKNOWN, MIXED = "other", "unknown", "mixed"
"""Cells beside the words of a job: another word, none, and slides of one patient that differ."""

MOST_CELLS = 1000
"""Of all blocks together."""


def name_of(block: str, cell: str) -> str:
    """Return what a count is called; a policy lets it out as it does other numbers of patients."""
    return f"{block}/{cell}/n_patients"


class CountForm(TallyForm):
    """What is counted needs no model."""

    @property
    @abstractmethod
    def blocks(self) -> Mapping[str, tuple[str, ...]]:
        """Block → its cells. All of it is public."""

    @abstractmethod
    def places(self, table: Predicted, of_patient: NDArray[np.bool_]) -> tuple[int, ...]:
        """Return for each block the index of the cell that a patient is in.

        Args:
            table: Of several patients.
            of_patient: (n,), which of its rows are that patient's; at least one.
        """

    @property
    def length(self) -> int:
        """As many numbers as there are cells."""
        return sum(len(cells) for cells in self.blocks.values())

    @property
    def weight(self) -> float:
        """What a patient in a cell adds to its number."""
        return math.sqrt(1 / len(self.blocks))

    def rows(self, table: Predicted) -> Floats:
        """As :meth:`TallyForm.rows`."""
        names, owner = first_rows(table.patients)
        sizes = [len(cells) for cells in self.blocks.values()]
        starts = np.cumsum([0, *sizes[:-1]])
        rows = np.zeros((len(names), self.length))
        for patient in range(len(names)):
            rows[patient, starts + np.array(self.places(table, owner == patient))] = self.weight
        return rows

    def figures(self, total: Floats, std: float, *, seed: int = 0) -> dict[str, Figure]:
        """As :meth:`TallyForm.figures`, but of those who were counted, and of nobody they are drawn from.

        An interval is the noise's alone. No count is below 0; nothing is drawn.
        """
        names = [name_of(block, cell) for block, cells in self.blocks.items() for cell in cells]
        counts, room = total / self.weight, Z * std / self.weight
        return {
            name: Figure(max(0.0, count), max(0.0, count - room), max(0.0, count + room))
            for name, count in zip(names, counts.tolist(), strict=True)
        }

    def exact(self, table: Predicted) -> dict[str, dict[str, int]]:
        """Return block → name of a count (:func:`name_of`) → patients, without any noise."""
        counts = iter((self.rows(table).sum(axis=0) / self.weight).round().astype(int).tolist())
        return {
            block: {name_of(block, cell): next(counts) for cell in cells}
            for block, cells in self.blocks.items()
        }

"""What a model on bags learns to say, and how good it is told to be.

A target is one file here and one line in ``TARGETS``. To it belong: how a manifest's label becomes a value,
how many numbers the model gives for a bag, the loss of each bag, what an answer is in words, and the table of
predictions with its figures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from histoflare.tally_form import TallyForm

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Said:
    """A model's answer on one slide.

    Attributes:
        predicted: In words.
        probabilities: Of each of :attr:`Target.classes`.
    """

    predicted: str
    probabilities: Mapping[str, float]


class SlideTable(Protocol):
    """Predictions of one split, a row per slide: a ``rounds.task.PredictionTable`` that knows its slides."""

    @property
    def columns(self) -> Mapping[str, NDArray[Any]]: ...
    @property
    def measures(self) -> Mapping[str, Any]: ...
    @property
    def supports(self) -> Mapping[str, Any]: ...
    @property
    def unbounded(self) -> Collection[str]: ...
    @property
    def why_missing(self) -> str: ...
    @property
    def patients(self) -> Sequence[str]: ...
    @property
    def subgroups(self) -> Mapping[str, Sequence[str | None]]: ...
    @property
    def slides(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Target(ABC):
    """A target with its own settings; in a protocol the table ``[target]``.

    Attributes:
        name: What a protocol calls it.
        lower_is_better: Names of those of its figures that are better the lower they are.
        labels: The protocol's ``labels``: names of what the model tells, in the order of its outputs.
    """

    name: ClassVar[str]
    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    labels: tuple[str, ...] = ()

    @abstractmethod
    def problems(self) -> list[str]:
        """Return what is out of range, labels included; each begins with the field's name."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """How many numbers the model gives for a bag."""

    @property
    @abstractmethod
    def manifest_labels(self) -> Sequence[str] | None:
        """All labels that a manifest may hold; None where a label is no class (see :meth:`value_of`)."""

    @property
    def classes(self) -> Sequence[str]:
        """Those of the labels of which an answer has a probability each."""
        return ()

    @property
    def tally_form(self) -> TallyForm | None:
        """What an evaluation under a budget counts; None: a model that learns it has none there."""
        return None

    @property
    @abstractmethod
    def example(self) -> Any:
        """Some value of a slide, to measure time with."""

    @abstractmethod
    def value_of(self, label: str) -> Any:
        """Return the value that a manifest's label says: a number, or a tuple of as many for every slide.

        Raises:
            BagError: It says none.
        """

    @abstractmethod
    def say(self, value: Any) -> str:
        """Return a slide's value in words, as its manifest could have it."""

    @abstractmethod
    def losses(self, outputs: Tensor, values: Tensor) -> Tensor:
        """Return the loss (...) of each bag by itself, of outputs (..., k) and values (...)."""

    @abstractmethod
    def average(self, outputs: Tensor) -> Tensor:
        """Return the outputs (...) of an ensemble of m models, of theirs (m, ...): answers are averaged."""

    @abstractmethod
    def answer(self, outputs: Floats) -> Said:
        """Return what the outputs (k,) of one bag say."""

    @abstractmethod
    def table(
        self,
        outputs: Floats,
        values: Sequence[Any],
        patients: Sequence[str],
        subgroups: Mapping[str, Sequence[str | None]],
        slides: Sequence[str],
    ) -> SlideTable:
        """Return the outputs (n, k) of n slides, which may be none, as a table with its figures.

        Raises:
            JobError: The outputs are no answers: training diverged.
        """

    @abstractmethod
    def notes(self, table: Any) -> tuple[list[str], list[list[str]]]:
        """Return a table's rows for the site's own notes: column names, and a row for each slide.

        The first columns are ``slide``, ``patient``, ``label`` and ``predicted``; that of a class's
        probability is called ``p_`` and its name.
        """

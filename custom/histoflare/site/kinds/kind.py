"""The interface of a kind of data: other code calls it and never asks which kind it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from histoflare.errors import JobError
from histoflare.rounds.registry import find_class
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.found_data import FoundData
from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule

if TYPE_CHECKING:
    from histoflare.report.site_page import SitePage

CSV_FILE = 'the path of a CSV, or ""'
FOLDER = 'the path of a folder, or ""'

Say = Callable[[str], None]
"""Says a line to the person at this site."""


class SiteRecord(Protocol):
    """What the bookkeeping of a round reads of one slide or image."""

    @property
    def slide_id(self) -> str: ...
    @property
    def patient(self) -> str: ...
    @property
    def split(self) -> str: ...


class SiteData(Protocol):
    """A site's cohort; the task knows more of it."""

    @property
    def name(self) -> str: ...
    @property
    def records(self) -> Sequence[SiteRecord]: ...
    @property
    def train(self) -> Sequence[SiteRecord]: ...
    @property
    def warnings(self) -> Sequence[str]: ...
    def without(self, patients: Collection[str]) -> SiteData:
        """Return the cohort as if these patients were not in it, but that it may be of nobody."""

    def read_ahead(self) -> None:
        """Read all files now, so that a round need not, and damaged ones are found before it."""

    def read_all(self) -> None:
        """Read every file again from its disk, and keep nothing of it in memory.

        Raises:
            HistoflareError, OSError: One is gone, damaged, or not what it was when the cohort was loaded.
        """


class ManifestEntry(Protocol):
    """What all manifests say of a row; ``split`` is train, validation or test."""

    @property
    def line(self) -> int: ...
    @property
    def patient(self) -> str: ...
    @property
    def split(self) -> str | None: ...


class SplitManifest(Protocol):
    """A manifest in which every patient has a role: for training, validation or testing."""

    @property
    def path(self) -> Path: ...
    @property
    def rows(self) -> Sequence[ManifestEntry]: ...


@dataclass(frozen=True)
class Entry:
    """A slide or image of a site.

    Attributes:
        patient: As in the manifest. file: The slide or image. where: The manifest's line, for messages.
        content: What tells the same slide in another file, such as its hash; None if nothing is known.
    """

    patient: str
    file: Path
    where: str
    content: str | None


@dataclass(frozen=True)
class PageParts:
    """What a site's own page is made of.

    Attributes:
        site: Its name. cohort: Of :meth:`DataKind.load`. task: Of the job.
        model: The federated model as this site uses it, in evaluation mode and on its device; None leaves out
            what it says.
        report: The consortium's report.
        alone: The model that the site's own data alone gave, likewise, where there is one.
        alias: The site's name in the report, where that is another.
        update_bytes: Size of one update's tensors.
        most_pictures: Slides or images that get pictures; those for testing first.
        threads: Files read at once, where that helps.
        on_item: Told how many slides or images are done, and of how many.
    """

    site: str
    configuration: SiteConfiguration
    cohort: Any
    task: Any
    model: Any
    report: Mapping[str, Any]
    alone: Any = None
    alias: str = ""
    update_bytes: int | None = None
    most_pictures: int = 24
    threads: int = 2
    on_item: Callable[[int, int], None] = lambda done, total: None


class DataKind(ABC):
    """One kind of data: where a site has it, how it is read, and what is made of it.

    A kind has no state. Its module is imported wherever jobs are read, so what is slow to import is imported
    in its methods.

    Attributes:
        name: As in ``Task.data``. item: One of its files, in words. learned: What a task on it is, in words.
        keys: What a site's file has to name → what a value of it must be, in words.
        comment: What stands above these keys in a site's file: TOML comment lines.
        manifest: Name of the manifest in a folder of a site's own.
        task_name: The name of a task on such data in a job's table ``[task]``.
        task_class: The class of these tasks (``model_file.ModelTask``), as ``module:class``.
        task_field: A field that every task on such data has, and a task on no other.
        evaluation_job: The shipped job with which sites are asked about a model.
    """

    name: ClassVar[str]
    item: ClassVar[str]
    learned: ClassVar[str]
    keys: ClassVar[Mapping[str, str]]
    comment: ClassVar[str]
    manifest: ClassVar[str]
    task_name: ClassVar[str]
    task_class: ClassVar[str]
    task_field: ClassVar[str]
    evaluation_job: ClassVar[str]

    def is_named(self, configuration: SiteConfiguration) -> bool:
        """Return whether a site has such data."""
        return configuration.files.keys() >= self.keys.keys()

    def paths(self, configuration: SiteConfiguration) -> list[Path]:
        """Return what a site's file names, by ``keys``; JobError without (SITE_NOT_CONFIGURED)."""
        if not self.is_named(configuration):
            raise JobError(
                f"This job needs {' and '.join(self.keys)}, and the site's file names none.",
                reason="SITE_NOT_CONFIGURED",
            )
        return [configuration.files[key] for key in self.keys]

    def expect(self, task: Any, otherwise: str) -> None:
        """Raise :class:`JobError` with the text ``otherwise`` unless ``task`` is on such data."""
        if task.data != self.name:
            raise JobError(otherwise)

    @abstractmethod
    def configure(self, name: str, manifest: Path, beside: Path | None, **settings: Any) -> SiteConfiguration:
        """Return the configuration of a site of a workstation.

        Args:
            name: The site. manifest: Its manifest.
            beside: Folder with one ``<site>/`` of what goes with a manifest, if that is not beside it.
            settings: Further ones of :class:`SiteConfiguration`.
        """

    def task_type(self) -> Any:
        """Return the class of the tasks on such data."""
        return find_class(self.task_class)

    @abstractmethod
    def read_splits(
        self, configuration: SiteConfiguration, split: SplitRule, labels: Sequence[str] | None = None
    ) -> SplitManifest:
        """Return the site's manifest with each patient's role: its split column's, or else by ``split``.

        Args:
            labels: What a label in the manifest may be (``Task.manifest_labels``); None takes any.

        Raises:
            ManifestError: The manifest cannot be used.
            JobError: The site has no such data (SITE_NOT_CONFIGURED).
        """

    @abstractmethod
    def load(
        self,
        site: str,
        task: Any,
        configuration: SiteConfiguration,
        split: SplitRule = DEFAULT_SPLIT,
        *,
        is_over: bool = False,
    ) -> SiteData:
        """Return a site's cohort as the task wants it, with the memory its configuration gives.

        Args:
            split: The job's rule, for a manifest without a split column.
            is_over: The run is over: a file that was changed since is noted, where that can be, not refused.

        Raises:
            ManifestError: The manifest cannot be used.
            HistoflareError: The data do not fit the manifest or the task (COHORT_INVALID).
            JobError: The site has no such data (SITE_NOT_CONFIGURED).
        """

    @abstractmethod
    def pool(self, cohorts: Sequence[Any], name: str) -> SiteData:
        """Return cohorts of :meth:`load` as one, with nothing of them in memory; names of sites stay apart.

        Raises:
            HistoflareError: There are none, two have one name, or they do not go together (COHORT_INVALID).
        """

    def prepares(self, configuration: SiteConfiguration) -> bool:
        """Return whether :meth:`prepare` makes what is missing: then it need not be there yet."""
        return False

    def prepare(  # noqa: B027
        self, site: str, task: Any, configuration: SiteConfiguration, say: Say
    ) -> None:
        """Make what is missing, where the site's file asks for it; not every kind can be made."""

    def slides_of_a_patient(self, configuration: SiteConfiguration, labels: Sequence[str] | None) -> int:
        """Return the most records of one patient that one step of training takes; errors as above."""
        return 1

    def check_resolutions(  # noqa: B027
        self, task: Any, sites: Mapping[str, SiteConfiguration]
    ) -> None:
        """Refuse data of several resolutions, at one site or at several, where the task names none.

        It reads what manifests say, and opens no data.

        Raises:
            HistoflareError: They are not of one resolution (COHORT_INVALID).
        """

    def check_resolution_named(  # noqa: B027
        self, task: Any, configuration: SiteConfiguration
    ) -> None:
        """Refuse a task that names no resolution where the site's data state theirs.

        Each site sees its own data alone: without a resolution in the protocol nobody compares it with those
        of the others, and one network would be trained at several scales.

        Raises:
            JobError: They state their resolution, and the task names none (RESOLUTION_NOT_NAMED).
        """

    @abstractmethod
    def find(self, sites: Mapping[str, SiteConfiguration]) -> FoundData:
        """Return what the training sites have, to fit a job to it. Files that cannot be used are left out."""

    @abstractmethod
    def entries(self, configuration: SiteConfiguration) -> Iterator[Entry]:
        """Yield every slide or image of a site's manifest, to tell what two sites have in common.

        Raises:
            ManifestError: The manifest cannot be used.
            JobError: The site has no such data (SITE_NOT_CONFIGURED).
        """

    def mosaic(self, cohorts: Sequence[Any]) -> dict[str, Any] | None:
        """Return how the slides of cohorts were cut, for the header of a model; None if they were not."""
        return None

    @abstractmethod
    def build_page(self, parts: PageParts) -> SitePage:
        """Return a site's own page, its pictures drawn; what cannot be drawn is noted and costs no other."""

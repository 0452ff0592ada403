"""Bags of features: what is made of slides, and classified."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from histoflare.errors import HistoflareError
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.found_data import FoundData, Patches, count_labels
from histoflare.site.kinds.kind import CSV_FILE, FOLDER, DataKind, Entry, PageParts, Say, SplitManifest
from histoflare.slides.manifest import Manifest, assign_splits, read_manifest
from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule
from histoflare.storage import real_path

if TYPE_CHECKING:
    from histoflare.bags.bag import BagHeader
    from histoflare.bags.cohort import Cohort
    from histoflare.report.site_page import SitePage


class BagsKind(DataKind):
    """A manifest of slides, and the folder with a bag of each."""

    name = "bags"
    item = "slide"
    learned = "a classification"
    keys: ClassVar = {"manifest": CSV_FILE, "bags": FOLDER}
    comment = """\
# For classification: CSV with the columns slide, patient, label (see: histoflare manifest check --help), and
# the folder of bags made by: histoflare prepare MANIFEST --out BAGS. Both "" at a site without any."""
    manifest = "manifest.csv"
    task_name = "bags"
    task_class = "histoflare.bags.task:BagTask"
    task_field = "encoder"
    evaluation_job = "mem_evaluate"

    def configure(self, name: str, manifest: Path, beside: Path | None, **settings: Any) -> SiteConfiguration:
        """As :meth:`DataKind.configure`; bags beside a manifest are in ``bags``."""
        bags = (beside / name if beside else manifest.parent / "bags").resolve()
        return SiteConfiguration({"manifest": real_path(manifest), "bags": bags}, **settings)

    def read_manifest(
        self, configuration: SiteConfiguration, labels: Sequence[str] | None = None
    ) -> Manifest:
        """Return the manifest of slides, which need not be there: training reads none."""
        manifest, _ = self.paths(configuration)
        return read_manifest(manifest, labels=labels, check_files=False)

    def read_splits(
        self, configuration: SiteConfiguration, split: SplitRule, labels: Sequence[str] | None = None
    ) -> SplitManifest:
        """As :meth:`DataKind.read_splits`."""
        return assign_splits(self.read_manifest(configuration, labels), split)

    def load(
        self,
        site: str,
        task: Any,
        configuration: SiteConfiguration,
        split: SplitRule = DEFAULT_SPLIT,
        *,
        is_over: bool = False,
    ) -> Cohort:
        """As :meth:`DataKind.load`; a slide file that was changed since its bag was made is noted."""
        from histoflare.bags.cohort import load_cohort

        _, bags = self.paths(configuration)
        return load_cohort(
            site,
            self.read_manifest(configuration, task.manifest_labels),
            bags,
            target=task.target,
            encoder=task.encoder,
            mpp=task.mpp,
            patch_px=task.patch_px,
            features=task.features,
            split=split,
            refuse_changed_slides=not is_over,
            cache_bytes=configuration.cache_mb << 20,
        )

    def pool(self, cohorts: Sequence[Any], name: str) -> Cohort:
        """As :meth:`DataKind.pool`."""
        from histoflare.bags.cohort import pooled

        return pooled(cohorts, name)

    def prepares(self, configuration: SiteConfiguration) -> bool:
        """As :meth:`DataKind.prepares`."""
        return configuration.prepare

    def prepare(self, site: str, task: Any, configuration: SiteConfiguration, say: Say) -> None:
        """As :meth:`DataKind.prepare`: also bags that were not made as the task wants them."""
        if not configuration.prepare:
            return
        from histoflare.site.preparation import prepare_site

        _, bags = self.paths(configuration)
        prepare_site(
            site, task, self.read_manifest(configuration, task.manifest_labels), bags, configuration, say
        )

    def slides_of_a_patient(self, configuration: SiteConfiguration, labels: Sequence[str] | None) -> int:
        """As :meth:`DataKind.slides_of_a_patient`."""
        rows = self.read_manifest(configuration, labels).rows
        return max(Counter(row.patient for row in rows).values(), default=1)

    def find(self, sites: Mapping[str, SiteConfiguration]) -> FoundData:
        """As :meth:`DataKind.find`: all labels, and how most of the bags were made."""
        slides = {name: count_labels(self.paths(site)[0]) for name, site in sites.items()}
        labels = tuple(sorted(set().union(*slides.values())))
        found = [
            Patches(header.encoder, header.features, header.patch_px, header.patch_mpp)
            for site in sites.values()
            for header in self._headers(site, labels)
        ]
        kinds = Counter(replace(patches, mpp=None) for patches in found)
        if not kinds:
            return FoundData(labels, slides=slides)
        most, _ = kinds.most_common(1)[0]
        mpps = [each.mpp for each in found if replace(each, mpp=None) == most and each.mpp is not None]
        patches = replace(most, mpp=statistics.median_low(mpps) if mpps else None)
        return FoundData(labels, patches, slides)

    def entries(self, configuration: SiteConfiguration) -> Iterator[Entry]:
        """As :meth:`DataKind.entries`; a bag carries the hash of its slide."""
        from histoflare.bags.bag import read_header
        from histoflare.bags.folder import bag_path

        _, bags = self.paths(configuration)
        manifest = self.read_manifest(configuration)
        for slide in manifest.rows:
            try:
                header = read_header(bag_path(bags, manifest.row_id(slide)))
                content = header.slide_sha256 or f"features {header.content_sha256}"
            except (HistoflareError, OSError):  # none yet, or damaged; who loads it says so
                content = None
            yield Entry(slide.patient, slide.slide, f"{manifest.path.name}, line {slide.line}", content)

    def mosaic(self, cohorts: Sequence[Any]) -> dict[str, Any] | None:
        """Return the mosaic parameters of the first bag: a model is used on slides cut as its own were."""
        from histoflare.bags.bag import read_header

        mosaic = read_header(cohorts[0].records[0].path).mosaic
        return None if mosaic is None else dict(mosaic)

    def build_page(self, parts: PageParts) -> SitePage:
        """As :meth:`DataKind.build_page`; what the site's own model says is not shown."""
        from histoflare.site.pictures import build_site_page

        _, bags = self.paths(parts.configuration)
        return build_site_page(
            parts.site,
            self.read_manifest(parts.configuration, parts.task.manifest_labels),
            bags,
            parts.cohort,
            parts.task,
            parts.model,
            parts.report,
            alias=parts.alias,
            update_bytes=parts.update_bytes,
            most_pictures=parts.most_pictures,
            threads=parts.threads,
            on_slide=parts.on_item,
        )

    def _headers(self, configuration: SiteConfiguration, labels: Sequence[str]) -> Iterator[BagHeader]:
        """Yield the header of each bag of a site that can be read."""
        from histoflare.bags.bag import read_header
        from histoflare.bags.folder import bag_path

        _, bags = self.paths(configuration)
        try:
            manifest = self.read_manifest(configuration, labels)
        except HistoflareError:
            return
        for row in manifest.rows:
            try:
                yield read_header(bag_path(bags, manifest.row_id(row)))
            except HistoflareError:
                continue


BAGS = BagsKind()

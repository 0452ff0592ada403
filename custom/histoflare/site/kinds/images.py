"""Images with masks: what is segmented."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from histoflare.errors import JobError, MaskError
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.found_data import FoundData, Patches
from histoflare.site.kinds.kind import CSV_FILE, DataKind, Entry, PageParts, SplitManifest
from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule
from histoflare.storage import real_path

if TYPE_CHECKING:
    from histoflare.masks.image_manifest import ImageManifest
    from histoflare.masks.images import ImageCohort
    from histoflare.report.site_page import SitePage


class ImagesKind(DataKind):
    """A manifest of images with a mask each."""

    name = "images"
    item = "image"
    learned = "a segmentation"
    keys: ClassVar = {"images": CSV_FILE}
    comment = """\
# For segmentation: CSV with the columns image, mask, patient (see: histoflare masks --help); "" for none."""
    manifest = "images.csv"
    task_name = "segmentation"
    task_class = "histoflare.masks.task:MaskTask"
    task_field = "network"
    evaluation_job = "dhunet_evaluate"

    def configure(self, name: str, manifest: Path, beside: Path | None, **settings: Any) -> SiteConfiguration:
        """As :meth:`DataKind.configure`; nothing goes with the manifest."""
        return SiteConfiguration({"images": real_path(manifest)}, **settings)

    def read_manifest(self, configuration: SiteConfiguration) -> ImageManifest:
        """Return the manifest; whether its files are there is not looked at."""
        from histoflare.masks.image_manifest import read_image_manifest

        (path,) = self.paths(configuration)
        return read_image_manifest(path, check_files=False)

    def read_splits(
        self, configuration: SiteConfiguration, split: SplitRule, labels: Sequence[str] | None = None
    ) -> SplitManifest:
        """As :meth:`DataKind.read_splits`; labels are in the masks."""
        from histoflare.masks.image_manifest import assign_image_splits

        return assign_image_splits(self.read_manifest(configuration), split)

    def load(
        self,
        site: str,
        task: Any,
        configuration: SiteConfiguration,
        split: SplitRule = DEFAULT_SPLIT,
        *,
        is_over: bool = False,
    ) -> ImageCohort:
        """As :meth:`DataKind.load`; every image and mask is read once."""
        from histoflare.masks.images import load_image_cohort

        (path,) = self.paths(configuration)
        return load_image_cohort(
            site,
            path,
            task.labels,
            mpp=task.mpp,
            window_px=task.window_px,
            split=split,
            cache_bytes=configuration.cache_mb << 20,
        )

    def pool(self, cohorts: Sequence[Any], name: str) -> ImageCohort:
        """As :meth:`DataKind.pool`."""
        from histoflare.masks.images import pooled_images

        return pooled_images(cohorts, name)

    def check_resolutions(self, task: Any, sites: Mapping[str, SiteConfiguration]) -> None:
        """As :meth:`DataKind.check_resolutions`."""
        if task.mpp is None:
            self._agreed_mpp(sites)

    def check_resolution_named(self, task: Any, configuration: SiteConfiguration) -> None:
        """As :meth:`DataKind.check_resolution_named`. Images that state none are not compared either way."""
        if task.mpp is not None or not self.is_named(configuration):
            return
        from histoflare.masks.resolution import MPP_PLACE, read_stated_mpps

        (path,) = self.paths(configuration)
        (stated,) = read_stated_mpps({"": path}).values() or ([],)
        known = sorted({mpp for mpp in stated if mpp is not None})
        if known:
            raise JobError(
                f"The images of {path} state their resolution (µm/px: "
                f"{', '.join(f'{mpp:g}' for mpp in known[:5])}), and the job's protocol names none: nobody "
                "compares it with the other sites'. The lead has to name the one that all have "
                f"({MPP_PLACE}).",
                reason="RESOLUTION_NOT_NAMED",
            )

    def find(self, sites: Mapping[str, SiteConfiguration]) -> FoundData:
        """As :meth:`DataKind.find`: the resolution, if each image states one and they agree."""
        try:
            mpp = self._agreed_mpp(sites)
        except MaskError:  # a setting may name one; without, ``check_resolutions`` refuses them
            mpp = None
        return FoundData(patches=None if mpp is None else Patches(mpp=mpp))

    def entries(self, configuration: SiteConfiguration) -> Iterator[Entry]:
        """As :meth:`DataKind.entries`."""
        manifest = self.read_manifest(configuration)
        for image in manifest.rows:
            yield Entry(image.patient, image.image, f"{manifest.path.name}, line {image.line}", None)

    def build_page(self, parts: PageParts) -> SitePage:
        """As :meth:`DataKind.build_page`; images are read one after another."""
        from histoflare.site.image_pictures import build_image_site_page

        return build_image_site_page(
            parts.site,
            parts.cohort,
            parts.task,
            parts.model,
            parts.report,
            alone=parts.alone,
            alias=parts.alias,
            update_bytes=parts.update_bytes,
            most_pictures=parts.most_pictures,
            on_image=parts.on_item,
        )

    def _agreed_mpp(self, sites: Mapping[str, SiteConfiguration]) -> float | None:
        from histoflare.masks.resolution import agreed_mpp, read_stated_mpps

        manifests = {name: self.paths(site)[0] for name, site in sites.items() if self.is_named(site)}
        return agreed_mpp(read_stated_mpps(manifests))


IMAGES = ImagesKind()

"""Where a site keeps its own things, and what it decides for itself; never part of a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from histoflare.errors import JobError

CACHE_MB = 2048


@dataclass(frozen=True)
class SiteConfiguration:
    """One site's own settings.

    Attributes:
        files: What each kind of data that the site has names in its file (``site.kinds``): key → file or
            folder, such as ``manifest`` and ``bags``.
        records: The folder of its own notes of each run. If not given: ``<data>-records`` beside its data
            (:attr:`data`), so that sites on one machine have one each.
        ledger, ledger_key: The site's privacy ledger and its key; None: it has none yet, and takes no job.
        prepare: Whether missing or stale bags are made before the first round.
        encoder_weights, encoder_sha256: Of an encoder with a weight file; for ``prepare``.
        cache_mb: Memory for features or images in MiB; at least 0.
        device: Where models and encoders run: ``"cpu"``, ``"cuda"`` or ``"cuda:<n>"``.
        evaluation_only: Whether training tasks are answered with ``EVALUATION_ONLY``.
        pseudonym: The name under which other sites see this one; None for its FLARE name.
        workstation: Whether it is one of several sites on one workstation, which may use a ledger that was
            made there to try things out.
        site: The name under which it takes part; None: not known. It does not stand in its file.

    >>> from pathlib import Path
    >>> from histoflare import SiteConfiguration
    >>> site = SiteConfiguration({"manifest": Path("clinic-a/manifest.csv"), "bags": Path("clinic-a/bags")})
    >>> site.records.name
    'bags-records'
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    records: Path = Path()
    ledger: Path | None = None
    ledger_key: Path | None = None
    prepare: bool = False
    encoder_weights: Path | None = None
    encoder_sha256: str | None = None
    cache_mb: int = CACHE_MB
    device: str = "cpu"
    evaluation_only: bool = False
    pseudonym: str | None = None
    workstation: bool = False
    site: str | None = None

    def __post_init__(self) -> None:
        if (self.ledger is None) != (self.ledger_key is None):
            raise JobError(
                "A site says where both its ledger and its key are, or neither.", reason="SITE_NOT_CONFIGURED"
            )
        data = self.data
        if self.records == Path():
            object.__setattr__(self, "records", data.parent / f"{data.name}-records")

    @property
    def data(self) -> Path:
        """The last of its files, without the ending ``.csv``: what lies beside it is the site's."""
        if not self.files:
            raise JobError("A site needs bags or images.", reason="SITE_NOT_CONFIGURED")
        last = list(self.files.values())[-1]
        return last.with_name(last.name.removesuffix(".csv"))

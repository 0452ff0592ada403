"""Errors a person can act on.

Every error that bad input can cause is a :class:`HistoflareError`. Its text is one message that says what is
wrong and what to do about it; its ``reason`` is a fixed code without names, paths or counts, the only part
that may be shown outside the site.
"""

from __future__ import annotations

from collections.abc import Sequence


class HistoflareError(Exception):
    """Something a user can put right.

    Args:
        message: What is wrong and what to do, for the person at this site. May name slides and paths.
        reason: Fixed code in capitals, safe to show to others.
    """

    reason = "ERROR"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class SlideError(HistoflareError):
    """A slide cannot be used (unreadable, no mpp, no tissue, dark background)."""

    reason = "SLIDE_UNUSABLE"


class ManifestError(HistoflareError):
    """A manifest is wrong; ``problems`` holds every fault found, each with its line number."""

    reason = "MANIFEST_INVALID"

    def __init__(self, message: str, *, problems: Sequence[str] = (), reason: str | None = None) -> None:
        self.problems = tuple(problems)
        listed = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(message + listed, reason=reason)


class BagError(HistoflareError):
    """A bag is missing, damaged, empty, or of another encoder or mosaic than the job's."""

    reason = "BAG_UNUSABLE"


class MaskError(HistoflareError):
    """An image or its mask cannot be used (damaged, of another size, unknown class, too small)."""

    reason = "MASK_UNUSABLE"


class CheckpointError(HistoflareError):
    """A pretrained checkpoint cannot be used (missing, damaged, partial, of another network)."""

    reason = "CHECKPOINT_INVALID"


class EncoderError(HistoflareError):
    """An encoder cannot be loaded (missing file, wrong hash, wrong output)."""

    reason = "ENCODER_UNUSABLE"


class JobError(HistoflareError):
    """A job, a strategy or a task is configured wrongly."""

    reason = "JOB_INVALID"


class LedgerError(HistoflareError):
    """A site's privacy ledger says no, or cannot be used."""

    reason = "LEDGER_UNUSABLE"


REASONS = frozenset(
    {
        "ANNOTATION_INVALID",
        "BAGS_BUSY",
        "BAG_CHANGED",
        "BAG_DAMAGED",
        "BAG_EMPTY",
        "BAG_FOREIGN",
        "BAG_MISSING",
        "BAG_NOT_FINITE",
        "BAG_NOT_WRITTEN",
        "BAG_SHAPE",
        "BAG_UNUSABLE",
        "BAG_VERSION",
        "BUDGET_EXHAUSTED",
        "CHECKPOINT_INVALID",
        "CHECKPOINT_MISSING",
        "COHORT_INVALID",
        "ENCODER_BATCH",
        "ENCODER_HASH",
        "ENCODER_INPUT",
        "ENCODER_MEMORY",
        "ENCODER_MISMATCH",
        "ENCODER_NAME",
        "ENCODER_NOT_FINITE",
        "ENCODER_OUTPUT",
        "ENCODER_PREPROCESSING",
        "ENCODER_UNKNOWN",
        "ENCODER_UNUSABLE",
        "ENCODER_WEIGHTS",
        "ENCODER_WEIGHTS_MISSING",
        "ERROR",
        "EVALUATED_ALREADY",
        "EVALUATIONS_EXHAUSTED",
        "EVALUATION_NOT_ALLOWED",
        "EVALUATION_ONLY",
        "FEATURES_AMBIGUOUS",
        "FEATURES_DAMAGED",
        "FEATURES_ENCODER",
        "FEATURES_MISSING",
        "FEATURES_SHAPE",
        "FEATURES_UNIT",
        "FEDERATION_FAILED",
        "FEDERATION_RUNNING",
        "FEDERATION_STOPPED",
        "FLARE_CHANGED",
        "IMAGE_MISSING",
        "IMAGE_TOO_SMALL",
        "IMAGE_UNREADABLE",
        "JOB_FAILED",
        "JOB_INVALID",
        "JOB_REFUSED",
        "JOB_SHARE_EXCEEDED",
        "JOB_VERSION",
        "KIT_CHANGED",
        "LEDGER_DAMAGED",
        "LEDGER_FOREIGN",
        "LEDGER_FULL",
        "LEDGER_MISSING",
        "LEDGER_MOVED",
        "LEDGER_UNUSABLE",
        "MANIFEST_INVALID",
        "MANIFEST_UNREADABLE",
        "MASK_CLASS",
        "MASK_EMPTY",
        "MASK_MISSING",
        "MASK_SIZE",
        "MASK_UNREADABLE",
        "MASK_UNUSABLE",
        "METRIC_NOT_ALLOWED",
        "MODEL_FILE_INVALID",
        "MODEL_FILE_MISSING",
        "MODEL_NOT_ALLOWED",
        "MODEL_NOT_PRIVATE",
        "MOSAIC_FILE",
        "MOSAIC_PARAMETERS",
        "NOTHING_TO_EVALUATE",
        "NOT_ADMITTED",
        "NOT_FINITE",
        "NOT_RELEASED",
        "POLICY_INVALID",
        "OUTPUT_TAKEN",
        "PORT_TAKEN",
        "PRIVACY_INVALID",
        "PRIVACY_MISMATCH",
        "PROTOCOL_INVALID",
        "PROTOCOL_MISMATCH",
        "PROTOCOL_MISSING",
        "PURPOSE_NOT_ALLOWED",
        "RECORDS_INVALID",
        "REPLY_CHANGED",
        "REPLY_NOT_ALLOWED",
        "RESOLUTION_NOT_NAMED",
        "RESULTS_BUSY",
        "ROLE_CHANGED",
        "ROUND_INVALID",
        "RUN_INVALID",
        "SCOPE_NOT_ALLOWED",
        "SCOPE_UNKNOWN",
        "SEGMENTATION_BUSY",
        "SEGMENTATION_CHANGED",
        "SHARE_INVALID",
        "SITES_NOT_NAMED",
        "SITE_HAS_NO_TRAINING_DATA",
        "SITE_NOT_CONFIGURED",
        "SLIDE_AMBIGUOUS",
        "SLIDE_DARK_BACKGROUND",
        "SLIDE_MISSING",
        "SLIDE_MPP_INVALID",
        "SLIDE_MPP_MISSING",
        "SLIDE_NO_PATCHES",
        "SLIDE_NO_TISSUE",
        "SLIDE_OPEN_FAILED",
        "SLIDE_READ_FAILED",
        "SLIDE_TOO_COARSE",
        "SLIDE_TOO_SMALL",
        "SLIDE_UNSUPPORTED",
        "SLIDE_UNUSABLE",
        "STATE_INVALID",
        "STOPPED",
        "STRATEGY_NOT_ALLOWED",
        "TASK_UNEXPECTED",
        "TOO_FEW_PATIENTS",
        "TRAINER_DIED",
        "TRAINING_FAILED",
        "TRANSPORT_UNFIT",
        "UPDATES_INVALID",
        "WEIGHTS_INVALID",
        "WEIGHT_NOT_ALLOWED",
    }
)
"""Every reason code there is. A site's gate lets no other text out as the reason of a refusal."""

"""Many slides and one model on bags: a CSV of answers (``slides.results``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from histoflare.bags.attention_files import AttentionFiles, write_attention_files
from histoflare.bags.classifier import SlideClassifier
from histoflare.slides.planes import PlaneName
from histoflare.slides.reader import open_with_default
from histoflare.slides.results import Table, TableReport, fill_table, say_given
from histoflare.slides.sources import Source


def classify_slides(
    load: Callable[[], SlideClassifier],
    classes: Sequence[str],
    sources: Sequence[Source],
    table_path: Path,
    *,
    model_sha256: str,
    folders: AttentionFiles,
    plane: PlaneName = "bounds",
    default_mpp: float | None = None,
    threads: int = 1,
    on_start: Callable[[int, int], None] = lambda *_: None,
    on_row: Callable[[], None] = lambda: None,
    on_patches: Callable[[Source, int, int], None] = lambda *_: None,
) -> TableReport:
    """Ask the model about every slide; return the rows of the table at ``table_path``.

    Columns ``p_<class>`` are the probabilities.

    Args:
        load: Loads the model and its encoder; called once, if a slide is to be done at all.
        classes: Those of which an answer has a probability each.
        model_sha256: Of the model file; rows of another model are made anew.
        folders: Where each slide's files go, named after its :attr:`Source.file_id`.
        plane: Of the files.
        default_mpp: Resolution in µm/px of slides that have none in the manifest and state none.
        threads: That read.
        on_start, on_row: As of :func:`fill_table`.
        on_patches: Told how many patches of a slide are encoded, and of how many.

    Raises:
        JobError, EncoderError, OSError: As :func:`fill_table`.
    """
    names = {name: f"p_{name}" for name in classes}
    table = Table(
        table_path,
        ["predicted", *names.values(), "patches"],
        {"model_sha256": model_sha256, "given_mpp": "", "plane": plane if folders.wanted else ""},
    )

    classifier: list[SlideClassifier] = []

    def start(kept: int, wanted: int) -> None:
        if wanted:  # what is wrong with the model or its encoder is no fault of a slide
            classifier.append(load())
        on_start(kept, wanted)

    def classify(source: Source) -> dict[str, Any]:
        files = folders.of(source.file_id)
        with open_with_default(source.path, source.mpp, default_mpp) as slide:
            answer, mosaic = classifier[0].answer(
                slide,
                attend=bool(files.wanted),
                threads=threads,
                on_patches=lambda _, done, total: on_patches(source, done, total),
            )
            if answer.attention is not None:
                write_attention_files(files, slide, mosaic, answer.attention, plane)
        shares = {names[name]: f"{share:.6f}" for name, share in answer.probabilities.items()}
        return {
            "predicted": answer.predicted,
            **shares,
            "patches": answer.patches,
            "warnings": " ".join([*answer.warnings, *answer.notes]),
        }

    return fill_table(
        table,
        sources,
        classify,
        files=lambda source: folders.of(source.file_id).wanted,
        own_settings=lambda source: {"given_mpp": say_given(source.mpp, default_mpp)},
        on_start=start,
        on_row=on_row,
    )

"""Newly drawn images, and the masks that an experiment makes of them, for reports on generated data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from histoflare.lab.experiment import Experiment
from histoflare.lab.run import Outcome
from histoflare.masks.metrics import confusion
from histoflare.report.generated import GeneratedImage
from histoflare.rounds.local import load_model
from histoflare.site.image_pictures import dice_of, draw_image, draw_mask, predict_mask
from histoflare.synthetic.images import SyntheticImages, plan_images, render_image


def draw_generated(
    made: SyntheticImages, experiment: Experiment, outcome: Outcome
) -> Sequence[GeneratedImage]:
    """Return newly drawn images, one of each hospital's look, and the masks that models make of them.

    Each is of a test patient, and none is among the images of a folder: what is shown comes out of
    :func:`render_image`, and no file of a site is read for it.
    """
    job = experiment.job
    state = job.strategy.personalize(outcome.federated.state, {})
    federated = load_model(job.task, state, experiment.device)
    alone = {
        site: load_model(job.task, local, experiment.device) for site, local in sorted(outcome.local.items())
    }
    names = list(alone)
    firsts: dict[str, Any] = {}
    for planned in plan_images(made):
        if planned.split == "test" and planned.number == made.images_per_patient:
            firsts.setdefault(planned.site, replace(planned, number=planned.number + 1))
    drawn = []
    for index, (site, planned) in enumerate(firsts.items()):
        pixels, truth = render_image(planned, made.side_px, made.seed)
        asked = {"Federated": federated}
        if site in alone:
            asked["Its hospital's model alone"] = alone[site]
        if others := [name for name in names if name != site]:
            other = others[index % len(others)]
            asked[f"{other} alone"] = alone[other]
        pictures = [("Image", draw_image(pixels), False), ("True mask", draw_mask(truth, job.task), True)]
        for caption, model in asked.items():
            mask = predict_mask(model, job.task, pixels)
            dice = dice_of(job.task, confusion(truth, mask, len(job.task.labels)))
            said = ", ".join(f"Dice {value:.2f}" for value in dice.values() if value is not None)
            pictures.append((f"{caption}: {said}" if said else caption, draw_mask(mask, job.task), True))
        drawn.append(GeneratedImage(f"Generated image, look of {site}", site, pictures))
    return drawn

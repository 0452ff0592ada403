"""``histoflare privacy advise``: what to expect of training under noise, before anything is spent."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from histoflare.commands.console import make_table, out, print_json
from histoflare.commands.options import AsJson
from histoflare.errors import JobError
from histoflare.privacy.words import say_delta

JOB = "linear_shared"
"""Whose model is asked about where no job is named."""


def show_advice(
    patients: Annotated[
        str, typer.Option(help="Hospitals x patients to train on at each, as 4x40.", metavar="NxN")
    ],
    epsilon: Annotated[float, typer.Option(help="ε of the patient's lifetime budget, above 0.")] = 8.0,
    delta: Annotated[float, typer.Option(help="δ of that budget.")] = 1e-5,
    share: Annotated[float, typer.Option(help="Which part of that budget the job takes.")] = 1.0,
    colluders: Annotated[
        int,
        typer.Option(min=1, help="Of shared noise: how many hospitals may tell the server all they know."),
    ] = 1,
    job: Annotated[
        list[Path] | None, typer.Option(help="A job, or a name of one, whose model is asked about.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what to expect of a model under noise: with noise of each hospital's own, and with shared noise.

    For DP-SGD on bags with one step a round in 60 rounds. Nothing is read of any patient and nothing is
    spent. It is a rule for a first look, found on small real tiles: it knows neither how hard the question is
    nor how good the features are. How many weights a model has makes no difference in it. It names the preset
    of linear_shared that is for cohorts of this size.

    Example: histoflare privacy advise --patients 4x40 --epsilon 3
    """
    from histoflare.flare.job import read_job
    from histoflare.privacy.advice import advise, preset_for
    from histoflare.privacy.budget import Budget
    from histoflare.shipped import find_job

    said = re.fullmatch(r"([1-9]\d{0,3})[x×]([1-9]\d{0,6})", patients)
    if said is None:
        raise JobError(f"--patients: hospitals x patients, as 4x40, not {patients!r}.")
    sites, each = int(said[1]), int(said[2])
    budget = Budget(epsilon, delta)
    rows = []
    for path in job or [Path(JOB)]:
        read = read_job(find_job(path))
        outputs = getattr(getattr(read.task, "target", None), "outputs", None)
        if outputs is None:
            raise JobError(
                f"{path}: there is advice for models on bags alone; name another --job.", reason="JOB_INVALID"
            )
        ways = {"own": None, **({"shared": colluders} if sites - colluders >= 2 else {})}
        for noise, among in ways.items():
            found = advise(sites, each, outputs, budget, colluders=among, share=share)
            rows.append((path.name, read.task.model_name, noise, found))
    preset = preset_for(sites, each, colluders)
    if as_json:
        print_json(
            [
                {
                    "job": name,
                    "model": model,
                    "noise": noise,
                    **asdict(found),
                    "part_left": found.part_left,
                    "preset": preset,
                }
                for name, model, noise, found in rows
            ]
        )
        return
    table = make_table(
        *(
            "model of",
            "outputs",
            "noise",
            "noise ÷ clip in the sum",
            "noise ÷ signal",
            "left of what is learned",
        ),
        title=f"{sites} hospitals of {each} patients, ε = {epsilon:g} at δ = {say_delta(delta)}",
    )
    for name, _, noise, found in rows:
        table.add_row(
            name,
            f"{found.outputs:,}",
            "each its own" if noise == "own" else "shared",
            f"{found.total_noise:.1f}",
            f"{found.noise_to_signal:.2g}",
            f"some {100 * found.part_left:.0f} %",
        )
    out.print(table)
    if preset is not None:
        text = f"Shared: ε holds against the server and any {colluders} of the other hospitals together."
        out.print(text, highlight=False, markup=False)
        text = f"For a cohort of this size: {JOB} with --preset {preset}; its file says what to set."
        out.print(text, highlight=False, markup=False)

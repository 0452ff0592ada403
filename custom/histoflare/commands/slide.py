"""``histoflare slide``: what one slide is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)

MPP_HELP = (
    "Resolution of the slide's finest level in µm/px, where the slide does not say it or says it wrongly."
)


@app.callback()
def _group() -> None:
    """Look at one slide."""


@app.command()
def info(
    slide: Annotated[Path, typer.Argument(help="Slide file, or the folder of a DICOM series.")],
    mpp: Annotated[float | None, typer.Option(help=MPP_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a slide's format, size, resolution and levels, and check that each level can be read.

    Labels, macro images and whatever could name a person are never looked at.

    Example: histoflare slide info a.svs --json
    """
    from histoflare.commands.console import make_table, out, print_json, tell
    from histoflare.slides.reader import Slide

    with Slide(slide, mpp=mpp) as opened:
        opened.probe()
        about, problem = opened.info, opened.mpp_problem
    if as_json:
        print_json({**about.to_json(), "mpp_problem": problem or None})
        return
    sources = {"given": "as given", "slide": "from the slide", "objective": "from the objective power"}
    resolution = "unknown: give it with --mpp, or in the manifest's 'mpp' column"
    if about.mpp is not None and about.mpp_source is not None:
        resolution = f"{about.mpp:.4g} µm/px, {sources[about.mpp_source]}"
    power = "unknown" if about.objective_power is None else f"{about.objective_power:g}x"
    out.print(f"format      {about.vendor or 'unknown'}", highlight=False)
    out.print(f"size        {about.l0_size_px[0]} x {about.l0_size_px[1]} px", highlight=False)
    if about.l0_bounds_px is not None:
        x, y, width, height = about.l0_bounds_px
        out.print(f"bounds      {width} x {height} px at ({x}, {y}): what QuPath shows", highlight=False)
    out.print(f"resolution  {resolution}", highlight=False)
    out.print(f"objective   {power}", highlight=False)
    if problem:
        tell(f"note        {problem}")
    table = make_table("level", "size (px)", "downsample", "µm/px")
    for number, level in enumerate(about.levels):
        level_mpp = "?" if level.mpp is None else f"{level.mpp:.4g}"
        width, height = level.lv_size_px
        table.add_row(str(number), f"{width} x {height}", f"{level.downsample:.4g}", level_mpp)
    out.print(table)

"""What a command loads before it finds that its input is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tifffile

from histoflare.slides.pyramid import write_pyramid
from tests.bags.conftest import paint_slide

SLOW = ("torch", "monai", "sklearn")


def wrong_slide(folder: Path, fault: str) -> tuple[Path, str]:
    """Return a slide with a fault, and words of the error that names it."""
    path = folder / "wrong.tif"
    if fault == "no slide":
        path.write_text("not a slide")
    elif fault == "no mpp":
        tifffile.imwrite(path, paint_slide(1, (300, 250)), tile=(64, 64), photometric="rgb")
    elif fault == "no tissue":
        write_pyramid(path, paint_slide(1, (300, 250), tissue=False), 0.5)
    words = {
        "missing": "no such slide",
        "no slide": "not a slide format",
        "no mpp": "does not say its resolution",
    }
    return path, words.get(fault, "no tissue found")


def loaded_by(*arguments: str | Path) -> tuple[str, list[str]]:
    """Return what a command that fails says, and which of :data:`SLOW` its process had loaded by then."""
    code = (
        "import sys; from histoflare.cli import main\n"
        "try: main()\n"
        f"finally: print(*(name for name in {SLOW!r} if name in sys.modules))"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    return done.stderr, done.stdout.split()

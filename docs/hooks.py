"""Hooks of mkdocs: documents that lie beside ``docs/`` are pages of the site, and links lead to the pages.

A link to what is no page (a folder, a file of code) is left as its text: the site stands alone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BESIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "poc/README.md": "workstation.md",
    "provisioning/README.md": "kits.md",
    "custom/histoflare/privacy/README.md": "privacy-code.md",
}
"""Document of the repository → page of the site."""

CODE_IN_CELL = re.compile(r"(?<=<code>)[^<]*(?=</code>)")
CODE = re.compile(r"`[^`]*`")
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the documents beside ``docs/``."""
    for source, page in BESIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make a document's links and tables, which are right in the repository, right in the site."""
    sources = {page: source for source, page in BESIDE.items()}
    source = ROOT / sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def lead(found: re.Match[str]) -> str:
        mark, text, target, anchor = found.groups()
        if not target:
            return found[0]
        there = Path(os.path.normpath(source.parent / target)).relative_to(ROOT).as_posix()
        uri = BESIDE.get(there, there.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return str(text)
        return f"{mark}[{text}]({uri}{anchor or ''})"

    lines = [_unescape(line) if line.startswith("|") else line for line in markdown.splitlines()]
    return LINK.sub(lead, "\n".join(lines))


def _unescape(row: str) -> str:
    """Return a table's row with plain bars in its code: GitHub wants them escaped, a site shows it."""
    return CODE.sub(lambda code: code[0].replace("\\|", "|"), row)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Let long names of files and tests break in a table's cells, after each of their parts."""

    def breakable(cell: re.Match[str]) -> str:
        return CODE_IN_CELL.sub(lambda code: re.sub(r"(_|/|::)", r"\1<wbr>", code[0]), cell[0])

    return re.sub(r"<td[^>]*>.*?</td>", breakable, html, flags=re.DOTALL)

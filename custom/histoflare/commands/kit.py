"""``histoflare kit``: begin a project file, compare a startup kit with what was signed, and sign one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from histoflare.commands.console import console, out, say
from histoflare.commands.options import SiteOption
from histoflare.errors import JobError
from histoflare.shipped import PROVISIONING
from histoflare.storage import write_text

app = typer.Typer(no_args_is_help=True, help="Startup kits and their signature.")

LINK_ELSEWHERE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")
"""A link of the consortium's README to a document that does not lie beside the copy."""

Kit = Annotated[
    Path | None, typer.Argument(help="Folder with startup and local, or a site's file; none: this folder's.")
]


@app.command()
def project(
    target: Annotated[Path, typer.Option("--out", help="Folder for the files; must not exist.")],
) -> None:
    """Write a consortium's project file and its policies, to be edited before kits are made from them.

    Example: histoflare kit project --out consortium
    """
    if target.exists():
        raise JobError(f"{target}: exists already; give a folder that does not.")
    for pattern in ("README.md", "project.yml", "policies/*.toml"):
        for source in PROVISIONING.glob(pattern):
            text = LINK_ELSEWHERE.sub(_elsewhere, source.read_text())
            write_text(target / source.relative_to(PROVISIONING), text, public=True)
    file = target / "project.yml"
    say(f"Edit {file}, then: {shlex.join(['nvflare', 'provision', '-p', str(file), '-w', 'kits'])}")


def _elsewhere(link: re.Match[str]) -> str:
    """Return a link's text with where to find the document; where it stands in brackets, with none inside."""
    text, document = link[1], link[2]
    if text == document:
        return f"histoflare's {document}"
    inside = link.string[: link.start()].endswith("(")
    return f"{text}: histoflare's {document}" if inside else f"{text} (histoflare's {document})"


@app.command()
def check(kit: Kit = None, site: SiteOption = None) -> None:
    """Compare a kit with what was signed, as its client does at its start.

    Example: histoflare kit check kits/histoflare/prod_00/hospital-a
    """
    from histoflare.flare.kit_signature import verify_kit

    kit = _find_kit(kit, site)
    if (kit / "startup" / "fed_admin.json").is_file():
        raise JobError(f"{kit}: a person's kit, with keys and addresses only; these are not signed.")
    verify_kit(kit)
    console.print("as it was signed", highlight=False)


@app.command("fingerprint")
def show_fingerprint(kit: Kit = None, site: SiteOption = None) -> None:
    """Print the name and the fingerprint of this site's certificate, for the stewards of the other sites.

    Give them to the others on another way than through the lead, such as by telephone. Each pins them
    (histoflare policy pin): in a secure sum its site counts only on sites that it knows so.

    Example: histoflare kit fingerprint kits/histoflare/prod_00/hospital-a
    """
    from histoflare.flare.kit_signature import participant_of
    from histoflare.flare.site_keys import fingerprint, read_certificate

    kit = _find_kit(kit, site)
    out.print(
        f"{participant_of(kit)} {fingerprint(read_certificate(kit))}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _find_kit(kit: Path | None, site: Path | None) -> Path:
    """Return the kit that is given, or that a site's file is in.

    Raises:
        JobError: There is none.
    """
    from histoflare.site.places import find_site_of, kit_of

    if kit is None or kit.is_file():
        named = find_site_of(kit or site)
        kit = kit_of(named)
        if kit is None:
            raise JobError(f"{named}: lies in no startup kit, a folder with startup and local.")
    if not (kit / "startup").is_dir():
        raise JobError(f"{kit}: no startup kit there; a kit is a folder with startup and local.")
    return kit


@app.command()
def sign(
    kit: Annotated[Path, typer.Argument(help="A kit, or the list of a kit's files that a hospital sent.")],
    authority: Annotated[Path, typer.Option(help="state beside the kits, or the folder of cert init.")],
) -> None:
    """Sign a kit after a change, or the list of one whose own key stays at its hospital.

    Example: histoflare kit sign kits/histoflare/prod_00/hospital-a --authority kits/histoflare/state

    Example: histoflare kit sign kit_signature.json --authority authority
    """
    from histoflare.flare.kit_signature import read_authority, sign_kit, sign_list

    key = read_authority(authority)
    (sign_kit if kit.is_dir() else sign_list)(kit, key)
    console.print("signed", highlight=False)

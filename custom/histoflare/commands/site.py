"""``histoflare site``: where a site keeps what."""

from __future__ import annotations

import typer

from histoflare.commands.console import print_json, tell
from histoflare.commands.options import AsJson, SiteOption

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at what a site has, from its kit's folder."""


@app.command()
def where(site: SiteOption = None, as_json: AsJson = False) -> None:
    """Show where logs, records, ledger, key, policies, bags and the audit log are, and whether they exist.

    The exit code is 1 if the site's file cannot be used, so that not all is known.

    Example: histoflare site where

    Example: histoflare site where --site kits/histoflare/prod_00/hospital-a
    """
    from histoflare.site.places import find_site_of, list_places

    places, problem = list_places(find_site_of(site))
    if as_json:
        print_json([{"what": each.what, "path": str(each.path), "there": each.is_there} for each in places])
    else:
        width = max(len(each.what) for each in places)
        lines = [f"{'what':<{width}}  there  where"]
        for each in places:
            lines.append(f"{each.what:<{width}}  {'yes' if each.is_there else 'no':<5}  {each.path}")
        for line in lines:  # no table: a path that is broken over two lines cannot be copied
            tell(line)
    if problem is not None:
        raise problem

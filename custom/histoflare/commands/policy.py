"""``histoflare privacy policy``: what the kit allows, what this site narrows, and what then holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import make_table, out, print_json
from histoflare.errors import JobError

if TYPE_CHECKING:
    from histoflare.privacy.own_policy import StewardPolicy
    from histoflare.privacy.policy import Policy


def show_policy(
    site: Annotated[Path, typer.Option(help="The site's own file, e.g. local/histoflare.toml.")],
    scope: Annotated[str | None, typer.Option(help="This scope only.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what the kit's signed policies say, what this site's own policy.toml says, and what holds.

    An error, with all that is wrong, if the site's own would widen the kit's: the site then takes no job.

    Example: histoflare privacy policy --site local/histoflare.toml
    """
    from histoflare.flare.kit_signature import verify_kit
    from histoflare.flare.site_policy import known_models
    from histoflare.privacy.own_policy import layers
    from histoflare.privacy.own_policy_file import read_layers
    from histoflare.rounds.strategies import STRATEGIES

    local = site.absolute().parent
    if (local.parent / "startup").is_dir():
        verify_kit(local.parent)
    signed, own = read_layers(local)
    if scope is not None and scope not in signed:
        raise JobError(f"{scope}: no scope of this kit; it has {', '.join(signed)}.", reason="SCOPE_UNKNOWN")
    shown = {name: policy for name, policy in signed.items() if scope in (None, name)}
    unknown = [name for name in own.strategies if name not in STRATEGIES]
    unknown += [name for name in own.models if name not in known_models()]
    rows = {name: layers(policy, own) for name, policy in shown.items()}
    if as_json:
        print_json(_facts(shown, own, rows, unknown))
        return
    for what in ("purposes", "strategies", "models"):
        _say(f"This site takes part in {what}: {', '.join(getattr(own, what)) or 'none'}.")
    if unknown:
        _say(f"Listed, and not in this version of histoflare: {', '.join(unknown)}.")
    for name, policy in shown.items():
        title = f"{name}: {policy.mechanism}" + ("" if own.takes_part(name) else "; takes no part in it")
        table = make_table("", "the kit, signed", "this site's own", "holds", title=title)
        table.show_lines = True
        for entry, values in rows[name].items():
            table.add_row(entry, *map(_shown, values))
        out.print(table, markup=False)


def _facts(
    shown: dict[str, Policy], own: StewardPolicy, rows: dict[str, dict[str, Any]], unknown: list[str]
) -> dict[str, Any]:
    return {
        **{what: list(getattr(own, what)) for what in ("purposes", "strategies", "models")},
        "unknown_here": unknown,
        "scopes": {
            name: {
                "takes_part": own.takes_part(name),
                "mechanism": policy.mechanism,
                "entries": {
                    entry: dict(zip(("signed", "own", "holds"), values, strict=True))
                    for entry, values in rows[name].items()
                },
            }
            for name, policy in shown.items()
        },
    }


def _shown(value: object) -> str:
    from histoflare.privacy.own_policy import shown
    from histoflare.privacy.own_policy_file import LONGEST_NAME, MOST_NAMES

    return "" if value is None else shown(value, most=MOST_NAMES * LONGEST_NAME)


def _say(text: str) -> None:
    out.print(text, soft_wrap=True, highlight=False, markup=False)

"""``histoflare policy``: what the kit allows, what this site narrows, and what then holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import make_table, out, print_json, tell
from histoflare.commands.options import AsJson, SiteOption
from histoflare.errors import HistoflareError, JobError
from histoflare.privacy.own_policy import OWN_POLICY_FILE
from histoflare.storage import real_path

if TYPE_CHECKING:
    from histoflare.privacy.own_policy import StewardPolicy
    from histoflare.privacy.policy import Policy

app = typer.Typer(no_args_is_help=True)

USUAL = ("epsilon", "delta", "job_share", "minimum_patients", "evaluations")
OF_SHARED = ("colluders", "all_collude_epsilon", "sites_per_patient")
"""What a table shows first, the latter of scopes whose sites share noise; the rest is shown with ``--all``,
or where the site's own policy says something of it."""


@app.callback()
def _group() -> None:
    """A site's own layer of policy: show it beside the kit's signed one, change it, check it."""


@app.command()
def show(
    site: SiteOption = None,
    scope: Annotated[str | None, typer.Option(help="This scope only.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every entry, lists of figures too.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page for people with all of it instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the kit's signed policies say, what this site's own policy.toml says, and what holds.

    An error, with all that is wrong, if the site's own would widen the kit's: the site then takes no job.

    Example: histoflare policy show

    Example: histoflare policy show --site /srv/kit --html policy.html
    """
    from histoflare.privacy.own_policy import layers

    local = _local(site)
    signed, own, unknown = _read(local)
    if scope is not None and scope not in signed:
        raise JobError(f"{scope}: no scope of this kit; it has {', '.join(signed)}.", reason="SCOPE_UNKNOWN")
    shown = {name: policy for name, policy in signed.items() if scope in (None, name)}
    rows = {name: layers(policy, own) for name, policy in shown.items()}
    facts = _facts(shown, own, rows, unknown)
    if as_json:
        print_json(facts)
        return
    if html is not None:
        from histoflare.report.policy_page import write_policy_page

        write_policy_page(facts, html)
        tell(f"page: {html}")
        return
    for what in ("purposes", "strategies", "models"):
        tell(f"This site takes part in {what}: {', '.join(getattr(own, what)) or 'none'}.")
    if unknown:
        tell(f"Listed, and not in this version of histoflare: {', '.join(unknown)}.")
    tell(_say_known(own))
    for name, policy in shown.items():
        title = f"{name}: {policy.mechanism}" + ("" if own.takes_part(name) else "; takes no part in it")
        table = make_table("", "the kit, signed", "this site's own", "holds", title=title)
        for entry, values in rows[name].items():
            usual = entry in USUAL or (entry in OF_SHARED and policy.mechanism.endswith("-shared"))
            if everything or usual or values[1] is not None:
                table.add_row(entry, *map(_shown, values))
        out.print(table, markup=False)
    if not everything:
        tell("Other entries hold as the kit says them: --all shows them.")


@app.command("set")
def change(
    changes: Annotated[
        list[str], typer.Argument(help="NAME=VALUE, lists with commas; nothing after = takes a line out.")
    ],
    site: SiteOption = None,
    scope: Annotated[list[str] | None, typer.Option(help="In this scope only; may be given again.")] = None,
) -> None:
    """Change this site's own policy; comments stay, and nothing is written that would not hold.

    minimum_patients: nothing that fewer patients are behind leaves. purposes, strategies, models: what the
    site takes part in. scopes: those that it takes part in, of the kit's; the others are off. epsilon, delta,
    evaluations: a smaller lifetime budget of each patient. job_share: which part of it one job may take.
    colluders: with how many of the sites whose certificates it has pinned the server may collude.

    Example: histoflare policy set minimum_patients=10 purposes=research,education scopes=dp-patient

    Example: histoflare policy set epsilon=4 job_share=0.25 --scope dp-patient
    """
    from histoflare.privacy.own_policy_edit import change_own_policy, parse_changes

    local = _local(site)
    changed = change_own_policy(local, parse_changes(changes), scope or [])
    tell("Changed; each job reads it anew." if changed else "It says that already.")
    for fault in _faults(local):
        tell(fault)


@app.command()
def pin(
    other: Annotated[str, typer.Argument(help="Name of another site.")],
    fingerprint: Annotated[str, typer.Argument(help="Of its certificate; '' takes the pin out.")],
    site: SiteOption = None,
) -> None:
    """Write down which certificate another site has, so that secure sums count on it.

    Ask its steward for the fingerprint (histoflare kit fingerprint), and not the lead: whoever makes the kits
    could make a certificate for a site that is none.

    Example: histoflare policy pin hospital-b 8b1f0c…
    """
    from histoflare.flare.kit_signature import participant_of
    from histoflare.privacy.own_policy_edit import pin_sites
    from histoflare.privacy.own_policy_file import read_own_policy

    local = _local(site)
    if (local.parent / "startup").is_dir() and other == participant_of(local.parent):
        raise JobError(
            f"{other}: this is the kit of that site, which counts itself. Pin the other sites.",
            reason="POLICY_INVALID",
        )
    own = local / OWN_POLICY_FILE
    before = read_own_policy(own).pins
    changed = pin_sites(local, {other: fingerprint})
    pins = read_own_policy(own).pins
    tell("Changed; each job reads it anew." if changed else "It says that already.")
    if other in before and before[other] != pins.get(other):
        tell(f"{other} was pinned before as {before[other]}.")
    same = [name for name, pin in pins.items() if name != other and pin == pins.get(other)]
    if same:
        tell(f"{', '.join(same)}: the same certificate, and one site has it. Take out what is not its name.")
    tell(_say_pins(pins))


@app.command()
def check(site: SiteOption = None) -> None:
    """Say all that is wrong with this site's policies at once. The exit code is 1 if the site takes no job.

    Example: histoflare policy check --site /srv/kit
    """
    local = _local(site)
    faults = _faults(local)
    for fault in faults:
        tell(fault)
    if faults:
        raise typer.Exit(1)
    signed, own, unknown = _read(local)
    if unknown:
        tell(f"Listed, and not in this version of histoflare: {', '.join(unknown)}.")
    nothing = [what for what in ("purposes", "strategies", "models") if not getattr(own, what)]
    scopes = [name for name in signed if own.takes_part(name)]
    if nothing or not scopes:
        tell(
            f"The site takes part in no job: {', '.join([*nothing, *([] if scopes else ['scopes'])])}: none."
        )
    else:
        tell(f"The policies can be used. Scopes: {', '.join(scopes)}.")


def _local(site: Path | None) -> Path:
    from histoflare.site.places import find_site_of

    return real_path(find_site_of(site)).parent


def _read(local: Path) -> tuple[dict[str, Policy], StewardPolicy, list[str]]:
    """Return both layers, and listed names that this version does not know."""
    from histoflare.flare.kit_signature import verify_kit
    from histoflare.flare.site_policy import known_models
    from histoflare.privacy.own_policy_file import read_layers
    from histoflare.rounds.strategies import STRATEGIES

    if (local.parent / "startup").is_dir():
        verify_kit(local.parent)
    signed, own = read_layers(local)
    unknown = [name for name in own.strategies if name not in STRATEGIES]
    unknown += [name for name in own.models if name not in known_models()]
    return signed, own, unknown


def _faults(local: Path) -> list[str]:
    """Return why the site takes no job, as far as its kit and its two layers of policy say."""
    from histoflare.flare.kit_signature import verify_kit
    from histoflare.privacy.own_policy_file import read_layers

    found = []
    if (local.parent / "startup").is_dir():
        try:
            verify_kit(local.parent)
        except HistoflareError as error:
            found.append(f"{error.reason}: {error}")
    try:
        read_layers(local)
    except HistoflareError as error:
        found.append(f"{error.reason}: {error}")
    return found


def _facts(
    shown: dict[str, Policy], own: StewardPolicy, rows: dict[str, dict[str, Any]], unknown: list[str]
) -> dict[str, Any]:
    return {
        **{what: list(getattr(own, what)) for what in ("purposes", "strategies", "models")},
        "unknown_here": unknown,
        "pins": dict(own.pins),
        "trust_ca": own.trust_ca,
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


def _say_known(own: StewardPolicy) -> str:
    """Say whom the site counts on in a secure sum."""
    whom = "those that it has pinned"
    if own.trust_ca:
        whom = "all that have one of the consortium's certificates"
    return f"In a secure sum this site counts on itself and {whom}. {_say_pins(own.pins)}"


def _say_pins(pins: Mapping[str, str]) -> str:
    return f"Pinned: {', '.join(pins) or 'none'}."


def _shown(value: object) -> str:
    from histoflare.privacy.own_policy import shown
    from histoflare.privacy.own_policy_file import LONGEST_NAME, MOST_NAMES

    return "" if value is None else shown(value, most=MOST_NAMES * LONGEST_NAME)

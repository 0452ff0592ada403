"""Sites that have no part in an experiment's figures, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from histoflare.errors import HistoflareError, JobError
from histoflare.lab.federation import Federated
from histoflare.lab.watch import RunningStep, Watch
from histoflare.reasons import explain
from histoflare.site.kinds.kind import SiteData


def no_site(refused: Mapping[str, HistoflareError]) -> HistoflareError:
    """Return the error of a run in which no site can take part."""
    errors = list(refused.values())
    if len(errors) == 1:
        return errors[0]
    listed = "\n".join(str(error) for error in errors)
    return JobError(f"No site can take part:\n{listed}", reason=errors[0].reason)


def said_of(site: str, error: HistoflareError) -> HistoflareError:
    """Return a site's error with its name in front."""
    return JobError(f"{site}: {error}", reason=error.reason)


def without(cohorts: Mapping[str, Any], lost: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of the sites that were not lost."""
    return {site: cohort for site, cohort in cohorts.items() if site not in lost}


def find_unreadable(
    cohorts: Mapping[str, SiteData], watch: Watch, step: RunningStep
) -> dict[str, HistoflareError]:
    """Return the sites whose data cannot be read any more, with the reason. Nothing is predicted.

    Args:
        cohorts: Site → its data, as they were loaded before the rounds.
        watch: Warned of each such site.
        step: Advanced after each site.
    """
    unread: dict[str, HistoflareError] = {}
    for site, cohort in cohorts.items():
        try:
            cohort.read_all()
        except (HistoflareError, OSError) as error:
            unread[site] = error if isinstance(error, HistoflareError) else JobError(str(error))
            watch.warn(f"{site} is left out of the figures ({unread[site].reason}): {error}")
        step.advance()
    return unread


def find_never_took_part(
    federated: Federated, cohorts: Mapping[str, Any], watch: Watch
) -> dict[str, HistoflareError]:
    """Return the sites whose updates were refused and never used, with the last reason."""
    took = {site for row in federated.participation for site in row["taking_part"]}
    codes = {site: code for row in federated.participation for site, code in row["refused"].items()}
    never: dict[str, HistoflareError] = {}
    for site, code in codes.items():
        if site in cohorts and site not in took:
            never[site] = JobError(federated.failures.get(site) or explain(code), reason=code)
            watch.warn(f"{site} took part in no round ({code}: {never[site]})")
    return never

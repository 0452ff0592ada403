"""The page of each site of an experiment, with pictures."""

from __future__ import annotations

from pathlib import Path

from histoflare.ensemble import split_models
from histoflare.errors import HistoflareError
from histoflare.lab.experiment import Experiment
from histoflare.lab.run import Outcome
from histoflare.lab.watch import Watch
from histoflare.report.site_page import write_site_page
from histoflare.rounds.local import load_model
from histoflare.rounds.state import n_bytes
from histoflare.site.data import device_of
from histoflare.site.kinds import kind_of
from histoflare.site.kinds.kind import PageParts


def write_site_pages(experiment: Experiment, outcome: Outcome, out: Path, watch: Watch) -> list[Path]:
    """Write each site's own page, with pictures, to ``site-<name>.html``; return the paths.

    A site whose data cannot be read any more gets none, and ends nothing.
    """
    job, federated = experiment.job, outcome.federated
    everyone = {
        site: at
        for site, at in {**experiment.sites, **experiment.external}.items()
        if site in outcome.cohorts
    }
    update_bytes = n_bytes(job.transport.form(job.strategy.sent(split_models(federated.state)[0])))
    step = watch.begin("pages of the sites", len(everyone))
    paths = []
    with watch.phase("pages"):
        for site, configuration in everyone.items():
            own = job.strategy.personalize(federated.state, federated.site_states.get(site, {}))
            model = load_model(job.task, own, device_of(configuration))
            local = outcome.local.get(site)
            parts = PageParts(
                site,
                configuration,
                outcome.cohorts[site],
                job.task,
                model,
                outcome.report,
                alone=None if local is None else load_model(job.task, local, device_of(configuration)),
                alias=federated.pseudonyms.get(site, ""),
                update_bytes=update_bytes,
            )
            try:
                page = kind_of(job.task.data).build_page(parts)
            except HistoflareError as error:
                watch.warn(f"{site} gets no page ({error.reason}): {error}")
                continue
            finally:
                step.advance()
            paths.append(out / f"site-{site}.html")
            write_site_page(page, paths[-1])
    return paths

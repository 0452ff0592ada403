"""The classes that a job of this project may name at a site or a server.

Whole class paths, never a package prefix: a prefix would admit any class below it as a job's filter.
"""

from __future__ import annotations

ALLOWED_CLASSES = (
    "histoflare.bags.task.MemTask",
    "histoflare.flare.aggregator.MetricsCollector",
    "histoflare.flare.aggregator.SiteOrderAggregator",
    "histoflare.flare.executor.SiteExecutor",
    "histoflare.flare.persistor.SeededPersistor",
    "histoflare.flare.shareables.AskingShareableGenerator",
    "histoflare.flare.workflow.AskingScatterAndGather",
    "histoflare.masks.task.MaskTask",
    "histoflare.privacy.plan.DpSgd",
    "histoflare.privacy.plan.UpdateNoise",
    "histoflare.rounds.cyclic.CyclicWeightTransfer",
    "histoflare.rounds.fedavg.FedAvg",
)

SITE_CLASSES = (
    "histoflare.flare.admission.Admission",
    "histoflare.flare.gate.Gate",
    "histoflare.flare.guard.Guard",
)
"""What a site's own ``privacy.json`` names. A job may not: it would bring its own gate."""

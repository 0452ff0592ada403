"""Federated learning on whole-slide images that never leave their hospital.

What a researcher needs from Python can be imported from here. A name is loaded when it is first asked for:
``import histoflare`` itself loads neither PyTorch nor OpenSlide nor FLARE.

- A slide and its mosaic: ``Slide, MosaicParameters, build_mosaic``
- A site's data: ``read_manifest, read_bag, load_cohort, SiteConfiguration``
- What is learned: ``BagTask, MaskTask``, made of ``MODELS, TARGETS, NETWORKS``
- How sites work together: ``FedAvg, FedSgd, make_strategy``, of ``STRATEGIES, TOPOLOGIES``; in a secure sum:
  ``MaskedSum``
- What protects patients: ``Open, DpSgd, UpdateNoise``, and what it costs: ``epsilon, calibrate``
- A federation in this process: ``run_in_process``, then ``predict, evaluate``
- A whole job with its bounds and its report: ``read_job, choose_job, run_experiment``
- Every error that bad input can cause: ``HistoflareError``

The docstring of each has an example.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "errors": ("HistoflareError",),
    "slides.reader": ("Slide",),
    "slides.mosaic": ("MosaicParameters", "build_mosaic"),
    "slides.manifest": ("read_manifest",),
    "bags.bag": ("read_bag",),
    "bags.cohort": ("load_cohort",),
    "bags.task": ("BagTask",),
    "bags.models": ("MODELS",),
    "bags.targets": ("TARGETS",),
    "masks.task": ("MaskTask",),
    "masks.networks": ("NETWORKS",),
    "rounds.strategies": ("STRATEGIES", "make_strategy"),
    "rounds.strategies.fedavg": ("FedAvg",),
    "rounds.strategies.fedsgd": ("FedSgd",),
    "rounds.transports.masked_sum": ("MaskedSum",),
    "rounds.topologies": ("TOPOLOGIES",),
    "rounds.runner": ("run_in_process",),
    "rounds.local": ("predict",),
    "rounds.evaluation": ("evaluate",),
    "privacy.plan": ("Open", "DpSgd", "UpdateNoise"),
    "privacy.accountant": ("epsilon", "calibrate"),
    "site.configuration": ("SiteConfiguration",),
    "flare.job": ("read_job",),
    "flare.job_choice": ("choose_job",),
    "lab.run": ("run_experiment",),
}
"""Module → what of it is public here."""

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = list(_HOME_OF)

# The same once more for type checkers and editors, which do not run __getattr__.
if TYPE_CHECKING:
    from histoflare.bags.bag import read_bag as read_bag
    from histoflare.bags.cohort import load_cohort as load_cohort
    from histoflare.bags.models import MODELS as MODELS
    from histoflare.bags.targets import TARGETS as TARGETS
    from histoflare.bags.task import BagTask as BagTask
    from histoflare.errors import HistoflareError as HistoflareError
    from histoflare.flare.job import read_job as read_job
    from histoflare.flare.job_choice import choose_job as choose_job
    from histoflare.lab.run import run_experiment as run_experiment
    from histoflare.masks.networks import NETWORKS as NETWORKS
    from histoflare.masks.task import MaskTask as MaskTask
    from histoflare.privacy.accountant import calibrate as calibrate
    from histoflare.privacy.accountant import epsilon as epsilon
    from histoflare.privacy.plan import DpSgd as DpSgd
    from histoflare.privacy.plan import Open as Open
    from histoflare.privacy.plan import UpdateNoise as UpdateNoise
    from histoflare.rounds.evaluation import evaluate as evaluate
    from histoflare.rounds.local import predict as predict
    from histoflare.rounds.runner import run_in_process as run_in_process
    from histoflare.rounds.strategies import STRATEGIES as STRATEGIES
    from histoflare.rounds.strategies import make_strategy as make_strategy
    from histoflare.rounds.strategies.fedavg import FedAvg as FedAvg
    from histoflare.rounds.strategies.fedsgd import FedSgd as FedSgd
    from histoflare.rounds.topologies import TOPOLOGIES as TOPOLOGIES
    from histoflare.rounds.transports.masked_sum import MaskedSum as MaskedSum
    from histoflare.site.configuration import SiteConfiguration as SiteConfiguration
    from histoflare.slides.manifest import read_manifest as read_manifest
    from histoflare.slides.mosaic import MosaicParameters as MosaicParameters
    from histoflare.slides.mosaic import build_mosaic as build_mosaic
    from histoflare.slides.reader import Slide as Slide
else:  # a type checker that saw it would take any name for one of histoflare's

    def __getattr__(name: str) -> Any:
        """Load a public name from the module that has it."""
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

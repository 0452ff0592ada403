"""A segmentation report with something of everything: figures of confusion matrices drawn by numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from histoflare.masks.metrics import MaskPredictions
from histoflare.rounds.comparison import SiteComparison
from histoflare.rounds.evaluation import Metrics, evaluate
from tests.report.made import HOSTILE, some_absent

SITES = ["tnbc-1", "tnbc-2", HOSTILE, "dsb-2"]
LABELS = ["background", "nuclei", "stroma"]
TASK: dict[str, Any] = {
    "labels": LABELS,
    "background": "background",
    "network": "dhunet",
    "width": 24,
    "norm": "batch",
    "mpp": None,
    "window_px": 256,
    "stride_px": 128,
    "patch_px": 224,
    "learning_rate": 0.01,
}


def mask_metrics(skill: float, patients: int = 24, seed: int = 0, **columns: Any) -> Metrics:
    """Figures of two images a patient, about ``skill`` of whose pixels are right in each class.

    Args:
        columns: Subgroup column → (value of even patients, value of odd ones).
    """
    rng = np.random.default_rng(seed)
    matrices = []
    for number in range(2 * patients):
        truth = rng.multinomial(65_536, rng.dirichlet([6.0, 2.0, 1.0]))  # pixels of each class
        truth[2] *= number % 3 > 0  # no stroma in every third image
        right = np.clip(skill + rng.normal(0, 0.12), 0.02, 0.98)
        chances = right * np.eye(3) + (1 - right) * np.array([0.6, 0.3, 0.1])
        matrices.append([rng.multinomial(n, each) for n, each in zip(truth, chances, strict=True)])
    owners = [f"p{number // 2}" for number in range(2 * patients)]
    groups = {
        name: [values[number // 2 % 2] for number in range(2 * patients)] for name, values in columns.items()
    }
    ids = [f"image-{number}" for number in range(2 * patients)]
    table = MaskPredictions(LABELS, "background", {"confusion": np.array(matrices)}, owners, groups, ids)
    return evaluate(table, bootstraps=200)


def segmentation_facts() -> dict[str, Any]:
    """What makes a segmentation of ``made.full_report`` or ``made.protected_report``: sites and figures."""
    rows = some_absent(SITES)
    for row in rows:
        row["metrics"] = {
            site: {"validation/dice": 0.2 + 0.5 * (1 - 0.9 ** row["round"]) - 0.03 * number}
            for number, site in enumerate(SITES)
        }
    local = {site: mask_metrics(0.5 + 0.02 * number, 40, number) for number, site in enumerate(SITES)}
    external = {"federated": mask_metrics(0.68, 12, 31), "pooled": mask_metrics(0.7, 12, 32)}
    external |= {
        f"local/{site}": mask_metrics(0.4 + 0.05 * number, 12, 33) for number, site in enumerate(SITES)
    }
    return {
        "job": "dhunet_fedavg",
        "data": "images",
        "task": TASK,
        "seconds": {"load images": 42.5, "federated rounds": 151.0},
        "participation": rows,
        "protocol": {
            "metric": "dice",
            "split": {"unit": "patient", "test_fraction": 0.2, "seed": 0},
            "sha256": "ab" * 32,
        },
        "evaluated_at_sites": {
            "dsb-2": {"dice": 0.871, "dice_low": 0.8, "dice_high": 0.93, "n_patients": 11, "n_slides": 21}
        },
        "evaluation_refused": {"tnbc-2": "METRIC_NOT_ALLOWED"},
        "site_figures": {
            site: SiteComparison(
                410 + 11 * number,
                20 + 2 * number,
                mask_metrics(0.5, 10 + number, number),
                mask_metrics(0.7 + 0.01 * number, 10 + number, number),
                mask_metrics(0.74, 10 + number, number),
            )
            for number, site in enumerate(SITES)
        },
        "federated": mask_metrics(0.72, 46, 5, sex=("F", "M"), scanner=("A<b>", "C")),
        "pooled": mask_metrics(0.75, 46, 5),
        "local": local,
        "external": external,
    }

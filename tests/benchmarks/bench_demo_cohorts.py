"""The demo's first chapter on cohorts of other seeds: federated, each hospital alone, pooled; in process.

A bag of the cheap kind stands for each drawn slide too, and there is no external site. Without protection:
these are the runs from which the task's difficulty is judged.

    python -m tests.benchmarks.bench_demo_cohorts [--seeds 0,1,2,3,4] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from histoflare.bags.encoder import load_encoder
from histoflare.bags.encoder_names import EFFICIENTNET
from histoflare.commands.demo import CHAPTER_SETTINGS, PATCHES_WITHOUT_SLIDE, plan_cohort
from histoflare.flare.job_choice import choose_job
from histoflare.lab.run import run_experiment
from histoflare.site.configuration import SiteConfiguration
from histoflare.synthetic.bags import FieldParameters, make_bags

REPOSITORY = Path(__file__).resolve().parents[2]
METRIC = "balanced_accuracy"
JOB = "mem_fedavg"


def run_seed(seed: int, folder: Path) -> tuple[float, list[float], float]:
    """Return the balanced accuracy of the federated model, of each hospital's own and of the pooled one."""
    encoder = load_encoder(EFFICIENTNET, device="cpu")
    cohort = replace(plan_cohort(), external=False, seed=seed)
    manifests = make_bags(folder, encoder, cohort, FieldParameters(PATCHES_WITHOUT_SLIDE))
    changes = {"protocol.encoder": encoder.id, "task.features": encoder.features}
    job = choose_job(REPOSITORY / "jobs" / JOB, changes=changes, before=CHAPTER_SETTINGS[JOB]).job
    sites = {
        site: SiteConfiguration({"manifest": path, "bags": path.parent / "bags"})
        for site, path in manifests.items()
    }
    report = run_experiment(job, sites, folder / "out").report
    alone = [figures[METRIC] for figures in report["local_on_all_sites"].values()]
    return report["federated"][METRIC], alone, report["pooled"][METRIC]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--keep", type=Path, help="folder for the bags, which are not made again")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        for seed in map(int, asked.seeds.split(",")):
            federated, alone, pooled = run_seed(seed, (asked.keep or Path(made)) / str(seed))
            own = ", ".join(f"{value:.3f}" for value in alone)
            print(f"seed {seed}: federated {federated:.3f}; alone {own}; pooled {pooled:.3f}", flush=True)


if __name__ == "__main__":
    main()

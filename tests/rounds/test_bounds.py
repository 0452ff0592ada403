from __future__ import annotations

import torch

from histoflare.rounds.bounds import train_local_only, train_pooled
from histoflare.rounds.fedavg import FedAvg
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import digest

from .toy import Table, ToyTask, toy_sites


class Counting(ToyTask):
    """Counts the training samples it hands out."""

    seen = 0

    def train_batches(self, data, seed):  # type: ignore[no-untyped-def]
        for batch in super().train_batches(data, seed):
            Counting.seen += len(batch[1])
            yield batch


def test_all_three_see_every_sample_equally_often() -> None:
    sites, task = toy_sites(3), Counting(local_epochs=2)
    pooled = Table(
        *(torch.cat([getattr(d, f) for d in sites.values()]) for f in ("x", "y", "x_test", "y_test"))
    )
    total = sum(len(data.y) for data in sites.values())
    runs = (
        lambda: run_in_process(task, sites, FedAvg(), 3, 0),
        lambda: train_local_only(task, sites, 3, 0),
        lambda: train_pooled(task, pooled, 3, 0),
    )
    for run in runs:
        Counting.seen = 0
        run()
        assert Counting.seen == 3 * 2 * total


def test_a_federation_of_one_is_local_training() -> None:
    sites, task = toy_sites(1), ToyTask(hidden=4)
    local = train_local_only(task, sites, 4, 7)["site_0"]
    federated = run_in_process(task, sites, FedAvg(), 4, 7).state
    for name, tensor in local.items():
        torch.testing.assert_close(federated[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_site_alone_does_not_depend_on_the_others() -> None:
    sites, task = toy_sites(3), ToyTask()
    assert digest(train_local_only(task, sites, 2, 0)["site_1"]) == digest(
        train_local_only(task, {"site_1": sites["site_1"]}, 2, 0)["site_1"]
    )

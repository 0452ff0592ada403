"""DP-SGD on all patients of a step at once: what a federation's model is like, in a fraction of the time.

A federation that sends gradients (``fedsgd``) and adds its noise to one sum is DP-SGD on the patients of all
sites together: samples at n sites are one sample of all, and shares of noise of several sites add up to one
noise. Both are facts of arithmetic. This file makes that step in one product, by book-keeping
(``bookkeeping``), with noise of torch's generator. It protects nobody, differs from what jobs run in the
roundings of float32, and is for measuring accuracy alone; a test holds it to ``run_in_process``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from histoflare.bags.patients import PatientBatch
from histoflare.bags.task import BagTask
from histoflare.rounds.state import State, model_state
from tests.benchmarks.bags_in_memory import Bags
from tests.benchmarks.bookkeeping import gradients_of


@dataclass(frozen=True)
class Steps:
    """A run of so many steps.

    Attributes:
        steps: How many, one a round.
        batch_size: What a sum of gradients is divided by. Without a sample it is also the size of a batch, of
            which each site has the same part.
        learning_rate: Of the server's step.
        sample_rate: q, of a Poisson sample; None: batches and no clip, as without protection.
        clip_norm: C.
        noise: Standard deviation of the noise in the whole sum, in C.
        averaged_part: Which part of the steps, at their end, the model is the mean of; 0: the last model.
    """

    steps: int
    batch_size: int
    learning_rate: float
    sample_rate: float | None = None
    clip_norm: float = 1.0
    noise: float = 0.0
    averaged_part: float = 0.5

    def train(self, task: BagTask, sites: Sequence[Bags], seed: int) -> State:
        """Return the model after training.

        Args:
            sites: Of each the patients to train on, with one bag each, all of one length.
            seed: Of samples, batches and noise.
        """
        model = task.build_model().train()
        random = torch.Generator().manual_seed(seed)
        found = [site.stacked("train") for site in sites]
        bags = torch.cat([x for x, _ in found])  # (N, n, f)
        labels = torch.cat([torch.from_numpy(y) for _, y in found])  # (N,)
        sizes = [len(y) for _, y in found]
        parameters = dict(model.named_parameters())
        mean = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        last = round(self.averaged_part * self.steps)
        for step in range(self.steps):
            chosen = self._chosen(sizes, random)
            total = self._gradient(task, model, bags[chosen], labels[chosen])
            with torch.no_grad():
                for name, parameter in parameters.items():
                    if self.noise:
                        drawn = torch.randn(parameter.shape, generator=random)
                        total[name].add_(drawn, alpha=self.noise * self.clip_norm)
                    parameter.add_(total[name], alpha=-self.learning_rate / self.batch_size)
                    if step >= self.steps - last:
                        mean[name].add_(parameter)
        kept = {name: (total / last).float() for name, total in mean.items()} if last else {}
        return {**model_state(model), **kept}

    def _chosen(self, sizes: Sequence[int], random: torch.Generator) -> Tensor:
        """Return which of all patients are in a step."""
        if self.sample_rate is not None:
            return (torch.rand(sum(sizes), generator=random) < self.sample_rate).nonzero().flatten()
        of_each, parts, start = self.batch_size // len(sizes), [], 0
        for size in sizes:
            parts.append(start + torch.randperm(size, generator=random)[:of_each])
            start += size
        return torch.cat(parts)

    def _gradient(self, task: BagTask, model: nn.Module, bags: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the sum of the gradients of bags (b, n, f) by parameter, each clipped if there is a clip."""
        if not len(bags):
            return {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        there = torch.ones((len(bags), 1, bags.shape[1]), dtype=torch.bool)
        batch = PatientBatch(bags[:, None], there, there[:, :, 0], labels[:, None])

        def factors(norms: Tensor) -> Tensor:
            if self.sample_rate is None:
                return torch.ones_like(norms)
            return (self.clip_norm / norms.clamp(min=1e-30)).clamp(max=1.0)

        return gradients_of(model, lambda: task.record_losses(model, batch), factors)[0]

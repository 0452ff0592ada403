"""MEM: from a bag of patch features to a class, by memory units (Kalra et al., ECCV 2020).

The equations are those of Adnan et al. 2022 (Sci Rep 12:1953), eqs. 3 and 4. What the text leaves open
(m, d, h, the head) is a setting here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from histoflare import ranges
from histoflare.bags.models.model import Attended, BagModel, ModelSettings

InputNorm = Literal["none", "rms"]

# Scores (b * m * rows * n float32) held at once when no gradient is wanted: 2**24 of them are 64 MiB.
MAX_SCORES = 2**24

MOST_WEIGHTS = 2**28
"""Of one layer: what a job may ask of a site's memory."""


def memory_attention(units: Tensor, mask: Tensor, *, max_scores: int = MAX_SCORES) -> Tensor:
    """Return p (b, m, n), what each memory unit attends to: the row average of softmax(U Uᵀ).

    S = softmax over the columns (``dim=-1``) of the unscaled U Uᵀ, and p is the average of the *rows* of S.
    (Each row of S sums to 1, so averaging along the softmax axis instead would give 1/n everywhere.)
    Columns outside the mask get no weight, rows outside it are not averaged.

    Without gradients the rows are worked off in chunks, so that a bag of 10,000 patches needs no n² memory.

    Args:
        units: U, (b, m, n, d).
        mask: (b, n) bool, True where there is a patch.
        max_scores: Largest number of scores held at once when gradients are off.

    Returns:
        (b, m, n), >= 0, summing to 1 over n; all 0 for a bag without a patch.
    """
    b, m, n, _ = units.shape
    rows = n
    if not torch.is_grad_enabled() and b * m * n * n > max_scores:
        rows = max(1, max_scores // (b * m * n))
    columns = mask[:, None, None, :]  # (b, 1, 1, n)
    weight = mask.to(units.dtype)  # (b, n)
    # Not -inf: a bag without a patch would be 0/0, and its NaN would reach the gradient of the whole batch.
    lowest = torch.finfo(units.dtype).min
    total = units.new_zeros((b, m, n))
    for start in range(0, max(1, n), max(1, rows)):
        block = units[:, :, start : start + rows]  # (b, m, r, d)
        scores = (block @ units.transpose(-1, -2)).masked_fill(~columns, lowest)  # (b, m, r, n)
        share = scores.softmax(dim=-1)  # (b, m, r, n), rows sum to 1
        kept = weight[:, None, None, start : start + rows]  # (b, 1, 1, r)
        total = total + (kept @ share).squeeze(-2)  # (b, m, n)
    valid = weight.sum(dim=1).clamp(min=1.0)  # (b,)
    return total / valid[:, None, None]


class MemoryBlock(nn.Module):
    """A memory block: from n vectors of length f to m vectors of length h, whatever the order of the n.

    u_ij = tanh(x_j A_i) (all m matrices A_i in one ``nn.Linear``), p_i from :func:`memory_attention`,
    C = autoencoder(X), x̂_i = p_i C. Every parameter sits in an ``nn.Linear``, so that per-sample gradients
    can be had for all of them.

    Args:
        features: f, length of an input vector.
        memories: m, number of memory units.
        dim: d, length of a memory vector.
        hidden: h, length of the code and of an output vector.
        decoder: Keep the autoencoder's second half, for a reconstruction loss.
    """

    def __init__(self, features: int, memories: int, dim: int, hidden: int, *, decoder: bool = False) -> None:
        super().__init__()
        self.memories = memories
        self.dim = dim
        self.memory = nn.Linear(features, memories * dim, bias=False)
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.decoder: nn.Sequential | None = None
        if decoder:
            self.decoder = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, features))

    def forward(self, x: Tensor, mask: Tensor, max_scores: int = MAX_SCORES) -> tuple[Tensor, Tensor, Tensor]:
        """Return x̂ (..., m, h), p (..., m, n) and each bag's mean squared reconstruction error (...).

        ``x`` is (..., n, f) and ``mask`` (..., n). The layers see (first axis, all patches, f), so that a
        sample of theirs may be a patient with several bags. The error is 0 without a decoder and for a bag
        without a patch.
        """
        *lead, n, _ = x.shape
        b = math.prod(lead)
        patches = x.flatten(start_dim=1, end_dim=-2) if x.ndim > 3 else x  # (first, patches, f)
        units = torch.tanh(self.memory(patches))  # (first, patches, m·d)
        units = units.view(b, n, self.memories, self.dim).transpose(1, 2)  # (b, m, n, d)
        attention = memory_attention(units, mask.reshape(b, n), max_scores=max_scores)  # (b, m, n)
        attention = attention.view(*lead, self.memories, n)  # (..., m, n)
        code = self.encoder(patches)  # (first, patches, h)
        out = attention @ code.view(*lead, n, code.shape[-1])  # (..., m, h)
        error = x.new_zeros(lead)
        if self.decoder is not None:
            weight = mask.to(x.dtype)  # (..., n)
            squared = (self.decoder(code) - patches).square().mean(dim=-1).view(*lead, n)  # (..., n)
            error = (squared * weight).sum(dim=-1) / weight.sum(dim=-1).clamp(min=1.0)  # (...)
        return out, attention, error


@dataclass(frozen=True)
class MemSettings(ModelSettings):
    """The settings of :class:`MEM`.

    Attributes:
        memories: m. dim: d. hidden: h (see :class:`MemoryBlock`).
        blocks: Number of memory blocks; block k+1 sees the m vectors of block k.
        input_norm: ``"rms"`` scales each patch's vector by itself to root mean square 1 (no statistic over
            patches, patients or sites). U Uᵀ is not normalised, so with features of large norm tanh saturates
            and with features of small norm the attention is flat. ``"none"`` is the paper's text.
        reconstruction: Weight (>= 0) of the autoencoders' mean squared error in the loss; 0 leaves the
            decoders out.
        bias: Whether the head has a number of its own for each output, as in the paper. Under DP-SGD noise in
            it moves the threshold between classes, and takes part of the clip from all other weights.
    """

    name: ClassVar[str] = "mem"
    sample_mixing: ClassVar[bool] = False

    memories: int = 10
    dim: int = 128
    hidden: int = 256
    blocks: int = 1
    input_norm: InputNorm = "none"
    reconstruction: float = 0.0
    bias: bool = True

    def problems(self, features: int) -> list[str]:
        """Return what is out of range."""
        found = [
            *ranges.whole("memories", self.memories, 256),
            *ranges.whole("dim", self.dim, 16_384),
            *ranges.whole("hidden", self.hidden, 16_384),
            *ranges.whole("blocks", self.blocks, 16),
            *ranges.one_of("input_norm", self.input_norm, ("none", "rms")),
            *ranges.at_least_zero("reconstruction", self.reconstruction),
            *([] if type(self.bias) is bool else [f"bias: true or false, not {self.bias!r}"]),
        ]
        if found:
            return found
        largest = max(features, self.hidden), self.memories, max(self.dim, self.hidden)
        if math.prod(largest) > MOST_WEIGHTS:
            return ["memories, dim, hidden: a layer would have more than 2 to the 28th weights"]
        return []

    def build(self, features: int, outputs: int) -> MEM:
        """Return the network."""
        return MEM(self, features, outputs)


class MEM(BagModel):
    """Memory blocks, flattened, and a linear head.

    Args:
        settings: See :class:`MemSettings`.
        features: f, length of a patch's feature vector.
        outputs: k, length of an answer.
    """

    max_scores: int = MAX_SCORES
    """See :func:`memory_attention`; changes memory and speed only."""

    def __init__(self, settings: MemSettings, features: int, outputs: int) -> None:
        super().__init__()
        self.settings = settings
        m, h = settings.memories, settings.hidden
        self.blocks = nn.ModuleList(
            MemoryBlock(
                features if index == 0 else h, m, settings.dim, h, decoder=settings.reconstruction > 0
            )
            for index in range(settings.blocks)
        )
        self.head = nn.Linear(m * h, outputs, bias=settings.bias)

    def _attend(self, x: Tensor, mask: Tensor) -> Attended:
        """Return what it makes of bags: attention is the first block's, auxiliary the weighted error."""
        x = self._normalised(x)
        first: Tensor | None = None
        error = x.new_zeros(x.shape[:-2])
        for block in self.blocks:
            x, attention, own_error = cast(MemoryBlock, block)(x, mask, self.max_scores)  # (..., m, h)
            error = error + own_error
            first = attention if first is None else first
            mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)  # (..., m)
        assert first is not None  # blocks >= 1
        weight = self.settings.reconstruction
        return Attended(self.head(x.flatten(start_dim=-2)), first, weight * error if weight else None)

    def attend_added(self, bag: Tensor) -> Callable[[Tensor], Tensor]:
        """Return how much is attended to a patch if it alone is added to a bag, in closed form.

        With s_i the scores between the patch and the bag's patches i, Z_i the sum of exp over row i of the
        bag's scores, s the patch's score with itself: attention times (n + 1) is
        Σ_i exp(s_i) / (Z_i + exp(s_i)) + exp(s) / (Σ_i exp(s_i) + exp(s)).
        """
        of_bag = self._remember(bag)  # (m, n, d)
        totals = (of_bag @ of_bag.transpose(1, 2)).logsumexp(dim=2)  # (m, n)

        def added(patches: Tensor) -> Tensor:
            units = self._remember(patches)  # (m, b, d)
            scores = units @ of_bag.transpose(1, 2)  # (m, b, n)
            own = units.square().sum(dim=2)  # (m, b)
            from_bag = torch.sigmoid(scores - totals[:, None, :]).sum(dim=2)  # (m, b)
            from_itself = torch.sigmoid(own - scores.logsumexp(dim=2))  # (m, b)
            return (from_bag + from_itself).mean(dim=0)  # (b,)

        return added

    def _remember(self, features: Tensor) -> Tensor:
        """Return the memory vectors (m, n, d), float64, of patches (n, f) in the first block."""
        block = cast(MemoryBlock, self.blocks[0])
        units = torch.tanh(block.memory(self._normalised(features)))  # (n, m·d)
        return units.view(len(features), block.memories, block.dim).transpose(0, 1).double()

    def _normalised(self, x: Tensor) -> Tensor:
        if self.settings.input_norm == "none":
            return x
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-12)

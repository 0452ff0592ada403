"""MEM: from a bag of patch features to a class, by memory units (Kalra et al., ECCV 2020).

The equations are those of Adnan et al. 2022 (Sci Rep 12:1953), eqs. 3 and 4. What the text leaves open
(m, d, h, the head) is a parameter here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

InputNorm = Literal["none", "rms"]

# Scores (b * m * rows * n float32) held at once when no gradient is wanted: 2**24 of them are 64 MiB.
MAX_SCORES = 2**24


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
class MemOutput:
    """What MEM makes of a batch of bags; ``...`` is the batch's leading axes, (b) or (patients, slides).

    Attributes:
        logits: (..., classes).
        attention: (..., m, n), what each memory unit of the first block attends to; sums to 1 over n.
        reconstruction: (...), mean squared error of the blocks' autoencoders, 0 without decoders.
    """

    logits: Tensor
    attention: Tensor
    reconstruction: Tensor


class MEM(nn.Module):
    """Memory blocks, flattened, and a linear head.

    The output does not depend on the order of the patches nor on padding; a bag without a patch gives a
    finite answer. The same ``seed`` gives the same bytes everywhere and leaves the global random state alone.

    Args:
        classes: Number of classes.
        features: f, length of a patch's feature vector.
        memories: m. dim: d. hidden: h (see :class:`MemoryBlock`).
        blocks: Number of memory blocks; block k+1 sees the m vectors of block k.
        decoder: Keep the decoders, for a reconstruction loss.
        input_norm: ``"rms"`` scales each patch's vector by itself to root mean square 1 (no statistic over
            patches, patients or sites). U Uᵀ is not normalised, so with features of large norm tanh saturates
            and with features of small norm the attention is flat. ``"none"`` is the paper's text.
        seed: Of the initial weights.
        max_scores: See :func:`memory_attention`; changes memory and speed only.
    """

    def __init__(
        self,
        classes: int,
        *,
        features: int = 1024,
        memories: int = 10,
        dim: int = 128,
        hidden: int = 256,
        blocks: int = 1,
        decoder: bool = False,
        input_norm: InputNorm = "none",
        seed: int = 0,
        max_scores: int = MAX_SCORES,
    ) -> None:
        super().__init__()
        self.input_norm = input_norm
        self.max_scores = max_scores
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.blocks = nn.ModuleList(
                MemoryBlock(features if index == 0 else hidden, memories, dim, hidden, decoder=decoder)
                for index in range(blocks)
            )
            self.head = nn.Linear(memories * hidden, classes)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (..., classes) for features ``x`` (..., n, f), ``mask`` (..., n), True = a patch."""
        return self.attend(x, mask).logits

    def attend(self, x: Tensor, mask: Tensor | None = None) -> MemOutput:
        """Return logits, attention over the patches and reconstruction error (see :class:`MemOutput`)."""
        if mask is None:
            mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        x = x.masked_fill(~mask[..., None], 0.0)  # whatever the padding holds, NaN included, is gone
        if self.input_norm == "rms":
            x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-12)
        first: Tensor | None = None
        reconstruction = x.new_zeros(x.shape[:-2])
        for block in self.blocks:
            x, attention, error = cast(MemoryBlock, block)(x, mask, self.max_scores)  # (..., m, h)
            reconstruction = reconstruction + error
            first = attention if first is None else first
            mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)  # (..., m)
        assert first is not None  # blocks >= 1
        return MemOutput(self.head(x.flatten(start_dim=-2)), first, reconstruction)

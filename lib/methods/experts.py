"""Scores for removing experts of an MoE model: REAP, its sum, and two baselines.

REAP (Lasby et al., ICLR 2026, arXiv 2510.13999, equation 9) scores an expert by the mean of gate
times output norm over the tokens routed to it. This is the contribution that is removed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import PruningMethod


class Reap(PruningMethod):
    """The sums of a block's router and experts; `width` is the number of experts."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.counts = torch.zeros(width, dtype=torch.float64, device=device)  # tokens routed to it
        self.sums = torch.zeros_like(self.counts)  # gate times norm

    def observe(self, expert: int, gates: Tensor, outputs: Tensor) -> None:
        """Add an expert's outputs (tokens, hidden) on its tokens, with their gates (tokens,)."""
        norms = torch.linalg.vector_norm(outputs, dim=1, dtype=torch.float32)
        self.counts[expert] += len(gates)
        self.sums[expert] += (gates.float() * norms).sum(dtype=torch.float64)

    def statistics(self) -> list[Tensor]:
        return [self.counts, self.sums]

    def scores(self, seed: int) -> Tensor:
        """Return the score of each expert (experts,); those with the lowest scores are removed."""
        return self.sums / self.counts.clamp(min=1)


class Contribution(Reap):
    """The sum in REAP's mean: frequently used experts score higher."""

    def scores(self, seed: int) -> Tensor:
        return self.sums


class Frequency(Reap):
    """The number of tokens routed to an expert."""

    def scores(self, seed: int) -> Tensor:
        return self.counts


class Random(Reap):
    """Random scores (baseline)."""

    def scores(self, seed: int) -> Tensor:
        return torch.rand(self.width, generator=torch.Generator().manual_seed(seed))

"""Which experts of a mixture may go: REAP, its sum, and two scores to compare with.

REAP (Lasby et al., ICLR 2026, arXiv 2510.13999, equation 9) scores an expert by the mean, over the
tokens that are sent to it, of its gate times the norm of its output: what removing it takes away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import PruningMethod


class Reap(PruningMethod):
    """The sums of a block's router and experts; `width` is the number of experts."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.counts = torch.zeros(width, dtype=torch.float64, device=device)  # tokens sent to it
        self.sums = torch.zeros_like(self.counts)  # of gate times norm

    def observe(self, expert: int, gates: Tensor, outputs: Tensor) -> None:
        """Add what an expert makes (tokens, hidden) of tokens, with their gates (tokens,)."""
        norms = torch.linalg.vector_norm(outputs, dim=1, dtype=torch.float32)
        self.counts[expert] += len(gates)
        self.sums[expert] += (gates.float() * norms).sum(dtype=torch.float64)

    def statistics(self) -> list[Tensor]:
        return [self.counts, self.sums]

    def scores(self, seed: int) -> Tensor:
        """The score of each expert (experts,); those with the lowest go."""
        return self.sums / self.counts.clamp(min=1)


class Contribution(Reap):
    """The sum that REAP takes the mean of: an expert that is used often counts for more."""

    def scores(self, seed: int) -> Tensor:
        return self.sums


class Frequency(Reap):
    """The number of tokens that are sent to an expert."""

    def scores(self, seed: int) -> Tensor:
        return self.counts


class Random(Reap):
    """No reason at all, for comparison."""

    def scores(self, seed: int) -> Tensor:
        return torch.rand(self.width, generator=torch.Generator().manual_seed(seed))

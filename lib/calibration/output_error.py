"""Estimate the error of a pruned layer's outputs on a sample of its input tokens.

The relative squared error of a linear layer is |X (W - Q)^T|^2 / |X W^T|^2. X are the tokens that
it received during pruning, W the weights before and Q after. Over all tokens this would cost as
much as the layers themselves, or X^T X more than SparseGPT's solution. It is therefore estimated,
for every method from a sample drawn in the same way. A few tokens, such as the first of a text,
may be a hundred times as large as others. Tokens are drawn with a probability in proportion to
their squared norms and weighted by its inverse (priority sampling, Duffield, Lund & Thorup 2007),
so that both sums are unbiased. With at most `TOKENS` tokens the error is exact.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

TOKENS = 32  # sample size: the root mean square deviation of an error is 4%, as with 64
GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 are evenly spread and reproducible


@lru_cache(maxsize=2)  # most inputs of a block have the same tokens
def _factors(seen: int, count: int, device: torch.device) -> Tensor:
    """Return u^(-1/2), u uniform in (0, 1), for each token (count,) after the first `seen`."""
    places = torch.arange(seen + 1, seen + count + 1, device=device, dtype=torch.float64)
    return (places * GOLDEN).frac().rsqrt().float()


def _norms(x: Tensor) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=1, dtype=exact)


class TokenSample:
    """A sample of the tokens of an input (tokens, in), drawn batch by batch.

    It does not depend on the batch size.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.kept: list[tuple[Tensor, Tensor]] = []  # keys (n,) and rows (n, in) of candidates
        self.bound: float | None = None  # keys below do not stay; a GPU would be waited for

    def add(self, x: Tensor) -> None:
        """Add tokens x (tokens, in) to the population that is sampled."""
        keys = _norms(x) * _factors(self.seen, len(x), x.device)
        self.seen += len(x)
        if self.bound is None:
            best = keys.topk(min(TOKENS + 1, len(keys))).indices
        else:
            best = (keys > self.bound).nonzero()[:, 0]
        self.kept.append((keys.index_select(0, best), x.index_select(0, best)))
        if sum(len(keys) for keys, _ in self.kept) > 2 * TOKENS:
            self._merge()

    def _merge(self) -> tuple[Tensor, Tensor]:
        keys, x = map(torch.cat, zip(*self.kept, strict=True))
        best = keys.topk(min(TOKENS + 1, len(keys)))
        self.kept = [(best.values, x[best.indices])]
        if x.device.type == "cpu" and len(best.values) > TOKENS:
            self.bound = best.values[-1].item()
        return self.kept[0]

    def rows(self, count: int = TOKENS) -> Tensor:
        """Return up to `count` tokens (n, in), float32, times the root of their weights."""
        keys, x = self._merge()
        roots = torch.ones_like(keys[:count])
        if len(keys) > count:
            roots = (keys[count] / _norms(x[:count]).clamp_min(1e-30)).clamp_min(1)
        return x[:count].float() * roots.float()[:, None]


def relative_error(dense: Tensor, pruned: Tensor) -> float | None:
    """Return |D - P|^2 / |D|^2 of a layer's outputs before and after pruning (n, out), in 6 digits.

    None if the dense outputs are all 0.
    """
    before = dense.square().sum(dtype=torch.float64)
    change = (dense - pruned).square().sum(dtype=torch.float64)
    return float(f"{float(change / before):.6g}") if before > 0 else None

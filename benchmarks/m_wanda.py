"""M-Wanda (Choenni and Titov, EMNLP 2025, arXiv 2505.21171), as its abstract and a summary tell.

Run: `main.py --prune_method benchmarks/m_wanda.py:MWanda --allocation owl --seqlen 512`.

From the paper: the score takes norms of each language and their variation, sparsity follows the
correlation of languages by layer, and activation probabilities matter. Its equations and code could
not be read, so their form is our reading:

- Score: |W| (m + spread * s) share^active. m and s are the mean and the standard deviation of the
  languages' norms per token. Wanda's norm on equal parts of text is already the root of m^2 + s^2.
  `share`: of tokens at which an input exceeds their mean input; off, since we know no form of it.
- Sparsity: OWL's rule and range, with one minus the correlation of the languages' norms instead of
  outliers: blocks that differ more keep more. Loading this file so changes `--allocation owl`.
- No method is told a token's language. Sources of equal weight alternate by window (`interleave` in
  lib/data/windows.py), so window n of `window` tokens has language n modulo `languages`: in one
  process, and without experts. Of one language's text, two halves are compared.
"""

from importlib import import_module

import torch
from langprune.methods.base import PruningMethod
from langprune.methods.wanda import Wanda
from torch import Tensor

owl = import_module("..calibration.owl", Wanda.__module__.rpartition(".")[0])


class MWanda(Wanda):
    languages, window, spread, active = 2, 512, 1.0, 0.0
    remove_neurons_ = PruningMethod.remove_neurons_  # without a rule for neurons

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.sums = torch.zeros(3, self.languages, width, device=device, dtype=torch.float64)

    def observe(self, x: Tensor) -> None:
        places = torch.arange(self.tokens, self.tokens + len(x), device=x.device)
        super().observe(x)
        size = x.float().abs()
        parts = size.square(), size > size.mean(1, keepdim=True), torch.ones_like(size)
        self.sums.index_add_(1, places // self.window % self.languages, torch.stack(parts).double())

    def norms(self) -> Tensor:
        """Return the root mean square of each input in each language (languages, in)."""
        return (self.sums[0] / self.sums[2]).sqrt()

    def score(self, weight: Tensor) -> Tensor:
        share = (self.sums[1] / self.sums[2]).mean(0) ** self.active
        factor = self.norms().mean(0) + self.spread * self.norms().std(0, correction=0)
        return weight.abs() * (factor * share).float()


def difference(scores) -> float:
    """Return one minus the mean correlation of two languages' norms over a block's inputs."""
    each = torch.stack([group.method.norms().corrcoef() for group in scores.args[0]])
    return 1 - float(each[:, *torch.triu_indices(*each[0].shape, 1)].mean())


owl.Wanda, owl.outlier_share = MWanda, difference

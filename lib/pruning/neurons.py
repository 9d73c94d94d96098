"""Remove whole neurons of the blocks' MLPs, block by block: what is left is a smaller dense model.

Each block is observed with the blocks before it already smaller; of its down projection's input a
method sums what it needs, chooses the neurons that stay and, if it repairs, what down's columns
become (`PruningMethod.remove_neurons_`). The rows of gate and up stay as they were.
Run: `python main.py --model MODEL --prune_method sparsegpt --sparsity_type neurons ...`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.model.matrix import PrunableLinear
from lib.model.parts import PartLayout, get_tensor
from lib.pruning.inputs import Group
from lib.pruning.pruner import UNREACHED, PartPruner
from lib.util.errors import UserError

CHECKED = 16  # tokens on which a block is checked where no text is observed
MULTIPLE = 256  # of neurons, that fast kernels like
STEPS = 8  # multiples that the width has at least
TOLERANCE = 1e-3  # of the norm of a block's outputs, that rounding may change


def multiple_of(width: int) -> int:
    """Of what the neurons that stay are a multiple: an eighth of the width at most."""
    return min(MULTIPLE, 2 ** max(0, (width // STEPS).bit_length() - 1))


def count_left(layout: PartLayout, ratio: float) -> int:
    """How many neurons of a block stay: about 1 - `ratio` of them, a multiple of `multiple_of`.

    UserError where that removes none.
    """
    width, multiple = layout.count, multiple_of(layout.count)
    left = max(1, round((1 - ratio) * width / multiple)) * multiple
    if left >= width:
        raise UserError(
            f"--sparsity_ratio {ratio:g}: of {width} neurons in each block none can go and leave a "
            f"multiple of {multiple}; use a higher ratio"
        )
    return left


class NeuronPruner(PartPruner):
    """Makes the MLPs of a runner's model narrower, in place."""

    def _linears(self, index: int) -> list[PrunableLinear]:
        """The down projection."""
        self.index = index
        name = f"{self.runner.name}.{index}.{self.layout.modules[index]}"
        return [linear for linear in self.runner.linears(index) if linear.name == name]

    def _change_(self, group: Group, matrices: list[Tensor]) -> None:
        """Choose neurons by gains too: the product of the norms of the rows that make each."""
        gains: Tensor | float = 1.0
        down = f"{self.layout.modules[self.index]}.weight"
        for path, (dim, entries) in self.layout.tensors[self.index].items():
            weight = get_tensor(self.runner.blocks[self.index], path)
            if path != down and weight.dim() > 1:
                for part in (weight.data.T if dim else weight.data).chunk(entries):  # (width, in)
                    gains = gains * torch.linalg.vector_norm(part, dim=1, dtype=torch.float32)
        kept = group.method.remove_neurons_(matrices[0], gains, self.left)
        self.notes[-1].kept = kept.tolist()

    def _finish_(self, index: int) -> None:
        """Make the block smaller in all processes; on a batch that must not change its outputs."""
        super()._finish_(index)
        runner, states, kept = self.runner, self.states, self.notes[index].kept
        if not kept:
            raise UserError(f"{runner.name}.{index}.{self.layout.modules[index]}: {UNREACHED}")
        if states is None:  # no text is observed
            ids = torch.arange(CHECKED, device=runner.device)[None]
            states = runner.capture(ids, 1, runner.device)
        _, run = next(runner.iter_batches(states, index))
        expected = run().float()  # down's columns of the neurons that go are zeros
        self._cut_(index)
        tolerance = max(TOLERANCE, 4 * torch.finfo(runner.model.dtype).eps)
        if (run().float() - expected).norm() > tolerance * expected.norm():
            raise UserError(
                f"--sparsity_type neurons: {runner.name}.{index}: its MLP does more than multiply "
                "by neurons, so that none can be removed; use --sparsity_type unstructured"
            )

"""The interface of pruning methods: sums over one input of a block, and a solver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .sparsity import Sparsity


class PruningMethod:
    """The statistics of one input (tokens, in) of a block, and the solver for its linear layers.

    One object is made for each distinct input. It observes the input batch by batch, its
    statistics are summed over processes, and it prunes the layers that receive the input.

    Two attributes are set before `prune_`, per layer. `output_costs`, if known or if a class
    `needs_gradients`: the cost of a squared error in its outputs (out_i,), which is the mean square
    of the gradient there (lib/calibration/fisher.py). `output_squares`, if it `needs_outputs`: the
    sum over tokens of its squared outputs (out_i,), float64, without the bias.

    Class attributes that are numbers, text or booleans are parameters that --method_args sets.
    """

    revision: ClassVar[int] = 1  # incremented when the same inputs give other weights
    observes: ClassVar[bool] = True  # needs calibration windows
    needs_gradients: ClassVar[bool] = False  # computed in one backward pass through the dense model
    needs_outputs: ClassVar[bool] = False
    dense_stream: ClassVar[bool] = False  # takes inputs in order, beside the dense model's
    inverts_gram: ClassVar[bool] = False  # solves with X^T X, its `hessian`
    # float32 numbers that the solver holds besides its sums and matrices: the maximum of
    # a * in^2 + b * in * out + c * out over (a, b, c); measured at inputs and outputs from 32 to
    # 3,072, with N:M masks (unstructured masks take 20% more)
    workspace: ClassVar[Sequence[tuple[float, float, float]]] = [(0, 1.3, 0)]
    neuron_workspace: ClassVar[Sequence[tuple[float, float, float]]] = [(0, 1.3, 0)]

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self.device = device
        self.tokens = 0  # tokens observed; by all processes, once their statistics are summed
        self.output_costs: Sequence[Tensor | None] | None = None
        self.output_squares: Sequence[Tensor | None] | None = None

    def observe(self, x: Tensor) -> None:
        """Add x (tokens, in) to the statistics.

        With `dense_stream` it takes one of two more arguments, float32 or as x. `dense`
        (tokens, in) is the same input in the dense model. `residual_error` (tokens, out) is the
        dense model's residual stream minus the current one with one layer's outputs added.
        """
        self.tokens += len(x)

    def statistics(self) -> list[Tensor]:
        """Sums over tokens, which processes add in place."""
        return []

    def prune_(self, weights: Sequence[Tensor], sparsities: Sequence[Sparsity]) -> None:
        """Prune float32 matrices (out_i, in), each to its own sparsity of one pattern, in place.

        Raises UserError if the statistics are insufficient.
        """
        raise NotImplementedError

    def remove_neurons_(self, weight: Tensor, gains: Tensor, count: int) -> Tensor:
        """Zero whole columns of a down projection (out, in) in place, until `count` are left.

        `gains` (in,): the product of the norms of the rows that make each neuron. Solvers also
        change the remaining columns, and may delete statistics, so call this once.
        Returns the indices of the remaining columns (count,) in ascending order.
        """
        raise NotImplementedError

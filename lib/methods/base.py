"""What every pruning method is: sums over one input of a block, and a solver for its linears."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .sparsity import Sparsity


class PruningMethod:
    """The statistics of one input (tokens, in) of a block, and how its linears are pruned.

    One object is made for each distinct input. It observes what flows there, batch after batch;
    its statistics are added up over processes; then it prunes the linears that receive the input.

    Set before `prune_`, of each linear: `output_costs`, where they are known or a class
    `needs_gradients`: what the square of an error in its outputs costs (out_i,), which is the mean
    square of the gradient there (lib/pruning/fisher.py); `output_squares`, if it `needs_outputs`:
    the sum over tokens of the squares of its outputs (out_i,), float64, without the bias.

    What a class declares as a number, text or truth value is a parameter: --method_args sets it.
    """

    revision: ClassVar[int] = 1  # rises where the same inputs give other weights
    observes: ClassVar[bool] = True  # it needs calibration windows
    needs_gradients: ClassVar[bool] = False  # by one backward pass through the dense model
    needs_outputs: ClassVar[bool] = False
    dense_stream: ClassVar[bool] = False  # it takes inputs in order, beside the untouched model's
    inverts_gram: ClassVar[bool] = False  # it solves with X^T X, its `hessian`

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self.device = device
        self.tokens = 0  # observed, by all processes once their statistics are added up
        self.output_costs: Sequence[Tensor | None] | None = None
        self.output_squares: Sequence[Tensor | None] | None = None

    def observe(self, x: Tensor) -> None:
        """Add x (tokens, in) to the statistics.

        With `dense_stream` it takes one of two more arguments, float32 or as x: `dense`
        (tokens, in), the same input in the untouched model; `residual_error` (tokens, out), how far
        the residual stream that a single linear adds to is behind the untouched model's.
        """
        self.tokens += len(x)

    def statistics(self) -> list[Tensor]:
        """Sums over tokens, which processes add up in place."""
        return []

    def prune_(self, weights: Sequence[Tensor], sparsities: Sequence[Sparsity]) -> None:
        """Prune float32 matrices (out_i, in), each to its own sparsity of one pattern, in place.

        UserError where the statistics do not suffice.
        """
        raise NotImplementedError

    def remove_neurons_(self, weight: Tensor, gains: Tensor, count: int) -> Tensor:
        """Zero whole columns of a down projection (out, in) in place, until `count` are left.

        `gains` (in,): the product of the norms of the rows that make each neuron. Methods that
        repair change the columns that stay, and may drop statistics on the way: it is called once.
        Returns the indices of these columns (count,) in rising order.
        """
        raise NotImplementedError

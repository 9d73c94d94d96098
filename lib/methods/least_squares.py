"""The least-squares problem of a linear layer that aims at the outputs of the dense model.

*The problem.* A layer with weights W (out, in) receives X (tokens, in) from the blocks pruned so
far. In the dense model it would receive D (tokens, in). If its outputs are added to a residual
stream, L (tokens, out) is the error of that stream: the dense model's minus the current one. The
masked matrix Q minimizes

    |X Q^T - D W^T - L|^2 + damping |(Q - W) S|^2                                          (1)

SparseGPT keeps a layer's own outputs X W^T. This problem also repairs the errors of earlier
layers, in its input (asymmetric calibration: GPTAQ, arXiv 2504.02692, and
Qronos, arXiv 2505.11695, both for quantization) and in the stream it writes to. (1) needs sums over
tokens: A = X^T X, F = (D - X)^T X of the input's error and G = L^T X of the stream's. The
differences are summed because they are small: rounding in D^T X would hide them.

*Scaling.* S = diag(A)^1/2 are the norms of the inputs. In terms of W S and S^-1 A S^-1, which has
a unit diagonal, magnitudes of weights are comparable across inputs, as Wanda's scores are. For a
quantizer S is at least a share of its median; the diagonal is less than 1 where that raises S.
Below, all is scaled and A includes the damping: (1) is tr(Q A Q^T) - 2 tr(B Q^T) with
B = W (A + F) + G.

*Damping.* Least squares overfits T tokens. The error grows with in / T and with the share u of an
input's variance that the others do not explain, the mean of 1 / (A^-1)_jj. The damping is therefore
FLOOR + `damping` u in / T. A fixed share that suits one model and number of windows overfits or
underfits another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import PruningMethod
from .gram import add_cross_, add_upper_gram_, damped_cholesky_, inverse_, mirror_

FLOOR = 0.01  # least damping, as a share of an input's variance


class LeastSquares(PruningMethod):
    """The sums over one input of a block that define the problem of its layers.

    `damping` is a multiple of the unexplained share per token and input.
    """

    dense_stream = True
    inverts_gram = True
    workspace = [(3, 3.4, 0), (2, 8.1, 0)]
    neuron_workspace = [(2, 0, 0), (1, 3.7, 0)]
    damping = 6.0
    _least_norm = 0.0  # of an input in S, as a share of the median

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.hessian = torch.zeros(width, width, device=device)  # A (in, in), upper triangle
        self.input_error_gram: Tensor | None = torch.zeros_like(self.hessian)  # F (in, in)
        self.residual_error_gram: Tensor | None = None  # G (out, in)

    def observe(
        self, x: Tensor, dense: Tensor | None = None, residual_error: Tensor | None = None
    ) -> None:
        """As `PruningMethod.observe`; `residual_error` is L + (D - X) W^T of (1), in full."""
        super().observe(x)
        add_upper_gram_(self.hessian, x)
        if residual_error is not None:
            if self.residual_error_gram is None:
                self.input_error_gram = None
                self.residual_error_gram = x.new_zeros(
                    residual_error.shape[1], x.shape[1], dtype=torch.float32
                )
            add_cross_(self.residual_error_gram, residual_error, x)
        elif dense is not None:
            add_cross_(self.input_error_gram, dense.float() - x.float(), x)

    def statistics(self) -> list[Tensor]:
        sums = self.hessian, self.input_error_gram, self.residual_error_gram
        return [tensor for tensor in sums if tensor is not None]

    def problem(
        self, weights: Sequence[Tensor], drops_dead: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Return (1) for matrices (out_i, in) that share the input, scaled.

        Returns W S and B (in, out), A (in, in), S (in, 1), and the unexplained share. An input that
        was always 0 is dead and gives no information on its weights; `drops_dead` prunes them. The
        floor of the damping rises if necessary; UserError if that does not help.
        """
        hessian = self.hessian.clone()
        mirror_(hessian)
        dead = hessian.diagonal() == 0
        norms = hessian.diagonal().sqrt().masked_fill_(dead, 1)[:, None]
        norms.clamp_min_(self._least_norm * norms.median())
        hessian /= norms.T
        hessian /= norms
        inverse = inverse_(damped_cholesky_(hessian, FLOOR))
        residual_variance = (1 / inverse.diagonal()).mean().item()
        del inverse
        share = self.damping * len(hessian) / self.tokens
        hessian.diagonal().add_(share * residual_variance)
        residual_variance *= 1 + share  # share in the damped matrix
        start = torch.cat([weight.T for weight in weights], 1)
        if self.residual_error_gram is not None:
            error = self.residual_error_gram.T / norms
        else:
            error = (self.input_error_gram.T @ start).div_(norms)
        target = (hessian @ start.mul_(norms)).add_(error)
        if drops_dead:
            start[dead] = target[dead] = 0
        return start, target, hessian, norms, residual_variance


def conjugate_gradients_(
    solution: Tensor, target: Tensor, hessian: Tensor, mask: Tensor, steps: int
) -> None:
    """Lower (1) from Q = `solution` (in, out), each column on its own mask."""
    tiny = torch.finfo(solution.dtype).tiny
    keep = (~mask).float()  # multiplying is faster than filling by a mask
    residual = torch.addmm(target, hessian, solution, alpha=-1).mul_(keep)
    direction = residual.clone()
    norm = residual.square().sum(0)  # (out,)
    for _ in range(steps):
        image = hessian @ direction
        curvature = (direction * image).sum(0)
        step = norm / curvature.clamp_min(tiny)  # 0 where a column is solved or wholly pruned
        solution.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1).mul_(keep)
        before, norm = norm, residual.square().sum(0)
        direction.mul_(norm / before.clamp_min(tiny)).add_(residual)

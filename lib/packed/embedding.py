"""Embedding and output head as int8 with a scale for each row, tied or not. For inference only.

Every token has a row in both. An embedding looks up its rows and multiplies them by their scales.
A head multiplies by the integers, on a CPU with the kernels of kernels.cpp.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .formats import PACKED, SMALLEST, check_finite
from .layout import tiles
from .linear import PackedModule

LARGEST = 127  # largest integer


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers nearest to a matrix (rows, width), int8, and scales (rows,), float32.

    A row's scale is its largest weight over 127. PackedError if the matrix holds nan or inf.
    """
    check_finite(matrix, 8)
    codes = matrix.new_empty(matrix.shape, dtype=torch.int8)
    scales = matrix.new_empty(len(matrix), dtype=torch.float32)
    for part in tiles(*matrix.shape, matrix.device):
        tile = matrix[part].float()
        largest = tile.abs().amax(1, keepdim=True)
        scale = (largest / LARGEST).clamp_min(SMALLEST)
        rounded = (tile / scale).round_().clamp_(-LARGEST, LARGEST)
        # the exact scale of a row on a grid may be a float next to the largest weight over 127
        for neighbor in (scale.nextafter(torch.zeros_like(scale)), scale.nextafter(scale * 2)):
            exact = (rounded * neighbor == tile).all(1, keepdim=True) & (largest > 0)
            scale = torch.where(exact, neighbor, scale)
        codes[part], scales[part] = rounded, scale.squeeze(1)
    return codes, scales


def dense_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 matrix (rows, width) of integers and scales."""
    return codes.float().mul_(scales[:, None])


class PackedRows(PackedModule):
    """A matrix (rows, width) as int8 `weight` (rows, width) and float32 `scale` (rows,)."""

    def __init__(self, weight: Tensor, tied: PackedRows | None = None) -> None:
        """Make empty rows for a matrix like `weight`, on its device, or share those of `tied`."""
        super().__init__(weight.dtype)
        self._owner = (tied,) if tied is not None else ()  # a tuple, so as not to be a child
        if tied is not None:
            self.weight = tied.weight
            return
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        self.register_buffer("scale", scale)

    def __getattr__(self, name: str):
        if name == "scale" and self._owner:
            return self._owner[0].scale
        return super().__getattr__(name)

    @property
    def tied(self) -> bool:
        """Whether the rows are those of another module."""
        return bool(self._owner)

    def quantize_(self, weight: Tensor) -> None:
        """Store the integers nearest to `weight` (rows, width)."""
        codes, scales = quantize_rows(weight.detach())
        self.weight.data.copy_(codes)  # in place, since a tied head has the same parameter
        self.scale.copy_(scales)
        self.checked = True

    def dense(self) -> Tensor:
        """Return the matrix (rows, width) in the model's dtype."""
        self.check()
        return dense_rows(self.weight, self.scale).to(self.dtype)

    def _problem(self) -> str:
        fine = bool((self.scale.isfinite() & (self.scale > 0)).all())
        return "" if fine else "scale is not finite and above 0"


class PackedEmbedding(PackedRows):
    """An embedding of any class whose rows are int8."""

    def __init__(self, embedding: nn.Embedding) -> None:
        """Make an embedding like `embedding`, on its device, with empty rows."""
        super().__init__(embedding.weight)
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.padding_idx = embedding.padding_idx  # padding rows are looked up like others
        # applies its class's operations, such as scaling, to the looked-up rows; its weight is no
        # parameter, so that it is neither saved nor loaded
        self.template = copy.deepcopy(embedding, {id(embedding.weight): None})
        del self.template._parameters["weight"]
        self.template.weight = torch.empty(0, self.embedding_dim, dtype=self.dtype)
        self.template.padding_idx = None

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids of any shape -> (..., width)."""
        if not self.checked:
            self.check()
        flat = ids.flatten()
        rows = dense_rows(self.weight[flat], self.scale[flat]).to(self.dtype)
        order = torch.arange(len(flat), device=ids.device).view(ids.shape)
        return functional_call(self.template, {"weight": rows}, (order,))

    def to_dense(self) -> nn.Embedding:
        embedding = copy.deepcopy(self.template)
        del embedding.weight
        embedding.padding_idx, embedding.num_embeddings = self.padding_idx, self.num_embeddings
        embedding.weight = nn.Parameter(self.dense())
        return embedding


class PackedHead(PackedRows):
    """An output head with int8 rows: its own, or those of a `PackedEmbedding`."""

    def __init__(self, head: nn.Linear, tied: PackedEmbedding | None = None) -> None:
        """Make a head like `head`, on its device, with empty rows, or the rows of `tied`."""
        super().__init__(head.weight, tied)
        self.out_features, self.in_features = head.weight.shape
        self.bias = None if head.bias is None else nn.Parameter(head.bias.detach(), False)
        self._all_kept: tuple[Tensor, Tensor] | None = None  # mask and offsets for the kernels

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x (..., width) -> (..., rows)."""
        if not self.checked:
            self.check()
        return self.multiply(x)

    def _operands(self) -> tuple[Tensor, ...]:
        """Return operands that keep every weight, with one mask for all rows."""
        if self._all_kept is None:
            width = self.in_features
            offsets = torch.arange(0, (self.out_features + 1) * width, width)
            self._all_kept = PACKED[16].encode(torch.ones(1, width)).mask, offsets
        mask, offsets = self._all_kept
        return mask, self.weight.view(-1), offsets, self.scale

    def _dense_rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        return dense_rows(self.weight[part], self.scale[part]).to(dtype)

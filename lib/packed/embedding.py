"""Embedding and output head as int8 with a scale for each row, tied or not. For inference only.

Every token has a row in both. An embedding looks its rows up and multiplies them by their scales;
a head multiplies by the integers, on a CPU by the kernels of kernels.cpp.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import kernels
from .errors import PackedError
from .formats import FORMATS
from .layout import tiles
from .linear import by_dense_rows, by_kernels, kernels_ready

LARGEST = 127  # integer
SMALLEST = torch.finfo(torch.float32).tiny


def quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The integers nearest to a matrix (rows, width), int8, and the scales (rows,), float32.

    A row's scale is its largest weight over 127. PackedError where the matrix holds nan or inf.
    """
    if not bool(matrix.isfinite().all()):
        raise PackedError("8 bits: a weight is nan or inf, which integers can't hold")
    codes = matrix.new_empty(matrix.shape, dtype=torch.int8)
    scales = matrix.new_empty(len(matrix), dtype=torch.float32)
    for part in tiles(*matrix.shape, matrix.device):
        tile = matrix[part].float()
        largest = tile.abs().amax(1, keepdim=True)
        scale = (largest / LARGEST).clamp_min(SMALLEST)
        rounded = (tile / scale).round_().clamp_(-LARGEST, LARGEST)
        # the scale of a row that is on a grid can be a neighbour of the largest weight over 127
        for neighbour in (scale.nextafter(torch.zeros_like(scale)), scale.nextafter(scale * 2)):
            exact = (rounded * neighbour == tile).all(1, keepdim=True) & (largest > 0)
            scale = torch.where(exact, neighbour, scale)
        codes[part], scales[part] = rounded, scale.squeeze(1)
    return codes, scales


def dense_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 matrix (rows, width) that integers and scales stand for."""
    return codes.float().mul_(scales[:, None])


class _PackedRows(nn.Module):
    """A matrix (rows, width) as int8 `weight` (rows, width) and float32 `scale` (rows,)."""

    scale: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dense_dtype = dtype  # of what is looked up or multiplied
        self.source = ""  # name and file, for messages
        self.checked = False

    @property
    def tied(self) -> bool:
        """Whether the rows are those of another module."""
        return False

    def _add_rows(self, weight: Tensor) -> None:
        """Rows for a matrix like `weight`, on its device, not filled."""
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        self.register_buffer("scale", scale)

    def quantise_(self, weight: Tensor) -> None:
        """Hold the integers nearest to `weight` (rows, width)."""
        codes, scales = quantise_rows(weight.detach())
        self.weight.data.copy_(codes)  # in place: a tied head has the same parameter
        self.scale.copy_(scales)
        self.checked = True

    def dense(self) -> Tensor:
        """The matrix (rows, width) in the model's dtype."""
        self.check()
        return dense_rows(self.weight, self.scale).to(self._dense_dtype)

    def check(self) -> None:
        """PackedError, naming the module, where its tensors are not what they have to be."""
        if self.checked or self.weight.is_meta or self.scale.is_meta:
            return
        problem = ""
        if self.weight.dtype != torch.int8 or self.scale.dtype != torch.float32:
            problem = f"is {self.weight.dtype} with {self.scale.dtype}, not int8 with float32"
        elif self.scale.shape != self.weight.shape[:1]:
            problem = f"has {len(self.scale)} scales for {len(self.weight)} rows"
        elif not bool((self.scale.isfinite() & (self.scale > 0)).all()):
            problem = "has scales that are not finite and above 0"
        if problem:
            raise PackedError(f"{self.source or type(self).__name__} {problem}; save it again")
        self.checked = True

    def _apply(self, fn, recurse=True):
        """A cast is for what comes out, not for the scales."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self._buffers["scale"] = scale.to(self.scale.device)
        self._dense_dtype = fn(torch.empty(0, dtype=self._dense_dtype)).dtype
        return self


class PackedEmbedding(_PackedRows):
    """An embedding of any class whose rows are int8."""

    def __init__(self, embedding: nn.Embedding) -> None:
        """Like `embedding`, on its device; its rows are not filled."""
        super().__init__(embedding.weight.dtype)
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.padding_idx = embedding.padding_idx  # rows for padding are looked up as any other
        self._add_rows(embedding.weight)
        # does with the rows that were looked up what its class does, such as scaling them
        self.template = _without_weight(embedding)

    def forward(self, ids: Tensor) -> Tensor:
        """ids of any shape -> (..., width)."""
        if not self.checked:
            self.check()
        flat = ids.flatten()
        rows = self.weight[flat].float().mul_(self.scale[flat, None]).to(self._dense_dtype)
        order = torch.arange(len(flat), device=ids.device).view(ids.shape)
        return functional_call(self.template, {"weight": rows}, (order,))

    def to_embedding(self) -> nn.Embedding:
        """The dense embedding of the class that this one came from."""
        embedding = copy.deepcopy(self.template)
        del embedding.weight
        embedding.padding_idx, embedding.num_embeddings = self.padding_idx, self.num_embeddings
        embedding.weight = nn.Parameter(self.dense())
        return embedding


def _without_weight(embedding: nn.Embedding) -> nn.Embedding:
    """A copy whose weight is no parameter, so that it is neither saved nor loaded."""
    memo = {id(embedding.weight): None}
    template = copy.deepcopy(embedding, memo)
    del template._parameters["weight"]
    template.weight = torch.empty(0, embedding.weight.shape[1], dtype=embedding.weight.dtype)
    template.padding_idx = None
    return template


class PackedHead(_PackedRows):
    """An output head whose rows are int8: its own, or those of a `PackedEmbedding`."""

    def __init__(self, head: nn.Linear, tied: PackedEmbedding | None = None) -> None:
        """Like `head`, on its device; its rows are not filled, or those of `tied`."""
        super().__init__(head.weight.dtype)
        self.out_features, self.in_features = head.weight.shape
        self._tied = (tied,) if tied is not None else ()  # in a tuple, so as not to be a child
        if tied is None:
            self._add_rows(head.weight)
        else:
            self.weight = tied.weight
        self.bias = None if head.bias is None else nn.Parameter(head.bias.detach(), False)
        self.force_dense = self.decoding = False  # see SparseLinear
        self._one_mask: Tensor | None = None  # for the kernels, on a CPU
        self._offsets: Tensor | None = None

    def __getattr__(self, name: str):
        if name == "scale" and self.__dict__.get("_tied"):
            return self._tied[0].scale
        return super().__getattr__(name)

    @property
    def tied(self) -> bool:
        return bool(self._tied)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> (..., rows)."""
        if not self.checked:
            self.check()
        tokens = x.reshape(-1, self.in_features)
        if (
            tokens.is_cpu
            and tokens.dtype in kernels.DTYPES
            and len(tokens)
            and not self.force_dense
        ):
            if kernels_ready():
                y = self._by_kernels(tokens)
                return y.view(*x.shape[:-1], self.out_features)

        def rows(part: slice) -> Tensor:
            return dense_rows(self.weight[part], self.scale[part]).to(tokens.dtype)

        y = by_dense_rows(tokens, rows, self.out_features, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _by_kernels(self, tokens: Tensor) -> Tensor:
        """A product with a matrix that keeps every weight, so that all rows have one mask."""
        if self._one_mask is None:
            width = self.in_features
            self._one_mask = FORMATS[16].encode(torch.ones(1, width)).mask
            self._offsets = torch.arange(0, (self.out_features + 1) * width, width)
        weight = self.weight.view(-1)
        packed = self._one_mask, weight, self._offsets, self.scale, self.bias
        return by_kernels(tokens, packed, self.decoding)

    def to_linear(self) -> nn.Linear:
        """The dense head."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight = nn.Parameter(self.dense())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach())
        return linear

    def _apply(self, fn, recurse=True):
        if not self._tied:
            return super()._apply(fn, recurse)
        nn.Module._apply(self, fn, recurse)
        self._dense_dtype = fn(torch.empty(0, dtype=self._dense_dtype)).dtype
        return self

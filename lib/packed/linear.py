"""`SparseLinear`: a linear whose sparse weight stays packed in memory. For inference only.

On a CPU every product goes through the kernels of kernels.cpp, if there is a compiler to build
them. On CUDA a 2:4 weight, of a shape and dtype that torch's kernels take, is replaced by torch's
semi-structured tensor at the first forward and packed again whenever the linear is moved or saved.
Anything else unpacks the one weight it needs at every forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from . import cuda, kernels
from .errors import PackedError
from .formats import FORMATS, Values
from .layout import Packed, is_two_of_four, row_offsets

TILE_WEIGHTS = 2**20  # unpacked at a time by each thread: what lies in a cache is multiplied fast
DECODED_TOKENS = 4  # at a time, at most, where a model decodes: the kernels' path for few tokens


@torch.compiler.assume_constant_result
def kernels_ready() -> bool:
    """Whether the CPU's kernels can be used; builds them on the first call."""
    return kernels.ready()


def by_kernels(tokens: Tensor, packed: tuple, decoding: bool) -> Tensor:
    """tokens (n, in) -> (n, out); `packed`: what the kernels take besides; `decoding`: some tokens
    at a time."""
    if not decoding:
        return kernels.linear(tokens, *packed)
    return torch.cat([kernels.linear(part, *packed) for part in tokens.split(DECODED_TOKENS)])


def by_dense_rows(
    tokens: Tensor, rows_of: Callable[[slice], Tensor], out_features: int, bias: Tensor | None
) -> Tensor:
    """tokens (n, in) -> (n, out) by dense rows of the weight; on a CPU by some at a time."""
    step = out_features
    if tokens.is_cpu and not torch.compiler.is_compiling():
        step = max(1, TILE_WEIGHTS * torch.get_num_threads() // tokens.shape[1])
    products = []
    for start in range(0, out_features, step):
        part = slice(start, min(out_features, start + step))
        products.append(F.linear(tokens, rows_of(part), None if bias is None else bias[part]))
    return products[0] if len(products) == 1 else torch.cat(products, 1)


class SparseLinear(nn.Module):
    """y = x W^T + b with W (out, in) packed.

    `mask`, `weight` and, beside integers, `scale` are what formats.py describes, and what is saved;
    `offsets` is counted from the mask. The name `weight` makes a loader that doesn't know the
    packed form stop at the shape, instead of filling in random numbers.
    """

    def __init__(self, linear: nn.Module, nnz: int, fmt: Values = FORMATS[16]) -> None:
        """Of the size, dtype and device of an `nn.Linear` or `Conv1D`; tensors are not filled.

        `nnz`: kept weights, which `fmt` stores.
        """
        super().__init__()
        self.transposed = isinstance(linear, Conv1D)  # the dense checkpoint keeps it (in, out)
        rows, columns = linear.weight.shape
        self.in_features = rows if self.transposed else columns
        self.out_features = columns if self.transposed else rows
        self.nnz, self.fmt = nnz, fmt
        dtype, device = linear.weight.dtype, linear.weight.device
        self._dense_dtype = dtype
        shapes = fmt.shapes(self.out_features, self.in_features, nnz)
        weight = torch.empty(shapes["weight"], dtype=fmt.stored or dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        mask = torch.empty(shapes["mask"], dtype=torch.uint8, device=device)
        self.register_buffer("mask", mask)
        scale = None
        if "scale" in shapes:
            scale = torch.empty(shapes["scale"], dtype=torch.bfloat16, device=device)
        self.register_buffer("scale", scale)
        offsets = torch.empty(self.out_features + 1, dtype=torch.int64, device=device)
        self.register_buffer("offsets", offsets, persistent=False)
        bias = torch.empty(self.out_features, dtype=dtype, device=device)
        self.bias = None if linear.bias is None else nn.Parameter(bias, requires_grad=False)
        self.semi_structured: Tensor | None = None  # torch's tensor in place of the packed ones
        self.reason: str | None = None  # why not semi-structured; None: not tried on this device
        self.force_dense = False  # multiply by the dense weight, whatever would be faster
        self.decoding = False  # multiply a few tokens at a time, however many there are
        self.source = ""  # name and file, for messages
        self.checked = False  # whether the tensors were found to be a packed form
        self._by_kernel = False  # the last call was the CPU's kernel alone, so the next can be

    @classmethod
    def from_linear(
        cls, linear: nn.Module, fmt: Values = FORMATS[16], scales: Tensor | None = None
    ) -> SparseLinear:
        """From an `nn.Linear` or `Conv1D`; shares the bias. `scales` (out, groups): of `encode`."""
        weight = linear.weight.detach()
        weight = weight.T if isinstance(linear, Conv1D) else weight
        packed = fmt.encode(weight, scales)
        sparse = cls(linear, int(torch.count_nonzero(weight)), fmt)
        sparse._set_packed(packed)
        sparse.count_rows_()
        sparse.checked = True
        if linear.bias is not None:
            sparse.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return sparse

    def to_linear(self) -> nn.Module:
        """The dense linear of the class that this one came from."""
        size = (self.out_features, self.in_features)
        with torch.device("meta"):
            linear = (
                Conv1D(*size)
                if self.transposed
                else nn.Linear(*size[::-1], (self.bias is not None))
            )
        dense = self.dense()
        dense = dense.T.contiguous() if self.transposed else dense
        linear.weight = nn.Parameter(dense)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach())
        return linear

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in), in `dtype` or the linear's own."""
        dtype = dtype or self.dtype
        if self.semi_structured is not None:
            return self.semi_structured.to_dense().to(dtype)
        self.check()
        return self.fmt.decode(self.packed, self.in_features, dtype=dtype).to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight where it is dense."""
        return self._dense_dtype if self.fmt.stored else self.weight.dtype

    @property
    def packed(self) -> Packed:
        """The packed tensors; packed again where torch's tensor stands in their place."""
        if self.semi_structured is not None:
            return self.fmt.encode(self.semi_structured.to_dense())
        return Packed(self.mask, self.weight, self.scale)

    def check(self) -> None:
        """PackedError, naming the linear, where its tensors are no packed form of its weight.

        Tensors that are on the meta device, because they lie on disk, are checked by the first
        call that finds them; what was found good is not checked again.
        """
        if self.checked or self.mask.is_meta or self.weight.is_meta:
            return
        try:
            self.fmt.check(self.packed, self.out_features, self.in_features, self.nnz)
        except PackedError as error:
            raise PackedError(f"{self.source}: {error}" if self.source else str(error)) from None
        self.checked = True

    def count_rows_(self) -> None:
        """Set `offsets` by the mask."""
        if self.semi_structured is None:
            self.offsets = row_offsets(self.mask)

    def use_semi_structured_(self) -> bool:
        """Hand the weight to torch's kernels where they take it; whether they did. Tried once."""
        if self.semi_structured is None and self.reason is None:
            here = self.weight.device
            offloaded = "the weights are offloaded" if self._offloaded else None
            self.reason = offloaded or self.why_not_semi_structured(here)
            if self.reason is None:
                self.semi_structured, self.reason = cuda.build(self.dense())
            if self.semi_structured is not None:
                self._set_packed(Packed(self.mask.new_empty(0), self.weight.new_empty(0)))
                self.offsets = self.offsets.new_empty(0)
        return self.semi_structured is not None

    def why_not_semi_structured(self, device: torch.device) -> str | None:
        """Why torch's kernels would not take the weight on `device`; None where they may."""
        if self.semi_structured is None and device.type == "cuda":
            if self.fmt.stored:
                return f"torch's kernels read no {self.fmt.bits}-bit values"
            if not self.mask.is_meta and not is_two_of_four(self.mask):
                return "torch's kernels are for 2:4 alone"
        return cuda.why_not(self.dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if self._by_kernel and x.is_cpu and x.dtype in kernels.DTYPES and not x.requires_grad:
            parameters, buffers = self._parameters, self._buffers  # without nn.Module's __getattr__
            weight, mask, offsets = parameters["weight"], buffers["mask"], buffers["offsets"]
            if weight.is_cpu and offsets.is_cpu and x.numel():
                scale, bias = buffers["scale"], parameters.get("bias")
                return kernels.linear(x, mask, weight, offsets, scale, bias)
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "packed linears compute no gradients: run under torch.no_grad(), or train the "
                "dense model that `model.dequantize()` gives"
            )
        tokens = x.reshape(-1, self.in_features)  # what no kernel can do without
        semi_structured = self.semi_structured is not None or (
            not (torch.compiler.is_compiling() or self.force_dense) and self.use_semi_structured_()
        )
        if not len(tokens):  # of an expert that nothing was sent to
            y = tokens.new_empty(0, self.out_features)
        elif semi_structured:  # of older torch, a transpose
            y = F.linear(tokens, self.semi_structured, self.bias).contiguous()
        else:
            y = self._multiply(tokens)
        return y.view(*x.shape[:-1], self.out_features)

    def _multiply(self, tokens: Tensor) -> Tensor:
        """tokens (n, in) -> (n, out) by the packed tensors."""
        if self.weight.is_meta and not tokens.is_meta:  # its operator would return anything
            raise RuntimeError(f"{self.source or 'a packed linear'}: its weight is not in memory")
        if not self.checked:
            self.check()
        if self.offsets.is_meta and not self.mask.is_meta:  # the mask was fetched
            self.count_rows_()
        by_kernel = tokens.is_cpu and tokens.dtype in kernels.DTYPES and not self.force_dense
        by_kernel = by_kernel and kernels_ready()
        self._by_kernel = by_kernel and not (self.decoding or torch.compiler.is_compiling())
        if by_kernel:
            packed = self.mask, self.weight, self.offsets, self.scale, self.bias
            return by_kernels(tokens, packed, self.decoding)

        def rows(part: slice) -> Tensor:
            packed = Packed(self.mask, self.weight, self.scale)
            return self.fmt.decode(packed, self.in_features, self.offsets, tokens.dtype, part)

        return by_dense_rows(tokens, rows, self.out_features, self.bias)

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, nnz={self.nnz}, bits={self.fmt.bits}, bias={self.bias is not None}"

    @property
    def _offloaded(self) -> bool:
        hook = getattr(self, "_hf_hook", None)  # accelerate's, which fills and empties the tensors
        return self.weight.is_meta or any(
            getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,))
        )

    def _set_packed(self, packed: Packed) -> None:
        self._by_kernel = False
        self.mask, self.scale = packed.mask, packed.scale
        self.weight = nn.Parameter(packed.weight, requires_grad=False)

    def _apply(self, fn, recurse=True):
        """Every move and cast works on the packed tensors; torch's kernels are then tried again."""
        if self.semi_structured is not None:
            self._set_packed(self.packed)
            self.semi_structured = None
            self.count_rows_()
        self.reason, scale, self._by_kernel = None, self.scale, False
        super()._apply(fn, recurse)
        if scale is not None and self.scale.dtype != scale.dtype:  # a cast is not meant for it
            self.scale = scale.to(self.scale.device)
        self._dense_dtype = fn(torch.empty(0, dtype=self._dense_dtype)).dtype
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "mask" in state_dict and not self.mask.is_meta:
            self.checked = self._by_kernel = False
            self.check()
            self.count_rows_()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.semi_structured is not None:
            packed = self.packed
            destination[prefix + "weight"], destination[prefix + "mask"] = (
                packed.weight,
                packed.mask,
            )


@contextmanager
def set_all(model: nn.Module, flag: str) -> Iterator[None]:
    """Inside, `force_dense` or `decoding` is set in every packed module of a model."""
    modules = [module for module in model.modules() if hasattr(module, flag)]
    try:
        for module in modules:
            setattr(module, flag, True)
            module._by_kernel = False
        yield
    finally:
        for module in modules:
            setattr(module, flag, False)


def semi_structured_bytes(model: nn.Module) -> int:
    """Bytes that torch's 2:4 tensors hold: neither parameters nor buffers of the model."""
    linears = [module for module in model.modules() if isinstance(module, SparseLinear)]
    tensors = [linear.semi_structured for linear in linears if linear.semi_structured is not None]
    parts = [part for tensor in tensors for part in (tensor.packed, tensor.meta)]
    return sum(part.nbytes for part in parts if part is not None)

"""`SparseLinear`: a linear whose sparse weight stays packed in memory. For inference only.

On a CPU every product goes through the kernels of lib/packed/kernels.py, if there is a compiler to
build them. On CUDA a 2:4 weight, of a shape and dtype that torch's kernels take, is replaced by
torch's sparse tensor at the first forward and packed again whenever the linear is moved or saved.
Anything else on CUDA multiplies a few tokens by the kernel of lib/packed/bitmask_kernel.py, where
lib/packed/admission.py finds it faster, or unpacks the one weight it needs at every forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lib.packed import cuda, kernels
from lib.packed.admission import small_batch_kernel
from lib.packed.layout import (
    Packed,
    check_packed,
    is_two_of_four,
    pack,
    packed_shapes,
    row_offsets,
    unpack,
)

TILE_WEIGHTS = 2**20  # unpacked at a time by each thread: what lies in a cache is multiplied fast


@torch.compiler.assume_constant_result
def kernels_ready() -> bool:
    """Whether the CPU's kernels can be used; builds them on the first call."""
    return kernels.ready()


def packed_linear(x: Tensor, packed: Packed, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """x (tokens, in) -> (tokens, out) by the fastest way that there is for them here."""
    if x.device.type == "cpu" and x.dtype in kernels.DTYPES and len(x) and kernels_ready():
        return kernels.linear(x, packed.mask, packed.weight, offsets, packed.scale, bias)
    multiply = small_batch_kernel(x, packed, offsets)
    if multiply is not None:
        return multiply(x, packed, offsets, bias)
    return unpacked_linear(x, packed, offsets, bias)


def unpacked_linear(x: Tensor, packed: Packed, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """x (tokens, in) -> (tokens, out) by the dense weight; on a CPU some rows of it at a time."""
    out_features, width = len(packed.mask), x.shape[-1]
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(x, unpack(packed, width, offsets, x.dtype), bias)
    rows = max(1, TILE_WEIGHTS * torch.get_num_threads() // width)
    y = x.new_empty(len(x), out_features)
    for start in range(0, out_features, rows):
        part = slice(start, min(out_features, start + rows))
        tile = unpack(packed, width, offsets, x.dtype, part)
        y[:, part] = F.linear(x, tile, None if bias is None else bias[part])
    return y


class SparseLinear(nn.Module):
    """y = x W^T + b with W (out, in) packed.

    `mask`, `weight` and, at 8 bits, `scale` are what lib/packed/layout.py describes, and what is
    saved; `offsets` is counted from the mask. The name `weight` makes a loader that doesn't know
    the packed form stop at the shape, instead of filling in random numbers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kept: int,
        bits: int = 16,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ) -> None:
        """`bits`: 16 for values in `dtype`, whichever it is, or 8. `transposed`: the dense
        checkpoint keeps this weight (in, out), as GPT-2's Conv1D. Tensors are not filled."""
        super().__init__()
        self.in_features, self.out_features, self.kept = in_features, out_features, kept
        self.bits, self.transposed = bits, transposed
        self._dense_dtype = dtype or torch.get_default_dtype()
        shapes = packed_shapes(out_features, in_features, kept, bits)
        mask = torch.empty(shapes["mask"], dtype=torch.uint8, device=device)
        stored = torch.int8 if bits == 8 else dtype
        weight = torch.empty(shapes["weight"], dtype=stored, device=device)
        scale = torch.empty(out_features, device=device, dtype=torch.float32) if bits == 8 else None
        offsets = torch.empty(out_features + 1, dtype=torch.int64, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("mask", mask)
        self.register_buffer("scale", scale)
        self.register_buffer("offsets", offsets, persistent=False)
        row = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if row is None else nn.Parameter(row, requires_grad=False)
        self.fast: Tensor | None = None
        self.reason: str | None = None  # why not the fast path; None: not tried on this device
        self.unpacks = False  # at every forward, whatever would be faster

    @classmethod
    def from_linear(cls, linear: nn.Module, bits: int = 16) -> SparseLinear:
        """From an `nn.Linear` or `Conv1D`; shares the bias."""
        weight = linear.weight.detach()
        packed = pack(weight.T if isinstance(linear, Conv1D) else weight, bits)
        with torch.device("meta"):
            sparse = cls.skeleton(linear, packed.weight.numel(), bits)
        sparse._hold(packed)
        sparse.count_rows_()
        if linear.bias is not None:
            sparse.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return sparse

    @classmethod
    def skeleton(cls, linear: nn.Module, kept: int, bits: int) -> SparseLinear:
        """Of the size, dtype and device of an `nn.Linear` or `Conv1D`; tensors not filled."""
        rows, columns = linear.weight.shape
        transposed = isinstance(linear, Conv1D)
        size = (rows, columns) if transposed else (columns, rows)  # in, out
        bias, weight = linear.bias is not None, linear.weight
        return cls(*size, kept, bits, bias, weight.dtype, weight.device, transposed)

    def to_linear(self) -> nn.Module:
        """The dense linear of the class that this one came from."""
        size = (self.out_features, self.in_features)
        with torch.device("meta"):
            linear = Conv1D(*size) if self.transposed else nn.Linear(*size[::-1], self._has_bias)
        dense = self.dense()
        dense = dense.T.contiguous() if self.transposed else dense
        linear.weight = nn.Parameter(dense)
        if self._has_bias:
            linear.bias = nn.Parameter(self.bias.detach())
        return linear

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in), in `dtype` or the linear's own."""
        dtype = dtype or self.dtype
        if self.fast is not None:
            return self.fast.to_dense().to(dtype)
        return unpack(self.packed, self.in_features, dtype=dtype).to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight where it is dense."""
        return self.weight.dtype if self.bits == 16 else self._dense_dtype

    @property
    def packed(self) -> Packed:
        """The packed tensors; packed again where torch's tensor stands in their place."""
        if self.fast is not None:
            return pack(self.fast.to_dense())
        return Packed(self.mask, self.weight, self.scale)

    def check(self) -> None:
        """UserError where the tensors are no packed form of this linear's weight."""
        if self.fast is None and not (self.mask.is_meta or self.weight.is_meta):
            check_packed(self.packed, self.out_features, self.in_features, self.bits)

    def count_rows_(self) -> None:
        """Set `offsets` by the mask."""
        if self.fast is None:
            self.offsets = row_offsets(self.mask)

    def use_fast_path_(self) -> bool:
        """Hand the weight to torch's kernels where they take it; whether they did. Tried once."""
        if self.fast is None and self.reason is None:
            here = self.weight.device
            offloaded = "the weights are offloaded" if self._offloaded else None
            self.reason = offloaded or self.why_not_fast(here)
            if self.reason is None:
                self.fast, self.reason = cuda.build(self.dense())
            if self.fast is not None:
                self._hold(Packed(self.mask.new_empty(0), self.weight.new_empty(0)))
                self.offsets = self.offsets.new_empty(0)
        return self.fast is not None

    def why_not_fast(self, device: torch.device) -> str | None:
        """Why torch's kernels would not take the weight on `device`; None where they may."""
        if self.fast is None and device.type == "cuda":
            if self.bits != 16:
                return f"torch's kernels read no {self.bits}-bit values"
            if not self.mask.is_meta and not is_two_of_four(self.mask):
                return "torch's kernels are for 2:4 alone"
        return cuda.why_not((self.out_features, self.in_features), self.dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "packed linears compute no gradients: run under torch.no_grad(), or train the "
                "dense checkpoint that `launch.sh unpack IN OUT` writes"
            )
        tokens = x.reshape(-1, self.in_features)  # what no kernel can do without
        fast = self.fast is not None or (
            not (torch.compiler.is_compiling() or self.unpacks) and self.use_fast_path_()
        )
        if not len(tokens):  # of an expert that nothing was sent to
            y = tokens.new_empty(0, self.out_features)
        elif fast:
            y = F.linear(tokens, self.fast, self.bias).contiguous()  # of older torch, a transpose
        else:
            if self.offsets.is_meta and not self.mask.is_meta:  # the mask was fetched
                self.count_rows_()
            multiply = unpacked_linear if self.unpacks else packed_linear
            packed = Packed(self.mask, self.weight, self.scale)
            y = multiply(tokens, packed, self.offsets, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, kept={self.kept}, bits={self.bits}, bias={self._has_bias}"

    @property
    def _has_bias(self) -> bool:
        return self.bias is not None

    @property
    def _offloaded(self) -> bool:
        hook = getattr(self, "_hf_hook", None)  # accelerate's, which fills and empties the tensors
        return self.weight.is_meta or any(
            getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,))
        )

    def _hold(self, packed: Packed) -> None:
        self.mask, self.scale = packed.mask, packed.scale
        self.weight = nn.Parameter(packed.weight, requires_grad=False)

    def _apply(self, fn, recurse=True):
        """Every move and cast works on the packed tensors; the fast path is tried again after."""
        if self.fast is not None:
            self._hold(self.packed)
            self.fast = None
            self.count_rows_()
        self.reason, scale = None, self.scale
        super()._apply(fn, recurse)
        if scale is not None and self.scale.dtype != scale.dtype:  # a cast is not meant for it
            self.scale = scale.to(self.scale.device)
        self._dense_dtype = fn(torch.empty(0, dtype=self._dense_dtype)).dtype
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "mask" in state_dict and not self.mask.is_meta:
            self.count_rows_()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.fast is not None:
            packed = self.packed
            destination[prefix + "weight"], destination[prefix + "mask"] = (
                packed.weight,
                packed.mask,
            )


def fast_bytes(model: nn.Module) -> int:
    """Bytes that torch's 2:4 tensors hold: neither parameters nor buffers of the model."""
    tensors = [module.fast for module in model.modules() if isinstance(module, SparseLinear)]
    parts = [
        part for tensor in tensors if tensor is not None for part in (tensor.packed, tensor.meta)
    ]
    return sum(part.nbytes for part in parts if part is not None)

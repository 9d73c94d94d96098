"""`SparseLinear`: a linear layer whose weight stays packed in memory. For inference only.

On a CPU every product uses the kernels of kernels.cpp, if there is a compiler to build them. On
CUDA a 2:4 weight is multiplied by torch's semi-structured kernels, if torch accepts it; its tensor
is made at the first forward on the device. In all other cases a forward unpacks the weight that it
needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from . import kernels
from .errors import PackedError
from .formats import PACKED, Values
from .kernels import DTYPES
from .layout import Packed, is_two_of_four, row_offsets

OWN_FORWARD = "has a forward of its own"
FORWARDS = nn.Linear.forward, Conv1D.forward
TILE_WEIGHTS = 2**20  # unpacked at a time per thread; fits in a cache, which makes products fast
DECODED_TOKENS = 4  # largest batch of a decoding model: the kernels' path for few tokens


class PackedModule(nn.Module):
    """A matrix of integers or kept values in place of a dense one.

    A cast changes the dtype of outputs; scales keep theirs.
    """

    transposed = False  # whether the dense checkpoint stores it as (in, out)
    mode = ""  # matmul path override for checks: "dense" or "decoding" (few tokens at a time)
    source = ""  # name and file, for messages
    checked = False  # whether the tensors were checked
    by_kernel = False  # whether the last product used a kernel

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of outputs, and of the dense matrix."""
        return self._dtype

    def check(self) -> None:
        """Raise PackedError, naming the module, if its tensors do not fit together.

        Tensors on the meta device, because they are on disk, are checked by the first call after
        loading. Valid tensors are not checked again.
        """
        held = self.weight, self.scale, self._buffers.get("mask")
        if self.checked or any(tensor is not None and tensor.is_meta for tensor in held):
            return
        if problem := self._problem():
            name = self.source or type(self).__name__
            raise PackedError(f"{name}: packed {problem}. Save or copy it again.")
        self.checked = True

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) -> (..., out)."""
        tokens = x.reshape(-1, self.in_features)  # other inputs have no kernel
        known = tokens.is_cpu and tokens.dtype in DTYPES and self.mode != "dense"
        if not len(tokens):  # an expert without tokens
            y = tokens.new_empty(0, self.out_features)
        elif not known or not kernels.ready():
            y = self._by_dense_rows(tokens)
        elif self.mode == "decoding":
            parts = tokens.split(DECODED_TOKENS)
            y = torch.cat([kernels.linear(part, *self._operands(), self.bias) for part in parts])
        else:
            y = kernels.linear(tokens, *self._operands(), self.bias)
            self.by_kernel = not torch.compiler.is_compiling()
        return y.view(*x.shape[:-1], self.out_features)

    def _by_dense_rows(self, tokens: Tensor) -> Tensor:
        step = self.out_features
        if tokens.is_cpu and not torch.compiler.is_compiling():
            step = max(1, TILE_WEIGHTS * torch.get_num_threads() // self.in_features)
        products = []
        for start in range(0, self.out_features, step):
            part = slice(start, min(self.out_features, start + step))
            bias = None if self.bias is None else self.bias[part]
            products.append(F.linear(tokens, self._dense_rows(part, tokens.dtype), bias))
        return products[0] if len(products) == 1 else torch.cat(products, 1)

    def to_dense(self) -> nn.Module:
        """Return the dense module, of the original class."""
        dense, kind = self.dense(), Conv1D if self.transposed else nn.Linear
        with torch.device("meta"):
            linear = kind(*(dense.shape if self.transposed else dense.T.shape))
        linear.weight = nn.Parameter(dense.T.contiguous() if self.transposed else dense)
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.detach())
        return linear

    def _apply(self, fn, recurse=True):
        scale = self._buffers.get("scale")
        super()._apply(fn, recurse)
        if scale is not None and self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self


class SparseLinear(PackedModule):
    """y = x W^T + b with W (out, in) packed.

    `mask`, `weight` and, beside integers, `scale` are saved as formats.py describes; `offsets` is
    counted from the mask. The name `weight` makes a loader that does not know the packed form stop
    at the shape, instead of filling in random numbers.
    """

    def __init__(self, linear: nn.Module, nnz: int, fmt: Values = PACKED[16]) -> None:
        """Take size, dtype and device from an `nn.Linear` or `Conv1D`; tensors are not filled.

        `nnz`: the number of kept weights, which `fmt` stores.
        """
        weight = linear.weight
        super().__init__(weight.dtype)
        self.transposed = isinstance(linear, Conv1D)
        self.out_features, self.in_features = weight.T.shape if self.transposed else weight.shape
        self.nnz, self.fmt = nnz, fmt
        tensors = fmt.tensors(self.out_features, self.in_features, nnz)
        tensors |= {"offsets": ((self.out_features + 1,), torch.int64)}
        for name in ("weight", "mask", "scale", "offsets"):
            tensor = None
            if name in tensors:
                shape, dtype = tensors[name]
                tensor = torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor, persistent=name != "offsets")
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(torch.empty_like(bias), False)
        self.semi_structured: Tensor | None = None  # torch's 2:4 tensor, see `semi_structure_`
        self.refused = ""  # why there is none; empty: not tried on this device

    @classmethod
    def from_linear(
        cls, linear: nn.Module, fmt: Values = PACKED[16], scales: Tensor | None = None
    ) -> SparseLinear:
        """Pack an `nn.Linear` or `Conv1D`; shares the bias. `encode` takes `scales`."""
        weight = linear.weight.detach()
        sparse = cls(linear, int(torch.count_nonzero(weight)), fmt)
        packed = fmt.encode(weight.T if sparse.transposed else weight, scales)
        sparse.mask, sparse.weight.data, sparse.scale = packed
        sparse.count_rows_()
        sparse.checked = True
        if linear.bias is not None:
            sparse.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return sparse

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (out, in), in `dtype` or the layer's own."""
        dtype = dtype or self.dtype
        if self.holds_semi_structured_alone:
            return self.semi_structured.to_dense().to(dtype)
        self.check()
        return self.fmt.decode(self.packed, self.in_features, dtype=dtype).to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype if self.fmt.stored else self.weight.dtype

    @property
    def packed(self) -> Packed:
        return Packed(self.mask, self.weight, self.scale)

    @property
    def holds_semi_structured_alone(self) -> bool:
        """Whether torch's 2:4 tensor replaces the packed ones, which are then empty."""
        return self.semi_structured is not None and not self.fmt.stored

    def count_rows_(self) -> None:
        """Count `offsets` from the mask."""
        if not self.holds_semi_structured_alone:
            self.offsets = row_offsets(self.mask)

    def semi_structure_(self) -> bool:
        """Convert the weight to torch's 2:4 tensor if torch accepts it; return whether it does.

        Tried once, until `pack_again_`. That tensor replaces 16-bit values. Integers stay,
        since the tensor can't tell a kept weight that was rounded to 0 from a pruned one.
        """
        if self.semi_structured is None and not self.refused:
            self.refused = self._why_not_semi_structured()
            try:  # libraries and drivers raise exceptions of all classes, and none must end a run
                tensor = None if self.refused else two_of_four(self.dense(), self.bias)
            except Exception as error:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                tensor, self.refused = None, f"torch: {first}"
            self.semi_structured = tensor
            if self.holds_semi_structured_alone:
                self._set_packed(Packed(self.mask.new_empty(0), self.weight.new_empty(0)))
                self.offsets = self.offsets.new_empty(0)
        return self.semi_structured is not None

    def pack_again_(self) -> None:
        """Hold only the packed tensors; the next forward tries torch again."""
        if self.holds_semi_structured_alone:
            self._set_packed(self.fmt.encode(self.semi_structured.to_dense()))
            self.offsets = row_offsets(self.mask)
        self.semi_structured, self.refused = None, ""

    def _why_not_semi_structured(self) -> str:
        """Return why torch is not tried, or ""."""
        hook = getattr(self, "_hf_hook", None)  # accelerate's, which fills and empties the tensors
        if any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,))):
            return "offloaded"
        return "" if is_two_of_four(self.mask) else "not 2:4"

    def _set_packed(self, packed: Packed) -> None:
        self.mask, self.scale = packed.mask, packed.scale
        self.weight = nn.Parameter(packed.weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x (..., in) -> (..., out)."""
        if self.by_kernel and self.checked and not self.mode and not x.requires_grad:
            parameters, buffers = self._parameters, self._buffers  # avoids nn.Module's __getattr__
            mask, weight, offsets = buffers["mask"], parameters["weight"], buffers["offsets"]
            if weight.is_cpu and offsets.is_cpu and x.is_cpu and x.numel() and x.dtype in DTYPES:
                scale, bias = buffers.get("scale"), parameters.get("bias")
                return kernels.linear(x, mask, weight, offsets, scale, bias)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "packed linear layers compute no gradients. Run under torch.no_grad(), or train "
                "the dense model that `model.dequantize()` returns."
            )
        if self.weight.is_meta and not x.is_meta:  # its operator would return anything
            name = self.source or "a packed linear layer"
            raise RuntimeError(f"{name}: its weight is not in memory")
        if not self.checked:
            self.check()
        if self.offsets.is_meta and not self.mask.is_meta:  # the mask was fetched
            self.count_rows_()
        if x.is_cuda and self.mode != "dense" and not torch.compiler.is_compiling():
            self.semi_structure_()
        tensor = None if self.mode == "dense" else self.semi_structured
        if tensor is not None and tensor.dtype == x.dtype and x.numel():
            y = F.linear(x.reshape(-1, self.in_features), tensor, self.bias)
            return y.contiguous().view(*x.shape[:-1], self.out_features)
        return self.multiply(x)

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, nnz={self.nnz}, bits={self.fmt.bits}, bias={self.bias is not None}"

    def _problem(self) -> str:
        return self.fmt.problem(self.packed, self.in_features, self.nnz)

    def _operands(self) -> tuple[Tensor | None, ...]:
        return self.mask, self.weight, self.offsets, self.scale

    def _dense_rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        if self.holds_semi_structured_alone:
            return self.dense()[part]
        return self.fmt.decode(self.packed, self.in_features, self.offsets, dtype, part)

    def _apply(self, fn, recurse=True):
        self.pack_again_()  # moves and casts apply to the packed tensors
        return super()._apply(fn, recurse)

    def __getstate__(self):  # for copies and pickles
        self.pack_again_()
        return super().__getstate__()

    def _save_to_state_dict(self, *args):
        self.pack_again_()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.pack_again_()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "mask" in state_dict and not self.mask.is_meta:
            self.checked = False
            self.count_rows_()
            self.check()


def two_of_four(dense: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return torch's tensor of a 2:4 matrix (out, in); its products take a `bias` (out,).

    It uses cuSPARSELt, or CUTLASS if torch was built without cuSPARSELt. Raises torch's errors for
    the device, dtype or shape, and ArithmeticError if the tensor holds another matrix.
    """
    make = torch.sparse.to_sparse_semi_structured
    if not torch.backends.cusparselt.is_available() and dense.dtype.itemsize == 2:
        make = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense
    with warnings.catch_warnings():  # torch warns once that the class is a prototype
        warnings.simplefilter("ignore", UserWarning)
        tensor = make(dense)
    F.linear(dense[:1], tensor, bias)  # CUTLASS reports an unsupported device only here
    if not torch.equal(tensor.to_dense(), dense):
        raise ArithmeticError("its 2:4 tensor holds another matrix")
    return tensor


def semi_structured_bytes(model: nn.Module) -> int:
    """Return the bytes of torch's 2:4 tensors, which are neither parameters nor buffers."""
    tensors = [getattr(module, "semi_structured", None) for module in model.modules()]
    parts = [part for one in tensors if one is not None for part in (one.packed, one.meta)]
    return sum(part.nbytes for part in parts if part is not None)


@contextmanager
def multiplying(model: nn.Module, mode: str) -> Iterator[None]:
    """Set `PackedModule.mode` in all packed modules of a model within this context."""
    modules = [module for module in model.modules() if isinstance(module, PackedModule)]
    try:
        for module in modules:
            module.mode = mode
        yield
    finally:
        for module in modules:
            module.mode = ""


def why_dense(linear: nn.Module) -> str:
    """Return why a linear layer stays dense; "" if it is to be packed, which makes it smaller."""
    weight = linear.weight
    if type(linear).forward not in FORWARDS:
        return f"{type(linear).__name__} {OWN_FORWARD}"
    if weight.is_meta:
        return "not in memory"
    if not weight.is_floating_point():
        return f"quantized to {weight.dtype}"
    matrix = weight.detach().T if isinstance(linear, Conv1D) else weight.detach()
    nnz, offsets = int(torch.count_nonzero(matrix)), 8 * (len(matrix) + 1)  # recomputed on loading
    smaller = PACKED[16].nbytes(*matrix.shape, nnz) + offsets < 2 * matrix.numel()
    return "" if smaller else "too few zeros to be smaller packed"

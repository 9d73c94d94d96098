"""`SparseLinear`: a linear whose sparse weight stays packed in memory. For inference only.

On a CPU every product goes through the kernels of kernels.cpp, if there is a compiler to build
them. On CUDA a 2:4 weight is multiplied by torch's semi-structured kernels, where torch takes it:
its tensor is made at the first forward on the device. Anything else unpacks the one weight it needs
at each forward.
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
TILE_WEIGHTS = 2**20  # unpacked at a time by each thread: what lies in a cache is multiplied fast
DECODED_TOKENS = 4  # at a time, at most, where a model decodes: the kernels' path for few tokens


class PackedModule(nn.Module):
    """A matrix of integers or kept values in place of a dense one.

    A cast is for what comes out; scales keep their dtype.
    """

    transposed = False  # whether the dense checkpoint keeps it (in, out)
    way = ""  # to multiply: "dense", by the dense weight; "decoding", some tokens at a time
    source = ""  # name and file, for messages
    checked = False  # whether the tensors were found to be what they have to be
    by_kernel = False  # whether the last product was one

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of what comes out, and of the matrix where it is dense."""
        return self._dtype

    def check(self) -> None:
        """PackedError, naming the module, where its tensors don't fit together.

        Tensors that are on the meta device, because they lie on disk, are checked by the first
        call that finds them; what was found good is not checked again.
        """
        held = self.weight, self.scale, self._buffers.get("mask")
        if self.checked or any(tensor is not None and tensor.is_meta for tensor in held):
            return
        if problem := self._problem():
            name = self.source or type(self).__name__
            raise PackedError(f"{name}: packed {problem}: it is damaged; save or copy it again")
        self.checked = True

    def multiply(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        tokens = x.reshape(-1, self.in_features)  # what no kernel can do without
        known = tokens.is_cpu and tokens.dtype in DTYPES and self.way != "dense"
        if not len(tokens):  # of an expert that nothing was sent to
            y = tokens.new_empty(0, self.out_features)
        elif not known or not kernels.ready():
            y = self._by_dense_rows(tokens)
        elif self.way == "decoding":
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
        """The dense module of the class that this one came from."""
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

    `mask`, `weight` and, beside integers, `scale` are what formats.py describes, and what is saved;
    `offsets` is counted from the mask. The name `weight` makes a loader that doesn't know the
    packed form stop at the shape, instead of filling in random numbers.
    """

    def __init__(self, linear: nn.Module, nnz: int, fmt: Values = PACKED[16]) -> None:
        """Of the size, dtype and device of an `nn.Linear` or `Conv1D`; tensors are not filled.

        `nnz`: kept weights, which `fmt` stores.
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
        """From an `nn.Linear` or `Conv1D`; shares the bias. `scales` (out, groups): of `encode`."""
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
        """The weight (out, in), in `dtype` or the linear's own."""
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
        """Whether torch's 2:4 tensor stands in place of the packed ones, which are empty."""
        return self.semi_structured is not None and not self.fmt.stored

    def count_rows_(self) -> None:
        """Set `offsets` by the mask."""
        if not self.holds_semi_structured_alone:
            self.offsets = row_offsets(self.mask)

    def semi_structure_(self) -> bool:
        """Hold the weight as torch's 2:4 tensor if torch takes it; whether it does.

        Tried once, until `pack_again_`. Values of 16 bits are then held by that tensor alone.
        Integers stay beside it: a kept weight that was rounded to 0 can't be told from the values.
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
        """Hold the packed tensors alone; the next forward asks torch again."""
        if self.holds_semi_structured_alone:
            self._set_packed(self.fmt.encode(self.semi_structured.to_dense()))
            self.offsets = row_offsets(self.mask)
        self.semi_structured, self.refused = None, ""

    def _why_not_semi_structured(self) -> str:
        """Why torch is not asked; empty where it is."""
        hook = getattr(self, "_hf_hook", None)  # accelerate's, which fills and empties the tensors
        if any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,))):
            return "offloaded"
        return "" if is_two_of_four(self.mask) else "not 2:4"

    def _set_packed(self, packed: Packed) -> None:
        self.mask, self.scale = packed.mask, packed.scale
        self.weight = nn.Parameter(packed.weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if self.by_kernel and self.checked and not self.way and not x.requires_grad:
            parameters, buffers = self._parameters, self._buffers  # without nn.Module's __getattr__
            mask, weight, offsets = buffers["mask"], parameters["weight"], buffers["offsets"]
            if weight.is_cpu and offsets.is_cpu and x.is_cpu and x.numel() and x.dtype in DTYPES:
                scale, bias = buffers.get("scale"), parameters.get("bias")
                return kernels.linear(x, mask, weight, offsets, scale, bias)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "packed linears compute no gradients: run under torch.no_grad(), or train the "
                "dense model that `model.dequantize()` gives"
            )
        if self.weight.is_meta and not x.is_meta:  # its operator would return anything
            raise RuntimeError(f"{self.source or 'a packed linear'}: its weight is not in memory")
        if not self.checked:
            self.check()
        if self.offsets.is_meta and not self.mask.is_meta:  # the mask was fetched
            self.count_rows_()
        if x.is_cuda and self.way != "dense" and not torch.compiler.is_compiling():
            self.semi_structure_()
        tensor = None if self.way == "dense" else self.semi_structured
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
        self.pack_again_()  # every move and cast is of the packed tensors
        return super()._apply(fn, recurse)

    def __getstate__(self):  # of copies and pickles
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
    """Torch's tensor of a 2:4 matrix (out, in), whose products with tokens take a `bias` (out,).

    It is of cuSPARSELt, or of CUTLASS where torch was built without cuSPARSELt. Raises what torch
    raises for the device, dtype or shape, and ArithmeticError where it holds another matrix.
    """
    make = torch.sparse.to_sparse_semi_structured
    if not torch.backends.cusparselt.is_available() and dense.dtype.itemsize == 2:
        make = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense
    with warnings.catch_warnings():  # torch calls the class a prototype, once
        warnings.simplefilter("ignore", UserWarning)
        tensor = make(dense)
    F.linear(dense[:1], tensor, bias)  # CUTLASS finds no fault with a device earlier
    if not torch.equal(tensor.to_dense(), dense):
        raise ArithmeticError("its 2:4 tensor holds another matrix")
    return tensor


def semi_structured_bytes(model: nn.Module) -> int:
    """Bytes of torch's 2:4 tensors, which are neither parameters nor buffers of a model."""
    tensors = [getattr(module, "semi_structured", None) for module in model.modules()]
    parts = [part for one in tensors if one is not None for part in (one.packed, one.meta)]
    return sum(part.nbytes for part in parts if part is not None)


@contextmanager
def multiplying(model: nn.Module, way: str) -> Iterator[None]:
    """Inside, all packed modules of a model multiply in one way; see `PackedModule.way`."""
    modules = [module for module in model.modules() if isinstance(module, PackedModule)]
    try:
        for module in modules:
            module.way = way
        yield
    finally:
        for module in modules:
            module.way = ""


def why_dense(linear: nn.Module) -> str:
    """Why a linear stays dense; empty where it is to be packed, which makes it smaller."""
    weight = linear.weight
    if type(linear).forward not in FORWARDS:
        return f"{type(linear).__name__} {OWN_FORWARD}"
    if weight.is_meta:
        return "not in memory"
    if not weight.is_floating_point():
        return f"quantized to {weight.dtype}"
    matrix = weight.detach().T if isinstance(linear, Conv1D) else weight.detach()
    nnz, offsets = int(torch.count_nonzero(matrix)), 8 * (len(matrix) + 1)  # counted on loading
    smaller = PACKED[16].nbytes(*matrix.shape, nnz) + offsets < 2 * matrix.numel()
    return "" if smaller else "too few zeros to be smaller packed"

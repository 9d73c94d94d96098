"""`SparseLinear`: a linear whose 2:4 weight stays packed in memory. For inference only.

On CUDA, with a shape and dtype that torch's 2:4 kernels take, the packed tensors are replaced by
torch's sparse tensor at the first forward and packed again whenever the linear is moved or saved.
Anywhere else every forward unpacks the one weight it needs and multiplies.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lib.packed import cuda, few_tokens
from lib.packed.layout import check_packed, pack, packed_shapes, unpack

TILE_WEIGHTS = 2**20  # unpacked at a time by each thread: what lies in a cache is multiplied fast


def packed_linear(
    x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, compiled: bool = False
) -> Tensor:
    """x (..., in) -> (..., out), a tile of rows of the weight unpacked at a time on CPU.

    `compiled`: few tokens go through the kernel of lib/packed/few_tokens.py instead.
    """
    if compiled and few_tokens.takes(x, values):
        return few_tokens.linear(x, values, positions, bias)
    out_features, width = values.shape[0], x.shape[-1]
    rows = max(1, TILE_WEIGHTS * torch.get_num_threads() // width)
    if x.device.type != "cpu" or rows >= out_features:
        return F.linear(x, unpack(values, positions), bias)
    y = x.new_empty(*x.shape[:-1], out_features)
    dense = values.new_empty(rows, width)  # one buffer: fresh memory costs more than the unpacking
    for start in range(0, out_features, rows):
        part = slice(start, min(out_features, start + rows))
        tile = unpack(values[part], positions[part], dense[: part.stop - start])
        y[..., part] = F.linear(x, tile, None if bias is None else bias[part])
    return y


@torch.library.custom_op("packed_2_4::linear", mutates_args=())
def _opaque_linear(
    x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, compiled: bool
) -> Tensor:
    """One node for torch.compile, which would unroll the tiles."""
    return packed_linear(x, values, positions, bias, compiled)


@_opaque_linear.register_fake
def _(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, compiled: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


class SparseLinear(nn.Module):
    """y = x W^T + b with W (out, in) packed.

    `weight` holds the kept values (out, in / 2) and `positions` (out, ceil(in / 8)) where they
    belong (see lib/packed/layout.py). The name `weight` makes a loader that doesn't know the
    packed form stop at the shape, instead of filling in random numbers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ) -> None:
        """`transposed`: the dense checkpoint keeps this weight (in, out), as GPT-2's Conv1D."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.transposed = transposed
        values, positions = packed_shapes(out_features, in_features)
        empty = torch.empty(values, dtype=dtype, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.register_buffer("positions", torch.empty(positions, dtype=torch.uint8, device=device))
        row = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if row is None else nn.Parameter(row, requires_grad=False)
        self.fast: Tensor | None = None
        self.reason: str | None = None  # why not the fast path; None: not tried on this device
        self.compiled_decoding = False

    @classmethod
    def from_linear(cls, linear: nn.Module) -> "SparseLinear":
        """From an `nn.Linear` or `Conv1D` with a 2:4 weight; shares the bias. UserError if not."""
        with torch.device("meta"):
            sparse = cls.skeleton(linear)
        weight = linear.weight.detach()
        values, sparse.positions = pack(weight.T if sparse.transposed else weight)
        sparse.weight = nn.Parameter(values, requires_grad=False)
        if linear.bias is not None:
            sparse.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return sparse

    @classmethod
    def skeleton(cls, linear: nn.Module) -> "SparseLinear":
        """Of the size, dtype and device of an `nn.Linear` or `Conv1D`; tensors not filled."""
        rows, columns = linear.weight.shape
        transposed = isinstance(linear, Conv1D)
        out_features, in_features = (columns, rows) if transposed else (rows, columns)
        bias, weight = linear.bias is not None, linear.weight
        return cls(in_features, out_features, bias, weight.dtype, weight.device, transposed)

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

    def dense(self) -> Tensor:
        """The weight (out, in)."""
        return unpack(self.weight, self.positions) if self.fast is None else self.fast.to_dense()

    def check(self) -> None:
        """UserError where the tensors are no packed form of this linear's weight."""
        if self.fast is None and not self.positions.is_meta:
            check_packed(self.weight, self.positions, self.out_features, self.in_features)

    def use_fast_path_(self) -> bool:
        """Hand the weight to torch's kernels where they take it; whether they did. Tried once."""
        if self.fast is None and self.reason is None:
            shape = (self.out_features, self.in_features)
            device, self.reason = self.weight.device, "the weights are offloaded"
            if not self._offloaded:
                self.reason = cuda.why_not(shape, self.weight.dtype, device)
            if self.reason is None:
                self.fast, self.reason = cuda.build(self.dense())
            if self.fast is not None:
                self._hold(self.weight.new_empty(0), self.positions.new_empty(0))
        return self.fast is not None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "packed 2:4 linears compute no gradients: run under torch.no_grad(), or train the "
                "dense checkpoint that `launch.sh unpack IN OUT` writes"
            )
        compiling = torch.compiler.is_compiling()
        if self.fast is not None or (not compiling and self.use_fast_path_()):
            # torch's tensor takes only what can be viewed as rows
            y = F.linear(x.reshape(-1, self.in_features), self.fast, self.bias)
            return y.view(*x.shape[:-1], self.out_features)
        linear = _opaque_linear if compiling else packed_linear
        return linear(x, self.weight, self.positions, self.bias, self.compiled_decoding)

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, bias={self._has_bias}"

    @property
    def _has_bias(self) -> bool:
        return self.bias is not None

    @property
    def _offloaded(self) -> bool:
        hook = getattr(self, "_hf_hook", None)  # accelerate's, which fills and empties the tensors
        return self.weight.is_meta or any(
            getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,))
        )

    def _hold(self, values: Tensor, positions: Tensor) -> None:
        self.weight = nn.Parameter(values, requires_grad=False)
        self.positions = positions

    def _apply(self, fn, recurse=True):
        """Every move and cast works on the packed tensors; the fast path is tried again after."""
        if self.fast is not None:
            self._hold(*pack(self.fast.to_dense()))
        self.fast = self.reason = None
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.fast is not None:
            values, positions = pack(self.fast.to_dense())
            destination[prefix + "weight"] = values
            destination[prefix + "positions"] = positions


def fast_bytes(model: nn.Module) -> int:
    """Bytes that torch's 2:4 tensors hold: neither parameters nor buffers of the model."""
    tensors = [module.fast for module in model.modules() if isinstance(module, SparseLinear)]
    parts = [
        part for tensor in tensors if tensor is not None for part in (tensor.packed, tensor.meta)
    ]
    return sum(part.nbytes for part in parts if part is not None)

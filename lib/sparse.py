"""Swaps the linears of a pruned model for packed ones, which save and load packed.

    report = swap_linears_(model, blocks)                # after pruning, of any pattern
    model.save_pretrained(folder)                        # writes the packed checkpoint

    import lib.packed                                    # registers the format with transformers
    model = AutoModelForCausalLM.from_pretrained(folder)

The packed form is described in lib/packed/layout.py, the module in lib/packed/linear.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lib.model.linears import find_linears
from lib.model.matrix import PrunableLinear
from lib.packed import checkpoint, kernels
from lib.packed.checkpoint import METHOD, mark_packed_
from lib.packed.errors import PackedError
from lib.packed.grid import GROUP, HIGHEST, LOWEST, spread_scales
from lib.packed.layout import is_smaller_packed, packed_bytes
from lib.packed.linear import SparseLinear, kernels_ready, set_all
from lib.util.errors import UserError

PACKED, UNPACKED = 4, 16  # bytes for each weight of a tile, on the way to the packed form and back

__all__ = [
    "PackedSize",
    "SparseLinear",
    "SwapReport",
    "check_embeddings",
    "check_same_outputs",
    "decoding",
    "is_packed",
    "pack_embeddings_",
    "packed_size",
    "packed_weights",
    "relative_difference",
    "swap_block_",
    "swap_linears_",
    "unpacking",
]


@dataclass
class SwapReport:
    """How each linear of the blocks runs; names are module paths in the model."""

    bits: int = 16  # of a kept value; 16: in the model's dtype
    semi_structured: dict[str, str] = field(default_factory=dict)  # by torch: {name: library}
    kernels: dict[str, str] = field(
        default_factory=dict
    )  # by this project's kernels: {name: where}
    unpacked: dict[str, str] = field(
        default_factory=dict
    )  # unpacked at each forward: {name: reason}
    dense: dict[str, str] = field(default_factory=dict)  # not packed: {name: reason}

    @property
    def packed(self) -> int:
        """The number of packed linears."""
        return len(self.semi_structured) + len(self.kernels) + len(self.unpacked)

    def __str__(self) -> str:
        """Return one line with the number of linears on each path, and the reasons."""
        parts = [
            _counted(self.semi_structured, "on torch's 2:4 kernels"),
            _counted(self.kernels, "by the kernels for packed weights"),
            _counted(self.unpacked, "unpacked at each forward"),
            _counted(self.dense, "left dense"),
        ]
        bits = "" if self.bits == 16 else f" at {self.bits} bits"
        return f"packed linears{bits}: " + ", ".join(part for part in parts if part)


def swap_linears_(
    model: PreTrainedModel,
    blocks: Iterable[nn.Module],
    device: torch.device | None = None,
    on_device: Callable[[int], AbstractContextManager] = lambda index: nullcontext(),
    bits: int = 16,
    group: int = GROUP,
    scales: Mapping[str, Tensor] | None = None,
) -> SwapReport:
    """Replace every sparse linear of `blocks` by a `SparseLinear`, in place, block by block.

    The model then saves itself packed: kept values in its dtype, or as integers of `bits` 8 or 4,
    at 4 with a scale for each `group` of inputs; `scales` has those of weights that are on a grid
    already, by the weights' names. Linears with too few zeros to become smaller stay dense and are
    reported. `device` is where the blocks will run, by default where they are. Inside
    `on_device(i)` the weights of block i are in memory, and changes to them are kept. Raises
    UserError if no linear becomes smaller, or if the weights are quantised.
    """
    if getattr(model, "quantization_method", METHOD) != METHOD:
        raise UserError(
            f"--replace_sparse_layers: the weights are quantised ({model.quantization_method}), "
            "only 32- and 16-bit ones are packed; run without --load_bit"
        )
    before = [module for module in model.modules() if isinstance(module, SparseLinear)]
    if before and before[0].bits <= bits:  # more bits can't restore what rounding has lost
        bits, group = before[0].bits, before[0].group
    names = {module: name for name, module in model.named_modules()}
    report = SwapReport(bits)
    for index, block in enumerate(blocks):
        with on_device(index):
            report.dense |= swap_block_(block, names[block], bits, group, scales)
            _note_paths(block, f"{names[block]}.", device, report)
    if not report.packed:
        reasons = _counted(report.dense, "stay dense") or "the blocks have no linear layers"
        raise UserError(
            f"--replace_sparse_layers: no linear is smaller packed ({reasons}); "
            "prune with --prune_method first"
        )
    mark_packed_(model)
    return report


def swap_block_(
    block: nn.Module,
    name: str,
    bits: int = 16,
    group: int = GROUP,
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Pack the sparse linears of the block `name`, whose weights are in memory.

    Returns {name: reason} of the linears that stay dense. Linears that are already packed at more
    than `bits` are repacked.
    """
    dense = {}
    for path, module in list(block.named_modules()):
        full_name = f"{name}.{path}"
        if isinstance(module, SparseLinear):
            if module.bits > bits:
                block.set_submodule(path, _packed(full_name, module.to_linear(), bits, group))
        elif isinstance(module, nn.Linear | Conv1D):
            why = _why_not_packed(module)
            if why:
                dense[full_name] = why
            else:
                given = (scales or {}).get(f"{full_name}.weight")
                block.set_submodule(path, _packed(full_name, module, bits, group, given))
    experts = (linear for linear in find_linears(block, name)[0] if linear.expert is not None)
    return dense | {linear.name: "experts in one tensor" for linear in experts}


def packed_weights(blocks: Iterable[nn.Module], blocks_name: str) -> dict[str, bool]:
    """{weight's name: whether it is (in, out)} of the linears that `swap_linears_` packs."""
    return {
        f"{blocks_name}.{index}.{path}.weight": isinstance(module, Conv1D)
        for index, block in enumerate(blocks)
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not _why_not_packed(module)
    }


def is_packed(linear: PrunableLinear) -> bool:
    """Return whether `swap_linears_` packs a linear, whose weight is in memory."""
    return linear.expert is None and not _why_not_packed(linear.module)


def check_embeddings(model: PreTrainedModel) -> None:
    """Raise UserError if a model's embedding or output head are of classes that can't be packed."""
    try:
        checkpoint.check_embeddings(model)
    except PackedError as error:
        raise UserError(f"--pack_embeddings 8: {error}; leave out the flag") from None


def pack_embeddings_(model: PreTrainedModel) -> list[str]:
    """Round embedding and output head of a packed model to int8, in place; return their names.

    The model then saves them packed. `check_embeddings` must have let it pass.
    """
    names = checkpoint.pack_embeddings_(model)
    mark_packed_(model)
    return names


def _note_paths(
    part: nn.Module, prefix: str, device: torch.device | None, report: SwapReport
) -> None:
    """Record in `report` how the packed linears of a part run; `prefix` begins their names."""
    for path, module in part.named_modules():
        if not isinstance(module, SparseLinear):
            continue
        name = prefix + path
        report.bits = module.bits
        current = module.weight.device
        target = device or current
        if target.type == "cpu":
            if module.dtype not in kernels.DTYPES:
                report.unpacked[name] = f"{module.dtype}: the kernels are for 32 and 16 bits"
            elif kernels_ready():
                report.kernels[name] = "on cpu"
            else:
                report.unpacked[name] = "the kernels could not be built"
            continue
        why = module.why_not_semi_structured(target)
        if why is None and target == current:
            why = None if module.use_semi_structured_() else module.reason
        if why is None:
            report.semi_structured[name] = module.reason or ""
        else:
            report.unpacked[name] = why


@dataclass(frozen=True)
class PackedSize:
    """The bytes of a model's packed linears as saved, and of the same linears saved dense."""

    linears: int
    bits: int
    packed: int  # bytes
    dense: int


def packed_size(model: nn.Module, dtype: torch.dtype) -> PackedSize:
    """Return the sizes of the packed linears of a model that is saved in `dtype`."""
    linears = [module for module in model.modules() if isinstance(module, SparseLinear)]
    bits = min((module.bits for module in linears), default=16)
    packed = [
        packed_bytes(
            m.out_features,
            m.in_features,
            nnz=m.nnz,
            bits=m.bits,
            itemsize=dtype.itemsize,
            group=m.group,
        )
        for m in linears
    ]
    dense = [m.out_features * m.in_features * dtype.itemsize for m in linears]
    return PackedSize(len(linears), bits, sum(packed), sum(dense))


def unpacking(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, every packed linear multiplies by its dense weight, in plain torch.

    This is the reference for the kernels, and at 8 and 4 bits the rounded model.
    """
    return set_all(model, "force_dense")


def decoding(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, every packed linear multiplies a few tokens at a time, as it does in decoding.

    The kernels for few tokens are other ones than those for whole windows.
    """
    return set_all(model, "decoding")


def relative_difference(before: Tensor, after: Tensor) -> float:
    """Return |after - before| / |before| for the same logits or hidden states of two models."""
    assert before.shape == after.shape
    reference, difference = before.double(), (after.double() - before.double())
    return float(difference.norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))


def check_same_outputs(before: Tensor, after: Tensor) -> float:
    """Return the relative difference of the outputs of a model before and after packing.

    Raises UserError if it is beyond rounding: over eight roundings of the dtype, or over 1e-4.
    """
    ratio = relative_difference(before, after)
    limit = max(8 * torch.finfo(before.dtype).eps, 1e-4)
    if not ratio <= limit:
        raise UserError(
            f"--replace_sparse_layers: packed and dense outputs differ by {ratio:.2g} "
            f"(rounding explains {limit:.2g}); nothing was saved, run without the flag"
        )
    return ratio


def _packed(
    name: str, linear: nn.Module, bits: int, group: int, scales: Tensor | None = None
) -> SparseLinear:
    """Pack a linear. Raises UserError if a weight is off by more than half a step of its grid."""
    try:
        sparse = SparseLinear.from_linear(linear, bits, group, scales)
    except PackedError as error:
        raise UserError(f"--pack_bits {bits}: {name}: {error}") from None
    if bits < 16 and not _is_on_grid(sparse, linear):
        raise UserError(f"--pack_bits {bits}: {name} is not what was packed; run without the flag")
    return sparse


def _is_on_grid(sparse: SparseLinear, linear: nn.Module) -> bool:
    """Return whether each weight is off by half a step at most, or clipped to the grid's end."""
    weight = linear.weight.detach()
    weight = (weight.T if isinstance(linear, Conv1D) else weight).float()
    dense = sparse.dense(torch.float32)
    if sparse.bits == 8:
        step = sparse.scale[:, None]
        return bool(((dense - weight).abs_() <= 0.501 * step).all())
    step = spread_scales(sparse.scale.float(), sparse.group, sparse.in_features)
    clipped = weight.clamp(LOWEST * step, HIGHEST * step)
    return bool(((dense - clipped).abs_() <= 0.501 * step).all())


def _why_not_packed(linear: nn.Module) -> str:
    """Return why a linear is not packed, or an empty string if it should be."""
    weight = linear.weight
    if type(linear).forward not in (nn.Linear.forward, Conv1D.forward):
        return f"{type(linear).__name__} has a forward of its own"
    if weight.is_meta:
        return "not in memory"
    if not weight.is_floating_point():
        return f"quantised to {weight.dtype}"
    matrix = weight.detach().T if isinstance(linear, Conv1D) else weight.detach()
    return "" if is_smaller_packed(matrix) else "too few zeros to be smaller packed"


def _counted(reasons: dict[str, str], what: str) -> str:
    if not reasons:
        return ""
    counts = Counter(reasons.values()).most_common()
    why = "; ".join(reason if len(counts) == 1 else f"{n}: {reason}" for reason, n in counts)
    return f"{len(reasons)} {what} ({why})"

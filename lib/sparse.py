"""2:4 that stays packed: swap the 2:4 linears of a model, and load what was saved packed.

    import lib.sparse                                    # registers the format with transformers
    model = AutoModelForCausalLM.from_pretrained(folder)

    report = swap_linears_(model, blocks)                # after 2:4 pruning
    model.save_pretrained(folder)                        # writes the packed checkpoint

The packed form is described in lib/packed/layout.py, the module in lib/packed/linear.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lib.packed import cuda, few_tokens
from lib.packed.checkpoint import METHOD, card_lines, mark_packed_
from lib.packed.layout import is_packable
from lib.packed.linear import SparseLinear
from lib.util.errors import UserError

__all__ = [
    "SparseLinear",
    "SwapReport",
    "card_lines",
    "check_same_outputs",
    "compile_decoding_",
    "packed_report",
    "swap_linears_",
]


@dataclass
class SwapReport:
    """Which linears of the blocks run how; names are module paths in the model."""

    fast: dict[str, str] = field(default_factory=dict)  # by torch's 2:4 kernels: name -> library
    unpacked: dict[str, str] = field(default_factory=dict)  # name -> why not the fast path
    dense: dict[str, str] = field(default_factory=dict)  # not packed: name -> why

    def __str__(self) -> str:
        """One line: how many on which path, and why."""
        parts = [
            _counted(self.fast, "on torch's 2:4 kernels"),
            _counted(self.unpacked, "unpacked at each forward"),
            _counted(self.dense, "left dense"),
        ]
        return "2:4 linears: " + ", ".join(part for part in parts if part)


def swap_linears_(
    model: PreTrainedModel,
    blocks: Iterable[nn.Module],
    device: torch.device | None = None,
    at_hand: Callable[[int], AbstractContextManager] = lambda index: nullcontext(),
) -> SwapReport:
    """Replace every 2:4 linear of `blocks` by a `SparseLinear`, in place, block by block.

    The model then saves itself packed. Linears that are not 2:4 stay and are reported. `device`
    is where the blocks will run, if not where they are. Inside `at_hand(i)` the weights of block i
    are there, and what becomes of them is kept. UserError where nothing is 2:4 or the weights are
    quantised.
    """
    if getattr(model, "quantization_method", METHOD) != METHOD:
        raise UserError(
            f"--replace_sparse_layers: the weights are quantised ({model.quantization_method}), "
            "only 32- and 16-bit ones are packed; run without --load_bit"
        )
    names = {module: name for name, module in model.named_modules()}
    report = SwapReport()
    for index, block in enumerate(blocks):
        with at_hand(index):
            _swap_block_(block, names[block], device, report)
    if not report.fast and not report.unpacked:
        reasons = _counted(report.dense, "stay dense") or "the blocks have no linear layers"
        raise UserError(
            f"--replace_sparse_layers: no linear is 2:4 ({reasons}); "
            "prune with --sparsity_type 2:4 first"
        )
    mark_packed_(model)
    return report


def _swap_block_(
    block: nn.Module, name: str, device: torch.device | None, report: SwapReport
) -> None:
    """Of one block that is called `name`; into `report`."""
    for path, module in list(block.named_modules()):
        if isinstance(module, SparseLinear) or not _is_linear(module):
            continue
        why = _why_not_packed(module)
        if why:
            report.dense[f"{name}.{path}"] = why
        else:
            block.set_submodule(path, SparseLinear.from_linear(module))
    _note_paths(block, f"{name}.", device, report)


def packed_report(model: nn.Module, device: torch.device | None = None) -> SwapReport:
    """The path of every packed linear, on `device` or where its weight is."""
    report = SwapReport()
    _note_paths(model, "", device, report)
    return report


def _note_paths(
    part: nn.Module, prefix: str, device: torch.device | None, report: SwapReport
) -> None:
    for path, module in part.named_modules():
        if not isinstance(module, SparseLinear):
            continue
        name = prefix + path
        shape, dtype = (module.out_features, module.in_features), module.weight.dtype
        where = device or module.weight.device
        why = cuda.why_not(shape, dtype, where)
        if why is None and where == module.weight.device:
            why = None if module.use_fast_path_() else module.reason
        if why is None:
            report.fast[name] = module.reason or ""
        else:
            report.unpacked[name] = why


def check_same_outputs(before: Tensor, after: Tensor) -> float:
    """Relative difference |after - before| / |before| of the same outputs (logits or hidden
    states) of the dense and of the swapped model. UserError where it is beyond rounding: over
    eight roundings of the dtype, or over 1e-4."""
    assert before.shape == after.shape
    reference, difference = before.double(), (after.double() - before.double())
    ratio = float(difference.norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))
    limit = max(8 * torch.finfo(before.dtype).eps, 1e-4)
    if not ratio <= limit:
        raise UserError(
            f"--replace_sparse_layers: packed and dense outputs differ by {ratio:.2g} "
            f"(rounding explains {limit:.2g}); nothing was saved, run without the flag"
        )
    return ratio


def compile_decoding_(model: nn.Module) -> int:
    """Let torch.compile generate the kernel for few tokens; how many linears may use it.

    Pays for decoding at batch 1 on CPU. The first token waits for the compiler. UserError where
    there is no C++ compiler.
    """
    linears = [module for module in model.modules() if isinstance(module, SparseLinear)]
    if linears and not few_tokens.can_compile():
        raise UserError("torch.compile found no C++ compiler; install g++")
    for linear in linears:
        linear.compiled_decoding = True
    return len(linears)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _why_not_packed(linear: nn.Module) -> str:
    """Empty where the linear can be packed."""
    weight = linear.weight
    if type(linear).forward not in (nn.Linear.forward, Conv1D.forward):
        return f"{type(linear).__name__} has a forward of its own"
    if weight.is_meta:
        return "not in memory"
    if not weight.is_floating_point():
        return f"quantised to {weight.dtype}"
    matrix = weight.detach().T if isinstance(linear, Conv1D) else weight.detach()
    return "" if is_packable(matrix) else "not 2:4"


def _counted(reasons: dict[str, str], what: str) -> str:
    if not reasons:
        return ""
    counts = Counter(reasons.values()).most_common()
    why = "; ".join(reason if len(counts) == 1 else f"{n}: {reason}" for reason, n in counts)
    return f"{len(reasons)} {what} ({why})"

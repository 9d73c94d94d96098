"""The matrices of a decoder block that can be pruned, and hooks on their inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from ..packed.linear import SparseLinear
from .bitsandbytes import quantized_linear
from .matrix import PrunableLinear

PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
NARROWEST = 8  # smallest number of inputs or outputs of a prunable matrix


def find_linears(
    block: nn.Module, prefix: str
) -> tuple[list[PrunableLinear], dict[str, tuple[int, str]]]:
    """Return the prunable matrices of a block, and {name: (weights, reason)} of the others."""
    linears, dense, experts_of = [], {}, _expert_counts(block)
    for path, module in block.named_modules():
        name = f"{prefix}.{path}" if path else prefix
        if isinstance(module, nn.Linear | Conv1D):
            linear = quantized_linear(name, module) or PrunableLinear(
                name, module, transposed=isinstance(module, Conv1D)
            )
            experts = experts_of.get(path.rpartition(".")[0])
            if linear.shape[0] in (1, experts):
                dense[name] = prod(linear.shape), "it routes tokens"
            elif min(linear.shape) < NARROWEST:
                dense[name] = prod(linear.shape), "it is too small"
            else:
                linears.append(linear)
            continue
        if isinstance(module, SparseLinear):
            linears.append(PackedView(name, module))
            continue
        transposed = getattr(module, "is_transposed", False)
        for parameter, weight in module.named_parameters(recurse=False):
            full_name = f"{name}.{parameter}"
            if _holds_experts(module, weight):
                linears += [
                    PrunableLinear(
                        name=f"{full_name}.{i}",
                        module=module,
                        parameter=parameter,
                        expert=i,
                        transposed=transposed,
                    )
                    for i in range(len(weight))
                ]
            elif weight.dim() > 1 and not parameter.endswith("bias"):
                dense[full_name] = weight.numel(), f"{type(module).__name__} is no linear layer"
    return linears, dense


class PackedView(PrunableLinear):
    """A packed linear layer, which can be measured but not pruned again."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    def matrix(self) -> Tensor:
        return self.module.dense(torch.float32)


def linears_of(blocks: Iterable[nn.Module], prefix: str = "") -> list[PrunableLinear]:
    """Return the prunable matrices of the blocks of a model's list named `prefix`."""
    found = (find_linears(block, f"{prefix}.{index}")[0] for index, block in enumerate(blocks))
    return list(chain.from_iterable(found))


def _holds_experts(module: nn.Module, weight: Tensor) -> bool:
    """Return whether a parameter is a stack of matrices, one per expert."""
    stacked = weight.dim() == 3 and len(weight) > 1 and min(weight.shape[1:]) >= NARROWEST
    return stacked and not isinstance(module, _ConvNd)


def _expert_counts(block: nn.Module) -> dict[str, int]:
    """Return {path: number of experts} for the parents of experts and all their children."""
    counts: dict[str, int] = {}
    for path, module in block.named_modules():
        stacks = [len(w) for w in module.parameters(recurse=False) if _holds_experts(module, w)]
        if stacks:
            parent = path.rpartition(".")[0]
            counts[parent] = stacks[0]
            for child, _ in block.get_submodule(parent).named_children():
                counts.setdefault(f"{parent}.{child}".strip("."), stacks[0])
    return counts


class _ExpertProducts(TorchFunctionMode):
    """Calls `see` for products with slices of fused expert parameters, before or after them."""

    def __init__(self, linears: list[PrunableLinear], see: Callable, after: bool) -> None:
        super().__init__()
        self.by_address = {linear.raw_weight.data_ptr(): linear for linear in linears}
        self.see, self.after = see, after

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        linear = x = None
        if func in PRODUCTS:
            x = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs.get("weight", kwargs.get("other"))
            linear = self.by_address.get(weight.data_ptr()) if weight.dim() == 2 else None
        if linear is not None and not self.after:
            self.see(linear, x)
        out = func(*args, **kwargs)
        if linear is not None and self.after:
            self.see(linear, x, out)
        return out


def first_argument(args: tuple, kwargs: dict) -> Tensor:
    """Return a linear module's input: its first argument, of any name (GPT-2 has `x`)."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def watch_inputs(
    linears: Sequence[PrunableLinear], see: Callable[..., None], after: bool = False
) -> Iterator[None]:
    """Call `see(linear, x)` with the input x (..., in) of each layer, before it is multiplied.

    `after`: call `see(linear, x, out)` with its output (..., out) too. `see` may raise an exception
    to end the forward pass early. Hooks are removed afterwards.
    """

    def hook(linear: PrunableLinear) -> Callable:
        return lambda _, args, kwargs, *out: see(linear, first_argument(args, kwargs), *out)

    register = nn.Module.register_forward_hook if after else nn.Module.register_forward_pre_hook
    with ExitStack() as stack:
        for linear in linears:
            if linear.expert is None:
                stack.enter_context(register(linear.module, hook(linear), with_kwargs=True))
        if experts := [linear for linear in linears if linear.expert is not None]:
            stack.enter_context(_ExpertProducts(experts, see, after))
        yield


watch_outputs = partial(watch_inputs, after=True)


@contextmanager
def experts_implementation(model: nn.Module, implementation: str) -> Iterator[None]:
    """Set the experts' implementation; `eager` runs them singly, with visible inputs."""
    before = model.get_experts_implementation()
    try:
        model.set_experts_implementation(implementation)
        yield
    finally:
        model.set_experts_implementation(before)

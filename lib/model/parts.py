"""The removable parts of a model's blocks: neurons of its MLPs, or routed experts.

The model is built twice without weights: from its config, and with fewer parts. Tensors whose
shapes differ have one or more entries per part along one dimension. Module attributes (integers)
that differ are counts. No architecture is named here, and the smaller model loads like any other.

A neuron is an input of an MLP's down projection, with the rows that compute it and their biases.
The rows are those of gate and up, or of one linear layer before the activation. An expert is a
slice of stacked weights, with the router's row, its bias, and its score correction. Removal
(lib/stages/remove.py) checks that the parts work independently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..methods.sparsity import EXPERTS, NEURONS
from ..util.errors import UserError
from ..util.quirks import EXPERT_FIELDS, NEURON_FIELDS
from .bitsandbytes import stored_bits
from .checkpoint import Checkpoint
from .linears import linears_of
from .skeleton import changed_shapes, skeleton_with
from .store import set_tensor

FIELDS = {NEURONS: NEURON_FIELDS, EXPERTS: EXPERT_FIELDS}
NO_FIELD = {
    NEURONS: "no field of its config sets only the width of one MLP in each block",
    EXPERTS: "no field of its config sets the number of stacked experts in its blocks",
}


@dataclass(frozen=True)
class StructureLayout:
    """The parts of a model: `count` in each block, which `field` of the text config sets.

    A fused layer has several rows per neuron; rows of one kind are contiguous. A token is routed to
    `chosen` experts of `open_groups` groups, out of `groups` consecutive ones of equal size.
    """

    kind: str
    count: int
    field: str
    tensors: tuple[dict[str, tuple[int, int]], ...] = ()  # per block {path: (dim, entries)}
    # per block, the down projection, or the module that runs the experts; "" for none
    modules: tuple[str, ...] = ()
    counters: tuple[tuple[str, str, int], ...] = ()  # module, attribute, count per part
    chosen: int = 1
    groups: int = 1
    open_groups: int = 1


def kind_of(config: Any) -> str:
    """Return the kind of removable parts: experts if blocks have several, or else neurons."""
    text = config.get_text_config(decoder=True)
    several = any((getattr(text, field, 0) or 0) > 1 for field in FIELDS[EXPERTS])
    return EXPERTS if several else NEURONS


def find_parts(
    kind: str, config: Any, checkpoint: Checkpoint, model: nn.Module, name: str
) -> StructureLayout:
    """Return the neurons or experts of the blocks `name` of `model`, which needs no weights.

    Raises UserError for quantized models, for MLPs that are experts or have several widths, and if
    no field of the config sets the number of parts.
    """
    blocks, why = model.get_submodule(name), NO_FIELD[kind]
    if stored_bits(config):
        why = f"it is quantized, and its {kind} cannot be removed"
    elif kind == NEURONS and any(one.expert is not None for one in linears_of(blocks)):
        why = "its MLPs are experts"
    else:
        for field in FIELDS[kind]:
            if layout := _layout(kind, field, config, checkpoint, model, name):
                return layout
    raise UserError(
        f"--sparsity_type {kind}", f"{checkpoint}: {why}", "Use --sparsity_type unstructured"
    )


def _layout(
    kind: str, field: str, config: Any, checkpoint: Checkpoint, model: nn.Module, name: str
) -> StructureLayout | None:
    """Return the layout that `field` sets; None if the field also changes other shapes."""
    blocks, text = model.get_submodule(name), config.get_text_config(decoder=True)
    groups, count = getattr(text, "n_group", None) or 1, getattr(text, field, 0)
    if count is None and kind == NEURONS:
        count = 4 * text.hidden_size  # the models' default
    step = 2 if kind == NEURONS else groups
    if not isinstance(count, int) or count <= step:
        return None
    other, fewer = skeleton_with(config, field, count - step, checkpoint), count - step
    if other is None:
        return None
    tensors: list[dict[str, tuple[int, int]]] = [{} for _ in blocks]
    for path, (shape, other_shape) in changed_shapes(model, other).items():
        dims = [dim for dim, size in enumerate(shape) if other_shape[dim : dim + 1] != (size,)]
        if not path.startswith(f"{name}.") or len(other_shape) != len(shape) or len(dims) != 1:
            return None
        [dim] = dims
        if shape[dim] % count or other_shape[dim] * count != shape[dim] * fewer:
            return None
        index, _, inner = path.removeprefix(f"{name}.").partition(".")
        tensors[int(index)][inner] = dim, shape[dim] // count
    find = _down_projection if kind == NEURONS else _experts_module
    modules = [find(block, each) for block, each in zip(blocks, tensors, strict=True)]
    if None in modules or not any(modules):
        return None
    others = dict(other.named_modules())
    counters = [
        (path, key, value // count)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int) and value % count == 0 and value != vars(others[path]).get(key)
    ]
    return StructureLayout(
        kind=kind,
        count=count,
        field=field,
        tensors=tuple(tensors),
        modules=tuple(modules),
        counters=tuple(counters),
        chosen=getattr(text, "num_experts_per_tok", None) or 1,
        groups=groups,
        open_groups=(getattr(text, "topk_group", None) or 1) if groups > 1 else 1,
    )


def _down_projection(block: nn.Module, tensors: dict[str, tuple[int, int]]) -> str | None:
    """Return the path of the layer that reads the neurons; None unless they are one MLP's only."""
    downs, others = [], []
    for path, (dim, entries) in tensors.items():
        owner, _, attribute = path.rpartition(".")
        linear = block.get_submodule(owner)
        if not isinstance(linear, nn.Linear | Conv1D):
            return None
        reads = attribute == "weight" and dim == (0 if isinstance(linear, Conv1D) else 1)
        (downs if reads else others).append((owner, entries))
    return downs[0][0] if others and [each for _, each in downs] == [1] else None


def _experts_module(block: nn.Module, tensors: dict[str, tuple[int, int]]) -> str | None:
    """Return the path of the stacked weights' module; "" if there is none, None if several."""
    stacks = {p.rpartition(".")[0] for p in tensors if get_tensor(block, p).dim() == 3}
    if len(stacks) > 1 or any(where != (0, 1) for where in tensors.values()):
        return None
    return next(iter(stacks), "")


def get_tensor(module: nn.Module, path: str) -> Tensor:
    """Return a parameter or buffer."""
    owner, _, attribute = path.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)


def keep_parts_(
    block: nn.Module, layout: StructureLayout, index: int, name: str, kept: Tensor
) -> None:
    """Remove from block `index`, named `name`, all parts except `kept` (n,), in this order.

    Tensors without the removed parts, as in a restored block, remain unchanged.
    """
    for path, (dim, entries) in layout.tensors[index].items():
        tensor = get_tensor(block, path)
        if tensor.shape[dim] == entries * layout.count:
            chosen = torch.cat([kept + entry * layout.count for entry in range(entries)])
            set_tensor(block, path, tensor.data.index_select(dim, chosen.to(tensor.device)))
    for path, attribute, entries in layout.counters:
        if path.startswith(f"{name}."):
            module = block.get_submodule(path.removeprefix(f"{name}."))
            setattr(module, attribute, entries * len(kept))

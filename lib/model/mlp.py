"""The neurons of the blocks' MLPs: their rows and columns, in every architecture that names them.

A neuron is an input of an MLP's down projection, with the row of each linear that makes this input
(gate and up, or one linear before the activation), and their biases. Linears are known by their
names, their width by a field of the config; a model that is built with a narrower field, without
weights, shows that the field means them and nothing else, so that the smaller model loads as any
other. That each neuron depends on its own rows alone shows when some are removed
(lib/pruning/neurons.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lib.model.access import Checkpoint
from lib.model.linears import find_linears
from lib.model.pretrained import skeleton_with
from lib.model.quantized import stored_bits
from lib.util.errors import UserError

# {name of a down projection: names of the linears beside it that may make its inputs}
NAMES = {
    "down_proj": ("gate_proj", "up_proj", "gate_up_proj"),
    "fc2": ("fc1",),
    "c_proj": ("c_fc",),
    "dense_4h_to_h": ("dense_h_to_4h",),
    "fc_out": ("fc_in",),
    "feed_forward.value": ("key",),
}
FIELDS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


@dataclass(frozen=True)
class BlockMlp:
    """A block's MLP: the path of `down`, which reads neurons, and {path: parts} of what makes them.

    A fused linear has `parts` outputs for each neuron; the outputs of one part are contiguous.
    """

    down: str
    producers: dict[str, int]


@dataclass(frozen=True)
class MlpLayout:
    """The MLPs of the blocks: `count` neurons in each, which `field` of the text config sets."""

    kind: ClassVar[str] = "neurons"
    count: int
    field: str
    blocks: tuple[BlockMlp, ...]


def find_mlps(config: Any, checkpoint: Checkpoint, model: nn.Module, name: str) -> MlpLayout:
    """Return the MLPs of the blocks `name` of `model`, which needs no weights.

    Raises UserError for quantized models, experts, MLPs of several widths, and models whose config
    has no field for the width.
    """
    blocks = model.get_submodule(name)
    by_block = [_mlps(block) for block in blocks]
    widths = {width for mlps in by_block for width, _ in mlps}
    why = "no field of its config sets the width of one MLP in each block and of it alone"
    if stored_bits(config):
        why = "it is quantized, and its matrices can't be cut"
    elif any(one.expert is not None for block in blocks for one in find_linears(block, "")[0]):
        why = "its MLPs are experts"
    elif len(widths) == 1 and all(len(mlps) == 1 for mlps in by_block):
        [width], text = widths, config.get_text_config(decoder=True)
        for field in FIELDS:
            if getattr(text, field, 0) in (width, None):
                layout = MlpLayout(width, field, tuple(mlp for [(_, mlp)] in by_block))
                if _narrows(layout, config, checkpoint, model, name):
                    return layout
    raise UserError(
        f"--sparsity_type neurons: {checkpoint}: {why}; use --sparsity_type unstructured"
    )


def _mlps(block: nn.Module) -> list[tuple[int, BlockMlp]]:
    """The width and the linears of what may be MLPs."""
    shapes = {linear.name.lstrip("."): linear.shape for linear in find_linears(block, "")[0]}
    mlps = []
    for down, (_, width) in shapes.items():
        known = next((names for key, names in NAMES.items() if f".{down}".endswith(f".{key}")), ())
        beside = [down.removesuffix(down.rpartition(".")[2]) + name for name in known]
        rows = {path: shapes[path][0] for path in beside if path in shapes}
        if rows and not any(count % width for count in rows.values()):
            producers = {path: count // width for path, count in rows.items()}
            mlps.append((width, BlockMlp(down, producers)))
    return mlps


def _narrows(
    layout: MlpLayout, config: Any, checkpoint: Checkpoint, model: nn.Module, name: str
) -> bool:
    """Return whether a narrower field narrows the MLPs of all blocks, and nothing else."""
    narrow = layout.count - 2
    built = skeleton_with(config, layout.field, narrow, checkpoint)
    expected = {path: list(parameter.shape) for path, parameter in model.named_parameters()}
    for index, mlp in enumerate(layout.blocks):
        for path, parts in [(mlp.down, 0), *mlp.producers.items()]:
            prefix = f"{name}.{index}.{path}"
            if f"{prefix}.weight" not in expected:  # another block has it too
                return False
            dim = output_dim(model.get_submodule(prefix))
            expected[f"{prefix}.weight"][dim if parts else 1 - dim] = narrow * max(1, parts)
            if parts and f"{prefix}.bias" in expected:
                expected[f"{prefix}.bias"] = [narrow * parts]
    return bool(built) and expected == {
        path: list(parameter.shape) for path, parameter in built.named_parameters()
    }


def output_dim(linear: nn.Module) -> int:
    """The dimension of a linear's weight that counts its outputs."""
    return 1 if isinstance(linear, Conv1D) else 0


def keep_neurons_(block: nn.Module, mlp: BlockMlp, kept: Tensor) -> None:
    """Remove from a block's MLP all neurons but `kept` (n,), indices in rising order."""

    def select_(linear: nn.Module, name: str, indices: Tensor, dim: int) -> None:
        old = getattr(linear, name)
        chosen = old.data.index_select(dim, indices.to(old.device)).contiguous()
        setattr(linear, name, nn.Parameter(chosen, requires_grad=old.requires_grad))

    down = block.get_submodule(mlp.down)
    dim = 1 - output_dim(down)
    width = down.weight.shape[dim]
    select_(down, "weight", kept, dim)
    for path, parts in mlp.producers.items():
        linear = block.get_submodule(path)
        rows = torch.cat([kept + part * width for part in range(parts)])
        select_(linear, "weight", rows, output_dim(linear))
        if linear.bias is not None:
            select_(linear, "bias", rows, 0)
    fit_sizes_(block, mlp)


def fit_sizes_(block: nn.Module, mlp: BlockMlp) -> None:
    """Set the size attributes of an MLP's linears to the shapes of their weights."""
    for path in (mlp.down, *mlp.producers):
        linear = block.get_submodule(path)
        if isinstance(linear, Conv1D):
            linear.nx, linear.nf = linear.weight.shape
        else:
            linear.out_features, linear.in_features = linear.weight.shape

"""The neurons of the blocks' MLPs: their rows and columns, in any architecture.

A neuron is an input of an MLP's down projection, with the row of each linear that makes this input
(gate and up, or one linear before the activation), and their biases. A field of the config sets
their width; a model that is built with a narrower field, without weights, shows which linears these
are, and that nothing else changes, so that the smaller model loads as any other. That each neuron
depends on its own rows alone shows when some are removed (lib/pruning/neurons.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lib.model.access import Checkpoint
from lib.model.linears import find_linears
from lib.model.pretrained import changed_shapes, skeleton_with
from lib.model.quantized import stored_bits
from lib.util.errors import UserError

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
    blocks, text = model.get_submodule(name), config.get_text_config(decoder=True)
    why = "no field of its config sets the width of one MLP in each block and of it alone"
    if stored_bits(config):
        why = "it is quantized, and its matrices can't be cut"
    elif any(one.expert is not None for block in blocks for one in find_linears(block, "")[0]):
        why = "its MLPs are experts"
    else:
        for field in FIELDS:
            count = getattr(text, field, 0)
            count = 4 * text.hidden_size if count is None else count  # as models then have it
            if isinstance(count, int) and count > 2:
                narrower = skeleton_with(config, field, count - 2, checkpoint)
                if narrower and (mlps := _mlps(count, model, narrower, name)):
                    return MlpLayout(count, field, tuple(mlps))
    raise UserError(
        f"--sparsity_type neurons: {checkpoint}: {why}; use --sparsity_type unstructured"
    )


def _mlps(count: int, model: nn.Module, narrower: nn.Module, name: str) -> list[BlockMlp] | None:
    """Return the MLP of each block, if these and nothing else have two neurons less there."""
    downs: list[list[str]] = [[] for _ in model.get_submodule(name)]
    producers: list[dict[str, int]] = [{} for _ in downs]
    for path, (shape, other) in changed_shapes(model, narrower).items():
        owner, _, kind = path.rpartition(".")
        linear = model.get_submodule(owner)
        if not (owner.startswith(f"{name}.") and isinstance(linear, nn.Linear | Conv1D) and other):
            return None
        if kind == "bias":  # which has the rows of its weight
            continue
        index, _, inner = owner.removeprefix(f"{name}.").partition(".")
        turn = -1 if isinstance(linear, Conv1D) else 1
        (rows, columns), (fewer_rows, fewer_columns) = shape[::turn], other[::turn]
        if (columns, fewer_columns, fewer_rows) == (count, count - 2, rows):
            downs[int(index)].append(inner)
        elif columns == fewer_columns and fewer_rows * count == rows * (count - 2):
            producers[int(index)][inner] = rows // count
        else:
            return None
    if all(len(each) == 1 for each in downs) and all(producers):
        return [BlockMlp(down, made) for [down], made in zip(downs, producers, strict=True)]
    return None


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

"""The neurons of the blocks' MLPs in any architecture: their rows and columns.

A neuron is an input of an MLP's down projection, with the row of each linear that makes this input
(gate and up, or one linear before the activation), and their biases. Which linears these are, the
config itself shows: each field that may set the MLP's width is changed, and the model is built
again without weights. If exactly one linear of every block then loses inputs,
others in the block lose as many outputs each, and nothing else in the model changes, the field says
how wide the MLPs are, and a narrower model loads as any other.

`check_removable` checks on the weights that each neuron depends on its own rows alone.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from lib.model.access import Checkpoint
from lib.model.linears import find_linears, first_argument
from lib.model.pretrained import skeleton
from lib.model.quantised import stored_bits
from lib.util.errors import UserError

TOLERANCE = 1e-3  # of the outputs' norm; rounding in bfloat16 needs more, see `check_removable`


@dataclass(frozen=True)
class Producer:
    """A linear, by its path in the block, whose outputs become the MLP's neurons.

    A fused linear has `parts` outputs for each neuron; the outputs of one part are contiguous.
    """

    path: str
    parts: int


@dataclass(frozen=True)
class BlockMlp:
    """Paths of the linears of a block's MLP: `down` reads the neurons, `producers` make them."""

    down: str
    producers: tuple[Producer, ...]


@dataclass(frozen=True)
class MlpLayout:
    """The MLPs of a model's blocks, all of one `width`, and the config field that sets it.

    `section` is the name of the sub-config that holds `field`, None for the config itself.
    """

    width: int
    section: str | None
    field: str
    blocks: tuple[BlockMlp, ...]

    def set_width(self, config: Any, width: int) -> None:
        """Write another width into a config."""
        part = getattr(config, self.section) if self.section else config
        value = getattr(part, self.field)
        setattr(part, self.field, [width] * len(value) if isinstance(value, list) else width)


def find_mlps(config: Any, checkpoint: Checkpoint, model: nn.Module, name: str) -> MlpLayout:
    """Return the MLPs of the blocks `name` of `model`, which needs no weights.

    Raises UserError for quantised models, experts, MLPs of several widths, and models whose config
    has no field for the width.
    """
    if stored_bits(config):
        raise _refused(checkpoint, "it is quantised, and its matrices can't be cut")
    blocks = model.get_submodule(name)
    if any(linear.expert is not None for block in blocks for linear in find_linears(block, "")[0]):
        raise _refused(checkpoint, "its MLPs are experts")
    shapes = _parameter_shapes(model)
    for width in _possible_widths(blocks[0]):
        for section, field in _fields(config, width):
            narrow = width - 1 if width % 2 else width - 2
            layout = MlpLayout(width, section, field, ())
            changed = _changed_shapes(config, checkpoint, shapes, layout=layout, narrow=narrow)
            if changed is None:
                continue
            mlps = _mlps(changed, model, name, width=width, narrow=narrow)
            if mlps is not None:
                return MlpLayout(width, section, field, mlps)
    raise _refused(
        checkpoint, "no field of its config sets the width of one MLP in each block and of it alone"
    )


def _parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {path: tuple(parameter.shape) for path, parameter in model.named_parameters()}


def _refused(checkpoint: Checkpoint, reason: str) -> UserError:
    return UserError(
        f"--sparsity_type neurons: {checkpoint}: {reason}; use --sparsity_type unstructured"
    )


def _possible_widths(block: nn.Module) -> Iterator[int]:
    """Yield input widths of linears that another linear's outputs may fill, widest first."""
    shapes = [linear.shape for linear in find_linears(block, "")[0]]
    widths = {
        inner
        for out, inner in shapes
        if any(rows % inner == 0 and columns == out for rows, columns in shapes)
    }
    yield from sorted(widths, reverse=True)


def _fields(config: Any, width: int) -> Iterator[tuple[str | None, str]]:
    """Yield (section, name) of the config's fields that may set `width`: equal to it, or None."""
    text = config.get_text_config(decoder=True)
    section = next((key for key, value in vars(config).items() if value is text), None)
    common = vars(PreTrainedConfig()).keys()
    specific = {key: value for key, value in vars(text).items() if key not in common}
    for wanted in (lambda value: value == width, lambda value: value is None):
        for key, value in specific.items():
            is_list = isinstance(value, list) and value
            if not isinstance(value, bool) and (
                all(map(wanted, value)) if is_list else wanted(value)
            ):
                yield section, key


def _changed_shapes(
    config: Any,
    checkpoint: Checkpoint,
    shapes: dict[str, tuple[int, ...]],
    layout: MlpLayout,
    narrow: int,
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """Return {parameter: (shape, shape with `narrow` MLPs)}; None if no such model can be built."""
    config = copy.deepcopy(config)
    try:
        layout.set_width(config, narrow)
        model = skeleton(config, checkpoint)
    except Exception:  # any model's class may reject the value in its own way
        return None
    after = _parameter_shapes(model)
    if after.keys() != shapes.keys():
        return None
    return {path: (shapes[path], after[path]) for path in shapes if shapes[path] != after[path]}


def _mlps(
    changed: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    model: nn.Module,
    name: str,
    width: int,
    narrow: int,
) -> tuple[BlockMlp, ...] | None:
    """Return the MLP of each block, if the `changed` parameters are one MLP in each and no more."""
    downs: dict[int, list[str]] = defaultdict(list)
    producers: dict[int, dict[str, int]] = defaultdict(dict)
    for path, (before, after) in changed.items():
        number, _, inner = path.removeprefix(f"{name}.").partition(".")
        if not (path.startswith(f"{name}.") and number.isdecimal()):
            return None
        linear, _, kind = inner.rpartition(".")
        module = model.get_submodule(f"{name}.{number}.{linear}")
        if not isinstance(module, nn.Linear | Conv1D):
            return None
        if isinstance(module, Conv1D) and kind == "weight":
            before, after = before[::-1], after[::-1]  # (out, in)
        if len(before) == 2 and (before[1], after[1]) == (width, narrow) and before[0] == after[0]:
            downs[int(number)].append(linear)
        elif before[0] % width == 0 and after[0] == before[0] // width * narrow:
            producers[int(number)][linear] = before[0] // width
        else:
            return None
    blocks = []
    for index in range(len(model.get_submodule(name))):
        if len(downs[index]) != 1 or not producers[index]:
            return None
        inputs = tuple(Producer(path, parts) for path, parts in producers[index].items())
        blocks.append(BlockMlp(downs[index][0], inputs))
    return tuple(blocks)


def keep_neurons_(block: nn.Module, mlp: BlockMlp, kept: Tensor) -> None:
    """Remove from a block's MLP all neurons but `kept` (n,), indices in rising order."""
    down = block.get_submodule(mlp.down)
    width = down.weight.shape[0 if isinstance(down, Conv1D) else 1]
    _select_(down, "weight", kept, dim=0 if isinstance(down, Conv1D) else 1)
    for producer in mlp.producers:
        linear = block.get_submodule(producer.path)
        rows = torch.cat([kept + part * width for part in range(producer.parts)])
        _select_(linear, "weight", rows, dim=1 if isinstance(linear, Conv1D) else 0)
        if linear.bias is not None:
            _select_(linear, "bias", rows, dim=0)
    fit_sizes_(block, mlp)


def _select_(linear: nn.Module, name: str, indices: Tensor, dim: int) -> None:
    parameter = getattr(linear, name)
    chosen = parameter.data.index_select(dim, indices.to(parameter.device))
    setattr(linear, name, nn.Parameter(chosen.contiguous(), requires_grad=parameter.requires_grad))


def fit_sizes_(block: nn.Module, mlp: BlockMlp) -> None:
    """Set the size attributes of an MLP's linears to the shapes of their weights."""
    for path in (mlp.down, *(producer.path for producer in mlp.producers)):
        linear = block.get_submodule(path)
        if isinstance(linear, Conv1D):
            linear.nx, linear.nf = linear.weight.shape
        else:
            linear.out_features, linear.in_features = linear.weight.shape


@torch.no_grad()
def check_removable(
    block: nn.Module, mlp: BlockMlp, width: int, run: Callable[[nn.Module], Tensor], name: str
) -> None:
    """Check on one batch that neurons can be removed; raise UserError naming the block if not.

    `run(block)` returns a block's outputs. Without every other neuron they must be, to rounding,
    those of the block whose down projection ignores these neurons.
    """
    ignored = torch.arange(width) % 2 == 1
    smaller = copy.deepcopy(block)
    keep_neurons_(smaller, mlp, (~ignored).nonzero().flatten())
    down = block.get_submodule(mlp.down)

    def ignore(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = first_argument(args, kwargs)
        return (x.masked_fill(ignored.to(x.device), 0),), {}

    handle = down.register_forward_pre_hook(ignore, with_kwargs=True)
    try:
        expected = run(block).float()
    finally:
        handle.remove()
    out = run(smaller).float()
    tolerance = max(TOLERANCE, 4 * torch.finfo(down.weight.dtype).eps)
    if (out - expected).norm() > tolerance * expected.norm():
        raise UserError(
            f"--sparsity_type neurons: {name}: its MLP does more than multiply by neurons, so that "
            "none can be removed; use --sparsity_type unstructured"
        )

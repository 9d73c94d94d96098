"""The routed experts of a model's blocks, found by what fewer of them would change.

The model is built twice without weights, once as its config says and once with fewer experts. The
tensors that differ have an entry for each expert (stacked weights, the router's rows, biases, terms
that correct its scores), and the integers of modules that differ count them. So no architecture is
named here, and what is cut loads as any other model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lib.model.access import Checkpoint
from lib.model.pretrained import changed_shapes, skeleton_with
from lib.model.quantized import stored_bits
from lib.model.store import set_tensor
from lib.util.errors import UserError

FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ExpertLayout:
    """Where a model has its experts: `count` in each block, of which a token is sent to `chosen`.

    The router takes experts of `open_groups` of `groups` groups, consecutive and equal in size.
    `field` of the text config sets their number.
    """

    kind: ClassVar[str] = "experts"
    count: int
    chosen: int
    groups: int
    open_groups: int
    field: str
    tensors: tuple[tuple[str, ...], ...]  # of each block, paths of what has an entry for each
    modules: tuple[str, ...]  # of each block, the path of the module that runs them; "" for none
    counters: tuple[tuple[str, str], ...]  # modules and their attributes, in the whole model


def find_experts(config: Any, checkpoint: Checkpoint, model: nn.Module, name: str) -> ExpertLayout:
    """Return the experts of the blocks `name` of `model`, which needs no weights.

    Raises UserError for quantized models, and where no field of the config sets their number.
    """
    why = "no field of its config sets the number of stacked experts in its blocks"
    if stored_bits(config):
        why = "it is quantized, and its experts can't be cut"
    else:
        text = config.get_text_config(decoder=True)
        for field in FIELDS:
            if (getattr(text, field, None) or 0) > 1:
                layout = _layout(config, field, checkpoint, model, name)
                if layout:
                    return layout
    raise UserError(
        f"--sparsity_type experts: {checkpoint}: {why}; use --sparsity_type unstructured"
    )


def _layout(
    config: Any, field: str, checkpoint: Checkpoint, model: nn.Module, name: str
) -> ExpertLayout | None:
    """The layout that `field` stands for; None where it changes anything else than experts."""
    text = config.get_text_config(decoder=True)
    count, groups = getattr(text, field), getattr(text, "n_group", None) or 1
    fewer = count - groups
    other = skeleton_with(config, field, fewer, checkpoint)
    if other is None:
        return None
    changed = changed_shapes(model, other)
    prefix = f"{name}."
    for path, (shape, its) in changed.items():
        if not path.startswith(prefix) or its != (fewer, *shape[1:]):
            return None
    blocks = model.get_submodule(name)
    tensors = [
        tuple(p.removeprefix(f"{prefix}{i}.") for p in changed if p.startswith(f"{prefix}{i}."))
        for i in range(len(blocks))
    ]
    holders = [
        {path.rpartition(".")[0] for path in paths if len(changed[f"{prefix}{i}.{path}"][0]) == 3}
        for i, paths in enumerate(tensors)
    ]
    if not any(holders) or max(map(len, holders)) > 1:
        return None
    modules = dict(other.named_modules())
    counters = [
        (path, key)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int) and vars(modules[path]).get(key) != value
    ]
    return ExpertLayout(
        count=count,
        chosen=getattr(text, "num_experts_per_tok", None) or 1,
        groups=groups,
        open_groups=(getattr(text, "topk_group", None) or 1) if groups > 1 else 1,
        field=field,
        tensors=tuple(tensors),
        modules=tuple(next(iter(each), "") for each in holders),
        counters=tuple(counters),
    )


def keep_experts_(block: nn.Module, layout: ExpertLayout, index: int, name: str, kept: Tensor):
    """Remove from block `index`, of the name `name`, all experts but `kept` (n,), in this order.

    Tensors that have lost them already, as in a block that was restored, stay as they are.
    """
    for path in layout.tensors[index]:
        parent, _, attribute = path.rpartition(".")
        tensor = getattr(block.get_submodule(parent), attribute)
        if len(tensor) == layout.count:
            set_tensor(block, path, tensor.data.index_select(0, kept.to(tensor.device)))
    for path, attribute in layout.counters:
        if path.startswith(f"{name}."):
            setattr(block.get_submodule(path.removeprefix(f"{name}.")), attribute, len(kept))

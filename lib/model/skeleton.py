"""A model without weights: its class, its shapes, its decoder blocks, and what text reads."""

from __future__ import annotations

import copy
import os
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from ..util.errors import UserError
from .checkpoint import Checkpoint, as_user_error, stored_names
from .linears import experts_implementation
from .matrix import unread_of

MOST_TENSORS = 10  # parameters of a model per stored tensor, far above any architecture's
MOST_WEIGHTS = 16  # numbers per byte of stored weights


def auto_class(config: Any) -> type:
    """Return the class of transformers that loads a config's checkpoint in full.

    This is AutoModelForCausalLM, unless the config belongs to a vision-language model and the
    checkpoint's `architectures` do not name the language model's class.
    """
    causal, multimodal = (
        each._model_mapping.get(type(config), None)
        for each in (AutoModelForCausalLM, AutoModelForImageTextToText)
    )
    named = causal is not None and causal.__name__ in (config.architectures or ())
    return AutoModelForImageTextToText if multimodal and not named else AutoModelForCausalLM


def build_skeleton(config: Any, checkpoint: Checkpoint, kind: Any = None) -> nn.Module:
    """Build the model without weights, on the meta device; `kind` is its class, else by config.

    `unread_of` knows what text does not read. Raises UserError if it cannot be built, or is far
    larger than a local folder's weights.
    """
    stored = stored_names(checkpoint)
    n_bytes = sum(map(os.path.getsize, set(stored.values())))
    tensors, weights = MOST_TENSORS * len(stored), MOST_WEIGHTS * n_bytes

    def on_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal tensors, weights
        tensors, weights = tensors - 1, weights - parameter.numel()
        if stored and min(tensors, weights) < 0:
            raise UserError(
                str(checkpoint),
                f"config.json describes a far larger model than its weights, {len(stored)} "
                f"tensors in {n_bytes} bytes",
                "Download the model again",
            )

    with (
        as_user_error(checkpoint, "a model of its kind", "Name a causal language model"),
        register_module_parameter_registration_hook(on_parameter),
        torch.device("meta"),
    ):
        if kind:
            model = kind(config)
        else:
            options = dict(trust_remote_code=checkpoint.trust_remote_code)
            model = auto_class(config).from_config(config, **options)
    if config.get_text_config(decoder=True) is not config:
        model.unread = _unread(model)
    return model


def text_pass(model: nn.Module) -> None:
    """Take text through a model without weights, whose class may raise any error."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # with batched_mm no shape depends on values
    with (
        experts_implementation(model.eval(), "batched_mm"),
        fake,
        torch.device("meta"),
        torch.no_grad(),
    ):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)


def _unread(model: nn.Module) -> frozenset[str]:
    """Return the names of tensors that a text-only pass of a model without weights does not read.

    If such a pass fails, these are all except the decoder, the embedding and the head.
    """
    read: set[int] = set()

    class Reads(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func.__name__ != "__get__":  # reads of a dtype or a device
                read.update(map(id, tree_leaves((args, kwargs))))
            return func(*args, **(kwargs or {}))

    try:
        with Reads():
            text_pass(model)
    except Exception:  # a model's class may raise any error
        parts = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
        read = {id(each) for part in parts for each in part.state_dict(keep_vars=True).values()}
    state = model.state_dict(keep_vars=True)
    return frozenset(name for name, each in state.items() if id(each) not in read)


def skeleton_with(config: Any, field: str, value: int, checkpoint: Checkpoint) -> nn.Module | None:
    """Build the model without weights, with another value in a field of its text config.

    Returns None if it cannot be built.
    """
    changed = copy.deepcopy(config)
    setattr(changed.get_text_config(decoder=True), field, value)
    try:
        return build_skeleton(changed, checkpoint)
    except Exception:  # a model's class may raise any error
        return None


def changed_shapes(model: nn.Module, other: nn.Module) -> dict[str, tuple[tuple, tuple]]:
    """Return {path: (shape, other shape)} of parameters and buffers whose shapes differ.

    The shape of a missing one is ().
    """
    ours, theirs = (
        {path: tuple(each.shape) for path, each in chain(m.named_parameters(), m.named_buffers())}
        for m in (model, other)
    )
    pairs = {path: (ours.get(path, ()), theirs.get(path, ())) for path in ours | theirs}
    return {path: (shape, new) for path, (shape, new) in pairs.items() if shape != new}


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return name and list of the decoder blocks: the ModuleList of classes in `_no_split_modules`.

    If there are several (a multimodal model), it is the one whose blocks all read text. Raises
    UserError if there is none.
    """
    classes, unread = set(model._no_split_modules or ()), unread_of(model)

    def is_block(name: str, child: nn.Module) -> bool:
        read = any(f"{name}.{path}" not in unread for path, _ in child.named_parameters())
        return read and type(child).__name__ in classes

    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(is_block(f"{name}.{index}", child) for index, child in enumerate(module))
    ]
    if len(lists) > 1 and isinstance(model.get_decoder(), nn.Module):
        inside = set(model.get_decoder().modules())
        lists = [(name, module) for name, module in lists if module in inside]
    if len(lists) != 1:
        raise UserError(
            f"--model {model.name_or_path} ({type(model).__name__})",
            f"it has {len(lists) or 'no'} lists of decoder blocks that process text "
            f"({', '.join(sorted(classes)) or 'it names no class of blocks'}), and one is "
            "required",
            "This architecture cannot be pruned",
        )
    return lists[0]

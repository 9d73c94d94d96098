"""Load a model with its config and tokenizer, and copy it."""

from __future__ import annotations

import copy
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, core_model_loading
from transformers.quantizers.base import get_keys_to_not_convert

from ..data.tokenizers import keep_limits, template_texts
from ..util.errors import UserError
from ..util.quirks import WINDOW_FIELDS
from .checkpoint import Checkpoint, as_user_error, check_complete, check_folder, quantization
from .matrix import unread_of
from .skeleton import auto_class, build_skeleton, decoder_blocks

LONGEST_WINDOW = 4096  # tokens, the default if the model has no lower limit


def load_config(checkpoint: Checkpoint) -> Any:
    """Load the model's config, but no weight. Raises UserError if it cannot be loaded."""
    check_folder(checkpoint)
    fix = "Check that file and the version of transformers"
    with as_user_error(checkpoint, "its config.json", fix):
        config = AutoConfig.from_pretrained(checkpoint.name, **checkpoint.options())
    if getattr(config, "is_encoder_decoder", False):
        problem = f"it is an encoder-decoder model ({config.model_type})"
        raise UserError(str(checkpoint), problem, "Name a causal language model")
    if not checkpoint.trust_remote_code:
        vars(config).pop("auto_map", None)  # names code that is not saved with the model
    return config


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load the model's tokenizer. Raises UserError if it has no working one."""
    with as_user_error(checkpoint, "its tokenizer", "Put the tokenizer's files beside the weights"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.name, **checkpoint.options())
        template_texts(tokenizer, str(checkpoint))  # also checks them
        keep_limits(tokenizer)
    if not tokenizer("a").input_ids and not tokenizer("text").input_ids:
        raise UserError(str(checkpoint), "its tokenizer gives no tokens", "Put a working one there")
    return tokenizer


def window_length(config, requested: int | None, longest: int = LONGEST_WINDOW) -> int:
    """Return the tokens in a window: as requested, else the model's limit, at most `longest`."""
    text = config.get_text_config(decoder=True)
    limit = next((n for n in (getattr(text, a, None) for a in WINDOW_FIELDS) if n), None)
    if requested is None:
        return min(limit or longest, longest)
    if limit and requested > limit:
        raise UserError(
            f"{{--seqlen}} {requested}", f"the model's limit is {limit} tokens", "Give less"
        )
    return requested


def load_model(
    checkpoint: Checkpoint,
    config: Any,
    *,
    dtype: torch.dtype,
    device_map: dict[str, object],
    offload: str | None = None,
    writes: bool = True,
    load_bit: str | None = None,
) -> nn.Module:
    """Load the model in eval mode with `device_map`. Raises UserError if weights are damaged.

    Weights on disk that are converted on loading go to folder `offload`; only one of the ranks that
    share it `writes`.
    """
    checkpoint = checkpoint.pinned(config)
    fix = "Download them again or, if memory is short, give --offload_folder FOLDER"
    bare = build_skeleton(config, checkpoint)
    unread = unread_of(bare)
    skipped = [*get_keys_to_not_convert(bare), *{name.rpartition(".")[0] for name in unread}]
    # None: the stored dtype
    plan = bare._get_dtype_plan(dtype) | {f"^{re.escape(name)}$": None for name in unread}
    planned = mock.patch.object(type(bare), "_get_dtype_plan", lambda *_: plan)

    def mapped(weight: Tensor, name: str, folder: str, index: dict[str, Any]) -> dict[str, Any]:
        file = str(Path(folder, f"{name}.safetensors"))
        index[name] = {"safetensors_file": file, "weight_name": name}
        return index

    with ExitStack() as patched, as_user_error(checkpoint, "its weights", fix):
        patched.enter_context(planned)
        if not writes:
            patched.enter_context(mock.patch.object(core_model_loading, "offload_weight", mapped))
        model, info = auto_class(config).from_pretrained(
            checkpoint.name,
            config=config,
            dtype=dtype,
            device_map=device_map,
            offload_folder=offload,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            **checkpoint.options(),
            **quantization(load_bit, skipped),
        )
    check_complete(checkpoint, info)
    model.unread = unread
    if getattr(model, "is_quantized", False):
        for module in model.modules():  # a CPU's repacking would round the scales
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        # the other weights of a quantized checkpoint keep their stored dtype
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and name not in unread:
                parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def fresh_copy(model: nn.Module, with_blocks: bool = True) -> nn.Module:
    """Return a copy of a model that may be changed freely, or without weights in its blocks.

    Matrices outside the blocks, which no run changes in place, share memory with the model's until
    they are moved or cast. Vectors are copied, since they may be trained.
    """
    _, blocks = decoder_blocks(model)
    inside = {id(tensor) for tensor in (*blocks.parameters(), *blocks.buffers())}
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in inside and not with_blocks:
            value = torch.empty_like(tensor, device="meta")
        elif id(tensor) not in inside and tensor.dim() > 1:
            value = tensor.data
        else:
            continue
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    return copy.deepcopy(model, memo)

"""The size of a run's model as a GGUF file, known before its weights are read."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from ..calibration.mixed_types import Costs, sizes_of
from ..formats.grids import Types
from ..formats.registry import Q8_0, TYPES
from ..model.linears import find_linears
from ..model.matrix import unread_of
from ..util.errors import UserError
from .flags import shown
from .run import Run

# bytes in a GGUF file besides weights
STRING_BYTES = 8  # length of each token and merge
ROW_BYTES = 8  # type and score of a token
PADDING_BYTES = 16  # name of a row without a token
TENSOR_BYTES, HEADER_BYTES = 96, 2**12  # upper limits: name, shape and alignment; other fields


def gguf_bytes(run: Run, model: nn.Module, form: Any, outer: float) -> float:
    """Return an upper limit of a file of `model` in bytes; `outer` are those outside its blocks.

    Linear layers of whole blocks are counted as the types of `form`, others as 16 bits, the rest as
    32.
    """
    size, path = outer, run.model.blocks_name
    for index, block in enumerate(model.get_submodule(path)):
        prefix = f"{path}.{index}"
        linears = {each.parameter_name: each.shape[1] for each in find_linears(block, prefix)[0]}
        for name, weight in block.named_parameters():
            full = f"{prefix}.{name}"
            bits = form.bits_of(full, linears[full]) if full in linears else 32
            size += weight.numel() * bits / 8 + TENSOR_BYTES
    return size


def sizes_and_rest(run: Run, model: nn.Module, outer: float) -> tuple[Costs, float]:
    """Return {tensor: {type: bytes}} of `model`, and the bytes of the rest of its file."""
    rows = model.get_input_embeddings().num_embeddings
    sizes = sizes_of(model, run.model.blocks_name, rows)
    whole = gguf_bytes(run, model, Types(), outer)  # as q8_0
    return sizes, whole - sum(types[Q8_0] for types in sizes.values())


def room_for_types(run: Run) -> tuple[Costs, float]:
    """Return {tensor: {type: bytes}}, and the bytes that --megabytes leaves for these tensors.

    Raises UserError if that is too little for the smallest types, or enough for the largest.
    """
    most, flag = 1e6 * run.flags.megabytes, shown(run.flags, "megabytes")
    sizes, rest = sizes_and_rest(run, run.model.small, vocabulary_bytes(run))
    least, whole = (rest + sum(map(each, map(dict.values, sizes.values()))) for each in (min, max))
    if least > most:
        problem = f"the smallest file takes about {least / 1e6:.3g} MB"
        raise UserError(flag, problem, "Give more, or a smaller model")
    if whole <= most:
        problem = f"the model fits as q8_0, in about {whole / 1e6:.3g} MB"
        raise UserError(flag, problem, "Give less, or use gguf with --type q8_0")
    return sizes, most - rest


def vocabulary_bytes(run: Run) -> float:
    """Return the bytes of a GGUF file outside its blocks: tables, tokens, merges and fields."""
    model, tokenizer = run.model.skeleton, run.model.tokenizer
    rows, unread = model.get_input_embeddings().num_embeddings, unread_of(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    size = HEADER_BYTES + 2 * len(str(tokenizer.chat_template or "").encode())
    for name, weight in model.named_parameters():
        if name.startswith(f"{run.model.blocks_name}.") or name in unread:
            continue
        table = len(weight) == rows or name.removesuffix(".weight") in linears
        bits = TYPES[Q8_0].bits_of(name, weight.shape[-1]) if table else 32
        size += weight.numel() * bits / 8 + TENSOR_BYTES
    tokens = tokenizer.get_vocab()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges") or ()
    strings = [*tokens, *(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)]
    size += sum(STRING_BYTES + len(string.encode()) for string in strings)
    return size + rows * ROW_BYTES + max(0, rows - len(tokens)) * (STRING_BYTES + PADDING_BYTES)

"""Save a model, whole or as the shards that finished blocks have become, and count its bytes."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from ..packed.linear import semi_structured_bytes
from ..util.errors import UserError
from .bitsandbytes import stored_bits
from .checkpoint import INDEX, WEIGHTS, Checkpoint, tensor_bytes
from .matrix import SaveDtypes, unread_of


def save_in_shards(
    model: nn.Module, folder: Path, dtype: torch.dtype, shards: dict[Path, list[str]]
) -> bool:
    """Write the model in `dtype`; the files of finished blocks, {file: names}, become its shards.

    The files also remain in place, which takes no room on the same disk. Returns False and writes
    nothing if the names in a checkpoint of this model differ from those in the files.
    """
    inside = {name for each in shards.values() for name in each}
    held = {name: each.to("meta") for name, each in model.state_dict().items() if name in inside}
    if (
        getattr(model, "hf_quantizer", None)
        or revert_weight_conversion(model, held).keys() != inside
    ):
        return False
    with cast(model, dtype):
        rest = {name: value for name, value in model.state_dict().items() if name not in inside}
        model.save_pretrained(folder, state_dict=rest)
    count, weight_map, size = len(shards) + 1, {}, 0
    for number, file in enumerate([folder / WEIGHTS, *shards], 1):
        shard = folder / f"model-{number:05d}-of-{count:05d}.safetensors"
        with safe_open(file, framework="pt") as stored:
            weight_map |= dict.fromkeys(stored.keys(), shard.name)
        size += tensor_bytes(file)
        try:
            os.link(file, shard)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(file, shard)
    (folder / WEIGHTS).unlink()
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
    return True


@contextmanager
def cast(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cast the model's floating-point parameters to their saved dtypes.

    Modules that the architecture always keeps in float32 (some routers) are not cast. Afterwards
    all parameters have their original dtypes, with the rounded values.
    """
    saved = SaveDtypes(model, dtype)
    before = {parameter: parameter.dtype for parameter in model.parameters()}
    config_dtype = model.config.dtype
    try:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(saved.of(name, parameter))
        model.config.dtype = dtype
        yield
    finally:
        model.config.dtype = config_dtype
        for parameter, working in before.items():
            if parameter.dtype != working:
                parameter.data = parameter.data.to(working)


def text_alone(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Return transformers' text-only model with the text parts of a vision-language model.

    Raises UserError if there are no other parts, or transformers has no such class.
    """
    whole = model.config
    if stored_bits(whole) or not unread_of(model):
        what = "is quantized" if stored_bits(whole) else "has no other parts"
        raise UserError("--text_only", f"{checkpoint} {what}", "Leave the flag out")
    decoder, config = model.get_decoder(), copy.deepcopy(whole.get_text_config(decoder=True))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    config.tie_word_embeddings = head.weight is embedding.weight
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocabulary_trimmed_from"):
        if getattr(config, name, None) is None and getattr(whole, name, None) is not None:
            setattr(config, name, getattr(whole, name))
    with torch.device("meta"):
        known = type(config) in AutoModelForCausalLM._model_mapping
        alone = AutoModelForCausalLM.from_config(config) if known else None
    if type(getattr(alone, "base_model", None)) is not type(decoder):
        what = f"for only the text of {checkpoint} ({type(decoder).__name__})"
        raise UserError("--text_only", f"transformers has no class {what}", "Leave the flag out")
    setattr(alone, alone.base_model_prefix, decoder)
    alone.set_output_embeddings(head)
    alone.generation_config, alone.name_or_path = model.generation_config, model.name_or_path
    return alone.eval()


def footprint(model: nn.Module) -> int:
    """Return the bytes of parameters, buffers and torch's 2:4 tensors on any device; shared ones
    count once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.nbytes for tensor in tensors) + semi_structured_bytes(model)


def parameter_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of the parameters saved in `dtype`; shared ones count once."""
    saved = SaveDtypes(model, dtype)
    return sum(one.numel() * saved.of(name, one).itemsize for name, one in model.named_parameters())

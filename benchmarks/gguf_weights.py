"""What the benchmarks of files share: matrices of GGUF files by their names in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file


def names_in(file: Path, folder: Path) -> Callable[[str], str | None]:
    """Return the function from a weight's name in a checkpoint to its name in a GGUF file."""
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    config = json.loads((folder / "config.json").read_text("utf-8"))
    name = GGUFReader(file).fields["general.architecture"].contents()
    kind = next(kind for kind, its in MODEL_ARCH_NAMES.items() if its == name)
    names = get_tensor_name_map(kind, config["num_hidden_layers"])
    return partial(names.get_name, try_suffixes=(".weight",))


def matrices_of(file: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return the matrices of a GGUF file by their names in the checkpoint `folder`, float32."""
    from gguf import GGUFReader, quants

    reader, name_of = GGUFReader(file), names_in(file, folder)
    architecture = reader.fields["general.architecture"].contents()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    found, state = {tensor.name: tensor for tensor in reader.tensors}, {}
    for own, weight in load_file(folder / "model.safetensors").items():
        its = name_of(own)
        if weight.dim() != 2 or its not in found:
            continue
        values = torch.tensor(quants.dequantize(found[its].data, found[its].tensor_type))
        if architecture == "llama" and its.endswith(("attn_q.weight", "attn_k.weight")):
            values = in_halves(values, config, own)
        if values.shape == weight.shape:  # another vocabulary has other rows
            if (values - weight.float()).norm() > 1.2 * weight.float().norm():  # others: 1.4
                raise ValueError(f"{file}: {its} is not {own}")
            state[own] = values
    return state


def in_halves(values, config: dict, name: str):
    """Undo the order of a head's rows that llama.cpp wants: pairs, for halves in transformers."""
    heads = config["num_attention_heads"]
    heads = heads if name.endswith("q_proj.weight") else config.get("num_key_value_heads", heads)
    rows, width = values.shape
    return values.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)

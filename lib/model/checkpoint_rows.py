"""The tables of a checkpoint's files with a row for each token, found by name, without a model.

Files are mapped, and their tensors written from the map: only kept rows are read into memory.
Nothing is guessed: an unknown tensor of the vocabulary's size is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..util.errors import UserError

# of BERT's kinds, LLaMA's, ModernBERT, GPT-2, GPT-NeoX and T5; static ones of sentence-transformers
# and of model2vec
INPUTS = re.compile(
    r"(.*\.)?(word_embeddings|embed_tokens(_per_layer)?|tok_embeddings|wte|embed_in|shared)\.weight"
    r"|embedding\.weight|embeddings"
)
HEADS = re.compile(
    r"(.*\.)?(lm_head|embed_out|output_layer|decoder|vocab_projector)\.(weight|bias)"
    r"|(.*\.)?(predictions|lm_head)\.bias|weights"
)


def tables_of(tensors: Mapping[str, Tensor], what: str) -> tuple[set[str], int]:
    """Return the names of the tensors with a row for each token, and the number of rows.

    Raises UserError if there is none, and for a tensor of that size with an unknown name.
    """
    inputs = {n: len(t) for n, t in tensors.items() if INPUTS.fullmatch(n) and t.dim() == 2}
    fix = "Only other models can be trimmed"
    if not inputs:
        raise UserError(what, "no tensor is known to have a row for each token", fix)
    rows, tables = next(iter(inputs.values())), set()
    for name, tensor in tensors.items():
        shape = [*tensor.shape]
        if (name in inputs or HEADS.fullmatch(name)) and shape[0] == rows:
            tables.add(name)
        elif name in inputs:
            raise UserError(what, f"{name} has {shape[0]} rows for {rows} tokens", fix)
        elif rows in shape:
            problem = f"{name} {shape} is unknown, and may have a row for each of {rows} tokens"
            raise UserError(what, problem, fix)
    return tables, rows


def write_rows(source: Path, target: Path, tables: set[str], rows: Tensor, what: str) -> None:
    """Write a file's tensors, of the `tables` the `rows` alone, and compare all bytes.

    Raises UserError if the written file has others.
    """
    with safe_open(source, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(source)  # mapped
    tensors |= {name: tensors[name][rows] for name in tables & tensors.keys()}
    save_file(tensors, target, metadata)
    for name, written in load_file(target).items():
        expected = tensors.pop(name)
        both = [each.reshape(-1).view(torch.uint8) for each in (written, expected)]
        if written.dtype != expected.dtype or not torch.equal(*both):
            raise UserError(what, f"{name} is not as it was written", "Check the disk")

"""Codes and scales of layers on the grid of q4_0, and predictions of transformers.

Codes and scales are not computed again. Only the embedding and head are rounded, for MLX.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...formats.registry import EXPORTED, FORMATS
from ...gguf.source import one_type, types_of
from ...model.checkpoint import Checkpoint
from ...model.folder import ModelFolder
from ...model.pretrained import load_config, load_model
from ...run.card import quantized_as
from ...util.errors import UserError

GRID = FORMATS[EXPORTED]
Logits = Callable[[list[int]], Tensor]  # from a window's ids to (tokens, rows)


def grid_rows(source: ModelFolder) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield codes and scales of each linear layer. Raises UserError for one off the grid."""
    where = f"OUT {source.folder}"
    for name, transposed in source.linears.items():
        weight = source.tensors[name]
        rows = (weight.mT if transposed else weight).flatten(0, -2)
        codes, scales, off = split(rows)
        if off > 0 and (types := types_of(source.folder)) - {EXPORTED}:
            other = quantized_as(source.folder) or one_type(types)
            problem = f"it was made with --quantize {other}, which only llama.cpp and ollama run"
            raise UserError(where, problem, f"Use gguf with --type {other}")
        if not off == 0:  # also rejects nan
            share = off / rows.abs().max()
            problem = f"a weight of {name} is {share:.1%} of the largest off the grid of {EXPORTED}"
            raise UserError(where, problem, f"Make the folder with --quantize {EXPORTED}")
        yield codes, scales


def split(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes int8 (out, in) and scales float32 (out, groups) of rows, by ggml's rule.

    Also returns the largest distance of a weight from these, 0 for rows on the grid.
    """
    blocks = rows.float().reshape(len(rows), -1, GRID.group)
    scales = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)).squeeze(2) / GRID.lowest
    scales.masked_fill_(scales == 0, -1)  # any scale fits a block of zeros
    codes = GRID.codes(rows, scales)
    values = codes.float() * GRID.expand_scales(scales, codes.shape[1])
    return codes, scales, (values - rows.float()).abs().max()


def packed_bytes(codes: Tensor) -> Tensor:
    """Return codes plus 8, two in a byte, the first in the low bits: uint8 (out, in / 2)."""
    pairs = (codes + 8).view(torch.uint8).view(len(codes), -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def codes_of(packed: Tensor) -> Tensor:
    """Return the codes of `packed_bytes`, from integers of any width with the same bytes."""
    packed = packed.contiguous().view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1).view(torch.int8) - 8


def digests(rows: Iterator[tuple[Tensor, Tensor]]) -> Counter[bytes]:
    """Count each row of codes and scales, without the scales of blocks of zeros."""
    counts: Counter[bytes] = Counter()
    for codes, scales in rows:
        live = codes.view(len(codes), -1, GRID.group).any(2)
        scales = torch.where(live, scales.float(), 0).contiguous()
        both = torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], 1).numpy()
        counts.update(hashlib.blake2b(row, digest_size=16).digest() for row in both)
    return counts


def load_transformers(folder: Path, tables: Sequence[Tensor] = ()) -> Logits:
    """Load a model to run it; `tables` replace its embedding and, if there are two, its head."""
    checkpoint = Checkpoint(str(folder), "OUT")
    how = dict(dtype=torch.float32, device_map={"": "cpu"})
    model = load_model(checkpoint, load_config(checkpoint), **how)
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    for module, table in zip(both, tables, strict=False):
        module.weight.data = table

    @torch.no_grad()
    def logits(window: list[int]) -> Tensor:
        return model(torch.tensor([window]), use_cache=False).logits[0]

    return logits

"""Masks of a pruned model without its weights: one bit per weight, in a safetensors file.

`write_masks` writes them, `read_masks` returns {layer: bool (out, in)}. In the file a layer's
tensor is numpy's packbits of the mask, row after row; the metadata hold its shape.
"""

from __future__ import annotations

import json
from collections.abc import Container
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..util.errors import UserError
from ..util.files import check_writable, share
from .blocks import BlockRunner

SHAPES = "shapes"  # metadata key

Packed = dict[str, tuple[tuple[int, int], Tensor]]


def packed_masks(runner: BlockRunner, layers: Container[str]) -> Packed:
    """Return {layer: (shape, bits)} of the named layers: 1 for each zero weight, pruned or not.

    Row by row (out, in), on the host, eight bits per byte.
    """
    masks = {}
    for linear in runner.each_linear():
        if linear.name in layers:
            zero = (linear.matrix() == 0).cpu()
            masks[linear.name] = tuple(zero.shape), torch.from_numpy(np.packbits(zero.numpy()))
    return masks


def unpacked(masks: Packed) -> dict[str, Tensor]:
    """Return {layer: bool (out, in)}, True where a weight is pruned."""
    return {
        name: torch.from_numpy(np.unpackbits(bits.numpy(), count=prod(shape))).bool().view(shape)
        for name, (shape, bits) in masks.items()
    }


def check_new_file(flag: str, file: str) -> None:
    """Raise UserError if a file of masks could not be written."""
    if Path(file).is_dir():
        fix = "Name a file, such as masks.safetensors"
        raise UserError(f"{flag} {file}", "it is a folder", fix)
    check_writable(flag, str(Path(file).parent))


def write_masks(file: str | Path, masks: Packed) -> None:
    """Write masks to a safetensors file atomically."""
    shapes = {name: list(shape) for name, (shape, _) in masks.items()}
    file = Path(file)
    partial = file.with_name(f".{file.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: bits for name, (_, bits) in masks.items()}
    save_file(tensors, partial, {SHAPES: json.dumps(shapes)})
    share(partial)
    partial.replace(file)


def read_masks(file: str | Path) -> dict[str, Tensor]:
    """Return {layer: bool (out, in)} from a file of --save_masks, True where a weight is pruned."""
    return unpacked(read_packed(file))


def read_packed(file: str | Path) -> Packed:
    """Return what `write_masks` wrote. Raises UserError for any other file."""
    try:
        with safe_open(str(file), "pt") as opened:
            shapes = json.loads((opened.metadata() or {})[SHAPES])
            masks = {name: (tuple(shapes[name]), opened.get_tensor(name)) for name in opened.keys()}
        return masks
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        problem = f"--save_masks did not write it ({error})"
        raise UserError(str(file), problem, "Name another") from error

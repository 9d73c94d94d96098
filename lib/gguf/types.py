"""The types that weights of a GGUF file can have, who makes them, and how much they round.

The converter itself writes 32, 16 and 8 bits. Of the smaller ones, those in blocks of 32 values
with one scale are made by the quantiser in numpy that comes with the converter; "K" types by
llama.cpp's own program llama-quantize.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

BLOCK = 32  # values that share a scale


@dataclass(frozen=True)
class WeightType:
    """`outtype`: what the converter is asked for. `blocks`: the type that the blocks' linears are
    given instead. `program`: the type that llama-quantize is asked for. `levels`: half the steps
    of a block of values; None for floating point."""

    outtype: str
    blocks: str | None = None
    program: str | None = None
    levels: float | None = None


TYPES = {
    "f32": WeightType("f32"),
    "f16": WeightType("f16"),
    "bf16": WeightType("bf16"),
    "q8_0": WeightType("q8_0", levels=127),
    "q5_1": WeightType("f16", blocks="Q5_1", levels=15.5),
    "q5_0": WeightType("f16", blocks="Q5_0", levels=16),
    "q4_1": WeightType("f16", blocks="Q4_1", levels=7.5),
    "q4_0": WeightType("f16", blocks="Q4_0", levels=8),
    "q6_k": WeightType("bf16", program="Q6_K", levels=32),
    "q5_k_m": WeightType("bf16", program="Q5_K_M", levels=16),
    "q4_k_m": WeightType("bf16", program="Q4_K_M", levels=8),
}
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def rounded(weight: Tensor, name: str) -> Tensor:
    """The weight (..., in) as the type `name` holds it.

    Exact where the converter's quantiser has the type; of K types, and without the package, about:
    by steps of each block's largest value.
    """
    levels = TYPES[name].levels
    if levels is None:
        return weight.to(FLOATS[name]).to(weight.dtype)
    if weight.shape[-1] % BLOCK:  # such rows are written in 16 bits
        return weight.half().to(weight.dtype)
    if TYPES[name].program is None and find_spec("gguf"):
        return _quantised(weight, name.upper())
    blocks = weight.unflatten(-1, (-1, BLOCK))
    step = blocks.abs().amax(-1, keepdim=True) / levels
    step = step.clamp_min(torch.finfo(step.dtype).tiny)
    return ((blocks / step).round() * step).flatten(-2)


def _quantised(weight: Tensor, name: str) -> Tensor:
    """The weight quantised as the converter does it, and back."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[name]
    values = quants.dequantize(quants.quantize(weight.float().numpy(), kind), kind)
    return torch.from_numpy(values).to(weight.dtype)

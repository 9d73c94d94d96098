"""The weight types of a GGUF file, the program that writes each, and the converter's rounding.

The converter itself writes 32, 16 and 8 bits. Smaller types with a scale for every 32 values come
from its numpy quantiser, the "K" and "IQ" types from llama.cpp's program llama-quantize.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

BLOCK = 32  # values that share a scale


@dataclass(frozen=True)
class WeightType:
    """How one weight type is written.

    `outtype` is passed to the converter; the blocks' linears get the type `blocks` instead, if
    given. `levels` is half the number of steps in a block of values, None for floating point.
    `program` is the type passed to llama-quantize, which starts from the converter's file;
    `needs_imatrix` says that it wants an importance matrix for it.
    """

    outtype: str
    blocks: str | None = None
    levels: float | None = None
    program: str | None = None
    needs_imatrix: bool = False


TYPES = {
    "f32": WeightType("f32"),
    "f16": WeightType("f16"),
    "bf16": WeightType("bf16"),
    "q8_0": WeightType("q8_0", levels=127),
    "q5_1": WeightType("f16", blocks="Q5_1", levels=15.5),
    "q5_0": WeightType("f16", blocks="Q5_0", levels=16),
    "q4_1": WeightType("f16", blocks="Q4_1", levels=7.5),
    "q4_0": WeightType("f16", blocks="Q4_0", levels=8),
    "q6_k": WeightType("bf16", program="Q6_K"),
    "q5_k_m": WeightType("bf16", program="Q5_K_M"),
    "q4_k_m": WeightType("bf16", program="Q4_K_M"),
    "iq4_xs": WeightType("bf16", program="IQ4_XS"),
    "q3_k_m": WeightType("bf16", program="Q3_K_M"),
    "iq3_xxs": WeightType("bf16", program="IQ3_XXS", needs_imatrix=True),
    "q2_k": WeightType("bf16", program="Q2_K"),
    "iq2_xs": WeightType("bf16", program="IQ2_XS", needs_imatrix=True),
}
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def rounded(weight: Tensor, name: str) -> Tensor:
    """Return the weight (..., in) as the type `name` rounds it.

    This is exact with the package gguf. Without it, it is approximate, with steps relative to each
    block's largest value. Types of llama-quantize are not rounded here.
    """
    assert not TYPES[name].program, name
    levels = TYPES[name].levels
    if levels is None:
        return weight.to(FLOATS[name]).to(weight.dtype)
    if weight.shape[-1] % BLOCK:  # such rows are written in 16 bits
        return weight.half().to(weight.dtype)
    if find_spec("gguf"):
        return _quantised(weight, name.upper())
    blocks = weight.unflatten(-1, (-1, BLOCK))
    step = blocks.abs().amax(-1, keepdim=True) / levels
    step = step.clamp_min(torch.finfo(step.dtype).tiny)
    return ((blocks / step).round() * step).flatten(-2)


def _quantised(weight: Tensor, name: str) -> Tensor:
    """Quantise the weight as the converter does, and return it dequantised."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[name]
    values = quants.dequantize(quants.quantize(weight.float().numpy(), kind), kind)
    return torch.from_numpy(values).to(weight.dtype)

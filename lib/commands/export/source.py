"""The folder that is exported: the codes and scales of its linears, which every engine gets."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from lib.model.access import Checkpoint, stored_names
from lib.model.linears import find_linears
from lib.model.pretrained import decoder_blocks, load_config, load_tokenizer, skeleton
from lib.packed.checkpoint import METHOD
from lib.packed.formats import FORMATS
from lib.util.errors import UserError

GRID = FORMATS["q4_0"]
COPIED = ("*.json", "*.jinja", "tokenizer.model")


@dataclass
class GridFolder:
    """A folder whose linears are on the grid of q4_0.

    `linears` are the names of their tensors, with whether these stand as (in, out); `others` are
    the names of the modules that stay as they are; `rows` counts the digests of all rows.
    """

    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    files: dict[str, str]
    linears: dict[str, bool]
    has_experts: bool  # among the linears, stacked as one tensor of the model
    others: list[str]
    rows: Counter[bytes] = field(default_factory=Counter)

    def tensor(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as stored:
            return stored.get_tensor(name)

    def check_grid(self) -> None:
        """Read every linear once. Raises UserError at the first that is not on the grid."""
        for name, transposed in self.linears.items():
            weight = self.tensor(name)
            rows = (weight.mT if transposed else weight).flatten(0, -2)
            codes, scales = split(rows)
            off = (values_of(codes, scales) - rows.float()).abs().max()
            if not off == 0:  # nan neither
                raise UserError(
                    f"OUT {self.folder}: {name} is not on the grid of q4_0, a weight is "
                    f"{off / rows.float().abs().max():.1%} of the largest away from it; make the "
                    "folder by --quantize q4_0, and change no weight afterwards"
                )
            self.rows += digests(codes, scales)

    def copy_files(self, new: Path, **fields: Any) -> None:
        """Copy tokenizer and settings, the config with other `fields`."""
        for file in (file for pattern in COPIED for file in self.folder.glob(pattern)):
            if file.name != "config.json" and not file.name.endswith(".safetensors.index.json"):
                shutil.copy2(file, new)
        config = json.loads((self.folder / "config.json").read_text("utf-8")) | fields
        (new / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")


def open_folder(path: str) -> GridFolder:
    """Read config, tokenizer and names. Raises UserError if the folder can't be exported."""
    if not Path(path).is_dir():
        raise UserError(f"OUT {path}: no such folder")
    checkpoint = Checkpoint(path, "OUT")
    config = load_config(checkpoint)
    if quantized := getattr(config, "quantization_config", None):
        how = quantized.get("quant_method")
        kind = "packed zeros, which no engine reads" if how == METHOD else f"weights of {how}"
        raise UserError(
            f"OUT {path}: its config.json has a quantization_config, it holds {kind}; name a "
            "folder made by --quantize q4_0"
        )
    model = skeleton(config, checkpoint)
    prefix, blocks = decoder_blocks(model)
    stored, transposed, experts = {}, {}, False
    for index, block in enumerate(blocks):
        for linear in find_linears(block, f"{prefix}.{index}")[0]:
            if GRID.takes(linear.shape[1]):
                whole = linear.name if linear.expert is None else linear.stage
                name = f"{whole}.weight" if linear.expert is None else whole
                stored[name] = getattr(linear.module, linear.parameter)
                transposed[name] = linear.transposed
                experts |= linear.expert is not None
    linears = {name: transposed.get(name, False) for name in revert_weight_conversion(model, stored)}
    files = stored_names(checkpoint)
    if missing := [name for name in linears if name not in files]:
        raise UserError(f"OUT {path}: its weights hold no {missing[0]}; save it again")
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in linears
    ]
    tokenizer = load_tokenizer(checkpoint)
    return GridFolder(Path(path), config, tokenizer, files, linears, experts, others)


def split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (out, in) and scales float32 (out, groups) of rows on the grid, by ggml's rule."""
    blocks = rows.float().reshape(len(rows), -1, GRID.group)
    scales = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)).squeeze(2) / GRID.lowest
    scales.masked_fill_(scales == 0, -1)  # any is right for a block of zeros
    return GRID.codes(rows, scales), scales


def values_of(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes and scales stand for, float32 (out, in)."""
    return codes.float() * GRID.spread_scales(scales, codes.shape[1])


def packed_bytes(codes: Tensor) -> Tensor:
    """Codes plus 8, two in a byte, the first in the low bits: uint8 (out, in / 2)."""
    pairs = (codes + 8).view(torch.uint8).view(len(codes), -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def codes_of(packed: Tensor) -> Tensor:
    """The inverse of `packed_bytes`, of any integers with the same bytes: int8 (out, in)."""
    packed = packed.contiguous().view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1).view(torch.int8) - 8


def digests(codes: Tensor, scales: Tensor) -> Counter[bytes]:
    """How often which row of codes and scales occurs; the scale of a block of zeros is no part."""
    live = codes.view(len(codes), -1, GRID.group).any(2)
    scales = torch.where(live, scales.float(), 0).contiguous()
    both = torch.cat([codes.contiguous().view(torch.uint8), scales.view(torch.uint8)], 1)
    return Counter(hashlib.blake2b(row, digest_size=16).digest() for row in both.numpy())

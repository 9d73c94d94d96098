"""The folder that is exported, and the codes and scales of its linears, which every engine gets."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass
class GridFolder:
    """A folder with linears on the grid of q4_0: `linears`, {tensor: whether it is (in, out)}.

    `others` names the modules of linears that stay as they are. `experts`: some are in stacks.
    """

    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    files: dict[str, str]
    linears: dict[str, bool]
    others: list[str]
    experts: bool

    def tensor(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as stored:
            return stored.get_tensor(name)

    def rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes and scales of each linear. Raises UserError at the first that is off the grid."""
        for name, transposed in self.linears.items():
            weight = self.tensor(name)
            rows = (weight.mT if transposed else weight).flatten(0, -2)
            codes, scales, off = split(rows)
            if not off == 0:  # nan neither
                raise UserError(
                    f"OUT {self.folder}: {name} is not on the grid of q4_0, a weight is "
                    f"{off / rows.abs().max():.1%} of the largest away from it; make the folder "
                    "by --quantize q4_0, and change no weight afterwards"
                )
            yield codes, scales

    def copy_settings(self, new: Path, **fields: Any) -> None:
        """Copy the tokenizer and the configs, config.json with more `fields`."""
        for file in self.folder.iterdir():
            if file.suffix in (".json", ".jinja", ".model") and "safetensors" not in file.name:
                shutil.copy2(file, new)
        config = json.loads((self.folder / "config.json").read_text("utf-8")) | fields
        (new / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")


def open_folder(path: str) -> GridFolder:
    """Read config, tokenizer and names. Raises UserError if the folder can't be exported."""
    if not Path(path).is_dir():
        raise UserError(f"OUT {path}: no such folder")
    checkpoint = Checkpoint(path, "OUT")
    config = load_config(checkpoint)
    if how := (getattr(config, "quantization_config", None) or {}).get("quant_method"):
        what = "packed zeros, which no engine reads" if how == METHOD else f"weights of {how}"
        raise UserError(
            f"OUT {path}: config.json has a quantization_config: {what}; name a folder of "
            "--quantize q4_0"
        )
    model = skeleton(config, checkpoint)
    prefix, blocks = decoder_blocks(model)
    found = [
        linear
        for index, block in enumerate(blocks)
        for linear in find_linears(block, f"{prefix}.{index}")[0]
        if GRID.takes(linear.shape[1])
    ]
    names = {
        f"{each.name}.weight" if each.expert is None else each.stage: each.transposed
        for each in found
    }
    stored = revert_weight_conversion(model, {name: model.get_parameter(name) for name in names})
    return GridFolder(
        folder=Path(path),
        config=config,
        tokenizer=load_tokenizer(checkpoint),
        files=stored_names(checkpoint),
        linears={name: names.get(name, False) for name in stored},
        others=[
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and f"{name}.weight" not in names
        ],
        experts=any(each.expert is not None for each in found),
    )


def split(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 (out, in) and scales float32 (out, groups) of rows, by ggml's rule.

    Returns the largest distance of a weight from these, too: 0 where the rows are on the grid.
    """
    blocks = rows.float().reshape(len(rows), -1, GRID.group)
    scales = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)).squeeze(2) / GRID.lowest
    scales.masked_fill_(scales == 0, -1)  # any will do for a block of zeros
    codes = GRID.codes(rows, scales)
    values = codes.float() * GRID.spread_scales(scales, codes.shape[1])
    return codes, scales, (values - rows.float()).abs().max()


def packed_bytes(codes: Tensor) -> Tensor:
    """Codes plus 8, two in a byte, the first in the low bits: uint8 (out, in / 2)."""
    pairs = (codes + 8).view(torch.uint8).view(len(codes), -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def codes_of(packed: Tensor) -> Tensor:
    """The inverse of `packed_bytes`, of integers of any width with the same bytes."""
    packed = packed.contiguous().view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1).view(torch.int8) - 8


def digests(rows: Iterator[tuple[Tensor, Tensor]]) -> Counter[bytes]:
    """How often each row of codes and scales occurs; the scale of a block of zeros is no part."""
    counts: Counter[bytes] = Counter()
    for codes, scales in rows:
        live = codes.view(len(codes), -1, GRID.group).any(2)
        scales = torch.where(live, scales.float(), 0).contiguous()
        both = torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], 1).numpy()
        counts.update(hashlib.blake2b(row, digest_size=16).digest() for row in both)
    return counts

"""Linear layers that bitsandbytes stores in 4 or 8 bits: dequantized, pruned, requantized.

Zero is one of NF4's sixteen values and one of int8's, so a mask survives. If a method only prunes
weights, the kept ones keep their codes and scales. If it also changes them, the matrix is
requantized in the same format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..packed import checkpoint as packed
from ..util.cli import typed
from ..util.errors import UserError
from .checkpoint import Checkpoint
from .matrix import PrunableLinear

DEQUANTIZED = ("bitsandbytes",)


class Quantized4bit(PrunableLinear):
    """bitsandbytes' Linear4bit: codes of 4 bits, two per byte, with a scale for each block."""

    is_quantized = True

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.module.weight.quant_state.shape)

    def matrix(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight = self.module.weight
        return dequantize_4bit(weight.data, weight.quant_state).to(torch.float32, copy=True)

    def set_weight_(self, matrix: Tensor) -> None:
        from bitsandbytes.nn import Params4bit

        weight, before = self.module.weight, self.matrix()
        if _only_dropped(before, matrix):
            self._drop_(matrix == 0)
            return
        state = weight.quant_state
        weight = Params4bit(
            matrix.to(weight.device, state.dtype),  # the move below quantizes it
            requires_grad=False,
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
            module=self.module,
        ).to(weight.device)
        self.module.weight, self.module.quant_state = weight, weight.quant_state

    def _drop_(self, mask: Tensor) -> None:
        weight = self.module.weight
        packed = weight.data.view(torch.uint8).flatten()
        zero = int((weight.quant_state.code == 0).nonzero()[0])
        high, low = mask.view(-1, 2).unbind(1)  # the first of two weights is in the high bits
        packed = torch.where(high, packed & 0x0F | zero << 4, packed)
        packed = torch.where(low, packed & 0xF0 | zero, packed)
        weight.data.view(torch.uint8).copy_(packed.view_as(weight.data.view(torch.uint8)))


class Quantized8bit(PrunableLinear):
    """bitsandbytes' Linear8bitLt: int8 with a scale for each row, the row's largest weight."""

    is_quantized = True

    def matrix(self) -> Tensor:
        codes, scale = self._codes()
        return codes.float() * (scale.float() / 127).unsqueeze(1)

    def set_weight_(self, matrix: Tensor) -> None:
        codes, scale = self._codes()
        if not _only_dropped(self.matrix(), matrix):
            largest = matrix.abs().amax(1)
            scale.copy_(torch.where(largest > 0, largest, 1))
            codes.copy_((matrix * (127 / scale).unsqueeze(1)).round())
        codes.masked_fill_(matrix == 0, 0)

    def _codes(self) -> tuple[Tensor, Tensor]:
        """Return codes (out, in) and scales (out,) from where bitsandbytes keeps them."""
        weight, state = self.module.weight, self.module.state
        return weight.data, weight.SCB if weight.SCB is not None else state.SCB


def quantized_linear(name: str, module: nn.Linear) -> PrunableLinear | None:
    """Return the module as a prunable matrix if bitsandbytes quantized it, else None."""
    weight = module.weight
    if getattr(weight, "quant_state", None) is not None:
        return Quantized4bit(name, module)
    return Quantized8bit(name, module) if hasattr(weight, "SCB") else None


def check_format(
    checkpoint: Checkpoint,
    config: Any,
    load_bit: str | None,
    changes: str | None,
    offload: str | None = None,
) -> None:
    """Raise UserError if the checkpoint's format cannot be pruned or loaded with these flags.

    `changes` is the flag that makes the run change weights, None if none does.
    """
    _, method = _stored(config)
    if method is None:
        return
    if method == packed.METHOD:
        if changes or load_bit:
            problem = f"{changes or '--load_bit'} cannot change packed linear layers"
            raise UserError(str(checkpoint), problem, f"First run {typed('unpack')} IN OUT")
        return
    if method not in DEQUANTIZED:
        raise UserError(
            str(checkpoint),
            f"its weights are quantized by {method} and cannot be pruned",
            "Name the unquantized model; --load_bit quantizes it on loading",
        )
    if load_bit:
        problem = f"{checkpoint.name} is already quantized"
        raise UserError(f"--load_bit {load_bit}", problem, "Leave the flag out")
    if offload:
        problem = f"{checkpoint.name} is quantized"
        raise UserError(f"--offload_folder {offload}", problem, "Leave the flag out")


def stored_bits(config) -> str | None:
    """Return `4` or `8` if bitsandbytes quantized the checkpoint, else None."""
    stored, method = _stored(config)
    if method not in DEQUANTIZED:
        return None
    return "4" if stored.get("load_in_4bit") else "8"


def _stored(config) -> tuple[dict, str | None]:
    """Return the checkpoint's quantization config, and its method or None."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return {}, None
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method")
    return stored, str(getattr(method, "value", method))


def _only_dropped(before: Tensor, after: Tensor) -> bool:
    return bool(((after == before) | (after == 0)).all())

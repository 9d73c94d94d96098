"""The packed 2:4 form as a format of transformers: configuration, loading and saving.

Sharding, `device_map`, dtypes and safetensors stay transformers' work. Before any weight is read
the linears named in the configuration become empty `SparseLinear`s on the meta device, and the
headers of all files are compared with them; so the dense model never exists, and a damaged file
costs no memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lib.packed.layout import packed_shapes
from lib.packed.linear import SparseLinear
from lib.util.errors import UserError

FORMAT = "packed-2:4"
VERSION = 1
# printed by a transformers that doesn't know the format: "Unknown quantization type, got ..."
METHOD = f"{FORMAT} (run `import lib.sparse` first)"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint: the format, its version and, by module path,
    the (out, in) of every packed linear."""

    def __init__(
        self,
        linears: dict[str, list[int]] | None = None,
        version: int = VERSION,
        format: str = FORMAT,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if format != FORMAT or version != VERSION:
            raise UserError(
                f"quantization_config names format {format!r}, version {version!r}: this code "
                f"reads {FORMAT!r}, version {VERSION}; update it, or save the model again"
            )
        if unknown:
            raise UserError(
                f"quantization_config has unknown entries {sorted(unknown)}: version {VERSION} of "
                f"{FORMAT!r} has only `linears`"
            )
        if not isinstance(linears, dict) or not all(_is_size(size) for size in linears.values()):
            raise UserError(
                "quantization_config: `linears` must give [out, in], `in` a multiple of 4, for "
                "every packed linear; the config is damaged, save the model again"
            )
        self.quant_method, self.format, self.version = quant_method, format, version
        self.linears = {name: list(size) for name, size in sorted(linears.items())}


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Loads and saves packed checkpoints; it never packs by itself (see lib/sparse.py)."""

    requires_calibration = True  # only checkpoints that are packed already can be loaded
    quantization_config: PackedConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        linears = self.quantization_config.linears
        for name, size in linears.items():
            linear = _find_linear(model, name)
            sparse = SparseLinear.skeleton(linear)
            if [sparse.out_features, sparse.in_features] != size:
                raise UserError(
                    f"{name} is {size[0]} x {size[1]} in quantization_config, but "
                    f"{sparse.out_features} x {sparse.in_features} in this model; "
                    "config.json belongs to another checkpoint"
                )
            model.set_submodule(name, sparse)
        check_files(checkpoint_files or [], linears)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, SparseLinear):
                try:
                    module.check()
                except UserError as error:
                    raise UserError(f"{name}: {error}") from None
        model.requires_grad_(False)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> nn.Module:
        """Every packed linear dense again, in the dtype it is stored in."""
        for name, module in list(model.named_modules()):
            if isinstance(module, SparseLinear):
                model.set_submodule(name, module.to_linear())
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict, dict]:
        """In one order, so that a model shards alike however it came about."""
        return dict(sorted(model.state_dict().items())), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def check_files(files: Iterable[str], linears: dict[str, list[int]]) -> None:
    """UserError unless safetensors files hold the packed tensors of `linears`, whole and of the
    right shapes. Reads the headers alone."""
    wanted = {}
    for name, size in linears.items():
        wanted[f"{name}.weight"], wanted[f"{name}.positions"] = packed_shapes(*size)
    found = set()
    for file in files:
        if Path(file).suffix != ".safetensors":
            raise UserError(f"{file}: only safetensors files are read; save the model again")
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    if key not in wanted:
                        continue
                    found.add(key)
                    shape = tuple(tensors.get_slice(key).get_shape())
                    if shape != wanted[key]:
                        raise UserError(f"{file}: {key} is {shape}, not {wanted[key]}")
        except SafetensorError as error:
            raise UserError(f"{file}: cut short or damaged ({error}); copy it again") from None
    missing = sorted(wanted.keys() - found)
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} packed tensors, the first is {missing[0]}; "
            "a file is missing or belongs to another checkpoint"
        )


def mark_packed_(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` write the packed checkpoint, configuration included."""
    linears = {
        name: [module.out_features, module.in_features]
        for name, module in model.named_modules()
        if isinstance(module, SparseLinear)
    }
    quantizer = PackedQuantizer(PackedConfig(linears))
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = METHOD
    quantizer.postprocess_model(model)


def card_lines(folder: str) -> list[str]:
    """How to load a packed checkpoint, for its model card."""
    return [
        "import lib.sparse  # from this project's repository; teaches transformers the packed form",
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({folder!r})",
    ]


def _is_size(size: object) -> bool:
    return (
        isinstance(size, list | tuple)
        and len(size) == 2
        and all(type(n) is int and n > 0 for n in size)
        and size[1] % 4 == 0
    )


def _find_linear(model: nn.Module, name: str) -> nn.Module:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear | Conv1D):
        raise UserError(
            f"quantization_config names {name}, which is no linear of {type(model).__name__}; "
            "config.json belongs to another model"
        )
    return linear

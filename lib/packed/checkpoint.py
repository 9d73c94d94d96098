"""The packed form as a format of transformers: configuration, loading and saving.

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

FORMAT = "packed-bitmask"
VERSION = 1
# printed by a transformers that doesn't know the format: "Unknown quantization type, got ..."
METHOD = f"{FORMAT} (run `import lib.sparse` first)"
BITS = (8, 16)  # of a kept value; 16: in the dtype of the model, whichever it is
FLOATS = ("BF16", "F16", "F32", "F64")  # of the values in files, at 16


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint: the format, its version, the bits of a kept
    value and, by module path, [out, in, how many weights are kept] of every packed linear."""

    def __init__(
        self,
        linears: dict[str, list[int]] | None = None,
        bits: int = 16,
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
                f"{FORMAT!r} has only `linears` and `bits`"
            )
        if bits not in BITS:
            raise UserError(
                f"quantization_config: `bits` is {bits!r}, not 8 or 16; the config is damaged, "
                "save the model again"
            )
        if not isinstance(linears, dict) or not all(_is_size(size) for size in linears.values()):
            raise UserError(
                "quantization_config: `linears` must give [out, in, kept] for every packed "
                "linear; the config is damaged, save the model again"
            )
        self.quant_method, self.format, self.version = quant_method, format, version
        self.bits = bits
        self.linears = {name: list(size) for name, size in sorted(linears.items())}


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Loads and saves packed checkpoints; it never packs by itself (see lib/sparse.py)."""

    requires_calibration = True  # only checkpoints that are packed already can be loaded
    quantization_config: PackedConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        linears, bits = self.quantization_config.linears, self.quantization_config.bits
        for name, (out_features, in_features, kept) in linears.items():
            sparse = SparseLinear.skeleton(_find_linear(model, name), kept, bits)
            if (sparse.out_features, sparse.in_features) != (out_features, in_features):
                raise UserError(
                    f"{name} is {out_features} x {in_features} in quantization_config, but "
                    f"{sparse.out_features} x {sparse.in_features} in this model; "
                    "config.json belongs to another checkpoint"
                )
            model.set_submodule(name, sparse)
        check_files(checkpoint_files or [], linears, bits)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, SparseLinear):
                try:
                    module.check()
                except UserError as error:
                    raise UserError(f"{name}: {error}") from None
                module.count_rows_()
        model.requires_grad_(False)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> nn.Module:
        """Every packed linear dense again, in the dtype of the model."""
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


def check_files(files: Iterable[str], linears: dict[str, list[int]], bits: int) -> None:
    """UserError unless safetensors files hold the packed tensors of `linears`, whole, of the right
    shapes and kinds. Reads the headers alone."""
    values = ("I8",) if bits == 8 else FLOATS
    kinds = {"mask": ("U8",), "weight": values, "scale": ("F32",)}
    wanted = {
        f"{name}.{part}": (shape, kinds[part])
        for name, size in linears.items()
        for part, shape in packed_shapes(*size, bits).items()
    }
    found = set()
    for file in files:
        if Path(file).suffix != ".safetensors":
            raise UserError(f"{file}: only safetensors files are read; save the model again")
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    if key in wanted:
                        found.add(key)
                        _check_header(file, key, tensors.get_slice(key), *wanted[key])
        except SafetensorError as error:
            raise UserError(f"{file}: cut short or damaged ({error}); copy it again") from None
    missing = sorted(wanted.keys() - found)
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} packed tensors, the first is {missing[0]}; "
            "a file is missing or belongs to another checkpoint"
        )


def _check_header(
    file: str, key: str, header: Any, shape: tuple[int, ...], kinds: tuple[str, ...]
) -> None:
    other = "the file is damaged or belongs to another checkpoint"
    if tuple(header.get_shape()) != shape:
        raise UserError(f"{file}: {key} is {tuple(header.get_shape())}, not {shape}; {other}")
    if header.get_dtype() not in kinds:
        allowed = " or ".join(kinds)
        raise UserError(f"{file}: {key} is {header.get_dtype()}, not {allowed}; {other}")


def mark_packed_(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` write the packed checkpoint, configuration included."""
    packed = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    (bits,) = {module.bits for module in packed.values()}
    linears = {n: [m.out_features, m.in_features, m.kept] for n, m in packed.items()}
    quantizer = PackedQuantizer(PackedConfig(linears, bits))
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
        and len(size) == 3
        and all(type(n) is int for n in size)
        and min(size[:2]) > 0
        and 0 <= size[2] <= size[0] * size[1]
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

"""The packed form as a format of transformers: configuration, loading and saving.

transformers itself handles sharding, `device_map`, dtypes and safetensors. Before any weight is
read, the layers that the configuration names become empty `SparseLinear`s on the meta device. Then
the headers of all files are compared with them, so a damaged file costs no memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import kernels
from .embedding import PackedEmbedding, PackedHead, PackedRows
from .errors import PackedError, PackedWarning
from .formats import PACKED
from .linear import PackedModule, SparseLinear

PACKAGE = "packed_bitmask"  # the name under which pip installs this package
FORMAT = "packed-bitmask"
VERSION = 2
# printed by a transformers that does not know the format: "Unknown quantization type, got ..."
METHOD = f"{FORMAT} (run `import {PACKAGE}` first)"
OTHER = "Copy the right file again"


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint.

    It holds the format, its version and the bits of a kept value. At 4 bits it has the number of
    inputs per scale (`group`, always 64). By module path, it has [out, in, kept weights] of every
    packed layer, and [rows, width] of packed embedding and head, unless tied to the other.
    """

    def __init__(
        self,
        linears: dict[str, list[int]] | None = None,
        bits: int = 16,
        group: int | None = None,
        embeddings: dict[str, list[int]] | None = None,
        version: int = VERSION,
        format: str = FORMAT,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        fmt = PACKED.get(bits) if type(bits) is int else None
        entries = {"bits": bits, "group": group, **unknown}
        sizes = _are_sizes(linears, 3) and _are_sizes(embeddings or {}, 2)
        for right, problem in (
            (
                (format, version) == (FORMAT, VERSION) and bits != 8,
                f"names {format!r}, version {version!r}, bits {bits!r}, and only {FORMAT!r}, "
                f"version {VERSION}, bits 16 and 4 can be read. Unpack it with the langprune that "
                "wrote it.",
            ),
            (fmt and group == fmt.group and not unknown, f"has {entries}. Copy config.json again."),
            (sizes, "lacks [out, in, kept] of `linears` or [rows, width] of `embeddings`."),
        ):
            if not right:
                raise PackedError(f"quantization_config {problem}")
        self.quant_method, self.format, self.version = quant_method, format, version
        self.bits, self.group = bits, group
        self.embeddings = embeddings and {name: list(size) for name, size in embeddings.items()}
        self.linears = {name: list(size) for name, size in sorted(linears.items())}

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json has them, without empty ones."""
        return {key: value for key, value in super().to_dict().items() if value is not None}


class PackedQuantizer(HfQuantizer):
    """Loads and saves packed checkpoints; it does not pack models."""

    requires_calibration = True  # only packed checkpoints can be loaded
    quantization_config: PackedConfig
    loads = False  # True: loads a checkpoint; False: saves a model that was packed here

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        config, self.loads = self.quantization_config, True
        modules = dict(model.named_modules())
        for name, (*size, nnz) in config.linears.items():
            linear, sparse = modules.get(name), None
            if isinstance(linear, nn.Linear | Conv1D):
                sparse = SparseLinear(linear, nnz, PACKED[config.bits])
            if not sparse or [sparse.out_features, sparse.in_features] != size:
                raise PackedError(
                    f"quantization_config: {name} of {size} is not a linear layer of this "
                    f"{type(model).__name__}. Use the config.json of this model."
                )
            model.set_submodule(name, sparse)
        if config.embeddings:
            packed = _replace_embeddings_(model, tied=len(config.embeddings) == 1)
            sizes = {name: list(one.weight.shape) for name, one in packed.items() if not one.tied}
            if sizes != config.embeddings:
                raise PackedError(
                    f"quantization_config: `embeddings` is {config.embeddings}, but this model has "
                    f"{sizes}. Use the config.json of this model."
                )
        files = check_files(checkpoint_files or [], config)
        for name in (*config.linears, *(config.embeddings or ())):
            model.get_submodule(name).source = f"{files[f'{name}.weight']}: {name}"

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for module in model.modules():
            if isinstance(module, PackedModule):
                module.check()
            if isinstance(module, SparseLinear):
                module.count_rows_()
        model.requires_grad_(False)
        on_cpu = all(m.weight.is_cpu for m in model.modules() if isinstance(m, SparseLinear))
        if self.loads and on_cpu and not kernels.supported():
            warnings.warn(
                "packed weights become dense: their kernels are for x86-64 processors with AVX2",
                PackedWarning,
                stacklevel=2,
            )
            self.dequantize(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> nn.Module:
        """Make every packed module dense, embedding and head too, in the dtype of the model."""
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedModule):
                model.set_submodule(name, module.to_dense())
        model.tie_weights()
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict, dict]:
        """Sort the keys so that sharding is deterministic."""
        return dict(sorted(model.state_dict().items())), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


# This package can be imported under two names, installed or as part of a larger project. Each
# import registers its own classes, and those of the last one are used.
AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
register_quantization_config(METHOD)(PackedConfig)
register_quantizer(METHOD)(PackedQuantizer)


def check_files(files: Iterable[str], config: PackedConfig) -> dict[str, str]:
    """Return the file of each packed tensor. PackedError unless safetensors files hold complete
    tensors with the names of `config`, shapes and dtypes. Reads only the headers."""
    wanted = {
        f"{name}.{part}": tensor
        for name, size in config.linears.items()
        for part, tensor in PACKED[config.bits].tensors(*size).items()
    }
    for name, (rows, width) in (config.embeddings or {}).items():
        wanted[f"{name}.weight"] = (rows, width), torch.int8
        wanted[f"{name}.scale"] = (rows,), torch.float32
    file_of: dict[str, str] = {}
    for file in files:
        if Path(file).suffix != ".safetensors":
            raise PackedError(f"{file}: only safetensors files are read. Save the model again.")
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in sorted(wanted.keys() & set(tensors.keys())):
                    file_of[key] = file
                    header, (shape, dtype) = tensors.get_slice(key), wanted[key]
                    stored = tuple(header.get_shape())
                    if stored != shape:
                        raise PackedError(f"{file}: {key} is {stored}, not {shape}. {OTHER}.")
                    kind = header[:0].dtype
                    if kind != dtype if dtype else not kind.is_floating_point:
                        right = dtype or "floating point"
                        raise PackedError(f"{file}: {key} is {kind}, not {right}. {OTHER}.")
        except SafetensorError as error:
            raise PackedError(f"{file}: it is damaged ({error}). Copy it again.") from None
    missing = sorted(wanted.keys() - file_of.keys())
    if missing:
        raise PackedError(f"the checkpoint lacks {missing[0]}. {OTHER}.")
    return file_of


def mark_packed_(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` write the packed checkpoint, including its configuration."""
    packed = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    (bits,) = {module.fmt.bits for module in packed.values()}
    linears = {n: [m.out_features, m.in_features, m.nnz] for n, m in packed.items()}
    rows = {n: m for n, m in model.named_modules() if isinstance(m, PackedRows) and not m.tied}
    embeddings = {name: list(module.weight.shape) for name, module in rows.items()}
    quantizer = PackedQuantizer(PackedConfig(linears, bits, PACKED[bits].group, embeddings or None))
    model.hf_quantizer, model.is_quantized = quantizer, True
    if conversions := getattr(model, "_weight_conversions", None):  # keep the model's names
        kept = [each for each in conversions if isinstance(each, WeightConverter)]
        model._weight_conversions = kept
    model.quantization_method = METHOD
    quantizer.postprocess_model(model)


def pack_embeddings_(model: PreTrainedModel) -> list[str]:
    """Replace embedding and head by ones with int8 rows, in place; return the names of both.

    Tied ones stay tied. Raises PackedError if the model has other kinds of them.
    """
    embedding, head = _dense_embeddings(model)
    tied = head is not None and head.weight is embedding.weight
    packed = _replace_embeddings_(model, tied)
    for module, dense in zip(packed.values(), (embedding, head), strict=False):  # head may be None
        if not module.tied:
            module.quantize_(dense.weight)
    return [*packed]


def _dense_embeddings(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear | None]:
    """Return embedding and head. PackedError if one is of a class that cannot be packed."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = head is None or getattr(type(head), "forward", None) is nn.Linear.forward
    for what, module, fine in (
        ("an embedding", embedding, isinstance(embedding, nn.Embedding)),
        ("a head", head, plain),
    ):
        if not fine:
            kind = type(module).__name__
            problem = f"{type(model).__name__} has {what} of class {kind}"
            raise PackedError(f"{problem}, which cannot be packed")
    return embedding, head


def _replace_embeddings_(model: PreTrainedModel, tied: bool) -> dict[str, PackedRows]:
    """Replace embedding and head by empty packed modules, and return these by name."""
    embedding, head = _dense_embeddings(model)
    names = {module: name for name, module in model.named_modules()}
    packed = {names[embedding]: PackedEmbedding(embedding)}
    if head is not None:
        packed[names[head]] = PackedHead(head, packed[names[embedding]] if tied else None)
    for name, module in packed.items():
        model.set_submodule(name, module)
    return packed


def card_lines(folder: str, kind: str = "AutoModelForCausalLM") -> list[str]:
    """Return the lines that load a packed checkpoint as `kind`, for its model card."""
    return [
        f"import {PACKAGE}  # registers the packed format with transformers",
        f"from transformers import {kind}",
        f"model = {kind}.from_pretrained({folder!r})",
    ]


def _are_sizes(sizes: object, length: int) -> bool:
    """Return whether this is {name: [rows, columns, number kept]} with `length` numbers each."""
    return isinstance(sizes, dict) and all(
        isinstance(size, list | tuple)
        and [type(number) for number in size] == [int] * length
        and min(size[:2]) > 0
        and 0 <= size[-1] <= size[0] * size[1]
        for size in sizes.values()
    )

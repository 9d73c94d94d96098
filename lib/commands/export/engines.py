"""The folder that is exported, and one class per engine, which writes, reads and runs NEW.

Codes and scales are not computed again. Only the embedding and head are rounded, for MLX. Packages
are imported where they are used, since each engine needs only its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from ...model.access import Checkpoint
from ...model.linears import find_linears
from ...model.pretrained import (
    decoder_blocks,
    load_config,
    load_model,
    load_tokenizer,
    skeleton,
)
from ...packed.checkpoint import METHOD
from ...packed.formats import FORMATS, GRIDS
from ...util.errors import UserError
from ...util.quirks import ROPE_BASE, ROPE_OF_FULL_ATTENTION, ROPE_SETTINGS

GRID = FORMATS["q4_0"]
Logits = Callable[[list[int]], Tensor]  # from a window's ids to (tokens, rows)
ONNX_FILE = "onnx/model_q4.onnx"  # the name in transformers.js


class GridFolder(NamedTuple):
    """A folder with weights on the grid of q4_0.

    `linears` maps each such tensor to whether it is (in, out). `model` has no weights, which are in
    `tensors`. `others` are the modules of unchanged linear layers. `plain`: no layer is in a stack
    or (in, out).
    """

    folder: Path
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    tensors: dict[str, Tensor]
    linears: dict[str, bool]
    others: list[str]
    plain: bool

    def rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield codes and scales of each linear layer. Raises UserError for one off the grid."""
        for name, transposed in self.linears.items():
            weight = self.tensors[name]
            rows = (weight.mT if transposed else weight).flatten(0, -2)
            codes, scales, off = split(rows)
            if off > 0 and (other := next((g for g in GRIDS.values() if g.holds(rows)), None)):
                raise UserError(
                    f"OUT {self.folder}: it was made with --quantize {other.name}, which only "
                    f"llama.cpp and ollama run. Use gguf with --type {other.name}."
                )
            if not off == 0:  # also rejects nan
                raise UserError(
                    f"OUT {self.folder}: a weight of {name} is {off / rows.abs().max():.1%} of "
                    "the largest off the grid of q4_0. Make the folder with --quantize q4_0."
                )
            yield codes, scales

    def copy_settings(self, new: Path, **fields: Any) -> None:
        """Copy the tokenizer and the configs, with more `fields` in config.json."""
        for file in self.folder.iterdir():
            if file.suffix in (".json", ".jinja", ".model") and "safetensors" not in file.name:
                shutil.copy2(file, new)
        config = json.loads((self.folder / "config.json").read_text("utf-8")) | fields
        (new / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")


def open_folder(path: str) -> GridFolder:
    """Read a folder. Raises UserError if it cannot be exported."""
    if not Path(path).is_dir():
        raise UserError(f"OUT {path}: no such folder exists. Name another.")
    checkpoint = Checkpoint(path, "OUT")
    config = load_config(checkpoint)
    if how := (getattr(config, "quantization_config", None) or {}).get("quant_method"):
        what = "packed" if how == METHOD else f"quantized by {how}"
        raise UserError(f"OUT {path}: its weights are {what}. Name a folder of --quantize q4_0.")
    model = skeleton(config, checkpoint)
    prefix, blocks = decoder_blocks(model)
    names, plain = {}, True
    for index, block in enumerate(blocks):
        for each in find_linears(block, f"{prefix}.{index}")[0]:
            if GRID.takes(each.shape[1]):
                names[each.parameter_name] = each.transposed
                plain &= each.expert is None and not each.transposed
    stored = revert_weight_conversion(model, {name: model.get_parameter(name) for name in names})
    modules = dict(model.named_modules())
    others = [
        n for n in modules if isinstance(modules[n], nn.Linear) and f"{n}.weight" not in names
    ]
    linears = {name: names.get(name, False) for name in stored}
    tokenizer, tensors = load_tokenizer(checkpoint), tensors_of(Path(path))
    return GridFolder(Path(path), model, tokenizer, tensors, linears, others, plain)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder, which are read from its files when they are used."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def split(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes int8 (out, in) and scales float32 (out, groups) of rows, by ggml's rule.

    Also returns the largest distance of a weight from these, 0 for rows on the grid.
    """
    blocks = rows.float().reshape(len(rows), -1, GRID.group)
    scales = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)).squeeze(2) / GRID.lowest
    scales.masked_fill_(scales == 0, -1)  # any scale fits a block of zeros
    codes = GRID.codes(rows, scales)
    values = codes.float() * GRID.spread_scales(scales, codes.shape[1])
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


def load_transformers(folder: Path, tables: Sequence[Tensor] = ()) -> tuple[Logits, Sequence]:
    """Load a model to run it; `tables` replace its embedding and, if there are two, its head.

    As each engine's `load`, it returns a function for logits, and the tables that are rounded.
    """
    checkpoint = Checkpoint(str(folder), "OUT")
    how = dict(dtype=torch.float32, device_map={"": "cpu"})
    model = load_model(checkpoint, load_config(checkpoint), **how)
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    for module, table in zip(both, tables, strict=False):
        module.weight.data = table

    @torch.no_grad()
    def logits(window: list[int]) -> Tensor:
        return model(torch.tensor([window]), use_cache=False).logits[0]

    return logits, tables


class CompressedTensors:
    """`pack-quantized` of the library compressed-tensors, for vLLM, SGLang and transformers."""

    packages = ("compressed_tensors",)
    stacks = False  # whether it supports stacks of experts and layers that are (in, out)
    requirements = "requirements-vllm.txt"
    changed = "no value"
    not_run = "vLLM and SGLang, which load the same files"
    how = "vllm serve {}  # CPUs with AMX round activations, unless VLLM_CPU_INT4_W4A8=0 is set"
    load = staticmethod(load_transformers)

    def write(self, source: GridFolder, new: Path) -> None:
        tensors = dict(source.tensors)
        for name in source.linears:
            weight = tensors.pop(name)
            codes, scales, _ = split(weight)
            tensors[f"{name}_packed"] = packed_bytes(codes).view(torch.int32)
            tensors[f"{name}_scale"] = scales.to(weight.dtype)
            tensors[f"{name}_shape"] = torch.tensor(weight.shape)
        save_torch_state_dict(tensors, new)
        weights = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
        config = dict(quant_method="compressed-tensors", format="pack-quantized")
        config |= dict(quantization_status="compressed", ignore=source.others)
        config |= dict(config_groups={"group_0": dict(targets=["Linear"], weights=weights)})
        source.copy_settings(new, quantization_config=config)

    def stored(self, new: Path) -> Iterator[tuple[Tensor, Tensor]]:
        tensors = tensors_of(new)
        for name in (name for name in tensors if name.endswith("_packed")):
            yield codes_of(tensors[name]), tensors[name.removesuffix("_packed") + "_scale"]


class Mlx:
    """mlx-lm's folders: codes plus 8, and for every 32 inputs a scale d and a bias -8 d."""

    packages = ("mlx", "mlx_lm")
    stacks = True
    requirements = "requirements-mlx.txt"
    changed = "only its embedding and head, to 8 bits"
    not_run = "Apple's GPUs; on a CPU, bfloat16 rounds the weights"
    how = "mlx_lm.generate --model {} --prompt TEXT"

    def write(self, source: GridFolder, new: Path) -> None:
        import mlx.core as mx
        from mlx.utils import tree_unflatten
        from mlx_lm.utils import load_model, save_model

        rope = getattr(source.model.config.get_text_config(), "rope_parameters", None) or {}
        rope = rope.get(ROPE_OF_FULL_ATTENTION, rope)
        names = {ROPE_BASE: rope[ROPE_BASE]} if ROPE_BASE in rope else {}
        if rope.get("rope_type", "default") != "default":
            names[ROPE_SETTINGS] = rope
        model, _ = load_model(source.folder, lazy=True, model_config=names)
        vocabulary, how, changed = source.model.config.get_text_config().vocab_size, {}, []
        for path, module in model.named_modules():
            if not hasattr(module, "to_quantized") or module.weight.shape[-1] % GRID.group:
                continue
            weight = torch.from_numpy(np.array(module.weight.astype(mx.float32)))
            codes, scales, off = split(weight.flatten(0, -2))
            if off == 0:
                dtype, module = module.weight.dtype, module.to_quantized(GRID.group, 4)
                packed = mx.array(packed_bytes(codes).view(torch.int32).numpy()).view(mx.uint32)
                steps = mx.array(scales.numpy()).reshape(module.scales.shape)
                module.weight = packed.reshape(module.weight.shape)
                module.scales, module.biases = steps.astype(dtype), (-8 * steps).astype(dtype)
            elif len(weight) == vocabulary:
                how[path] = dict(group_size=32 if weight.shape[1] % 64 else 64, bits=8)
                module = module.to_quantized(**how[path])
            else:
                continue
            changed.append((path, module))
        model.update_modules(tree_unflatten(changed))
        save_model(new, model)
        how |= dict(group_size=GRID.group, bits=4)
        source.copy_settings(new, quantization=how, quantization_config=how, **names)

    def stored(self, new: Path) -> Iterator[tuple[Tensor, Tensor]]:
        eight = json.loads((new / "config.json").read_text("utf-8"))["quantization"]
        tensors = tensors_of(new)
        for path in (name.removesuffix(".scales") for name in tensors if name.endswith(".scales")):
            if path not in eight:
                parts = (tensors[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
                packed, scales, biases = (part.flatten(0, -2) for part in parts)
                yield codes_of(packed), scales.where(biases == -8 * scales, torch.nan)

    def load(self, folder: Path) -> tuple[Logits, Sequence]:
        import mlx.core as mx
        import mlx.nn as nn
        from mlx_lm.utils import load_model

        model, _ = load_model(folder)
        model.set_dtype(mx.float32)
        modules = [m for _, m in model.named_modules() if getattr(m, "bits", None) == 8]
        tables = [
            torch.from_numpy(np.array(mx.dequantize(m.weight, m.scales, m.biases, m.group_size, 8)))
            for m in sorted(modules, key=lambda m: isinstance(m, nn.QuantizedLinear))
        ]
        return lambda ids: torch.from_numpy(np.array(model(mx.array([ids]))[0])), tables


class Onnx:
    """ONNX Runtime's MatMulNBits, by the builder of onnxruntime-genai; for transformers.js too."""

    packages = ("onnxruntime_genai", "onnx_ir")
    stacks = False
    requirements = "requirements-onnx.txt"
    changed = "no value"
    not_run = "transformers.js and WebGPU, which load the same file"
    how = (
        'await (await pipeline("text-generation", "USER/{}", {{dtype: "q4"}}))("TEXT", '
        "{{add_special_tokens: true}})  // transformers.js; without the option it adds no BOS"
    )

    def write(self, source: GridFolder, new: Path) -> None:
        import onnx
        from onnxruntime.quantization import matmul_nbits_quantizer as quantizer
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        original = quantizer.DefaultWeightOnlyQuantizer.quantize_matmul

        # the builder quantizes weights on the grid by ggml's rule; others stay
        def on_grid(own: Any, node: Any, graphs: Any) -> Any:
            weight, _ = quantizer.get_initializer(node.input[1], graphs)
            if weight is None or len(weight.dims) != 2 or weight.dims[0] % GRID.group:
                return [node]
            rows = torch.tensor(onnx.numpy_helper.to_array(weight)).T
            return original(own, node, graphs) if split(rows)[2] == 0 else [node]

        target = new / ONNX_FILE
        target.parent.mkdir()
        options = "block_size=32 is_symmetric=true accuracy_level=1 algo_config=default "
        options += f"hf_token=false op_types_to_quantize=MatMul filename={ONNX_FILE} "
        options += "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"
        where = ("", str(source.folder), str(new), "int4", "cpu", f"{new}/cache")
        with mock.patch.object(quantizer.DefaultWeightOnlyQuantizer, "quantize_matmul", on_grid):
            create_model(*where, **parse_extra_options(*where, options.split()))
        settings = json.loads((new / "genai_config.json").read_text("utf-8"))["model"]["decoder"]
        model = onnx.load(target)
        Path(f"{target}.data").unlink()
        # transformers.js needs a number for the dimension that the builder only names
        for value in (*model.graph.input, *model.graph.output):
            if value.name.startswith(("past_key_values.", "present.")):
                value.type.tensor_type.shape.dim[3].dim_value = settings["head_size"]
        large = model.ByteSize() > 2**31 - 2**20  # more than one file can hold
        onnx.save(model, target, save_as_external_data=large, location=f"{target.name}_data")
        source.copy_settings(new)

    def stored(self, new: Path) -> Iterator[tuple[Tensor, Tensor]]:
        import onnx

        graph = onnx.load(new / ONNX_FILE).graph
        arrays = {each.name: each for each in graph.initializer}
        for node in (node for node in graph.node if node.op_type == "MatMulNBits"):
            packed, scales = (
                torch.tensor(onnx.numpy_helper.to_array(arrays[name])) for name in node.input[1:3]
            )
            yield codes_of(packed.flatten(1)), scales.view(len(packed), -1)

    def load(self, folder: Path) -> tuple[Logits, Sequence]:
        import onnxruntime_genai as og

        model = og.Model(str(folder))

        def logits(window: list[int]) -> Tensor:
            settings = og.GeneratorParams(model)
            settings.set_search_options(max_length=len(window) + 1)
            generator = og.Generator(model, settings)
            generator.append_tokens(window)
            return torch.tensor(generator.get_output("logits")[0])

        return logits, ()


ENGINES = {"compressed-tensors": CompressedTensors(), "mlx": Mlx(), "onnx": Onnx()}

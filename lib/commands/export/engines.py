"""One class per engine, which writes, reads and runs NEW.

Packages, torch too, are imported where they are used: each engine needs only its own, and a wrong
flag is refused at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from ...util.quirks import ROPE_BASE, ROPE_OF_FULL_ATTENTION, ROPE_SETTINGS

if TYPE_CHECKING:
    from torch import Tensor

    from ...model.folder import ModelFolder
    from .codes import Logits

ONNX_FILE = "onnx/model_q4.onnx"  # the name in transformers.js


class CompressedTensors:
    """`pack-quantized` of the library compressed-tensors, for vLLM, SGLang and transformers."""

    packages = ("compressed_tensors",)
    stacks = False  # whether it supports stacks of experts and layers that are (in, out)
    requirements = "requirements-vllm.txt"
    changed = "no value"
    not_run = "vLLM and SGLang, which load the same files"
    how = "vllm serve {}  # CPUs with AMX round activations, unless VLLM_CPU_INT4_W4A8=0 is set"

    def write(self, source: ModelFolder, new: Path) -> None:
        import torch
        from huggingface_hub import save_torch_state_dict

        from .codes import packed_bytes, split

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
        from ...model.folder import tensors_of
        from .codes import codes_of

        tensors = tensors_of(new)
        for name in (name for name in tensors if name.endswith("_packed")):
            yield codes_of(tensors[name]), tensors[name.removesuffix("_packed") + "_scale"]

    def load(self, folder: Path) -> tuple[Logits, Sequence[Tensor]]:
        from .codes import load_transformers

        return load_transformers(folder), ()


class Mlx:
    """mlx-lm's folders: codes plus 8, and for every 32 inputs a scale d and a bias -8 d."""

    packages = ("mlx", "mlx_lm")
    stacks = True
    requirements = "requirements-mlx.txt"
    changed = "only its embedding and head, to 8 bits"
    not_run = "Apple's GPUs; on a CPU, bfloat16 rounds the weights"
    how = "mlx_lm.generate --model {} --prompt TEXT"

    def write(self, source: ModelFolder, new: Path) -> None:
        import mlx.core as mx
        import numpy as np
        import torch
        from mlx.utils import tree_unflatten
        from mlx_lm.utils import load_model, save_model

        from .codes import GRID, packed_bytes, split

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
        import torch

        from ...model.folder import tensors_of
        from .codes import codes_of

        eight = json.loads((new / "config.json").read_text("utf-8"))["quantization"]
        tensors = tensors_of(new)
        for path in (name.removesuffix(".scales") for name in tensors if name.endswith(".scales")):
            if path not in eight:
                parts = (tensors[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
                packed, scales, biases = (part.flatten(0, -2) for part in parts)
                yield codes_of(packed), scales.where(biases == -8 * scales, torch.nan)

    def load(self, folder: Path) -> tuple[Logits, Sequence[Tensor]]:
        import mlx.core as mx
        import mlx.nn as nn
        import numpy as np
        import torch
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

    def write(self, source: ModelFolder, new: Path) -> None:
        import onnx
        import torch
        from onnxruntime.quantization import matmul_nbits_quantizer as quantizer
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        from .codes import GRID, split

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
        import torch

        from .codes import codes_of

        graph = onnx.load(new / ONNX_FILE).graph
        arrays = {each.name: each for each in graph.initializer}
        for node in (node for node in graph.node if node.op_type == "MatMulNBits"):
            packed, scales = (
                torch.tensor(onnx.numpy_helper.to_array(arrays[name])) for name in node.input[1:3]
            )
            yield codes_of(packed.flatten(1)), scales.view(len(packed), -1)

    def load(self, folder: Path) -> tuple[Logits, Sequence[Tensor]]:
        import onnxruntime_genai as og
        import torch

        model = og.Model(str(folder))

        def logits(window: list[int]) -> Tensor:
            settings = og.GeneratorParams(model)
            settings.set_search_options(max_length=len(window) + 1)
            generator = og.Generator(model, settings)
            generator.append_tokens(window)
            return torch.tensor(generator.get_output("logits")[0])

        return logits, ()


ENGINES = {"compressed-tensors": CompressedTensors(), "mlx": Mlx(), "onnx": Onnx()}

"""The engines, one class each: what it can't hold, its folder written, read back and run.

Codes and scales are given, so nothing is rounded but what `GridFolder.others` and the embedding are
rounded to. Packages are imported where they are used: each engine needs its own alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from lib.commands.export.source import GRID, GridFolder, codes_of, packed_bytes, split, values_of
from lib.commands.gguf.llama_cpp import run_child

NEW_TOKENS = 32
# a model that is loaded: logits (tokens, rows) of a window, and the tokens that follow a prompt
Loaded = tuple[Callable[[list[int]], Tensor], Callable[[list[int]], list[int]]]


def load_transformers(folder: Path, dtype: str | torch.dtype = "auto") -> Loaded:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    model.generation_config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False)

    def complete(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        return model.generate(ids, attention_mask=ids >= 0)[0, len(prompt) :].tolist()

    def logits(window: list[int]) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([window]), use_cache=False).logits[0].float()

    return logits, complete


class CompressedTensors:
    """vLLM, SGLang and transformers: `pack-quantized` of the library compressed-tensors."""

    packages = ("compressed_tensors",)
    requirements = "requirements-vllm.txt"
    dtype: ClassVar = "auto"  # in which the folder runs beside this one
    limit = 0.0  # transformers makes the same matrices of it
    not_run = "vLLM and SGLang, which load the same files"
    rounded = ""
    how = "vllm serve {}  # on a CPU with AMX set VLLM_CPU_INT4_W4A8=0: else it rounds activations"
    load = staticmethod(load_transformers)

    @staticmethod
    def lacks(source: GridFolder) -> str:
        if any(source.linears.values()):
            return "linears that stand as (in, out), as GPT-2's"
        return "experts" if source.has_experts else ""

    @staticmethod
    def write(source: GridFolder, new: Path) -> None:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
        )

        tensors = {name: source.tensor(name) for name in source.files if name not in source.linears}
        for name in source.linears:
            weight = source.tensor(name)
            codes, scales = split(weight)
            tensors[f"{name}_packed"] = pack_to_int32(codes, 4)
            tensors[f"{name}_scale"] = scales.to(weight.dtype)
            tensors[f"{name}_shape"] = torch.tensor(weight.shape)
        save_torch_state_dict(tensors, new)
        numbers = QuantizationArgs(num_bits=4, group_size=GRID.group, strategy="group")
        config = QuantizationConfig(
            config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=numbers)},
            format="pack-quantized",
            quantization_status="compressed",
            ignore=source.others,
        )
        source.copy_files(new, quantization_config=config.model_dump(mode="json"))

    @staticmethod
    def stored(new: Path) -> Iterator[tuple[Tensor, Tensor]]:
        for file in new.glob("*.safetensors"):
            tensors = load_file(file)
            for name in (name for name in tensors if name.endswith("_packed")):
                scales = tensors[name.replace("_packed", "_scale")]
                yield codes_of(tensors[name]), scales


class Mlx:
    """mlx-lm on Apple's processors: codes plus 8, scale d and bias -8 d for 32 inputs."""

    packages = ("mlx", "mlx_lm")
    requirements = "requirements-mlx.txt"
    dtype: ClassVar = torch.float32
    limit = 0.03  # of embedding and head in 8 bits
    not_run = "Apple's GPUs (mlx-lm was run on a CPU, in float32; there bfloat16 rounds weights)"
    rounded = "embedding and head, to 8 bits"
    how = "mlx_lm.generate --model {} --prompt TEXT"

    @staticmethod
    def lacks(source: GridFolder) -> str:
        from mlx_lm.utils import MODEL_REMAPPING

        kind = source.config.model_type
        known = find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}")
        return "" if known else f"models of the kind {kind}"

    @staticmethod
    def write(source: GridFolder, new: Path) -> None:
        import mlx.core as mx
        from mlx.utils import tree_unflatten
        from mlx_lm.utils import load_model, save_model

        model, _ = load_model(source.folder, lazy=True)
        rows, how, changed = source.config.get_text_config().vocab_size, {}, []
        for path, module in model.named_modules():
            if not hasattr(module, "to_quantized") or module.weight.shape[-1] % GRID.group:
                continue
            weight = torch.from_numpy(np.array(module.weight.astype(mx.float32)))
            codes, scales = split(weight.flatten(0, -2))
            if torch.equal(values_of(codes, scales), weight.flatten(0, -2)):
                dtype, module = module.weight.dtype, module.to_quantized(GRID.group, 4)
                packed = mx.array(packed_bytes(codes).view(torch.int32).numpy())
                module.weight = packed.view(mx.uint32).reshape(module.weight.shape)
                scales = mx.array(scales.numpy()).reshape(module.scales.shape)
                module.scales, module.biases = scales.astype(dtype), (-8 * scales).astype(dtype)
            elif len(weight) == rows:  # embedding and head
                how[path] = {"group_size": 64 if weight.shape[1] % 64 == 0 else 32, "bits": 8}
                module = module.to_quantized(**how[path])
            else:
                continue
            changed.append((path, module))
        model.update_modules(tree_unflatten(changed))
        save_model(new, model)
        how |= {"group_size": GRID.group, "bits": 4}
        source.copy_files(new, quantization=how, quantization_config=how)

    @staticmethod
    def stored(new: Path) -> Iterator[tuple[Tensor, Tensor]]:
        eight = json.loads((new / "config.json").read_text("utf-8"))["quantization"]
        for file in new.glob("*.safetensors"):
            tensors = load_file(file)
            for name in (name for name in tensors if name.endswith(".scales")):
                path = name.removesuffix(".scales")
                if path not in eight:
                    parts = (tensors[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
                    packed, scales, biases = (part.flatten(0, -2) for part in parts)
                    right = biases == GRID.lowest * scales
                    yield codes_of(packed), scales.float().where(right, torch.nan)

    @staticmethod
    def load(folder: Path) -> Loaded:
        import mlx.core as mx
        from mlx.utils import tree_map
        from mlx_lm.generate import generate_step
        from mlx_lm.utils import load_model

        def exact(array: mx.array) -> mx.array:
            return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array

        model, _ = load_model(folder)
        model.update(tree_map(exact, model.parameters()))

        def complete(prompt: list[int]) -> list[int]:
            steps = generate_step(mx.array(prompt), model, max_tokens=NEW_TOKENS)
            return [int(token) for token, _ in steps]

        return lambda window: torch.from_numpy(np.array(model(mx.array([window]))[0])), complete


class Onnx:
    """ONNX Runtime and transformers.js: MatMulNBits, by the builder of onnxruntime-genai."""

    packages = ("onnxruntime_genai", "onnx", "onnx_ir")
    requirements = "requirements-onnx.txt"
    dtype: ClassVar = torch.float32
    limit = 0.001  # of sums in another order
    not_run = "transformers.js and WebGPU, which load the same file"
    rounded = ""
    how = (
        "node -e 'import(\"@huggingface/transformers\").then(async (t) => console.log("
        'await (await t.pipeline("text-generation", "USER/{}", {{dtype: "q4"}}))("TEXT")))\''
    )
    file = "onnx/model_q4.onnx"  # as transformers.js names it

    @staticmethod
    def lacks(source: GridFolder) -> str:
        (package,) = find_spec("onnxruntime_genai").submodule_search_locations
        kind = (source.config.architectures or ["?"])[0]
        known = f'"{kind}"' in Path(package, "models/builder.py").read_text("utf-8")
        return "experts" if source.has_experts else "" if known else f"models of the class {kind}"

    @staticmethod
    def write(source: GridFolder, new: Path) -> None:
        source.copy_files(new)
        what = f"OUT {source.folder}: onnxruntime-genai's builder"
        run_child(what, build, folder=str(source.folder), new=str(new), file=Onnx.file)

    @staticmethod
    def stored(new: Path) -> Iterator[tuple[Tensor, Tensor]]:
        import onnx

        graph = onnx.load(new / Onnx.file).graph
        tensors = {each.name: each for each in graph.initializer}
        for node in graph.node:
            if node.op_type == "MatMulNBits":
                packed, scales = (
                    torch.tensor(onnx.numpy_helper.to_array(tensors[name]))
                    for name in node.input[1:3]
                )
                yield codes_of(packed.flatten(1)), scales.view(len(packed), -1)

    @staticmethod
    def load(folder: Path) -> Loaded:
        import onnxruntime_genai as og

        model = og.Model(str(folder))

        def generator(prompt: list[int], more: int) -> Any:
            settings = og.GeneratorParams(model)
            settings.set_search_options(max_length=len(prompt) + more, do_sample=False)
            started = og.Generator(model, settings)
            started.append_tokens(prompt)
            return started

        def logits(window: list[int]) -> Tensor:
            return torch.from_numpy(generator(window, 1).get_output("logits")[0])

        def complete(prompt: list[int]) -> list[int]:
            started = generator(prompt, NEW_TOKENS)
            while not started.is_done():
                started.generate_next_token()
            return started.get_sequence(0)[len(prompt) :].tolist()

        return logits, complete


def build(folder: str, new: str, file: str) -> None:
    """Let the builder write `file` into the folder `new`; called in a process of its own.

    It rounds by ggml's rule what is on the grid and nothing else. transformers.js needs a number
    where the builder names the dimension of the heads.
    """
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizer
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    original = quantizer.DefaultWeightOnlyQuantizer.quantize_matmul

    def on_grid(self: Any, node: Any, graphs: Any) -> Any:
        weight, _ = quantizer.get_initializer(node.input[1], graphs)
        if weight is None or len(weight.dims) != 2 or weight.dims[0] % GRID.group:
            return [node]
        rows = torch.tensor(quantizer.ir.from_proto(weight).numpy().astype(np.float32)).T
        exact = torch.equal(values_of(*split(rows)), rows)
        return original(self, node, graphs) if exact else [node]

    options = ["block_size=32", "is_symmetric=true", "accuracy_level=1", "algo_config=default"]
    options += ["op_types_to_quantize=MatMul", "hf_token=false"]
    options += ["nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"]
    where = ("", folder, new, "int4", "cpu", f"{new}/cache")
    with mock.patch.object(quantizer.DefaultWeightOnlyQuantizer, "quantize_matmul", on_grid):
        create_model(*where, **parse_extra_options(*where, options))
    settings = Path(new, "genai_config.json")
    fields = json.loads(settings.read_text("utf-8"))
    model = onnx.load(Path(new, "model.onnx"))
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = fields["model"]["decoder"]["head_size"]
    target = Path(new, file)
    target.parent.mkdir()
    large = model.ByteSize() > 2**31 - 2**20  # what one file holds
    onnx.save(model, target, save_as_external_data=large, location=f"{target.name}_data")
    fields["model"]["decoder"]["filename"] = file
    settings.write_text(json.dumps(fields, indent=4), "utf-8")
    for old in Path(new).glob("model.onnx*"):
        old.unlink()


ENGINES = {"compressed-tensors": CompressedTensors, "mlx": Mlx, "onnx": Onnx}

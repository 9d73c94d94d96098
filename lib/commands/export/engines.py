"""The engines, a class each: its folder written, read back and run in float32.

Codes and scales are given: nothing is rounded but MLX's embedding and head. Packages are imported
where they are used, since each engine needs its own alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from lib.commands.export.source import GRID, GridFolder, codes_of, packed_bytes, split
from lib.commands.gguf.llama_cpp import run_child

NEW_TOKENS = 32


class Loaded(NamedTuple):
    """A model that runs: logits (tokens, rows) of a window, and the tokens that follow a prompt.

    `tables` are the embedding, and the head if it has one of its own, where these are rounded.
    """

    logits: Callable[[list[int]], Tensor]
    complete: Callable[[list[int]], list[int]]
    tables: Sequence[Tensor] = ()


def load_transformers(folder: Path, tables: Sequence[Tensor] = ()) -> Loaded:
    how = dict(dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    for module, table in zip(both, tables, strict=False):
        module.weight.data = table
    model.generation_config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False)

    def complete(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        return model.generate(ids, attention_mask=ids >= 0)[0, len(prompt) :].tolist()

    @torch.no_grad()
    def logits(window: list[int]) -> Tensor:
        return model(torch.tensor([window]), use_cache=False).logits[0]

    return Loaded(logits, complete)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


class CompressedTensors:
    """`pack-quantized` of the library compressed-tensors, for vLLM, SGLang and transformers."""

    packages = ("compressed_tensors",)
    stacks = False  # whether it takes stacks of experts, and linears that are (in, out)
    requirements = "requirements-vllm.txt"
    changed = "no value"
    not_run = "vLLM and SGLang, which load the same files"
    how = "vllm serve {}  # a CPU with AMX rounds activations, unless VLLM_CPU_INT4_W4A8=0 is set"
    load = staticmethod(load_transformers)

    def write(self, source: GridFolder, new: Path) -> None:
        tensors = {name: source.tensor(name) for name in source.files if name not in source.linears}
        for name in source.linears:
            weight = source.tensor(name)
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


def older_names(config: PretrainedConfig) -> dict[str, Any]:
    """RoPE's settings under their names before transformers 5, which most of mlx-lm reads."""
    rope = getattr(config, "rope_parameters", None) or {}
    whole, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    fields = {
        "rope_theta": whole.get("rope_theta"),
        "rope_local_base_freq": local.get("rope_theta"),
    }
    fields["rope_scaling"] = None if whole.get("rope_type") == "default" else whole
    return {name: value for name, value in fields.items() if value}


class Mlx:
    """mlx-lm's folders: codes plus 8, and for 32 inputs a scale d and a bias -8 d."""

    packages = ("mlx", "mlx_lm")
    stacks = True
    requirements = "requirements-mlx.txt"
    changed = "its embedding and head alone, now in 8 bits"
    not_run = (
        "Apple's GPUs; on a CPU, where this was proven in float32, bfloat16 rounds the weights"
    )
    how = "mlx_lm.generate --model {} --prompt TEXT"

    def write(self, source: GridFolder, new: Path) -> None:
        import mlx.core as mx
        from mlx.utils import tree_unflatten
        from mlx_lm.utils import load_model, save_model

        names = older_names(source.config.get_text_config())
        model, _ = load_model(source.folder, lazy=True, model_config=names)
        vocabulary, how, changed = source.config.get_text_config().vocab_size, {}, []
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

    def load(self, folder: Path) -> Loaded:
        import mlx.core as mx
        import mlx.nn as nn
        from mlx_lm.generate import generate_step
        from mlx_lm.utils import load_model

        def complete(prompt: list[int]) -> list[int]:
            steps = generate_step(mx.array(prompt), model, max_tokens=NEW_TOKENS)
            return [int(token) for token, _ in steps]

        model, _ = load_model(folder)
        model.set_dtype(mx.float32)
        modules = [m for _, m in model.named_modules() if getattr(m, "bits", None) == 8]
        tables = [
            torch.from_numpy(np.array(mx.dequantize(m.weight, m.scales, m.biases, m.group_size, 8)))
            for m in sorted(modules, key=lambda m: isinstance(m, nn.QuantizedLinear))
        ]
        return Loaded(
            lambda ids: torch.from_numpy(np.array(model(mx.array([ids]))[0])), complete, tables
        )


class Onnx:
    """ONNX Runtime's MatMulNBits, by the builder of onnxruntime-genai; for transformers.js too."""

    packages = ("onnxruntime_genai", "onnx_ir")
    stacks = False
    requirements = "requirements-onnx.txt"
    changed = "no value"
    not_run = "transformers.js and WebGPU, which load the same file"
    how = (
        'await (await pipeline("text-generation", "USER/{}", {{dtype: "q4"}}))("TEXT", '
        "{{add_special_tokens: true}})  // in transformers.js, which else adds no BOS"
    )

    def write(self, source: GridFolder, new: Path) -> None:
        what = f"OUT {source.folder}: onnxruntime-genai's builder"
        run_child(what, build, folder=str(source.folder), new=str(new))
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

    def load(self, folder: Path) -> Loaded:
        import onnxruntime_genai as og

        model = og.Model(str(folder))

        def started(prompt: list[int], more: int) -> Any:
            settings = og.GeneratorParams(model)
            settings.set_search_options(max_length=len(prompt) + more, do_sample=False)
            generator = og.Generator(model, settings)
            generator.append_tokens(prompt)
            return generator

        def complete(prompt: list[int]) -> list[int]:
            generator = started(prompt, NEW_TOKENS)
            while not generator.is_done():
                generator.generate_next_token()
            return generator.get_sequence(0)[len(prompt) :].tolist()

        return Loaded(lambda ids: torch.tensor(started(ids, 1).get_output("logits")[0]), complete)


ONNX_FILE = "onnx/model_q4.onnx"  # as transformers.js names it


def build(folder: str, new: str) -> None:
    """Let the builder write into the folder `new`; called in a process of its own.

    What is on the grid it rounds by ggml's rule; the rest stays. transformers.js needs a number
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
        rows = torch.tensor(onnx.numpy_helper.to_array(weight)).T
        return original(self, node, graphs) if split(rows)[2] == 0 else [node]

    options = "block_size=32 is_symmetric=true accuracy_level=1 algo_config=default hf_token=false "
    options += "op_types_to_quantize=MatMul "
    options += "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"
    where = ("", folder, new, "int4", "cpu", f"{new}/cache")
    with mock.patch.object(quantizer.DefaultWeightOnlyQuantizer, "quantize_matmul", on_grid):
        create_model(*where, **parse_extra_options(*where, options.split()))
    settings = Path(new, "genai_config.json")
    fields = json.loads(settings.read_text("utf-8"))
    decoder = fields["model"]["decoder"]
    model = onnx.load(Path(new, decoder["filename"]))
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = decoder["head_size"]
    for file in Path(new).glob(f"{decoder['filename']}*"):
        file.unlink()
    target = Path(new, ONNX_FILE)
    target.parent.mkdir()
    large = model.ByteSize() > 2**31 - 2**20  # what one file can't hold
    onnx.save(model, target, save_as_external_data=large, location=f"{target.name}_data")
    decoder["filename"] = ONNX_FILE
    settings.write_text(json.dumps(fields, indent=2), "utf-8")


ENGINES = {"compressed-tensors": CompressedTensors(), "mlx": Mlx(), "onnx": Onnx()}

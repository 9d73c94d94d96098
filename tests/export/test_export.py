"""A folder on the grid of q4_0 for other engines: no code, no scale and no prediction changes."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from support import refused, representative, runner_of, weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from lib.commands.export import codes, engines
from lib.commands.export.__main__ import check_installed, main
from lib.formats.registry import FORMATS
from lib.model.folder import ModelFolder
from lib.packed.checkpoint import METHOD
from lib.util.errors import UserError

GRID = FORMATS["q4_0"]
WIDE = dict(hidden_size=64, intermediate_size=72, head_dim=16)  # down_proj's rows are no blocks
ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))
MODELS = {  # name: (kind, fields, engines)
    "LLaMA": ("llama", WIDE | ROPE, ["compressed-tensors", "mlx", "onnx"]),
    "tied": ("llama", WIDE | dict(tie_word_embeddings=True), ["compressed-tensors", "mlx", "onnx"]),
    "biases": ("qwen2", dict(hidden_size=64), ["compressed-tensors", "mlx", "onnx"]),
    "GPT-2": ("gpt2", dict(hidden_size=64), []),
    "Mixtral": ("mixtral", WIDE | tiny.EXPERTS, ["mlx"]),
    "BLOOM": ("bloom", {}, []),
}
CASES = [(name, engine) for name, (*_, those) in MODELS.items() for engine in those]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model as `--quantize q4_0` saves it."""
    made = {}
    for name, (kind, fields, _) in MODELS.items():
        model = tiny.build(kind, **fields).requires_grad_(False)
        for linear in runner_of(model).each_linear():
            if GRID.supports_width(linear.shape[1]):
                linear.set_weight_(GRID.nearest(linear.matrix()))
        folder = tmp_path_factory.mktemp("grid") / name
        made[name] = tiny.write_model(folder, model.to(torch.bfloat16))
    return made


def needs(engine: str) -> None:
    for package in engines.ENGINES[engine].packages:
        if find_spec(package) is None:
            pytest.skip(f"needs the engine's package {package}")


def matrices(folder: Path) -> list[Tensor]:
    """The linears of a folder, float32 (out, in)."""
    source = ModelFolder.open(str(folder), "OUT")
    named = ((source.tensors[name].float(), turned) for name, turned in source.linears.items())
    return [weight.T if turned else weight for weight, turned in named]


def dequantized(engine: str, new: Path) -> list[Tensor]:
    """The linears of 4 bits as the engine's own code reads them, float32 (out, in)."""
    if engine == "compressed-tensors":
        model = AutoModelForCausalLM.from_pretrained(new, dtype="auto")
        model(torch.tensor([[3, 4]]))
        names = (name for name in weights(new) if name.endswith("_packed"))
        return [model.get_parameter(name.removesuffix("_packed")).float() for name in names]
    if engine == "mlx":
        import mlx.core as mx
        from mlx_lm.utils import load_model

        modules = [module for _, module in load_model(new)[0].named_modules()]
        found = []
        for module in (one for one in modules if getattr(one, "bits", 0) == 4):
            parts = [part.astype(mx.float32) for part in (module.scales, module.biases)]
            values = np.array(mx.dequantize(module.weight, *parts, 32, 4))
            found.append(torch.from_numpy(values).flatten(0, -2))
        return found
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(new / engines.ONNX_FILE).graph
    arrays = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    found = []
    for node in (node for node in graph.node if node.op_type == "MatMulNBits"):
        packed, scales = (arrays[name] for name in node.input[1:3])
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1, 32) - 8.0
        found.append(torch.tensor(codes * scales.reshape(len(packed), -1, 1)).flatten(1).float())
    return found


def rows_of(matrices: list[Tensor]) -> list[list[float]]:
    """Engines may put matrices side by side, in another order."""
    return sorted(row for matrix in matrices for row in matrix.tolist())


QUICK = [("LLaMA", engine) for engine in MODELS["LLaMA"][2]]


@pytest.mark.parametrize("name, engine", representative(CASES, QUICK))
def test_no_number_changes(name: str, engine: str, folders, tmp_path, capsys) -> None:
    needs(engine)
    source, new = folders[name], tmp_path / "new"
    main([str(source), str(new), "--to", engine])
    said = capsys.readouterr().out
    expected = matrices(source)
    assert rows_of(expected) == rows_of(dequantized(engine, new))
    negative = torch.cat([GRID.fit_scales(each).flatten() < 0 for each in expected])
    assert 0.3 < negative.float().mean() < 0.7
    card = (new / "README.md").read_text("utf-8")
    assert "hf upload USER/new new" in card and "not run: " in card
    assert all(line in card for line in said.splitlines()[:-1])
    if engine == "compressed-tensors":  # transformers' logits are the same to the last bit
        ids = torch.arange(3, 40)[None]
        one, other = (
            AutoModelForCausalLM.from_pretrained(each, dtype="auto")(ids).logits
            for each in (source, new)
        )
        assert torch.equal(one, other)


def not_written(argv: list[object], *words: str) -> None:
    """One line, before anything is written beside what was there."""
    new = Path(argv[1])
    before = sorted(new.parent.iterdir())
    line = refused(main, [str(part) for part in argv])
    assert all(word in line for word in words), line
    assert sorted(new.parent.iterdir()) == before


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_what_differs_is_not_written(engine: str, folders, tmp_path, monkeypatch) -> None:
    """A code that changes on its way, and a model that the engine computes otherwise."""
    needs(engine)
    argv = [folders["LLaMA"], tmp_path / "new", "--to", engine]
    packed_bytes, copy = codes.packed_bytes, ModelFolder.copy_settings
    with monkeypatch.context() as patch:
        if engine == "onnx":
            read = engines.Onnx.stored
            patch.setattr(engines.Onnx, "stored", lambda *new: [*read(*new)][1:])
        else:
            patch.setattr(codes, "packed_bytes", lambda codes: packed_bytes(codes) ^ 1)
        not_written(argv, "rows of codes or scales differ")
    wrong = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4), rope_theta=1e4)
    monkeypatch.setattr(
        ModelFolder, "copy_settings", lambda *to, **fields: copy(*to, **fields | wrong)
    )
    if engine != "onnx":  # whose graph holds what the config says
        not_written(argv, "log-probabilities differ")


def test_folders_that_cannot_be_exported(folders, tmp_path, monkeypatch) -> None:
    """The others, and what lies at NEW, are in the table of refusals."""
    for engine in engines.ENGINES.values():
        monkeypatch.setattr(type(engine), "packages", ())
    to = [tmp_path / "new", "--to", "compressed-tensors"]
    for name in ("GPT-2", "Mixtral"):
        not_written([folders[name], *to], "--to compressed-tensors: ", "experts")
    broken = tiny.write_model(tmp_path / "broken")
    not_written(
        [broken, *to], f"OUT {broken}: ", "layers.0.self_attn.q_proj.weight", "off the grid"
    )
    linears = list(ModelFolder.open(str(folders["biases"]), "OUT").linears)
    for type_, first in (("q5_0", "q5_0"), ("auto", "iq4_nl")):  # of all tensors, not of the first
        other = shutil.copytree(folders["biases"], tmp_path / type_)
        tensors = weights(other)
        for name in linears:
            form = FORMATS[first if name == linears[0] else "q5_0"]
            tensors[name] = form.nearest(torch.randn(tensors[name].shape)).bfloat16()
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        not_written([other, *to], f"--quantize {type_}", f"Use gguf with --type {type_}")
    config = json.loads((folders["LLaMA"] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": METHOD}
    (broken / "config.json").write_text(json.dumps(config))
    not_written([broken, *to], f"OUT {broken}: its weights are packed")


@pytest.mark.parametrize("engine, name", [("mlx", "BLOOM"), ("mlx", "GPT-2"), ("onnx", "BLOOM")])
def test_a_model_that_an_engine_does_not_know(engine, name, folders, tmp_path) -> None:
    needs(engine)
    words = f"OUT {folders[name]}: its model in {engine}'s code cannot be loaded", "Use gguf"
    not_written([folders[name], tmp_path / "new", "--to", engine], *words)


def test_a_model_that_also_sees_is_run_whole(tmp_path: Path) -> None:
    model = tiny.VISION["Qwen3-VL"]()
    tiny.write_model(tmp_path / "out", model)
    logits = codes.load_transformers(tmp_path / "out")
    ids = list(range(3, 40))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    torch.testing.assert_close(logits(ids), expected)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.commands.export.__main__.find_spec", lambda name: None)
    for flag in ("--to", "--for"):
        with pytest.raises(UserError, match=f"^{flag} mlx: .* is not installed. Run pip install"):
            check_installed(flag, "mlx")

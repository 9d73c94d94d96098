"""What a run says and does on the pretended device; tests/cuda/test_matrix.py compares weights."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import chats
import pytest
import tiny
import torch
import torch.nn.functional as F
from support import (
    ROOT,
    call,
    call_here,
    program_of,
    reloaded,
    results,
    succeed,
    weights,
)

from lib.data.training import TrainingText
from lib.model.blocks import BlockRunner
from lib.model.device import pick_dtype
from lib.model.pretrained import fresh_copy
from lib.run.check import UNTRIED
from lib.stages.recover import Recoverer, TrainSchedule

sys.path.append(str(ROOT / "benchmarks/gpu"))

import first_run  # noqa: E402

CARD = ["--device", "cuda:0"]
BASE = ["--seqlen", "32", "--nsamples", "6", "--completions", "0", "--batch_size", "4"]
BASE += ["--calibration_data", "uk", "--eval_data", "uk"]
ADMM = ["--prune_method", "admm", "--sparsity_type", "2:4"]
RECOVER = ["--recover", "2560"]
pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model", tiny.tiny_llama(num_hidden_layers=3))
    tiny.write_model(folder / "deep", tiny.tiny_llama(num_hidden_layers=8))
    large = tiny.tiny_llama(num_hidden_layers=6, hidden_size=64, intermediate_size=64)
    tiny.write_model(folder / "large", large)
    tiny.write_model(folder / "chat", large, chats.tokenizer_with(chats.LLAMA_3))
    tiny.write_texts(folder / "uk", train=60, test=3)
    chats.write(folder / "said", chats.some(80), chats.some(4, 1))
    return folder


@pytest.mark.parametrize("flags", ["wanda --sparsity_type neurons", "admm --sparsity_type 2:4"])
def test_blocks_are_fetched_where_memory_is_short(flags: str, device: Any, tmp_path: Path) -> None:
    """Hidden states are on the host then, and come and go."""
    argv = ["--model", "deep", *BASE, *CARD, "--prune_method", *flags.split()]
    argv += ["--nsamples", "24", "--batch_size", "1"]
    said = {}
    for name, room in (("whole", 10**10), ("short", 750_000)):
        device.set_limit(0, torch.accelerator.memory_allocated(0) + room)
        saved = ["--save", tmp_path / name, "--save_model", tmp_path / f"{name}-model"]
        said[name] = succeed(*argv, *saved).out
    assert "hidden states" in said["short"] and "on the host" in said["short"]
    assert f"cuda:0: {UNTRIED}" in said["whole"]
    one, two = (weights(tmp_path / f"{name}-model") for name in said)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert results(tmp_path / "short")["perplexity"] == results(tmp_path / "whole")["perplexity"]


@pytest.mark.parametrize("room", [10**8, 1_080_000])
@pytest.mark.parametrize("model, data", [("large", "uk"), ("chat", "said")])
def test_compress(
    model: str,
    data: str,
    room: int,
    device: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On cards that hold all, and that hold blocks one at a time."""
    from lib.commands.compress import measure, steps

    monkeypatch.setattr("lib.util.processes.call", call_here)
    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    for name in ("STEPS", "ROUNDS"):
        monkeypatch.setattr(measure, name, 1)
    device.set_limit(0, torch.accelerator.memory_allocated(0) + room)
    out = tmp_path / "out"
    flags = "--seqlen 32 --batch_size 2 --completions 0 --device cuda:0".split()
    argv = [model, out, "--data", data, *flags, "--nsamples", "4"]
    succeed(*argv, program=program_of("compress"))
    run = Path(f"{out}-compress", "compressed")
    reloaded(out, run, *flags, "--eval_data", data, "--eval_windows", "256")


@pytest.mark.parametrize(
    "room, argv, flag",
    [
        (20_000, ADMM, "--device cpu"),
        (1_300_000, [*ADMM, *RECOVER, "--batch_size", "40"], "--batch_size"),
    ],
)
def test_out_of_memory_is_a_line(
    room: int, argv: list[str], flag: str, device: Any, tmp_path: Path
) -> None:
    device.set_limit(0, torch.accelerator.memory_allocated(0) + room)
    done = call("--model", "model", *BASE, *CARD, *argv, "--save", tmp_path)
    assert done.status == 1 and flag in done.complaints[-1] and "memory" in done.complaints[-1]


def test_a_device_smaller_than_transformers_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10**8, 10**9))
    done = call("--model", "model", *BASE[:-4], "--device", "cuda:0", "--eval_only", *BASE[-2:])
    assert done.status == 1 and "out of memory (the device has less" in done.complaints[-1]


def test_what_does_not_multiply_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny.tiny_llama().config
    config.dtype = torch.bfloat16
    for able in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda able=able, **_: able)
        found = {"avx512_bf16": able}
        monkeypatch.setattr(torch.cpu, "get_capabilities", found.copy, raising=False)
        for device in ("cuda:0", "cpu"):
            dtype = pick_dtype("auto", config, torch.device(device))
            assert dtype == (torch.bfloat16 if able else torch.float32)
    config.dtype = torch.float16
    assert pick_dtype("auto", config, torch.device("cpu")) == torch.float32


def test_products_are_refused_as_on_a_gpu() -> None:
    """Sums of 16-bit products are float32; other dtypes than these are not mixed."""
    half, single = (torch.ones(2, 2, dtype=it, device="cuda:0") for it in (torch.half, torch.float))
    product = partial(torch.addmm, out_dtype=torch.float32)
    assert product(single, half, half, out=single.clone()).eq(3).all()
    for a, b in ((half, single), (half, half.bfloat16())):
        with pytest.raises(RuntimeError, match="mat1 and mat2 must have the same dtype"):
            product(single, a, b, out=single.clone())
    with pytest.raises(RuntimeError, match="self and mat2 must have the same dtype"):
        product(half.bfloat16(), half, half, out=single.clone())
    with pytest.raises(RuntimeError, match="fp32 for fp16/bf16 inputs"):
        torch.mm(half, half, out_dtype=torch.float64)


def test_there_are_two(device: Any) -> None:
    done = call("--model", "model", *BASE, "--device", "cuda:2", "--eval_only")
    assert done.status == 1 and "no such device was found (accelerators: 2)" in done.complaints[0]


def test_a_training_that_is_not_reproducible_goes_on_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As where a block's gradient needs an operation that CUDA has in no fixed order alone."""
    model = tiny.tiny_llama().cuda().requires_grad_(False)
    runner, teacher = (
        BlockRunner(one, torch.device("cuda:0")) for one in (model, fresh_copy(model))
    )
    for block in runner.blocks:
        block.mlp.up_proj.weight[:, ::2] = 0
        block.mlp.register_forward_hook(
            lambda mlp, args, out: out + F.pad(out[..., 1:], (1, 0), mode="reflect") * 1e-3
        )
    ids = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    text = TrainingText(ids, torch.arange(4), ids, {"sources": []})
    schedule = TrainSchedule(96, 24, rate=1e-3, least=24)
    with pytest.warns(UserWarning, match="reflection_pad1d"):
        (recoverer := Recoverer(runner, teacher, schedule, text)).run()
    assert recoverer.curve[-1]["loss"] > 0 and not torch.are_deterministic_algorithms_enabled()
    assert capsys.readouterr().out.count("recovery: it is not reproducible, since reflection") == 1


@pytest.mark.parametrize("name", ["methods", "products", "packed, 4 bits", "fetched blocks"])
def test_a_check_of_launch_sh_gpu_in_small(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = first_run.report_of(name, torch.device("cuda:0"), small=True)
    assert report["result"] == "ok", report
    if name == "products":
        assert (
            report["figures"]["2:4"] == "cusparselt" and "us, 2:4, 4096 tokens" in report["figures"]
        )

"""Whole runs on the pretended device, against the same runs on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from support import ROOT, call, raising, reloaded, results, succeed, weights

from lib.data.training import TrainingText
from lib.methods.registry import METHODS
from lib.model.blocks import BlockRunner
from lib.model.pretrained import fresh_copy, pick_dtype
from lib.recover import Recoverer, TrainSchedule

sys.path.append(str(ROOT / "benchmarks/gpu"))

import first_run  # noqa: E402

BASE = ["--seqlen", "32", "--nsamples", "6", "--completions", "0", "--batch_size", "4"]
BASE += ["--calibration_data", "uk", "--eval_data", "uk"]
PATTERNS = ["unstructured", "2:4", "4:8", "neurons"]
ADMM = ["--prune_method", "admm", "--sparsity_type", "2:4"]
RECOVER = ["--recover", "2560"]
PACK = ["--replace_sparse_layers", "--quantize", "int4"]
pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model", tiny.tiny_llama(num_hidden_layers=3))
    tiny.write_model(folder / "deep", tiny.tiny_llama(num_hidden_layers=8))
    tiny.write_texts(folder / "uk", train=60, test=3)
    return folder


def run(folder: Path, where: str, *argv: object, model: str = "model") -> dict[str, Any]:
    """Results of a run that succeeds; its model is saved beside them."""
    out = ["--save", folder / "out", "--save_model", folder / "model"]
    done = succeed("--model", model, *BASE, "--device", where, *argv, *out)
    return results(folder / "out") | {"said": done.out}


def assert_same(one: Path, other: Path) -> None:
    """Two folders of runs: the same weights, and perplexities to the last digit but one."""
    first, second = weights(one / "model"), weights(other / "model")
    assert first.keys() == second.keys()
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []
    before, after = (results(path / "out") for path in (one, other))
    assert after["perplexity"]["uk"] == pytest.approx(before["perplexity"]["uk"], rel=1e-9)
    where = after["device"].partition(" ")[0]
    reloaded(other / "model", other / "out", *BASE, "--device", where)


CASES = {
    f"{method} {pattern}": ["--prune_method", method, "--sparsity_type", pattern]
    for method in METHODS
    for pattern in PATTERNS
    if (method, pattern) != ("ria", "neurons")  # it has no rule for them
}
CASES["variant"] = ["--prune_method", "wanda", "--use_variant"]
CASES["vocabulary"] = ["--prune_method", "magnitude", "--trim_vocabulary"]
CASES["packed"] = ["--prune_method", "wanda", "--replace_sparse_layers"]
CASES["quantized"] = ["--prune_method", "sparsegpt", *PACK]
CASES["bfloat16"] = ["--prune_method", "sparsegpt", "--dtype", "bfloat16"]


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_cpus(case: str, tmp_path: Path) -> None:
    found = {where: run(tmp_path / where, where, *CASES[case]) for where in ("cpu", "cuda:0")}
    assert_same(tmp_path / "cpu", tmp_path / "cuda:0")
    assert found["cuda:0"]["peak_memory"]["device"] > 0


@pytest.mark.parametrize("case", ["wanda neurons", "sparsegpt 4:8", "admm 2:4", "quantized"])
def test_blocks_in_files_are_the_same(case: str, tmp_path: Path) -> None:
    run(tmp_path / "whole", "cuda:0", *CASES[case])
    run(tmp_path / "files", "cuda:0", *CASES[case], "--offload_folder", tmp_path / "blocks")
    assert_same(tmp_path / "whole", tmp_path / "files")


@pytest.mark.parametrize("case", ["wanda neurons", "admm 2:4", "packed"])
def test_blocks_are_fetched_where_memory_is_short(case: str, device: Any, tmp_path: Path) -> None:
    """Hidden states are on the host then, and come and go."""
    argv = [*CASES[case], "--nsamples", "24", "--batch_size", "1"]
    run(tmp_path / "whole", "cuda:0", *argv, model="deep")
    device.set_limit(0, torch.accelerator.memory_allocated(0) + 750_000)
    found = run(tmp_path / "short", "cuda:0", *argv, model="deep")
    assert "one block at a time, hidden states" in found["said"] and "on the host" in found["said"]
    assert_same(tmp_path / "whole", tmp_path / "short")


def test_errors_allocate_alike(tmp_path: Path) -> None:
    argv = [*ADMM[:2], "--sparsity_ratio", "0.6", "--allocation", "error"]
    for where in ("cpu", "cuda:0"):
        run(tmp_path / where, where, *argv)
    one, other = (results(tmp_path / where / "out") for where in ("cpu", "cuda:0"))
    assert other["allocation"] == pytest.approx(one["allocation"], abs=1e-5)
    assert other["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)


@pytest.mark.parametrize(
    "more", [[], ["--recover_rank", "4"], PACK, ["--sparsity_type", "neurons"]]
)
def test_recovery_is_reproducible_and_as_good(more: list[str], tmp_path: Path) -> None:
    argv = ["--prune_method", "wanda", "--sparsity_type", "2:4", *RECOVER, *more]
    found = {
        name: run(tmp_path / name, name[:6], *argv) for name in ("cpu", "cuda:0", "cuda:0 again")
    }
    assert_same(tmp_path / "cuda:0", tmp_path / "cuda:0 again")
    one, other = (found[where]["recovery"]["curve"] for where in ("cpu", "cuda:0"))
    for before, after in zip(one, other, strict=True):
        assert after["perplexity"] == pytest.approx(before["perplexity"], rel=1e-3)
    assert "it is not reproducible" not in found["cuda:0"]["said"]


def test_what_was_packed_there_is_read_there(tmp_path: Path) -> None:
    found = run(tmp_path, "cuda:0", "--prune_method", "wanda", *PACK)
    for where in ("cpu", "cuda:0"):
        argv = ["--model", tmp_path / "model", *BASE, "--device", where, "--eval_only"]
        succeed(*argv, "--save", tmp_path / where)
        again = results(tmp_path / where)["perplexity"]["uk"]
        assert again == pytest.approx(found["perplexity"]["uk"], rel=1e-6)


@pytest.mark.parametrize(
    "stop, more",
    [
        (("prune", 2), ADMM),
        (("prune", 2), [*ADMM, "--offload_folder", "blocks"]),
        (("recover", 6), [*ADMM, *RECOVER, *PACK]),
    ],
)
def test_interrupted_and_continued(stop: tuple, more: list[str], tmp_path: Path) -> None:
    run(tmp_path / "whole", "cuda:0", *more)
    out = ["--save", tmp_path / "out", "--save_model", tmp_path / "model"]
    argv = ["--model", "model", *BASE, "--device", "cuda:0", *more, *out]
    argv += ["--resume", tmp_path / "kept"]
    with raising(KeyboardInterrupt(), *stop):
        assert call(*argv).status != 0
    succeed(*argv)
    assert_same(tmp_path / "whole", tmp_path)


def test_the_second_device_alone_is_used(device: Any, tmp_path: Path) -> None:
    device.set_limit(0, torch.accelerator.memory_allocated(0))  # not a byte more
    argv = [*ADMM, *RECOVER, *PACK]
    found = run(tmp_path / "second", "cuda:1", *argv)
    assert found["peak_memory"]["device"] > 0
    device.set_limit(0, 10**10)
    run(tmp_path / "first", "cuda:0", *argv)
    assert_same(tmp_path / "first", tmp_path / "second")


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
    done = call("--model", "model", *BASE, "--device", "cuda:0", *argv, "--save", tmp_path)
    assert done.status == 1
    (line,) = done.complaints
    assert flag in line and "memory" in line


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

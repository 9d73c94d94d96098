"""What is said of memory before a run, against what the run then takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from support import QUICK, call, spawn

from lib.methods.registry import Recipe
from lib.model.pretrained import decoder_blocks, skeleton
from lib.run import memory as estimate
from lib.run.memory import Plan, check_memory, parts, shapes
from lib.util import host as memory
from lib.util.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def of(model, **changes) -> Plan:
    name, _ = decoder_blocks(model)
    known = dict(recipe=Recipe("wanda"), windows=8, tests=4, seqlen=32, batch_size=4)
    known |= dict(working=torch.float32, saved=torch.float32)
    return Plan(shapes(skeleton(model.config), name), **known | changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    middle = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=6, vocab_size=16000)
    tiny.write_model(folder / "tiny")
    tiny.write_model(folder / "middle", tiny.tiny_llama(**middle, num_attention_heads=8))
    tiny.write_texts(folder / "uk", train=300, test=4)
    return folder


CASES = {
    "tiny": ["tiny", "wanda"],
    "middle": ["middle", "sparsegpt", "--nsamples", "64", "--seqlen", "128"],
    "middle offloaded": ["middle", "wanda", "--offload", "away"],
}


@pytest.mark.parametrize("case", CASES)
def test_within_a_quarter(case: str, place: Path, tmp_path: Path) -> None:
    model, method, *more = CASES[case]
    flags = ["--prune_method", method, *QUICK, "--save", tmp_path / "run", *more]
    data = ["--calibration_data", place / "uk", "--eval_data", place / "uk"]
    done = spawn(["--model", place / model, *data, *flags], tmp_path)
    assert done.status == 0, done.err
    said = re.match(r"memory: about ([\d.]+) (\w+) \(libraries ([\d.]+) (\w+), ", done.out)
    said, base = (float(said[i]) * UNITS[said[i + 1]] for i in (1, 3))
    measured = json.loads((tmp_path / "run" / "results.json").read_text())["peak_memory"]["host"]
    assert said == pytest.approx(measured, rel=0.25)
    if case == "middle":
        assert measured - base > 0.25 * base  # so that the libraries don't decide


def test_inputs_are_shared_as_in_a_forward_pass() -> None:
    (block,) = of(tiny.tiny_llama()).shapes.blocks
    found = sorted((each.width, sorted(each.outputs)) for each in block.inputs)
    assert found == [(32, [16, 16, 32]), (32, [32]), (32, [64, 64]), (64, [32])]
    assert block.pruned == 32 * 64 + 32 * 32 + 32 * 128 + 64 * 32


def test_every_expert_has_statistics_of_its_own() -> None:
    found = of(tiny.ARCHITECTURES["Mixtral"]()).shapes
    (block,) = found.blocks
    assert found.routed == 2
    assert sum(each.experts == 4 for each in block.inputs) == 8


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES])
def test_weights_are_counted_once(name: str) -> None:
    model = tiny.ARCHITECTURES[name]()
    size = sum(parameter.nbytes for parameter in set(model.parameters()))
    assert parts(of(model)).weights == size


def test_what_makes_it_grow_and_shrink() -> None:
    model = tiny.tiny_llama(num_hidden_layers=6)
    plan = of(model)
    whole = parts(plan)
    assert parts(of(model, windows=80)).hidden == 80 * 32 * 32 * 4
    assert parts(of(model, recipe=Recipe("sparsegpt"))).work >= whole.work
    assert parts(of(model, fetched=True)).weights < whole.weights / 2
    assert parts(of(model, load_bit="4")).weights < whole.weights / 2
    few = dict(windows=1, tests=1, seqlen=4)
    assert parts(of(model, **few, stored=torch.bfloat16)).total > parts(of(model, **few)).total
    more = parts(of(model, recipe=Recipe("admm"), windows=80))
    assert more.hidden == 2 * 80 * 32 * 32 * 4


def test_too_little_memory_on_the_host(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "available", lambda: 10**5)
    monkeypatch.setattr("lib.model.load_model", lambda *_, **__: pytest.fail("loaded"))
    data = ["--calibration_data", place / "uk", "--eval_data", place / "uk"]
    done = call("--model", place / "tiny", *QUICK, *data, "--prune_method", "wanda")
    assert done.status == 1
    (line,) = done.complaints
    assert line.startswith("error: --model: the run needs about ")
    for way in ("--nsamples", "--seqlen", "--batch_size", "--offload"):
        assert way in line


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert memory.available() > 10**6
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.available() == 4900


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A device with `free` bytes."""
    found = SimpleNamespace(free=0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (found.free, 2**40))
    return found


def test_blocks_stay_on_the_host_where_the_device_is_small(gpu: SimpleNamespace) -> None:
    plan = of(tiny.tiny_llama(num_hidden_layers=8))
    need, fetched = parts(plan), parts(of(tiny.tiny_llama(num_hidden_layers=8), fetched=True))
    gpu.free = 2 * (need.weights + need.hidden + need.work)
    room = check_memory(plan, CUDA, False)
    assert not room.fetched and room.keep_on == CUDA
    gpu.free = int(1.12 * (need.weights + need.work))
    room = check_memory(plan, CUDA, False)
    assert not room.fetched and room.keep_on == CPU
    gpu.free = need.weights + need.work
    room = check_memory(plan, CUDA, False)
    assert room.fetched and room.line.startswith("memory: device about ")
    assert "host about" in room.line
    gpu.free = fetched.work // 2
    with pytest.raises(UserError, match="--device cuda:0: the run needs .* --batch_size"):
        check_memory(plan, CUDA, False)
    room = check_memory(plan, CPU, False)
    assert not room.fetched and room.keep_on == CPU


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_freed_activations_are_not_faulted_in_again(tmp_path: Path) -> None:
    """Page faults of tensors made and dropped together, in a process of its own."""
    code = (
        "import resource, torch\n"
        "from lib.memory import keep_freed_memory\n"
        "import sys; sys.argv[1:] and keep_freed_memory()\n"
        "def turn():\n"
        "    for _ in range(5): [torch.ones(2**20) for _ in range(8)]\n"
        "turn(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "turn(); print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    root = Path(estimate.__file__).parent.parent
    argv = [sys.executable, "-c", code]
    plain, kept = (
        int(subprocess.run([*argv, *more], cwd=root, capture_output=True, check=True).stdout)
        for more in ([], ["keep"])
    )
    assert kept < plain / 10

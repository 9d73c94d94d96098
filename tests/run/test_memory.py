"""Memory before a run: the table for models without weights, and what the machine has left."""

from __future__ import annotations

import io
import weakref
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from safetensors.torch import load_file
from support import QUICK, call, representative, results, runner_of, succeed, windows
from transformers import AutoConfig

import main
from lib.calibration.inputs import observe
from lib.calibration.planned_inputs import expected_inputs
from lib.methods.wanda import Wanda
from lib.model.checkpoint import Checkpoint
from lib.model.linears import experts_implementation
from lib.model.skeleton import build_skeleton
from lib.run import load
from lib.run.memory import Memory, memory_of
from lib.util.errors import UserError
from lib.util.host import available, gib
from lib.util.resume import RunFolder

SIZES = {
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, heads=32),
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, heads=64),
}


def llama(size: str) -> AutoConfig:
    fields = dict(SIZES[size])
    fields |= dict(num_attention_heads=fields.pop("heads"), num_key_value_heads=8)
    fields |= dict(vocab_size=128256, tie_word_embeddings=False, dtype="bfloat16")
    return AutoConfig.for_model("llama", **fields)


@pytest.mark.parametrize(
    ("size", "flags", "gigabytes"),  # weights, the teacher's blocks, and bytes of each weight
    [
        ("8B", "", 16.06 + 13.96 + 16 * 6.98),
        ("8B", "--recover_optimizer adamw8bit", 16.06 + 13.96 + 11.03 * 6.98),
        ("8B", "--recover_rank 16", 44.7),
        ("70B", "--recover_rank 16", 418),
        ("8B", "--quantize iq4_nl", 142.7),
    ],
)
def test_training_of_large_models(size: str, flags: str, gigabytes: float) -> None:
    memory = memory_of(llama(size), f"--recover 500000 {flags}", free=80e9)
    memory = replace(memory, offloaded=False)
    assert memory.total("train") == pytest.approx(gigabytes * 1e9, rel=2e-3)
    assert memory.fits() == (gigabytes < 80)
    assert "| train | " in memory.table() and memory.passing["train"]["logits"] > 0


def test_ranks_share_out_what_is_trained() -> None:
    flags = "--recover 500000 --recover_optimizer adamw8bit"
    one, two = (memory_of(llama("8B"), flags, free=80e9, ranks=ranks) for ranks in (1, 2))
    assert two.offloaded and two.fits() and one.on_host_alone
    one = replace(one, offloaded=False, host=int(64e9))
    for name in ("masters", "gradients", "averages"):
        assert 2 * two.stages["train"][name] == pytest.approx(one.stages["train"][name], rel=1e-3)
    blocks = one.stages["train"]["teacher"]
    assert two.stages["train"]["teacher"] == pytest.approx(blocks / 2, rel=1e-6)
    # beside the block in "weights": one that is gathered, a gradient, and its float32 sum
    assert two.stages["train"]["passing blocks"] == pytest.approx(4 * blocks / 32, rel=1e-6)
    assert "teacher" not in two.stages["measure"]  # it is on the disk
    with pytest.raises(UserError, match="or 2 such GPUs with torchrun [(]59.3 GiB each[)][.]$"):
        one.check()


@pytest.mark.usefixtures("elsewhere")
def test_a_packed_model_is_counted_as_it_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that its packed form fits is not refused for what it would be dense."""
    tiny.write_model("model", tiny.tiny_llama())
    texts = ["--calibration_data", tiny.write_texts("uk", train=30, test=4), *QUICK]
    packs = ["--prune_method", "wanda", "--replace_sparse_layers", "--save_model", "packed"]
    succeed("--model", "model", *packs, *texts, "--save", "out")
    seen = []
    monkeypatch.setattr(Memory, "check", lambda memory: seen.append(memory.weights))
    succeed("--model", "packed", "--eval_only", *texts, "--save", "again")
    assert seen == [results("out")["saved_bytes"]]


@pytest.mark.parametrize("name", representative(tiny.ALL, ["Llama", "Cohere", "Zamba2", "JetMoE"]))
def test_layers_share_the_inputs_that_calibration_sees(name: str) -> None:
    """Also of parallel, shared and differing blocks, and where no pass without weights ends."""
    runner = runner_of(tiny.ALL[name]().requires_grad_(False))
    model = runner.model
    kinds = expected_inputs(build_skeleton(model.config, Checkpoint("model")), runner.name)
    expected = [sorted((one.width, one.outputs) for one in k if one.experts == 1) for k in kinds]
    with torch.no_grad(), experts_implementation(model, "eager"):
        states = runner.capture(windows(4))
        for index in range(len(runner.blocks)):
            passes = ((run, {}) for _, run in runner.iter_batches(states, index))
            groups = [
                each.linears for each in observe(runner, runner.linears(index), Wanda, passes)
            ]
            plain = (group for group in groups if group[0].expert is None)
            seen = [(group[0].shape[1], sum(one.shape[0] for one in group)) for group in plain]
            assert sorted(seen) in expected
            runner.advance_(states, index)


def test_blocks_are_fetched_where_weights_do_not_fit_twice() -> None:
    one, two = (memory_of(llama("8B"), "--prune_method admm", free=free) for free in (24e9, 80e9))
    assert (one.offloaded, one.hidden_on_device) == (True, False) and one.fits()
    assert (two.offloaded, two.hidden_on_device) == (False, True) and two.fits()
    tables, block = 2 * 2 * 128256 * 4096, 2 * 218.1e6
    assert one.total("load") == pytest.approx(tables + block, rel=1e-3)
    assert one.on_host["prune"]["hidden states"] == 2 * 128 * 4096 * 4096 * 2
    ranks = memory_of(llama("8B"), "--prune_method admm", free=80e9, ranks=8)
    assert 8 * ranks.stages["prune"]["hidden states"] == two.stages["prune"]["hidden states"]


@pytest.mark.usefixtures("elsewhere")
def test_a_method_in_a_users_file_is_counted_by_what_it_says() -> None:
    Path("mine.py").write_text("""
from langprune.methods.base import PruningMethod
from langprune.methods.sparsegpt import SparseGPT

class Plain(PruningMethod):
    def prune_(self, weights, sparsities):
        pass

class Heir(SparseGPT):
    pass

class Large(Plain):
    workspace = [(0, 100, 0)]
""")

    def solver(method: str) -> int:
        memory = memory_of(llama("8B"), f"--prune_method {method}", free=80e9)
        return memory.stages["prune"]["solver"]

    assert solver("mine.py:Plain") == solver("wanda") > 0
    assert solver("mine.py:Heir") == solver("sparsegpt")
    assert solver("mine.py:Large") > 40e9
    # what a stable sort takes on CUDA, with the matrix in one piece
    assert solver("wanda") == 28 * 4096 * 14336


@pytest.mark.parametrize(
    ("flags", "states"),  # of how many windows, between blocks
    [
        ("admm --allocation error", 81 * 8),
        ("wanda --allocation owl", 128),
        ("wanda --allocation layers.json", None),
        ("mine.py:Gradients", 81 * 8),
    ],
)
@pytest.mark.usefixtures("elsewhere")
def test_what_allocation_takes(flags: str, states: int | None) -> None:
    Path("mine.py").write_text("""
from langprune.methods.wanda import Wanda

class Gradients(Wanda):
    needs_gradients = True
""")
    memory = memory_of(llama("70B"), f"--prune_method {flags}", free=80e9)
    assert ("allocate" in memory.stages) == (states is not None)
    if states:
        terms = memory.stages["allocate"] | memory.on_host["allocate"]
        assert terms["hidden states"] == states * 4096 * 8192 * 2


@pytest.mark.parametrize(
    ("size", "flags", "free", "host", "way"),
    [
        ("70B", "--prune_method sparsegpt --allocation error", 24e9, 16e9, "Use --allocation unif"),
        ("8B", "--prune_method wanda", 24e9, 3e9, "Use fewer windows [(]--nsamples, --seqlen[)]"),
        ("70B", "--recover 500000 --recover_rank 16", 480e9, 16e9, "Use 16 such GPUs"),
        ("8B", "--recover 500000", 24e9, 64e9, "Use --recover_rank 16 [(]55.1 GiB of the host"),
    ],
)
def test_a_host_that_is_too_small(
    size: str, flags: str, free: float, host: float, way: str
) -> None:
    memory = memory_of(llama(size), flags, free=free, host=host)
    with pytest.raises(UserError, match=f"of the host's memory, of which .* free[.] {way}"):
        memory.check()
    memory_of(llama(size), flags, free=free, host=20 * host).check()


@pytest.mark.parametrize(
    ("flags", "host"), [("--recover_rank 16", 64e9), ("--recover_optimizer adamw8bit", 128e9)]
)
def test_a_gpu_that_holds_the_model_and_not_its_training(flags: str, host: float) -> None:
    flags = f"--recover 500000 --prune_method wanda {flags}"
    memory = memory_of(llama("8B"), flags, free=24e9, host=host)
    memory.check()
    assert memory.on_host_alone and not memory_of(llama("8B"), flags, free=160e9).offloaded
    names = {"masters", "gradients", "averages", "best weights", "blocks"}
    assert names <= memory.on_host["train"].keys() and not names & memory.stages["train"].keys()
    with pytest.raises(UserError, match="with one block at a time it needs .* of the host's"):
        memory_of(llama("8B"), flags, free=24e9, host=host / 2).check()


def test_activations_count_in_training() -> None:
    flags = "--recover 500000 --recover_rank 16"
    resident = memory_of(llama("8B"), flags, free=80e9).total("train")
    for more, offloaded in ((5e9, True), (9e9, False)):
        assert memory_of(llama("8B"), flags, free=resident + more).offloaded == offloaded


GROUPS = {  # files of each group; what is left is 500, 300 of it cached
    "version 2": ("0::/user/job", "", ("max", "current", "stat"), "active_file 300"),
    "version 1": (
        "4:memory:/user/job",
        "memory",
        ("limit_in_bytes", "usage_in_bytes", "stat"),
        "total_inactive_file 300",
    ),
}


@pytest.mark.parametrize("version", GROUPS)
@pytest.mark.parametrize("limited", ["", "user", "user/job"])
def test_the_limits_of_groups_of_processes(version: str, limited: str, tmp_path: Path) -> None:
    line, controller, names, cached = GROUPS[version]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"1:cpu:/other\n{line}\n")
    for group in ("", "user", "user/job"):
        folder = tmp_path / "sys/fs/cgroup" / controller / group
        folder.mkdir(parents=True, exist_ok=True)
        limit = 1000 if group == limited else 2**62
        for name, content in zip(names, (limit, 800, f"{cached}\nother 7"), strict=True):
            (folder / f"memory.{name}").write_text(f"{content}\n")
    assert available(tmp_path) == 500


def test_the_limit_of_a_job_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = psutil.Process().memory_info().rss
    monkeypatch.setenv("SLURM_MEM_PER_NODE", str((used >> 20) + 100))
    assert 50 << 20 < available(tmp_path) < 150 << 20
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", str((used >> 21) + 100))
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    assert 100 << 20 < available(tmp_path) < 300 << 20


def test_training_that_does_not_fit_is_refused_on_a_cpu_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.write_model(tmp_path / "model", tiny.tiny_llama(hidden_size=64).bfloat16())
    texts = ["--calibration_data", tiny.write_texts(tmp_path / "uk", train=60, test=3)]
    argv = ["--model", model, *texts, *QUICK, "--dtype", "bfloat16", "--recover", "64"]
    monkeypatch.setattr("lib.run.memory.available", lambda: 900_000)
    done = call(*argv, "--save", tmp_path / "out")
    (line,) = done.complaints
    assert "--recover 64: training needs" in line and "the machine has 879 KiB free" in line
    assert done.status == 1 and "Use --recover_rank 16 (" not in line  # wider than it saves


def test_tensors_are_copied_to_the_disk_one_after_another(tmp_path: Path) -> None:
    """In the format of safetensors, of every dtype and shape."""
    folder = RunFolder("--resume", tmp_path / "kept")
    folder.begin({})
    made = {
        "scalar": torch.tensor(3, dtype=torch.int64),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half ї": torch.randn(3, 5, dtype=torch.bfloat16),
        "turned": torch.randn(4, 3).T,
        "none": torch.empty(0, 2),
        "mask": torch.tensor([True, False]),
        "double": torch.randn(2, dtype=torch.float64),
    }
    most = 0

    class Counted(torch.Tensor):
        def cpu(self) -> torch.Tensor:
            nonlocal most
            alive = [each for each in copies if each() is not None]
            most = max(most, len(alive) + 1)
            copy = self.as_subclass(torch.Tensor).clone()
            copies.append(weakref.ref(copy))
            return copy

        def detach(self) -> torch.Tensor:
            return self

    copies: list[weakref.ref] = []
    file = folder.write("recovery", {k: v.as_subclass(Counted) for k, v in made.items()}, {"a": 1})
    read, facts = folder.read("recovery")
    assert facts == {"a": 1} and read.keys() == made.keys() and most <= 2
    for name, tensor in load_file(file).items():
        assert tensor.dtype == made[name].dtype and torch.equal(tensor, made[name])
        assert torch.equal(read[name], tensor)
    folder.close()


def test_what_is_kept_on_disk_and_what_the_model_takes_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.tiny_llama()
    blocks = sum(parameter.numel() for parameter in model.model.layers.parameters())
    argv = ["--model", tiny.write_model(tmp_path / "model", model), *QUICK, "--dtype", "bfloat16"]
    argv += ["--calibration_data", tiny.write_texts(tmp_path / "uk", train=60, test=3)]
    succeed(*argv, "--eval_only", "--save", tmp_path / "out")
    weights = load_file(tmp_path / "model" / "model.safetensors").values()
    assert results(tmp_path / "out")["dense_bytes"] == sum(one.nbytes for one in weights)
    monkeypatch.setattr(load, "load", None)  # what follows is not of interest
    prune = "--prune_method", "wanda"
    cases = (("adamw", 2 + 4 + 8, ()), ("adamw8bit", 2 + 4 + 2, ()), ("adamw", 2 + 4 + 8, prune))
    for optimizer, state, flags in cases:
        more = ["--recover", 64, "--recover_optimizer", optimizer, "--resume", tmp_path / "kept"]
        more += flags
        with pytest.raises(TypeError), redirect_stdout(io.StringIO()) as out:
            main.main([*map(str, [*argv, *more, "--save", tmp_path / "out"])])
        size = (2 * state + bool(flags) * 2) * blocks
        assert f"training needs up to {gib(size)} there" in out.getvalue()

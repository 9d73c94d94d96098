"""What a run allocates on a card against the table by which it is planned (lib/run/memory.py)."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from support import call, results, succeed

from lib.model import pretrained
from lib.prune import BlockWalker
from lib.run import save as saving
from lib.run.memory import Memory

BLOCKS, WIDTH, INNER, TOKENS, RANK = 8, 128, 384, 64, 4  # tokens: of a batch
MATRIX = 4 * INNER * WIDTH  # bytes of the largest, float32
BLOCK = 4 * 4 * WIDTH**2 + 3 * MATRIX
OUTSIDE = 4 * 2 * tiny.VOCAB * WIDTH
BATCH = 4 * TOKENS * WIDTH
LOGITS = 4 * 4 * TOKENS * tiny.VOCAB
TRAINED = 16 * BLOCKS * RANK * (11 * WIDTH + 3 * INNER)
SAMPLES = 4 * 2 * 129 * (3 * WIDTH + INNER)  # of each input of a block, for the layers' errors
SUMS = {
    "--prune_method wanda": OUTSIDE + 2 * BLOCK + 11 * BATCH + max(5 * MATRIX, LOGITS) + SAMPLES,
    f"--prune_method wanda --recover 512 --recover_rank {RANK}": (
        OUTSIDE + 3 * BLOCKS * BLOCK + TRAINED + (BLOCKS + 40) * BATCH + 4 * MATRIX + LOGITS
    ),
}
FLAGS = ["--seqlen", "32", "--nsamples", "32", "--batch_size", "2", "--completions", "0"]
FLAGS += ["--calibration_data", "uk", "--eval_data", "uk", "--device", "cuda:0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    sizes = dict(num_hidden_layers=BLOCKS, hidden_size=WIDTH, intermediate_size=INNER)
    tiny.write_model(folder / "model", tiny.tiny_llama(**sizes))
    tiny.write_model(folder / "dense", tiny.tiny_llama(**(sizes | {"num_hidden_layers": 3})))
    experts = tiny.EXPERTS | dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH)
    experts |= dict(num_hidden_layers=3)
    tiny.write_model(folder / "mixture", tiny.build("mixtral", 0, **experts))
    tiny.write_texts(folder / "uk", train=60, test=3)
    tiny.write_texts(folder / "many", train=60, test=100)
    return folder


@pytest.mark.usefixtures("at_place")
@pytest.mark.parametrize("argv", SUMS)
def test_what_a_card_needs_on_paper(
    argv: str, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for share, status in ((1, 0), (0.6, 1)):
        if status and "--recover" in argv:  # the host could not hold the training either
            monkeypatch.setattr("lib.run.memory.available", lambda: BLOCK)
        limit = torch.accelerator.memory_allocated(0) + int(share * SUMS[argv])
        device.set_limit(0, limit)
        done = call("--model", "model", *FLAGS, *argv.split(), "--save", tmp_path / str(status))
        assert done.status == status, done.err
    assert "memory" in done.complaints[-1]


# steps of a run: the stage of each, and the units after which its tensors are there
STEPS = {"dense": ("measure", 0), "allocate": ("allocate", 3), "prune": ("prune", 1)}
STEPS |= {"quantize": ("quantize", 3), "recover": ("train", 2)}
TRAIN = ["--recover", "96", "--recover_ce_weight", "0.1"]
RUNS = {
    "all": ["--prune_method", "admm", "--allocation", "error", "--quantize", "q4_0", *TRAIN],
    "by rank": ["--quantize", "q4_0", *TRAIN, "--recover_rank", "4"],
    "neurons": ["--prune_method", "sparsegpt", "--sparsity_type", "neurons", *TRAIN],
    "fetched": ["--prune_method", "sparsegpt", "--offload_folder", "away"],
}


class Watched:
    """The table of a run, the bytes allocated in each of its stages, and the peak of a solver."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **changed: bool) -> None:
        self.seen: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        gc.collect()  # what an earlier test left would be freed during this one
        self.before = torch.accelerator.memory_allocated(0)
        own = {"check": Memory.check, "save": saving.save, "solve": BlockWalker.solve_all_}
        read = pretrained.load_model

        def check(memory: Memory) -> None:
            self.memory = memory
            own["check"](memory)

        def save(*args: Any) -> None:
            self.note("save")
            own["save"](*args)

        def solve(walker: BlockWalker, groups: list) -> None:
            torch.accelerator.reset_peak_memory_stats(0)
            own["solve"](walker, groups)
            peak = torch.accelerator.max_memory_allocated(0) - self.before
            prefix = walker.checkpoint_prefix
            self.peaks[prefix] = max(peak, self.peaks.get(prefix, 0))

        def load_model(*args: Any, **options: Any) -> Any:
            model = read(*args, **options)
            self.note("load")
            if hasattr(model.config, "num_local_experts"):  # the device lacks grouped products
                model.set_experts_implementation("eager")
            return model

        def on_step(name: str, number: int) -> None:
            stage, after = STEPS.get(name, ("", -1))
            if number == after:
                self.note(stage)

        monkeypatch.setattr(Memory, "check", check)
        monkeypatch.setattr(BlockWalker, "solve_all_", solve)
        monkeypatch.setattr(saving, "save", save)
        monkeypatch.setattr(pretrained, "load_model", load_model)
        monkeypatch.setattr("lib.util.progress.on_step", on_step)
        for name, value in changed.items():
            monkeypatch.setattr(Memory, name, value)

    def note(self, stage: str) -> None:
        self.seen[stage] = torch.accelerator.memory_allocated(0) - self.before


@pytest.mark.usefixtures("at_place")
@pytest.mark.parametrize("model", ["dense", "mixture"])
@pytest.mark.parametrize("case", RUNS)
def test_a_stage_allocates_what_the_table_says(
    case: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (case, model) == ("neurons", "mixture"):
        return  # its MLPs are experts
    watched = Watched(monkeypatch, cache_inputs=False)
    out = ["--save", tmp_path / "out", "--save_model", tmp_path / "model"]
    succeed("--model", model, *FLAGS, "--dtype", "bfloat16", *RUNS[case], *out)
    memory, solving = watched.memory, {"statistics", "solver", "dense block"}
    assert watched.seen.keys() == memory.stages.keys()
    for stage, terms in memory.stages.items():
        kept = sum(size for name, size in terms.items() if name not in solving)
        if stage == "prune":  # neurons of the first of three blocks are gone by then
            kept -= (memory.weights - memory.stages["save"]["weights"]) // 3
        if memory.offloaded:  # blocks come and go
            kept -= memory._block
            kept -= terms.get("hidden states", 0) * (stage == "measure")
        assert watched.seen[stage] == pytest.approx(kept, rel=0.02), (stage, terms)
    for kind, stage in (("block", "prune"), ("quantized", "quantize")):
        if kind in watched.peaks:  # besides solved matrices of the block, kept until its end
            assert 0.65 < memory.total(stage) / watched.peaks[kind] < 1.1


@pytest.mark.usefixtures("at_place")
@pytest.mark.parametrize(
    "argv, share, words",
    [
        (["--recover", "512"], 0.8, "--recover 512: training needs "),
        (["--prune_method", "admm"], 0.8, "Use --prune_method wanda ("),
    ],
)
def test_what_can_not_fit_is_refused_before_weights_are_read(
    argv: list[str], share: float, words: str, device: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    watched = Watched(monkeypatch)
    fetched = [] if "--recover" in argv else ["--offload_folder", "away"]
    succeed("--model", "dense", *FLAGS, *argv, *fetched, "--save", tmp_path / "fits")
    stages = watched.memory.stages.values()  # where memory is short hidden states are on the host
    most = max(sum(terms.values()) - terms.get("hidden states", 0) for terms in stages)
    monkeypatch.setattr(pretrained, "load_model", None)
    monkeypatch.setattr("lib.run.memory.available", lambda: 16 * BLOCK)  # nor there
    device.set_limit(0, torch.accelerator.memory_allocated(0) + int(share * most))
    done = call("--model", "dense", *FLAGS, *argv, "--save", tmp_path / "refused")
    assert done.status == 1 and words in done.complaints[-1], done
    if "--recover" in argv:
        assert "--recover_rank 16 (" in done.complaints[-1]


@pytest.mark.usefixtures("at_place")
def test_test_windows_take_no_more_than_there_is(device: Any, tmp_path: Path) -> None:
    """They are far more than calibration windows, which decide where hidden states are."""
    argv = ["--model", "dense", *FLAGS, "--nsamples", "2", "--eval_data", "many"]
    argv += ["--prune_method", "wanda", "--offload_folder", "away"]
    found = {}
    for room in (10**10, OUTSIDE + 6 * BLOCK):
        before = torch.accelerator.memory_allocated(0)
        device.set_limit(0, before + room)
        torch.accelerator.reset_peak_memory_stats(0)
        succeed(*argv, "--save", tmp_path / str(room))
        found[room] = results(tmp_path / str(room))["evaluation"]
        peak = torch.accelerator.max_memory_allocated(0) - before
    states = found[room][0]["windows"] * BATCH // 2
    assert states > room / 2 > 0 and peak < room
    assert found[room] == found[10**10]

"""Blocks that come from disk or host memory one at a time: the same bytes, and no traces left."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest
import tiny
import torch
from late import Gpu
from support import (
    CPU,
    QUICK,
    Done,
    call,
    no_file_larger_than,
    prune_,
    results,
    runner_of,
    weights,
    windows,
)
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_utils

from lib.distributed.context import DistContext
from lib.eval import perplexities, perplexity, some_logits
from lib.methods.sparsity import Sparsity
from lib.model.access import Checkpoint, stored_names
from lib.model.blocks import BlockRunner
from lib.model.offload import (
    as_pread,
    device_map,
    offload_folder,
    read_in_files,
    scratch_bytes,
    temporary_folder,
)
from lib.model.pretrained import decoder_blocks, footprint, load_model, save_model
from lib.model.staging import Staging
from lib.model.weights import BlockWeights
from lib.pruning import check
from lib.sparse import check_same_outputs, swap_linears_
from lib.util.events import listening

Disk = namedtuple("Disk", "total used free")
MODELS = ("sharded", "tied", "mixtral", "bfloat16", "gpt2")
pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    sharded = tiny.write_model(folder / "sharded", tiny.tiny_llama(num_hidden_layers=3))
    tiny.tiny_llama(num_hidden_layers=3).save_pretrained(sharded, max_shard_size="60KB")
    (sharded / "model.safetensors").unlink()
    tiny.write_model(folder / "tied", tiny.tiny_llama(tie_word_embeddings=True))
    tiny.write_model(folder / "mixtral", tiny.ARCHITECTURES["Mixtral"]())
    tiny.write_model(folder / "bfloat16", tiny.tiny_llama().bfloat16())
    tiny.write_model(folder / "gpt2", tiny.ARCHITECTURES["GPT-2"]())
    tiny.write_texts(folder / "uk", test=3)
    return folder


def prune(model: str | Path, folder: Path, *more: object, method: str = "wanda") -> Done:
    data = ["--calibration_data", "uk", "--eval_data", "uk", "--save", folder / "run"]
    flags = [*QUICK, *data, "--prune_method", method, "--save_model", folder / "model"]
    return call("--model", model, *flags, *more)


def perplexity_of(folder: Path) -> float:
    return results(folder / "run")["perplexity"]["uk"]


@pytest.mark.parametrize("model", MODELS)
def test_the_same_weights_as_without(model: str, tmp_path: Path) -> None:
    method = "sparsegpt" if model == "sharded" else "wanda"
    for where, flags in (("plain", []), ("offloaded", ["--offload", tmp_path / "away"])):
        done = prune(model, tmp_path / where, *flags, method=method)
        assert done.status == 0, done.err
        assert done.complaints == []
    plain, offloaded = (weights(tmp_path / where / "model") for where in ("plain", "offloaded"))
    assert plain.keys() == offloaded.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, offloaded[name]) and tensor.dtype == offloaded[name].dtype, name
    same = pytest.approx(perplexity_of(tmp_path / "plain"), rel=1e-5)
    assert perplexity_of(tmp_path / "offloaded") == same
    assert not (tmp_path / "away").exists()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "offloaded" / "model")
    tied = reloaded.lm_head.weight is reloaded.get_input_embeddings().weight
    assert tied == (model in ("tied", "gpt2"))


def test_the_folder_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    away = tmp_path / "away"
    (away / "process-0").mkdir(parents=True)
    (away / "process-0" / "block-7-0.safetensors").write_bytes(b"of a killed run")
    (away / "process-0" / "job.json").write_text("{}")
    (away / "letter.txt").write_text("dear")
    assert prune("tied", tmp_path, "--offload", away).status == 0
    assert [path.name for path in away.iterdir()] == ["letter.txt"]


def test_a_folder_that_is_not_a_runs_own_is_refused(tmp_path: Path) -> None:
    """Although it is called as a run's own would be."""
    own = tmp_path / "away" / "process-0"
    own.mkdir(parents=True)
    files = {"thesis.txt": b"dear", "block-00000.safetensors": b"mine"}
    for name, data in files.items():
        (own / name).write_bytes(data)
    (line,) = prune("tied", tmp_path, "--offload", tmp_path / "away").complaints
    assert "--offload" in line and "but no job.json; name another folder" in line
    assert {path.name: path.read_bytes() for path in own.iterdir()} == files


def test_what_killed_runs_left_in_memory_is_removed(tmp_path: Path) -> None:
    """But neither a folder that is in use, nor one that is not a run's."""
    alone = DistContext(CPU, alone=True)
    (tmp_path / "blocks-killed" / "process-0").mkdir(parents=True)
    (tmp_path / "letters").mkdir()
    with temporary_folder(tmp_path, alone, shared=False) as first:
        for folder in tmp_path.iterdir():
            os.utime(folder, (0, 0))
        with temporary_folder(tmp_path, alone, shared=False):
            assert first.folder.is_dir() and (tmp_path / "letters").is_dir()
            assert not (tmp_path / "blocks-killed").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    away = str(tmp_path / "away")
    with offload_folder(away, DistContext(CPU, alone=True), shared=False) as own:
        (own.folder / "block-0-0.safetensors").write_bytes(b"in use")
        done = prune("tied", tmp_path, "--offload", away)
        (line,) = done.complaints
        assert line.startswith(f"error: --offload {away}: another run uses it; name another")
        assert (own.folder / "block-0-0.safetensors").read_bytes() == b"in use"
    assert not Path(away).exists()


@pytest.mark.parametrize("flag", ["--offload", "--save_model", "--resume"])
def test_a_folder_without_room(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**6, 10**6 - 1000, 1000))
    data = ["--calibration_data", "uk", "--eval_data", "uk", "--save", tmp_path / "run"]
    flags = [*QUICK, *data, "--prune_method", "wanda", flag, tmp_path / "away"]
    (line,) = call("--model", "tied", *flags).complaints
    assert re.match(rf"error: {flags[-2]} {tmp_path / 'away'}: needs about \d+ KiB, but", line)
    assert not (tmp_path / "away").exists()


def test_experts_that_are_fused_need_more_room() -> None:
    sizes = []
    for name in ("tied", "mixtral"):
        model = AutoModelForCausalLM.from_pretrained(name)
        path, blocks = decoder_blocks(model)
        names = stored_names(Checkpoint(name))
        sizes.append(scratch_bytes(model, path, names, torch.float32, torch.bfloat16))
        sizes.append(2 * sum(weight.numel() for weight in blocks.parameters()))
    tied, plain, mixtral, blocks = sizes
    assert tied == plain
    assert blocks < mixtral <= 3 * blocks


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    with no_file_larger_than(10_000):
        done = prune("sharded", tmp_path, "--offload", tmp_path / "away")
    (line,) = done.complaints
    assert "error: --offload" in line and "block 0 can't be written" in line
    assert not (tmp_path / "away").exists() and not (tmp_path / "model").exists()


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_shard_that_is_damaged_in_the_middle_of_the_run(
    damage: str, place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "sharded", tmp_path / "sharded")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    name = index["weight_map"]["model.layers.2.mlp.up_proj.weight"]
    file = tmp_path / "sharded" / name

    def damaging(what: str, blocks: int) -> None:
        if (what, blocks) == ("pruning", 1):
            data = file.read_bytes()
            file.unlink()
            if damage == "cut":
                file.write_bytes(data[:2000])

    with listening(damaging):
        done = prune(tmp_path / "sharded", tmp_path, "--offload", tmp_path / "away")
    assert done.status == 1
    (line,) = done.complaints
    assert name in line and "can't be read from" in line
    assert not (tmp_path / "model").exists() and not (tmp_path / "away").exists()


def test_blocks_that_share_weights_are_not_offloaded(tmp_path: Path) -> None:
    """As Zamba 2's do: one can't be brought without the other."""
    tiny.write_model("sharing", tiny.HYBRIDS["Zamba2"]())
    done = prune("sharing", tmp_path, "--offload", tmp_path / "away")
    assert done.status == 1 and done.complaints == [
        "error: --offload: the model's blocks share weights; it must fit in memory"
    ]


def test_quantising_is_not_offloaded(tmp_path: Path) -> None:
    done = prune("tied", tmp_path, "--offload", tmp_path / "away", "--load_bit", "4")
    (line,) = done.complaints
    assert done.status == 2 and f"--offload {tmp_path / 'away'}" in line and "--load_bit 4" in line


@pytest.fixture
def in_files(tmp_path: Path) -> Iterator[Callable[[PreTrainedModel], BlockRunner]]:
    """Makes a runner of a model whose blocks stay in files, to be brought as to a GPU, at a cost,
    unless these are `in_memory`."""
    with ExitStack() as at_end:
        alone, number = DistContext(CPU, alone=True), count()

        def make(model: PreTrainedModel, in_memory: bool = True) -> BlockRunner:
            folder = tmp_path / f"checkpoint-{next(number)}"
            model.save_pretrained(folder)
            checkpoint = Checkpoint(str(folder))
            name = decoder_blocks(model)[0]
            model, files = read_in_files(
                lambda converted: load_model(
                    checkpoint,
                    model.config,
                    dtype=model.dtype,
                    device_map=device_map(model, name, CPU),
                    offload=converted,
                ),
                lambda: None,
                stored_names(checkpoint),
                at_end.enter_context(temporary_folder(tmp_path, alone, shared=False)),
                alone,
                CPU,
                shared=False,
                in_memory=in_memory,
            )
            assert not any(hasattr(module, "_hf_hook") for module in model.modules())
            weights = BlockWeights(decoder_blocks(model)[1], CPU, files)
            runner = BlockRunner(model, CPU, weights)
            assert all(parameter.is_meta for parameter in runner.blocks.parameters())
            return runner

        yield make


def saved(runner: BlockRunner, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True)
    with runner.mapped():
        save_model(runner.model, folder, runner.model.dtype)
    return weights(folder)


@pytest.mark.parametrize("architecture", ["Llama", "Gemma 2", "Mixtral"])
def test_blocks_in_files(architecture: str, in_files: Callable, tmp_path: Path) -> None:
    found = []
    for make in (runner_of, in_files):
        runner = make(tiny.ARCHITECTURES[architecture]())
        runner.verify()
        prune_(runner, "sparsegpt")
        value = perplexity(runner, windows(5), 2).value
        fetched = all(parameter.is_meta for parameter in runner.blocks.parameters())
        assert fetched == (make is in_files)
        found.append((value, saved(runner, tmp_path / make.__name__)))
    (value, plain), (again, fetched) = found
    assert again == pytest.approx(value, rel=1e-6)
    assert plain.keys() == fetched.keys()
    assert all(torch.equal(plain[name], fetched[name]) for name in plain)


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2"])
def test_blocks_in_files_are_packed(architecture: str, in_files: Callable, tmp_path: Path) -> None:
    """Block by block; measured, evaluated and saved like that."""
    found = []
    for make in (runner_of, in_files):
        runner = make(tiny.ARCHITECTURES[architecture]())
        prune_(runner, "wanda", Sparsity(0.5, 2, 4))
        model = runner.model
        before = some_logits(model, windows(1))
        report = swap_linears_(
            model,
            runner.blocks,
            CPU,
            lambda index, runner=runner: runner.on_device(index, write_back=True),
        )
        check_same_outputs(before, some_logits(model, windows(1)))
        value = perplexity(runner, windows(5), 2).value
        zeros = check.measure(runner).shares()
        size = footprint(model)
        if make is in_files:
            assert all(parameter.is_meta for parameter in runner.blocks.parameters())
        tensors = saved(runner, tmp_path / make.__name__)
        found.append((str(report), value, zeros, tensors, size))
    (line, value, zeros, plain, size), (line_, value_, zeros_, fetched, size_) = found
    assert (line, zeros, size) == (line_, zeros_, size_) and line.startswith("packed linears: ")
    assert value_ == pytest.approx(value, rel=1e-6)
    assert plain.keys() == fetched.keys() and any(name.endswith(".mask") for name in plain)
    assert all(torch.equal(plain[name], fetched[name]) for name in plain)


def test_states_are_kept_where_the_run_says(
    in_files: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = in_files(tiny.tiny_llama(), in_memory=False)
    asked, own = [], runner.capture
    monkeypatch.setattr(
        runner, "capture", lambda ids, size, where: asked.append(where) or own(ids, size, CPU)
    )
    perplexities(runner, [windows(3), windows(2)], 2, state_device="somewhere")
    assert asked == ["somewhere"] * 2


def test_the_next_block_comes_while_one_computes(
    in_files: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is waited for: by a stream that copies no sooner than it must."""
    expected = perplexity(runner_of(tiny.tiny_llama(num_hidden_layers=4)), windows(5), 2)
    runner = in_files(tiny.tiny_llama(num_hidden_layers=4), in_memory=False)
    Gpu(monkeypatch, eager=True, eager_side=False)
    staging = runner.weights._staging = Staging(CPU)
    assert perplexity(runner, windows(5), 2) == expected
    assert staging.side.done == len(staging.side.work) > 0


@pytest.mark.parametrize("resident", [True, False])
def test_several_sets_are_measured_at_once(
    resident: bool, in_files: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as if alone; where blocks are fetched, each of them once."""
    model = tiny.tiny_llama()
    runner = runner_of(model) if resident else in_files(model, in_memory=False)
    sets = [windows(count, seed=count) for count in (5, 2, 3)]
    alone = [perplexity(runner, one, 2) for one in sets]
    on_device, told, original = [], [], runner.on_device
    monkeypatch.setattr(
        runner, "on_device", lambda index: on_device.append(index) or original(index)
    )
    assert perplexities(runner, sets, 2, on_progress=told.append) == alone
    assert on_device == [0, 1] * (3 + 1 + 2 if resident else 1)
    assert sum(told) == 10 and min(told) >= 0


def test_blocks_whose_files_are_in_memory_are_used_there(in_files: Callable) -> None:
    """Each batch goes through all of them, so that no hidden states pile up; changes are private
    until they are written back."""
    runner = in_files(tiny.tiny_llama())
    assert runner.weights.zero_copy
    for write_back in (False, True):
        with runner.on_device(0, write_back):
            weight = next(iter(runner.blocks[0].parameters()))
            before = weight.clone()
            weight.data.fill_(7)
        with runner.on_device(0):
            weight = next(iter(runner.blocks[0].parameters()))
            assert (weight == 7).all() if write_back else torch.equal(weight, before)


def test_sparsity_is_measured_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting zeros reads every block again, here from the disk."""
    calls, own = [], check.measure
    monkeypatch.setattr(check, "measure", lambda *given: calls.append(1) or own(*given))
    wanda = ["--prune_method", "wanda", "--calibration_data", "uk", "--offload", "away"]
    done = call("--model", "tied", *QUICK, *wanda)
    assert done.status == 0, done.err
    assert len(calls) == 1 and results()["sparsity"]["overall"] == 0.5


def test_how_transformers_reads_is_as_before_afterwards() -> None:
    before = modeling_utils.safe_open
    with pytest.raises(KeyboardInterrupt), as_pread():
        assert modeling_utils.safe_open is not before
        raise KeyboardInterrupt
    assert modeling_utils.safe_open is before
